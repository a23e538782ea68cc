"""The page for people, in a real browser: live, readable by all, with requests to its own server alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import LOOKS, Browser, chromium, violations
from engines import MakeEngine
from families import connection, family, pool_reporting, process, small_family
from parent import server_pid

from pidpool import serve_stats, tag_of
from pidpool.export.endpoint import StatsServer
from pidpool.stats.snapshots import Counters

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """The browser, which must have nothing to complain of in the end."""
    shared_browser.emulate()
    shared_browser.go("about:blank")
    shared_browser.requested()
    shared_browser.complaints()
    yield shared_browser
    assert shared_browser.complaints() == []


class Reported:
    """A family that changes while it is looked at, and counts how often that is."""

    def __init__(self) -> None:
        self.family: Any = small_family
        self.looks = 0

    def __call__(self) -> Any:
        self.looks += 1
        return self.family()


@pytest.fixture
def reported() -> Reported:
    return Reported()


@pytest.fixture
def served(reported: Reported) -> Iterator[StatsServer]:
    with serve_stats(pool_reporting(reported), port=0) as stats:
        yield stats


def show(browser: Browser, stats: StatsServer) -> None:
    browser.go(stats.url)
    browser.wait_for(".process")


# -- what it shows


def test_the_family_is_a_tree_of_processes_and_their_connections(
    browser: Browser, served: StatsServer
) -> None:
    show(browser, served)
    assert browser.text(".pool h2") == "shop"
    parent, child, ended = (
        '.tree > [data-pid="41"]',
        '[data-pid="41"] > .children > [data-pid="57"]',
        '[data-pid="58"]',
    )
    assert "made the pool" in browser.text(f"{parent} > .card")
    assert "forked by 41" in browser.text(f"{child} > .card")
    assert "has ended" in browser.text(f"{ended} > .card")
    assert "connects failed: 2 OperationalError" in browser.text(f"{parent} > .card")
    chips = browser.run(
        "[...document.querySelectorAll(arguments[0])].map(chip => chip.innerText)", f"{parent} > .card .chip"
    )
    assert len(chips) == 2
    assert "idle" in chips[0] and "pid 41 fd 11 server 411" in chips[0]
    assert "used" in chips[1] and "pid 41 fd 12 server 412" in chips[1] and "thread MainThread" in chips[1]
    colours = browser.run(
        "[...document.querySelectorAll('.tree .chip')].map(chip => getComputedStyle(chip).backgroundColor)"
    )
    assert colours[0] != colours[1]
    tiles = browser.run(
        "[...document.querySelectorAll('.tiles > div')].map(tile => tile.innerText.split(/\\s+/))"
    )
    assert dict(tiles) == {
        "used": "1", "idle": "2", "waiting": "3", "processes": "2",
        "checkouts": "39", "opened": "3", "failed": "2", "timeouts": "1", "overdue": "1", "leaks": "1",
    }  # fmt: skip
    assert "3 connections open, 30 at most; the server allows 100" in browser.text(".capacity")


def test_the_limit_is_shown_as_the_servers_is(
    browser: Browser, reported: Reported, served: StatsServer
) -> None:
    taken = process(1, None, Counters(closed={"given back": 7}), permits=12, wanting=3)
    reported.family = lambda: family(taken, limit=12)
    show(browser, served)
    said = "12 at most (family_limit 12: 12 taken, 3 wanted, 7 given back); the server allows 100"
    assert said in browser.text(".capacity")
    assert "7 given back" in browser.text(".process .past")


def test_leaks_are_marked(browser: Browser, reported: Reported, served: StatsServer) -> None:
    foreign = process(60, 57, connections=[connection(57, 1, "used")])
    reported.family = lambda: family(*small_family().processes, foreign)
    show(browser, served)
    marked = browser.run("[...document.querySelectorAll('[data-leak=true]')].map(each => each.dataset.pid)")
    assert marked == ["57", "60"]
    assert "leak: 1 inherited in use" in browser.text('[data-pid="57"] > .card')
    assert browser.run("""document.querySelector('[data-pid="60"] .chip').dataset.state""") == "leak"
    assert "not its own" in browser.text('[data-pid="60"] .chip')
    assert browser.run("document.querySelector('[data-tile=leaks]').classList.contains('alarm')")


def test_several_pools_and_odd_names(browser: Browser) -> None:
    name = '<img src=x onerror="alert(1)"> & "quotes"'
    engines = [
        pool_reporting(small_family()),
        pool_reporting(small_family(pool=name)),
        pool_reporting(small_family(pool="")),
    ]
    with serve_stats(*engines, port=0) as stats:
        show(browser, stats)
        headings = "[...document.querySelectorAll('.pool h2')].map(each => each.textContent)"
        assert browser.run(headings) == ["shop", name, ""]
        assert browser.run("document.querySelectorAll('main img').length") == 0


# -- live


def test_the_tree_grows_without_a_reload(
    browser: Browser, make_engine: MakeEngine, tls_url: str, clean_log: None
) -> None:
    engine = make_engine(tls_url)
    with engine.connect() as mine:
        own = server_pid(mine)
        mine.commit()
        with serve_stats(engine, port=0) as stats:
            show(browser, stats)
            browser.run("window.loaded = 'once'")
            assert f"server {own}" in browser.text(f'[data-pid="{os.getpid()}"] .chip[data-state="used"]')

            reported, writer = os.pipe()
            ask, asked = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    with engine.connect() as connection:
                        os.write(writer, str(server_pid(connection)).encode())
                        os.read(ask, 1)
                    engine.dispose()
                finally:
                    os._exit(0)
            try:
                theirs = int(os.read(reported, 20))
                card = f'[data-pid="{os.getpid()}"] > .children > [data-pid="{child}"] > .card'
                browser.wait_for(f'{card} .chip[data-state="used"]')
                assert f"server {theirs}" in browser.text(f"{card} .chip")
                assert "inherited 1 no transaction" in browser.text(card)
                os.write(asked, b".")
                os.waitpid(child, 0)
                child = 0
                browser.wait(lambda: "has ended" in browser.text(card), "the child's end is not shown")
                browser.wait(
                    lambda: "Ended: pid" in str(browser.run("document.getElementById('news').textContent")),
                    "no news",
                )
            finally:
                if child:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                for descriptor in (reported, writer, ask, asked):
                    os.close(descriptor)
            assert browser.run("window.loaded") == "once"
        assert server_pid(mine) == own
        tag = tag_of(mine)
        assert tag is not None and tag.server_pid == own


def test_charts_are_drawn_from_what_was_seen(
    browser: Browser, reported: Reported, served: StatsServer
) -> None:
    reported.family = lambda: family(
        process(41, None, Counters(checkouts=100 * reported.looks), connections=[connection(41, 1, "used")])
    )
    show(browser, served)
    label = """document.querySelector('[data-chart="rate"] svg').getAttribute("aria-label")"""
    browser.wait(lambda: "now –" not in browser.run(label), "no rate is shown")
    assert "checkouts per second over the last" in browser.run(label)
    points = """document.querySelector('[data-chart="rate"] .line').getAttribute("d").split("L").length"""
    browser.wait(lambda: browser.run(points) >= 3, "the chart does not grow")


def test_an_application_that_is_gone_is_shown_as_stale_and_found_again(
    browser: Browser, reported: Reported
) -> None:
    engine = pool_reporting(reported)
    stats = serve_stats(engine, port=0)
    show(browser, stats)
    browser.wait(lambda: browser.text("#status") == "live", "it is not live")
    stats.close()
    browser.wait(lambda: browser.text("#status").startswith("stale, as of"), "it is not stale")
    assert "does not answer" in browser.text("#problem")
    assert browser.run("document.querySelectorAll('.process').length") == 3  # the last that is known
    with serve_stats(engine, port=stats.port):
        browser.wait(lambda: browser.text("#status") == "live", "it is not live again")
        assert browser.run("document.getElementById('problem').hidden")
    # The console logs each request that found no server, and nothing more.
    assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in browser.complaints())


def test_an_error_of_the_application_s_is_shown(
    browser: Browser, reported: Reported, served: StatsServer
) -> None:
    show(browser, served)
    reported.family = lambda: 1 / 0
    browser.wait(lambda: "ZeroDivisionError" in browser.text("#problem"), "the error is not shown")
    looks = reported.looks
    browser.driver.execute_async_script("setTimeout(arguments[0], 6000)")
    assert looks < reported.looks <= looks + 2  # after 2 and 4 seconds more: it asks ever less often
    reported.family = small_family
    browser.wait(lambda: browser.text("#status") == "live", "it is not live again")
    assert all("500" in complaint for complaint in browser.complaints())


def test_a_hidden_page_asks_nothing(browser: Browser, reported: Reported, served: StatsServer) -> None:
    show(browser, served)
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    try:
        # One question may have been under way; two seconds later there are no more.
        seen = []
        for _ in range(3):
            browser.driver.execute_async_script("setTimeout(arguments[0], 2000)")
            seen.append(reported.looks)
        assert seen[0] == seen[1] == seen[2]
    finally:
        browser.driver.close()
        browser.driver.switch_to.window(first)
    before = reported.looks
    browser.wait(lambda: reported.looks > before + 1, "it does not go on when it is looked at again")


def test_it_asks_no_other_host_and_sets_nothing_aside(
    browser: Browser, served: StatsServer, reported: Reported
) -> None:
    show(browser, served)
    browser.wait(lambda: reported.looks >= 3, "it does not ask again")
    requested = browser.requested()
    assert f"{served.url}stats.json" in requested
    assert all(url.startswith((served.url, "about:")) for url in requested)
    assert browser.run("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]


# -- with a token


def test_the_token_is_asked_for_and_never_put_into_an_address(browser: Browser, reported: Reported) -> None:
    with serve_stats(pool_reporting(reported), port=0, token="s3cret") as stats:
        browser.go(stats.url)
        browser.wait(lambda: not browser.run("document.getElementById('token-form').hidden"), "no form")
        assert browser.run("document.querySelectorAll('.process').length") == 0
        field = browser.driver.switch_to.active_element
        assert field.get_attribute("id") == "token"
        field.send_keys("wrong\n")
        browser.wait(
            lambda: "The token is wrong" in browser.text("#problem"), "a wrong token is not said to be so"
        )
        browser.driver.switch_to.active_element.send_keys("s3cret\n")
        browser.wait_for(".process")
        assert browser.run("document.getElementById('token-form').hidden")
        browser.driver.refresh()  # this tab remembers it
        browser.wait_for(".process")
        assert not any("s3cret" in url for url in browser.requested())
        browser.run("sessionStorage.clear()")
    assert all("401" in complaint for complaint in browser.complaints())


def test_the_token_may_come_in_the_fragment(browser: Browser, reported: Reported) -> None:
    with serve_stats(pool_reporting(reported), port=0, token="s3cret") as stats:
        browser.go(f"{stats.url}#token=s3cret")
        browser.wait_for(".process")
        assert browser.driver.current_url == stats.url
        browser.run("sessionStorage.clear()")


# -- for all people


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_no_barrier(
    browser: Browser, reported: Reported, served: StatsServer, axe: str, look: str
) -> None:
    browser.emulate(**LOOKS[look], prefers_reduced_motion="reduce")  # type: ignore[arg-type]
    foreign = process(60, 57, connections=[connection(57, 1, "used")])
    reported.family = lambda: family(*small_family().processes, foreign, unlisted=2)
    show(browser, served)
    assert violations(browser, axe) == []


@pytest.mark.parametrize("look", ["light", "dark"])
def test_axe_finds_no_barrier_where_something_is_wrong(
    browser: Browser, reported: Reported, axe: str, look: str
) -> None:
    browser.emulate(**LOOKS[look], prefers_reduced_motion="reduce")  # type: ignore[arg-type]
    with serve_stats(pool_reporting(reported), port=0, token="s3cret") as stats:
        browser.go(stats.url)
        browser.wait(lambda: not browser.run("document.getElementById('token-form').hidden"), "no form")
        assert violations(browser, axe) == []
        browser.go(f"{stats.url}#token=s3cret")
        browser.wait_for(".process")
        reported.family = lambda: 1 / 0
        browser.wait(lambda: browser.text("#status").startswith("stale"), "it is not stale")
        assert violations(browser, axe) == []
        browser.run("sessionStorage.clear()")
    assert all("401" in complaint or "500" in complaint for complaint in browser.complaints())


@pytest.mark.parametrize("look", LOOKS)
def test_it_fits_the_screen(
    browser: Browser, reported: Reported, served: StatsServer, look: str, tmp_path: Path
) -> None:
    def deep() -> Any:
        pids = range(4_190_000, 4_190_006)
        return family(
            *[
                process(
                    pid,
                    None if pid == pids[0] else pid - 1,
                    connections=[connection(pid, n, "used", 12345.6) for n in range(3)],
                )
                for pid in pids
            ]
        )

    reported.family = deep
    browser.emulate(**LOOKS[look])  # type: ignore[arg-type]
    show(browser, served)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    background = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(background) < 3 * 64) == ("dark" in look)
    picture = tmp_path / "page.png"
    browser.driver.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000


def test_it_is_used_with_the_keyboard(browser: Browser, reported: Reported, served: StatsServer) -> None:
    show(browser, served)
    tab, space = "\ue004", " "
    body = browser.driver.find_element("tag name", "body")
    body.send_keys(tab)
    assert browser.driver.switch_to.active_element.get_attribute("id") == "ended"
    visible = """document.querySelector('[data-pid="58"] > .card').checkVisibility()"""
    assert browser.run(visible)
    browser.driver.switch_to.active_element.send_keys(space)
    assert not browser.run(visible)
    browser.driver.switch_to.active_element.send_keys(tab)
    pause = browser.driver.switch_to.active_element
    assert pause.get_attribute("id") == "pause"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    pause.send_keys(space)
    browser.wait(lambda: browser.text("#status").startswith("paused"), "it does not pause")
    assert pause.get_attribute("aria-pressed") == "true"
    pause.send_keys(space)
    browser.wait(lambda: browser.text("#status") == "live", "it does not go on")
    # The same element has the focus, however often the figures have changed.
    assert browser.driver.switch_to.active_element.get_attribute("id") == "pause"


def test_nothing_moves_for_who_wants_it_so(browser: Browser, served: StatsServer) -> None:
    show(browser, served)
    browser.wait(lambda: browser.run("document.getAnimations().length"), "nothing moves otherwise")
    browser.emulate(prefers_reduced_motion="reduce")
    show(browser, served)
    browser.wait(lambda: browser.text("#status") == "live", "it is not live")
    assert browser.run("document.getAnimations().length") == 0


def test_a_screen_reader_hears_of_processes_and_not_of_every_figure(
    browser: Browser, reported: Reported, served: StatsServer
) -> None:
    show(browser, served)
    assert browser.run(
        "[...document.querySelectorAll('[role=status], [aria-live], output')].map(each => each.id)"
    ) == ["news"]
    news = "document.getElementById('news').textContent"
    looks = reported.looks
    browser.wait(lambda: reported.looks > looks + 1, "it does not ask")
    assert browser.run(news) == ""
    reported.family = lambda: family(*small_family().processes, process(77, 41))
    browser.wait(lambda: browser.run(news) == "Started: pid 77.", "it is not reported")
    reported.family = small_family
    browser.wait(lambda: browser.run(news) == "Ended: pid 77.", "it is not reported")


def test_the_page_holds_what_the_json_does(browser: Browser, served: StatsServer) -> None:
    show(browser, served)
    stats = browser.driver.execute_async_script("fetch('stats.json').then(a => a.text()).then(arguments[0])")
    pids = [each["pid"] for each in json.loads(stats)["pools"][0]["processes"]]
    assert (
        browser.run("[...document.querySelectorAll('.process')].map(each => Number(each.dataset.pid))")
        == pids
    )
