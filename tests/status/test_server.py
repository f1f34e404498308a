"""The status port over real sockets: probes, who may see what, the stream, and its end."""

import asyncio
import contextlib
import gc
import ipaddress
import json
import signal
import socket
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import httpx
import pytest
from starlette.responses import PlainTextResponse

from otel_smtp.gateway.ports import bind
from otel_smtp.observing import ConnectionInfo, ConnectionRecord, Endpoint
from otel_smtp.smtp.states import ConnState, StateMachine
from otel_smtp.status import answers as status_answers
from otel_smtp.status import http as status_http
from otel_smtp.status import server as status_server
from otel_smtp.status.http import Guard
from otel_smtp.status.live import LiveView
from otel_smtp.status.server import StatusServer
from otel_smtp.status.traces import RecentTraces
from otel_smtp.status.views import QueuedMessage, QueueView, UpstreamView
from tests.support.spans import START, mail_trace
from tests.support.waiting import until

LOOPBACK = Endpoint("127.0.0.1", 0)


def metrics(accept: str) -> tuple[bytes, str]:
    return b"smtp_server_probes_total 1\n", "application/openmetrics-text" if "openmetrics" in accept else "text/plain"


async def queue() -> QueueView:
    message = QueuedMessage("01J", "due", 60.0, 2, 1, ("example.net",), 30.0, "451 4.4.1", "ab" * 16)
    return QueueView({"due": 1}, 60.0, [message])


class Port:
    """A running status port, what it shows, and a client."""

    def __init__(self, **settings: Any) -> None:
        self._address = settings.pop("address", LOOPBACK)
        self.live = LiveView(shown_host=str, shown_name=str)
        self.traces = RecentTraces()
        self.not_ready: dict[str, str] = {}
        self.server = StatusServer(
            live=self.live,
            traces=self.traces,
            checks={"listeners": lambda: self.not_ready.get("listeners"), "spool": lambda: self.not_ready.get("spool")},
            metrics=settings.pop("metrics", metrics),
            upstreams=lambda: [UpstreamView("provider", "192.0.2.1:587", "starttls", idle=1, busy=2, limit=20)],
            **settings,
        )

    def start(self) -> Endpoint:
        """Serve, at the address or at one on the loopback."""
        return self.server.start(bind(self._address))

    def connection(self, number: int = 1) -> StateMachine:
        info = ConnectionInfo(f"{number:032x}", Endpoint("192.0.2.7", number), Endpoint("127.0.0.1", 2525), "local")
        now_ns = time.monotonic_ns()
        record = ConnectionRecord(info, now_ns, time.time_ns() - now_ns)
        self.live.connection_opened(record)
        machine = StateMachine(record.transitions)
        machine.now_ns = now_ns
        machine.enter(ConnState.NEW)
        return machine


@contextlib.asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[tuple[Port, httpx.AsyncClient]]:
    port = Port(**settings)
    address = port.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{address.port}", trust_env=False, timeout=5) as client:
        try:
            yield port, client
        finally:
            await port.server.stop()


async def test_livez_answers_while_the_loop_turns() -> None:
    async with running() as (_, client):
        answer = await client.get("/livez")
    assert (answer.status_code, answer.json()["status"]) == (200, "alive")


async def test_readyz_names_the_reason() -> None:
    async with running() as (port, client):
        ready = await client.get("/readyz")
        port.not_ready["spool"] = "the disk is full"
        refused = await client.get("/readyz")
        alive = await client.get("/livez")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "reasons": {}})
    assert (refused.status_code, refused.json()) == (
        503,
        {"status": "not ready", "reasons": {"spool": "the disk is full"}},
    )
    assert alive.status_code == 200, "a gateway that cannot take mail is not to be killed for it"


async def test_metrics_come_in_the_form_that_was_asked_for() -> None:
    async with running() as (_, client):
        answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert answer.text == "smtp_server_probes_total 1\n"
    assert answer.headers["content-type"] == "application/openmetrics-text"


async def test_the_api_shows_connections_upstreams_and_queue() -> None:
    async with running(queue=queue, trace_url="http://jaeger/trace/{trace_id}") as (port, client):
        port.connection().enter(ConnState.ACTIVE)
        connections = (await client.get("/api/connections")).json()["connections"]
        upstreams = (await client.get("/api/upstreams")).json()["upstreams"]
        queued = (await client.get("/api/queue")).json()["queue"]
        status = (await client.get("/api/status")).json()
    assert [row["state"] for row in connections] == ["Active"]
    assert (upstreams[0]["name"], upstreams[0]["breaker"]) == ("provider", "closed")
    assert queued["messages"][0]["spool_id"] == "01J"
    assert status["counters"]["connections_open"] == 1
    assert status["trace_url"] == "http://jaeger/trace/{trace_id}"


async def test_without_a_spool_there_is_no_queue() -> None:
    async with running() as (_, client):
        assert (await client.get("/api/queue")).json() == {"queue": None}


async def test_the_newest_come_first_unless_errors_are_asked_for() -> None:
    async with running() as (port, client):
        for number, failed in enumerate([False, True, False], start=1):
            for span in mail_trace(number, has_failed=failed):
                port.traces.add([span])
        for span in mail_trace(4, states="New Active Error Closed"):
            port.traces.add([span])
        for span in mail_trace(5, outcome="aborted"):
            port.traces.add([span])
        errors_first = (await client.get("/api/traces", params={"order": "errors"})).json()
        newest_first = (await client.get("/api/traces")).json()
        errors = (await client.get("/api/traces", params={"only": "errors"})).json()
        found = (await client.get("/api/traces", params={"q": "FAILED provider"})).json()

    def numbers(answer: Any) -> list[int]:
        return [int(trace["trace_id"], 16) for trace in answer["traces"]]

    assert numbers(errors_first) == [2, 4, 5, 3, 1]
    assert numbers(newest_first) == [5, 4, 3, 2, 1]
    assert numbers(errors) == [4, 2]
    assert numbers(found) == [2]
    assert errors_first["by_severity"] == errors["by_severity"] == {"failed": 1, "refused": 1, "aborted": 1, "ok": 2}
    assert (errors["found"], errors["held"]) == (2, 5)


async def test_a_search_says_what_it_cannot_find() -> None:
    async with running(untraced="half of the mails have none") as (_, client):
        assert (await client.get("/api/traces")).json()["notes"] == ["half of the mails have none"]


async def test_pages_do_not_move_while_traces_come() -> None:
    second_ns = 1_000_000_000
    async with running() as (port, client):
        for number in range(1, 251):
            for span in mail_trace(number, start_ns=START + number * second_ns):
                port.traces.add([span])
        first = (await client.get("/api/traces")).json()
        until = first["traces"][0]["end_unix_milliseconds"]
        for span in mail_trace(999, start_ns=START + 999 * second_ns):
            port.traces.add([span])
        pages = [
            (await client.get("/api/traces", params={"skip": skip, "until": until})).json()
            for skip in (0, 100, 200, 300)
        ]
        newest = (await client.get("/api/traces")).json()
    numbers = [[int(trace["trace_id"], 16) for trace in page["traces"]] for page in pages]
    assert [len(page) for page in numbers] == [100, 100, 50, 0]
    assert [number for page in numbers for number in page] == list(range(250, 0, -1))
    assert int(newest["traces"][0]["trace_id"], 16) == 999


@pytest.mark.parametrize(
    "parameters", ["skip=-1", "skip=x", "skip=nan", "until=x", "until=nan", "most=-1", "only=x&order=x"]
)
async def test_nonsense_counts_as_absent(parameters: str) -> None:
    async with running() as (port, client):
        for span in mail_trace(1):
            port.traces.add([span])
        answer = await client.get(f"/api/traces?{parameters}")
    assert (answer.status_code, answer.json()["found"]) == (200, 1)


async def test_a_long_search_lets_mail_through_between_traces() -> None:
    async with running() as (port, client):
        for number in range(1, 301):
            for span in mail_trace(number):
                port.traces.add([span])
        turns = 0
        is_searching = True

        async def mail() -> None:
            nonlocal turns
            while is_searching:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(mail())
        answer = (await client.get("/api/traces")).json()
        is_searching = False
        await other
    assert (len(answer["traces"]), answer["found"]) == (100, 300)
    assert turns >= 300 // 32


async def test_one_trace_is_given_in_full_and_an_unknown_one_is_not_found() -> None:
    async with running(resource={"service.name": "gateway"}) as (port, client):
        for span in mail_trace(0xAB):
            port.traces.add([span])
        known = await client.get("/api/traces/ab")
        unknown = await client.get("/api/traces/ac")
    [resource_spans] = known.json()["resourceSpans"]
    assert resource_spans["resource"]["attributes"][0]["value"] == {"stringValue": "gateway"}
    assert len(resource_spans["scopeSpans"][0]["spans"]) == 3
    assert unknown.status_code == 404


async def test_every_answer_binds_the_browser() -> None:
    async with running() as (_, client):
        for path in ("/", "/page.css", "/page.js", "/icon.svg", "/livez", "/api/traces", "/nowhere"):
            answer = await client.get(path)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy, path
            assert "unsafe" not in policy, path
            assert answer.headers["x-content-type-options"] == "nosniff", path
            assert answer.headers["cache-control"] == "no-store", path


async def test_nothing_can_be_written() -> None:
    async with running() as (_, client):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (await client.request(method, "/api/connections")).status_code == 405, method


@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        ("127.0.0.1:9925", True),
        ("127.0.0.1", True),
        ("[::1]:9925", True),
        ("[::1]", True),
        ("localhost:9925", True),
        ("LOCALHOST", True),
        ("gateway.localhost:9925", True),
        ("10.1.2.3:9925", True),  # a probe to a pod's address; no name is rebound to it
        ("evil.example", False),
        ("evil.example:9925", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
async def test_a_loopback_port_answers_to_no_foreign_name(host: str, is_answered: bool) -> None:
    async with running() as (_, client):
        for path in ("/", "/readyz", "/api/connections"):
            status = (await client.get(path, headers={"host": host})).status_code
            assert (status != 421) is is_answered, path


@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        ("127.0.0.1:9925", True),
        ("10.1.2.3", True),
        ("localhost:9925", True),
        ("gateway.mail.svc:9925", True),
        ("GATEWAY.mail.svc.", True),
        ("evil.example:9925", False),
        ("gateway.mail.svc.evil.example", False),
        ("", False),
    ],
)
async def test_an_exposed_port_shows_the_page_by_its_own_names_alone(host: str, is_answered: bool) -> None:
    async with running(address=Endpoint("0.0.0.0", 0), hosts=["gateway.mail.svc"]) as (_, client):
        for path in ("/", "/page.js", "/api/traces", "/api/connections"):
            status = (await client.get(path, headers={"host": host})).status_code
            assert status == (200 if is_answered else 421), path
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await client.get(path, headers={"host": host})).status_code == 200, path


async def test_an_exposed_port_shows_probes_and_metrics_to_everybody_and_the_page_to_listed_networks() -> None:
    elsewhere = [ipaddress.ip_network("192.0.2.0/24")]
    async with running(address=Endpoint("0.0.0.0", 0), allow=elsewhere) as (_, client):
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await client.get(path, headers={"host": "gateway.mail.svc"})).status_code == 200, path
        for path in ("/", "/page.js", "/api/status", "/api/connections", "/api/traces", "/api/stream"):
            assert (await client.get(path)).status_code == 403, path
            assert (await client.get(path, headers={"x-forwarded-for": "192.0.2.1"})).status_code == 403, path
    async with running(address=Endpoint("0.0.0.0", 0)) as (_, client):
        assert (await client.get("/api/connections")).status_code == 200


@pytest.mark.parametrize(
    ("client", "status"),
    [("192.0.2.1", 200), ("::ffff:192.0.2.1", 200), ("::ffff:192.0.3.1", 403), ("fe80::1%eth0", 200), ("fe81::1", 403)],
)
async def test_a_network_of_clients_includes_their_mapped_and_scoped_addresses(client: str, status: int) -> None:
    allow = [ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("fe80::/16")]
    guard = Guard(PlainTextResponse("shown"), allow, is_loopback=False, token="", hosts=["gateway"])
    transport = httpx.ASGITransport(guard, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as browser:
        assert (await browser.get("/")).status_code == status


async def test_ipv6_loopback_is_served() -> None:
    port = Port(address=Endpoint("::1", 0))
    address = port.start()
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://{address}/api/connections")).status_code == 200
    finally:
        await port.server.stop()


async def next_picture(lines: AsyncIterator[str]) -> Any:
    async with asyncio.timeout(5):
        async for line in lines:
            if line.startswith("data: "):
                return json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended")


async def test_the_stream_sends_changes_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_server, "STREAM_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(status_server, "UNVERSIONED_SECONDS", 0.01)
    async with running() as (port, client), client.stream("GET", "/api/stream") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        assert (await next_picture(lines))["connections"] == []
        machine = port.connection()
        assert [row["state"] for row in (await next_picture(lines))["connections"]] == ["New"]
        machine.enter(ConnState.ACTIVE)
        assert [row["state"] for row in (await next_picture(lines))["connections"]] == ["Active"]
        port.not_ready["listeners"] = "draining"
        assert (await next_picture(lines))["not_ready"] == {"listeners": "draining"}


async def test_streams_are_bounded_and_a_closed_one_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_server, "STREAMS", 1)
    monkeypatch.setattr(status_server, "STREAM_INTERVAL_SECONDS", 0.01)
    async with running() as (_, client):
        async with client.stream("GET", "/api/stream") as stream:
            await next_picture(stream.aiter_lines())
            assert (await client.get("/api/stream")).status_code == 503
        async with asyncio.timeout(5):
            while True:
                async with client.stream("GET", "/api/stream") as again:
                    if again.status_code == 200:
                        await next_picture(again.aiter_lines())
                        break


async def end_of(sock: socket.socket) -> bytes:
    """What is read from `sock` until the far end closes it, b"reset" where it does so rudely."""
    sock.setblocking(False)
    try:
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(sock, 100)
    except ConnectionResetError:
        return b"reset"


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_http, "REQUEST_SECONDS", 0.05)
    port = Port()
    address = port.start()
    for sent in (b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
        with socket.create_connection((address.host, address.port)) as sock:
            sock.sendall(sent)
            assert await end_of(sock) == b""
    await port.server.stop()


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(address: Endpoint, stack: contextlib.ExitStack, *, source: str = "127.0.0.1") -> socket.socket:
    return stack.enter_context(socket.create_connection((address.host, address.port), source_address=(source, 0)))


async def test_beyond_the_bound_the_oldest_that_asks_nothing_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_http, "HTTP_CONNECTIONS", 3)
    port = Port()
    address = port.start()
    with contextlib.ExitStack() as stack:
        stream = connect(address, stack)
        stream.sendall(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await end_of(stream)).startswith(b"HTTP/1.1 200")
        oldest, silent, latest = (connect(address, stack) for _ in range(3))
        assert await end_of(oldest) in (b"", b"reset")
        for sock in (silent, latest):
            sock.sendall(LIVEZ)
            assert (await end_of(sock)).startswith(b"HTTP/1.1 200")
    await port.server.stop()


async def test_one_client_has_its_share_of_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_http, "HTTP_CONNECTIONS_PER_CLIENT", 2)
    port = Port()
    address = port.start()
    with contextlib.ExitStack() as stack:
        other = connect(address, stack, source="127.0.0.2")
        flood = [connect(address, stack) for _ in range(9)]
        for sock in flood[:-2]:
            assert await end_of(sock) in (b"", b"reset")
        for sock in (*flood[-2:], other):
            sock.sendall(LIVEZ)
            assert (await end_of(sock)).startswith(b"HTTP/1.1 200")
    await port.server.stop()


async def test_probes_are_answered_however_many_connections_are_silent() -> None:
    port = Port()
    address = port.start()
    with contextlib.ExitStack() as stack:
        for number in range(20):
            for _ in range(10):
                connect(address, stack, source=f"127.0.0.{number % 5 + 1}")
            for path in (b"/livez", b"/readyz"):
                probe = connect(address, stack)
                probe.sendall(LIVEZ.replace(b"/livez", path))
                assert (await end_of(probe)).startswith(b"HTTP/1.1 200")
    await port.server.stop()


async def test_an_answer_that_is_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_http, "ANSWER_SECONDS", 0.2)
    loop, given_up = asyncio.get_running_loop(), asyncio.Event()
    abort = status_http._BoundedProtocol._abort_if_unread

    def noted(self: Any) -> None:
        abort(self)
        loop.call_soon_threadsafe(given_up.set)

    monkeypatch.setattr(status_http._BoundedProtocol, "_abort_if_unread", noted)

    async def queue_of_many() -> QueueView:
        return QueueView({"due": 1}, 60.0, [*(await queue()).messages] * 50_000)

    port = Port(queue=queue_of_many)
    address = port.start()
    with contextlib.ExitStack() as stack:
        sock = connect(address, stack)
        sock.sendall(b"GET /api/queue HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sock.setblocking(False)
        received = b""
        async with asyncio.timeout(60):
            await given_up.wait()  # it reads too late
            with contextlib.suppress(ConnectionError):
                while data := await loop.sock_recv(sock, 1 << 20):
                    received += data
    assert not received.endswith(b"}")
    await port.server.stop()


async def test_a_connection_that_is_over_is_kept_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else who connects and goes, thousands of times a second, fills the memory within the time for an answer.
    made: list[weakref.ref[object]] = []
    begin = status_http._BoundedProtocol.connection_made

    def noted(self: Any, transport: Any) -> None:
        begin(self, transport)
        made.append(weakref.ref(self))

    monkeypatch.setattr(status_http._BoundedProtocol, "connection_made", noted)
    port = Port()
    address = port.start()
    for number in range(3):
        with contextlib.ExitStack() as stack:
            connect(address, stack)
            await until(lambda: len(made) > number)  # noqa: B023 - awaited here
    await until(lambda: gc.collect() >= 0 and not any(each() for each in made))
    await port.server.stop()


async def test_what_is_read_again_within_a_second_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_answers, "KEPT_SECONDS", 60.0)
    made = []

    def counted(accept: str) -> tuple[bytes, str]:
        made.append(accept)
        return b"smtp_server_probes_total 1\n", "text/plain"

    async with running(metrics=counted) as (port, client):
        pages = await asyncio.gather(*(client.get("/metrics", headers={"accept": "text/plain"}) for _ in range(8)))
        assert {page.text for page in pages} == {"smtp_server_probes_total 1\n"}
        assert made == ["text/plain"]
        assert len({tuple(page.headers.multi_items()) for page in pages}) == 1
        await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert len(made) == 2
        assert (await client.get("/api/connections")).json()["connections"] == []
        port.connection()
        assert (await client.get("/api/connections")).json()["connections"] == []
        assert len((await client.get("/api/connections?again")).json()["connections"]) == 1
        port.not_ready["spool"] = "the disk is full"
        assert (await client.get("/readyz")).status_code == 503  # which is never kept
        await client.post("/api/connections")  # a client that has changed something sees the result
        assert len((await client.get("/api/connections")).json()["connections"]) == 1


async def test_what_is_kept_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_answers, "KEPT_SECONDS", 0.02)
    async with running() as (port, client):
        assert (await client.get("/api/connections")).json()["connections"] == []
        port.connection()
        async with asyncio.timeout(5):
            while not (await client.get("/api/connections")).json()["connections"]:
                pass


async def test_requests_beyond_the_pace_wait_and_probes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_answers, "REQUESTS_PER_SECOND", 0.01)
    monkeypatch.setattr(status_answers, "REQUESTS_AT_ONCE", 3)
    async with running() as (_, client):
        for _ in range(3):
            assert (await client.get("/page.css")).status_code == 200
        waiting = [asyncio.create_task(client.get(path)) for path in ("/page.css", "/metrics", "/api/traces")]
        for path in ("/livez", "/readyz", "/livez"):
            assert (await client.get(path)).status_code == 200
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()


async def test_signals_stay_the_gateways() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    async with running() as (_, client):
        await client.get("/livez")
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


async def test_it_stops_although_somebody_still_watches() -> None:
    port = Port()
    address = port.start()
    async with (
        httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client,
        client.stream("GET", "/api/stream") as stream,
    ):
        lines = stream.aiter_lines()
        await next_picture(lines)
        async with asyncio.timeout(5):
            await port.server.stop()
        assert [line async for line in lines if line.startswith("data: ")] == []
    await port.server.stop()


async def test_a_broken_check_is_a_reason_without_details() -> None:
    def broken() -> str | None:
        raise RuntimeError("secret")

    server = StatusServer(
        live=LiveView(shown_host=str, shown_name=str), traces=RecentTraces(),
        checks={"broken": broken}, metrics=metrics,
    )  # fmt: skip
    address = server.start(bind(LOOPBACK))
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://{address}/readyz")
        assert answer.status_code == 503
        assert answer.json()["reasons"] == {"broken": "the check failed: internal error"}
    finally:
        await server.stop()


async def test_metrics_that_cannot_be_read_are_an_answer_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    def broken(accept: str) -> tuple[bytes, str]:
        raise RuntimeError("secret")

    async with running(metrics=broken) as (_, client):
        answers = [await client.get("/metrics") for _ in range(2)]
    for answer in answers:
        assert (answer.status_code, answer.text) == (
            503, "the metrics cannot be read: internal error, the log says why\n"
        )  # fmt: skip
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_upstreams_that_cannot_be_shown_take_nothing_else_with_them() -> None:
    def broken() -> list[UpstreamView]:
        raise RuntimeError("a fault")

    async with running() as (port, client):
        port.server._upstreams = broken
        port.connection()
        status = await client.get("/api/status")
        connections = (await client.get("/api/connections")).json()["connections"]
        upstreams = (await client.get("/api/upstreams")).json()["upstreams"]
    assert (status.status_code, len(connections), upstreams) == (200, 1, [])


class Unreadable:
    """A span that was kept and cannot be read."""

    def __init__(self, trace_id: int) -> None:
        self.trace_id = trace_id.to_bytes(16, "big")
        self.spans = 1

    def __len__(self) -> int:
        return 1

    def to_records(self) -> NoReturn:
        raise ValueError("a fault")


async def test_a_trace_that_cannot_be_read_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (port, client):
        port.traces.add(mail_trace(1))
        port.traces.add([Unreadable(2)])
        port.traces.add([*mail_trace(3), Unreadable(3)])
        for _ in range(2):
            found = (await client.get("/api/traces")).json()
            assert [trace["trace_id"] for trace in found["traces"]] == [f"{number:032x}" for number in (3, 1)]
            assert [trace["dropped_spans"] for trace in found["traces"]] == [1, 0]
            assert found["notes"] == ["1 of the traces in memory cannot be read: the log says why"]
        shown = (await client.get(f"/api/traces/{3:032x}")).json()
    [scope] = shown["resourceSpans"][0]["scopeSpans"]
    assert len(scope["spans"]) == 3
    assert len(caplog.records) == 2, "one line for spans, one for traces"


async def test_an_oldest_trace_that_cannot_be_read_fails_no_search() -> None:
    async with running() as (port, client):
        port.traces = RecentTraces(recent_spans=4)
        port.server._trace_search._traces = port.traces
        port.traces.add([Unreadable(1)] * 4)
        port.traces.add(mail_trace(2))
        assert (await client.get("/api/traces")).status_code == 200
