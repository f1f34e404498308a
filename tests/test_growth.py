"""What lives as long as the gateway does not grow with what its clients do, but for what the ledger of bounds names.

Clients come and go, each with names of its own, and do what clients do, and some that do harm. Between two moments of
this every container that an object of ours holds is counted: one that has grown with the number of clients is a
structure without a bound, or has a row in the ledger (`otel_smtp.config.bounds`), and a line here.
"""

import asyncio
import gc
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from otel_smtp import Gateway, load
from otel_smtp.config.bounds import LEDGER
from tests.support.clock import advance
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS, until
from tests.test_limits import Client

pytestmark = pytest.mark.movable_clock

BEFORE: Final = 20
CLIENTS: Final = 80
# By class, or class and attribute: what may grow up to a bound that is beyond what happens here, and its row.
_TRACES: Final = "octets of traces in memory, and of those in which something failed"
_ENCODED: Final = "domains, and kinds of spans and events, that are kept encoded"
BOUNDED: Final = {
    "FailureRate._failures": "addresses and names with failed logins, and with good ones, that are remembered",
    "_Shelf.spans": _TRACES,
    "RecentTraces._failed_traces": _TRACES,
    "RecentTraces._known": _TRACES,
    "KeptTrace": _TRACES,
    "TraceIndex": _TRACES,
    "OrdinaryMail._senders": _ENCODED,
    "OrdinaryMail._recipients": _ENCODED,
    "OrdinaryMail._moulds": _ENCODED,
    "Mould": _ENCODED,
    "SpanShape": _ENCODED,
    "EventShape": _ENCODED,
    "LineShape": _ENCODED,  # one of each kind of span
}


def held() -> Counter[str]:
    """How much is in the containers of all objects of ours, by the class and attribute that hold them."""
    gc.collect()
    sizes: Counter[str] = Counter()
    for owner in gc.get_objects():
        if str(type(owner).__module__).startswith("otel_smtp."):
            for name, value in _attributes(owner):
                if isinstance(value, (dict, list, set, deque)):
                    sizes[f"{type(owner).__name__}.{name}"] += len(value)
    # Handles that are due later: each holds what it will call.
    loop: Any = asyncio.get_running_loop()
    sizes["timers"] = sum(not handle.cancelled() for handle in loop._scheduled)
    sizes["tasks"] = len(asyncio.all_tasks())
    return sizes


def _attributes(owner: object) -> Iterator[tuple[str, object]]:
    yield from getattr(owner, "__dict__", {}).items()
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield name, getattr(owner, name, None)


async def visit(gateway: Gateway, upstream: ScriptedUpstream, number: int) -> None:
    """One client, a mail that is taken, one that is refused, one that is given up, and a look at the status port."""
    (address,) = gateway.addresses["local"]
    reader, writer = await asyncio.open_connection(address.host, address.port)
    client = Client(reader, writer)
    envelope = (f"MAIL FROM:<a{number}@d{number}.example>", f"RCPT TO:<b{number}@e{number}.example>")
    assert (await client.reply()).startswith("220 ")
    await client.asks(f"EHLO client{number}.example")
    await client.asks(f"VERB{number}")
    await client.asks("AUTH PLAIN AA==")
    for _ in range(2):
        if (await client.asks(*envelope, "DATA")).startswith("354 "):
            await client.asks(f"Subject: {number}\r\nMessage-ID: <{number}@client.example>\r\n\r\nx\r\n.")
        upstream.faults[Phase.RCPT] = Fault(Kind.REFUSE, f"550 5.1.1 no user {number} here\r\n".encode(), times=1)
    await client.asks("RSET", *envelope)
    if number % 2:
        await client.asks("QUIT")
    writer.close()
    status = gateway.ready.status
    if number % 4 == 0 and status is not None:
        advance(1.0)  # readers have a pace
        paths = ("/metrics", f"/api/traces?q=x{number}", f"/api/traces/{number:032x}", "/api/connections", "/livez")
        for path in paths:
            reader, writer = await asyncio.open_connection(status.host, status.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            async with asyncio.timeout(SECONDS):
                await reader.read()
            writer.close()
        _, writer = await asyncio.open_connection(status.host, status.port)
        writer.close()  # says nothing


@pytest.mark.long
@pytest.mark.parametrize(
    "delivery",
    [{"mode": "direct"}, {"strategy": "buffered"}, {"mode": "queue"}],
    ids=lambda one: next(iter(one.values())),
)
async def test_nothing_grows_with_the_number_of_clients(
    delivery: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    (tmp_path / "users").touch()
    async with ScriptedUpstream() as upstream:
        values: dict[str, Any] = {
            "listener": [{
                "address": ["127.0.0.1:0"], "auth": "optional", "auth_in_clear": True,
                "auth_users_file": str(tmp_path / "users"),
            }],
            "upstream": [{"url": f"smtp://127.0.0.1:{upstream.port}"}],
            "status": {"address": "127.0.0.1:0"},
            "delivery": delivery,
            "log": {"level": "error"},
        }  # fmt: skip
        if "queue" in delivery.values():
            values["spool"] = {"directory": str(tmp_path / "spool")}
        async with Gateway(load(values=values)) as gateway:
            for number in range(BEFORE):
                await visit(gateway, upstream, number)
            await rest(gateway)
            before = held()
            for number in range(BEFORE, BEFORE + CLIENTS):
                await visit(gateway, upstream, number)
            await rest(gateway)
            after = held()
    grown = {name: (before[name], size) for name, size in after.items() if size - before[name] > CLIENTS // 8}
    assert {one: sizes for one, sizes in grown.items() if not {one, one.partition(".")[0]} & set(BOUNDED)} == {}


async def rest(gateway: Gateway) -> None:
    """Until all connections are over, what was queued has been delivered, and what is due has been done."""
    if gateway.spool is not None:
        store = gateway.spool.store
        while (counts := await store.counts()).ready or counts.active:  # noqa: ASYNC110 - a thread works on it
            await asyncio.sleep(0)
    await until(lambda: not any(one.pool.busy or one.pool.opening for one in gateway.upstreams()))
    for _ in range(5):
        advance(2.0)
        for _ in range(20):
            await asyncio.sleep(0)


def test_what_may_grow_has_its_row() -> None:
    assert set(BOUNDED.values()) <= {row.what for row in LEDGER}
