"""Outcomes from a real gateway to a real receiver: at least once, whichever process is killed, and never in the way of
mail."""

import asyncio
import json
import signal
import smtplib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from otel_smtp import Gateway, load
from otel_smtp.spool.outcomes.events import signed_headers
from tests.durability.upstream import CountingUpstream
from tests.spool.stores import migrated
from tests.support import postgresql
from tests.support.ports import unclaimed_port
from tests.support.process import environment, gateway, until
from tests.support.receiver import KEY, Receiver, receiving, status
from tests.test_readme import blocks

MAIL = b"X-Id: one\r\nMessage-ID: <order-7@shop.example>\r\nSubject: an order\r\n\r\nHello.\r\n"


@pytest.fixture
def upstream() -> Iterator[CountingUpstream]:
    with CountingUpstream(0) as upstream:
        upstream.is_willing = True
        yield upstream


@pytest.fixture
async def application() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def settings(upstream: CountingUpstream, application: Receiver, directory: Path, store: str) -> dict[str, Any]:
    (directory / "hmac-key").write_bytes(KEY + b"\n")
    place = {"spool.directory": str(directory / "spool")}
    if store == "postgresql":
        url = postgresql.server().url()
        place = {"spool.url": url, "spool.schema": "outcomes", "spool.takeover_after": "3s"}
    return {
        "upstream.url": f"smtp://127.0.0.1:{upstream.port}",
        "delivery.mode": "queue",
        **place,
        "spool.retry": ["1s"],
        "notify.name": "app",
        "notify.url": application.url,
        "notify.key_file": "hmac-key",
        "notify.timeout": "60s",
    }


def send(port: int | None) -> None:
    assert port is not None
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.sendmail("app@example.com", ["user@example.net"], MAIL)


@pytest.mark.long
@pytest.mark.parametrize("store", ["embedded", "postgresql"])
async def test_an_outcome_survives_a_gateway_that_is_killed_while_it_sends(
    store: str, tmp_path: Path, upstream: CountingUpstream, application: Receiver
) -> None:
    wanted = settings(upstream, application, tmp_path, store)
    if store == "postgresql":
        await asyncio.to_thread(migrated, postgresql.server(), "outcomes")
    application.default = None
    with gateway(wanted, tmp_path) as running:
        await asyncio.to_thread(send, running.port)
        await application.has(1)
        running.signal(signal.SIGKILL)
        await asyncio.to_thread(running.wait)
    application.default = status(204)
    with gateway(wanted, tmp_path) as running:
        first, again = await application.has(2)
        assert await asyncio.to_thread(running.stop) == 0
    assert first.body == again.body
    assert first.headers["webhook-id"] == again.headers["webhook-id"] == first.event["id"]
    assert first.is_signed()
    assert again.is_signed()
    assert first.event["data"]["message_id"] == "<order-7@shop.example>"
    assert upstream.taken["one"] == 1
    with gateway(wanted, tmp_path) as running:  # it was noted that the receiver has it
        await asyncio.to_thread(send, running.port)
        await application.has(3)
        assert await asyncio.to_thread(running.stop) == 0
    assert len({request.headers["webhook-id"] for request in application.requests}) == 2


async def test_a_receiver_that_never_answers_holds_up_no_mail_and_no_shutdown(
    tmp_path: Path, upstream: CountingUpstream, application: Receiver
) -> None:
    application.default = None
    status_port = unclaimed_port()
    wanted = settings(upstream, application, tmp_path, "embedded") | {"status.address": f"127.0.0.1:{status_port}"}
    with gateway(wanted, tmp_path) as running:
        for _ in range(20):
            await asyncio.to_thread(send, running.port)
        await asyncio.to_thread(until, lambda: upstream.taken["one"] == 20 or None, "all mail is delivered")
        await application.has(4)
        metrics = await asyncio.to_thread(scraped, status_port)
        assert 'smtp_notify_outcomes_total{smtp_notify_receiver="app",smtp_notify_result="sent"} 0.0' in metrics
        counts = await asyncio.to_thread(counted, tmp_path)
        assert counts["outcomes"]["app"]["pending"] == 20
        assert counts["ready"] == counts["deferred"] == counts["active"] == 0
        assert await asyncio.to_thread(running.stop) == 0


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        return str(page.read(), "utf-8")


def counted(directory: Path) -> Any:
    command = [sys.executable, "-m", "otel_smtp.commands.cli", "queue", "counts", "--config", "settings.toml"]
    environ = environment({}, directory, uses_uvloop=True)
    ran = subprocess.run(command, check=True, cwd=directory, env=environ, capture_output=True, timeout=60)
    return json.loads(ran.stdout)


async def test_receivers_come_change_and_go_by_a_reload(
    tmp_path: Path, upstream: CountingUpstream, application: Receiver
) -> None:
    def loaded(**app: Any) -> Any:
        values = {
            "listener": [{"address": ["127.0.0.1:0"]}],
            "upstream": [{"url": f"smtp://127.0.0.1:{upstream.port}"}],
            "delivery": {"mode": "queue"},
            "spool": {"directory": str(tmp_path / "spool")},
            "status": {"address": "off"},
        }
        if app:
            values["notify"] = [{"url": application.url, **app}]
        return load(values=values)

    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(Gateway(loaded()))
        port = running.addresses["local"][0].port
        await asyncio.to_thread(send, port)
        await asyncio.to_thread(until, lambda: upstream.taken["one"] == 1 or None, "it is delivered")
        running.reload(loaded(key=KEY.decode()))
        await asyncio.to_thread(send, port)
        (first,) = await application.has(1)
        assert first.is_signed()
        running.reload(loaded(key="another key of thirty-two octets"))
        await asyncio.to_thread(send, port)
        assert (await application.has(2))[1].is_signed(b"another key of thirty-two octets")
        running.reload(loaded())
        await asyncio.to_thread(send, port)
        await asyncio.to_thread(until, lambda: upstream.taken["one"] == 4 or None, "it is delivered")
        assert len(application.requests) == 2


def test_the_recipe_of_the_guide_verifies_what_the_gateway_sends(tmp_path: Path, upstream: CountingUpstream) -> None:
    port = unclaimed_port()
    (recipe,) = (block for block in blocks("python") if "webhook-signature" in block)
    (tmp_path / "receiver.py").write_text(recipe.replace("9000", str(port)))
    wanted = settings(upstream, Receiver(port=port), tmp_path, "embedded")
    with subprocess.Popen(
        [sys.executable, "receiver.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        try:
            until(lambda: is_open(port) or None, "it listens")
            with gateway(wanted, tmp_path) as running:
                send(running.port)
                assert program.stdout is not None
                assert program.stdout.readline().startswith(b"user@example.net delivered {'code': 250,")
            event = b'{"id":"1"}'
            sent = int(time.time())
            assert posted(port, signed_headers(KEY, "1", sent, event), b'{"id":"2"}') == 400
            assert posted(port, signed_headers(KEY, "1", sent - 301, event), event) == 400
            assert posted(port, signed_headers(KEY + b"?", "1", sent, event), event) == 400
            assert posted(port, {}, event) == 400
        finally:
            program.kill()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def posted(port: int, headers: dict[str, str], body: bytes) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
