"""A whole gateway before providers as they are: what upstreams and settings make of a mail."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest

from otel_smtp import Gateway, Observer, load
from otel_smtp.observing import DeliveryRecord, TransactionRecord
from otel_smtp.spool.embedded.directory import SpoolDirectory
from tests.support.upstream import Fault, Kept, Kind, Phase, ScriptedUpstream
from tests.support.waiting import until

CONTENT = b"Subject: x\r\n\r\nhello\r\n"
MODES = ("direct", "buffered", "queue", "direct-then-queue")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


def delivery(mode: str, directory: Path) -> dict[str, Any]:
    """The settings of a mode; "buffered" is direct with the other strategy."""
    if mode in ("direct", "buffered"):
        return {"delivery": {"strategy": "buffered" if mode == "buffered" else "transparent"}}
    return {"delivery": {"mode": mode}, "spool": {"directory": str(directory / "spool")}}


@asynccontextmanager
async def gateway(
    upstream: ScriptedUpstream, *, more: Any = None, observers: Sequence[Observer] = (), **tables: Any
) -> AsyncIterator[Gateway]:
    """A running gateway. `more`: settings of the upstream; `tables`: other settings."""
    values = {
        "listener": [{"address": ["127.0.0.1:0"]}],
        "upstream": [{"url": f"smtp://127.0.0.1:{upstream.port}", **(more or {})}],
        "status": {"address": "off"},
        **tables,
    }
    async with Gateway(load(values=values), observers=observers) as running:
        yield running


@asynccontextmanager
async def client(running: Gateway) -> AsyncIterator[aiosmtplib.SMTP]:
    (address,) = running.addresses["local"]
    async with aiosmtplib.SMTP(hostname=address.host, port=address.port, start_tls=False) as connected:
        yield connected


@asynccontextmanager
async def talk(running: Gateway) -> AsyncIterator[Callable[..., Awaitable[int]]]:
    """A client that says what no library says: each call sends a command, and gives the code of its reply."""
    (address,) = running.addresses["local"]
    reader, writer = await asyncio.open_connection(address.host, address.port)

    async def reply() -> int:
        while (line := await reader.readline())[3:4] == b"-":
            pass
        return int(line[:3])

    async def say(command: str, *, end: str = "\r\n") -> int:
        octets = command.encode("latin-1") + end.encode()
        writer.write(octets)
        return await reply()

    assert await reply() == 220
    try:
        yield say
    finally:
        writer.close()


async def arrived(upstream: ScriptedUpstream, count: int = 1) -> None:
    await until(lambda: len(upstream.kept) >= count)


# What is declared ---------------------------------------------------------------------------------------------


def declared(mail: bytes) -> int:
    return int(mail.partition(b"SIZE=")[2].split()[0])


@every_mode
@pytest.mark.parametrize("recipients", [1, 2])
@pytest.mark.parametrize("trace_context", ["inject", "strip"])
async def test_the_size_passed_on_counts_what_we_add(
    mode: str, recipients: int, trace_context: str, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream() as upstream,
        gateway(upstream, more={"trace_context": trace_context}, **delivery(mode, tmp_path)) as running,
        client(running) as app,
    ):
        for _ in range(2):
            addresses = [f"r{number}@there.example" for number in range(recipients)]
            await app.sendmail("a@here.example", addresses, CONTENT)
        await arrived(upstream, 2)
        for kept in upstream.kept:
            assert len(kept.content) > len(CONTENT)
            assert len(kept.content) <= declared(kept.mail) <= len(kept.content) + 80


# Switches -----------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("disable", [[], ["CHUNKING"], ["CHUNKING", "BINARYMIME", "PIPELINING", "SIZE"]])
async def test_an_extension_that_is_switched_off_is_not_used(mode: str, disable: Sequence[str], tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as upstream,
        gateway(upstream, more={"disable": disable}, **delivery(mode, tmp_path)) as running,
        client(running) as app,
    ):
        await app.sendmail("a@here.example", ["b@there.example"], CONTENT)
        await arrived(upstream)
        assert ("BDAT" in upstream.verbs) is ("CHUNKING" not in disable)
        assert ("DATA" in upstream.verbs) is ("CHUNKING" in disable)
        assert (b"SIZE=" in upstream.kept[0].mail) is ("SIZE" not in disable)
        assert upstream.kept[0].content.endswith(CONTENT)


async def test_an_extension_that_is_switched_off_is_not_promised_to_clients() -> None:
    async with (
        ScriptedUpstream() as upstream,
        gateway(upstream, more={"disable": ["SMTPUTF8", "DSN"]}) as running,
        client(running) as app,
    ):
        await app.sendmail("a@here.example", ["b@there.example"], CONTENT)
        await app.ehlo()
        assert "smtputf8" not in app.esmtp_extensions
        assert "dsn" not in app.esmtp_extensions
        assert "8bitmime" in app.esmtp_extensions


@every_mode
async def test_every_sender_becomes_the_one_that_the_provider_takes(mode: str, tmp_path: Path) -> None:
    content = b"From: app@here.example\r\n" + CONTENT
    async with (
        ScriptedUpstream() as upstream,
        gateway(upstream, rewrite={"sender": "relay@ours.example"}, **delivery(mode, tmp_path)) as running,
        client(running) as app,
    ):
        await app.sendmail("app@here.example", ["b@there.example"], content)
        await app.sendmail("", ["b@there.example"], content)
        await arrived(upstream, 2)
        assert sorted(kept.mail.split()[0] for kept in upstream.kept) == [b"<>", b"<relay@ours.example>"]
        assert all(kept.content.endswith(content) for kept in upstream.kept)


async def test_a_rewritten_sender_decides_the_route() -> None:
    async with ScriptedUpstream() as upstream:
        routed = {"senders": ["*@ours.example"]}
        rewrite = {"sender": "relay@ours.example"}
        async with gateway(upstream, more=routed, rewrite=rewrite) as running, client(running) as app:
            await app.sendmail("app@here.example", ["b@there.example"], CONTENT)
        async with gateway(upstream, more=routed) as running, client(running) as app:
            with pytest.raises(aiosmtplib.SMTPSenderRefused, match="Relaying denied"):
                await app.sendmail("app@here.example", ["b@there.example"], CONTENT)


# What is promised ---------------------------------------------------------------------------------------------

PLAIN = ("PIPELINING", "SIZE 50000000", "ENHANCEDSTATUSCODES")
EIGHT_BIT = b"Subject: x\r\n\r\n\xe4\r\n"


@every_mode
async def test_nothing_is_promised_before_it_is_known(mode: str, tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        upstream.faults[Phase.GREETING] = Fault(Kind.LATE)
        async with gateway(upstream, **delivery(mode, tmp_path)) as running:
            async with client(running) as app:
                await app.ehlo()
                promised = set(app.esmtp_extensions)
                ours = {"dsn"} if mode == "queue" else set()  # what depends on the upstream is another matter
                assert promised == {"pipelining", "size", "enhancedstatuscodes", "chunking", "limits"} | ours
            upstream.let_go.set()
            await until(lambda: "EHLO" in upstream.verbs)
            async with client(running) as app:
                await app.ehlo()
                assert set(app.esmtp_extensions) - promised == {"8bitmime", "smtputf8", "binarymime", "dsn"} - ours


@every_mode
@pytest.mark.parametrize("content", [CONTENT, EIGHT_BIT])
async def test_8bitmime_asked_for_without_an_offer(mode: str, content: bytes, tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(extensions=PLAIN) as upstream,
        gateway(upstream, **delivery(mode, tmp_path)) as running,
        client(running) as app,
    ):
        await app.ehlo()
        assert "8bitmime" not in app.esmtp_extensions
        assert (await app.mail("a@here.example", options=["BODY=8BITMIME"])).code == 250
        await app.rcpt("b@there.example")
        if content is EIGHT_BIT:
            with pytest.raises(aiosmtplib.SMTPDataError) as refused:
                await app.data(content)
            assert (refused.value.code, refused.value.message.split()[0]) == (554, "5.6.3")
            assert upstream.kept == []
        else:
            assert (await app.data(content)).code == 250
            await arrived(upstream)
            assert b"BODY" not in upstream.kept[0].mail


@every_mode
@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("SMTPUTF8", b"Subject: \xc3\xa4\r\n\r\nx\r\n"),
        ("BODY=8BITMIME", EIGHT_BIT),
        ("BODY=BINARYMIME", CONTENT),
    ],
)
async def test_what_was_offered_in_good_faith_is_never_refused_for_good(
    mode: str, option: str, content: bytes, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream() as upstream,
        gateway(upstream, **delivery(mode, tmp_path)) as running,
        talk(running) as say,
    ):
        await say("EHLO app.example")
        upstream.extensions = PLAIN  # another server behind the name
        upstream.drop_connections()
        await until(lambda: upstream.open_connections == 0)
        codes = []
        for _ in range(2):  # the second time it is known
            codes.append(await say(f"MAIL FROM:<a@here.example> {option}"))
            if codes[-1] == 250:
                codes.append(await say("RCPT TO:<b@there.example>"))
            if codes[-1] == 250:
                codes.append(await say(f"BDAT {len(content)} LAST\r\n{content.decode('latin-1')}", end=""))
            await say("RSET")
        assert all(code < 500 for code in codes), codes
        assert upstream.kept == []
        if mode in ("direct", "buffered"):
            assert 451 in codes


@every_mode
async def test_8bit_content_is_re_encoded_where_that_is_wanted(mode: str, tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(extensions=PLAIN) as upstream,
        gateway(upstream, more={"reencode_8bit": True}, **delivery(mode, tmp_path)) as running,
        client(running) as app,
    ):
        await app.ehlo()
        assert "8bitmime" in app.esmtp_extensions
        assert (await app.mail("a@here.example", options=["BODY=8BITMIME"])).code == 250
        await app.rcpt("b@there.example")
        assert (await app.data(EIGHT_BIT)).code == 250
        await arrived(upstream)
        assert b"BODY" not in upstream.kept[0].mail
        assert upstream.kept[0].content.endswith(
            b"Subject: x\r\nContent-Transfer-Encoding: quoted-printable\r\nMIME-Version: 1.0\r\n"
            b"Content-Type: text/plain; charset=unknown-8bit\r\n\r\n=E4\r\n"
        )


@every_mode
@pytest.mark.parametrize(
    ("recipient", "content", "codes"),
    [
        ("b@there.example", CONTENT, [250, 250, 250]),
        ("b@there.example", b"Subject: \xc3\xa4\r\n\r\n", [250, 250, 554]),
        ("\xe4@there.example", CONTENT, [250, 553, 503]),
    ],
)
async def test_smtputf8_asked_for_without_an_offer(
    mode: str, recipient: str, content: bytes, codes: Sequence[int], tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(extensions=("8BITMIME",)) as upstream,
        gateway(upstream, **delivery(mode, tmp_path)) as running,
        talk(running) as say,
    ):
        await say("EHLO app.example")
        told = [
            await say("MAIL FROM:<a@here.example> BODY=8BITMIME SMTPUTF8"),
            await say(f"RCPT TO:<{recipient.encode().decode('latin-1')}>"),
            await say(f"BDAT {len(content)} LAST\r\n{content.decode('latin-1')}", end=""),
        ]
        assert told == codes
        if codes[-1] == 250:
            await arrived(upstream)
            assert upstream.kept[0].mail.split()[1:] == [b"BODY=8BITMIME"]
        else:
            assert upstream.kept == []


# Rates --------------------------------------------------------------------------------------------------------


def most_within(seconds: float, times: Sequence[float]) -> int:
    """How many of these moments are within any window that is as long, at most."""
    return max(sum(1 for other in times if at <= other < at + seconds) for at in times)


class Watch(Observer):
    """Keeps the attempts."""

    def __init__(self) -> None:
        self.deliveries: list[DeliveryRecord] = []

    def transaction_ended(self, record: TransactionRecord) -> None:
        self.deliveries += [one for one in record.deliveries if one.ended_ns]

    def delivery_ended(self, delivery: DeliveryRecord) -> None:
        self.deliveries.append(delivery)


async def send_some(running: Gateway, count: int, recipients: int = 1) -> None:
    addresses = [f"r{number}@there.example" for number in range(recipients)]
    async with client(running) as app:
        for _ in range(count):
            await app.sendmail("a@here.example", addresses, CONTENT)


@pytest.mark.long
@every_mode
@pytest.mark.parametrize("burst", [1, 4])
async def test_the_upstream_never_sees_more_than_the_rate(mode: str, burst: int, tmp_path: Path) -> None:
    limit = [{"name": "provider-rate", "rate": "8/s", "burst": burst}]
    watch = Watch()
    async with ScriptedUpstream() as upstream:
        values = {"more": {"limits": ["provider-rate"]}, "limit": limit, **delivery(mode, tmp_path)}
        async with gateway(upstream, observers=[watch], **values) as running:
            await asyncio.gather(*(send_some(running, 4) for _ in range(5)))
            await until(lambda: len(upstream.kept) == 20, timeout_seconds=20)
    assert most_within(1.0, [one.ended_at for one in upstream.kept]) <= 8
    paced = [one.paced for one in watch.deliveries if one.paced is not None]
    assert paced  # the more, the quicker the machine
    assert {name for name, _ in paced} == {"provider-rate"}
    assert all(0 < wait_ns < 3e9 for _, wait_ns in paced)


@every_mode
async def test_a_rate_of_recipients(mode: str, tmp_path: Path) -> None:
    limit = [{"name": "provider-rate", "rate": "9/s", "burst": 9, "per": "recipients"}]
    async with ScriptedUpstream() as upstream:
        values = {"more": {"limits": ["provider-rate"]}, "limit": limit, **delivery(mode, tmp_path)}
        async with gateway(upstream, **values) as running:
            await asyncio.gather(*(send_some(running, 2, recipients=3) for _ in range(3)))
            # With a queue, a mail may go in parts: some of its recipients at once, the others when there is leave.
            await until(lambda: len(reached(upstream.kept)) >= 18, timeout_seconds=20)
    assert Counter(address for _, address in reached(upstream.kept)) == {
        f"r{number}@there.example": 6 for number in range(3)
    }
    assert most_within(1.0, [at for at, _ in reached(upstream.kept)]) <= 9


def reached(kept: Sequence[Kept]) -> list[tuple[float, str]]:
    """When each recipient got a message."""
    return [(one.ended_at, address) for one in kept for address in one.addresses]


@pytest.mark.parametrize("mode", ["direct", "buffered"])
async def test_who_would_wait_for_too_long_is_told_to_come_again(mode: str, tmp_path: Path) -> None:
    limit = [{"name": "provider-rate", "rate": "1/h"}]
    async with (
        ScriptedUpstream() as upstream,
        gateway(upstream, more={"limits": ["provider-rate"]}, limit=limit, **delivery(mode, tmp_path)) as running,
        talk(running) as say,
    ):
        await send_some(running, 1)
        codes = [
            await say(command) for command in ("EHLO x", "MAIL FROM:<a@here.example>", "RCPT TO:<b@there.example>")
        ]
        if codes[-1] == 250:
            codes += [await say("DATA"), await say("Subject: x\r\n\r\n.")]
        assert codes[-1] == 451
        assert len(upstream.kept) == 1
        assert upstream.verbs.count("MAIL") == 1


async def test_mail_that_a_rate_holds_back_is_queued_instead_of_refused_and_was_not_tried(tmp_path: Path) -> None:
    limit = [{"name": "provider-rate", "rate": "1/h"}]
    values = {"more": {"limits": ["provider-rate"]}, "limit": limit, **delivery("direct-then-queue", tmp_path)}
    async with ScriptedUpstream() as upstream, gateway(upstream, **values) as running:
        await send_some(running, 3)
        assert running.spool is not None
        shown = await running.spool.store.page("", 10)
        assert len(shown) == 2
        assert sorted(one.attempts for one in shown) in ([0, 0], [0, 1])  # one is next, and waits
        assert len(upstream.kept) == 1
        began = time.monotonic()
    assert time.monotonic() - began < 15  # of the 25 s that the gateway may drain


async def test_a_rate_holds_over_a_restart(tmp_path: Path) -> None:
    limit = [{"name": "provider-rate", "rate": "5/h", "burst": 4}]
    values = {"more": {"limits": ["provider-rate"]}, "limit": limit, **delivery("direct-then-queue", tmp_path)}
    async with ScriptedUpstream() as upstream:
        for waiting in (0, 1):
            async with gateway(upstream, **values) as running:
                await send_some(running, 1 if waiting else 4)  # what has no leave is queued at once
                assert running.spool is not None
                assert len(await running.spool.store.page("", 10)) == waiting
                assert not list(SpoolDirectory(tmp_path / "spool").foreign())
            assert b'"is_final":true' in (tmp_path / "spool" / "limits").read_bytes()
        assert len(upstream.kept) == 4


async def test_a_failed_connection_uses_no_permit(tmp_path: Path) -> None:
    limit = [{"name": "provider-rate", "rate": "1/h"}]
    async with ScriptedUpstream() as upstream:
        upstream.faults[Phase.GREETING] = Fault(Kind.REFUSE, b"554 not now\r\n", times=2)  # the first is for learning
        async with gateway(upstream, more={"limits": ["provider-rate"]}, limit=limit) as running:
            with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
                await send_some(running, 1)
            async with asyncio.timeout(20):
                while not upstream.kept:  # the breaker lets it be tried again after a while
                    with contextlib.suppress(aiosmtplib.SMTPRecipientsRefused):
                        await send_some(running, 1)
                    await asyncio.sleep(0.05)
        assert len(upstream.kept) == 1


# Notices ------------------------------------------------------------------------------------------------------


def gone(address: str) -> bytes | None:
    return b"550 5.1.1 no such user\r\n" if address.endswith("@gone.example") else None


def not_nobody(mail: bytes) -> bytes | None:
    return b"501 5.1.7 null sender\r\n" if mail.startswith(b"<>") else None


@asynccontextmanager
async def bouncing(
    tmp_path: Path,
    *,
    refuses_null: bool = True,
    more: Any = None,
    upstream: ScriptedUpstream | None = None,
    **spool: Any,
) -> AsyncIterator[tuple[ScriptedUpstream, Gateway]]:
    """A gateway whose upstream refuses a queued mail for good."""
    upstream = upstream or ScriptedUpstream(verdict=gone)
    if refuses_null:
        upstream.sender_verdict = not_nobody
    queue = {"mode": "queue"}
    spool = {"directory": str(tmp_path / "spool"), **spool}
    async with (
        upstream,
        gateway(upstream, more=more, delivery=queue, spool=spool) as running,
        client(running) as app,
    ):
        await app.sendmail("app@here.example", ["b@gone.example"], CONTENT)
        yield upstream, running


async def states(running: Gateway, expected: Sequence[str]) -> None:
    """Wait until the queue's messages are in these states, and let it look at their age meanwhile."""
    assert running.spool is not None
    async with asyncio.timeout(10):
        while [one.state for one in await running.spool.store.page("", 10)] != expected:
            running.spool.runner.look_soon()
            await asyncio.sleep(0.02)


async def test_a_notice_leaves_in_another_name_where_the_null_sender_is_refused(tmp_path: Path) -> None:
    async with bouncing(tmp_path, notice_sender="bounces@here.example") as (upstream, running):
        await arrived(upstream)
        (bounce,) = upstream.kept
        assert bounce.mail.startswith(b"<bounces@here.example>")
        assert bounce.addresses == ("app@here.example",)
        assert b"Content-Type: multipart/report" in bounce.content
        await states(running, [])


async def test_the_null_sender_is_used_where_it_is_taken(tmp_path: Path) -> None:
    async with bouncing(tmp_path, refuses_null=False, notice_sender="bounces@here.example") as (upstream, _):
        await arrived(upstream)
        assert upstream.kept[0].mail.startswith(b"<>")


async def test_a_notice_leaves_by_the_route_of_its_mail_whatever_that_is_for(tmp_path: Path) -> None:
    routed = {"senders": ["*@here.example"], "recipients": ["*@gone.example"]}
    async with bouncing(tmp_path, refuses_null=False, more=routed) as (upstream, _):
        await arrived(upstream)
        assert upstream.kept[0].addresses == ("app@here.example",)


async def test_a_notice_that_cannot_leave_is_held_and_given_up_with_a_critical_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bouncing(tmp_path, max_age="2s", warn_after="off") as (upstream, running):
        assert running.spool is not None
        store = running.spool.store
        await states(running, ["held"])
        (held,) = await store.page("", 10)
        assert held.kind == "bounce"
        assert held.recipients[0][2] == "501 5.1.7 null sender"
        assert (await store.counts()).held == 1
        assert upstream.kept == []
        await states(running, [])
    (line,) = [one for one in caplog.records if one.levelname == "CRITICAL"]
    assert line.getMessage() == "notice expired undelivered"


BARE = b"554 no\r\n"


def no_one(_: str) -> bytes:
    return BARE


@pytest.mark.parametrize(
    ("refuses", "expected"),
    [
        ({"faults": {Phase.DATA: Fault(Kind.REFUSE, BARE)}, "extensions": ("PIPELINING",)}, ["held"]),
        ({"faults": {Phase.REPLY: Fault(Kind.REFUSE, BARE)}}, ["held"]),
        ({"verdict": no_one}, []),
        ({"lmtp_verdict": no_one, "is_lmtp": True}, []),
    ],
    ids=["at DATA", "with the content", "its recipient", "its recipient, by LMTP"],
)
async def test_a_refusal_of_a_notice_that_has_no_status_is_about_what_was_refused(
    tmp_path: Path, refuses: Mapping[str, Any], expected: list[str]
) -> None:
    upstream = await ScriptedUpstream(**{"verdict": gone, **refuses}).start()
    more = {"url": f"lmtp://127.0.0.1:{upstream.port}"} if upstream.is_lmtp else None
    async with bouncing(tmp_path, refuses_null=False, upstream=upstream, more=more) as (_, running):
        await states(running, expected)
        assert upstream.kept == []


# What upstreams say of people, in the log ------------------------------------------------------------------------

NAMING = "<ann@there.example> is not known here, says user bob"
REDACTED = "<...@there.example> is not known here, says user ..."
SAYING: list[tuple[str, Phase, str]] = [
    ("no connection to the upstream", Phase.GREETING, "554 5.7.1"),
    ("no connection to the upstream", Phase.EHLO, "451 4.7.1"),
    ("upstream refused our credentials", Phase.MAIL, "530 5.7.0"),
    ("upstream refused our credentials", Phase.RCPT, "535 5.7.8"),
    ("upstream asks for less mail; mail waits", Phase.RCPT, "451 4.7.1"),
]


@pytest.mark.parametrize(("addresses", "shown"), [("domain", REDACTED), ("full", NAMING)])
@pytest.mark.parametrize(("line", "phase", "code"), SAYING)
async def test_log_lines_show_of_an_upstreams_words_what_telemetry_may(
    line: str, phase: Phase, code: str, addresses: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = "full" if addresses == "domain" else "domain"
    said = f"{code} {NAMING}"
    async with ScriptedUpstream(faults={phase: Fault(Kind.REFUSE, f"{said}\r\n".encode())}) as upstream:
        values = {
            "listener": [{"address": ["127.0.0.1:0"]}],
            "upstream": [{"url": f"smtp://127.0.0.1:{upstream.port}", "limits": ["provider-rate"]}],
            "limit": [{"name": "provider-rate", "rate": "1000/m"}],
            "status": {"address": "off"},
        }
        async with Gateway(load(values={**values, "telemetry": {"addresses": other}})) as running:
            caplog.clear()
            running.reload(load(values={**values, "telemetry": {"addresses": addresses}}))
            async with client(running) as app:
                with pytest.raises(aiosmtplib.SMTPException):
                    await app.sendmail("a@here.example", ["b@there.example"], CONTENT)
    lines = [one for one in caplog.records if getattr(one, "reply", None)]
    assert {one.getMessage() for one in lines} == {line}
    assert {vars(one)["reply"] for one in lines} == {f"{code} {shown}"}
    assert any("connection_id" in vars(one) for one in lines)  # not only what was learnt at the start
