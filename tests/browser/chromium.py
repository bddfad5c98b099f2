"""Headless Chromium on a network where every host but 127.0.0.1 is unreachable.

Debian's packages: chromium, chromium-driver, fonts-noto-cjk. Screenshots go to
$LLM_TEST_SHOTS (default: the test's temporary folder).
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium", reason="pip install -r tests/browser/requirements.txt")
if not shutil.which("chromedriver"):
    pytest.skip("apt-get install chromium chromium-driver fonts-noto-cjk", allow_module_level=True)

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Keys
from selenium.webdriver.support.ui import WebDriverWait

DESKTOP, PHONE = (1280, 800), (390, 844)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


class Page:
    """One page, and what it asked of the network."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.asked: list[str] = []
        self.failed: list[str] = []

    def open(self, url: str) -> None:
        self.driver.get(url)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str = "body") -> str:
        return "\n".join(str(self.driver.execute_script("return arguments[0].innerText", e)) for e in self.all(css))

    def wait(self, true: Any, timeout: float = 30) -> Any:
        return WebDriverWait(self.driver, timeout, 0.1, [StaleElementReferenceException]).until(lambda _: true())

    def wide(self) -> bool:
        """Whether the page must be scrolled sideways."""
        return bool(self.driver.execute_script("return document.documentElement.scrollWidth > window.innerWidth + 1"))

    def network(self) -> None:
        """Read the browser's log into `asked` (the hosts elsewhere) and `failed` (URLs without a good answer)."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = urlsplit(message["params"]["request"]["url"])
                if url.scheme in ("http", "https", "ws", "wss") and url.hostname != "127.0.0.1":
                    self.asked.append(url.geturl())
            elif message["method"] == "Network.responseReceived" and message["params"]["response"]["status"] >= 400:
                self.failed.append(message["params"]["response"]["url"])

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def shot(self, path: Any) -> None:
        self.driver.save_screenshot(str(path))


@contextlib.contextmanager
def chromium(size: tuple[int, int] = DESKTOP, language: str = "en", dark: bool = False) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--lang={language}",
        "--no-proxy-server",
        OFFLINE,
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield Page(driver)
    finally:
        driver.quit()
