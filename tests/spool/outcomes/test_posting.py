"""One exchange with a receiver that is slow, dead, hostile or well."""

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme

from otel_smtp.spool.outcomes.posting import MOST_ANSWER_OCTETS, MOST_RETRY_AFTER_SECONDS, PostAnswer, Poster
from otel_smtp.spool.outcomes.receivers import ReceiverSettings
from tests.spool.messages import CARRIER
from tests.support.ports import unclaimed_port
from tests.support.receiver import KEY, receiving, status


async def posted(url: str, *, timeout_seconds: float = 30.0, ca_file: str | None = None) -> PostAnswer:
    poster = Poster(ReceiverSettings("app", url, KEY, timeout_seconds=timeout_seconds, ca_file=ca_file))
    try:
        return await poster.post("01event", b'{"a":1}', CARRIER)
    finally:
        await poster.close()


async def test_what_is_sent_is_signed_and_in_the_trace_of_the_mail() -> None:
    async with receiving() as receiver:
        assert await posted(receiver.url) == PostAnswer(None, 204)
        (request,) = receiver.requests
    assert (request.method, request.target, request.body) == ("POST", "/mail-events", b'{"a":1}')
    assert request.is_signed()
    assert not request.is_signed(b"another key of thirty-two octets")
    assert request.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert request.headers["traceparent"] == CARRIER["traceparent"]


@pytest.mark.parametrize("code", [200, 201, 202, 204])
async def test_what_the_receiver_takes(code: int) -> None:
    async with receiving() as receiver:
        receiver.default = status(code, body=b"thanks")
        assert await posted(receiver.url) == PostAnswer(None, code)


@pytest.mark.parametrize("code", [400, 401, 404, 410, 429, 500, 503])
async def test_what_the_receiver_does_not_take(code: int) -> None:
    async with receiving() as receiver:
        receiver.default = status(code, body=b"no")
        assert await posted(receiver.url) == PostAnswer(f"HTTP status {code}", code)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(code: int) -> None:
    async with receiving() as elsewhere, receiving() as receiver:
        receiver.default = status(code, f"Location: {elsewhere.url}")
        answer = await posted(receiver.url)
        assert answer.why == f"HTTP status {code}: redirects are not followed"
        assert (len(receiver.requests), elsewhere.requests) == (1, [])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("999999999", MOST_RETRY_AFTER_SECONDS), ("-1", 0.0), ("soon", 0.0), ("9" * 400, 0.0), ("1.5", 0.0)],
)
async def test_a_receiver_may_ask_for_a_pause_within_a_bound(value: str, seconds: float) -> None:
    async with receiving() as receiver:
        receiver.default = status(503, f"Retry-After: {value}")
        assert (await posted(receiver.url)).retry_in == seconds


async def test_a_receiver_that_says_nothing_is_left_at_the_deadline() -> None:
    async with receiving() as receiver:
        receiver.default = None
        assert await posted(receiver.url, timeout_seconds=0.2) == PostAnswer("no answer within 0.2 s")


async def test_a_receiver_that_drips_its_answer_is_left_at_the_deadline() -> None:
    has_come, is_left = asyncio.Event(), asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        has_come.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        try:
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
        except OSError:
            writer.close()
            is_left.set()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(60):
        while not has_come.is_set():  # on a busy machine the deadline may pass before there is a connection
            failed = await posted(f"http://127.0.0.1:{port}/", timeout_seconds=0.3)
            assert failed.why == "no answer within 0.3 s"
        await is_left.wait()
    server.close()


async def test_an_answer_beyond_the_bound_is_not_read_to_its_end() -> None:
    async with receiving() as receiver:
        poster = Poster(ReceiverSettings("app", receiver.url, KEY))
        for octets, connections in ((MOST_ANSWER_OCTETS, 1), (MOST_ANSWER_OCTETS + 1, 1), (0, 2)):
            receiver.default = status(200, body=b"x" * octets)
            assert await poster.post("1", b"{}", {}) == PostAnswer(None, 200)
            assert receiver.connections == connections  # one whose answer was left unread cannot serve again
        await poster.close()


@pytest.mark.parametrize(
    "answer", [b"SMTP is not spoken here\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000]
)
async def test_what_is_no_answer_is_a_failure_in_words(answer: bytes) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    failed = await posted(f"http://127.0.0.1:{port}/")
    assert failed.why
    assert failed.status is None
    server.close()


async def test_a_port_where_nobody_listens() -> None:
    assert await posted(f"http://127.0.0.1:{unclaimed_port()}/") == PostAnswer("connection refused")


async def test_tls_is_verified(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    async with receiving(context) as receiver:
        assert await posted(receiver.url, ca_file=str(ca_file)) == PostAnswer(None, 204)
        failed = await posted(receiver.url)
        assert failed.why is not None
        assert failed.why.startswith("certificate verify failed")
        assert len(receiver.requests) == 1
        by_name = receiver.url.replace("127.0.0.1", "localhost")
        assert "certificate verify failed" in str((await posted(by_name, ca_file=str(ca_file))).why)


async def test_a_ca_file_that_is_none_is_a_failure_in_words(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    failed = await posted("https://127.0.0.1:1/", ca_file=str(tmp_path / "ca.pem"))
    assert failed.why


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as proxy, receiving() as receiver:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert await posted(receiver.url) == PostAnswer(None, 204)
        assert proxy.requests == []


async def test_a_connection_serves_again_and_one_that_was_closed_is_made_again() -> None:
    async with receiving() as receiver:
        poster = Poster(ReceiverSettings("app", receiver.url, KEY))
        for _ in range(3):
            assert (await poster.post("1", b"{}", {})).why is None
        assert receiver.connections == 1
        receiver.default = status(200, "Connection: close")
        assert (await poster.post("1", b"{}", {})).why is None
        assert (await poster.post("1", b"{}", {})).why is None
        await poster.close()
        assert receiver.connections == 2
