"""The status port: probes, metrics, the page and its API. Read-only, without secrets or content.

It shares the event loop with the mail and must not slow it. It polls: the page's stream compares two version numbers a
few times per second and makes one text for all watchers, and long searches yield to the loop between traces.

Probes and metrics are open to every client. The page and its API show who sends mail to whom, so they are open only to
listed networks (by default loopback), and only under the port's own names: a web page that rebinds its name to our
address reads nothing.

Importing this module loads the HTTP library, which takes a fifth of a second.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any, Final
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from otel_smtp.observing import Endpoint, Faults
from otel_smtp.status import siblings as several
from otel_smtp.status.acting import QueueActions
from otel_smtp.status.answers import STREAM_PATH, Answers
from otel_smtp.status.following import Following, Tail
from otel_smtp.status.http import LOOPBACK, Guard, Network, http_server
from otel_smtp.status.live import CONNECTIONS_SHOWN, LiveView
from otel_smtp.status.search import RecordedForm, RecordedMailbox
from otel_smtp.status.searching import SearchRequest, TraceSearch
from otel_smtp.status.siblings import Siblings
from otel_smtp.status.traces import AttributeValue, RecentTraces
from otel_smtp.status.views import QueueView, UpstreamView

logger: Final = logging.getLogger("otel_smtp.status.server")

STREAMS: Final = 16
# People can follow two changes per second. The heartbeat is below the minute after which proxies close a silent stream.
STREAM_INTERVAL_SECONDS: Final = 0.5
# Upstreams and readiness have no version: a stream asks for them this often.
UNVERSIONED_SECONDS: Final = 1.0
HEARTBEAT_SECONDS: Final = 15.0
_PAGE: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("page", "connections", "draw", "keys", "places", "traces", "waterfall")
    },
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class StatusServer:
    """Serves the status port on the running event loop.

    Args:
        live: the open connections.
        traces: the recent traces.
        checks: by name, returns why the gateway is not ready, or None, for `/readyz`. Called often, so a check returns
            present knowledge and never waits.
        metrics: takes the request's Accept header, returns the metrics page and its content type.
        upstreams: returns the upstreams now; never waits.
        queue: returns the spool now; None without one.
        actions: on the queue, if any.
        resource: OpenTelemetry resource attributes, for the traces that the API returns.
        trace_url: a backend's page for a trace: a URL with `{trace_id}` in it; "" for none.
        untraced: which mails have no trace, in words; "" if all have one.
        recorded_mailbox: converts a searched address to its form in spans.
        allow: networks that may see the page and its API.
        reloads: returns the process that takes SIGHUP, and the result of the last reload, as plain values.
        hosts: names of this port, besides IP addresses and localhost.
        about: the page's head: the gateway's `hostname` and other facts by name.
        tail: the lines of mails, for followers; None without any.
        siblings: the gateway's other processes, included in all answers; None: there are none, or another process
            asks this one.
        number: of this process.
        token: required in `TOKEN_HEADER`; "": none is.
    """

    def __init__(
        self,
        *,
        live: LiveView,
        traces: RecentTraces,
        checks: Mapping[str, Callable[[], str | None]],
        metrics: Callable[[str], tuple[bytes, str]],
        upstreams: Callable[[], Sequence[UpstreamView]] = lambda: (),
        queue: Callable[[], Awaitable[QueueView]] | None = None,
        actions: QueueActions | None = None,
        resource: Mapping[str, AttributeValue] | None = None,
        trace_url: str = "",
        untraced: str = "",
        recorded_mailbox: RecordedMailbox = RecordedForm,
        allow: Sequence[Network] = LOOPBACK,
        reloads: Callable[[], Mapping[str, Any]] = dict,
        hosts: Collection[str] = (),
        about: Mapping[str, str] | None = None,
        tail: Tail | None = None,
        siblings: Siblings | None = None,
        number: int = 0,
        token: str = "",
    ) -> None:
        self._live = live
        self._traces = traces
        self._checks = checks
        self._metrics = metrics
        self._upstreams = upstreams
        self._queue = queue
        self._actions = actions
        self._resource = resource or {"service.name": "otel-smtp"}
        self._trace_url = trace_url
        self._trace_search = TraceSearch(traces, recorded_mailbox, siblings, untraced=untraced)
        self._following = None if tail is None else Following(tail, recorded_mailbox, siblings, number=number)
        self._allow = allow
        self._reloads = reloads
        self._hosts = hosts
        self._about = about or {}
        self._siblings = siblings
        self._token = token
        self._faults = Faults(logger, "status port: answer incomplete, internal error")
        self._sibling_pictures: Mapping[int, Mapping[str, Any]] = {}  # by number
        self._asked_at = float("-inf")
        self._started_at = time.monotonic()
        self._streams = 0
        self._picture: tuple[tuple[int, int, float, float], str] | None = None
        self._stopping = asyncio.Event()
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def start(self, sock: socket.socket) -> Endpoint:
        """Serve on the running event loop.

        Args:
            sock: bound; the server closes it.

        Returns:
            Its address.
        """
        host, port = sock.getsockname()[:2]
        is_loopback = ipaddress.ip_address(host).is_loopback
        self._server = http_server(self._application(is_loopback=is_loopback))
        # At once, so that connections wait instead of being refused until the server's task runs.
        sock.listen()
        self._serving = asyncio.create_task(self._serve(self._server, sock))
        return Endpoint(host, port)

    async def stop(self) -> None:
        """Stop listening and end all requests, within about a second. Idempotent, also before `start`."""
        self._stopping.set()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        if self._following is not None:
            self._following.stop()
        if self._siblings is not None:
            await self._siblings.close()

    async def _serve(self, server: uvicorn.Server, sock: socket.socket) -> None:
        try:
            await server.serve([sock])
        except Exception:  # top of the task: mail is relayed without a status port
            logger.exception("status port failed; mail is unaffected")
        finally:
            sock.close()

    def _application(self, *, is_loopback: bool) -> ASGIApp:
        routes = [
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/metrics", self._show_metrics),
            Route("/api/status", self._show_status),
            Route("/api/reloads", self._show_reloads),
            Route("/api/connections", self._show_connections),
            Route("/api/traces", self._search),
            Route("/api/traces/{trace_id}", self._show_trace),
            Route("/api/tail", self._follow),
            Route("/api/upstreams", self._show_upstreams),
            Route("/api/queue", self._show_queue),
            Route("/api/queue/{command}", self._act, methods=["POST"]),
            Route("/api/picture", self._show_picture),
            Route(STREAM_PATH, self._stream),
            *(Route(path, _file(name, kind)) for path, (name, kind) in _PAGE.items()),
        ]
        answers = Answers(Starlette(routes=routes), keeps=not self._token)
        return Guard(answers, self._allow, is_loopback=is_loopback, token=self._token, hosts=self._hosts)

    # Probes and metrics

    async def _livez(self, request: Request) -> Response:
        return JSONResponse({"status": "alive", "uptime_seconds": self._uptime()})

    async def _readyz(self, request: Request) -> Response:
        reasons = self._not_ready()
        if self._siblings is not None:
            answers = await self._siblings.ask_json("/readyz", statuses=(200, 503))
            theirs = {number: answer["reasons"] for number, answer in answers.items()}
            reasons = several.merged_reasons({self._siblings.number: reasons, **theirs})
        return JSONResponse(
            {"status": "not ready" if reasons else "ready", "reasons": reasons}, status_code=503 if reasons else 200
        )

    async def _show_metrics(self, request: Request) -> Response:
        accept = request.headers.get("accept", "")
        try:
            text, content_type = self._metrics(accept)
        except Exception:  # noqa: BLE001 - logged once; a scraper can do nothing about it but tell
            self._faults.note("metrics")
            return PlainTextResponse("the metrics cannot be read: internal error, the log says why\n", 503)
        if self._siblings is not None:
            answers = await self._siblings.ask("/metrics", accept=accept)
            theirs = {number: page for number, (status, page) in answers.items() if status == 200}
            text = several.merged_metrics({self._siblings.number: text, **theirs})
        return Response(text, headers={"content-type": content_type})

    def _not_ready(self) -> Mapping[str, str]:
        reasons: dict[str, str] = {}
        for name, check in self._checks.items():
            try:
                reason = check()
            except Exception:  # noqa: BLE001 - logged once
                self._faults.note(name)
                reason = "the check failed: internal error"
            if reason is not None:
                reasons[name] = reason
        return reasons

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
                "may_act": self._actions is not None,
            }
        )

    async def _show_reloads(self, request: Request) -> Response:
        told = {0 if self._siblings is None else self._siblings.number: self._reloads()}
        if self._siblings is not None:
            answers = await self._siblings.ask_json("/api/reloads")
            told |= {number: answer["processes"][0] for number, answer in answers.items()}
        return JSONResponse({"processes": [told[number] for number in sorted(told)]})

    async def _show_connections(self, request: Request) -> Response:
        return JSONResponse({"connections": (await self._present_picture())["connections"]})

    async def _show_upstreams(self, request: Request) -> Response:
        return JSONResponse({"upstreams": (await self._present_picture())["upstreams"]})

    async def _show_picture(self, request: Request) -> Response:
        return JSONResponse(self._own_picture())

    async def _show_queue(self, request: Request) -> Response:
        return JSONResponse({"queue": None if self._queue is None else asdict(await self._queue())})

    async def _act(self, request: Request) -> Response:
        if self._actions is None:
            return JSONResponse({"error": "read-only: no status.token_file is set, or there is no queue"}, 403)
        return await self._actions.answer(request.path_params["command"], request)

    async def _search(self, request: Request) -> Response:
        return JSONResponse(await self._trace_search.answer(SearchRequest.of(request.query_params)))

    async def _follow(self, request: Request) -> Response:
        following = self._following
        if following is None:
            return PlainTextResponse("nothing is made of mails here: OTEL_SDK_DISABLED is set\n", 503)
        if following.is_full:
            return PlainTextResponse("too many follow already\n", 503, headers={"retry-after": "10"})
        return JSONResponse(await following.answer(request.query_params, self._stopping))

    async def _show_trace(self, request: Request) -> Response:
        trace_id = request.path_params["trace_id"]
        trace = self._traces.get(trace_id)
        parts = [] if trace is None else [trace.otlp_json(self._resource)]
        if self._siblings is not None:
            # An application's trace may have mails that several processes relayed.
            parts += (await self._siblings.ask_json(f"/api/traces/{quote(trace_id, safe='')}")).values()
        if not parts:
            return JSONResponse({"error": "no such trace in memory"}, 404)
        return JSONResponse({"resourceSpans": [spans for part in parts for spans in part["resourceSpans"]]})

    # The stream

    async def _stream(self, request: Request) -> Response:
        if self._streams >= STREAMS:
            return PlainTextResponse("too many streams\n", 503, headers={"retry-after": "10"})
        return StreamingResponse(self._events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _events(self) -> AsyncIterator[str]:
        if self._streams >= STREAMS:  # others may have come since the first check
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
        """The live part of the page as one line of JSON, made once for all streams and at most twice per interval."""
        if self._siblings is not None and time.monotonic() - self._asked_at >= UNVERSIONED_SECONDS:
            await self._ask_siblings(self._siblings)
        now = time.monotonic()
        picture = self._picture
        if picture is not None:
            (live, traces, asked_at, made_at), text = picture
            is_same = (live, traces, asked_at) == (self._live.version, self._traces.version, self._asked_at)
            if now - made_at < (UNVERSIONED_SECONDS if is_same else STREAM_INTERVAL_SECONDS / 2):
                return text
        text = json.dumps(self._whole_picture(), separators=(",", ":"))
        self._picture = ((self._live.version, self._traces.version, self._asked_at, now), text)
        return text

    async def _present_picture(self) -> Mapping[str, Any]:
        """The live part of the page as it is now."""
        if self._siblings is not None:
            await self._ask_siblings(self._siblings)
        return self._whole_picture()

    async def _ask_siblings(self, siblings: Siblings) -> None:
        self._asked_at = time.monotonic()  # first, so that another request for a picture need not ask too
        self._sibling_pictures = await siblings.ask_json("/api/picture")

    def _whole_picture(self) -> Mapping[str, Any]:
        own = self._own_picture()
        if self._siblings is None:
            return own
        theirs = {self._siblings.number: own, **self._sibling_pictures}
        silent = [number for number in self._siblings.numbers if number not in self._sibling_pictures]
        return {**several.merged_pictures(theirs, connections_shown=CONNECTIONS_SHOWN), "silent_processes": silent}

    def _upstream_rows(self) -> Sequence[Mapping[str, Any]]:
        try:
            return [asdict(upstream) for upstream in self._upstreams()]
        except Exception:  # noqa: BLE001 - logged once; the rest of the page is shown
            self._faults.note("upstreams")
            return []

    def _own_picture(self) -> Mapping[str, Any]:
        return {
            "not_ready": self._not_ready(),
            "counters": self._live.counters(),
            "connections": self._live.snapshot(),
            "upstreams": self._upstream_rows(),
            "traces_version": self._traces.version,
        }


def _file(name: str, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("otel_smtp.status").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, headers={"content-type": content_type})

    return answer
