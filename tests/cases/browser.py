"""A real Chromium without a window, that talks to nothing but the page it is given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Opened(NamedTuple):
    """A page in a browser, and the result that it is of."""

    driver: Any
    path: Path
    found: Any

    def __call__(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)


@contextmanager
def chromium(profile: Path, width: int = 1200, height: int = 900) -> Iterator[webdriver.Chrome]:
    """Yield a driver with a profile of its own; it records what the page logs and what it asks the network for."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary, "there is no chromium; apt-get install chromium chromium-driver poppler-utils"
    assert driver, "there is no chromedriver; apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    try:
        found.set_page_load_timeout(120)
        found.set_script_timeout(30)
        yield found
    finally:
        found.quit()


def requests(driver: webdriver.Chrome) -> list[str]:
    """Return the address of everything that was asked for since the last call, `data:` and the like included."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
