"""The visitors of the demonstration: what they expect, and what they say when it does not happen."""

import asyncio
import io
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from rich.console import Console

from otel_smtp.commands.demo import show
from otel_smtp.commands.demo.show import default_addresses
from otel_smtp.commands.demo.upstream import KeepingForwarder, KeepingUpstream
from otel_smtp.commands.demo.visits import VISITS, Visit, VisitFailed, accepted
from otel_smtp.net import CannotListen
from otel_smtp.observing import Endpoint


@pytest_asyncio.fixture
async def kept() -> AsyncIterator[tuple[Endpoint, KeepingForwarder]]:
    forwarder = KeepingForwarder()
    upstream = KeepingUpstream(forwarder)
    yield await upstream.start(), forwarder
    await upstream.stop()


@pytest.mark.parametrize("visit", VISITS, ids=lambda visit: visit.pay.__name__)
async def test_a_visit_goes_as_its_title_says(visit: Visit, kept: tuple[Endpoint, KeepingForwarder]) -> None:
    address, forwarder = kept
    await visit.pay(address)
    recipients = [[recipient.address for recipient in mail.recipients] for mail in forwarder.kept]
    assert (
        recipients
        == {
            "accepted": [["alice@example.com"]],
            "one_of_two_refused": [["bob@example.net"]],
            "refused": [],
            "vanished": [],
        }[visit.pay.__name__]
    )


async def test_a_failed_visit_quotes_the_reply() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        await reader.readline()
        writer.write(b"250-here\r\n250 OK\r\n")
        await reader.readline()
        writer.write(b"451 4.3.0 not today\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(VisitFailed, match=r"the gateway answered '451 4\.3\.0 not today.*', not 250"):
            await accepted(Endpoint(host, port))


async def test_a_port_that_is_taken_is_left_to_the_kernel() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server:
        assert default_addresses(server.sockets[0].getsockname()[1]) == ["127.0.0.1:0"]
    assert default_addresses(0)[0] == "127.0.0.1:0"


@pytest.mark.parametrize("taken", [2525, 9925])
async def test_a_port_that_is_taken_at_the_last_moment_is_left_to_the_kernel(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    monkeypatch.setattr(show, "default_addresses", lambda port: [address if port == taken else "127.0.0.1:0"])
    told = io.StringIO()
    console = Console(file=told, width=120)
    async with server:
        await show.Demonstration(console, as_json=True).run(once=True)
        stories = [json.loads(line)["spans"] for line in told.getvalue().splitlines()]
        assert [spans[0]["name"] for spans in stories] == ["smtp.connection"] * 4
        assert all(span["end_unix_nano"] > span["start_unix_nano"] for spans in stories for span in spans)
        assert stories[0][0]["events"][0]["attributes"]["smtp.state"] == "New"
        monkeypatch.undo()
        with pytest.raises(CannotListen):  # an address that was asked for is another matter
            await show.Demonstration(console, listen=[address]).run(once=True)
