"""`pidpool logs` shows from the log alone which process forked which, what leaked and what took long;
of logs written by real processes, of broken and hostile ones, and of ones that are still being written.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import event_logs
import pytest
from click.testing import CliRunner, Result
from event_logs import AT, adopted, checkin, checkout, event, inherited, opened, tag, text_of, write
from forking import run_in_child

from pidpool.cli.logs import command
from pidpool.events.pool_events import PoolEvents
from pidpool.stats.family import Family
from pidpool.tag import ConnectionTag
from pidpool.tools.demo.postgres import EmbeddedPostgres
from pidpool.tools.logs import clean, event_fields, processes, reading, summary, unmatched
from pidpool.tools.logs.document import document
from pidpool.tools.logs.reading import Followed, Source, Unreadable
from pidpool.tools.logs.summary import Summary
from pidpool.tools.text import duration

PIDPOOL = [sys.executable, "-c", "from pidpool.cli import main; main()", "logs"]


def logs(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> dict[str, Any]:
    result = logs("--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def summarised(events: Sequence[Any]) -> Summary:
    found = Summary()
    found.feed(events)
    found.finish()
    return found


def by_id(found: dict[str, Any]) -> dict[str, Any]:
    return {process["id"]: process for process in found["processes"]}


# -- logs of real runs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "app.log"


def test_a_fork_in_a_transaction_is_a_leak_with_its_owner_and_what_was_done(
    postgres: EmbeddedPostgres, clean_log: None, log: Path
) -> None:
    program = """
    engine = engine(hold_warning=60)

    def child():
        try:
            session.execute(text("select 1"))
        except exc.OperationalError:
            session.rollback()
        session.execute(text("select 1"))
        session.close()
        engine.dispose()

    for i in range(3):
        session = Session(engine)
        session.execute(text("select 1"))
        fork(child)
        session.commit()
        session.close()
    with engine.connect():
        pass
    engine.dispose()
    """
    event_logs.run(program, log, postgres.url(tls=True))
    found = as_json(log)
    assert found["foreign_lines"] == 0
    assert found["open_transaction_leaks"] == len(found["leaks"]) == 3
    root, *children = found["processes"]
    assert [child["parent"] for child in children] == [root["id"]] * 3
    assert [child["noticed_by"] for child in children] == ["hook"] * 3
    assert [leak["inheritor"] for leak in found["leaks"]] == [child["id"] for child in children]
    for leak in found["leaks"]:
        assert leak["owner"] == root["id"]
        assert leak["state"] == "in transaction" and leak["action"] == "severed"
        assert leak["fd"] == root["connections"][0]["fd"]
        assert leak["server_pid"] == root["connections"][0]["server_pid"]
        assert " in <module>" in leak["where"]
        assert leak["refused"] and leak["replaced_by"] is None  # after its rollback it checked out anew
    assert root["forks"] == 3 and found["unmatched_forks"] == []
    assert root["checkouts"] == root["checkins"] == 4
    assert found["not_returned"] == []
    assert logs("--check", log).exit_code == 1
    text = logs(log).stdout
    assert "3 connections crossed a fork, 3 with an open transaction" in text
    assert "in transaction; severed, then refused" in text


TWO_PLACES = """
    engine = engine()

    def use():
        engine.connect().close()
        engine.dispose()

    def send_mail():
        fork(use)

    def resize_image():
        for i in range(2):
            fork(use)

    def fork_alone():
        fork(lambda: None)

    session = Session(engine)
    session.execute(text("select 1"))
    send_mail()
    session.commit()
    resize_image()
    session.execute(text("select 1"))
    fork_alone()
    session.close()
    engine.dispose()
    """


def test_leaks_are_grouped_by_the_line_that_forked(
    postgres: EmbeddedPostgres, clean_log: None, log: Path
) -> None:
    event_logs.run(TWO_PLACES, log, postgres.url(tls=True))
    found = as_json(log)
    by_caller = {
        each["fork_line"].split(" < ")[1].rpartition(" in ")[2]: (
            each["leaks"],
            each["open_transaction_leaks"],
        )
        for each in found["fork_lines"]
    }
    assert by_caller == {"fork_alone": (1, 1), "send_mail": (1, 1), "resize_image": (2, 0)}
    assert {each["fork_line"].split(" < ")[0].rpartition(" in ")[2] for each in found["fork_lines"]} == {
        "fork"
    }
    assert [leak["fork_line"].split(" < ")[1].rpartition(" in ")[2] for leak in found["leaks"]] == [
        "send_mail",
        "resize_image",
        "resize_image",
    ]
    (unmatched,) = found["unmatched_forks"]
    assert "fork_alone" in unmatched["fork_line"]
    shown = logs(log).output
    assert "Connections that crossed a fork, by the line that forked" in shown
    assert re.search(
        r" 1×  1 with an open transaction\n +<string>:\d+ in fork\n +called at <string>:\d+ in send_mail\n",
        shown,
    )
    assert re.search(r" 2×\n +<string>:\d+ in fork\n +called at <string>:\d+ in resize_image\n", shown)
    assert re.search(r"pid \d+ → a child.*\n.*\n +forked at <string>:\d+ in fork\n", shown)


def test_a_fork_whose_child_never_uses_the_pool_is_known_from_the_parents_log(
    postgres: EmbeddedPostgres, clean_log: None, log: Path
) -> None:
    program = """
    engine = engine()
    for i in range(3):
        session = Session(engine)
        session.execute(text("select 1"))

        def child():
            global session
            session = None
            gc.collect()

        fork(child)
        session.commit()
        session.close()
    with engine.connect():
        pass
    engine.dispose()
    """
    event_logs.run(program, log, postgres.url(tls=True))
    found = as_json(log)
    assert found["foreign_lines"] == 0
    crossed = found["leaks"] + [fork for fork in found["unmatched_forks"] if fork["in_transaction"] == 1]
    assert len(crossed) == found["open_transaction_leaks"] == 3
    assert logs("--check", log).exit_code == 1


def test_a_run_without_forks_passes_the_check(postgres: EmbeddedPostgres, log: Path) -> None:
    program = """
    engine = engine()
    for i in range(3):
        with engine.begin() as connection:
            connection.execute(text("select 1"))
    engine.dispose()
    """
    event_logs.run(program, log, postgres.url(tls=False))
    result = logs("--check", log)
    assert result.exit_code == 0
    assert "No connection crossed a fork" in result.stdout
    (process,) = as_json(log)["processes"]
    assert process["checkouts"] == 3 and process["closed"] == {"disposed": 1} and process["disposed"] == 1


def test_every_kind_of_event_is_understood(postgres: EmbeddedPostgres, clean_log: None, log: Path) -> None:
    program = """
    structlog.contextvars.bind_contextvars(request_id="r-17")
    held = threading.Event()
    engine = engine(pool_size=1, max_overflow=0, pool_timeout=0.01, hold_warning=0.01)
    first = engine.connect()
    try:
        engine.connect()
    except exc.TimeoutError:
        pass
    while '"checkout.overdue"' not in open(sys.argv[1]).read():
        time.sleep(0.005)

    def replace():
        first.execute(text("select 1"))
        first.close()
        engine.dispose()

    def keep():
        kept = engine.connect()  # never comes back
        kept.connection.dbapi_connection.close()

    fork(replace)
    first.close()
    fork(keep)
    connection = engine.connect()
    connection.invalidate()
    connection.close()
    engine.dispose()
    try:
        create_engine("sqlite:////nowhere/app.db", poolclass=PidPool).connect()
    except exc.OperationalError:
        pass
    """
    event_logs.run(program, log, postgres.url(tls=True))
    known = {each["event"] for each in event_logs.read(log)}
    # Those take a refusal, a small server, a family of several processes, or another driver.
    not_here = {
        "connection.refused",
        "pool.over_maximum",
        "connection.given_back",
        "driver.unknown",
        "family.private",
        "family.limits_differ",
    }
    assert known == summary.Summary()._takes.keys() - not_here
    found = as_json(log)
    assert found["foreign_lines"] == 0
    assert [leak["state"] for leak in found["leaks"]] == ["no transaction", "idle"]
    assert found["leaks"][0]["replaced_by"].startswith(f"{found['leaks'][0]['pid']}-")
    assert found["open_transaction_leaks"] == 0
    (timeout,) = found["timeouts"]
    assert timeout["size"] == timeout["checked_out"] == 1 and timeout["fields"] == {"request_id": "r-17"}
    overdue = found["overdue"][0]
    assert (
        overdue["hold_warning"] == 0.01 and overdue["longest"] > 0.01 and " in <module>" in overdue["where"]
    )
    assert found["longest_holds"][0]["fields"] == {"request_id": "r-17"}
    assert " in <module>" in found["longest_holds"][0]["where"]
    last_child = found["processes"][2]
    assert {each["process"] for each in found["not_returned"]} >= {last_child["id"]}
    assert found["totals"]["invalidations"] == 1


def test_the_fields_of_every_event_method_are_the_listed_ones() -> None:
    # A field that is missing from the list would be shown as one that the user added.
    methods = {
        name.replace("_", ".", 1): name
        for name, _ in inspect.getmembers(PoolEvents, inspect.isfunction)
        if name.partition("_")[0] in ("connection", "checkout", "pool", "family", "driver")
    }
    assert methods.keys() == Summary()._takes.keys()
    written: dict[str, dict[str, object]] = {}

    class Recorder:
        def debug(self, event: str, **fields: object) -> None:
            written[event] = fields

        info = warning = debug

    pool_events = PoolEvents("app", Recorder(), Family(5, 10))
    for name in methods.values():
        method = getattr(pool_events, name)
        values = {
            parameter.name: a_value(str(parameter.annotation))
            for parameter in inspect.signature(method).parameters.values()
        }
        method(**values)
    assert written.keys() == methods.keys()
    assert {field for fields in written.values() for field in fields} == event_fields.PIDPOOL


def a_value(annotation: str) -> Any:
    if annotation.startswith("ConnectionTag"):
        return ConnectionTag("1-1", os.getpid(), 2, 3, 4, AT)
    if annotation.startswith("BaseException"):
        return ValueError()
    if annotation == "FamilyStats":
        return Family(5, 10).read("a pool")
    if annotation == "StateAtFork":
        return "idle"
    if annotation == "CloseReason":
        return "recycled"
    return 1


def test_a_pool_that_may_have_more_connections_than_its_server_takes_is_named(log: Path) -> None:
    over = {"processes": 4, "maximum": 60, "server_max_connections": 40}
    write(log, [*a_log_of(10), event("pool.over_maximum", 10, 3, **over)])
    assert as_json(log)["over_maximum"] == [{"at": AT + 3, "process": "10", "pool": "app", **over}]
    shown = logs(log).output
    assert "app: 4 processes, 60 connections at most; the server allows 40" in shown
    (line,) = followed_lines([event("pool.over_maximum", 10, 3, **over)])
    assert "pool.over_maximum  processes=4  maximum=60  server_max_connections=40" in line


def test_connects_that_failed_are_counted_by_their_error(log: Path) -> None:
    failed = [
        event("connection.failed", 10, at, error=error, create_time=0.2)
        for at, error in ((1, "OperationalError"), (2, "OperationalError"), (3, "TimeoutError"))
    ]
    write(log, [*a_log_of(10), *failed])
    assert as_json(log)["totals"]["failed"] == {"OperationalError": 2, "TimeoutError": 1}
    shown = " ".join(logs(log).output.split())
    assert "2 connects failed (OperationalError)" in shown
    (line,) = followed_lines(failed[2:])
    assert "pid 10  connection.failed  error=TimeoutError  create_time=0.2" in line


# -- the tree


def test_the_tree_has_grandchildren_even_if_their_events_come_first() -> None:
    found = summarised([opened(10, 1, 0), adopted(30, 20, 2), adopted(20, 10, 1), opened(20, 1, 3)])
    tree = {process.id: process.parent and process.parent.id for process in found.processes}
    assert tree == {"10": None, "20": "10", "30": "20"}
    assert not next(
        process for process in summarised([adopted(30, 20, 2)]).processes if process.pid == 20
    ).has_events


def test_without_adoptions_the_owner_is_taken_for_the_parent() -> None:
    found = summarised([inherited(20, 10, 1, 5.0)])  # a log at level WARNING has nothing else
    assert [(process.id, process.parent and process.parent.id) for process in found.processes] == [
        ("10", None),
        ("20", "10"),
    ]


def test_a_pid_that_is_forked_again_is_another_process() -> None:
    first = [adopted(20, 10, 1), inherited(20, 10, 1, 1), opened(20, 1, 2), checkout(20, 1, 3, opened_at=2)]
    second = [adopted(20, 10, 100), inherited(20, 10, 1, 100), opened(20, 1, 101)]
    third = [checkout(20, 1, 102, opened_at=101), checkin(20, 1, 103, 1.0, opened_at=101)]
    found = by_id(document(summarised([opened(10, 1, 0), *first, *second, *third]), []))
    assert list(found) == ["10", "20", "20#2"]
    assert [found[each]["checkouts"] for each in ("20", "20#2")] == [1, 1]
    assert [found[each]["checkins"] for each in ("20", "20#2")] == [0, 1]
    assert [found[each]["inherited"] for each in ("20", "20#2")] == [{"in transaction": 1}] * 2


def test_a_program_that_starts_again_with_the_same_pid_is_another_process() -> None:
    # As in a container, whose program is always pid 1: numbers begin at 1 again.
    events = [opened(1, 1, 0), opened(1, 2, 1), checkout(1, 2, 2, opened_at=1)]
    events += [opened(1, 1, 50), opened(1, 2, 51), checkout(1, 2, 60, opened_at=51)]
    found = document(summarised(events), [])
    assert [(process["id"], process["opened"]) for process in found["processes"]] == [("1", 2), ("1#2", 2)]
    assert [(each["process"], each["since"] - AT) for each in found["not_returned"]] == [
        ("1", 2.0),
        ("1#2", 60.0),
    ]


def test_threads_that_log_out_of_order_are_no_new_process() -> None:
    found = summarised([opened(1, 2, 0.02), opened(1, 1, 0.01), opened(1, 4, 0.04), opened(1, 3, 0.0401)])
    assert [process.id for process in found.processes] == ["1"]


def test_several_pools_of_one_process_are_adopted_together() -> None:
    other = {**adopted(20, 10, 1.001), "pool": "other"}
    found = summarised([opened(10, 1, 0), adopted(20, 10, 1), inherited(20, 10, 1, 1), other])
    assert [process.id for process in found.processes] == ["10", "20"]
    assert list(next(process for process in found.processes if process.pid == 20).pools) == ["app", "other"]


# -- checkouts


def test_a_checkin_that_is_logged_late_does_not_end_the_next_checkout() -> None:
    # A finalizer's events are logged at the next use of the pool, with the time at which they happened.
    late = [checkout(1, 1, 0), checkout(1, 1, 2), checkin(1, 1, 1, 1.0)]
    assert len(summarised(late).not_returned()) == 1
    assert summarised([*late, checkin(1, 1, 3, 1.0)]).not_returned() == []


def test_a_closed_connection_is_not_out() -> None:
    closed = event("connection.closed", 1, 1, **tag(1, 1), reason="invalidated")
    assert summarised([checkout(1, 1, 0), closed]).not_returned() == []


def test_the_longest_are_kept_with_the_users_own_fields() -> None:
    shuffled = random.Random(7).sample(range(1000), 1000)
    events = [checkin(1, 1, n, use=(use + 1) / 1000, request_id=f"r{use}") for n, use in enumerate(shuffled)]
    found = Summary(longest=5)
    found.feed(events)
    assert [hold.seconds for hold in found.holds.first()] == [1.0, 0.999, 0.998, 0.997, 0.996]
    assert [hold.fields["request_id"] for hold in found.holds.first(2)] == ["r999", "r998"]


def test_holds_that_were_late_are_known_without_debug_events() -> None:
    late = event(
        "checkout.returned_late", 1, 9, **tag(1, 1), use_time=8.0, hold_warning=1, where="app.py:3 in f"
    )
    overdue = event("checkout.overdue", 1, 2, **tag(1, 1), held=1.0, hold_warning=1, where="app.py:3 in f")
    found = summarised([overdue])
    assert [found.held(each) for each in found.not_returned()] == [1.0]
    found = summarised([overdue, late])
    assert found.not_returned() == []
    assert [(hold.seconds, hold.where) for hold in found.holds.first()] == [(8.0, "app.py:3 in f")]
    both = summarised([checkout(1, 1, 1), overdue, checkin(1, 1, 9, 8.0), late])
    assert [(hold.seconds, hold.where) for hold in both.holds.first()] == [(8.0, "app.py:3 in f")]


def test_a_warning_that_comes_with_the_return_is_no_second_checkout() -> None:
    known = {**tag(1, 1), "hold_warning": 1, "where": "app.py:3 in f"}
    overdue = event("checkout.overdue", 1, 1.00001, **known, held=1.0)
    assert summarised([checkout(1, 1, 0), checkin(1, 1, 1.000005, 1.000005), overdue]).not_returned() == []
    assert len(summarised([checkout(1, 1, 0), overdue]).not_returned()) == 1


def test_each_fork_is_matched_once_in_whichever_order() -> None:
    forked = [event("pool.forked", 10, at, idle=0, checked_out=1, in_transaction=1) for at in (1.0, 1.2, 1.4)]
    child = adopted(20, 10, 1.2001)
    for events in ([*forked, child], [child, *forked], [forked[0], child, *forked[1:]]):
        found = summarised([opened(10, 1, 0), *events, inherited(20, 10, 1, 1.2001)])
        assert [round(fork.at - AT, 1) for fork in found.unmatched.listed()] == [1.0, 1.4]
        assert found.open_leaks == found.crossed == 3


@pytest.mark.parametrize("state", ["in transaction", "unknown", "a word of a later version"])
def test_the_check_fails_for_what_may_be_an_open_transaction(log: Path, state: str) -> None:
    assert logs("--check", write(log, [inherited(20, 10, 1, 1, state)])).exit_code == 1
    assert logs(log).exit_code == 0


@pytest.mark.parametrize("state", ["idle", "no transaction"])
def test_the_check_passes_for_what_is_none(log: Path, state: str) -> None:
    assert logs("--check", write(log, [inherited(20, 10, 1, 1, state)])).exit_code == 0


# -- reading


def a_log_of(pid: int, checkouts: int = 3) -> list[dict[str, Any]]:
    events = [opened(pid, 1, 0)]
    for n in range(checkouts):
        events += [checkout(pid, 1, n + 0.1 * (pid % 10)), checkin(pid, 1, n + 0.1 * (pid % 10) + 0.05, 0.05)]
    return events


def test_rotated_and_gzipped_logs_are_one_log_whatever_their_order(tmp_path: Path) -> None:
    events = a_log_of(10, 30)
    old, older = tmp_path / "app.log.1", tmp_path / "app.log.2.gz"
    # Two members, as `cat a.gz b.gz` makes them, and a block's padding.
    older.write_bytes(
        gzip.compress(text_of(events[:5]).encode())
        + gzip.compress(text_of(events[5:20]).encode())
        + b"\0" * 99
    )
    write(old, events[20:40])
    newest = write(tmp_path / "app.log", events[40:])
    found = as_json(newest, old, older)
    assert found["events"] == len(events) and found["not_returned"] == []
    assert found["processes"][0]["checkouts"] == found["processes"][0]["checkins"] == 30


def test_logs_of_many_processes_are_merged_by_time(tmp_path: Path) -> None:
    logs_of = {pid: a_log_of(pid, 50) for pid in (11, 12, 13)}
    sources = reading.open_all([str(write(tmp_path / f"{pid}.log", each)) for pid, each in logs_of.items()])
    merged = [event["at"] for batch in reading.merged(sources) for event in batch]
    assert len(merged) == 303 and merged == sorted(merged)


def test_a_log_named_twice_is_read_once(log: Path) -> None:
    write(log, a_log_of(10))
    assert as_json(log, log, log.parent / "." / log.name)["events"] == 7


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_the_standard_input_is_read(compress: Any) -> None:
    text = text_of(a_log_of(10)).encode()
    done = subprocess.run([*PIDPOOL, "--json", "-"], input=compress(text), capture_output=True, timeout=60)
    assert json.loads(done.stdout)["events"] == 7 and done.returncode == 0


FOREIGN = [
    b"plain text",
    b'{"event": "request.finished", "pid": 10}',
    b'{"event": "connection.checked_out", "pid": 10}',
    b'{"event": ["connection.checked_out"], "pid": 10, "at": 1}',
    b'{"pid": 10, "at": ',
    b'{"pid": 10}, {"pid": 11}',
    b'["pid"]',
    b'"pid"',
    b'{"pid": ' + b"9" * 5000 + b"}",
    b'{"pid": ' + b"[" * 100_000,
    b'{"pid": "\xff\xfe"}',
    b"\x00\x01\x02",
    b"x" * 200_000,
]


def test_foreign_lines_are_counted_and_passed_over(log: Path) -> None:
    good = text_of(a_log_of(10)).encode().splitlines()
    bad = [
        json.dumps({**each, **change}).encode()
        for each in a_log_of(10)[1:3]
        for change in (
            {"at": "now"}, {"at": float("nan")}, {"at": -1}, {"at": 1e300}, {"at": None}, {"opened_at": "x"},
            {"connection_id": "x"}, {"connection_id": None}, {"connection_id": {}},
            {"connection_id": "10-1 ; rm"}, {"wait_time": "1", "use_time": "1"},
            {"wait_time": float("inf"), "use_time": -1},
        )
    ]  # fmt: skip
    lines = [line for pair in zip(good, [*FOREIGN, b"", b"  \r"], strict=False) for line in pair]
    lines += [*FOREIGN[len(good) :], *bad, b"", b"   "]
    log.write_bytes(b"\r\n".join(lines))
    found = as_json(log)
    assert found["events"] == len(good)
    assert found["foreign_lines"] == len(FOREIGN) + len(bad)
    assert found["lines"] == found["events"] + found["foreign_lines"]
    assert found["processes"][0]["checkouts"] == 3 and found["processes"][0]["wait"]["sum"] == 0.003
    assert "pid 10" in logs(log).stdout


def test_a_leak_is_seen_whose_own_fields_are_in_another_encoding(log: Path) -> None:
    leak = json.dumps({**inherited(20, 10, 1, 1), "user": "J?rg"}).encode("latin-1").replace(b"?", b"\xf6")
    log.write_bytes(text_of(a_log_of(10)).encode() + leak + b"\n")
    found = as_json(log)
    assert found["foreign_lines"] == 0 and found["open_transaction_leaks"] == 1
    assert logs("--check", log).exit_code == 1


def test_a_line_without_an_end_is_bounded(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 1000)
    monkeypatch.setattr(reading, "LONGEST_LINE", 5000)
    log.write_bytes(b'{"pid"' * 10_000 + b"\n" + text_of(a_log_of(10)).encode() + b'{"pid"' * 10_000)
    found = as_json(log)
    assert found["events"] == 7 and found["foreign_lines"] == 2


def test_a_log_without_events_says_what_is_expected(log: Path) -> None:
    log.write_text("GET / 200\n")
    result = logs("--check", log)
    assert result.exit_code == 0
    assert "No events of pidpool" in result.stdout and "DEBUG" in result.stdout
    assert as_json(log)["first_at"] is None


# -- errors


def test_a_log_that_cannot_be_read_is_named_with_a_remedy(tmp_path: Path, log: Path) -> None:
    packed = gzip.compress(text_of(a_log_of(10, 500)).encode())
    cut_off, spoilt, followed_by = (tmp_path / name for name in ("cut.gz", "spoilt.gz", "followed.gz"))
    cut_off.write_bytes(packed[:-50])
    spoilt.write_bytes(packed[:200] + b"\0" * 50 + packed[250:])
    followed_by.write_bytes(packed + b"something else")
    write(log, a_log_of(10))
    for arguments, fact, remedy in [
        ([tmp_path / "absent.log"], "no such file", "- for the standard input"),
        ([tmp_path], "is a directory", "*.log"),
        ([cut_off], "it ends too early", "gzip -dc"),
        ([spoilt], "is broken as a gzip file", "gzip -dc"),
        ([followed_by], "is broken as a gzip file", "gzip -dc"),
        ([log, "--html", log], "is one of the logs", "another file"),
        ([log, "--html", tmp_path], "is a directory", "name a file"),
        ([log, "--html", tmp_path / "absent" / "page.html"], "there is no directory", "make it first"),
        ([], "Missing argument", "--help"),
        ([log, "--top", "0"], "--top", "1<=x<=1000"),
    ]:
        result = logs(*arguments)
        assert result.exit_code == 2, arguments
        assert fact in result.stderr and remedy in result.stderr, result.stderr
        assert "Traceback" not in result.output and result.stdout == ""


def test_a_log_of_another_user_is_named(log: Path) -> None:
    write(log, a_log_of(10)).chmod(0)

    def open_as_somebody() -> str:
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            reading.open_all([str(log)])
        except Unreadable as error:
            return str(error)
        return "it could be read"

    log.parent.chmod(0o755)
    message = run_in_child(open_as_somebody)
    assert "ermission" in message and str(log) in message


def test_a_pipe_closed_by_its_reader_ends_quietly(log: Path) -> None:
    write(log, [inherited(20 + n, 10, 1, n) for n in range(500)])
    shell = 'set -o pipefail; "$@" | head -n 1; exit "${PIPESTATUS[0]}"'
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", shell, "bash", *PIDPOOL, "--json", str(log)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


# -- following


def followed(path: Path) -> tuple[Followed, list[Any]]:
    sources = reading.open_all([str(path)], follow=True)
    return Followed(sources), [event for batch in reading.merged(sources) for event in batch]


def news(follower: Followed) -> list[Any]:
    return next(follower.news(lambda: False))


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_what_is_appended_is_read_also_half_lines(log: Path) -> None:
    first, second, third, fourth = a_log_of(10)[:4]
    write(log, [first])
    follower, begin = followed(log)
    assert begin == [first]
    line = text_of([second])
    append(log, line[:40])
    assert follower._news_of(follower.sources[0]) == []
    append(log, line[40:])
    assert news(follower) == [second]
    append(log, text_of([fourth, third]))
    assert news(follower) == [third, fourth]  # in the order of their time


def test_rotation_loses_nothing(log: Path) -> None:
    events = a_log_of(10, 10)
    write(log, events[:2])
    follower, _ = followed(log)
    old = log.with_suffix(".1")
    append(log, text_of(events[2:3]))
    log.rename(old)
    append(old, text_of(events[3:4]))
    assert news(follower) == events[2:4]  # there is no new one yet
    write(log, events[4:5])
    assert news(follower) == events[4:5]
    append(old, text_of(events[5:6]))  # by a writer that has not reopened the log yet
    append(log, text_of(events[6:7]))
    assert news(follower) == events[5:7]
    log.rename(log.with_suffix(".2"))
    write(log, events[7:8])
    assert news(follower) == events[7:8]
    assert len(follower.sources) == 2  # what was rotated twice is closed


@pytest.mark.parametrize("longer", [False, True], ids=["shorter than before", "longer than before"])
def test_truncation_begins_at_the_beginning(log: Path, longer: bool) -> None:
    events = a_log_of(10, 10)
    write(log, events[:3])
    follower, _ = followed(log)
    after = events[3:9] if longer else events[3:4]
    log.write_text(text_of(after))  # in place, as logrotate's copytruncate
    assert news(follower) == after


def test_following_shows_what_happens_and_ends_with_the_summary(log: Path) -> None:
    write(log, a_log_of(10))
    process = subprocess.Popen(
        [*PIDPOOL, "--follow", "--check", str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert "following after 7 events" in process.stderr.readline()
        append(log, text_of([adopted(20, 10, 50), inherited(20, 10, 1, 50, where="app.py:7 in \x1b[31mf")]))
        lines = [process.stdout.readline() for _ in range(2)]
        assert "pid 20  pool.adopted  parent_pid=10" in lines[0]
        assert "connection.inherited  10-1  owner_pid=10  state=in transaction" in lines[1]
        assert "where=app.py:7 in \\x1b[31mf" in lines[1]
        log.rename(log.with_suffix(".1"))
        write(log, [inherited(21, 10, 1, 51)])
        assert "pid 21" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert "2 connections crossed a fork, 2 with an open transaction" in rest
    assert errors == "" and process.returncode == 1


def test_following_a_pipe_ends_with_it() -> None:
    done = subprocess.run(
        [*PIDPOOL, "--follow", "-"], input=text_of(a_log_of(10)).encode(), capture_output=True, timeout=60
    )
    assert done.returncode == 0 and b"standard input: 7 events" in done.stdout


# -- passwords and control characters


def test_no_password_comes_out(log: Path, tmp_path: Path) -> None:
    secret = "hunter2"
    url = f"postgresql://bob:{secret}@db/app?password={secret}"
    page = tmp_path / "page.html"
    events = [
        {**inherited(20, 10, 1, 1, where=f"{url} in f"), "url": url, "api_token": secret, url: 1},
        {**opened(10, 1, 0), "pool": url},
        {**checkout(10, 1, 1, dsn=f"host=db password='{secret}' user=bob"), "deep": {"url": [url]}},
        checkin(10, 1, 9, 8.0, long="x" * 1980 + f" redis://:{secret}@cache"),
        event("checkout.timed_out", 10, 2, wait_time=1, size=5, overflow=0, checked_out=5, url=url),
        event(
            "checkout.overdue",
            10,
            2,
            held=1,
            hold_warning=1,
            where=f"mysql://a:{secret} with@spaces{secret}@h",
        ),
        {**adopted(20, 10, 1), "trigger": url},
        event("connection.closed", 10, 12, **tag(10, 1), reason=url),
        {**inherited(20, 10, 2, 1), "action": url},
    ]
    result = logs(write(log, events), "--html", page)
    lines = followed_lines(events)
    for output in (result.output, page.read_text(), logs("--json", log).output, *lines):
        assert secret not in output
        assert "***" in output or output in lines
    assert as_json(log)["foreign_lines"] == 0


def followed_lines(events: list[dict[str, Any]]) -> list[str]:
    from pidpool.tools.logs.terminal import line_of

    return [line_of(each) for each in Summary().feed(events)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:s3cret@db/app", "postgresql://bob:***@db/app"),
        ("postgresql://bob:s3c@ret@db/app", "postgresql://bob:***@db/app"),
        ("redis://:s3cret@cache", "redis://:***@cache"),
        ("host=db password = 's 3cret' user=bob", "host=db password = *** user=bob"),
        ("x?password=s3cret&sslmode=require", "x?password=***&sslmode=require"),
        ("http://host:8080/path", "http://host:8080/path"),
        ("/srv/app.py:12 in handler", "/srv/app.py:12 in handler"),
        ("\x1b]0;title\x07 \u202eevil \ud800", "\\x1b]0;title\\x07 \\u202eevil \\ud800"),
    ],
)
def test_text_is_made_safe(text: str, shown: str) -> None:
    assert clean.clean(text) == shown


def test_text_is_cut_without_baring_a_password() -> None:
    for length in range(1900, 2010):
        assert "s3cret" not in clean.clean("x" * length + "://u:s3cret" + "s" * 400 + "@db")
    assert len(clean.clean("x" * 5000)) == clean.LONGEST


def test_nothing_of_a_log_is_taken_for_markup_or_for_a_terminals_sequences(log: Path) -> None:
    where = "[bold red]app[/] \x1b[2J\x9b2J in f"
    text = logs(write(log, [inherited(20, 10, 1, 1, where=where)])).stdout
    assert "[bold red]app[/] \\x1b[2J\\x9b2J in f" in text
    assert all(character.isprintable() or character == "\n" for character in text)


# -- bounds


def test_what_is_kept_is_bounded_and_what_is_not_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_PROCESSES", 5)
    monkeypatch.setattr(processes, "MOST_CONNECTIONS", 8)
    monkeypatch.setattr(summary, "MOST_LEAKS", 3)
    monkeypatch.setattr(unmatched, "MOST_FORKS", 3)
    monkeypatch.setattr(summary, "MOST_PLACES", 2)
    events = [opened(10, 1, 0)]
    for n in range(20):
        child = 100 + n
        at = n + 1.0
        state = "idle" if n % 2 else "in transaction"
        events += [
            event("pool.forked", 10, at, idle=0, checked_out=1, in_transaction=1),
            *([adopted(child, 10, at), inherited(child, 10, 1, at, state)] if n < 12 else []),
            opened(child, 1, at),
            checkout(child, 1, at + 0.1, opened_at=at),
            checkin(child, 1, at + 0.2, 0.1, opened_at=at),
            event("connection.closed", child, at + 0.3, **tag(child, 1, at), reason="recycled"),
            event("checkout.overdue", 10, at, held=1.0, hold_warning=0.5, where=f"app.py:{n} in f"),
        ]
    found = document(summarised(events), [])
    assert found["foreign_lines"] == 0
    assert len(found["processes"]) == 6 and found["processes"][-1]["id"] == "others"
    assert sum(len(process["connections"]) for process in found["processes"]) <= 8
    assert found["totals"]["checkouts"] == found["totals"]["checkins"] == 20
    assert found["totals"]["opened"] == 21 and found["totals"]["closed"] == {"recycled": 20}
    assert found["totals"]["inherited"] == {"in transaction": 6, "idle": 6}
    assert len(found["leaks"]) == 6
    assert 0 < len(found["unmatched_forks"]) <= 3
    assert found["open_transaction_leaks"] == 6 + 8
    assert found["left_out"] == {
        "leaks": 6 + 8 - len(found["unmatched_forks"]),
        "processes": 8,
        "connections": 13,
        "timeouts": 0,
        "not_returned": 0,
        "overdue": 18,
    }
    assert [place["where"] for place in found["overdue"]] == ["app.py:0 in f", "app.py:1 in f"]


def test_memory_does_not_grow_with_the_log() -> None:
    block_events = [opened(pid, 1, 0) for pid in range(10, 18)]
    for n in range(2496):
        pid = 10 + n % 8
        block_events += [
            checkout(pid, 1, n, wait=n / 1e6, request_id=f"r{n}"),
            checkin(pid, 1, n + 0.5, n / 1e5, request_id=f"r{n}"),
        ]
    block = text_of(block_events).encode()
    peaks = []
    for events in (50_000, 500_000):
        process = subprocess.Popen([*PIDPOOL, "--json", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        for _ in range(events // len(block_events)):
            process.stdin.write(block)
        process.stdin.close()
        assert json.loads(process.stdout.read())["events"] == events
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss)  # KiB
    assert peaks[1] < peaks[0] + 4096


# -- the shapes


def test_the_document_has_the_fields_that_its_module_names(log: Path) -> None:
    forked = event("pool.forked", 10, 30, idle=0, checked_out=1, in_transaction=1)
    timed_out = event("checkout.timed_out", 10, 2, wait_time=1, size=5, overflow=0, checked_out=5)
    overdue = event("checkout.overdue", 10, 2, **tag(10, 1), held=1, hold_warning=1, where="a.py:1 in f")
    over = event("pool.over_maximum", 10, 3, processes=4, maximum=60, server_max_connections=40)
    events = [*a_log_of(10), inherited(20, 10, 1, 1), forked, timed_out, checkout(10, 1, 40), overdue, over]
    found = as_json(write(log, events))
    documentation = sys.modules[document.__module__].__doc__ or ""
    for part in (found, *(found[key][0] for key in found if isinstance(found[key], list) and key != "files")):
        for name in part:
            assert name in documentation, name
    for part in (found["totals"], found["processes"][0]["connections"][0], found["left_out"]):
        for name in part:
            assert name in documentation, name
    assert found["schema"] == 1


def test_a_log_of_many_processes_shows_some_of_each_level_and_counts_the_others(log: Path) -> None:
    events = [opened(10, 1, 0), opened(50, 1, 0.5)]
    for n in range(100):
        events += [adopted(100 + n, 10, 1 + n), adopted(1000 + n, 100, 200 + n)]
    events += [adopted(60 + n, 50, 300 + n) for n in range(3)]
    lines = logs(write(log, events)).stdout.splitlines()
    pids = [int(word) for line in lines for word in re.findall(r"─ pid (\d+)", line)]
    assert {60, 61, 62} <= set(pids)  # the other root's children
    assert [pid for pid in pids if 100 <= pid < 1000] == list(range(100, 135))
    assert (
        sum(line.lstrip("│ ").startswith("└── and 100 more processes") for line in lines) == 1
    )  # of pid 100
    assert "  └── and 65 more processes" in lines  # of pid 10
    assert "  40 of 205 processes are shown (see --json)" in lines
    few = logs(write(log, events[:2])).stdout
    assert "more process" not in few and "are shown" not in few


def test_roots_that_are_not_shown_are_counted(log: Path) -> None:
    lines = logs(write(log, [opened(10 + n, 1, n) for n in range(42)])).stdout.splitlines()
    assert "  and 2 more processes" in lines and "  40 of 42 processes are shown (see --json)" in lines


def test_the_text_is_readable_at_80_columns(log: Path) -> None:
    where = "/srv/app/orders/views.py:128 in create_order"
    events = [*a_log_of(10), adopted(20, 10, 1), inherited(20, 10, 1, 1, where=where), opened(20, 1, 2)]
    text = logs(write(log, events)).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert f"    checked out at {where}" in text.splitlines()
    for line in (
        "  16:00:01.000  10-1  pid 10 → pid 20  fd 7, server pid 50011",
        "    in transaction; severed, then not used",
        "  └── pid 20  forked 16:00:01.000 (noticed by hook)  app",
    ):
        assert line in text.splitlines()
    long = f"/srv/{'app' * 40}.py:1 in f"
    text = logs(write(log, [inherited(20, 10, 1, 1, where=long)])).stdout
    wrapped = [line for line in text.splitlines() if "appapp" in line]
    assert len(wrapped) > 1 and all(line.startswith("    ") and len(line) <= 80 for line in wrapped)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"), (0.00085, "850 µs"), (0.0009999, "1 ms"), (0.0123, "12.3 ms"), (0.9999, "1 s"),
        (4.56, "4.56 s"), (59.99, "1 min"), (4.096e-6, "4.1 µs"), (200, "3 min 20 s"), (7500, "2 h 5 min"),
        (7200, "2 h"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_source_over_a_pipe_does_not_wait_while_it_is_followed() -> None:
    reader, writer = os.pipe()
    try:
        source = Source(f"/proc/self/fd/{reader}", follow=True)
        assert source.read() is None and not source.over
        os.write(writer, text_of(a_log_of(10)[:1]).encode())
        assert source.read() == a_log_of(10)[:1]
    finally:
        os.close(writer)
        os.close(reader)
    assert source.read() is None and source.over


@pytest.mark.parametrize("seed", range(12))
def test_events_of_any_shape_are_taken_or_counted_and_always_shown(
    log: Path, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    odd = [
        None,
        0,
        -1,
        1.5,
        True,
        1 << 70,
        1e300,
        float("nan"),
        {},
        deep,
        "",
        "x",
        "\ud800\x1b[2J",
        "a" * 3000,
    ]
    odd += [AT, AT + 100, 10, 20, "10-1", "20-1", "idle", "in transaction", "hook"]
    events: list[Any] = []
    for name in chance.choices(list(Summary()._takes), k=400):
        pid = chance.choice([10, 20, 30, 40])
        owner = chance.choice([pid, pid, 10, 20])
        fields = tag(owner, chance.randint(1, 4), chance.choice([0, 0, 1, 50])) | dict.fromkeys(
            ("wait_time", "use_time", "create_time", "held", "hold_warning"), chance.random()
        )
        fields |= dict.fromkeys(("idle", "checked_out", "in_transaction", "connects_in_flight"), 1)
        fields |= {"parent_pid": chance.choice([10, 20, 30]), "trigger": "hook", "reason": "recycled"}
        fields |= {
            "state": chance.choice(["idle", "unknown", "in transaction"]),
            "action": "severed",
            "by": "20-9",
        }
        each = event(name, pid, chance.random() * 60, **fields)
        for key in chance.sample([*each, "where", "size", "soft", "own"], k=chance.choice([0, 0, 0, 1, 2])):
            each[key] = chance.choice(odd)
        events.append(each)
    found = as_json(write(log, events))
    assert found["events"] + found["foreign_lines"] == 400 and found["events"] > 200
    result = logs(log, "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    assert all(character.isprintable() or character == "\n" for character in result.stdout)
    assert len(followed_lines(events)) > 50
