"""The picture of docs/serve.md, of a server that runs: `python tests/start_page_picture.py http://127.0.0.1:8000/`."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from browser import ENTER, Browser, missing

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "start-page.png"


def main(address: str, question: str = "Name the planets of the solar system, one a line.") -> None:
    """Ask, and take the picture when the answer is there."""
    if (reason := missing()) is not None:
        sys.exit(f"a browser is needed: {reason}")
    browser = Browser()
    try:
        browser.resize(1000, 1120)  # wide enough for the trees to be open
        browser.open(address)
        browser.js("document.getElementById('length').value = 120; document.getElementById('question').focus()")
        browser.press(question, ENTER)
        browser.wait("document.getElementById('said').textContent !== ''", seconds=120)
        # a frame, so that the last tree is painted
        browser.driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done))")
        taken = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        PICTURE.write_bytes(base64.b64decode(taken["data"]))
        print(PICTURE.name, PICTURE.stat().st_size, "bytes")
    finally:
        browser.driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
