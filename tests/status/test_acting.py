"""Commands to the queue over the status port: who may, from which page, and what is no command."""

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest

from otel_smtp.status import acting
from otel_smtp.status.acting import QUEUE_TOKEN_HEADER, QueueActions
from tests.status.test_server import queue, running

TOKEN = "only-operators-know-it"


class Done:
    """What was done."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, list[str], str]] = []

    async def act(self, command: str, ids: Sequence[str], client: str) -> Sequence[Mapping[str, Any]]:
        self.commands.append((command, list(ids), client))
        return [{"queue_id": one, "changed": True} for one in ids]


async def post(
    client: httpx.AsyncClient, command: str = "hold", *, token: str | None = TOKEN, body: Any = None, **headers: str
) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        named[QUEUE_TOKEN_HEADER] = token
    body = {"ids": ["01J"]} if body is None else body
    if isinstance(body, bytes):
        return await client.post(f"/api/queue/{command}", content=body, headers=named)
    return await client.post(f"/api/queue/{command}", json=body, headers=named)


@pytest.mark.parametrize("command", ["retry", "hold", "release", "expire"])
async def test_a_command_with_the_token_is_done(command: str) -> None:
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN)) as (_, client):
        host = client.base_url.netloc.decode()
        answer = await post(client, command, origin=f"http://{host}", sec_fetch_site="same-origin")
        status = (await client.get("/api/status")).json()
    assert (answer.status_code, answer.json()) == (200, {"messages": [{"queue_id": "01J", "changed": True}]})
    assert done.commands == [(command, ["01J"], "127.0.0.1")]
    assert status["may_act"] is True


async def test_behind_a_proxy_that_speaks_tls_the_scheme_differs() -> None:
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN), hosts=["gw.example.com"]) as (_, client):
        answer = await post(client, host="gw.example.com", origin="https://gw.example.com")
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "none"},
    ],
)
async def test_another_page_cannot_do_it_even_with_the_token(headers: dict[str, str]) -> None:
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN)) as (_, client):
        answer = await post(client, **headers)
    assert (answer.status_code, answer.json()) == (403, {"error": "this comes from another page"})
    assert done.commands == []


async def test_a_rebound_name_cannot_do_it() -> None:
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN)) as (_, client):
        answer = await post(client, host="evil.example", origin="http://evil.example")
    assert answer.status_code == 421
    assert done.commands == []


@pytest.mark.parametrize("token", [None, "", TOKEN[:-1], f"{TOKEN}x", "é"])
async def test_a_wrong_token_does_nothing(
    token: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acting, "_WRONG_TOKEN_SECONDS", 0.0)
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN)) as (_, client):
        headers = [] if token is None else [(QUEUE_TOKEN_HEADER.encode(), token.encode())]
        answer = await client.post("/api/queue/hold", json={"ids": ["01J"]}, headers=headers)
    assert (answer.status_code, answer.json()) == (403, {"error": "the token is wrong"})
    assert done.commands == []
    [record] = [each for each in caplog.records if "wrong token" in each.message]
    assert TOKEN not in str(record.__dict__)


async def test_without_a_token_in_the_settings_the_page_is_read_only() -> None:
    async with running(queue=queue) as (_, client):
        answer = await post(client)
        status = (await client.get("/api/status")).json()
    assert answer.status_code == 403
    assert "read-only" in answer.json()["error"]
    assert status["may_act"] is False


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"ids": []}',
        b'{"ids": [1]}',
        b'{"ids": "01J"}',
        b'{"ids": ["' + b"x" * 20_000 + b'"]}',
        b'{"ids": [' + b",".join([b'"a"'] * 201) + b"]}",
    ],
)
async def test_what_is_no_command_is_refused(body: bytes) -> None:
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN)) as (_, client):
        answer = await post(client, body=body, content_type="application/json")
    assert answer.status_code == 400
    assert done.commands == []


async def test_a_form_cannot_send_it() -> None:
    done = Done()
    async with running(queue=queue, actions=QueueActions(done.act, TOKEN)) as (_, client):
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await post(client, body=b'{"ids": ["01J"]}', content_type=kind)
            assert answer.status_code == 400, kind
        assert (await post(client, "delete")).status_code == 404
        assert (await client.get("/api/queue/hold")).status_code == 405
    assert done.commands == []
