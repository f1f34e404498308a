"""What one mail costs, counted in calls: a figure that does not depend on the machine.

The driver is the far end of a connection in memory, so that nothing but the relay is counted.
"""

import asyncio
import gc
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import otel_smtp
from otel_smtp.forwarding import opening
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.delivery import Delivery
from otel_smtp.forwarding.settings import PoolLimits, Strategy, UpstreamSettings
from otel_smtp.forwarding.transaction import Transaction
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.net import Sweep
from otel_smtp.observing import Observer, TransactionRecord
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply
from tests.support.deliveries import connection_record
from tests.support.fake_stream import FakeStream

PACKAGE = str(Path(otel_smtp.__file__).parent)
COUNTED = (f"{PACKAGE}/forwarding/", f"{PACKAGE}/smtp/", f"{PACKAGE}/observing/")  # and not the network's share
EHLO = b"250-up\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-SIZE 10000000\r\n250 8BITMIME\r\n"
HEADER = b"Received: from me by gw; now\r\nFrom: <a@example.com>\r\nSubject: x\r\nMessage-ID: <1@example.com>\r\n"
BODY = b"\r\n" + (b"0123456789" * 7 + b"012345\r\n") * 12
MAIL = Mail("a@example.com", size=1024)
WARM_UP = 50
MAILS = 100


class Upstream(FakeStream):
    """Takes every mail; its answers come in the next turn of the loop."""

    def far_received(self, data: bytes) -> None:
        if data.startswith(b"EHLO"):
            self.answer(EHLO)
        elif data.startswith(b"MAIL"):
            self.answer(b"250 2.0.0 Ok\r\n" * (2 + (b"BDAT" in data)))
        elif data.startswith(b"BDAT"):
            self.answer(b"250 2.0.0 Ok\r\n")

    def answer(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self.feed, data)


class Calls:
    """Counts the calls of this thread, Python's own functions by name."""

    def __init__(self) -> None:
        self.python: Counter[str] = Counter()
        self.c = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if not path.startswith(COUNTED):
            return
        if event == "call":
            self.python[f"{path.rpartition('otel_smtp/')[2]}:{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            self.c += 1

    def __enter__(self) -> "Calls":
        assert threading.current_thread() is threading.main_thread()
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def relaying_in_memory(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> UpstreamForwarder:
    """A forwarder to one `Upstream`."""

    async def connect(*_: object) -> FakeStream:
        stream = Upstream()
        stream.answer(b"220 up\r\n")
        return stream

    monkeypatch.setattr(opening, "_connect", connect)
    settings = UpstreamSettings("up", "192.0.2.1", limits=PoolLimits(messages=10_000))
    return UpstreamForwarder([settings], strategy=strategy, hostname="gw.example", observer=Observer(), sweep=Sweep())


def records(number: int) -> list[TransactionRecord]:
    """What a session makes for its mails."""
    client = connection_record()
    return [TransactionRecord(MAIL, 1, client, client.opened_ns, client.wall_offset_ns) for _ in range(number)]


async def relay_many(forwarder: UpstreamForwarder, records: list[TransactionRecord]) -> None:
    """One mail after the other, as a session gives them: RCPT in one turn, the content in a later one."""
    recipients = [Recipient("b@example.net")]
    all_done = asyncio.get_running_loop().create_future()

    def begin() -> None:
        transaction = forwarder.begin(MAIL, records.pop())

        def recipients_answered(answers: Any) -> None:
            assert answers[0].code == 250
            asyncio.get_running_loop().call_soon(content)

        def content() -> None:
            transaction.message(HEADER, BODY, message_answered)

        def message_answered(reply: Reply, _: Any) -> None:
            assert reply.code == 250
            if records:
                asyncio.get_running_loop().call_soon(begin)
            else:
                all_done.set_result(None)

        transaction.recipients(recipients, recipients_answered)

    begin()
    await all_done


@pytest.mark.parametrize(
    ("strategy", "most_python", "most_c"), [(Strategy.TRANSPARENT, 46, 51), (Strategy.BUFFERED, 41, 50)]
)
async def test_calls_of_a_mail_on_a_kept_connection(
    strategy: Strategy, most_python: int, most_c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarder = relaying_in_memory(strategy, monkeypatch)
    await relay_many(forwarder, records(WARM_UP))
    tasks = len(asyncio.all_tasks())
    given = records(MAILS)
    with Calls() as calls:
        await relay_many(forwarder, given)
    assert len(asyncio.all_tasks()) == tasks
    for name, count in calls.python.most_common():
        print(f"{count / MAILS:6.2f} {name}")
    python, c = calls.python.total() / MAILS, calls.c / MAILS
    print(f"{strategy}: {python:.1f} calls of Python functions, {c:.1f} of C functions, each mail")
    await forwarder.close()
    assert python <= most_python
    assert c <= most_c


async def test_nothing_survives_a_mail_but_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector's help, which costs most where mail comes fastest."""
    forwarder = relaying_in_memory(Strategy.TRANSPARENT, monkeypatch)
    await relay_many(forwarder, records(WARM_UP))
    gc.collect()
    gc.disable()
    try:
        await relay_many(forwarder, records(MAILS))
        left = [one for one in gc.get_objects() if isinstance(one, Delivery | Content | Transaction)]
    finally:
        gc.enable()
    assert left == []
    await forwarder.close()
