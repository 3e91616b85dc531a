"""How commands end: exit statuses, one line about what went wrong, and standard streams that are closed or full."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynatree_core.cli.exits import FAILED, INTERRUPTED, MISUSED, STATUSES, UNREAD

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "exit-statuses.md"


def test_the_table_says_what_the_code_does() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert {int(status): meaning for status, meaning in rows} == STATUSES
    assert "exit-statuses.md" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def ended(code: str, *redirections: str) -> tuple[int, str, str]:
    """Run `command` of this code to its end, with the shell's redirections: exit status, output, complaints."""
    program = (
        "import errno, os, signal, sys, click\n"
        "from dynatree_core.errors import DynaTreeError, InputError\n"
        "from dynatree_core.cli.exits import end_process, without_exits\n"
        "def command():\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "end_process(without_exits(command))\n"
    )
    shell = " ".join(['exec "$0" -c "$1"', *redirections])
    done = subprocess.run(["sh", "-c", shell, sys.executable, program], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def error(words: str) -> str:
    return f"dynatree: error: {words}\n"


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("return None", 0, None),
        ("return 1", FAILED, None),
        ("raise DynaTreeError('a fault')", FAILED, "a fault"),
        ("error = DynaTreeError('a fault')\nerror.add_note('another')\nraise error", FAILED, "a fault; another"),
        ("raise InputError('a mistake')", MISUSED, "a mistake"),
        ("raise click.UsageError('no such option.')", MISUSED, "no such option"),
        ("raise FileNotFoundError(2, 'No such file or directory', 'x')", FAILED, "No such file or directory: x"),
        ("os.rename('none', 'nowhere')", FAILED, "No such file or directory: none -> nowhere"),
        ("raise OSError('words alone')", FAILED, "words alone"),
        ("raise MemoryError", FAILED, "no memory is left (MemoryError); take a smaller model or a shorter text"),
        ("1 / 0", FAILED, "unexpected ZeroDivisionError: division by zero; DYNATREE_DEBUG=1 shows where"),
        ("raise KeyboardInterrupt", INTERRUPTED, None),
        ("raise click.Abort", INTERRUPTED, None),
        ("raise click.Abort from EOFError('cut')", FAILED, "unexpected EOFError: cut; DYNATREE_DEBUG=1 shows where"),
        (
            "sys.exit(0)",
            FAILED,
            "a command must come to its end, but a plugin or library raised SystemExit: it called exit(0); "
            "DYNATREE_DEBUG=1 shows where",
        ),
    ],
)
def test_each_way_to_end(code: str, status: int, words: str | None) -> None:
    assert status in STATUSES
    assert ended(code) == (status, "", "" if words is None else error(words))


def test_closed_standard_input_is_named() -> None:
    for read in ("sys.stdin.read()", "sys.stdin.buffer.read()", "sys.stdin.buffer.readline()", "input()"):
        status, _, err = ended(read, "<&-")
        assert status == FAILED, read
        assert err.startswith("dynatree: error: standard input must be open, but it is closed")
    assert ended("print(sys.stdin.isatty())", "<&-") == (0, "False\n", "")


def test_closed_standard_output_is_named_where_it_is_needed() -> None:
    for write in ("print('x')", "click.echo('x')", "from rich.console import Console; Console().print('x')"):
        status, _, err = ended(write, ">&-")
        assert status == FAILED
        assert err == error("standard output must be open, but it is closed; lead it to a file or to /dev/null")
    assert ended("click.echo('working', err=True)", ">&-") == (0, "", "working\n")


def test_closed_standard_error_loses_messages_only() -> None:
    assert ended("click.echo('note', err=True); click.echo('answer')", "2>&-") == (0, "answer\n", "")
    assert ended("raise DynaTreeError('a fault')", "2>&-") == (FAILED, "", "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = f"with open({str(tmp_path / 'weights')!r}, 'w') as file:\n    os.write(1, b'from C')\n    file.write('mine')"
    assert ended(code, "<&-", ">&-", "2>&-")[0] == 0
    assert (tmp_path / "weights").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_a_full_disk_behind_standard_output_is_named() -> None:
    words = error("No space left on device: standard output")
    assert ended("click.echo('x')", ">/dev/full") == (FAILED, "", words)
    assert ended("sys.stdout.write('x')", ">/dev/full") == (FAILED, "", words)  # noticed at the end
    assert ended("click.echo('x', err=True)\nreturn 1", "2>/dev/full")[0] == FAILED
    assert ended("raise InputError('x')", "2>/dev/full")[0] == MISUSED


CLICK = """
import select, sys, click
from dynatree_core.cli.exits import end_process, without_exits

@click.command()
def command():
    leaving = select.poll()
    leaving.register(sys.stdout.fileno(), 0)  # nothing is asked for but an error: that nobody reads any more
    leaving.poll(60_000)
    try:
        {write}
    finally:
        click.echo("the end of an answer")

end_process(without_exits(lambda: command.main([], standalone_mode=False)))
"""


@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
@pytest.mark.parametrize(
    "write", ["click.echo('x' * 1000000)", "sys.stdout.write('x')", "click.echo('x', err=True)", "print('x' * 100000)"]
)
def test_a_reader_that_has_left_is_no_fault_and_no_success(write: str, pipe: str) -> None:
    shell = f'{{ {{ "$0" -c "$1"; echo "status $?" >&3; }} {pipe} true; }} 3>&1'
    program = CLICK.format(write=write)
    done = subprocess.run(["sh", "-c", shell, sys.executable, program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"status {UNREAD}\n"
    assert done.stderr == ("x\n" if "err" in write and pipe == "|" else "")


def test_standard_output_holds_what_is_ours_alone() -> None:
    code = "click.echo('first')\nos.write(1, b'from C\\n')\nos.system('echo from a child')\nclick.echo('second')"
    status, out, err = ended(code)
    assert (status, out) == (0, "first\nsecond\n")
    assert err == "from C\nfrom a child\n"


def test_a_prompt_from_closed_standard_input() -> None:
    command = f'exec "{sys.executable}" -c "from dynatree_core.cli.group import main; main()" generate - <&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (MISUSED, "")
    assert "standard input must be open, but it is closed" in done.stderr
    assert "unexpected" not in done.stderr
