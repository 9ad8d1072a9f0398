"""A headless Chromium of the distribution for tests of pages, at a window's size; or a skip."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_QUIET = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--hide-scrollbars --host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
)


@contextmanager
def browser(folder: Path, width: int, height: int) -> Iterator[Any]:
    """Yield a Selenium driver whose page is `width` x `height` CSS pixels and reaches no network.

    Skips the test where Selenium, Chromium or its driver is missing.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver_file = shutil.which("chromedriver")
    if binary is None or driver_file is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    rules = "--host-resolver-rules="
    quiet, hosts = _QUIET.split(rules)
    for word in [*quiet.split(), rules + hosts, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1}}
    )
    service = webdriver.ChromeService(driver_file)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def cut_off(driver: Any) -> list[str]:
    """Return what reaches beyond the right edge of the window or of a box that hides it."""
    return driver.execute_script(
        """
        const found = [];
        document.querySelectorAll('main *').forEach(e => {
          if (!e.offsetParent || e.closest('svg')) return;
          if (e.getBoundingClientRect().right > innerWidth + 1)
            found.push('beyond the window: ' + e.tagName + ' ' + e.textContent.slice(0, 40));
          if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible')
            found.push('cut: ' + e.tagName + '.' + e.className + ' ' + e.scrollWidth);
        });
        return found;
        """
    )
