"""The pictures of docs/viewer.md, of two traces of one prompt: `python tests/viewer_pictures.py A.jsonl B.jsonl`."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from browser import Browser, missing

from dynatree_core.trace.reading import read
from dynatree_core.trace.summary import run_of
from dynatree_core.trace.view import page

PICTURES = Path(__file__).parents[1] / "docs" / "assets"


def main(first: str, second: str, iteration: str = "3") -> None:
    """Make the pages, take their pictures."""
    if (reason := missing()) is not None:
        sys.exit(f"a browser is needed: {reason}")
    runs = [run_of(Path(name).name, read(name)) for name in (first, second)]
    browser = Browser()
    try:
        with tempfile.TemporaryDirectory() as folder:
            one, two = Path(folder) / "one.html", Path(folder) / "two.html"
            one.write_text(page(runs[:1]), encoding="utf-8")
            two.write_text(page(runs), encoding="utf-8")
            browser.resize(1240, 860)
            browser.open(one, f"#iteration={iteration}")
            browser.hover(".tree .node.refused .mark")
            _take(browser, "viewer.png")
            browser.open(two, f"#iteration={iteration}")
            _take(browser, "viewer-two.png")
            browser.resize(390, 800)
            browser.prefer(dark=True)
            browser.open(one, f"#iteration={iteration}")
            browser.js("document.querySelector('.iteration-view').scrollIntoView()")
            browser.click(".tree .node.accepted .mark")
            _take(browser, "viewer-phone.png")
    finally:
        browser.driver.quit()


def _take(browser: Browser, name: str) -> None:
    # one frame, so that everything is painted
    browser.driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done))")
    taken = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": False})
    (PICTURES / name).write_bytes(base64.b64decode(taken["data"]))
    print(name, (PICTURES / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
