"""`serve_stats`: beside an application, through forks, and with clients that are slow, broken or many."""

from __future__ import annotations

import contextlib
import errno
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from families import pool_reporting, small_family
from forking import How, run_in_child
from waiting import until

from pidpool import serve_stats
from pidpool.export.endpoint import StatsServer, server
from pidpool.export.endpoint.http1 import HEAD_LIMIT
from pidpool.forks import detection

SUPPORT = os.path.join(os.path.dirname(os.path.dirname(__file__)), "support")

PATIENCE = 20.0


@pytest.fixture
def served() -> Iterator[StatsServer]:
    with serve_stats(pool_reporting(small_family()), port=0) as stats:
        yield stats


def get(stats: StatsServer, path: str = "/stats.json", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", stats.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


def connect(stats: StatsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", stats.port), timeout=PATIENCE)


def send(stats: StatsServer, request: bytes) -> bytes:
    """Send bytes, and return all that comes back until the server ends the connection."""
    with connect(stats) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


# -- as it should be


def test_it_serves_what_the_app_answers(served: StatsServer) -> None:
    assert served.url == f"http://127.0.0.1:{served.port}/"
    with urllib.request.urlopen(f"{served.url}stats.json", timeout=PATIENCE) as response:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert json.load(response)["pools"][0]["pool"] == "shop"
    assert b"db_client_connection_count" in get(served, "/metrics")[1]
    assert get(served, "/elsewhere")[0] == 404
    assert get(served, Host="evil.example")[0] == 403
    assert send(served, b"HEAD /healthz HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")
    assert send(served, b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert send(served, b"GET http://localhost/healthz?x#y HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://localhost/stats.json", b"200"),
        (b"http://localhost:80/stats.json?x", b"200"),
        (b"http://localhost", b"200"),
        (b"http://evil.example/stats.json", b"403"),
        (b"http:///stats.json", b"403"),
        (b"//evil.example/stats.json", b"404"),
        (b"//stats.json", b"404"),
        (b"/%73tats.json?x", b"200"),
        (b"/stats.json%00", b"404"),
        (b"/%2e%2e/stats.json", b"404"),
        (b"*", b"404"),
    ],
)
def test_a_target_is_a_path_or_names_the_host_that_counts(
    served: StatsServer, target: bytes, status: bytes
) -> None:
    request = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert send(served, request).split(b" ")[1] == status


def test_it_serves_on_after_an_answer_for_which_there_was_no_memory(
    served: StatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(answer: object, *, body: bool) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(server.http1, "in_bytes", fail)
        assert send(served, b"GET /healthz HTTP/1.1\r\n\r\n") == b""
    assert get(served, "/healthz") == (200, b"ok\n")


def test_a_token_and_further_hosts() -> None:
    with serve_stats(
        pool_reporting(small_family()), port=0, token="secret", allowed_hosts=["stats.example"]
    ) as stats:
        assert get(stats)[0] == 401
        assert get(stats, Authorization="Bearer secret", Host="stats.example")[0] == 200


def test_a_closed_one_serves_no_more_and_frees_the_port() -> None:
    engine = pool_reporting(small_family())
    stats = serve_stats(engine, port=0)
    assert stats.url in repr(stats)
    with connect(stats):  # a client that does nothing does not keep it
        stats.close()
        stats.close()
    assert "closed" in repr(stats)
    with pytest.raises(ConnectionRefusedError):
        connect(stats)
    assert not any(thread.name == "pidpool-stats" for thread in threading.enumerate())
    with serve_stats(engine, port=stats.port) as again:
        assert get(again)[0] == 200


def test_a_taken_port_is_named_with_the_remedy(served: StatsServer) -> None:
    with pytest.raises(OSError, match=rf"port {served.port} is taken.*port=0") as caught:
        serve_stats(pool_reporting(small_family()), port=served.port)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_none_of_ours_is_named(host: str) -> None:
    with pytest.raises(OSError, match=rf"can't serve stats on {host}:0"):
        serve_stats(pool_reporting(small_family()), host=host, port=0)


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"port={port}"):
        serve_stats(pool_reporting(small_family()), port=port)


def test_every_address_of_the_machine() -> None:
    with serve_stats(pool_reporting(small_family()), host="0.0.0.0", port=0) as stats:
        assert stats.url == f"http://127.0.0.1:{stats.port}/"
        assert get(stats)[0] == 200
        assert get(stats, Host="0.0.0.0")[0] == 200
        assert get(stats, Host="shop.example")[0] == 403


# -- forks


def still_listening(stats: StatsServer) -> list[str]:
    """Return this process's descriptors of the server's listener."""
    listening = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as copy:
            if (
                copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and copy.getsockname()[1] == stats.port
            ):
                listening.append(name)
    return listening


@pytest.mark.parametrize("how", ["python", "c"])
def test_a_child_lets_go_of_the_listener(
    served: StatsServer, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLIENT_SECONDS", 60.0)  # a fork in C may take several tries of 5 s

    def in_child() -> tuple[list[str], str]:
        if how == "c":
            detection.settle()  # what any use of a pool does, where no hook runs
        served.close()  # does nothing here
        return still_listening(served), repr(served)

    assert len(still_listening(served)) == 1
    # A client in the middle of its request is the parent's alone, too.
    with connect(served) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert run_in_child(in_child, how=how) == ([], "<StatsServer closed>")
        client.sendall(b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert json.loads(get(served)[1])["answered_by"] == os.getpid()


def test_a_child_may_serve_on_a_port_of_its_own(served: StatsServer) -> None:
    def in_child() -> tuple[int, int, int]:
        with serve_stats(pool_reporting(small_family()), port=0) as own:
            return os.getpid(), json.loads(get(own)[1])["answered_by"], own.port

    pid, answered_by, port = run_in_child(in_child)
    assert answered_by == pid and port != served.port
    assert json.loads(get(served)[1])["answered_by"] == os.getpid()


def test_nobody_listens_once_the_parent_is_gone() -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {SUPPORT!r})
from families import small_family, pool_reporting
from pidpool import serve_stats
stats = serve_stats(pool_reporting(small_family()), port=0)
child = os.fork()
if child == 0:
    print(stats.port, os.getpid(), flush=True)
signal.pause()
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        port, child = map(int, parent.stdout.readline().split())
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):
                parent.kill()
                parent.wait()
            os.kill(child, 0)  # it lives on, and has nothing of the server
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        finally:
            os.kill(child, signal.SIGKILL)


def test_forks_under_load_neither_hang_nor_lose_an_answer(served: StatsServer) -> None:
    enough = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        while not enough.is_set():
            statuses.append(get(served, "/metrics")[0])

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(20):
            assert run_in_child(lambda: len(server._servers)) == 0
    finally:
        enough.set()
        for asker in askers:
            asker.join(PATIENCE)
    assert set(statuses) == {200}


# -- clients that mean no good


@pytest.mark.parametrize(
    "request_head",
    [
        b"nonsense",
        b"GET / HTTP/2.0",
        b"GET /",
        b"GET /a b HTTP/1.1",
        b"GET / HTTP/1.1\r\nno colon",
        b"GET / HTTP/1.1\r\nHost : localhost",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: on",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: a\nSet-Cookie: b",
        b"GET http://[ HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_request_is_answered_so(served: StatsServer, request_head: bytes) -> None:
    answer = send(served, request_head + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"This is not an HTTP/1 request: " in answer
    assert get(served)[0] == 200


def test_a_head_without_end_is_cut_short(served: StatsServer) -> None:
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "
    answer = send(served, head + b"x" * (HEAD_LIMIT - len(head)))
    assert answer.startswith(b"HTTP/1.1 431 ") and str(HEAD_LIMIT).encode() in answer


def test_a_body_is_ignored_and_the_answer_still_arrives(served: StatsServer) -> None:
    body = b"x" * 200_000
    request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (3 * len(body))
    with connect(served) as client:
        client.sendall(request + body)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 405 ") and answer.endswith(b"use GET or HEAD.\n")
        for _ in range(2):  # whoever goes on sending is not met with a reset
            client.sendall(body)
            assert get(served)[0] == 200  # a reset would have arrived before this answer


def test_slow_clients_hold_no_other_client_up(served: StatsServer) -> None:
    with connect(served) as slow, connect(served):
        for letter in b"GET /":
            with contextlib.suppress(ConnectionError):  # on a slow machine it is dropped already
                slow.send(bytes([letter]))
            assert get(served)[0] == 200


def test_a_trickle_of_bytes_buys_no_more_time(served: StatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENT_SECONDS", 0.5)
    with connect(served) as slow, connect(served) as silent:
        slow.settimeout(0.05)
        ended = False
        give_up = time.monotonic() + PATIENCE
        while not ended and time.monotonic() < give_up:
            try:
                slow.send(b"x")
                ended = slow.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
        assert ended, f"still connected after {PATIENCE} seconds of one byte at a time"
        assert silent.recv(1) == b""


def test_a_client_that_takes_no_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLIENT_SECONDS", 1.0)
    many = [small_family(pool="p" * 9000 + str(number)) for number in range(20)]
    engines = [pool_reporting(each) for each in many]  # megabytes: more than the sockets' buffers hold
    with serve_stats(*engines, port=0) as stats, connect(stats) as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: stats._clients, "the client is not accepted", PATIENCE)
        monkeypatch.setattr(server, "CLIENT_SECONDS", PATIENCE)  # for the next one, on a slow machine
        assert get(stats, "/healthz")[0] == 200
        until(lambda: not stats._clients, "the client is kept", PATIENCE)


def test_too_many_clients_push_the_oldest_out(served: StatsServer) -> None:
    with contextlib.ExitStack() as clients:
        first = clients.enter_context(connect(served))
        for _ in range(2 * server.CLIENTS):
            clients.enter_context(connect(served))
            assert len(served._clients) <= server.CLIENTS
        assert get(served)[0] == 200
        assert first.recv(1) == b""


def test_the_thread_rests_in_proportion_to_its_work(
    served: StatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a flood of requests leaves nine tenths of the time to the application."""
    rests: list[float] = []
    clock = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(clock) * 0.01)  # each turn takes 10 ms
    monkeypatch.setattr(served._closing, "wait", lambda seconds: rests.append(seconds))
    for _ in range(3):
        assert get(served, "/healthz")[0] == 200
    # The first turn began before the clock was replaced.
    assert len(rests) >= 3
    assert rests[1:] == pytest.approx([0.09] * (len(rests) - 1))


def test_it_goes_on_when_descriptors_run_out(served: StatsServer) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(served) as waiting, contextlib.ExitStack() as files:
        until(lambda: len(served._clients) == 1, "the client is not accepted", PATIENCE)
        client = files.enter_context(socket.socket())
        client.settimeout(PATIENCE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    files.callback(os.close, os.dup(0))
            client.connect(("127.0.0.1", served.port))  # waits in the listener's queue
            waiting.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
