"""A whole gateway before upstreams that say no: what of it reaches the client, the queue and the sender."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import aiosmtplib
import pytest

from otel_smtp import Gateway
from otel_smtp.smtp import replies
from tests.gateway.test_providers import CONTENT, arrived, client, delivery, every_mode, gateway
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS

ALL = ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES")  # no CHUNKING, so that DATA is said
QUEUES = ("queue", "direct-then-queue")


@pytest.fixture(autouse=True)
def _nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


async def sent(running: Gateway, *recipients: str) -> str:
    """What the client is told in the end of a mail: of its content, or of what it was refused for before."""
    async with client(running) as app:
        try:
            await app.ehlo()
            await app.mail("app@here.example")
            refused = None
            for recipient in recipients or ("b@there.example",):
                try:
                    await app.rcpt(recipient)
                except aiosmtplib.SMTPResponseException as refusal:
                    refused = refusal
            if refused is not None and len(recipients) < 2:
                raise refused
            reply = await app.data(CONTENT)
        except aiosmtplib.SMTPResponseException as refusal:
            told = f"{refusal.code} {refusal.message}"
        else:
            told = f"{reply.code} {reply.message}"
    return told.partition(" trace=")[0]


async def queued(running: Gateway, count: int = 1) -> list[tuple[str, str, str, str]]:
    """Kind, state, recipient and last reply of what is in the queue, once so many recipients have been tried."""
    assert running.spool is not None
    async with asyncio.timeout(SECONDS):
        while True:
            page = await running.spool.store.page("", 10)
            found = [(str(one.kind), str(one.state), r[0], r[2]) for one in page for r in one.recipients]
            if len(found) == count and all(last for *_, last in found):
                return found
            await asyncio.sleep(0.01)


# At MAIL, RCPT, DATA and the end of the content, with the connection closed behind it (RFC 5321 4.2.1) -------------


@every_mode
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY])
async def test_a_refusal_for_good_reaches_who_sent_the_mail_in_the_upstreams_words(
    mode: str, phase: Phase, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(extensions=ALL) as upstream,
        gateway(upstream, **delivery(mode, tmp_path)) as running,
    ):
        upstream.faults[phase] = Fault(Kind.SAID_THEN_CLOSED, b"550 5.7.1 blocked by list\r\n", times=1)
        told = await sent(running)
        if mode == "queue":
            assert told == "250 2.0.0 Ok"
            await arrived(upstream)  # at once: nothing is tried again
            (bounce,) = upstream.kept
            assert bounce.addresses == ("app@here.example",)
            assert b"Diagnostic-Code: smtp; 550 5.7.1 blocked by list" in bounce.content
        else:
            assert told == "550 5.7.1 blocked by list"
            assert upstream.kept == []
            if running.spool is not None:
                assert (await running.spool.store.counts()).held == 0
                assert await running.spool.store.page("", 10) == []


@every_mode
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY])
async def test_a_refusal_for_now_is_the_clients_or_the_queues_in_the_upstreams_words(
    mode: str, phase: Phase, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(extensions=ALL) as upstream,
        gateway(upstream, **delivery(mode, tmp_path)) as running,
    ):
        upstream.faults[phase] = Fault(Kind.SAID_THEN_CLOSED, b"451 4.7.1 greylisted\r\n")
        told = await sent(running)
        if mode in QUEUES:
            assert told == "250 2.0.0 Ok"
            assert await queued(running) == [("mail", "ready", "b@there.example", "451 4.7.1 greylisted")]
        else:
            assert told == "451 4.7.1 greylisted"


# Before MAIL, and 421 anywhere: nothing is said of this mail ---------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (Phase.GREETING, "554 5.7.1 your address is on a list"),
        (Phase.GREETING, "421 4.7.0 try from elsewhere"),
        (Phase.EHLO, "501 5.5.4 who is that"),
        (Phase.EHLO, "421 4.7.0 slow down"),
        (Phase.MAIL, "421 4.7.0 IP throttled"),
        (Phase.RCPT, "421 4.7.0 IP throttled"),
        (Phase.DATA, "421 4.7.0 IP throttled"),
        (Phase.REPLY, "421 4.7.0 IP throttled"),
    ],
)
async def test_why_no_upstream_serves_is_told_in_its_words(mode: str, phase: Phase, said: str, tmp_path: Path) -> None:
    async with ScriptedUpstream(extensions=ALL) as upstream:
        upstream.faults[phase] = Fault(Kind.SAID_THEN_CLOSED, f"{said}\r\n".encode())
        async with gateway(upstream, **delivery(mode, tmp_path)) as running:
            expected = f"451 4.4.1 The upstream refuses service: {said}"
            told = await sent(running)
            if mode in QUEUES:
                assert told == "250 2.0.0 Ok"
                assert await queued(running) == [("mail", "ready", "b@there.example", expected)]
            else:
                assert told == expected
        assert upstream.kept == []


# Our own credentials -------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (Phase.MAIL, "530 5.7.57 log in first"),
        (Phase.RCPT, "534 5.7.9 too weak"),
        (Phase.DATA, "535 5.7.8 bad"),
        (Phase.REPLY, "538 5.7.11 not without TLS"),
    ],
)
async def test_a_refusal_of_our_credentials_is_never_the_mails(
    mode: str, phase: Phase, said: str, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(extensions=ALL) as upstream,
        gateway(upstream, **delivery(mode, tmp_path)) as running,
    ):
        upstream.faults[phase] = Fault(Kind.REFUSE, f"{said}\r\n".encode())
        expected = f"451 4.7.0 {replies.UPSTREAM_CREDENTIALS.text}: {said}"
        told = await sent(running)
        if mode in QUEUES:
            assert told == "250 2.0.0 Ok"
            assert await queued(running) == [("mail", "ready", "b@there.example", expected)]
        else:
            assert told == expected
        assert upstream.kept == []
        assert [one.last_failure for one in running.upstreams()] == ["upstream_auth"]


# One message, several verdicts ---------------------------------------------------------------------------------------

GOOD, FULL, BUSY, LOGIN = (f"{name}@there.example" for name in ("good", "full", "busy", "login"))
VERDICTS = {
    FULL: b"552 5.2.2 mailbox full\r\n",
    BUSY: b"451 4.3.0 busy\r\n",
    LOGIN: b"530 5.7.0 log in first\r\n",
}
TO_LOG_IN = f"451 4.7.0 {replies.UPSTREAM_CREDENTIALS.text}: 530 5.7.0 log in first"


@every_mode
@pytest.mark.parametrize(
    ("most", "recipients", "told", "bounces", "left"),
    [
        (100, (GOOD, FULL), "552 5.2.2 mailbox full (taken for 1 of 2 recipients)", True, []),
        (100, (GOOD, BUSY), "451 4.2.0 Message taken for 1 of 2 recipients: 451 4.3.0 busy", False, [BUSY]),
        # For good beside for now: another try may help one of them, and then says what became of the other.
        (100, (GOOD, FULL, BUSY), "451 4.2.0 Message taken for 1 of 3 recipients: 451 4.3.0 busy", True, [BUSY]),
        (1, (GOOD, FULL, BUSY), "451 4.2.0 Message taken for 1 of 3 recipients: 451 4.3.0 busy", True, [BUSY]),
        (100, (FULL, BUSY), "451 4.3.0 busy", True, [BUSY]),
        (100, (FULL,), "552 5.2.2 mailbox full", True, []),
        (100, (GOOD, LOGIN), f"451 4.2.0 Message taken for 1 of 2 recipients: {TO_LOG_IN}", False, [LOGIN]),
        (1, (GOOD, LOGIN), f"451 4.2.0 Message taken for 1 of 2 recipients: {TO_LOG_IN}", False, [LOGIN]),
        (100, (FULL, LOGIN), TO_LOG_IN, True, [LOGIN]),
    ],
)
async def test_each_recipient_of_an_lmtp_upstream_has_its_own_end(
    mode: str, most: int, recipients: Sequence[str], told: str, bounces: bool, left: Sequence[str], tmp_path: Path
) -> None:
    async with ScriptedUpstream(is_lmtp=True, lmtp_verdict=VERDICTS.get) as upstream:
        more = {"url": f"lmtp://127.0.0.1:{upstream.port}", "recipients_per_transaction": most}
        async with gateway(upstream, more=more, **delivery(mode, tmp_path)) as running:
            answer = await sent(running, *recipients)
            good = recipients.count(GOOD)
            if mode not in QUEUES or (mode == "direct-then-queue" and told.startswith("5") and not good):
                assert answer == told
                assert sum(GOOD in kept.addresses for kept in upstream.kept) == good
                return
            assert answer.startswith("250 ")
            if mode == "queue":
                await arrived(upstream, good + bounces)
                assert bounces == any(kept.addresses == ("app@here.example",) for kept in upstream.kept)
            # Straight after the client's own attempt the refused ones are there too: they are reported at the next.
            waiting = recipients[good:] if mode == "direct-then-queue" else left
            shown = [(one, TO_LOG_IN if one == LOGIN else VERDICTS[one].decode().strip()) for one in waiting]
            assert [(who, last) for _, _, who, last in await queued(running, len(shown))] == shown
