"""Whose mail is attempted next, where somebody has more than a sample can show."""

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.waiting import SAMPLE
from otel_smtp.spool.messages import End, Verdict
from tests.spool.messages import leased, message, queued

BUSY, RARE = "busy@example.com", [f"rare-{number}@example.com" for number in range(5)]
LATER = (Verdict(0, None, replies.UPSTREAM_UNAVAILABLE),)
DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(path, least_free_octets=0, segment_octets=64 * 1024)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def fill(path: Path, senders: Sequence[str], *, was_tried: bool) -> None:
    """Queue a mail of each of these senders; what is queued lies in the index alone."""
    async with opened(path) as store:
        for sender in senders:
            await queued(store, message(sender=sender))
        if was_tried:
            for lease in await leased(store, most=len(senders)):
                await store.finish(lease, LATER)


async def served(store: EmbeddedStore, room: int, times: int) -> list[str]:
    """The senders whose mail is attempted, in so many claims."""
    senders: list[str] = []
    for _ in range(times):
        for lease in await leased(store, most=room):
            senders.append(lease.mail.reverse_path)
            await store.finish(lease, DELIVERED)
    return senders


@pytest.mark.parametrize("was_tried", [False, True], ids=["new", "tried before"])
@pytest.mark.parametrize("room", [1, 4])
async def test_a_backlog_of_one_sender_does_not_hold_up_others(tmp_path: Path, room: int, was_tried: bool) -> None:
    before_them = 3 * SAMPLE * room
    await fill(tmp_path, [BUSY] * before_them, was_tried=was_tried)
    await fill(tmp_path, RARE, was_tried=was_tried)
    async with opened(tmp_path) as store:
        # A sender's turn comes with every other place, with every second claim where there is one place.
        senders = await served(store, room, 4 * (len(RARE) + 1) // room)
        assert set(senders) == {BUSY, *RARE}
        assert senders.count(BUSY) >= len(senders) // 2, "those that have waited longest are not held up either"


async def test_a_sender_of_which_nothing_is_due_is_passed_over(tmp_path: Path) -> None:
    await fill(tmp_path, [BUSY] * 3 * SAMPLE, was_tried=False)
    async with opened(tmp_path) as store:
        for sender in RARE[:-1]:
            await queued(store, message(sender=sender, due_in_seconds=3600))
    await fill(tmp_path, RARE[-1:], was_tried=False)
    async with opened(tmp_path) as store:
        assert set(await served(store, 1, 6)) == {BUSY, RARE[-1]}


def test_looking_for_senders_does_not_read_their_backlogs() -> None:
    index = Index(None)
    steps: list[None] = []
    try:
        for number, sender in enumerate([BUSY] * 3000 + RARE):
            row = (str(number), 1, 1, 1, 1, 1, 1, None, None, sender, "", None, "")
            index._database.execute(f"INSERT INTO message VALUES ({', '.join('?' * len(row))})", row)
            index._database.execute(
                "INSERT INTO delivery VALUES (?, 0, 'up', 'ready', 0, ?, ?)", (str(number), number, sender)
            )
        index._database.set_progress_handler(lambda: steps.append(None), 100)  # called after so many instructions
        found, after = index.due_of_senders("up", 10**9, 9, was_tried=False, after=BUSY, is_known=lambda _: False)
        index._database.set_progress_handler(None, 0)
    finally:
        index.close()
    assert ([sender for *_, sender in found], after) == (RARE, None)
    assert len(steps) < 20


async def test_new_mail_does_not_starve_what_was_tried_where_there_is_room_for_one(tmp_path: Path) -> None:
    await fill(tmp_path, RARE[:2], was_tried=True)
    async with opened(tmp_path) as store:
        for sender in RARE[2:]:
            await queued(store, message(sender=sender))
        first = await served(store, 1, 2)
        assert len(set(first) & set(RARE[:2])) == 1, "one of the first two was tried before"


async def test_an_index_of_an_earlier_release_learns_about_senders(tmp_path: Path) -> None:
    await fill(tmp_path, RARE, was_tried=False)
    database = sqlite3.connect(tmp_path / "index.db")
    database.execute("DROP INDEX delivery_sender")
    database.commit()
    database.close()
    async with opened(tmp_path) as store:
        assert sorted(await served(store, 5, 1)) == RARE
        assert await store.index.run(
            lambda index: index._database.execute(
                "SELECT count(*) FROM sqlite_schema WHERE name = 'delivery_sender'"
            ).fetchone()
        ) == (1,)
