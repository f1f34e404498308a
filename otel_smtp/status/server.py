"""The status port: probes, metrics, the page and what it reads. Read-only, without secrets or content.

It lives on the event loop of the mail and must not be felt there. Nothing here is told of anything: the page's stream
looks at two version numbers a few times a second, makes one text for all who watch, and long searches give the loop
back between traces. What a stranger could hold open is bounded in number and time.

Probes and metrics answer everybody who reaches the port. The page and its API show who sends mail to where, so they
answer only listed networks (loopback, unless the operator says otherwise), and a loopback port answers only to its own
name: a web page that rebinds its name to 127.0.0.1 reads nothing.

Importing this module loads the HTTP library (a fifth of a second); whoever runs without a status port need not.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any, Final
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from otel_smtp.observing import Endpoint
from otel_smtp.status import siblings as several
from otel_smtp.status.live import CONNECTIONS_SHOWN, LiveView
from otel_smtp.status.siblings import TOKEN_HEADER, Siblings
from otel_smtp.status.traces import AttributeValue, EncodedSpan, RecentTraces, Severity
from otel_smtp.status.views import QueueView, UpstreamView

logger: Final = logging.getLogger("otel_smtp.status.server")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOOPBACK: Final[Sequence[Network]] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

# What people and probes need at once, several times over; a quarter of the gateway's own default of 256.
HTTP_CONNECTIONS: Final = 64
STREAMS: Final = 16
# A request is one packet; who has not sent one by then is not a probe.
REQUEST_SECONDS: Final = 10.0
# An eye sees two changes a second; the heartbeat is below the minute at which proxies give up on silence.
STREAM_INTERVAL_SECONDS: Final = 0.5
# Upstreams and readiness have no version: a stream asks them again this often.
UNVERSIONED_SECONDS: Final = 1.0
HEARTBEAT_SECONDS: Final = 15.0
STOP_SECONDS: Final = 1
TRACES_SHOWN: Final = 100
# Traces looked at before mail gets its turn: a summary takes up to 0.1 ms when it is worked out.
_SEARCH_STRIDE: Final = 32
_GROUP_STRIDE: Final = 2000  # spans; half a millisecond
_QUERY_CHARACTERS: Final = 200

# The page loads what the package brings and nothing else; a peer's text that slipped through could run nothing.
_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_PAGE: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("page", "connections", "draw", "places", "traces", "waterfall")
    },
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/metrics"})


class StatusServer:
    """Serves the status port on the running event loop.

    Args:
        address: where to listen; port 0 lets the kernel choose.
        live: the open connections.
        traces: the recent traces.
        checks: name -> what is asked at `/readyz`: why the gateway is not ready, or None. Called often, so a check
            tells what is known already (cached) and never waits.
        metrics: given the request's Accept header, the exposition and its content type.
        upstreams: the upstreams now; never waits.
        queue: the spool now; None where there is none.
        resource: OpenTelemetry resource attributes, for the traces given out.
        trace_url: where a backend shows a trace: a URL with `{trace_id}` in it; "" for none.
        allow: networks that may see the page and its API.
        about: what the page's head says of this gateway: its `hostname`, and whatever else, each with its name.
        siblings: the gateway's other processes, of which all answers tell too; None: there are none, or another process
            asks this one.
        token: only who gives it in `TOKEN_HEADER` is answered; "": everybody is.
        reuse_port: a process that takes this one's place listens on the same port for a while.
    """

    def __init__(
        self,
        address: Endpoint,
        *,
        live: LiveView,
        traces: RecentTraces,
        checks: Mapping[str, Callable[[], str | None]],
        metrics: Callable[[str], tuple[bytes, str]],
        upstreams: Callable[[], Sequence[UpstreamView]] = lambda: (),
        queue: Callable[[], Awaitable[QueueView]] | None = None,
        resource: Mapping[str, AttributeValue] | None = None,
        trace_url: str = "",
        allow: Sequence[Network] = LOOPBACK,
        about: Mapping[str, str] | None = None,
        siblings: Siblings | None = None,
        token: str = "",
        reuse_port: bool = False,
    ) -> None:
        self._address = address
        self._live = live
        self._traces = traces
        self._checks = checks
        self._metrics = metrics
        self._upstreams = upstreams
        self._queue = queue
        self._resource = resource or {"service.name": "otel-smtp"}
        self._trace_url = trace_url
        self._allow = allow
        self._about = about or {}
        self._siblings = siblings
        self._token = token
        self._reuse_port = reuse_port
        self._heard: Mapping[int, Mapping[str, Any]] = {}  # the siblings' pictures
        self._heard_at = float("-inf")
        self._started_at = time.monotonic()
        self._streams = 0
        self._picture: tuple[tuple[int, int, float, float], str] | None = None
        self._stopping = asyncio.Event()
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> Endpoint:
        """Listen.

        Returns:
            The address, with the port that the kernel chose.

        Raises:
            OSError: the address cannot be bound.
        """
        sock = _listening_socket(self._address, reuse_port=self._reuse_port)
        host, port = sock.getsockname()[:2]
        self._server = _Server(
            uvicorn.Config(
                self._application(is_loopback=ipaddress.ip_address(host).is_loopback),
                http=_BoundedProtocol,
                loop="none",
                ws="none",
                lifespan="off",
                interface="asgi3",
                # A client that names itself in X-Forwarded-For would name itself into the allowed networks.
                proxy_headers=False,
                server_header=False,
                date_header=False,
                access_log=False,
                log_config=None,
                log_level="warning",
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        self._serving = asyncio.create_task(self._serve(self._server, sock))
        return Endpoint(self._address.host, port)

    async def stop(self) -> None:
        """Stop listening and end all requests, within about a second. Safe to call twice, and before `start`."""
        self._stopping.set()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        if self._siblings is not None:
            await self._siblings.close()

    async def _serve(self, server: "_Server", sock: socket.socket) -> None:
        try:
            await server.serve([sock])
        except Exception:  # top of the task: mail goes on without its status port
            logger.exception("status port failed; mail is unaffected")
        finally:
            sock.close()

    def _application(self, *, is_loopback: bool) -> ASGIApp:
        routes = [
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/metrics", self._show_metrics),
            Route("/api/status", self._show_status),
            Route("/api/connections", self._show_connections),
            Route("/api/traces", self._search),
            Route("/api/traces/{trace_id}", self._show_trace),
            Route("/api/upstreams", self._show_upstreams),
            Route("/api/queue", self._show_queue),
            Route("/api/picture", self._show_picture),
            Route("/api/stream", self._stream),
            *(Route(path, _file(name, kind)) for path, (name, kind) in _PAGE.items()),
        ]
        return _Guard(Starlette(routes=routes), self._allow, is_loopback=is_loopback, token=self._token)

    # Probes and metrics

    async def _livez(self, request: Request) -> Response:
        return JSONResponse({"status": "alive", "uptime_seconds": self._uptime()})

    async def _readyz(self, request: Request) -> Response:
        reasons = self._not_ready()
        if self._siblings is not None:
            answers = await self._siblings.ask_json("/readyz", statuses=(200, 503))
            told = {number: answer["reasons"] for number, answer in answers.items()}
            reasons = several.merged_reasons({self._siblings.number: reasons, **told})
        return JSONResponse(
            {"status": "not ready" if reasons else "ready", "reasons": reasons}, status_code=503 if reasons else 200
        )

    async def _show_metrics(self, request: Request) -> Response:
        accept = request.headers.get("accept", "")
        text, content_type = self._metrics(accept)
        if self._siblings is not None:
            answers = await self._siblings.ask("/metrics", accept=accept)
            told = {number: page for number, (status, page) in answers.items() if status == 200}
            text = several.merged_metrics({self._siblings.number: text, **told})
        return Response(text, headers={"content-type": content_type})

    def _not_ready(self) -> Mapping[str, str]:
        return {name: reason for name, check in self._checks.items() if (reason := check()) is not None}

    def _uptime(self) -> float:
        return round(time.monotonic() - self._started_at, 1)

    # What the page reads

    async def _show_status(self, request: Request) -> Response:
        picture = await self._present_picture()
        return JSONResponse(
            {
                "about": self._about,
                "trace_url": self._trace_url,
                "uptime_seconds": self._uptime(),
                "now_unix_milliseconds": self._live.unix_milliseconds(self._live.clock()),
                "checks": list(self._checks),
                "not_ready": picture["not_ready"],
                "counters": picture["counters"],
                "has_queue": self._queue is not None,
            }
        )

    async def _show_connections(self, request: Request) -> Response:
        return JSONResponse({"connections": (await self._present_picture())["connections"]})

    async def _show_upstreams(self, request: Request) -> Response:
        return JSONResponse({"upstreams": (await self._present_picture())["upstreams"]})

    async def _show_picture(self, request: Request) -> Response:
        return JSONResponse(self._own_picture())

    async def _show_queue(self, request: Request) -> Response:
        return JSONResponse({"queue": None if self._queue is None else asdict(await self._queue())})

    async def _search(self, request: Request) -> Response:
        terms = request.query_params.get("q", "")[:_QUERY_CHARACTERS].lower().split()
        by_severity: dict[str, list[Mapping[str, Any]]] = {severity: [] for severity in Severity}
        newest: list[Mapping[str, Any]] = []
        held = await self._held_traces()
        for looked_at, (trace_id, spans) in enumerate(held.items()):
            if looked_at % _SEARCH_STRIDE == _SEARCH_STRIDE - 1:
                await asyncio.sleep(0)
            trace = self._traces.trace(trace_id, spans)
            if trace.matches(terms):
                summary = trace.summary()
                by_severity[summary["severity"]].append(summary)
                newest.append(summary)
        is_newest_first = request.query_params.get("order") == "newest"
        if not is_newest_first:
            newest = [summary for severity in Severity for summary in by_severity[severity]]
        answer = {
            "traces": newest[:TRACES_SHOWN],
            "found": len(newest),
            "held": len(held),
            "by_severity": {severity: len(summaries) for severity, summaries in by_severity.items()},
        }
        if self._siblings is not None:
            told = await self._siblings.ask_json(f"/api/traces?{request.url.query}")
            answer = several.merged_searches([answer, *told.values()], newest_first=is_newest_first, shown=TRACES_SHOWN)
        return JSONResponse(answer)

    async def _held_traces(self) -> Mapping[bytes, Sequence[EncodedSpan]]:
        """The spans held now by their trace, the newest first."""
        held: dict[bytes, list[EncodedSpan]] = {}
        spans = self._traces.spans()
        for start in range(0, len(spans), _GROUP_STRIDE):
            self._traces.group(spans[start : start + _GROUP_STRIDE], held)
            await asyncio.sleep(0)
        self._traces.forget_all_but(held)
        return held

    async def _show_trace(self, request: Request) -> Response:
        trace_id = request.path_params["trace_id"]
        trace = self._traces.get(trace_id)
        parts = [] if trace is None else [trace.otlp_json(self._resource)]
        if self._siblings is not None:
            # An application's trace may hold mails that several processes relayed.
            parts += (await self._siblings.ask_json(f"/api/traces/{quote(trace_id, safe='')}")).values()
        if not parts:
            return JSONResponse({"error": "no such trace here; it may have left this gateway's memory"}, 404)
        return JSONResponse({"resourceSpans": [spans for part in parts for spans in part["resourceSpans"]]})

    # The stream

    async def _stream(self, request: Request) -> Response:
        if self._streams >= STREAMS:
            return PlainTextResponse("too many streams\n", 503, headers={"retry-after": "10"})
        return StreamingResponse(self._events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _events(self) -> AsyncIterator[str]:
        if self._streams >= STREAMS:  # between the answer's first line and this, others may have come
            return
        self._streams += 1
        try:
            shown, shown_at = "", 0.0
            while not self._stopping.is_set():
                picture = await self._current_picture()
                now = time.monotonic()
                if picture != shown:
                    shown, shown_at = picture, now
                    yield f"event: picture\ndata: {picture}\n\n"
                elif now - shown_at > HEARTBEAT_SECONDS:
                    shown_at = now
                    yield ": still here\n\n"
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), STREAM_INTERVAL_SECONDS)
        finally:
            self._streams -= 1

    async def _current_picture(self) -> str:
        """The live part of the page as one line of JSON; made once for all streams, at most twice an interval."""
        if self._siblings is not None and time.monotonic() - self._heard_at >= UNVERSIONED_SECONDS:
            await self._hear(self._siblings)
        now = time.monotonic()
        picture = self._picture
        if picture is not None:
            (live, traces, heard_at, made_at), text = picture
            is_same = (live, traces, heard_at) == (self._live.version, self._traces.version, self._heard_at)
            if now - made_at < (UNVERSIONED_SECONDS if is_same else STREAM_INTERVAL_SECONDS / 2):
                return text
        text = json.dumps(self._whole_picture(), separators=(",", ":"))
        self._picture = ((self._live.version, self._traces.version, self._heard_at, now), text)
        return text

    async def _present_picture(self) -> Mapping[str, Any]:
        """The live part of the page as it is now."""
        if self._siblings is not None:
            await self._hear(self._siblings)
        return self._whole_picture()

    async def _hear(self, siblings: Siblings) -> None:
        self._heard_at = time.monotonic()  # first: whoever else shows a picture meanwhile need not ask too
        self._heard = await siblings.ask_json("/api/picture")

    def _whole_picture(self) -> Mapping[str, Any]:
        own = self._own_picture()
        if self._siblings is None:
            return own
        told = {self._siblings.number: own, **self._heard}
        silent = [number for number in self._siblings.numbers if number not in self._heard]
        return {**several.merged_pictures(told, connections_shown=CONNECTIONS_SHOWN), "silent_processes": silent}

    def _own_picture(self) -> Mapping[str, Any]:
        return {
            "not_ready": self._not_ready(),
            "counters": self._live.counters(),
            "connections": self._live.snapshot(),
            "upstreams": [asdict(upstream) for upstream in self._upstreams()],
            "traces_version": self._traces.version,
        }


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: SIGTERM belongs to the gateway's drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _BoundedProtocol(H11Protocol):
    """HTTP/1.1, bounded in connections and in the time until a request is complete.

    Who can reach the port could otherwise open connections and say nothing until the process has no file left for
    mail. Every answer closes its connection (`_Guard`), so there is one request to wait for.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        if len(self.connections) > HTTP_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(REQUEST_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        request: object = self.cycle  # None until there is one, which uvicorn's type does not say
        if request is None:
            self.transport.close()


class _Guard:
    """Asks of every request who it is and by which name; puts on every answer the headers that bind a browser."""

    def __init__(self, inner: ASGIApp, allow: Sequence[Network], *, is_loopback: bool, token: str) -> None:
        self._inner = inner
        self._token = token
        self._allow = allow
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS, (b"connection", b"close")]
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self._inner)(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        if self._is_loopback and not _is_own_name(request.headers.get("host", "")):
            return PlainTextResponse("this port answers to localhost or an address\n", 421)
        if self._token and not hmac.compare_digest(
            request.headers.get(TOKEN_HEADER, "").encode(), self._token.encode()
        ):
            return PlainTextResponse("this port is for the other processes of the gateway\n", 403)
        if request.url.path in _OPEN_PATHS:
            return None
        if request.client is None or not self._is_allowed(request.client.host):
            return PlainTextResponse("the page is shown to the networks of status.allow\n", 403)
        return None

    def _is_allowed(self, host: str) -> bool:
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._allow)


def _is_own_name(host: str) -> bool:
    """Whether a Host header names this machine by address or as localhost: what no foreign name can be rebound to."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _listening_socket(address: Endpoint, *, reuse_port: bool) -> socket.socket:
    family, kind, protocol, _, name = socket.getaddrinfo(
        address.host, address.port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(name)
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def _file(name: str, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("otel_smtp.status").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, headers={"content-type": content_type})

    return answer
