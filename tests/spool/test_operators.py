"""What operators do with the spool, over the gateway's socket and without a gateway."""

import asyncio
import base64
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.spool.embedded import EmbeddedStore, ask
from otel_smtp.spool.embedded.store import CRASHES_ALLOWED
from otel_smtp.spool.messages import Kind as MessageKind
from otel_smtp.spool.messages import MessageView, NoSuchMessage, SpoolError
from otel_smtp.spool.operators import COMMANDS, MOST_CONVERSATIONS, MOST_REQUEST_OCTETS, Answer
from tests.spool.messages import BODY, HEADER, TRACE_ID, leased, message, queued
from tests.spool.queueing import NEVER_AGAIN, eventually, queueing
from tests.support.relaying import BOB, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS


async def asked(directory: Path, command: str, *ids: str, **more: Any) -> list[Answer]:
    request: dict[str, Any] = {"command": command, **more}
    if ids:
        request["ids"] = list(ids)
    return [answer async for answer in ask(directory, request, max_age_seconds=432000)]


@asynccontextmanager
async def filled(directory: Path, count: int = 3) -> AsyncIterator[list[str]]:
    """A spool that nobody owns, with some messages in it; their ids."""
    store = EmbeddedStore(directory, least_free_octets=0)
    await store.open()
    ids = [await queued(store, message(f"user{number}@example.net")) for number in range(count)]
    await store.close()
    yield ids


async def test_a_list_without_a_gateway(tmp_path: Path) -> None:
    async with filled(tmp_path / "spool") as ids:
        answers = await asked(tmp_path / "spool", "list")
        assert [answer["queue_id"] for answer in answers] == ids
        first = answers[0]
        assert first["queue_name"] == "incoming"
        assert first["sender"] == "app@example.com"
        assert first["recipients"] == [{"address": "user0@example.net", "state": "ready"}]
        assert first["message_size"] == len(HEADER + BODY)
        assert first["trace_id"] == TRACE_ID


async def test_what_is_done_without_a_gateway_is_reported_by_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with filled(tmp_path / "spool") as ids, ScriptedUpstream() as upstream:
        await asked(tmp_path / "spool", "delete", ids[0], operator="ann")
        await asked(tmp_path / "spool", "hold", ids[1], operator="bob")
        assert [line.getMessage() for line in caplog.records] == ["queued message changed by an operator"]
        for reported in ([(ids[0], "removed", "ann", 1), (ids[1], "held", "bob", 1)], []):
            caplog.clear()
            async with queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
                told = [(one.spool_id, str(one.action), one.operator, len(one.refused)) for one in queue.observer.acted]
                assert told == reported
                lines = [
                    line for line in caplog.records if line.getMessage() == "queued message changed by an operator"
                ]
                assert len(lines) == (1 if reported else 0), "at warning, that of the removal"
            assert not [line for line in caplog.records if "not ours" in line.getMessage()]


async def test_what_a_command_finds_to_be_part_of_too_many_crashes_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = "message held: being delivered during repeated crashes"
    async with filled(tmp_path / "spool", 1) as (poison,), ScriptedUpstream() as upstream:
        for crash in range(CRASHES_ALLOWED):
            store = EmbeddedStore(tmp_path / "spool", least_free_octets=0)
            await store.open()
            await leased(store)
            without = shutil.ignore_patterns("LOCK", "spare*", "*reserve")
            shutil.copytree(tmp_path / "spool", tmp_path / f"crashed{crash}", ignore=without)
            await store.close()
            shutil.rmtree(tmp_path / "spool")
            (tmp_path / f"crashed{crash}").rename(tmp_path / "spool")
        (listed,) = await asked(tmp_path / "spool", "list")
        assert listed["queue_name"] == "hold"
        assert [line.getMessage() for line in caplog.records] == [held]
        caplog.clear()
        async with queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
            assert [(one.spool_id, str(one.action), one.operator) for one in queue.observer.acted] == [
                (poison, "held", None)
            ]
            assert held in [line.getMessage() for line in caplog.records]


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"trace_id": TRACE_ID}, [0, 1, 2]),
        ({"recipient": "user1@example.net"}, [1]),
        ({"sender": "app@example.com", "recipient": "user2@example.net"}, [2]),
        ({"trace_id": TRACE_ID, "sender": "somebody.else@example.com"}, []),
        ({"trace_id": "0" * 32}, []),
    ],
)
async def test_what_is_known_of_a_message_finds_it(tmp_path: Path, known: dict[str, str], found: list[int]) -> None:
    async with filled(tmp_path / "spool") as ids:
        answers = await asked(tmp_path / "spool", "find", **known)
        assert [answer["queue_id"] for answer in answers] == [ids[number] for number in found]


async def test_a_bounce_is_found_by_its_null_sender(tmp_path: Path) -> None:
    async with filled(tmp_path / "spool"):
        store = EmbeddedStore(tmp_path / "spool", least_free_octets=0)
        await store.open()
        bounce = await queued(store, message("app@example.com", sender="", kind=MessageKind.BOUNCE))
        await store.close()
        assert [answer["queue_id"] for answer in await asked(tmp_path / "spool", "find", sender="<>")] == [bounce]


@pytest.mark.parametrize("known", [{}, {"trace_id": 5}, {"sender": None}])
async def test_a_search_for_nothing_is_refused(tmp_path: Path, known: dict[str, Any]) -> None:
    async with filled(tmp_path / "spool"):
        with pytest.raises(SpoolError, match="which messages"):
            await asked(tmp_path / "spool", "find", **known)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, [0, 1, 2, 3]),
        ({"domain": "example.net"}, [0, 1, 2]),
        ({"domain": "@EXAMPLE.net"}, [0, 1, 2]),
        ({"domain": "ample.net"}, []),
        ({"sender": "app@example.com"}, [0, 1, 2]),
        ({"sender": "@Example.COM"}, [0, 1, 2]),
        ({"sender": "@ample.com"}, []),
        ({"sender": "<>"}, [3]),
        ({"reason": "4.7.1 LATER"}, [1, 3]),
        ({"reason": "later", "domain": "example.org"}, [3]),
        ({"older_than_seconds": 0}, [0, 1, 2, 3]),
        ({"older_than_seconds": 3600.0}, []),
    ],
)
async def test_a_filter_chooses_what_is_listed_and_changed(
    tmp_path: Path, wanted: dict[str, Any], found: list[int]
) -> None:
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0)
    await store.open()
    replies = {"user1@example.net": "451 4.7.1 later, please", "user3@example.org": "450 4.7.1 Later"}
    new = [message(f"user{number}@example.net") for number in range(3)] + [message("user3@example.org", sender="")]
    ids = [await queued(store, one._replace(last_replies=replies)) for one in new]
    await store.close()
    chosen = [ids[number] for number in found]
    assert [answer["queue_id"] for answer in await asked(tmp_path / "spool", "list", **wanted)] == chosen
    held = await asked(tmp_path / "spool", "hold", all=True, **wanted)
    assert held == [{"messages": len(chosen)}, *({"queue_id": one, "changed": True} for one in chosen)]


@pytest.mark.parametrize("wanted", [{"domain": 5}, {"reason": []}, {"older_than_seconds": "1h"}])
async def test_a_filter_that_is_none_is_refused(tmp_path: Path, wanted: dict[str, Any]) -> None:
    async with filled(tmp_path / "spool"):
        with pytest.raises(SpoolError, match="are text, older_than_seconds is a number"):
            await asked(tmp_path / "spool", "list", **wanted)


async def test_hold_release_expire_reset_and_delete(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    async with filled(spool) as (one, two, three):
        assert await asked(spool, "hold", one, two) == [
            {"messages": 2},
            {"queue_id": one, "changed": True},
            {"queue_id": two, "changed": True},
        ]
        assert [answer["queue_name"] for answer in await asked(spool, "list")] == ["hold", "hold", "incoming"]
        assert (await asked(spool, "release", all=True))[0] == {"messages": 2}
        assert (await asked(spool, "expire", three))[1]["changed"]
        assert [answer["forced_expire"] for answer in await asked(spool, "show", three)] == [True]
        assert (await asked(spool, "reset", three))[1]["changed"]
        assert (await asked(spool, "delete", one, "nothing")) == [
            {"messages": 2},
            {"queue_id": one, "changed": True},
            {"queue_id": "nothing", "error": "no message nothing"},
        ]
        assert (await asked(spool, "delete", all=True))[0] == {"messages": 2}
        (counts,) = await asked(spool, "counts")
        assert counts["recipients"] == {"accepted": 3, "delivered": 0, "failed": 0, "expired": 0, "removed": 3}


async def test_an_export_is_the_message_as_it_came(tmp_path: Path) -> None:
    async with filled(tmp_path / "spool", 1) as (only,):
        shown, *pieces = await asked(tmp_path / "spool", "export", only)
        assert shown["queue_id"] == only
        assert b"".join(base64.b64decode(piece["content"]) for piece in pieces) == HEADER + BODY


async def test_what_cannot_be_exported_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    async with filled(tmp_path / "spool", 2) as ids:
        first, piece, error, *rest = await asked(tmp_path / "spool", "export", ids[0], "nothing", ids[1])
        assert (first["queue_id"], base64.b64decode(piece["content"])) == (ids[0], HEADER + BODY)
        assert error == {"queue_id": "nothing", "error": "no message nothing"}
        assert [answer["queue_id"] for answer in rest] == [ids[1]] * 2


@pytest.mark.parametrize("command", ["retry", "export"])
async def test_what_ends_while_all_is_worked_on_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    async with filled(tmp_path / "spool", 3) as ids:
        show = EmbeddedStore.show

        async def show_and_end(store: EmbeddedStore, message_id: str) -> MessageView:
            if message_id == ids[1]:
                raise NoSuchMessage(f"no message {message_id}")
            return await show(store, message_id)

        monkeypatch.setattr(EmbeddedStore, "show", show_and_end)
        answers = await asked(tmp_path / "spool", command, all=True)
        assert not any("error" in answer for answer in answers)
        assert {answer["queue_id"] for answer in answers if answer.get("changed") or "content" in answer} == {
            ids[0], ids[2],
        }  # fmt: skip


@pytest.mark.parametrize("depth", [1, 12])  # a socket's name may have 107 octets
async def test_a_running_gateway_does_it(tmp_path: Path, depth: int) -> None:
    directory = tmp_path.joinpath(*["a-rather-long-name"] * depth)
    async with ScriptedUpstream() as upstream, queueing(directory, settings(upstream), schedule=NEVER_AGAIN) as queue:
        upstream.faults[Phase.REPLY] = Fault(Kind.REFUSE, times=1)
        await queue.take(BOB)

        async def is_deferred() -> bool:
            return bool((await asked(directory / "spool", "list"))[0]["queue_name"] == "deferred")

        await eventually(is_deferred)
        (shown,) = await asked(directory / "spool", "list")
        assert shown["recipients"][0]["delay_reason"].startswith("451 4.3.2 scripted")
        await asked(directory / "spool", "retry", shown["queue_id"])
        await queue.empties()
        assert len(upstream.kept) == 1


async def test_expire_sends_it_back_at_once(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
        upstream.verdict = lambda address: b"450 4.2.1 busy\r\n" if address == BOB.address else None
        await queue.take(BOB)
        await eventually(lambda: queue.observer.attempts)

        async def is_deferred() -> bool:
            return bool((await asked(tmp_path / "spool", "list"))[0]["queue_name"] == "deferred")

        await eventually(is_deferred)
        await asked(tmp_path / "spool", "expire", all=True)
        await queue.empties()
        assert upstream.kept[0].addresses == ("a@example.com",)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"command": "burn"}, f"no command 'burn'; there are {', '.join(COMMANDS)}"),
        ({}, "no command None"),
        ({"command": "hold"}, "which messages"),
        ({"command": "hold", "ids": [1]}, "which messages"),
        ({"command": "show", "ids": ["nothing"]}, "no message nothing"),
    ],
)
async def test_what_is_not_understood_is_said(tmp_path: Path, request_: Answer, told: str) -> None:
    async with filled(tmp_path / "idle", 0):
        with pytest.raises(SpoolError, match=told.replace("(", r"\(")):
            [answer async for answer in ask(tmp_path / "idle", request_, max_age_seconds=1)]
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)):
        with pytest.raises(SpoolError, match=told):
            [answer async for answer in ask(tmp_path / "spool", request_, max_age_seconds=1)]


async def test_a_command_without_end_is_refused(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "spool" / "control")
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                writer.write(b"x" * MOST_REQUEST_OCTETS)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            assert b"error" in await reader.read()
        writer.close()


async def test_so_many_queue_commands_are_heard_at_once(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)):
        async with AsyncExitStack() as stack:
            readers = []
            for _ in range(10 * MOST_CONVERSATIONS):
                reader, writer = await asyncio.open_unix_connection(tmp_path / "spool" / "control")
                stack.callback(writer.close)
                readers.append(reader)
            refused = [await reader.read() for reader in readers[MOST_CONVERSATIONS:]]
            assert set(refused) == {b'{"error": "too many queue commands at once"}\n'}
        async with asyncio.timeout(SECONDS):
            while True:  # until it has seen that they are closed
                with contextlib.suppress(SpoolError):
                    assert not await asked(tmp_path / "spool", "list")
                    break


async def test_a_queue_command_that_is_not_sent_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.operators.REQUEST_SECONDS", 0.05)
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "spool" / "control")
        writer.write(b'{"command"')
        async with asyncio.timeout(SECONDS):
            assert await reader.read() == b""
        writer.close()


async def test_no_spool_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="there is no spool"):
        await asked(tmp_path / "nowhere", "list")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "log").mkdir()  # as /var has one
    with pytest.raises(SpoolError, match="there is no spool"):
        await asked(tmp_path, "list")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


async def test_a_gateway_that_does_not_listen_is_not_pushed_aside(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)):
        (tmp_path / "spool" / "control").unlink()
        with pytest.raises(SpoolError, match="belongs to another process"):
            await asked(tmp_path / "spool", "list")
