"""Clients that visit the gateway, each to show one thing, over real sockets and line by line."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Final

from otel_smtp.commands.demo.upstream import REFUSED_ADDRESS
from otel_smtp.observing import Endpoint

# All of it happens on this machine; anything slower has failed.
_PATIENCE_SECONDS: Final = 20.0


class VisitFailed(Exception):
    """The gateway did not answer as the visit expects; the text has its answer."""


class Visitor:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def hear(self, *expected: int) -> int:
        """Read one reply.

        Raises:
            VisitFailed: its code is not among the expected ones.
        """
        async with asyncio.timeout(_PATIENCE_SECONDS):
            line = await self._reader.readline()
            while line[3:4] == b"-":
                line = await self._reader.readline()
        code = int(line[:3]) if line[:3].isdigit() else 0
        if code not in expected:
            said = line.decode("utf-8", "replace").strip() or "nothing"
            raise VisitFailed(f"the gateway answered {said!r}, not {' or '.join(map(str, expected))}")
        return code

    async def say(self, line: str, *expected: int) -> int:
        """Send a line and read its reply."""
        self._writer.write(line.encode("ascii") + b"\r\n")
        await self._writer.drain()
        return await self.hear(*expected)

    async def content(self, message: bytes, *expected: int) -> int:
        """Send content with its end, and read the final reply."""
        stuffed = message.replace(b"\r\n.", b"\r\n..")
        self._writer.write(stuffed + b".\r\n")
        await self._writer.drain()
        return await self.hear(*expected)

    async def some_content(self, part: bytes) -> None:
        """Send content without its end."""
        self._writer.write(part)
        await self._writer.drain()

    async def quit(self) -> None:
        """End the session with QUIT."""
        await self.say("QUIT", 221)

    def vanish(self) -> None:
        """Close the connection without QUIT."""
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(gateway: Endpoint) -> AsyncIterator[Visitor]:
    """A visitor that has been greeted; its connection is closed at the end."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        reader, writer = await asyncio.open_connection(gateway.host, gateway.port)
    try:
        visitor = Visitor(reader, writer)
        await visitor.hear(220)
        yield visitor
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _message(subject: str, *, attachment_octets: int = 0) -> bytes:
    message = EmailMessage()
    message["From"], message["To"] = "Shop <orders@shop.example>", "Alice <alice@example.com>"
    message["Subject"], message["Date"] = subject, format_datetime(datetime.now(UTC))
    message["Message-ID"] = make_msgid(domain="shop.example")
    message.set_content("Thank you for your order.\n")
    if attachment_octets:
        # Any octets do; base64 makes four of each three.
        content = bytes(range(256)) * (attachment_octets // 256)
        message.add_attachment(content, maintype="image", subtype="png", filename="receipt.png")
    return message.as_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


async def accepted(gateway: Endpoint) -> None:
    """A mail with an attachment, relayed."""
    async with connected(gateway) as visitor:
        await visitor.say("EHLO app.shop.example", 250)
        await visitor.say("MAIL FROM:<orders@shop.example> BODY=8BITMIME", 250)
        await visitor.say("RCPT TO:<alice@example.com>", 250)
        await visitor.say("DATA", 354)
        await visitor.content(_message("Your receipt", attachment_octets=200_000), 250)
        await visitor.quit()


async def one_of_two_refused(gateway: Endpoint) -> None:
    """Two recipients, of whom the upstream knows one."""
    async with connected(gateway) as visitor:
        await visitor.say("EHLO app.shop.example", 250)
        await visitor.say("MAIL FROM:<orders@shop.example>", 250)
        await visitor.say("RCPT TO:<bob@example.net>", 250)
        await visitor.say(f"RCPT TO:<{REFUSED_ADDRESS}>", 550)
        await visitor.say("DATA", 354)
        await visitor.content(_message("Your order has shipped"), 250)
        await visitor.quit()


async def refused(gateway: Endpoint) -> None:
    """A mail that the upstream refuses."""
    async with connected(gateway) as visitor:
        await visitor.say("EHLO app.shop.example", 250)
        await visitor.say("MAIL FROM:<orders@shop.example>", 250)
        await visitor.say(f"RCPT TO:<{REFUSED_ADDRESS}>", 550)
        await visitor.quit()


async def vanished(gateway: Endpoint) -> None:
    """A client that vanishes in the middle of its message."""
    async with connected(gateway) as visitor:
        await visitor.say("EHLO app.shop.example", 250)
        await visitor.say("MAIL FROM:<orders@shop.example>", 250)
        await visitor.say("RCPT TO:<alice@example.com>", 250)
        await visitor.say("DATA", 354)
        await visitor.some_content(_message("You will never read this")[:-20])
        visitor.vanish()


@dataclass(frozen=True, slots=True)
class Visit:
    """One thing to show."""

    title: str
    pay: Callable[[Endpoint], Awaitable[None]]


VISITS: Final = (
    Visit("A mail with an attachment, relayed", accepted),
    Visit("Two recipients, of whom the upstream knows one", one_of_two_refused),
    Visit("A recipient whom the upstream refuses", refused),
    Visit("A client that vanishes in the middle of its message", vanished),
)
