"""The ways to have a host work: each function returns what starts one, gives it its requests or tasks, and
ends it."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hosting import BIN, PROGRAMS, START, Run
from waiting import until


class OverUnixSocket(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def web(*command: str, clients: int = 3, **environment: str) -> Callable[[Run], None]:
    """A web server; `{socket}` in the command is the unix socket on which it has to listen."""

    def serve(run: Run) -> None:
        arguments = [argument.format(socket=run.socket) for argument in command]
        with run.process(*arguments, **environment) as process:

            def get(page: str, timeout: float) -> int:
                connection = OverUnixSocket(run.socket, timeout)
                try:
                    connection.request("GET", page)
                    return connection.getresponse().status
                finally:
                    connection.close()

            def answers() -> bool:
                assert process.poll() is None, run.log.read_text()
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return get("/ready", 2.0) == 200
                return False

            until(answers, lambda: f"the server does not answer:\n{run.log.read_text()}", START)
            next_number = threading.Lock()
            deadline = time.monotonic() + run.patience

            def load() -> None:
                while True:
                    with next_number:
                        # One worker may have been given all of them: a few more then.
                        enough = run.asked >= run.tasks and run.workers_so_far() >= run.host.workers
                        if enough or (run.asked >= run.tasks and (run.failed or time.monotonic() > deadline)):
                            return
                        number, run.asked = run.asked, run.asked + 1
                    try:
                        status = get(f"/work/{number}", run.patience)
                        if status != 200:
                            run.failed = True
                            run.note(f"request {number} was answered with {status}")
                    except (OSError, http.client.HTTPException) as error:
                        run.failed = True
                        run.note(f"request {number} got no answer: {error!r}")

            run.held_at_first = run.held_sessions()
            threads = [threading.Thread(target=load) for _ in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    return serve


def program(how: str) -> Callable[[Run], None]:
    """A program that starts its processes itself."""

    def serve(run: Run) -> None:
        run.asked = run.tasks
        with run.process(sys.executable, str(PROGRAMS / "forks_itself.py"), how, str(run.tasks)) as process:
            try:
                process.wait(run.patience)
            except subprocess.TimeoutExpired:
                run.note("does not end")
            else:
                if process.returncode:
                    run.note(f"ended with {process.returncode}: {run.log.read_text()}")

    return serve


def celery(*options: str) -> Callable[[Run], None]:
    """A Celery worker; its messages are files."""

    def serve(run: Run) -> None:
        from celery.app.base import Celery

        queue = run.directory / "queue"
        queue.mkdir()
        folders = {"data_folder_in": str(queue), "data_folder_out": str(queue), "control_folder": str(queue)}
        with Celery(broker="filesystem://", set_as_current=False) as sender:
            sender.conf.broker_transport_options = folders
            run.asked = run.tasks
            for number in range(run.tasks):
                sender.send_task("work", [number], ignore_result=True)
        command = (sys.executable, "-m", "celery", "--app=celery_app", "worker", "--concurrency=2")
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING")
        with run.process(*command, *quiet, *options, QUEUE=str(queue)) as process:
            run.wait_for_the_work(process)

    return serve


@contextlib.contextmanager
def redis(run: Run) -> Iterator[str]:
    """Run a Redis on a unix socket; gives its path."""
    binary = shutil.which("redis-server")
    assert binary, "needs Redis: apt-get install redis-server"
    path = run.directory / "redis"
    options = ("--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(run.directory))
    with subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL) as server:
        try:
            until(path.exists, "Redis does not start")
            yield str(path)
        finally:
            server.terminate()


def rq(run: Run) -> None:
    """An RQ worker, which forks for each job. Its settings import the shop before."""
    from redis import Redis
    from rq import Queue

    with redis(run) as path, Redis(unix_socket_path=path) as connection:
        queue = Queue(connection=connection)
        run.asked = run.tasks
        for number in range(run.tasks):
            queue.enqueue("shop.work_and_leave", number)
        command = (str(BIN / "rq"), "worker", "--quiet", f"--url=unix://{path}", "--config=rq_settings")
        with run.process(*command) as process:
            run.wait_for_the_work(process)


def dramatiq(run: Run) -> None:
    """dramatiq's processes, each of which imports the shop."""
    from dramatiq import Message
    from dramatiq.brokers.redis import RedisBroker

    with redis(run) as path:
        broker = RedisBroker(url=f"unix://{path}")
        broker.declare_queue("default")
        run.asked = run.tasks
        for number in range(run.tasks):
            broker.enqueue(Message("default", "work", (number,), {}, {}))
        broker.close()
        command = ("dramatiq", "dramatiq_app", "--processes=2", "--threads=2")
        with run.process(sys.executable, "-m", *command, REDIS=path) as process:
            run.wait_for_the_work(process)
