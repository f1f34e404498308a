"""A server on loopback with a thread for each client: what upstreams that outlive killed gateways have in common."""

import contextlib
import socketserver
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Gone(Exception):
    """It ends the connection."""


class ThreadedUpstream(ABC):
    """Listens on `port`, which the kernel chose, within `with`."""

    def __init__(self) -> None:
        upstream = self

        class Session(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError, Gone):  # its client was killed, or it goes itself
                    upstream.converse(self)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Session)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @abstractmethod
    def converse(self, session: socketserver.StreamRequestHandler) -> None:
        """Serve one client, in its thread; `Gone` ends it."""


def read_content(session: socketserver.StreamRequestHandler) -> bytes:
    """The content up to the final dot, dots un-stuffed.

    Raises:
        Gone: the client ended before.
    """
    content = b""
    while (line := session.rfile.readline()) != b".\r\n":
        if not line:
            raise Gone
        content += line[1:] if line.startswith(b".") else line
    return content
