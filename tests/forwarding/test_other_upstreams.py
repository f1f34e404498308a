"""Upstreams that others wrote: aiosmtpd, and Postfix's smtp-sink with the faults that it can play."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.handlers import Message as MessageHandler
from aiosmtpd.smtp import SMTP

from otel_smtp.forwarding.settings import Strategy, UpstreamSettings
from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from tests.support.relaying import BOB, CAROL, PATIENT, both_strategies, relay, relaying
from tests.support.tools import tool
from tests.support.waiting import until


class Keeping(MessageHandler):
    """Keeps what aiosmtpd took."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Any] = []

    def handle_message(self, message: Message) -> None:
        self.messages.append(message)


@both_strategies
async def test_aiosmtpd_takes_our_mail(strategy: Strategy) -> None:
    handler = Keeping()
    server = await asyncio.get_running_loop().create_server(lambda: SMTP(handler, enable_SMTPUTF8=True), "127.0.0.1", 0)
    settings = UpstreamSettings("aiosmtpd", "127.0.0.1", server.sockets[0].getsockname()[1], timeouts=PATIENT)
    async with relaying(settings, strategy=strategy) as forwarder:
        for _ in range(3):
            relayed = await relay(forwarder, BOB, CAROL)
            assert relayed.told.code == 250
        assert forwarder.snapshot()[0].pool.idle == 1
    server.close()
    assert len(handler.messages) == 3
    message = handler.messages[-1]
    assert message["X-RcptTo"] == "bob@example.net, carol@example.net"
    assert message.get_payload() == "hello\r\n.dot\r\n..\r\n"


@asynccontextmanager
async def smtp_sink(directory: Path, *arguments: str) -> AsyncIterator[UpstreamSettings]:
    path = str(directory / "sink")
    # Started as root it asks for a user to become; that user must be able to write here.
    command = [tool("smtp-sink"), *arguments, *(("-u", "root") if os.geteuid() == 0 else ())]
    command += ["-D", str(directory / "dump"), f"unix:{path}", "100"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
            return True
        return False

    try:
        await until(listens)
        yield UpstreamSettings("sink", path, None, is_lmtp="-L" in arguments, timeouts=PATIENT)
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize(
    "arguments",
    [(), ("-p",), ("-e",), ("-P",), ("-E", "-8", "-N"), ("-L",)],
    ids=["plain", "no pipelining", "helo", "pix", "bare", "lmtp"],
)
@both_strategies
async def test_smtp_sink_takes_our_mail(strategy: Strategy, arguments: Sequence[str], tmp_path: Path) -> None:
    async with smtp_sink(tmp_path, *arguments) as settings, relaying(settings, strategy=strategy) as forwarder:
        for _ in range(3):
            assert (await relay(forwarder, BOB, CAROL)).told.code == 250
        assert forwarder.snapshot()[0].pool.idle == 1
    dump = (tmp_path / "dump").read_text()
    assert dump.count("X-Rcpt-Args: <bob@example.net>") == 3
    assert dump.count("\nhello\n.dot\n..\n") == 3


COMMANDS = ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "."]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", ["-q", "-Q", "-r", "-f"])
@both_strategies
async def test_smtp_sinks_faults(strategy: Strategy, fault: str, command: str, tmp_path: Path) -> None:
    # HELO too, as EHLO that is refused falls back to it.
    named = "EHLO,HELO" if command == "EHLO" else command
    async with smtp_sink(tmp_path, fault, named) as settings, relaying(settings, strategy=strategy) as forwarder:
        relayed = await relay(forwarder)
        if fault == "-f" and command not in ("CONNECT", "EHLO"):
            assert relayed.told.wire == b"500 5.3.0 Error: command failed\r\n"
            assert relayed.seen.outcomes == [("sink", Outcome.REFUSED)]
        elif fault == "-r" and command not in ("CONNECT", "EHLO"):
            assert relayed.told.wire == b"450 4.3.0 Error: command failed\r\n"
        elif fault == "-q" and command == ".":
            assert relayed.told is replies.OUTCOME_UNKNOWN
        else:
            assert relayed.told.error_type is replies.ErrorType.UPSTREAM_UNAVAILABLE
            assert relayed.told.text != replies.UPSTREAM_UNAVAILABLE.text  # it was reached
        assert forwarder.snapshot()[0].pool.busy == 0


@both_strategies
async def test_smtp_sinks_refusal_before_the_content(strategy: Strategy, tmp_path: Path) -> None:
    """354, then 550 and a closed connection without reading any content."""
    async with smtp_sink(tmp_path, "-A", "0") as settings, relaying(settings, strategy=strategy) as forwarder:
        relayed = await relay(forwarder)
        assert not relayed.told.is_positive
