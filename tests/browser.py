"""A real browser for tests of pages: Debian's Chromium without a window, driven by selenium.

Nothing is downloaded: without selenium, the browser or its driver the tests are skipped, with the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, PHONE = (1400, 1000), (390, 844)
ARROWS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}  # of the WebDriver protocol
TAB, HOME, END, ENTER, PAGE_DOWN = "\ue004", "\ue011", "\ue010", "\ue007", "\ue00f"


def missing() -> str | None:
    """Why there is no browser here, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed: pip install selenium"
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium was found: apt-get install chromium"
    if shutil.which("chromedriver") is None:
        return "no driver of Chromium was found: apt-get install chromium-driver"
    return None


class Browser:
    """One tab. `open` waits until the page has said that it is ready."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        # the sandbox does not start for root and in many containers; all pages are our own
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.resize(*WIDE)

    def resize(self, width: int, height: int) -> None:
        """Make the window so wide and high, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, *, dark: bool = False, media: str = "screen") -> None:
        """Ask for light or dark colours, on a screen or on paper."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})

    def open(self, page: Path | str, fragment: str = "") -> None:
        """Open a file or an address; a new document even where the same one is open."""
        self.driver.get("about:blank")
        self.console()
        self.driver.get(f"{page.as_uri() if isinstance(page, Path) else page}{fragment}")
        self.wait("document.documentElement.dataset.ready !== undefined")
        assert self.js("return document.documentElement.dataset.ready") == "yes", self.console()

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def texts(self, selector: str) -> list[str]:
        """The text of every element that a CSS selector finds."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def text(self, selector: str) -> str:
        return self.texts(selector)[0]

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(ARROWS.get(key, key))

    def hover(self, selector: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(self.driver.find_element("css selector", selector)).perform()

    def wait(self, code: str, seconds: float = 60) -> None:
        """Until an expression of the page is true; so long at most."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda driver: driver.execute_script(f"return {code}"), code)

    def console(self) -> list[str]:
        """What the page has complained about since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    os.environ.setdefault("SE_OFFLINE", "true")  # selenium looks for nothing, it is told everything
    one = Browser()
    yield one
    one.driver.quit()
