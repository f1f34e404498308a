"""Following mails over the status port: the wait, what is wanted, several processes, and the bounds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import pytest

from otel_smtp.status import following as following_module
from otel_smtp.status.following import Following
from otel_smtp.status.search import RecordedForm
from otel_smtp.status.siblings import Siblings
from tests.status.test_server import Port, running


class Line(NamedTuple):
    number: int
    time: float
    text: str
    outcome: str
    fields: Mapping[str, Any]


class Lines:
    """The tail of one process."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.is_started = False
        self.missed = 0
        self.stopped = asyncio.Event()

    def start(self) -> None:
        self.is_started = True

    def stop(self) -> None:
        self.is_started = False
        self.stopped.set()

    def add(self, outcome: str = "relayed", *, time: float = 0.0, **fields: Any) -> None:
        named = {name.replace("__", "."): value for name, value in fields.items()}
        number = len(self.lines) + 1
        self.lines.append(Line(number, time or float(number), f"line {number}", outcome, {"trace_id": "ab", **named}))

    async def last(self) -> int:
        return len(self.lines)

    async def after(self, number: int, most: int) -> tuple[Sequence[Line], int, int]:
        found = self.lines[number:][:most]
        missed, self.missed = self.missed, 0
        return found, found[-1].number if found else len(self.lines), missed


async def ask(client: httpx.AsyncClient, **parameters: str) -> Any:
    answer = await client.get("/api/tail", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(answer: Any) -> list[str]:
    return [line["text"] for line in answer["lines"]]


async def test_it_begins_now_and_waits_for_a_line() -> None:
    lines = Lines()
    lines.add()
    async with running(tail=lines) as (_, client):
        begun = await ask(client)
        assert (begun["lines"], begun["after"]) == ([], "0:1"), "what was before is in the log"
        assert lines.is_started
        waiting = asyncio.create_task(ask(client, after=begun["after"]))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        lines.add()
        answer = await waiting
        assert texts(answer) == ["line 2"]
        assert (await ask(client, after=answer["after"], wait="no"))["lines"] == []
    assert not lines.is_started, "the port has stopped"


async def test_only_what_is_asked_for_comes() -> None:
    lines = Lines()
    lines.add(smtp__rcpt__domains=["example.net"], smtp__mail__from__domain="shop.example")
    lines.add("refused", smtp__rcpt__domain="example.org", smtp__reply__code=550, smtp__reply__text="User unknown")
    lines.add("deferred", smtp__rcpt__domains=["example.net"], smtp__reply__code=451)
    async with running(tail=lines) as (_, client):
        for parameters, expected in (
            ({"q": "to:example.org"}, ["line 2"]),
            ({"q": "from:shop"}, ["line 1"]),
            ({"q": 'text:"user unknown"'}, ["line 2"]),
            ({"q": "code:4xx"}, ["line 3"]),
            ({"only": "errors"}, ["line 2", "line 3"]),
            ({"only": "errors", "q": "to:example.net"}, ["line 3"]),
            ({"only": "refused"}, ["line 2"]),
            ({"only": "deferred,relayed"}, ["line 1", "line 3"]),
            ({"only": "held"}, []),
            ({"q": "id:ab"}, ["line 1", "line 2", "line 3"]),
        ):
            assert texts(await ask(client, after="0:0", wait="no", **parameters)) == expected, parameters


async def test_what_cannot_be_searched_for_is_noted() -> None:
    async with running(tail=Lines(), recorded_mailbox=lambda text: RecordedForm(None, "no")) as (_, client):
        assert (await ask(client, q="to:a@b"))["notes"] == ["no"]


async def test_missed_lines_are_told_at_once() -> None:
    lines = Lines()
    lines.missed = 7
    async with running(tail=lines) as (_, client):
        assert (await ask(client, after="0:0"))["missed"] == 7


@contextlib.asynccontextmanager
async def waiting_for(lines: Lines, seconds: float) -> AsyncIterator[tuple[Following, asyncio.Event]]:
    stopping = asyncio.Event()
    following = Following(lines, RecordedForm, wait_seconds=seconds)
    try:
        yield following, stopping
    finally:
        following.stop()


async def test_a_wait_ends_empty_handed() -> None:
    async with waiting_for(Lines(), 0.05) as (following, stopping):
        assert (await following.answer({"after": "0:0"}, stopping))["lines"] == []


async def test_a_stopping_port_lets_its_followers_go() -> None:
    async with waiting_for(Lines(), 60) as (following, stopping):
        stopping.set()
        async with asyncio.timeout(20):
            answer = await following.answer({"after": "0:0"}, stopping)
        assert answer["lines"] == []


async def test_followers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "FOLLOWERS", 1)
    lines = Lines()
    async with running(tail=lines) as (_, client):
        waiting = asyncio.create_task(ask(client, after="0:0"))
        for _ in range(200):
            refused = await client.get("/api/tail")
            if refused.status_code == 503:
                break
        assert (refused.status_code, refused.text) == (503, "too many follow already\n")
        lines.add()
        await waiting


async def test_lines_are_forgotten_when_nobody_has_asked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "LINGER_SECONDS", 0.01)
    lines = Lines()
    async with waiting_for(lines, 0) as (following, stopping):
        await following.answer({}, stopping)
        assert lines.is_started
        async with asyncio.timeout(5):
            await lines.stopped.wait()
        assert not lines.is_started


async def test_without_telemetry_there_is_nothing_to_follow() -> None:
    async with running() as (_, client):
        answer = await client.get("/api/tail")
    assert (answer.status_code, "OTEL_SDK_DISABLED" in answer.text) == (503, True)


async def test_the_lines_of_several_processes_come_together() -> None:
    token = "5e" * 32
    one, other = Lines(), Lines()
    other.add(time=1)
    second = Port(token=token, tail=other, number=1)
    address = second.start()
    assert address.port is not None
    siblings = Siblings(0, {1: address.port}, token, answer_seconds=30)
    try:
        async with running(siblings=siblings, tail=one) as (_, client):
            begun = await ask(client)
            assert begun["after"] == "0:0,1:1"
            assert other.is_started
            one.add(time=30)
            other.add(time=20)
            answer = await ask(client, after=begun["after"])
            assert [line["time"] for line in answer["lines"]] == [20, 30]
            assert answer["after"] == "0:1,1:2"
            new = await ask(client, after="0:1", wait="no")
            assert [line["time"] for line in new["lines"]] == [1, 20], "a process that was not there before"
    finally:
        await second.server.stop()


@pytest.mark.parametrize("after", ["x", "0", "0:-1", ":"])
async def test_a_cursor_that_is_none_begins_now(after: str) -> None:
    async with running(tail=Lines()) as (_, client):
        assert (await ask(client, after=after))["after"] == "0:0"
