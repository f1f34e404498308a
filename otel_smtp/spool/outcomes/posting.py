"""One exchange with a receiver: a POST within a deadline, to its exact URL and never redirected."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from otel_smtp.net.reasons import reason_of
from otel_smtp.spool.outcomes.events import signed_headers
from otel_smtp.spool.outcomes.receivers import ReceiverSettings

if TYPE_CHECKING:
    import httpx

MOST_ANSWER_OCTETS: Final = 64 * 1024  # of an answer's body, which is read so that the connection can be reused
MOST_RETRY_AFTER_SECONDS: Final = 3600.0
IDLE_SECONDS: Final = 30.0
ORIGIN_HEADER: Final = "webhook-request-origin"  # CloudEvents HTTP 1.1 Web Hooks 4.1


@dataclass(frozen=True, slots=True)
class PostAnswer:
    """The result of an exchange.

    Attributes:
        why: why it failed; None: the receiver accepted the event.
        status: of the answer; None without one.
        retry_in: the pause it asked for, in seconds; 0: none.
    """

    why: str | None = None
    status: int | None = None
    retry_in: float = 0.0


class Poster:
    """Sends to one receiver. The first use imports the HTTP library and reads certificates, in a thread."""

    def __init__(self, settings: ReceiverSettings) -> None:
        self.settings = settings
        self._client: httpx.AsyncClient | None = None
        self._opening = asyncio.Lock()

    async def post(self, event_id: str, body: bytes, carrier: Mapping[str, str]) -> PostAnswer:
        """Send an event; raises nothing but cancellation.

        Args:
            carrier: the trace context of the mail, for the receiver's own instrumentation.
        """
        headers = signed_headers(self.settings.key, event_id, int(time.time()), body)
        headers |= {name: carrier[name] for name in ("traceparent", "tracestate") if carrier.get(name)}
        answer = await self._exchange("POST", headers, body)
        if answer.why is None and answer.status is not None and not 200 <= answer.status < 300:
            why = f"HTTP status {answer.status}"
            if 300 <= answer.status < 400:
                why += ": redirects are not followed"
            return PostAnswer(why, answer.status, answer.retry_in)
        return answer

    async def ask(self, origin: str) -> PostAnswer:
        """Ask what the receiver allows, by OPTIONS, which changes nothing (RFC 9110 9.3.7); any status is an answer."""
        return await self._exchange("OPTIONS", {ORIGIN_HEADER: origin}, b"")

    async def close(self) -> None:
        """Close its connections. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError):
                await client.aclose()

    async def _exchange(self, method: str, headers: Mapping[str, str], body: bytes) -> PostAnswer:
        timeout_seconds = self.settings.timeout_seconds
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._within_time(method, headers, body)
        except TimeoutError:
            return PostAnswer(f"no answer within {timeout_seconds:g} s")
        except OSError as error:
            return PostAnswer(reason_of(error))

    async def _within_time(self, method: str, headers: Mapping[str, str], body: bytes) -> PostAnswer:
        client = await self._opened()
        import httpx  # already imported by a thread

        try:
            async with client.stream(method, self.settings.url, headers=headers, content=body) as response:
                octets = 0
                async for piece in response.aiter_raw():  # uncompressed: compressed data could have any size
                    octets += len(piece)
                    if octets > MOST_ANSWER_OCTETS:
                        break  # the connection is closed with the rest unread
                return PostAnswer(None, response.status_code, _retry_after(response.headers.get("retry-after")))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return PostAnswer(_reason(error))

    async def _opened(self) -> "httpx.AsyncClient":
        async with self._opening:
            if self._client is None:
                self._client = await asyncio.to_thread(self._open)
        return self._client

    def _open(self) -> "httpx.AsyncClient":
        """
        Raises:
            OSError: the authorities cannot be read.
        """
        import httpx

        connections = self.settings.connections
        return httpx.AsyncClient(
            verify=ssl.create_default_context(cafile=self.settings.ca_file),
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # the timeout of the whole exchange is ours  # noqa: S113
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=IDLE_SECONDS
            ),
            headers={"user-agent": "otel-smtp", "accept-encoding": "identity"},
        )


def _retry_after(value: str | None) -> float:
    """RFC 9110 10.2.3, if given in seconds; bounded."""
    if value is None or not value.isdecimal() or len(value) > 9:
        return 0.0
    return min(MOST_RETRY_AFTER_SECONDS, float(value))


def _reason(error: Exception) -> str:
    """Why there was no answer: the system's error, which the libraries wrap several times."""
    found: OSError | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            found = cause
        # A group has an attempt for each address of the name.
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause.__context__
    if found is not None:
        return reason_of(found)
    return f"{type(error).__name__}: {error}"[:200].rstrip(": ")
