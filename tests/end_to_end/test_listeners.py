"""Listeners as operators set them up: TLS, AUTH and PROXY headers, with other people's clients; upstreams over TLS."""

import asyncio
import base64
import contextlib
import smtplib
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import aiosmtplib
import pytest

from tests.end_to_end.conftest import PASSWORD, Client, Files, StartGateway
from tests.end_to_end.messages import DOTS
from tests.end_to_end.test_traces import connection_of, exporting, story
from tests.support import nodemailer
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.tools import run, swaks
from tests.support.waiting import until

SENDER: Final = "a@client.example"
RECIPIENT: Final = "b@there.example"


def by_smtplib(port: int, files: Files, tls: str, directory: Path) -> None:
    context = files.client_context()
    client = (
        smtplib.SMTP_SSL("localhost", port, timeout=15, context=context)
        if tls == "implicit"
        else smtplib.SMTP("localhost", port, timeout=15)
    )
    with client:
        if tls == "starttls":
            client.starttls(context=context)
        client.ehlo()
        # Its own login knows ASCII passwords only.
        message = base64.b64encode(f"\0app\0{PASSWORD}".encode()).decode()
        assert client.docmd("AUTH", f"PLAIN {message}")[0] == 235
        assert client.sendmail(SENDER, [RECIPIENT], DOTS) == {}


def by_swaks(port: int, files: Files, tls: str, directory: Path) -> None:
    done = swaks(
        port,
        "--tls-on-connect" if tls == "implicit" else "--tls",
        "--tls-verify",
        "--tls-ca-path",
        files.ca_file,
        *("--auth", "PLAIN", "--auth-user", "app", "--auth-password", PASSWORD),
        *("--from", SENDER, "--to", RECIPIENT, "--suppress-data"),
        body=DOTS.replace(b"\r\n", b"\n").removesuffix(b"\n"),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def by_curl(port: int, files: Files, tls: str, directory: Path) -> None:
    file = directory / "message.eml"
    file.write_bytes(DOTS)
    url = f"{'smtps' if tls == 'implicit' else 'smtp'}://localhost:{port}/client.example"
    options = ("--silent", "--show-error", "--ssl-reqd", "--cacert", files.ca_file, "--user", f"app:{PASSWORD}")
    done = run("curl", *options, url, "--mail-from", SENDER, "--mail-rcpt", RECIPIENT, "--upload-file", str(file))
    assert done.returncode == 0, done.stderr


def by_msmtp(port: int, files: Files, tls: str, directory: Path) -> None:
    # By SCRAM-SHA-256 where its library has it; that is its own choice from what is offered.
    (directory / "password").write_text(PASSWORD, encoding="utf-8")
    options = (
        "--file=/dev/null",
        "--host=localhost",
        f"--port={port}",
        f"--from={SENDER}",
        "--tls=on",
        f"--tls-starttls={'off' if tls == 'implicit' else 'on'}",
        f"--tls-trust-file={files.ca_file}",
        "--auth=on",
        "--user=app",
        f"--passwordeval=cat {directory / 'password'}",
    )
    done = run("msmtp", *options, RECIPIENT, stdin=DOTS.replace(b"\r\n", b"\n"))
    assert done.returncode == 0, done.stderr


def by_aiosmtplib(port: int, files: Files, tls: str, directory: Path) -> None:
    async def send() -> None:
        client = aiosmtplib.SMTP(
            hostname="localhost",
            port=port,
            timeout=15,
            use_tls=tls == "implicit",
            start_tls=tls == "starttls",
            tls_context=files.client_context(),
        )
        async with client:
            assert client.transport is not None
            connected = client.transport.get_extra_info("socket")
            await client.ehlo()
            # As text, its login takes ASCII passwords only.
            await client.auth_plain(b"app", PASSWORD.encode())
            refused, _ = await client.sendmail(SENDER, [RECIPIENT], DOTS)
            assert refused == {}
        # Its close does not wait for the end of TLS, and what is open when the loop ends is warned of.
        await until(lambda: connected.fileno() == -1)

    asyncio.run(send())


def by_nodemailer(port: int, files: Files, tls: str, directory: Path) -> None:
    file = directory / "message.eml"
    file.write_bytes(DOTS)
    options = {
        "host": "localhost",
        "port": port,
        "secure": tls == "implicit",
        "requireTLS": tls == "starttls",
        "tls": {"ca": files.ca_file},
        "auth": {"user": "app", "pass": PASSWORD},
    }
    done = nodemailer.send(options, SENDER, [RECIPIENT], file)
    assert done.returncode == 0, done.stderr


CLIENTS: Final[dict[str, Callable[[int, Files, str, Path], None]]] = {
    "smtplib": by_smtplib,
    "aiosmtplib": by_aiosmtplib,
    "swaks": by_swaks,
    "curl": by_curl,
    "msmtp": by_msmtp,
    "nodemailer": by_nodemailer,
}


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_clients_come_by_tls_and_authenticate(
    tls: str, files: Files, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, tmp_path: Path
) -> None:
    settings = {**files.listener(tls), "upstream.url": upstream.url, "upstream.trace_context": "strip"}
    running = start(settings, exporting(receiver))
    for client in CLIENTS.values():
        client(running.port, files, tls, tmp_path)
    assert running.stop() == 0
    assert [message.below_received for message in upstream.messages] == [DOTS] * len(CLIENTS)
    assert all(b" with ESMTPSA " in message.received_field for message in upstream.messages)
    spans = [span for span in receiver.spans if span.name == "smtp.connection"]
    opening = ["New", "Active", "StartTLS", "Active"] if tls == "starttls" else ["New", "StartTLS", "Active"]
    assert [story(span) for span in spans] == [
        [*opening, "Auth", "Active", "Data", "Active", "Idle", "Closed"] for _ in CLIENTS
    ]
    assert all(PASSWORD.encode() not in body for body in receiver.bodies)
    assert PASSWORD not in running.stderr


def test_a_wrong_password_is_refused_and_no_mail_goes_through(
    files: Files, upstream: CapturingUpstream, start: StartGateway
) -> None:
    running = start({**files.listener("starttls"), "upstream.url": upstream.url})
    with smtplib.SMTP("localhost", running.port, timeout=15) as client:
        client.starttls(context=files.client_context())
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("app", "wrong")
        assert client.docmd("MAIL FROM:<a@client.example>")[0] == 530
    # The gateway has asked what the upstream offers, and said nothing of a mail.
    assert [command for one in upstream.connections for command in one.commands if b"EHLO" not in command] == []


PROXY_HEADERS: Final = {
    "version 1": b"PROXY TCP4 192.0.2.9 198.51.100.1 40000 25\r\n",
    "version 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x09\xc6\x33\x64\x01\x9c\x40\x00\x19",
}


@pytest.mark.parametrize("uses_uvloop", [True, False], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("version", PROXY_HEADERS)
def test_a_proxy_header_names_the_client(
    version: str, uses_uvloop: bool, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    settings = {
        "upstream.url": upstream.url,
        "upstream.trace_context": "strip",
        "listener.proxy_protocol_from": ["127.0.0.0/8"],
        "listener.allow": ["192.0.2.0/24"],
    }
    running = start(settings, exporting(receiver), uses_uvloop=uses_uvloop)
    with socket.create_connection(("127.0.0.1", running.port), 15) as connected:
        connected.sendall(PROXY_HEADERS[version])
        with smtplib.SMTP(timeout=15) as client:
            client.sock = connected
            assert client.getreply()[0] == 220
            client.sendmail(SENDER, [RECIPIENT], DOTS)
    span = connection_of(receiver, 40000)
    assert span.attributes["client.address"] == "192.0.2.9"
    assert span.attributes["network.peer.address"] == "127.0.0.1"
    (message,) = upstream.messages
    assert b"[192.0.2.9]" in message.received_field


@pytest.mark.parametrize("uses_uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_a_proxy_header_and_a_client_hello_in_one_segment(
    uses_uvloop: bool, files: Files, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    settings = {
        **files.listener("implicit", "optional"),
        "upstream.url": upstream.url,
        "listener.proxy_protocol_from": ["127.0.0.0/8"],
        "listener.allow": ["192.0.2.0/24"],
    }
    running = start(settings, exporting(receiver), uses_uvloop=uses_uvloop)
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = files.client_context().wrap_bio(received, sent, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    with socket.create_connection(("127.0.0.1", running.port), 15) as connected:
        connected.sendall(PROXY_HEADERS["version 1"] + sent.read())
        greeting = b""
        while not greeting:
            received.write(connected.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                session.do_handshake()
                connected.sendall(sent.read())
                greeting = session.read(1024)
        assert greeting.startswith(b"220 ")
    assert story(connection_of(receiver, 40000)) == ["New", "StartTLS", "Active", "Closed"]


@pytest.mark.parametrize(
    "header",
    [b"EHLO client.example\r\n", b"PROXY TCP4 nonsense\r\n", b"GET / HTTP/1.1\r\n\r\n"],
    ids=["none", "nonsense", "HTTP"],
)
def test_without_its_proxy_header_a_connection_is_refused(
    header: bytes, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    settings = {"upstream.url": upstream.url, "listener.proxy_protocol_from": ["127.0.0.0/8"]}
    running = start(settings, exporting(receiver))
    with socket.create_connection(("127.0.0.1", running.port), 15) as connected:
        client_port = connected.getsockname()[1]
        connected.sendall(header)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connected.recv(1024):
                said += data
    assert said.startswith((b"421 ", b"554 "))
    states = [event.attributes["smtp.state"] for event in connection_of(receiver, client_port).events]
    assert states == ["New", "Error", "Closed"]


@pytest.fixture
def tls_upstream(files: Files, request: pytest.FixtureRequest) -> Iterator[CapturingUpstream]:
    scheme, name = request.param
    with CapturingUpstream(tls=files.server_context(name), is_implicit_tls=scheme == "smtps") as capturing:
        yield capturing
    assert capturing.violations == []


@pytest.mark.parametrize(
    ("tls_upstream", "scheme"),
    [
        (("smtp+starttls", "localhost"), "smtp+starttls"),
        (("smtps", "localhost"), "smtps"),
    ],
    indirect=["tls_upstream"],
    ids=["STARTTLS", "implicit"],
)
def test_mail_goes_on_over_verified_tls(
    tls_upstream: CapturingUpstream, scheme: str, files: Files, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    settings = {"upstream.url": f"{scheme}://localhost:{tls_upstream.port}", "upstream.ca_file": files.ca_file}
    client = connect(start(settings).port)
    client.opens_content()
    assert client.asks("Subject: x\r\n\r\n.").startswith("250 ")
    assert tls_upstream.connections[-1].is_tls
    assert len(tls_upstream.messages) == 1


@pytest.mark.parametrize("trusts", [True, False], ids=["another name", "an unknown authority"])
@pytest.mark.parametrize(
    ("tls_upstream", "scheme"),
    [
        (("smtp+starttls", "other.example"), "smtp+starttls"),
        (("smtps", "other.example"), "smtps"),
    ],
    indirect=["tls_upstream"],
    ids=["STARTTLS", "implicit"],
)
def test_mail_does_not_go_on_over_tls_that_is_not_verified(
    tls_upstream: CapturingUpstream,
    scheme: str,
    trusts: bool,
    files: Files,
    start: StartGateway,
    connect: Callable[[int], Client],
) -> None:
    settings = {"upstream.url": f"{scheme}://localhost:{tls_upstream.port}"}
    client = connect(start({**settings, "upstream.ca_file": files.ca_file} if trusts else settings).port)
    client.opens()
    assert client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>").startswith("451 4.7.5 ")
    assert tls_upstream.messages == []
    assert all(b"MAIL" not in octets for connection in tls_upstream.connections for _, octets in connection.wire)
