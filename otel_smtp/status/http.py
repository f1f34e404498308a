"""HTTP under the status port: an event loop's worth of uvicorn, bounded in connections and time, and a guard in front.

Otherwise a stranger who can reach the port could hold connections open until the process has no file left for mail, or
read the page through a browser on this machine. uvicorn has no bound on the time until a request is complete, and it
takes over the process's signals. So this module extends two of its classes, which are undocumented: pyproject.toml
names the last version tested.
"""

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from otel_smtp.status.answers import PROBES, STREAM_PATH
from otel_smtp.status.siblings import TOKEN_HEADER

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOOPBACK: Final[Sequence[Network]] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))

# Several times what people and probes need; a quarter of the gateway's own default of 256.
HTTP_CONNECTIONS: Final = 64
HTTP_CONNECTIONS_PER_CLIENT: Final = 32
# A request is one packet; a client that has not sent it by then is no probe.
REQUEST_SECONDS: Final = 10.0
# For making and reading an answer, except the page's stream.
ANSWER_SECONDS: Final = 40.0
STOP_SECONDS: Final = 1

# The page loads only the package's files, so a peer's text could run nothing even if it were not escaped.
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
_OPEN_PATHS: Final = PROBES | {"/metrics"}


def http_server(application: ASGIApp) -> uvicorn.Server:
    """A server for `application`; `serve` it on bound sockets."""
    return _Server(
        uvicorn.Config(
            application,
            http=_BoundedProtocol,
            loop="none",
            ws="none",
            lifespan="off",
            interface="asgi3",
            # A client could put itself into the allowed networks by X-Forwarded-For.
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: SIGTERM belongs to the gateway's drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _BoundedProtocol(H11Protocol):
    """HTTP/1.1, bounded in connections, in the time until a request is complete and in that until its answer is read.

    Every answer closes its connection (`Guard`), so there is one request to wait for. A newcomer is always let in, so
    that no number of connections keeps a probe out: the oldest that has asked nothing goes, or else the oldest.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._since = self.loop.time()
        open_now = [each for each in self.connections if isinstance(each, _BoundedProtocol)]
        of_client = [each for each in open_now if each.client_host == self.client_host]
        if len(of_client) > HTTP_CONNECTIONS_PER_CLIENT:
            self._make_room(of_client)
        elif len(open_now) > HTTP_CONNECTIONS:
            self._make_room(open_now)
        self._timers = (
            self.loop.call_later(REQUEST_SECONDS, self._close_if_silent),
            self.loop.call_later(ANSWER_SECONDS, self._abort_if_unread),
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()  # otherwise the loop would hold objects of connections long gone
        super().connection_lost(exc)

    @property
    def client_host(self) -> str:
        """The client's address."""
        return "" if self.client is None else self.client[0]

    @property
    def is_silent(self) -> bool:
        """Whether there has been no request."""
        request: object = self.cycle  # None until there is one, though uvicorn's type does not say so
        return request is None

    def _make_room(self, among: "Sequence[_BoundedProtocol]") -> None:
        others = [each for each in among if each is not self]
        oldest = min(others, key=lambda each: (not each.is_silent, each._since))
        self.connections.discard(oldest)  # now: its end is reported in a later turn of the event loop
        oldest.transport.abort()

    def _close_if_silent(self) -> None:
        if self.is_silent:
            self.transport.close()

    def _abort_if_unread(self) -> None:
        if self.is_silent or self.scope["path"] != STREAM_PATH:
            self.transport.abort()


class Guard:
    """Checks each request's client, host name and token, and adds to each answer the headers that restrict a browser.

    Args:
        inner: the application.
        allow: networks that may see the page and its API; probes and metrics are open to all.
        is_loopback: the port is on a loopback address: probes and metrics, too, are for this machine alone.
        token: required in `TOKEN_HEADER`; "": none.
        hosts: this port's names, besides IP addresses and localhost. A web page may have rebound any other name to our
            address, to read what the browser's network may see.
    """

    def __init__(
        self,
        inner: ASGIApp,
        allow: Sequence[Network],
        *,
        is_loopback: bool,
        token: str,
        hosts: Collection[str] = (),
    ) -> None:
        self._inner = inner
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
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
        is_open = request.scope["path"] in _OPEN_PATHS
        if (self._is_loopback or not is_open) and not self._is_own_name(request.headers.get("host", "")):
            return PlainTextResponse(
                "this port answers only to localhost, an IP address, or a name in status.hosts\n", 421
            )
        if self._token and not hmac.compare_digest(
            request.headers.get(TOKEN_HEADER, "").encode(), self._token.encode()
        ):
            return PlainTextResponse("this port is for the other processes of the gateway\n", 403)
        if is_open:
            return None
        if request.client is None or not self._is_allowed(request.client.host):
            return PlainTextResponse("your address is not in status.allow\n", 403)
        return None

    def _is_own_name(self, host: str) -> bool:
        """Whether a Host header is an IP address, localhost or one of `hosts`: no foreign name that was rebound."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_allowed(self, host: str) -> bool:
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._allow)
