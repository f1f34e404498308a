"""`check --connect` and receivers of outcomes: asked without an event."""

import pytest

from otel_smtp.commands.checks.receivers import check_receiver
from otel_smtp.spool.outcomes.receivers import ReceiverSettings
from tests.support.receiver import KEY, receiving, status


@pytest.mark.parametrize(
    ("code", "verdict", "words"),
    [
        (200, "ok", "answers; no TLS"),
        (204, "ok", "answers; no TLS"),
        (405, "ok", "answers; no TLS"),
        (501, "ok", "answers; no TLS"),
        (404, "warning", "answers; no TLS; HTTP status 404 to OPTIONS: is the URL right?"),
        (401, "warning", "answers; no TLS; HTTP status 401 to OPTIONS: is the URL right?"),
        (302, "warning", "answers; no TLS; HTTP status 302 to OPTIONS: is the URL right?"),
        (502, "failed", "HTTP status 502 to OPTIONS; it would be sent outcomes again and again"),
    ],
)
async def test_a_receiver_is_asked_what_it_allows_and_sent_nothing(code: int, verdict: str, words: str) -> None:
    async with receiving() as application:
        application.default = status(code)
        finding = await check_receiver(ReceiverSettings("app", application.url, KEY), "gw.example")
        assert finding == (verdict, "notify app", words)
        (request,) = application.requests
        assert (request.method, request.body) == ("OPTIONS", b"")
        assert request.headers["webhook-request-origin"] == "otel-smtp://gw.example"
        assert "webhook-signature" not in request.headers


async def test_a_receiver_that_says_nothing() -> None:
    async with receiving() as application:
        application.default = None
        settings = ReceiverSettings("app", application.url, KEY, timeout_seconds=0.2)
        assert await check_receiver(settings, "gw.example") == ("failed", "notify app", "no answer within 0.2 s")
