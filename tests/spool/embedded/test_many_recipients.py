"""Results about thousands of recipients, each with a long reply: the size of a step is bounded."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from otel_smtp.forwarding.base import Relay
from otel_smtp.smtp.replies import EnhancedStatus, Reply
from otel_smtp.spool.dsn.notices import Notices
from otel_smtp.spool.dsn.report import NoticeKind
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.messages import End, Verdict, reply_room
from otel_smtp.spool.store import Notice
from tests.spool.messages import HEADER, leased, message, queued

RECIPIENTS = 4500
LONG = ("said " * 300,) * 3


class SevenBitRelay:
    def keeps_8bit(self) -> bool:
        return False


@pytest.mark.parametrize("end", [End.FAILED, None], ids=["refused", "deferred"])
async def test_a_result_about_thousands_of_recipients_is_recorded(tmp_path: Path, end: End | None) -> None:
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0)
    await store.open()
    try:
        await queued(store, message(*[f"user{number}@example.net" for number in range(RECIPIENTS)]))
        (lease,) = await leased(store)
        reply = Reply(550 if end else 450, EnhancedStatus(5 if end else 4, 1, 1), LONG)
        told: Sequence[Notice] = ()
        if end is not None:
            notices = Notices(store, cast(Relay, SevenBitRelay()), policy="mail", hostname="gw.example")
            told = await notices.of(NoticeKind.FAILED, lease, [(one, reply) for one in lease.recipients])
            ((_, content),) = told
            assert content.count(b"Diagnostic-Code: smtp; 550 5.1.1 said said") == RECIPIENTS
        await store.finish(lease, [Verdict(one.number, end, reply) for one in lease.recipients], notices=told)
        (left,) = await store.page("", 10)
        assert len(left.recipients) == (1 if told else RECIPIENTS)
        assert all(last.startswith("450-4.1.1 said said") for _, _, last in left.recipients if not told)
    finally:
        await store.close()


async def test_a_long_reply_about_one_recipient_is_kept_but_for_its_end(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0)
    await store.open()
    try:
        await queued(store, message(header_octets=len(HEADER)))
        (lease,) = await leased(store)
        reply = Reply(450, EnhancedStatus(4, 1, 1), LONG)
        await store.finish(lease, [Verdict(0, None, reply)])
        ((_, _, last),) = (await store.page("", 10))[0].recipients
        assert last == str(reply)[:1000]
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("recipients", "characters"), [(0, 1000), (1, 1000), (1000, 1000), (4000, 250), (10_000, 100), (1_000_000, 100)]
)
def test_the_room_for_a_reply_shrinks_with_the_number_of_recipients(recipients: int, characters: int) -> None:
    assert reply_room(recipients) == characters
