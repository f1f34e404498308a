"""What the end-to-end tests share: a real gateway process, and what stands on its three sides."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.process import GatewayProcess, gateway

StartGateway = Callable[..., GatewayProcess]


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    """A capturing upstream; the gateway must have kept its promises towards it."""
    with CapturingUpstream() as capturing:
        yield capturing
    assert capturing.violations == []


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """An OTLP receiver."""
    with OtlpReceiver() as receiving:
        yield receiving


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGateway]:
    """Starts gateways that end with the test: settings by name, OTEL_* by `environ`."""
    with contextlib.ExitStack() as running:

        def start_gateway(
            settings: dict[str, Any],
            environ: dict[str, str] | None = None,
            *,
            uses_uvloop: bool = True,
            file_limit: int | None = None,
        ) -> GatewayProcess:
            directory = tmp_path / f"gateway{len(list(tmp_path.glob('gateway*')))}"
            directory.mkdir()
            return running.enter_context(
                gateway(settings, directory, environ=environ, uses_uvloop=uses_uvloop, file_limit=file_limit)
            )

        yield start_gateway


class Client:
    """A client that says exactly what a test wants, and reads replies."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 15)
        self._reader = self.socket.makefile("rb")

    @property
    def port(self) -> int:
        """Our own port: by it the gateway's span is found."""
        port: int = self.socket.getsockname()[1]
        return port

    def say(self, *lines: str) -> None:
        """Send command lines in one segment."""
        self.socket.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def reply(self) -> str:
        """The next reply: its code and the text of its last line; "" where the gateway has closed."""
        while True:
            line = self._reader.readline()
            if len(line) < 4 or line[3:4] != b"-":
                return line.decode().rstrip("\r\n")

    def asks(self, *lines: str) -> str:
        """Send command lines, and the reply to the last of them."""
        self.say(*lines)
        return [self.reply() for _ in lines][-1]

    def opens(self) -> None:
        """Greeting and EHLO."""
        assert self.reply().startswith("220 ")
        assert self.asks("EHLO client.example").startswith("250 ")

    def opens_content(self) -> None:
        """Greeting, EHLO, MAIL, RCPT, DATA."""
        self.opens()
        assert self.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>", "DATA").startswith("354 ")

    def close(self) -> None:
        self._reader.close()
        self.socket.close()


@pytest.fixture
def connect() -> Iterator[Callable[[int], Client]]:
    """Connects clients that are closed with the test."""
    with contextlib.ExitStack() as connected:

        def connect_to(port: int) -> Client:
            client = Client(port)
            connected.callback(client.close)
            return client

        yield connect_to
