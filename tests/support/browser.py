"""Chromium without a window, driven by Selenium: what a page shows, complains of and asks the network for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Browser", "find_chromium", "open_browser"]

_PATIENCE_S = 240  # CI has two slow cores, and the first answer loads the generator
_DRIVERS = ("chromedriver", "/usr/lib/chromium/chromedriver")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> tuple[str, str] | None:
    """Paths of the browser and of its driver; None where one of them is missing."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (_BROWSERS, _DRIVERS)]
    return (found[0], found[1]) if found[0] and found[1] else None


class Browser:
    """A page in Chromium. Waits are for conditions, never for times."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._events: list[dict[str, Any]] = []

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, selector: str) -> Any:
        """The first element that is shown."""
        from selenium.webdriver.common.by import By

        def shown(driver: Any) -> Any:
            return next((one for one in driver.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()), None)

        return self.until(shown, f"{selector} is not shown")

    def until(self, condition: Any, problem: str) -> Any:
        """What ``condition(driver)`` gives, once it is true."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, _PATIENCE_S, 0.1, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(condition, problem)

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def tab(self, name: str) -> None:
        self.until(
            lambda driver: driver.execute_script(
                "const tab = [...document.querySelectorAll('button[role=tab]')]"
                ".find(e => e.textContent.trim() === arguments[0] && e.offsetParent);"
                "if (tab) tab.click(); return !!tab",
                name,
            ),
            f"there is no tab {name}",
        )

    def type(self, selector: str, text: str) -> None:
        """``text`` in place of what a field holds."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def choose(self, group: str, value: str) -> None:
        """A radio button."""
        self.click(f"{group} label:has(input[value='{value}'])")

    def text(self, selector: str) -> str:
        shown: str = self.find(selector).text
        return shown

    def complaints(self) -> list[str]:
        """What the console has had of errors and warnings since the last call."""
        return [
            f"{entry['level']}: {entry['message']}"
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def hosts(self) -> set[str]:
        """``host:port`` of everything that was asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc.rpartition("@")[2] for url in urls if url.startswith(("http", "ws"))}

    def screenshot(self, path: Path, width: int = 1100) -> Path:
        """The whole page as PNG; returns ``path``."""
        self.driver.set_window_size(width, 600)
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        self.driver.set_window_size(width, min(2000, int(height) + 160))
        self.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        self.driver.save_screenshot(str(path))
        return path


@contextmanager
def open_browser(**preferences: Any) -> Iterator[Browser]:
    """A browser with a fresh profile; it is gone afterwards."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = find_chromium()
    assert found is not None, "there is no Chromium: make chromium"
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    arguments = ["--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1100,900", "--lang=en"]
    # The sandbox will not run for root, which is who tests are in a container.
    for argument in [*arguments, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found[1], **preferences))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
