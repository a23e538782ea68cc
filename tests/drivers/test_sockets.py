"""The socket of a connection is found among those of its process."""

from __future__ import annotations

import os
import socket
import threading
import time

from pidpool.drivers.sockets import Sockets


def test_a_socket_is_one_though_another_thread_looks_at_a_copy_of_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = Sockets()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:

            def look() -> None:
                for _ in range(100):
                    copy = os.dup(client.fileno())
                    time.sleep(0.001)
                    os.close(copy)
                    time.sleep(0.001)

            looking = threading.Thread(target=look)
            looking.start()
            found = set()
            while looking.is_alive():
                found.add(tuple(each.fd for each in before.opened_to(port)))
            assert found == {(client.fileno(),)}
