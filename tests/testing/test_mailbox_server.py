"""The server in front of the mailbox, spoken to in raw octets, in any pieces."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

import pytest

from otel_smtp.testing import Mailbox
from otel_smtp.testing.mailbox_server import MailboxServer

ENVELOPE: Final = b"MAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\n"


class Client:
    """Writes octets in pieces, each received by itself, and reads reply codes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def write(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            # Two turns of the loop bring a piece to the server before the next is written.
            for _ in range(4):
                await asyncio.sleep(0)

    async def codes(self, count: int) -> list[int]:
        """The codes of the next replies."""
        codes: list[int] = []
        while len(codes) < count:
            line = await asyncio.wait_for(self._reader.readline(), 10)
            if line[3:4] != b"-":
                codes.append(int(line[:3] or b"0"))
        return codes

    async def is_closed(self) -> bool:
        return await asyncio.wait_for(self._reader.read(), 10) == b""


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


Connect = Callable[[], Awaitable[Client]]


@pytest.fixture
async def connect(mailbox: Mailbox) -> AsyncIterator[Connect]:
    """Connects clients that are closed with the test."""
    server = await asyncio.get_running_loop().create_server(lambda: MailboxServer(mailbox), "127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []

    async def connect_one() -> Client:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        writers.append(writer)
        connected = Client(reader, writer)
        assert await connected.codes(1) == [220]
        return connected

    yield connect_one
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    server.close()


@pytest.fixture
async def client(connect: Connect) -> Client:
    return await connect()


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ([b"..first\r\n\r\n...\r\n.\r\n"], b".first\r\n\r\n..\r\n"),
        ([b".\r\n"], b""),
        ([b"x\r", b"\n.", b"\r\n"], b"x\r\n"),
        ([b"x\r\n", b".\r", b"\n"], b"x\r\n"),
        ([b".", b"\r", b"\n"], b""),
        ([bytes([octet]) for octet in b"a\r\n..b\r\n\r\n.\r\n"], b"a\r\n.b\r\n\r\n"),
    ],
)
async def test_content_is_kept_without_its_dots(
    sent: Sequence[bytes], kept: bytes, client: Client, mailbox: Mailbox
) -> None:
    for _ in range(2):  # nothing of the first is left for the second
        await client.write(ENVELOPE, *sent)
        assert await client.codes(4) == [250, 250, 354, 250]
    assert [mail.content for mail in mailbox.mails] == [kept, kept]


async def test_a_small_message_after_a_large_one(client: Client, mailbox: Mailbox) -> None:
    await client.write(ENVELOPE, *[b"x" * 70 + b"\r\n"] * 3, b".\r\n")
    assert await client.codes(4) == [250, 250, 354, 250]
    await client.write(ENVELOPE + b"y\r\n.\r\n")
    assert await client.codes(4) == [250, 250, 354, 250]
    assert [len(mail.content) for mail in mailbox.mails] == [3 * 72, 3]


async def test_replies_stay_in_order_while_one_is_slow(client: Client, mailbox: Mailbox) -> None:
    mailbox.slow(0.05, times=1)
    await client.write(ENVELOPE + b"x\r\n.\r\nNOOP\r\n" + ENVELOPE + b"y\r\n.\r\nEXPN x\r\nQUIT\r\n")
    assert await client.codes(10) == [250, 250, 354, 250, 250, 250, 250, 354, 250, 502]
    assert await client.codes(1) == [221]
    assert await client.is_closed()
    assert [mail.content for mail in mailbox.mails] == [b"x\r\n", b"y\r\n"]


async def test_a_slow_reply_to_a_client_that_has_left_is_forgotten(
    client: Client, connect: Connect, mailbox: Mailbox
) -> None:
    mailbox.slow(0.05)
    await client.write(ENVELOPE + b"x\r\n.\r\n")
    assert await client.codes(3) == [250, 250, 354]
    client.writer.transport.abort()
    other = await connect()
    await other.write(ENVELOPE + b"y\r\n.\r\n")
    # Its reply comes after the one that has nowhere to go.
    assert await other.codes(4) == [250, 250, 354, 250]
    assert len(mailbox.mails) == 2


async def test_what_is_out_of_order_is_refused(client: Client, mailbox: Mailbox) -> None:
    mailbox.refuse("b@")
    await client.write(b"RCPT TO:<b@b.example>\r\nDATA\r\nHELO x\r\nMAIL FROM:<>\r\nMAIL FROM:<>\r\nDATA\r\n")
    assert await client.codes(6) == [503, 503, 250, 250, 503, 503]
    await client.write(b"RCPT TO:<b@b.example>\r\nDATA\r\nRSET\r\nMAIL nonsense\r\nEHLO x\r\n")
    assert await client.codes(5) == [550, 503, 250, 503, 250]


async def test_a_dropped_connection_gives_no_reply(client: Client, mailbox: Mailbox) -> None:
    mailbox.drop_after_dot(keep=True)
    await client.write(ENVELOPE + b"x\r\n.\r\nNOOP\r\n")
    assert await client.codes(3) == [250, 250, 354]
    assert await client.is_closed()
    assert len(mailbox.mails) == 1
