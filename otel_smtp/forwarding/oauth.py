"""Access tokens for XOAUTH2, from an OAuth 2 token endpoint (RFC 6749 4.4 and 6).

A token is fetched once and used until shortly before it expires; then a new one is fetched in the background, while
mail continues with the old one. Only the first mail, and the first after a refusal, ever waits. Several mails wait for
one fetch.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import httpx

logger: Final = logging.getLogger("otel_smtp.forwarding.oauth")

TIMEOUT_SECONDS: Final = 10.0
MAX_ANSWER_OCTETS: Final = 64 * 1024
REFRESH_SECONDS: Final = 300.0  # before it expires; providers give an hour
SPARE_SECONDS: Final = 30.0  # a token with less left may expire on its way
DEFAULT_LIFE_SECONDS: Final = 3600.0  # if the answer has no expires_in, which RFC 6749 5.1 only recommends
PAUSE_SECONDS: Final = 5.0  # between a failure and the next fetch, so that waiting mail does not hammer the endpoint


class TokenUnavailable(OSError):
    """The endpoint gave no token; the text says why, and never quotes the request."""


@dataclass(frozen=True, slots=True)
class OAuthSettings:
    """The token endpoint, and how to use it.

    Attributes:
        token_url: the token endpoint, https; http on the loopback interface only.
        refresh_token: with it, the flow of RFC 6749 6 is used; without it, client credentials (4.4).
        scope: space-separated, if the provider demands one.
    """

    token_url: str
    client_id: str
    client_secret: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    scope: str = ""


class OAuthTokens:
    """A `TokenSource` for one account.

    Args:
        context: for the endpoint's TLS; None: the system's authorities.
    """

    def __init__(self, settings: OAuthSettings, *, context: ssl.SSLContext | None = None) -> None:
        self._settings = settings
        self._context = context
        self._refresh_token = settings.refresh_token  # providers may give a new one with each answer (RFC 6749 6)
        self._token: str | None = None
        self._expires_at = 0.0
        self._failed_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None

    async def token(self) -> str:
        """A token that is good for a while.

        Raises:
            TokenUnavailable: none is available now.
        """
        left = self._expires_at - asyncio.get_running_loop().time()
        if self._token is not None and left > SPARE_SECONDS:
            if left < REFRESH_SECONDS and self._may_fetch():
                self._fetch()
            return self._token
        if self._fetching is None and not self._may_fetch():
            raise TokenUnavailable("the token endpoint failed a moment ago")
        await asyncio.shield(self._fetch())
        if self._token is None:
            raise TokenUnavailable("no token could be fetched")
        return self._token

    def invalidate(self) -> None:
        """The upstream refused the token."""
        self._token = None

    async def close(self) -> None:
        """Stop fetching. Idempotent."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _may_fetch(self) -> bool:
        return asyncio.get_running_loop().time() - self._failed_at >= PAUSE_SECONDS

    def _fetch(self) -> "asyncio.Task[None]":
        """The fetch under way; begins one if there is none."""
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._refresh())
            self._fetching.add_done_callback(self._fetched)
        return self._fetching

    def _fetched(self, _: "asyncio.Task[None]") -> None:
        self._fetching = None

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        try:
            answer = await self._ask()
        except TokenUnavailable as error:
            self._failed_at = loop.time()
            if self._expires_at <= self._failed_at:
                self._token = None
            logger.warning("no access token", extra={"client_id": self._settings.client_id, "fault": str(error)})
            return
        self._token = answer["access_token"]
        self._expires_at = begun_at + _life_seconds(answer)
        self._failed_at = float("-inf")
        self._refresh_token = answer.get("refresh_token") or self._refresh_token

    async def _ask(self) -> Mapping[str, Any]:
        """Ask the endpoint; returns its answer, which has an access token."""
        # Imported by the first mail that needs it: it takes a tenth of a second, and few upstreams want XOAUTH2.
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=TIMEOUT_SECONDS, verify=self._context or ssl.create_default_context(), trust_env=False
            )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                async with self._client.stream("POST", self._settings.token_url, data=self._form()) as response:
                    body = b""
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > MAX_ANSWER_OCTETS:
                            raise TokenUnavailable("answer too long")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise TokenUnavailable(f"{type(error).__name__} at the token endpoint") from error
        return _read_answer(response.status_code, body)

    def _form(self) -> dict[str, str]:
        settings = self._settings
        form = {"client_id": settings.client_id}
        if settings.client_secret:
            form["client_secret"] = settings.client_secret
        if self._refresh_token:
            form |= {"grant_type": "refresh_token", "refresh_token": self._refresh_token}
        else:
            form["grant_type"] = "client_credentials"
        if settings.scope:
            form["scope"] = settings.scope
        return form


def _read_answer(status: int, body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise TokenUnavailable(f"status {status} without JSON") from error
    if not isinstance(answer, dict):
        raise TokenUnavailable(f"status {status} without an object")
    if status != 200:
        # RFC 6749 5.2: `error` is a code from a short list; error_description is not for logs.
        code = str(answer.get("error", ""))[:40]
        raise TokenUnavailable(f"status {status} {code if code.isidentifier() else ''}".rstrip())
    token = answer.get("access_token")
    if not isinstance(token, str) or not token:
        raise TokenUnavailable("no access_token in the answer")
    return answer


def _life_seconds(answer: Mapping[str, Any]) -> float:
    life = answer.get("expires_in")
    try:
        return max(0.0, float(life)) if life is not None else DEFAULT_LIFE_SECONDS
    except (TypeError, ValueError):
        return DEFAULT_LIFE_SECONDS
