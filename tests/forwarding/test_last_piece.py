"""Large content by BDAT: with its last octet the message has ended, whatever becomes of the connection then."""

import asyncio

import pytest

from otel_smtp.forwarding import opening
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from tests.support.deliveries import MAIL, Awaited, RecordedTransaction
from tests.support.fake_stream import FakeStream
from tests.support.relaying import BOB, HEADER, relaying

BODY = [b"\r\n", *[(b"x" * 76 + b"\r\n") * 200] * 50]  # three pieces of the file
WHOLE = len(HEADER) + sum(map(len, BODY))


class Filled(FakeStream):
    """An upstream whose side of the network is full after `room` octets of content, and which then goes away."""

    room = 0

    def far_received(self, data: bytes) -> None:
        super().far_received(data)
        turn = asyncio.get_running_loop()
        if data.startswith(b"EHLO"):
            turn.call_soon(self.feed, b"250-up\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
        elif data.startswith(b"MAIL"):
            turn.call_soon(self.feed, b"250 ok\r\n" * 2)
        elif b"BDAT" in self.sent and len(self.sent.partition(b" LAST\r\n")[2]) >= self.room:
            self.stop_taking()
            turn.call_soon(self.lose)


@pytest.mark.parametrize(
    ("room", "told", "outcome", "connections"),
    [
        (WHOLE, replies.OUTCOME_UNKNOWN, Outcome.UNKNOWN, 1),
        (WHOLE - 1, replies.OUTCOME_UNKNOWN, Outcome.UNKNOWN, 1),  # the last piece is one write
        (WHOLE // 2, replies.UPSTREAM_LOST, Outcome.DEFERRED, 2),
        (0, replies.UPSTREAM_LOST, Outcome.DEFERRED, 2),
    ],
)
@pytest.mark.parametrize("memory_limit", [10, 10_000_000], ids=["file", "memory"])
async def test_a_connection_lost_in_large_content(
    room: int,
    told: replies.Reply,
    outcome: Outcome,
    connections: int,
    memory_limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Filled] = []

    async def connect(*_: object) -> Filled:
        stream = Filled()
        stream.room = room
        opened.append(stream)
        stream.feed(b"220 up\r\n")
        return stream

    monkeypatch.setattr(opening, "_connect", connect)
    async with relaying(UpstreamSettings("up", "192.0.2.1"), memory_limit_octets=memory_limit) as forwarder:
        transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction())
        await transaction.recipients([BOB])
        assert await transaction.content([HEADER, *BODY]) is told
        assert seen.outcomes == [("up", outcome)]
        assert len(opened) == connections
        assert forwarder.snapshot()[0].pool.busy == 0
