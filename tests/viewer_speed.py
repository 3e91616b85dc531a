"""How quickly does the viewer open and step through a long trace?

A trace of 2,000 iterations with up to 64 drafted nodes each is made, its page is opened in headless Chromium, and 200
iterations are stepped through by the arrow key. Of opening it prints the time from the request to the ready page, of a
step the time from the key until the next frame is painted. The first page of a browser pays for its start as well, so
another page is opened before.

    python tests/viewer_speed.py [ITERATIONS] [NODES]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from browser import Browser, missing
from made_traces import made_trace

from dynatree_core.trace.reading import read
from dynatree_core.trace.summary import run_of
from dynatree_core.trace.view import page

STEPS = """
const [count, done] = arguments;
const painted = () => new Promise(then => requestAnimationFrame(() => setTimeout(then)));
(async () => {
  const times = [];
  for (let step = 0; step < count; step++) {
    const before = performance.now();
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    await painted();
    times.push(performance.now() - before);
  }
  done(times.sort((a, b) => a - b));
})();
"""


def main(num_iterations: int = 2000, num_nodes: int = 64) -> None:
    """Measure and print."""
    if (reason := missing()) is not None:
        sys.exit(f"a browser is needed: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        small = made_trace(root / "small.jsonl")
        long = made_trace(root / "long.jsonl", num_iterations=num_iterations, num_nodes=num_nodes, max_depth=9, tau=0.0)
        (root / "small.html").write_text(page([run_of("small", read(small))]))
        start = time.perf_counter()
        run = run_of("long", read(long))
        (root / "long.html").write_text(page([run]))
        made = time.perf_counter() - start
        sizes = [file.stat().st_size / 1e6 for file in (long, root / "long.html")]
        mean = sum(run[0]["sequences"][0]["drafted"]) / num_iterations
        print(f"{num_iterations} iterations of {mean:.0f} drafted nodes")
        print(f"trace {sizes[0]:.1f} MB, page {sizes[1]:.1f} MB")
        print(f"dynatree view reads it and writes the page in {made:.1f} s")
        browser = Browser()
        try:
            browser.open(root / "small.html")
            opened = []
            for _ in range(5):
                browser.open(root / "long.html")
                opened.append(browser.js("return performance.getEntriesByType('navigation')[0].loadEventEnd"))
            opened.sort()
            print(f"open: median {opened[2]:.0f} ms, worst {opened[-1]:.0f} ms of 5")
            browser.driver.set_script_timeout(300)  # a busy machine takes many times as long
            steps = browser.driver.execute_async_script(STEPS, 200)
            print(f"step: median {steps[100]:.0f} ms, 95 % within {steps[190]:.0f} ms, worst {steps[-1]:.0f} ms of 200")
        finally:
            browser.driver.quit()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
