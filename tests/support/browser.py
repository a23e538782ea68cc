"""A headless Chromium for tests, with nothing of its own going on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")
PATIENCE = 30.0

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"prefers_color_scheme": "light"},
    "dark": {"prefers_color_scheme": "dark"},
    "narrow": {"width": 360, "height": 740, "prefers_color_scheme": "light"},
    "narrow dark": {"width": 360, "height": 740, "prefers_color_scheme": "dark"},
}
"""What `Browser.emulate` takes for each look that a page is tested in."""


class Browser:
    """A tab, with the questions that the tests have."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def go(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("document.querySelector(arguments[0]).innerText", selector))

    def wait(self, condition: Callable[[], T], what: str) -> T:
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.1).until(lambda _: condition(), what)

    def wait_for(self, selector: str) -> None:
        self.wait(
            lambda: self.run("document.querySelector(arguments[0]) !== null", selector), f"no {selector}"
        )

    def emulate(self, *, width: int = 1280, height: int = 1000, **media: str) -> None:
        """Set the size of the window, and media features with ``_`` for ``-``."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def requested(self) -> list[str]:
        """Return the URLs that the page asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [
            message["params"]["request"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [request["url"] for request in sent]

    def complaints(self) -> list[str]:
        """Return the console's errors since the last call, broken policies included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Run a browser with a fresh profile in the given directory."""
    binary, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary and chromedriver, "needs Chromium: apt-get install chromium chromium-driver"
    options = Options()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def install_axe(directory: Path) -> str:
    """Return the source of axe-core, from npm."""
    arguments = ["--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4"]
    subprocess.run(
        ["npm", "install", "--prefix", str(directory), *arguments],
        check=True,
        capture_output=True,
        timeout=110,
    )
    return (directory / "node_modules/axe-core/axe.min.js").read_text()


def violations(browser: Browser, axe: str) -> list[Any]:
    """Return what axe-core finds wrong with the page: rules, and the elements that break them."""
    browser.driver.execute_script(axe)
    script = "axe.run().then(({ violations, passes }) => arguments[0]([violations, passes.length]))"
    found, passes = browser.driver.execute_async_script(script)
    assert passes > 15
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
