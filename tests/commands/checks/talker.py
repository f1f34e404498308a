"""A server that says one thing."""

import socket
import threading


class Talker:
    """A server that says one thing to its one client, and hangs up."""

    def __init__(self, line: bytes) -> None:
        self._line = line
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> "Talker":
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def _serve(self) -> None:
        connected, _ = self._socket.accept()
        with connected:
            connected.sendall(self._line)

    def __exit__(self, *exception: object) -> None:
        self._thread.join()
        self._socket.close()
