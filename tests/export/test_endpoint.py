"""`StatsApp`: what it answers, to whom, and mounted in the frameworks that it is for."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import httpx
import pytest
from engines import MakeEngine
from families import family, pool_reporting, process, small_family
from forking import How, run_in_child
from parent import server_pid
from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool
from waiting import until

from pidpool import AsyncPidPool, PidPool, StatsApp

HERE = os.path.dirname(__file__)
PATH = os.pathsep.join([HERE, os.path.join(os.path.dirname(HERE), "support")])
"""For the programs below, which import this module and its helpers."""

PATHS = ["/", "/page.css", "/page.js", "/icon.svg", "/stats.json", "/metrics", "/healthz", "/elsewhere"]
FIGURES = ["/stats.json", "/metrics"]


@pytest.fixture
def app() -> StatsApp:
    return StatsApp(pool_reporting(small_family()))


class Got:
    def __init__(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = int(status[:3])
        self.headers = {name.lower(): value for name, value in headers}
        self.body = body
        self.text = body.decode()


def ask(application: Any, path: str, method: str = "GET", **environ: str) -> Got:
    """Ask a WSGI application, held to the standard by the stdlib's validator."""
    given: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "HTTP_HOST": "localhost",
        "QUERY_STRING": "",
    }
    given.update(environ)
    setup_testing_defaults(given)
    for name in [name for name, value in environ.items() if value == "absent"]:
        del given[name]
    got: list[Any] = []

    def start_response(*start: Any) -> Any:
        got.extend(start)
        return bytearray().extend  # for who would write instead of returning

    chunks: Iterable[bytes] = validator(application)(given, start_response)
    body = b"".join(chunks)
    chunks.close()  # type: ignore[attr-defined]
    return Got(got[0], got[1], body)


# -- what there is


def test_stats_json_is_the_family_s_own_dict() -> None:
    reported = small_family()
    stats = json.loads(ask(StatsApp(pool_reporting(reported)), "/stats.json").text)
    assert stats["answered_by"] == os.getpid()
    assert stats["pools"] == [json.loads(json.dumps(reported.to_dict()))]
    assert stats["open_states"] == ["in transaction", "unknown"]
    assert len(stats["bounds"]) + 1 == len(stats["pools"][0]["counters"]["wait_time"]["counts"])


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/icon.svg"])
def test_the_page_is_served_with_its_types(app: StatsApp, path: str) -> None:
    got = ask(app, path)
    assert got.status == 200 and len(got.body) > 300
    kind = {
        "/": "text/html",
        "/page.css": "text/css",
        "/page.js": "text/javascript",
        "/icon.svg": "image/svg+xml",
    }
    assert got.headers["content-type"].partition(";")[0] == kind[path]


def test_the_page_links_to_nothing_by_an_absolute_address(app: StatsApp) -> None:
    for path in ("/", "/page.css", "/page.js"):
        text = ask(app, path).text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in "".join(
            line.partition(" // ")[0] for line in text.splitlines() if not line.startswith("//")
        )
        assert 'href="/' not in text and 'src="/' not in text


def test_healthz_answers_whoever_asks() -> None:
    app = StatsApp(pool_reporting(family(process(1, None))), token="secret")
    assert ask(app, "/healthz", HTTP_HOST="10.0.0.7:80").text == "ok\n"


def test_what_there_is_not_is_named(app: StatsApp) -> None:
    got = ask(app, "/elsewhere")
    assert got.status == 404 and "/stats.json" in got.text


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_the_body(app: StatsApp, path: str) -> None:
    got, head = ask(app, path), ask(app, path, "HEAD")
    assert head.body == b"" and head.status == got.status
    assert head.headers["content-length"] == str(len(got.body))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_can_be_written(app: StatsApp, path: str, method: str) -> None:
    environ = {"CONTENT_LENGTH": "absent", "CONTENT_TYPE": "absent"} if method != "POST" else {}
    got = ask(app, path, method, **environ)
    assert got.status == 405 and got.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_keeps_browsers_from_harm(app: StatsApp, path: str) -> None:
    for got in (ask(app, path), ask(app, path, "DELETE"), ask(app, path, HTTP_HOST="evil.example")):
        policy = got.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["cache-control"] == "no-store"
        assert got.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in got.headers


def test_a_failure_is_told_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("inner workings")

    app = StatsApp(pool_reporting(fail))
    for path in FIGURES:
        got = ask(app, path)
        assert got.status == 500 and "RuntimeError" in got.text and str(os.getpid()) in got.text
        assert "inner workings" not in got.text and "Traceback" not in got.text
    assert "inner workings" in caplog.text


def test_a_missing_prometheus_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    for name in [
        name for name in sys.modules if name.startswith(("prometheus_client", "pidpool.export.prometheus"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    app = StatsApp(pool_reporting(small_family()))
    got = ask(app, "/metrics")
    assert got.status == 501 and "pip install 'pidpool[endpoint]'" in got.text
    assert ask(app, "/stats.json").status == 200


def test_importing_pidpool_imports_no_http() -> None:
    program = "import sys, pidpool; print([m for m in sys.modules if 'endpoint' in m or 'prometheus' in m])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_asking_opens_no_connection_and_waits_for_none(
    make_engine: MakeEngine, tls_url: str, clean_log: None
) -> None:
    engine = make_engine(tls_url, pool_size=1, max_overflow=0, pool_timeout=60)
    app = StatsApp(engine)
    assert json.loads(ask(app, "/stats.json").text)["pools"][0]["counters"]["opened"] == 0
    with engine.connect() as connection:  # the only one there may be
        own = server_pid(connection)
        waiting = threading.Thread(target=lambda: engine.connect().close())
        waiting.start()
        try:
            until(
                lambda: json.loads(ask(app, "/stats.json").text)["pools"][0]["waiting"],
                "the thread does not wait",
            )
            (family,) = json.loads(ask(app, "/stats.json").text)["pools"]
            for path in PATHS:
                ask(app, path)
            assert (family["used"], family["idle"], family["waiting"]) == (1, 0, 1)
            assert "db_client_connection_pending_requests" in ask(app, "/metrics").text
            assert server_pid(connection) == own
        finally:
            connection.close()
            waiting.join(20)
    counters = json.loads(ask(app, "/stats.json").text)["pools"][0]["counters"]
    assert (counters["opened"], counters["checkouts"], counters["checkins"]) == (1, 2, 2)


@pytest.mark.parametrize("how", ["python", "c"])
def test_parent_and_child_tell_the_same_of_both(
    make_engine: MakeEngine, tls_url: str, clean_log: None, how: How
) -> None:
    engine = make_engine(tls_url)
    app = StatsApp(engine)

    def reported() -> Any:
        (family,) = json.loads(ask(app, "/stats.json").text)["pools"]
        return [
            (each["pid"], each["parent_pid"], each["counters"]["checkouts"]) for each in family["processes"]
        ]

    def in_child() -> Any:
        with engine.connect() as connection:
            server_pid(connection)
        engine.dispose()
        return os.getpid(), reported(), ask(app, "/metrics").status

    with engine.connect() as mine:
        own, transaction = server_pid(mine), mine.execute(text("select txid_current()")).scalar_one()
        child, child_reported, status = run_in_child(in_child, how=how)
        assert child_reported == reported() == [(os.getpid(), None, 1), (child, os.getpid(), 1)]
        assert status == 200
        assert server_pid(mine) == own
        assert mine.execute(text("select txid_current()")).scalar_one() == transaction


# -- which pools are reported


def test_several_pools_are_told_apart_by_name() -> None:
    one, other, same = (
        pool_reporting(small_family()),
        pool_reporting(small_family()),
        pool_reporting(small_family(pool="books")),
    )
    stats = json.loads(ask(StatsApp(one, other, same, one), "/stats.json").text)
    assert [pool["pool"] for pool in stats["pools"]] == ["shop", "shop#2", "books"]


def test_a_pool_may_be_given_in_the_place_of_its_engine() -> None:
    engine = pool_reporting(small_family())
    pool = engine.pool
    assert isinstance(pool, PidPool)
    assert ask(StatsApp(pool), "/stats.json").status == 200


def test_an_async_engine_is_told_of() -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    class Reported(AsyncPidPool):
        def family_stats(self) -> Any:
            return small_family()

    engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/x", poolclass=Reported)
    assert json.loads(ask(StatsApp(engine), "/stats.json").text)["pools"][0]["pool"] == "shop"


def test_the_pool_is_looked_up_again_after_dispose() -> None:
    engine = pool_reporting(small_family())
    app = StatsApp(engine)
    engine.dispose()
    engine.pool.reported = small_family(pool="new")  # type: ignore[attr-defined]
    assert json.loads(ask(app, "/stats.json").text)["pools"][0]["pool"] == "new"


def test_what_keeps_no_stats_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"QueuePool.*poolclass=PidPool"):
        StatsApp(create_engine("sqlite://", poolclass=QueuePool))
    with pytest.raises(TypeError, match="neither an engine nor a PidPool"):
        StatsApp("sqlite://")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least one"):
        StatsApp()


# -- who may read


@pytest.mark.parametrize("path", [path for path in PATHS if path != "/healthz"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "absent", ""])
def test_a_foreign_host_name_is_refused(app: StatsApp, path: str, host: str) -> None:
    got = ask(app, path, HTTP_HOST=host)
    assert got.status == 403 and "allowed_hosts" in got.text


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:9432", "[::1]", "[::1]:80"]
)
def test_loopback_names_are_answered(app: StatsApp, host: str) -> None:
    assert ask(app, "/stats.json", HTTP_HOST=host).status == 200


def test_further_hosts_may_be_allowed() -> None:
    engine = pool_reporting(small_family())
    app = StatsApp(engine, allowed_hosts=["Stats.example", "10.0.0.7"])
    assert ask(app, "/stats.json", HTTP_HOST="stats.example:8443").status == 200
    assert ask(app, "/stats.json", HTTP_HOST="10.0.0.7:80").status == 200
    assert ask(app, "/stats.json", HTTP_HOST="evil.stats.example").status == 403
    assert ask(StatsApp(engine, allowed_hosts=["*"]), "/stats.json", HTTP_HOST="evil.example").status == 200
    with pytest.raises(TypeError, match="takes a list"):
        StatsApp(engine, allowed_hosts="stats.example")


@pytest.mark.parametrize("path", FIGURES)
def test_a_token_is_asked_for(path: str) -> None:
    app = StatsApp(pool_reporting(small_family()), token="s3cret-~+/==")
    for given in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic s3cret-~+/==",
        "s3cret-~+/==",
        "Bearer s3cret-~+/== x",
        "Bearer \xe9",
    ):
        got = ask(app, path, HTTP_AUTHORIZATION=given)
        assert got.status == 401 and got.headers["www-authenticate"].startswith("Bearer"), given
        assert "s3cret" not in got.text
    assert ask(app, path, QUERY_STRING="token=s3cret-~+/==").status == 401
    assert ask(app, path, HTTP_AUTHORIZATION="bearer s3cret-~+/==").status == 200


def test_the_page_holds_no_figures_and_asks_for_no_token() -> None:
    app = StatsApp(pool_reporting(small_family()), token="secret")
    for path in ("/", "/page.css", "/page.js"):
        got = ask(app, path)
        assert got.status == 200 and "shop" not in got.text


@pytest.mark.parametrize("token", ["", "with space", "line\nbreak", "ünfit", 7])
def test_an_unfit_token_is_refused_without_being_shown(token: Any) -> None:
    with pytest.raises(ValueError, match="token_urlsafe") as caught:
        StatsApp(pool_reporting(small_family()), token=token)
    assert not str(token) or str(token) not in str(caught.value)


# -- in forked children


@pytest.mark.parametrize("how", ["python", "c"])
def test_a_forked_child_answers_too(app: StatsApp, how: How) -> None:
    ask(app, "/metrics")
    answer = run_in_child(
        lambda: (os.getpid(), ask(app, "/stats.json").text, ask(app, "/metrics").status), how=how
    )
    pid, stats, status = answer
    assert json.loads(stats)["answered_by"] == pid != os.getpid()
    assert status == 200


# -- in other applications, under a prefix


def other(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"the application's own"]


def is_mounted(client: Any, prefix: str) -> None:
    """Check through `client.get()` that all is there under a prefix, and the application elsewhere."""
    page = client.get(f"{prefix}/")
    assert page.status_code == 200 and 'src="page.js"' in page.text
    assert client.get(f"{prefix}/page.js").status_code == 200
    assert client.get(f"{prefix}/stats.json").json()["pools"][0]["pool"] == "shop"
    assert "db_client_connection_count" in client.get(f"{prefix}/metrics").text
    assert client.get(f"{prefix}/healthz").text == "ok\n"
    assert client.get(f"{prefix}/elsewhere").status_code == 404
    bare = client.get(prefix)
    assert bare.status_code in (307, 308)
    assert (
        httpx.URL(f"http://localhost{prefix}").join(bare.headers["location"]).raw_path.decode()
        == f"{prefix}/"
    )
    assert client.get("/own").text == "the application's own"
    assert client.get(f"{prefix}x").status_code in (200, 404)  # not ours


def wsgi_client(application: Any) -> httpx.Client:
    return httpx.Client(transport=httpx.WSGITransport(app=application), base_url="http://localhost")


class AsgiClient:
    """httpx's asynchronous client, used synchronously."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def get(self, path: str) -> httpx.Response:
        async def get() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._application)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get(path)

        return asyncio.run(get())


@pytest.mark.parametrize("prefix", ["/pidpool", "/deep/down/stats", "/pidpool/"])
def test_mounted_beside_any_wsgi_application(app: StatsApp, prefix: str) -> None:
    with wsgi_client(app.mount(other, prefix)) as client:
        is_mounted(client, prefix.rstrip("/"))
    with pytest.raises(ValueError, match="prefix"):
        app.mount(other, "pidpool")
    with pytest.raises(ValueError, match="prefix"):
        app.mount(other, "/")


def test_a_prefix_may_have_any_letters(app: StatsApp) -> None:
    in_wsgi = "/größe".encode().decode("latin-1")
    mounted = app.mount(other, "/größe")
    assert ask(mounted, f"{in_wsgi}/healthz").text == "ok\n"
    assert ask(mounted, in_wsgi).headers["location"] == f"./{quote('größe')}/"


def test_mounted_in_flask(app: StatsApp) -> None:
    import flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    flask_app = flask.Flask("own")
    flask_app.get("/own")(lambda: "the application's own")
    with wsgi_client(app.mount(flask_app.wsgi_app, "/pidpool")) as client:
        is_mounted(client, "/pidpool")
    with wsgi_client(DispatcherMiddleware(flask_app.wsgi_app, {"/pidpool": app})) as client:
        is_mounted(client, "/pidpool")


DJANGO = """
import os, sys
import django.conf, django.http, django.urls
from django.core.wsgi import get_wsgi_application

django.conf.settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["localhost"], SECRET_KEY="x")
urlpatterns = [django.urls.path("own", lambda request: django.http.HttpResponse("the application's own"))]

sys.path[:0] = sys.argv[1].split(os.pathsep)
from families import small_family, pool_reporting
from pidpool import StatsApp
from test_endpoint import is_mounted, wsgi_client

stats = StatsApp(pool_reporting(small_family()))
with wsgi_client(stats.mount(get_wsgi_application(), "/pidpool")) as client:
    is_mounted(client, "/pidpool")
print("mounted")
"""


def test_mounted_in_django() -> None:
    # In a process of its own: Django is configured once for the whole of one.
    done = subprocess.run([sys.executable, "-c", DJANGO, PATH], capture_output=True, text=True, timeout=60)
    assert done.stdout == "mounted\n", done.stderr


def test_mounted_in_fastapi(app: StatsApp) -> None:
    import fastapi
    from fastapi.responses import PlainTextResponse

    api = fastapi.FastAPI()
    api.mount("/pidpool", app.asgi)
    api.get("/own", response_class=PlainTextResponse)(lambda: "the application's own")
    is_mounted(AsgiClient(api), "/pidpool")
    above = fastapi.FastAPI()
    above.mount("/outer", api)
    assert AsgiClient(above).get("/outer/pidpool/healthz").text == "ok\n"


def test_mounted_in_starlette(app: StatsApp) -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route

    own = Route("/own", lambda request: PlainTextResponse("the application's own"))
    is_mounted(AsgiClient(Starlette(routes=[own, Mount("/pidpool", app.asgi)])), "/pidpool")


def test_asgi_alone_under_a_root_path(app: StatsApp) -> None:
    async def ask_asgi(path: str, root_path: str, method: str = "GET") -> list[Any]:
        sent: list[Any] = []
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "root_path": root_path,
            "headers": [(b"host", b"localhost")],
        }

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("there is nothing to be received")

        await app.asgi(scope, receive, send)
        return sent

    for path in ("/api/healthz", "/healthz"):  # servers differ in whether the path has the root's in it
        start, body = asyncio.run(ask_asgi(path, "/api"))
        assert start["status"] == 200 and body["body"] == b"ok\n"
    start, body = asyncio.run(ask_asgi("/healthz", "", "HEAD"))
    assert body["body"] == b"" and (b"content-length", b"3") in start["headers"]


UVICORN = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
import fastapi, uvicorn
from families import small_family, pool_reporting
from pidpool import StatsApp

stats = StatsApp(pool_reporting(small_family()))
own = fastapi.FastAPI()
own.mount("/pidpool", stats.asgi)
uvicorn.run(own if sys.argv[2] == "mounted" else stats.asgi, port=0, root_path="/behind/a/proxy")
"""


@pytest.mark.parametrize("how", ["mounted", "alone"])
def test_served_by_uvicorn(how: str) -> None:
    command = [sys.executable, "-c", UVICORN, PATH, how]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = ""
            while not (running := re.search(r"running on (http://127\.0\.0\.1:\d+)", said)):
                line = server.stderr.readline()
                assert line, said
                said += line
            prefix = "/pidpool" if how == "mounted" else ""
            with httpx.Client(base_url=running[1] + prefix, timeout=20) as client:
                assert client.get("/").text.startswith("<!doctype html>")
                assert client.get("/stats.json").json()["answered_by"] == server.pid
                assert client.head("/metrics").headers["content-length"] != "0"
                assert client.post("/metrics").status_code == 405
        finally:
            server.terminate()
            rest = server.stderr.read()
    assert "Application shutdown complete" in rest and "Error" not in said + rest


def test_asgi_takes_part_in_a_server_s_life_and_refuses_websockets(app: StatsApp) -> None:
    sent: list[str] = []
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(app.asgi({"type": "lifespan"}, receive, send))
    asyncio.run(app.asgi({"type": "websocket"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]
