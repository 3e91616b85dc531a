"""From an empty folder to the trace of a policy of one's own, as docs/start.md says it, each step timed.

    python tests/strangers_path.py [ADDRESS] [FIRST]

The commands are those of the page. ADDRESS is the repository's, by default this checkout (what is committed of it). It
ends with 1 at the first command that fails, and prints the rows of the page's table. FIRST leaves out the commands
before the one that begins so, for a look at the rest in the environment that is active: `dynatree new-policy`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from browser import Browser, missing

from dynatree_core.trace.view import is_page

ROOT = Path(__file__).parents[1]
HEADING = "## From an empty folder to a policy of your own"


def commands_of(page: str) -> list[str]:
    """The lines of the first block below the heading."""
    _, found, below = page.partition(HEADING)
    assert found, f"docs/start.md has no '{HEADING}'"
    block = re.search(r"```sh\n(.*?)```", below, re.S)
    assert block is not None, "the commands stand in a block"
    return block[1].splitlines()


def main(address: str = str(ROOT), first: str = "") -> int:
    """Follow the path; the exit status."""
    commands = commands_of((ROOT / "docs" / "start.md").read_text(encoding="utf-8"))
    start = next((place for place, command in enumerate(commands) if command.startswith(first)), None)
    if start is None:
        sys.exit(f"FIRST must begin one of the commands of docs/start.md, got {first!r}")
    with tempfile.TemporaryDirectory() as folder:
        shell = subprocess.Popen(["bash"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                 env=os.environ | {"BROWSER": "true"})  # fmt: skip
        for command in commands[start:]:
            status, seconds = timed(shell, command.replace("ADDRESS", address))
            print(f"| `{command}` | {seconds:.0f} |", flush=True)
            if status:
                print(f"ended with {status}: {command}")
                return 1
        shell.communicate()
        [page] = [file for file in Path(folder).rglob("mine.html") if is_page(file)]
        print(seen(page))
    return 0


def timed(shell: subprocess.Popen[str], command: str) -> tuple[int, float]:
    """Run a command in a shell that keeps its folder and environment: exit status and seconds."""
    assert shell.stdin is not None, "it is a pipe"
    assert shell.stdout is not None, "it is a pipe"
    begin = time.monotonic()
    shell.stdin.write(f"{{ {command}\n}} >&2 </dev/null; echo $?\n")  # what it prints is not what is read here
    shell.stdin.flush()
    return int(shell.stdout.readline()), time.monotonic() - begin


def seen(page: Path) -> str:
    """What a browser shows of the page."""
    if (reason := missing()) is not None:
        return f"the page was not opened: {reason}"
    browser = Browser()
    try:
        browser.open(page)
        nodes = browser.js("return document.querySelectorAll('.tree .node').length")
        return f"{browser.text('.iteration-view h3')} with {nodes} nodes; complaints: {browser.console() or 'none'}"
    finally:
        browser.driver.quit()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
