"""`pidpool top` shows the stats of an endpoint: the family as a tree, rates from one answer to the next,
and, where there is no answer, why not. Over real HTTP and in real terminals.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result
from terminal import Terminal

from pidpool.cli import top
from pidpool.stats.snapshots import BOUNDS, Counters, FamilyStats, Histogram, PoolStats
from pidpool.tools.top import client as stats_client
from pidpool.tools.top.client import Tally, rates, stats_url

COMMAND = [sys.executable, "-c", "from pidpool.cli import main; main()", "top"]


def histogram(**counts: int) -> Histogram:
    """Counts by the number of their bucket, as ``b3=7``."""
    buckets = [0] * (len(BOUNDS) + 1)
    for name, count in counts.items():
        buckets[int(name[1:])] = count
    return Histogram(tuple(buckets))


def process(pid: int, parent_pid: int | None = None, **fields: Any) -> PoolStats:
    defaults: dict[str, Any] = {
        "pool": "orders",
        "alive": True,
        "since": 1_000_000.0,
        "size": 5,
        "max_overflow": 10,
        "overflow": -3,
        "idle": 1,
        "used": 1,
        "waiting": 0,
        "overdue": None,
        "counters": Counters(opened=2, checkouts=10, wait_time=histogram(b2=10)),
        "connections": (),
    }
    return PoolStats(pid=pid, parent_pid=parent_pid, **{**defaults, **fields})


CHILD = Counters(
    checkouts=5,
    inherited={"idle": 2, "in transaction": 1},
    severed=3,
    replaced=4,
    refused=6,
    wait_time=histogram(b2=5),
)


def family(*processes: PoolStats, taken_at: float = 1_000_300.0, **fields: Any) -> FamilyStats:
    counters = sum((each.counters for each in processes), Counters())
    defaults: dict[str, Any] = {
        "departed": 0,
        "unlisted": 0,
        "server_max_connections": 300,
        "counters": counters,
    }
    defaults["permits"] = sum(each.permits for each in processes)
    return FamilyStats(pool="orders", taken_at=taken_at, processes=processes, **{**defaults, **fields})


WAIT = f"{BOUNDS[2] * 1e6:.3g} µs"
"""The upper bound of the bucket in which all waits lie."""

FAMILY = family(
    process(4121),
    process(4125, 4121, counters=CHILD),
    process(4130, 4125, waiting=2, overflow=4),
    process(4126, 4121),
    process(4127, 4121, alive=False),
)


def document(*families: FamilyStats) -> bytes:
    """As the endpoint gives it."""
    pools = [each.to_dict() for each in families]
    return json.dumps({"answered_by": 4121, "bounds": BOUNDS, "pools": pools}).encode()


class Endpoint:
    """A server with settable answers."""

    def __init__(self) -> None:
        self.status = 200
        self.body = document(FAMILY)
        self.headers: dict[str, str] = {}
        self.token: str | None = None
        self.asked: list[tuple[str, str | None]] = []
        """Path and Authorization of each request."""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                authorization = self.headers["Authorization"]
                endpoint.asked.append((self.path, authorization))
                right = endpoint.token is None or authorization == f"Bearer {endpoint.token}"
                self.send_response(endpoint.status if right else 401)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                body = endpoint.body if right else b"no"
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PIDPOOL_TOKEN", raising=False)
    server = Endpoint()
    yield server
    server.stop()


def run(*arguments: str, columns: int = 80, **env: str) -> Result:
    return CliRunner().invoke(top.command, arguments, env={"COLUMNS": str(columns), **env})


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


# -- one look


def test_a_family_in_80_columns(endpoint: Endpoint) -> None:
    shown = lines(run(endpoint.url))
    assert shown == [
        "pool orders  4 running, 1 ended",
        "  connections  4 idle, 4 used, 2 waiting; at most 60; the server allows 300",
        f"  checkouts    45 so far, 8 opened, 0 timed out; p99 wait {WAIT}, use –",
        "  inherited    3 by 0 forks: 2 idle, 1 in transaction",
        "  of them      3 severed, 0 kept, 4 replaced, 6 refused",
        "",
        "  process     idle  used  waiting  overflow  max  checkouts    age",
        "  4121           1     1        0         0   15         10  5 min",
        "  ├─ 4125        1     1        0         0   15          5  5 min",
        "  │  └─ 4130     1     1        2         4   15         10  5 min",
        "  └─ 4126        1     1        0         0   15         10  5 min",
        "",
    ]


def test_a_wide_terminal_shows_what_each_process_inherited(endpoint: Endpoint) -> None:
    shown = lines(run("--once", endpoint.url, columns=120))
    heads = ["wait p99", "inherited", "severed", "replaced", "refused"]
    assert all(head in shown[6] for head in heads)
    assert shown[8].split()[-8:] == [*WAIT.split(), "3", "3", "4", "6", "5", "min"]
    assert max(map(len, shown)) <= 120


def test_an_ended_process_stays_above_its_running_children(endpoint: Endpoint) -> None:
    endpoint.body = document(
        family(process(1, alive=False), process(2, 1), process(3, 1, alive=False), process(4, 99), departed=7)
    )
    shown = lines(run(endpoint.url))
    assert shown[0] == "pool orders  2 running, 9 ended"
    assert [line.split("  ")[1] for line in shown[7:10]] == ["1 ended", "└─ 2", "4"]


def test_a_pid_that_was_given_twice_is_the_running_process(endpoint: Endpoint) -> None:
    endpoint.body = document(family(process(1), process(2, 1, alive=False), process(2, 1), process(3, 2)))
    shown = lines(run(endpoint.url))
    assert [line.split("  ")[1].strip() for line in shown[7:10]] == ["1", "└─ 2", ""]
    assert sum("└─ 3" in line for line in shown) == 1


def test_a_family_that_may_open_more_than_the_server_takes(endpoint: Endpoint) -> None:
    endpoint.body = document(dataclasses.replace(FAMILY, server_max_connections=50, unlisted=3))
    shown = lines(run(endpoint.url))
    assert shown[0].endswith("3 more found no room in the family's memory")
    assert shown[1].endswith("at most 60; the server allows only 50")
    endpoint.body = document(family(process(1, max_overflow=-1), server_max_connections=None))
    assert lines(run(endpoint.url))[1].endswith("0 waiting; without limit")


def test_a_family_with_a_limit(endpoint: Endpoint) -> None:
    counters = Counters(closed={"given back": 7})
    endpoint.body = document(family(process(1, permits=12, wanting=3, counters=counters), limit=12))
    shown = lines(run(endpoint.url))
    assert shown[1].endswith("at most 12; the server allows 300")
    assert shown[2] == "  family limit  12 of 12 taken, 3 wanted, 7 given back"


def test_several_pools_and_none_and_one_by_itself(endpoint: Endpoint) -> None:
    endpoint.body = document(FAMILY, dataclasses.replace(FAMILY, pool="other\x1b[31m"))
    titles = [line for line in lines(run(endpoint.url)) if line.startswith("pool ")]
    assert [title.split()[1] for title in titles] == ["orders", "other?[31m"]
    endpoint.body = document()
    assert lines(run(endpoint.url)) == ["The endpoint has no pool."]
    endpoint.body = json.dumps(FAMILY.to_dict()).encode()
    assert lines(run(endpoint.url))[0] == "pool orders  4 running, 1 ended"


# -- the address


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://h:9432", "http://h:9432/stats.json"),
        ("http://h:9432/", "http://h:9432/stats.json"),
        ("h:9432", "http://h:9432/stats.json"),
        ("https://h/pool/#token=x", "https://h/pool/stats.json"),
        ("http://[::1]:9432/a b/stats.json", "http://[::1]:9432/a%20b/stats.json"),
    ],
)
def test_the_address_of_the_stats(given: str, asked: str) -> None:
    assert stats_url(given) == asked


@pytest.mark.parametrize(
    "given", ["ftp://h/", "file:///etc/passwd", "http://", "http://h:x/", "http://[::1/"]
)
def test_what_is_no_address_is_a_usage_error(given: str) -> None:
    result = run(given)
    assert result.exit_code == 2
    assert "is no address of HTTP; give one like http://127.0.0.1:9432/" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "given", ["http://me:xyzzy-secret@h:9187/", "me:xyzzy-secret@h", "http://m:xyzzy-secret@h:x/"]
)
def test_a_password_in_the_address_is_refused_and_not_shown(given: str) -> None:
    result = run(given)
    assert result.exit_code == 2
    assert "takes no user and password" in " ".join(result.output.split())
    assert "xyzzy" not in result.output


def test_the_token_comes_from_the_environment_or_the_option(endpoint: Endpoint) -> None:
    endpoint.token = "secret"
    assert lines(run(endpoint.url, PIDPOOL_TOKEN="secret\n"))[0].startswith("pool orders")
    assert lines(run("--token", "secret", endpoint.url))[0].startswith("pool orders")
    assert endpoint.asked == [("/stats.json", "Bearer secret")] * 2
    result = run("--token", "two\nlines", endpoint.url)
    assert result.exit_code == 2 and "no bearer token may have" in result.output


def test_the_token_is_not_handed_on_by_a_redirect(endpoint: Endpoint) -> None:
    other = Endpoint()
    try:
        endpoint.status, endpoint.headers = 302, {"Location": other.url}
        assert lines(run(endpoint.url, PIDPOOL_TOKEN="secret"))[0].startswith("pool orders")
        assert other.asked == [("/", None)]
    finally:
        other.stop()


# -- where there are no stats


def failure(result: Result) -> str:
    assert result.exit_code == top.UNAVAILABLE
    assert result.stdout == ""
    return result.stderr.removeprefix("pidpool top: ").rstrip("\n")


def test_each_refusal_says_what_to_do(endpoint: Endpoint) -> None:
    url = f"{endpoint.url}stats.json"
    endpoint.token = "secret"
    assert failure(run(endpoint.url)) == f"{url} asks for a token (401); give it in PIDPOOL_TOKEN"
    assert f"{url} refuses the token (401)" in failure(run(endpoint.url, PIDPOOL_TOKEN="wrong"))
    endpoint.token = None
    endpoint.status, endpoint.body = 404, b"nothing"
    assert f"there is no {url} (404); give the address" in failure(run(endpoint.url))
    endpoint.status, endpoint.body = 421, b"Not this host\x1b[2J.\nmore"
    assert failure(run(endpoint.url)) == f"{url} answers 421 Not this host?[2J."
    endpoint.status = 200
    for body in (b"<html>", b"[]", b"{}", b'{"pools": [{}]}', b'{"pools": 7}', b"\xff"):
        endpoint.body = body
        assert "is not pidpool's stats; give the address" in failure(run(endpoint.url)), body


def test_where_nobody_listens_and_where_nobody_answers(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setattr(stats_client, "TIMEOUT", 0.1)
        assert f"{url}/stats.json did not answer within 0.1 s" in failure(run(url))
    said = failure(run(url))
    assert f"nothing answers at {url}/stats.json ([Errno 111] Connection refused); start" in said


# -- rates


def test_rates_are_what_happened_between_two_answers() -> None:
    before = Counters(
        checkouts=100, opened=3, timeouts=1, wait_time=histogram(b1=100), use_time=histogram(b4=9)
    )
    slow = histogram(b1=199, b10=1)
    now = Counters(checkouts=200, opened=4, timeouts=3, wait_time=slow, use_time=histogram(b4=9))

    def tally(counters: Counters) -> Tally:
        return Tally.read(json.loads(json.dumps(process(1, counters=counters).to_dict()))["counters"])

    found = rates(tally(now), tally(before), 4.0, BOUNDS)
    assert (found.per_second(found.checkouts), found.per_second(found.opened), found.timeouts) == (
        25.0,
        0.25,
        2,
    )
    assert (found.wait_p99, found.use_p99) == (BOUNDS[1], None)
    # By the endpoint's own bounds, should they be others than this version's.
    assert rates(tally(now), tally(before), 4.0, [each * 3 for each in BOUNDS]).wait_p99 == BOUNDS[1] * 3
    ever = rates(tally(now), None, None, BOUNDS)
    assert (ever.checkouts, ever.seconds, ever.per_second(ever.checkouts)) == (200, None, None)
    # The application was restarted: the earlier tally is another life's.
    assert rates(tally(before), tally(now), 4.0, BOUNDS).checkouts == 100
    endless = Counters(checkouts=1, wait_time=histogram(**{f"b{len(BOUNDS)}": 1}))
    assert rates(tally(endless), None, None, BOUNDS).wait_p99 == float("inf")


# -- the live view


@pytest.mark.parametrize("columns", [80, 120])
def test_it_redraws_with_each_answer_and_leaves_the_terminal_as_it_was(
    endpoint: Endpoint, columns: int
) -> None:
    with Terminal([*COMMAND, "--interval", "0.1", endpoint.url], columns) as terminal:
        terminal.reads("\x1b[?1049h", steering=True)  # onto the alternate screen
        terminal.reads("45 so far")
        counters = dataclasses.replace(FAMILY.counters, checkouts=FAMILY.counters.checkouts + 50)
        endpoint.body = document(dataclasses.replace(FAMILY, taken_at=FAMILY.taken_at + 2, counters=counters))
        terminal.reads("25.0/s, 0.0/s opened")
        frame = terminal.reads("5 min").splitlines()
        assert ("wait p99" in "".join(frame)) is (columns == 120)
        assert max(map(len, frame)) <= columns
        assert terminal.interrupt() == 0
        assert "\x1b[?1049l" in terminal.drawn
        assert "Traceback" not in terminal.drawn


def test_without_answers_it_goes_on_asking_and_says_that_it_is_stale(endpoint: Endpoint) -> None:
    with Terminal([*COMMAND, "--interval", "0.1", endpoint.url], columns=120) as terminal:
        terminal.reads("pool orders")
        endpoint.status = 503
        terminal.reads("STALE: this is")
        terminal.reads("/stats.json answers 503")
        terminal.reads("pool orders")  # what was known last stays to be seen
        endpoint.status = 200
        terminal.reads("Ctrl-C ends")
        terminal.reads("pool orders")
        assert terminal.interrupt() == 0


def test_what_does_not_fit_into_a_low_terminal_is_counted(endpoint: Endpoint) -> None:
    endpoint.body = document(family(process(1), *(process(pid, 1) for pid in range(2, 41))))
    with Terminal([*COMMAND, "--interval", "0.1", endpoint.url], columns=80, lines=20) as terminal:
        terminal.reads("… and 31 more, for which this terminal is too low")
        assert terminal.interrupt() == 0


def test_it_says_at_once_if_there_is_no_endpoint(endpoint: Endpoint) -> None:
    endpoint.status = 404
    started = time.monotonic()
    with Terminal([*COMMAND, "--interval", "3600", endpoint.url], columns=80) as terminal:
        terminal.reads("(404)")
    assert time.monotonic() - started < 60
