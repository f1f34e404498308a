"""What the end-to-end tests share: a real gateway process, and what stands on its three sides."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

from otel_smtp.server.users import users_line
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.process import USES_UVLOOP, GatewayProcess, gateway

StartGateway = Callable[..., GatewayProcess]
PASSWORD: Final = "pass wörd"


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
            uses_uvloop: bool = USES_UVLOOP,
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


@dataclass(frozen=True, slots=True)
class Files:
    """Certificates and users, as an operator keeps them."""

    authority: trustme.CA
    directory: Path

    @property
    def ca_file(self) -> str:
        """The authority's certificate."""
        return str(self.directory / "ca.pem")

    def listener(self, tls: str, auth: str = "required") -> dict[str, Any]:
        """Settings of a listener with TLS and AUTH."""
        users = {} if auth == "off" else {"listener.auth_users_file": str(self.directory / "users")}
        return {
            "listener.tls": tls,
            "listener.tls_cert": str(self.directory / "cert.pem"),
            "listener.tls_key": str(self.directory / "key.pem"),
            "listener.auth": auth,
            **users,
        }

    def client_context(self) -> ssl.SSLContext:
        """A context that trusts the authority."""
        return ssl.create_default_context(cafile=self.ca_file)

    def server_context(self, *names: str) -> ssl.SSLContext:
        """A context with a certificate of the authority."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*names).configure_cert(context)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("files")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(directory / "cert.pem"), append=number > 0)
    (directory / "users").write_text(users_line("app", PASSWORD, scram=True) + "\n", encoding="utf-8")
    (directory / "users").chmod(0o600)
    return Files(authority, directory)
