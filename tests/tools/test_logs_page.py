"""The page of `pidpool logs --html`: self-contained, safe whatever stands in the log, bounded, and to be read
with a pointer and with a keyboard. The part in a browser needs Chromium and its driver.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from click.testing import CliRunner
from event_logs import adopted, checkin, checkout, event, inherited, opened, tag, write
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from pidpool.cli.logs import command
from pidpool.tools.logs import page

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">&amp;"
)


def page_of(directory: Path, events: list[dict[str, Any]]) -> Path:
    path = directory / "page.html"
    log = write(directory / "app.log", events)
    result = CliRunner().invoke(command, [str(log), "--html", str(path)])
    assert result.exit_code == 0, result.output
    assert f"page written: {path}" in result.stderr
    return path


def data_of(path: Path) -> dict[str, Any]:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
    )
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def a_run() -> list[dict[str, Any]]:
    """A parent in a transaction forks twice: one child uses the connection, the other logs nothing."""
    where = f"/srv/app.py:12 in {HOSTILE}"
    return [
        opened(10, 1, 0),
        checkout(10, 1, 0.1, request_id=HOSTILE),
        event("pool.forked", 10, 1, idle=0, checked_out=1, in_transaction=1),
        adopted(20, 10, 1),
        inherited(20, 10, 1, 1, where=where),
        event("connection.refused", 20, 1.5, **tag(10, 1), state="in transaction"),
        opened(20, 2, 2),
        checkout(20, 2, 2.1, opened_at=2),
        checkin(20, 2, 3.1, 1.0, opened_at=2),
        event("pool.forked", 10, 4, idle=1, checked_out=1, in_transaction=1),
        event("checkout.timed_out", 20, 5, wait_time=1.0, size=5, overflow=10, checked_out=15),
        checkin(10, 1, 6, 5.9),
        checkout(20, 2, 7, opened_at=2),
    ]


def test_the_page_is_one_file_that_asks_nobody_for_anything(tmp_path: Path) -> None:
    text = page_of(tmp_path, [opened(10, 1, 0)]).read_text()
    names = set(re.findall(r"https?://[^\s\"']+", text))
    assert names == {"http://www.w3.org/2000/svg"}  # of which nothing is loaded
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|<iframe|<object|\bsrc=", text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; ")
    for part in ("style", "script"):
        (content,) = re.findall(rf"<{part}>(.*?)</{part}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{part}-src 'sha256-{digest}'" in policy[1]


def test_what_stands_in_the_log_cannot_leave_its_place(tmp_path: Path) -> None:
    path = page_of(tmp_path, a_run())
    text = path.read_text()
    assert "taken" in text and HOSTILE not in text
    assert text.count("</script>") == text.count("<script") == 2
    assert HOSTILE in data_of(path)["leaks"][0]["where"]


def test_the_page_shows_lanes_bars_forks_and_leaks(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path, a_run()))
    lanes = [(lane["id"], lane["depth"], lane["parent"]) for lane in data["lanes"]]
    assert lanes == [("10", 0, None), ("20", 1, 0)]
    assert sorted((bar[0], bar[3], bar[2] is None) for bar in data["bars"]) == [
        (0, "10-1", False),
        (1, "20-2", False),
        (1, "20-2", True),
    ]
    assert [(leak["owner"], leak["inheritor"], leak["outcome"]) for leak in data["leaks"]] == [
        (0, 1, "severed, then refused")
    ]
    assert [fork[3:] for fork in data["unmatchedForks"]] == [[1, 1, 1, "in transaction", None]]
    assert len(data["timeouts"]) == 1
    assert data["leakCount"] == 3 and data["openLeakCount"] == 2
    assert data["leftOut"] == []


def test_a_huge_log_makes_no_huge_page_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_BARS", 50)
    monkeypatch.setattr(page, "MOST_LANES", 10)
    monkeypatch.setattr(page, "MOST_LEAKS", 7)
    events = [opened(10, 1, 0)]
    for n in range(40):
        child, at = 100 + n, n + 1.0
        state = "in transaction" if n >= 35 else "idle"
        events += [adopted(child, 10, at), inherited(child, 10, 1, at, state), opened(child, 1, at)]
        for k in range(10):
            began = at + 1 + k
            events += [
                checkout(child, 1, began, opened_at=at),
                checkin(child, 1, began + 0.5, 0.5 + n / 1000, opened_at=at),
            ]
    data = data_of(page_of(tmp_path, sorted(events, key=lambda each: each["at"])))
    lanes = [lane["id"] for lane in data["lanes"]]
    assert len(lanes) == 10 and lanes[0] == "10"
    assert {"135", "136", "137", "138", "139"} < set(lanes)  # where the open transactions are
    assert len(data["bars"]) == 50
    assert len(data["leaks"]) == 7 and sum(leak["open"] for leak in data["leaks"]) == 5
    assert data["leftOut"] == [
        "31 processes: those with leaks are shown first, then the oldest",
        "350 checkouts: the longest are shown",
        "33 leaks: those with an open transaction are shown first",
    ]


# -- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started.driver


@pytest.fixture
def shown(browser: WebDriver, tmp_path: Path) -> WebDriver:
    show(browser, page_of(tmp_path, a_run()))
    return browser


def show(browser: WebDriver, path: Path, width: int = 1280, dark: bool = False) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(path.as_uri())
    wait(browser).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#plot svg [data-mark]"))
    assert browser.get_log("browser") == []  # no error, and nothing that the policy had to forbid


def wait(browser: WebDriver) -> WebDriverWait[WebDriver]:
    return WebDriverWait(browser, 20)


def the_leak(browser: WebDriver) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, "#plot [aria-label^='connection 10-1 crossed a fork']")


def tip(browser: WebDriver) -> str:
    element = browser.find_element(By.ID, "tip")
    wait(browser).until(lambda _: element.is_displayed())
    return element.text


THE_LEAK = [
    "connection 10-1 crossed a fork with an open transaction",
    "owner",
    "pid 10",
    "inherited by",
    "pid 20",
    "at",
    "16:00:01.000",
    "state",
    "in transaction",
    "done",
    "severed, then refused",
    "descriptor",
    "7",
    "server pid",
    "50011",
]


@pytest.mark.system
def test_pointing_at_a_leak_shows_its_fields(shown: WebDriver) -> None:
    ActionChains(shown).move_to_element(the_leak(shown).find_element(By.CSS_SELECTOR, ".leak")).perform()
    lines = tip(shown).splitlines()
    assert lines[: len(THE_LEAK)] == THE_LEAK
    assert f"/srv/app.py:12 in {HOSTILE}" in lines  # as text
    assert shown.title == "pidpool logs"
    assert shown.find_elements(By.CSS_SELECTOR, "img, body script:not([type]) ~ *") == []


@pytest.mark.system
def test_a_click_keeps_a_leak(shown: WebDriver) -> None:
    detail = shown.find_element(By.ID, "detail")
    assert not detail.is_displayed()
    the_leak(shown).find_element(By.CSS_SELECTOR, ".leak").click()
    wait(shown).until(lambda _: detail.is_displayed())
    assert detail.text.splitlines()[0] == THE_LEAK[0]
    assert detail.value_of_css_property("border-top-color") == "rgba(200, 32, 47, 1)"


@pytest.mark.system
def test_the_keyboard_reaches_every_mark(shown: WebDriver) -> None:
    keys = ActionChains(shown)
    shown.find_element(By.ID, "whole").send_keys(Keys.TAB)
    assert tip(shown).splitlines()[0] == THE_LEAK[0]
    seen = set()
    for key in (
        Keys.HOME,
        Keys.ARROW_RIGHT,
        Keys.ARROW_RIGHT,
        Keys.ARROW_RIGHT,
        Keys.ARROW_UP,
        Keys.ARROW_LEFT,
    ):
        keys.send_keys(key).perform()
        seen.add(tip(shown).splitlines()[0])
    assert seen == {
        THE_LEAK[0],
        "20-2 checked out for 1 s",
        "no connection was free for 1 s",
        "20-2 checked out for 0 µs and not returned",
        "2 connections crossed a fork, 1 with an open transaction",
        "10-1 checked out for 5.9 s",
    }
    keys.send_keys(Keys.ENTER).perform()
    assert shown.find_element(By.ID, "detail").text.startswith("10-1 checked out for 5.9 s")
    keys.send_keys("+").perform()
    assert shown.switch_to.active_element.get_attribute("aria-label").startswith("10-1 checked out")
    keys.send_keys(Keys.ESCAPE).perform()
    assert not shown.find_element(By.ID, "detail").is_displayed()


@pytest.mark.system
def test_the_timeline_can_be_looked_at_closely(shown: WebDriver) -> None:
    def width() -> float:
        bar = shown.find_element(By.CSS_SELECTOR, "[aria-label^='20-2 checked out for 1 s'] rect")
        return float(bar.get_attribute("width") or 0)

    before = width()
    shown.find_element(By.ID, "closer").click()
    assert width() == pytest.approx(2 * before, rel=0.01)
    shown.find_element(By.ID, "whole").click()
    assert width() == pytest.approx(before, rel=0.01)


@pytest.mark.system
def test_the_list_of_leaks_leads_to_the_timeline(shown: WebDriver) -> None:
    for _ in range(6):
        shown.find_element(By.ID, "closer").click()
        shown.find_element(By.ID, "later").click()
    assert shown.find_elements(By.CSS_SELECTOR, "#plot .leak") == []
    rows = shown.find_elements(By.CSS_SELECTOR, "#leak-list tbody tr")
    assert [row.find_element(By.CSS_SELECTOR, ".state").text for row in rows] == ["in transaction"] * 2
    assert f"/srv/app.py:12 in {HOSTILE}" in rows[0].text
    rows[0].find_element(By.TAG_NAME, "button").click()
    assert shown.switch_to.active_element == the_leak(shown)


@pytest.mark.system
def test_the_lines_that_forked_are_a_table(browser: WebDriver, tmp_path: Path) -> None:
    lines = {20: f"/srv/{HOSTILE}.py:3 in resize < /srv/app.py:9 in main", 30: "/srv/mail.py:7 in send"}
    crossed = [
        inherited(20, 10, 1, 1, forked_at=lines[20]),
        inherited(20, 10, 2, 1, "idle", forked_at=lines[20]),
    ]
    crossed += [inherited(30, 10, 1, 2, "idle", forked_at=lines[30])]
    show(browser, page_of(tmp_path, [opened(10, 1, 0), opened(10, 2, 0), *crossed]))
    rows = [
        [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in browser.find_elements(By.CSS_SELECTOR, "#fork-lines tbody tr")
    ]
    assert rows == [[lines[20], "2", "1"], [lines[30], "1", "0"]]
    listed = browser.find_elements(By.CSS_SELECTOR, "#leak-list [data-name='forked at']")
    assert [cell.text for cell in listed] == [lines[20], lines[20], lines[30]]


@pytest.mark.system
def test_nothing_is_asked_of_any_host(shown: WebDriver) -> None:
    asked = shown.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [address for address in asked if not address.startswith("data:")] == []


@pytest.mark.system
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_legible_in_light_and_dark_and_on_a_narrow_screen(
    browser: WebDriver, tmp_path: Path, width: int, dark: bool
) -> None:
    show(browser, page_of(tmp_path, a_run()), width, dark)
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    body = browser.find_element(By.TAG_NAME, "body")
    for name, element in (("background-color", body), ("color", body)):
        channels = [int(part) for part in re.findall(r"\d+", element.value_of_css_property(name))[:3]]
        assert (sum(channels) < 3 * 128) == (dark == (name == "background-color"))
    label, plot = (browser.find_element(By.ID, name) for name in ("labels", "plot"))
    assert label.rect["height"] == pytest.approx(plot.rect["height"], abs=2)
    assert plot.rect["width"] > 200
    # The tip stays on the screen.
    ActionChains(browser).move_to_element(the_leak(browser).find_element(By.CSS_SELECTOR, ".leak")).perform()
    assert tip(browser)
    box = browser.find_element(By.ID, "tip").rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.system
def test_a_log_without_events_is_said_to_be_one(browser: WebDriver, tmp_path: Path) -> None:
    browser.get(page_of(tmp_path, []).as_uri())
    assert "No events of pidpool" in browser.find_element(By.ID, "range").text
    assert not browser.find_element(By.TAG_NAME, "main").is_displayed()
