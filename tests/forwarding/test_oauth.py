"""Tokens from an endpoint on the loopback interface."""

import asyncio
import json
from typing import Self
from urllib.parse import parse_qs

import pytest

from otel_smtp.forwarding import oauth
from otel_smtp.forwarding.oauth import OAuthSettings, OAuthTokens, TokenUnavailable
from tests.support.waiting import until


class TokenEndpoint:
    """An HTTP server that gives numbered tokens, or what it is told to give."""

    def __init__(self) -> None:
        self.forms: list[dict[str, str]] = []
        self.answer: tuple[int, bytes] | None = None
        self.more: dict[str, object] = {"expires_in": 3600}
        self.let_go = asyncio.Event()
        self.let_go.set()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/token"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        form = parse_qs((await reader.readexactly(length)).decode())
        self.forms.append({key: values[0] for key, values in form.items()})
        await self.let_go.wait()
        token = {"access_token": f"token-{len(self.forms)}", "token_type": "Bearer", **self.more}
        status, body = self.answer or (200, json.dumps(token).encode())
        writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)) + body)
        writer.close()
        await writer.wait_closed()


def settings(endpoint: TokenEndpoint, **more: str) -> OAuthSettings:
    return OAuthSettings(endpoint.url, "client", "s3cret", **more)


async def test_a_token_is_fetched_once_and_handed_out_many_times() -> None:
    async with TokenEndpoint() as endpoint:
        tokens = OAuthTokens(settings(endpoint, scope="smtp send"))
        assert {*await asyncio.gather(*(tokens.token() for _ in range(20))), await tokens.token()} == {"token-1"}
        assert endpoint.forms == [
            {
                "client_id": "client",
                "client_secret": "s3cret",
                "grant_type": "client_credentials",
                "scope": "smtp send",
            }
        ]
        await tokens.close()
        await tokens.close()


async def test_a_refresh_token_is_used_and_replaced() -> None:
    async with TokenEndpoint() as endpoint:
        endpoint.more = {"expires_in": 3600, "refresh_token": "r2"}
        tokens = OAuthTokens(settings(endpoint, refresh_token="r1"))
        await tokens.token()
        tokens.invalidate()
        assert await tokens.token() == "token-2"
        assert [(form["grant_type"], form["refresh_token"]) for form in endpoint.forms] == [
            ("refresh_token", "r1"),
            ("refresh_token", "r2"),
        ]
        await tokens.close()


async def test_a_token_that_will_expire_soon_is_replaced_beside_the_mail() -> None:
    async with TokenEndpoint() as endpoint:
        endpoint.more = {"expires_in": oauth.REFRESH_SECONDS - 1}
        tokens = OAuthTokens(settings(endpoint))
        assert await tokens.token() == "token-1"
        endpoint.let_go.clear()
        assert await tokens.token() == "token-1"  # at once, while the endpoint has not answered
        await until(lambda: len(endpoint.forms) == 2)
        assert await tokens.token() == "token-1"
        endpoint.more = {"expires_in": 3600}
        endpoint.let_go.set()
        await until(lambda: tokens._fetching is None)
        assert await tokens.token() == "token-2"
        assert len(endpoint.forms) == 2
        await tokens.close()


async def test_a_token_that_has_expired_is_not_handed_out() -> None:
    async with TokenEndpoint() as endpoint:
        endpoint.more = {"expires_in": "1"}
        tokens = OAuthTokens(settings(endpoint))
        await tokens.token()
        assert await tokens.token() == "token-2"
        endpoint.more = {"expires_in": "never"}  # no number: as if it were not said
        assert await tokens.token() == "token-3"
        assert await tokens.token() == "token-3"
        await tokens.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((400, b'{"error":"invalid_grant","error_description":"for user joe"}'), "status 400 invalid_grant"),
        ((401, b'{"error":"\\u001b[31m"}'), "status 401"),
        ((500, b"<html>"), "status 500 without JSON"),
        ((200, b"[]"), "status 200 without an object"),
        ((200, b"{}"), "no access_token in the answer"),
        ((200, b'{"access_token":5}'), "no access_token in the answer"),
        ((200, b" " * 100_000), "answer too long"),
    ],
)
async def test_an_endpoint_that_fails_is_not_asked_again_at_once(
    answer: tuple[int, bytes], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with TokenEndpoint() as endpoint:
        endpoint.answer = answer
        tokens = OAuthTokens(settings(endpoint))
        for _ in range(3):
            with pytest.raises(TokenUnavailable):
                await tokens.token()
        assert len(endpoint.forms) == 1
        assert [record.fault for record in caplog.records if record.name.endswith("oauth")] == [says]  # type: ignore[attr-defined]
        assert "s3cret" not in caplog.text + repr(settings(endpoint))
        await tokens.close()


async def test_an_endpoint_that_cannot_be_reached() -> None:
    async with TokenEndpoint() as endpoint:
        pass
    await endpoint.server.wait_closed()
    tokens = OAuthTokens(settings(endpoint))
    with pytest.raises(OSError):
        await tokens.token()
    await tokens.close()


async def test_closing_ends_a_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    async with TokenEndpoint() as endpoint:
        endpoint.let_go.clear()
        tokens = OAuthTokens(settings(endpoint))
        asking = asyncio.ensure_future(tokens.token())
        await until(lambda: endpoint.forms)
        await tokens.close()
        with pytest.raises(asyncio.CancelledError):
            await asking
        endpoint.let_go.set()
