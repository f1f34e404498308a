"""Mail on its way from the directory of one gateway into the queue that several share."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.smtp.envelope import DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.embedded import EmbeddedStore, to_be_moved
from otel_smtp.spool.messages import OUTCOME_PREFIX, End, Kind, NewMessage, SpoolError, Verdict, new_id
from otel_smtp.spool.moving import move
from otel_smtp.spool.operators import as_answer
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from tests.commands.test_cli import run
from tests.spool.messages import CARRIER, HEADER, leased, message, queued
from tests.spool.postgresql.schemas import new_place, store

BIG = b"\r\n" + b"0123456789abcdef" * 40_000  # larger than one chunk of the database


def directory(path: Path) -> EmbeddedStore:
    return EmbeddedStore(path / "spool", least_free_octets=0, segment_octets=2 * 1024 * 1024)


async def filled(path: Path) -> None:
    """A directory with mail of many kinds."""
    one = directory(path)
    await one.open()
    await queued(one, message("fresh@example.net", due_in_seconds=3600.0))
    await queued(one, message("large@example.net", due_in_seconds=3600.0), HEADER, BIG)
    # Tried, and deferred.
    await queued(one, message("tried@example.net", "done@example.net"))
    (lease,) = await leased(one)
    await one.finish(
        lease, [Verdict(0, None, Reply(451, None, ("4.7.1 later",)))], retry_in=7200.0, is_possible_duplicate=True
    )
    held = await queued(one, message("held@example.net"))
    await one.hold(held)
    full = Mail("app@example.com", envid="QQ314159", ret=DsnReturn.HEADERS, smtputf8=True)
    await queued(
        one,
        NewMessage(
            new_id(), full,
            {
                "up": [Recipient("a@example.net", Notify.FAILURE, "rfc822;a@example.net")],
                "other": [Recipient("b@example.net")],
            },
            len(HEADER), 86400.0, CARRIER, Kind.MAIL, retry_in=60.0,
        ),
    )  # fmt: skip
    await queued(one, message("sender@example.net", sender="", kind=Kind.BOUNCE, due_in_seconds=60.0))
    await one.close()


async def seen(one: Any) -> list[dict[str, Any]]:
    """All that operators see of all messages, but for instants, and each content."""
    rows = []
    for shown in await one.page("", 100):
        content = await one.read(shown.content, 0, shown.content.octets)
        rows.append({**as_answer(shown), "content": content, "carrier": dict(shown.carrier)})
    return rows


def but_instants(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("arrival_time", "expires", "next_attempt")
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


async def opened(place: QueueLocation) -> PostgresqlStore:
    one = store(place)
    await one.open()
    return one


async def test_all_that_is_known_of_a_message_stays(tmp_path: Path) -> None:
    await filled(tmp_path)
    source = directory(tmp_path)
    await source.open()
    before = await seen(source)
    tally = await source.tally()
    await source.close()
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    target = await opened(await new_place())
    done = await move(source, target)
    assert (done.messages, done.finished, done.left) == (6, 0, {})
    after = await seen(target)
    assert but_instants(after) == but_instants(before)
    for name in ("arrival_time", "expires", "next_attempt"):
        assert [row[name] for row in after] == pytest.approx([row[name] for row in before], abs=30.0)
    assert await seen(source) == []
    # Each recipient was accepted once, wherever it is.
    assert (await target.tally())["accepted"] == 7
    assert (await target.tally())["notified"] == 1
    left = await source.tally()
    assert left.get("accepted", 0) == tally["accepted"] - 7
    assert left.get("notified", 0) == 0
    assert all([await target.is_intact(shown.content) for shown in await target.page("", 100)])
    assert [row["attempts"] for row in after] == [0, 0, 1, 0, 0, 0]
    await source.close()
    await target.close()
    emptied = directory(tmp_path)
    await emptied.open()  # it is a spool like any other again
    await emptied.close()


async def test_a_release_goes_on_with_the_age_that_it_had(tmp_path: Path) -> None:
    one = directory(tmp_path)
    await one.open()
    held = await queued(one, message("held@example.net", max_age_seconds=100.0))
    await one.hold(held)
    await one.close()
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    target = await opened(await new_place())
    await move(source, target)
    assert await target.release(held)
    (lease,) = await leased(target)
    assert (lease.message_id, lease.attempt) == (held, 1)
    assert lease.expires_at - lease.arrived_at == pytest.approx(100.0, abs=30.0)
    await target.finish(lease, ())
    await source.close()
    await target.close()


class Crash(BaseException):
    """The process ends here."""


class Crashing:
    """A store in whose verbs the process ends: before or after what they do."""

    def __init__(self, kept: Any, at: int, *, after: bool) -> None:
        self.kept = kept
        self.calls = 0
        self._at = at
        self._after = after

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.kept, name)
        if name in ("name", "piece_octets", "page", "whole", "read", "is_intact"):
            return verb

        async def call(*given: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self._at and not self._after:
                raise Crash
            answer = await verb(*given, **named)
            if self.calls == self._at:
                raise Crash
            return answer

        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("whose", ["source", "target"])
async def test_wherever_it_is_interrupted_nothing_is_lost_or_doubled(tmp_path: Path, whose: str, after: bool) -> None:
    await filled(tmp_path)
    place = await new_place()
    target = await opened(place)
    delivered: list[str] = []
    for at in range(1, 20):
        source = to_be_moved(tmp_path / "spool")
        await source.open()
        crashing = Crashing(source if whose == "source" else target, at, after=after)
        is_done = False
        try:
            await move(
                crashing if whose == "source" else source,
                crashing if whose == "target" else target,
            )
            is_done = True
        except Crash:
            pass
        await source.close()
        # Meanwhile gateways deliver what is there.
        for shown in await target.page("", 100):
            await target.release(shown.id)
            await target.retry(shown.id)
        for destination in ("up", "other"):
            for lease in await leased(target, most=100, destination=destination):
                delivered += [there.recipient.address for there in lease.recipients]
                await target.finish(lease, [Verdict(there.number, End.DELIVERED) for there in lease.recipients])
        if is_done:
            break
    assert is_done
    assert sorted(delivered) == sorted(
        ["fresh", "large", "tried", "done", "held", "a", "b", "sender"][index] + "@example.net" for index in range(8)
    )
    assert await target.page("", 10) == []
    await target.close()


async def test_meanwhile_no_gateway_opens_the_directory_and_it_goes_nowhere_else(tmp_path: Path) -> None:
    await filled(tmp_path)
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    target = await opened(await new_place())
    with pytest.raises(Crash):
        await move(source, Crashing(target, 2, after=False))
    await source.close()
    with pytest.raises(SpoolError, match=r"otel-smtp queue move --from"):
        await directory(tmp_path).open()
    elsewhere = await opened(await new_place())
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    with pytest.raises(SpoolError, match="finish that first"):
        await move(source, elsewhere)
    assert (await move(source, target)).messages + 1 >= 6
    for one in (source, target, elsewhere):
        await one.close()
    opened_again = directory(tmp_path)
    await opened_again.open()
    await opened_again.close()


async def test_what_has_no_content_stays_and_is_told(tmp_path: Path) -> None:
    await filled(tmp_path)
    for path in (tmp_path / "spool" / "large").iterdir():
        path.unlink()
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    target = await opened(await new_place())
    done = await move(source, target)
    assert done.messages == 5
    ((left, why),) = done.left.items()
    assert [shown.id for shown in await source.page("", 10)] == [left]
    assert why
    await source.close()
    await target.close()


async def test_a_damaged_content_is_still_known_as_damaged(tmp_path: Path) -> None:
    one = directory(tmp_path)
    await one.open()
    large = await queued(one, message("large@example.net"), HEADER, BIG)
    await one.close()
    (path,) = [path for path in (tmp_path / "spool" / "large").iterdir() if path.name == large]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0123456789", b"9876543210", 1))
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    target = await opened(await new_place())
    await move(source, target)
    (shown,) = await target.page("", 10)
    assert not await target.is_intact(shown.content)
    await source.close()
    await target.close()


async def test_outcomes_come_along(tmp_path: Path) -> None:
    application = f"{OUTCOME_PREFIX}app"
    one = directory(tmp_path)
    await one.open()
    await queued(one)
    (lease,) = await leased(one)
    told = message(sender="", destination=application, kind=Kind.OUTCOME, header_octets=0)
    await one.finish(lease, [Verdict(0, End.DELIVERED)], notices=[(told, b"{}")])
    await one.close()
    source = to_be_moved(tmp_path / "spool")
    await source.open()
    target = await opened(await new_place())
    assert (await move(source, target)).messages == 1
    assert await source.page("", 9, outcomes=True) == []
    ((moved, content),), _ = await target.claim({application: 9})
    assert (moved.message_id, moved.kind, b"".join(content or ())) == (told.id, Kind.OUTCOME, b"{}")
    assert await target.tally() == {"outcomes": 1}
    await source.close()
    await target.close()


def test_a_directory_without_a_spool_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="there is no spool"):
        to_be_moved(tmp_path / "elsewhere")


async def test_the_command_moves_says_what_it_did_and_refuses_a_directory_in_use(tmp_path: Path) -> None:
    await filled(tmp_path)
    place = await new_place()
    settings = ("--set", f"spool.url={place.url}", "--set", f"spool.schema={place.schema}")
    asked = (
        "queue",
        "move",
        "--from",
        str(tmp_path / "spool"),
        "--set",
        "upstream.0.url=smtp://127.0.0.1:1",
        *settings,
    )
    owner = directory(tmp_path)
    await owner.open()
    refused = await asyncio.to_thread(run, *asked)
    await owner.close()
    assert refused.returncode == 1
    assert "belongs to another process" in refused.stderr
    told = await asyncio.to_thread(run, *asked)
    assert (told.returncode, told.stdout) == (0, "6 moved\n"), told.stderr
    told = await asyncio.to_thread(run, *asked)
    assert (told.returncode, told.stdout) == (0, "0 moved\n"), told.stderr
