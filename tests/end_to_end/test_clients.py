"""Other people's clients and upstreams: what one hands in, the other gets, to the octet, below one Received field."""

import asyncio
import contextlib
import json
import smtplib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import aiosmtplib
import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.messages import DOTS, EIGHT_BIT, MESSAGES
from tests.support import nodemailer
from tests.support.capture import CapturingUpstream
from tests.support.process import GatewayProcess, gateway, until
from tests.support.tools import run, smtp_sink, swaks

SENDER: Final = "a@client.example"
RECIPIENTS: Final = ["b@there.example", "c@there.example"]
STRATEGIES: Final = ("transparent", "buffered")


def by_smtplib(port: int, content: bytes, directory: Path) -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
        assert client.sendmail(SENDER, RECIPIENTS, content) == {}


def by_aiosmtplib(port: int, content: bytes, directory: Path) -> None:
    refused, _ = asyncio.run(
        aiosmtplib.send(content, sender=SENDER, recipients=RECIPIENTS, hostname="127.0.0.1", port=port, timeout=30)
    )
    assert refused == {}


def by_swaks(port: int, content: bytes, directory: Path) -> None:
    # It sends CRLF for LF, and one more at the end.
    body = content.replace(b"\r\n", b"\n").removesuffix(b"\n")
    done = swaks(port, "--from", SENDER, "--to", ",".join(RECIPIENTS), "--suppress-data", body=body)
    assert done.returncode == 0, done.stdout + done.stderr


def by_curl(port: int, content: bytes, directory: Path) -> None:
    file = directory / "message.eml"
    file.write_bytes(content)
    recipients = [word for recipient in RECIPIENTS for word in ("--mail-rcpt", recipient)]
    url = f"smtp://127.0.0.1:{port}/client.example"
    done = run("curl", "--silent", "--show-error", url, "--mail-from", SENDER, *recipients, "--upload-file", str(file))
    assert done.returncode == 0, done.stderr


def by_msmtp(port: int, content: bytes, directory: Path) -> None:
    options = ("--file=/dev/null", "--host=127.0.0.1", f"--port={port}", f"--from={SENDER}")
    done = run("msmtp", *options, *RECIPIENTS, stdin=content.replace(b"\r\n", b"\n"))
    assert done.returncode == 0, done.stderr


def by_nodemailer(port: int, content: bytes, directory: Path) -> None:
    file = directory / "message.eml"
    file.write_bytes(content)
    done = nodemailer.send({"host": "127.0.0.1", "port": port}, SENDER, RECIPIENTS, file)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted"] == RECIPIENTS


CLIENTS: Final[dict[str, Callable[[int, bytes, Path], None]]] = {
    "smtplib": by_smtplib,
    "aiosmtplib": by_aiosmtplib,
    "swaks": by_swaks,
    "curl": by_curl,
    "msmtp": by_msmtp,
    "nodemailer": by_nodemailer,
}


class Site:
    """A gateway before a capturing upstream."""

    def __init__(self, running: GatewayProcess, upstream: CapturingUpstream) -> None:
        self.port = running.port
        self.upstream = upstream


VARIANTS: Final = [(strategy, loop) for strategy in STRATEGIES for loop in ("uvloop", "asyncio")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(variant, id=" on ".join(variant), marks=pytest.mark.xdist_group(f"clients {variant}"))
        for variant in VARIANTS
    ],
)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    strategy, loop = request.param
    with CapturingUpstream() as upstream:
        settings = {"upstream.url": upstream.url, "upstream.trace_context": "strip", "delivery.strategy": strategy}
        directory = tmp_path_factory.mktemp("gateway")
        with gateway(settings, directory, uses_uvloop=loop == "uvloop") as running:
            yield Site(running, upstream)
            assert running.stop() == 0
    assert upstream.violations == []


@pytest.mark.long
@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_client_sends_arrives_to_the_octet(site: Site, client: str, message: str, tmp_path: Path) -> None:
    before = len(site.upstream.messages)
    CLIENTS[client](site.port, MESSAGES[message], tmp_path)
    (arrived,) = site.upstream.messages[before:]
    assert arrived.reverse_path == SENDER
    assert list(arrived.recipients) == RECIPIENTS
    assert arrived.received_field.startswith(b"Received: from ")
    assert b"gateway.example" in arrived.received_field
    assert arrived.below_received == MESSAGES[message]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_postfix_s_sink_gets_what_was_sent(strategy: str, start: StartGateway, tmp_path: Path) -> None:
    with smtp_sink(tmp_path) as sink:
        running = start({"upstream.url": sink.url, "upstream.trace_context": "strip", "delivery.strategy": strategy})
        for content in (DOTS, EIGHT_BIT):
            by_smtplib(running.port, content, tmp_path)
        contents = until(lambda: sink.contents() if len(sink.contents()) == 2 else None, "two dumps")
        assert running.stop() == 0
    below_ours = sorted(content.partition(b"\nFrom: ")[2] for content in contents)
    assert below_ours == sorted(
        sent.replace(b"\r\n", b"\n").removeprefix(b"From: ") + b"\n" for sent in (DOTS, EIGHT_BIT)
    )


# What smtp-sink is told, where the client hears of it, and what.
FAULTS: Final = [
    (("-q", "connect"), "rcpt", "451 4.4.1"),
    (("-q", "ehlo"), "rcpt", "451 4.4.1"),
    (("-r", "mail"), "rcpt", "450 4.3.0"),
    (("-f", "mail"), "rcpt", "500 5.3.0"),
    (("-r", "rcpt"), "rcpt", "450 4.3.0"),
    (("-f", "rcpt"), "rcpt", "500 5.3.0"),
    (("-r", "data"), "content", "450 4.3.0"),
    (("-f", "."), "content", "500 5.3.0"),
    (("-r", "."), "content", "450 4.3.0"),
    (("-q", "."), "content", "451 4.4.2"),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("options", "where", "expected"), FAULTS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)
def test_the_sink_s_faults_reach_the_client(
    options: tuple[str, ...],
    where: str,
    expected: str,
    strategy: str,
    start: StartGateway,
    connect: Callable[[int], Client],
    tmp_path: Path,
) -> None:
    with smtp_sink(tmp_path, *options) as sink:
        running = start({"upstream.url": sink.url, "delivery.strategy": strategy})
        client = connect(running.port)
        client.opens()
        client.asks("MAIL FROM:<a@client.example>")
        reply = client.asks("RCPT TO:<b@there.example>")
        # The buffered strategy asks the upstream nothing before the content is complete.
        if where == "content" or strategy == "buffered":
            assert reply.startswith("250 ")
            client.asks("DATA")
            reply = client.asks("Subject: x\r\n\r\nHello\r\n.")
        assert reply.startswith(expected)
        assert client.asks("QUIT").startswith("221 ")


class Keeping:
    """A handler of aiosmtpd's that keeps content."""

    def __init__(self) -> None:
        self.contents: list[bytes] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.original_content, bytes)
        self.contents.append(envelope.original_content)
        return "250 2.0.0 Kept"


@contextlib.contextmanager
def aiosmtpd_server(keeping: Keeping) -> Iterator[int]:
    """aiosmtpd in a thread, on a port of the kernel's choice, which its own controller cannot do."""
    loop = asyncio.new_event_loop()
    serving = loop.run_until_complete(
        loop.create_server(lambda: SMTP(keeping, enable_SMTPUTF8=True, loop=loop), "127.0.0.1", 0)
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield serving.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(serving.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_aiosmtpd_gets_what_was_sent(strategy: str, start: StartGateway, tmp_path: Path) -> None:
    keeping = Keeping()
    with aiosmtpd_server(keeping) as port:
        running = start(
            {
                "upstream.url": f"smtp://127.0.0.1:{port}",
                "upstream.trace_context": "strip",
                "delivery.strategy": strategy,
            }
        )
        by_smtplib(running.port, EIGHT_BIT, tmp_path)
        by_smtplib(running.port, DOTS, tmp_path)
        assert running.stop() == 0
    assert [content[content.index(b"\r\nFrom: ") + 2 :] for content in keeping.contents] == [EIGHT_BIT, DOTS]
