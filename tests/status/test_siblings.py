"""Several status ports as one: what is put together, and what becomes of a process that does not answer."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from otel_smtp.observing import Outcome
from otel_smtp.smtp.states import ConnState
from otel_smtp.status.siblings import TOKEN_HEADER, Siblings, merged_metrics, merged_pictures, merged_searches
from tests.status.test_server import Port
from tests.support.ports import unclaimed_port
from tests.support.spans import mail_trace

TOKEN = "5e" * 32
SECOND = 1_000_000_000


@contextlib.asynccontextmanager
async def two_processes() -> AsyncIterator[tuple[Port, Port, httpx.AsyncClient]]:
    """The first, which people ask, and the second, which it asks; and a third that nobody ever started."""
    second = Port(token=TOKEN)
    address = second.start()
    assert address.port is not None
    # Time enough: how long a busy machine takes is not what is asked here.
    first = Port(siblings=Siblings(0, {1: address.port, 2: unclaimed_port()}, TOKEN, answer_seconds=30))
    shown = first.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{shown.port}", trust_env=False, timeout=30) as client:
        try:
            yield first, second, client
        finally:
            await first.server.stop()
            await second.server.stop()


async def test_a_sibling_answers_to_the_token_alone() -> None:
    second = Port(token=TOKEN)
    address = second.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{address.port}", trust_env=False) as client:
            for path in ("/livez", "/readyz", "/metrics", "/", "/api/picture"):
                for token in ("", "5e", "é" * 32):
                    headers = {TOKEN_HEADER.encode(): token.encode()}
                    assert (await client.get(path, headers=headers)).status_code == 403, path
                assert (await client.get(path, headers={TOKEN_HEADER: TOKEN})).status_code == 200, path
    finally:
        await second.server.stop()


async def test_connections_and_counters_are_those_of_all() -> None:
    async with two_processes() as (first, second, client):
        first.connection(1)
        second.connection(2).enter(ConnState.ACTIVE)
        second.connection(3)
        for port, count in ((first, 3), (second, 4)):
            port.live.outcomes[Outcome.RELAYED] = count
        rows = (await client.get("/api/connections")).json()["connections"]
        assert sorted((row["worker"], row["state"]) for row in rows) == [(0, "New"), (1, "Active"), (1, "New")]
        counters = (await client.get("/api/status")).json()["counters"]
        assert counters["connections_open"] == 3
        assert counters["transactions"]["relayed"] == 7
        (upstream,) = (await client.get("/api/upstreams")).json()["upstreams"]
        assert (upstream["idle"], upstream["busy"], upstream["limit"]) == (2, 4, 40)


async def test_the_stream_follows_all_processes_and_names_the_silent_ones() -> None:
    async with two_processes() as (_, second, client), client.stream("GET", "/api/stream") as stream:
        pictures = (json.loads(line[6:]) async for line in stream.aiter_lines() if line.startswith("data: "))
        picture = await anext(pictures)
        assert picture["silent_processes"] == [2]
        assert picture["connections"] == []
        second.connection(7)
        picture = await anext(pictures)
        assert [row["worker"] for row in picture["connections"]] == [1]
        second.not_ready["spool"] = "the disk failed"
        async for picture in pictures:
            if picture["not_ready"]:
                assert picture["not_ready"] == {"spool (process 1)": "the disk failed"}
                break


async def test_a_process_that_is_not_ready_is_named_by_its_number() -> None:
    async with two_processes() as (first, second, client):
        assert (await client.get("/readyz")).json() == {"status": "ready", "reasons": {}}
        second.not_ready["spool"] = "the disk failed"
        first.not_ready["listeners"] = "none"
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["reasons"] == {
            "listeners (process 0)": "none",
            "spool (process 1)": "the disk failed",
        }


async def test_traces_are_found_wherever_they_are_and_put_together_where_they_are_in_two() -> None:
    async with two_processes() as (first, second, client):
        for port, trace_id, domain, at in (
            (first, 0xA, "first.example", 1),
            (second, 0xB, "second.example", 2),
            (first, 0xC, "both.example", 3),
            (second, 0xC, "both.example", 3),
        ):
            for span in mail_trace(trace_id, domain=domain, start_ns=at * SECOND):
                port.traces.add([span])
        found = (await client.get("/api/traces?order=newest")).json()
        assert [trace["trace_id"] for trace in found["traces"]] == [f"{each:032x}" for each in (0xC, 0xB, 0xA)]
        assert found["held"] == 4
        assert found["notes"] == ["process 2 did not answer: the traces of its mails are missing"]
        one = (await client.get("/api/traces?q=second.example")).json()
        assert [trace["trace_id"] for trace in one["traces"]] == [f"{0xB:032x}"]
        for trace_id, spans in ((0xA, 3), (0xB, 3), (0xC, 6)):
            parts = (await client.get(f"/api/traces/{trace_id:032x}")).json()["resourceSpans"]
            assert sum(len(part["scopeSpans"][0]["spans"]) for part in parts) == spans
            assert next((t["spans"] for t in found["traces"] if t["trace_id"] == f"{trace_id:032x}"), None) == spans
        assert (await client.get(f"/api/traces/{0xD:032x}")).status_code == 404


async def test_metrics_are_those_of_all_apart() -> None:
    async with two_processes() as (_, _, client):
        answer = await client.get("/metrics")
        assert answer.text == 'smtp_server_probes_total{worker="0"} 1\nsmtp_server_probes_total{worker="1"} 1\n'


def test_pages_of_metrics_become_one_with_each_family_once() -> None:
    page = (
        "# HELP smtp_a A number.\n# TYPE smtp_a counter\n"
        'smtp_a_total{state="Idle"} 2.0 # {trace_id="ab"} 0.5 1.0\nsmtp_a_total{} 1\n'
        "# TYPE smtp_b gauge\nsmtp_b 3.0\n# EOF\n"
    )
    assert merged_metrics({1: page.encode(), 0: page.encode()}).decode() == (
        "# HELP smtp_a A number.\n# TYPE smtp_a counter\n"
        'smtp_a_total{worker="0",state="Idle"} 2.0 # {trace_id="ab"} 0.5 1.0\n'
        'smtp_a_total{worker="0"} 1\n'
        'smtp_a_total{worker="1",state="Idle"} 2.0 # {trace_id="ab"} 0.5 1.0\n'
        'smtp_a_total{worker="1"} 1\n'
        '# TYPE smtp_b gauge\nsmtp_b{worker="0"} 3.0\nsmtp_b{worker="1"} 3.0\n# EOF\n'
    )


def picture(**upstream: Any) -> dict[str, Any]:
    row = {
        "name": "provider", "address": "192.0.2.1:25", "tls": "off", "idle": 1, "busy": 0, "limit": 20, "waiting": 0,
        "breaker": "closed", "retry_seconds": None, "last_success_seconds": None, "last_failure_seconds": None,
        "last_failure": None, **upstream,
    }  # fmt: skip
    counters = {"connections_open": 0, "connections_accepted": 0, "connections_refused": {}, "transactions": {}}
    return {"not_ready": {}, "counters": counters, "connections": [], "upstreams": [row], "traces_version": 1}


def test_of_an_upstream_the_worst_breaker_and_the_last_event_are_shown() -> None:
    pictures = {
        0: picture(last_success_seconds=9.0, last_failure_seconds=50.0, last_failure="upstream_tls"),
        1: picture(breaker="open", retry_seconds=4.0, last_failure_seconds=2.0, last_failure="upstream_unavailable"),
        2: picture(breaker="half-open", last_success_seconds=7.0),
    }
    (row,) = merged_pictures(pictures, connections_shown=10)["upstreams"]
    assert (row["breaker"], row["retry_seconds"]) == ("open", 4.0)
    assert (row["last_failure_seconds"], row["last_failure"]) == (2.0, "upstream_unavailable")
    assert row["last_success_seconds"] == 7.0
    assert (row["idle"], row["limit"]) == (3, 60)


def test_errors_come_first_and_no_more_than_are_shown() -> None:
    def summary(number: int, severity: str) -> dict[str, Any]:
        return {"trace_id": f"{number}", "severity": severity, "end_unix_milliseconds": number, "spans": 1}

    one = {"traces": [summary(1, "failed"), summary(4, "ok")], "by_severity": {"failed": 1, "ok": 1}}
    other = {"traces": [summary(2, "refused"), summary(3, "failed")], "by_severity": {"refused": 1, "failed": 1}}
    found = [
        {"found": 2, "held": 9, "notes": ["a"], "complete_since_unix_milliseconds": 5, **one},
        {"found": 2, "held": 1, "notes": ["a"], "complete_since_unix_milliseconds": 7, **other},
    ]
    merged = merged_searches(found, is_errors_first=True, shown=slice(0, 3))
    assert [trace["trace_id"] for trace in merged["traces"]] == ["3", "1", "2"]
    assert (merged["found"], merged["held"]) == (4, 10)
    assert merged["by_severity"] == {"failed": 2, "ok": 1, "refused": 1}
    assert merged["notes"] == ["a"]
    assert merged["complete_since_unix_milliseconds"] == 7, "what is older may be missing from one of them"
    newest = merged_searches(found, is_errors_first=False, shown=slice(1, 3))
    assert [trace["trace_id"] for trace in newest["traces"]] == ["3", "2"]


async def test_a_process_that_hangs_delays_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        siblings = Siblings(0, {1: silent.getsockname()[1]}, TOKEN, answer_seconds=0.2)
        try:
            assert await siblings.ask("/readyz") == {}
        finally:
            await siblings.close()


@pytest.mark.parametrize(
    ("status", "body"), [("200 OK", b"{"), ("200 OK", b"\xff"), ("403 Forbidden", b"{}")], ids=["cut", "octets", "403"]
)
async def test_an_answer_that_is_no_siblings_is_none(status: str, body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as foreign:
        number = foreign.sockets[0].getsockname()[1]
        first = Port(siblings=Siblings(0, {1: number}, TOKEN))
        shown = first.start()
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{shown.port}", trust_env=False) as client:
                for path in ("/readyz", "/api/status", "/api/connections", "/api/upstreams", "/api/traces"):
                    assert (await client.get(path)).status_code == 200, path
                assert (await client.get(f"/api/traces/{0xD:032x}")).status_code == 404
        finally:
            await first.server.stop()
