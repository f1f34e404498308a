"""Opening a connection to an upstream: TLS that is verified or not used, and AUTH that goes nowhere else."""

import asyncio
import base64
import datetime
import ssl
from collections.abc import Sequence
from pathlib import Path

import pytest
import trustme

from otel_smtp.forwarding.authentication import MAX_ITERATIONS, ExchangeFailed, choose
from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.faults import ConnectFailed, quoting
from otel_smtp.forwarding.opening import introduce, open_connection
from otel_smtp.forwarding.settings import Credentials, Timeouts, UpstreamSettings
from otel_smtp.forwarding.tls import UpstreamTlsContext
from otel_smtp.observing import DeliveryPhase, Endpoint
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode
from tests.support.deliveries import phases_of
from tests.support.fake_stream import FakeStream
from tests.support.relaying import PATIENT, relay, relaying, said_by
from tests.support.upstream import EXTENSIONS, Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import until

SECRET = Credentials("relay", "s3cret")
USERS = {"relay": "s3cret"}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def server_context(authority: trustme.CA, name: str = "localhost", **more: object) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name, **more).configure_cert(context)  # type: ignore[arg-type]
    return context


def secured(upstream: ScriptedUpstream, ca_file: str | None, **more: object) -> UpstreamSettings:
    """An upstream that is reached by address and known by the name "localhost"."""
    wanted = {
        "tls": TlsMode.IMPLICIT if upstream.implicit_tls else TlsMode.STARTTLS,
        "ca_file": ca_file,
        "server_name": "localhost",
        "credentials": SECRET,
        "timeouts": PATIENT,
        **more,
    }
    return UpstreamSettings("up", "127.0.0.1", upstream.port, **wanted)  # type: ignore[arg-type]


def note_nothing(phase: DeliveryPhase, reply: Reply | None) -> None:
    """Where nobody asks for the steps."""


async def opened(settings: UpstreamSettings) -> UpstreamConnection:
    """Open a connection and say QUIT."""
    context = None
    if settings.tls is not TlsMode.OFF:
        context = settings.tls_context or UpstreamTlsContext.create(ca_file=settings.ca_file)
    connection = await open_connection(settings, context, "gw.example", note_nothing)
    connection.close()
    await connection.stream.wait_closed()
    return connection


# TLS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "implicit"])
@pytest.mark.both_loops
async def test_a_mail_over_tls_with_auth(authority: trustme.CA, ca_file: str, implicit: bool) -> None:
    async with (
        ScriptedUpstream(tls=server_context(authority), implicit_tls=implicit, users=USERS) as upstream,
        relaying(secured(upstream, ca_file)) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        (kept,) = upstream.kept
        assert (kept.is_tls, kept.user) == (True, "relay")
        tls = relayed.seen.deliveries[0].tls
        assert tls is not None
        assert (tls.version, tls.server_name, tls.resumed) == ("1.3", "localhost", False)
        phases = phases_of(relayed.seen.deliveries[0])
        if not implicit:
            assert phases[1:7] == [
                DeliveryPhase.CONNECT,
                DeliveryPhase.GREETING,
                DeliveryPhase.EHLO,
                DeliveryPhase.STARTTLS,
                DeliveryPhase.EHLO,
                DeliveryPhase.AUTH,
            ]
            assert upstream.verbs[:4] == ["EHLO", "STARTTLS", "EHLO", "AUTH"]


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "implicit"])
@pytest.mark.parametrize("flaw", ["other authority", "other name", "expired", "tls 1.1"])
@pytest.mark.both_loops
async def test_a_flawed_certificate_gets_no_credential_and_no_mail(
    authority: trustme.CA, ca_file: str, flaw: str, implicit: bool
) -> None:
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    match flaw:
        case "other authority":
            context = server_context(trustme.CA())
        case "other name":
            context = server_context(authority, "mail.example.org")
        case "expired":
            context = server_context(authority, not_after=long_ago)
        case _:
            context = server_context(authority)
            context.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.warns(DeprecationWarning, match="TLSv1_1"):
                context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with (
        ScriptedUpstream(tls=context, implicit_tls=implicit, users=USERS) as upstream,
        relaying(secured(upstream, ca_file)) as forwarder,
    ):
        relayed = await relay(forwarder)
        # A server that finds no common version just closes, and then nobody knows why.
        assert relayed.told is (replies.UPSTREAM_LOST if flaw == "tls 1.1" else replies.UPSTREAM_TLS)
        assert upstream.kept == []
        assert set(upstream.verbs) <= {"EHLO", "STARTTLS"}


async def test_the_systems_authorities_are_asked_where_none_is_given(authority: trustme.CA) -> None:
    async with ScriptedUpstream(tls=server_context(authority), users=USERS) as upstream:
        with pytest.raises(ConnectFailed) as caught:
            await opened(secured(upstream, None))
        assert caught.value.reply is replies.UPSTREAM_TLS


@pytest.mark.parametrize(
    ("offers", "fault", "told"),
    [
        (False, None, replies.UPSTREAM_TLS),  # STRIPTLS: the keyword is gone
        (True, Fault(Kind.REFUSE, b"454 4.7.0 not now\r\n"), replies.UPSTREAM_TLS),
        (True, Fault(Kind.REFUSE, b"554 5.7.0 never\r\n"), replies.UPSTREAM_TLS),
        (True, Fault(Kind.CLOSE), replies.UPSTREAM_LOST),
        (True, Fault(Kind.GARBAGE), replies.UPSTREAM_PROTOCOL),
        (True, Fault(Kind.TWICE), replies.UPSTREAM_PROTOCOL),
    ],
)
@pytest.mark.both_loops
async def test_starttls_that_is_not_to_be_had_is_never_done_without(
    authority: trustme.CA, ca_file: str, offers: bool, fault: Fault | None, told: replies.Reply
) -> None:
    faults = {Phase.STARTTLS: fault} if fault is not None else {}
    context = server_context(authority)
    async with ScriptedUpstream(tls=context if offers else None, users=USERS, faults=faults) as upstream:
        settings = secured(upstream, ca_file, tls=TlsMode.STARTTLS)
        async with relaying(settings) as forwarder:
            assert (await relay(forwarder)).told == quoting(told, said_by(fault))
        assert upstream.kept == []
        assert set(upstream.verbs) <= {"EHLO", "STARTTLS", "QUIT"}


@pytest.mark.parametrize("injected", [b"250-up\r\n250 AUTH PLAIN\r\n", b"250 ok\r\n", b"x"])
@pytest.mark.both_loops
async def test_octets_injected_before_tls_end_the_connection(
    authority: trustme.CA, ca_file: str, injected: bytes
) -> None:
    async with ScriptedUpstream(
        tls=server_context(authority), users=USERS, injected_after_starttls=injected
    ) as upstream:
        with pytest.raises(ConnectFailed) as caught:
            await opened(secured(upstream, ca_file))
        assert caught.value.reply is replies.UPSTREAM_PROTOCOL
        assert upstream.verbs == ["EHLO", "STARTTLS"]


@pytest.mark.both_loops
async def test_tls_sessions_are_resumed(authority: trustme.CA, ca_file: str) -> None:
    async with (
        ScriptedUpstream(tls=server_context(authority)) as upstream,
        relaying(secured(upstream, ca_file, credentials=None)) as forwarder,
    ):
        resumed = []
        for _ in range(2):
            relayed = await relay(forwarder)
            tls = relayed.seen.deliveries[0].tls
            assert tls is not None
            resumed.append(tls.resumed)
            # Only the connection goes; what its TLS session was stays.
            upstream.drop_connections()
            await until(lambda: not forwarder.snapshot()[0].pool.idle)
        assert resumed == [False, True]


async def test_a_client_certificate_is_shown(authority: trustme.CA, ca_file: str, tmp_path: Path) -> None:
    context = server_context(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    ours = tmp_path / "client.pem"
    authority.issue_cert("gw.example").private_key_and_cert_chain_pem.write_to_path(str(ours))
    async with ScriptedUpstream(tls=context, implicit_tls=True) as upstream:
        settings = secured(upstream, ca_file, credentials=None, certificate_file=str(ours))
        async with relaying(settings) as forwarder:
            assert (await relay(forwarder)).told.code == 250
        async with relaying(secured(upstream, ca_file, credentials=None)) as forwarder:
            assert (await relay(forwarder)).told.is_transient


async def test_a_given_context_is_used(authority: trustme.CA) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with ScriptedUpstream(tls=server_context(authority)) as upstream:
        connection = await opened(secured(upstream, None, tls_context=context, credentials=None))
        assert connection.stream.tls is not None


def test_our_contexts_verify_and_want_tls_1_2() -> None:
    context = UpstreamTlsContext.create()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        UpstreamTlsContext.create(ca_file="/does/not/exist.pem")


# AUTH ---------------------------------------------------------------------------------------------------------


class Tokens:
    """A source of tokens in the test's hand."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = list(tokens)
        self.invalidated = 0

    async def token(self) -> str:
        if not self.tokens:
            raise OSError("none left")
        return self.tokens[0]

    def invalidate(self) -> None:
        self.invalidated += 1
        self.tokens.pop(0)


@pytest.mark.parametrize(
    ("auth", "offered", "expected"),
    [
        ("auto", ("PLAIN", "LOGIN", "SCRAM-SHA-256"), "SCRAM-SHA-256"),
        ("auto", ("LOGIN", "PLAIN"), "PLAIN"),
        ("auto", ("LOGIN",), "LOGIN"),
        ("plain", ("PLAIN", "SCRAM-SHA-256"), "PLAIN"),
        ("login", ("PLAIN", "LOGIN"), "LOGIN"),
        ("scram-sha-256", ("SCRAM-SHA-256",), "SCRAM-SHA-256"),
    ],
)
async def test_the_best_mechanism_that_is_wanted_and_offered(auth: str, offered: Sequence[str], expected: str) -> None:
    async with ScriptedUpstream(users=USERS, mechanisms=offered) as upstream:
        settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=SECRET, auth=auth, timeouts=PATIENT)
        async with relaying(settings) as forwarder:  # the loopback interface: the one place for AUTH in clear
            assert (await relay(forwarder)).told.code == 250
        assert upstream.kept[0].user == "relay"
        assert f"AUTH {expected}".encode() in upstream.commands


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "SCRAM-SHA-256"])
async def test_a_refused_password_is_our_configurations_fault_and_is_not_repeated(
    mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = Credentials("relay", "wr0ng")
    encoded = base64.b64encode(b"\0relay\0wr0ng").decode()
    refusal = f"535 5.7.8 no Relay ({encoded}) with wr0ng, Tenant says AuthenticationUnsuccessful\r\n".encode()
    async with ScriptedUpstream(users=USERS, mechanisms=(mechanism,), auth_refusal=refusal) as upstream:
        settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=wrong, timeouts=PATIENT)
        async with relaying(settings) as forwarder:
            relayed = await relay(forwarder)
            if relayed.seen.deliveries[0].reply is None:
                assert mechanism == "SCRAM-SHA-256"  # it is broken off: the upstream proves nothing
                assert relayed.told is replies.UPSTREAM_LOGIN
            else:
                # Its words are told, but for what we said of ourselves.
                words = "535 5.7.8 no [...] ([...]) with [...], Tenant says AuthenticationUnsuccessful"
                assert relayed.told.wire == f"451 4.4.1 Login to the upstream failed: {words}\r\n".encode()
                assert str(relayed.seen.deliveries[0].reply) == words
                assert words in repr([one.__dict__ for one in caplog.records])
        assert upstream.verbs.count("AUTH") == 1
        assert upstream.kept == []
    assert "wr0ng" not in caplog.text
    assert "wr0ng" not in repr(settings) + repr([one.__dict__ for one in caplog.records])


@pytest.mark.parametrize("offered", [(), ("CRAM-MD5",)])
async def test_no_wanted_mechanism_means_no_mail(offered: Sequence[str]) -> None:
    users = USERS if offered else {}
    async with ScriptedUpstream(users=users, mechanisms=offered) as upstream:
        settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=SECRET, timeouts=PATIENT)
        async with relaying(settings) as forwarder:
            assert (await relay(forwarder)).told is replies.UPSTREAM_LOGIN
        assert upstream.kept == []


async def test_auth_off_sends_no_credential() -> None:
    async with ScriptedUpstream(users=USERS) as upstream:
        settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=SECRET, auth="off", timeouts=PATIENT)
        async with relaying(settings) as forwarder:
            assert (await relay(forwarder)).told.code == 250
        assert "AUTH" not in upstream.verbs


@pytest.mark.parametrize(("host", "leaves"), [("192.0.2.25", False), ("2001:db8::25", False), ("127.9.9.9", True)])
async def test_no_credential_leaves_this_machine_in_clear(host: str, leaves: bool) -> None:
    stream = FakeStream(peer=Endpoint(host, 25))
    connection = UpstreamConnection(stream, Timeouts())
    settings = UpstreamSettings("up", host, 25, credentials=SECRET, auth="plain")
    stream.feed(b"220 up\r\n")
    introducing = asyncio.ensure_future(introduce(connection, settings, None, "gw.example", note_nothing))
    await stream.sends(b"EHLO gw.example\r\n")
    stream.feed(b"250-up\r\n250 AUTH PLAIN\r\n")
    if leaves:
        await stream.sends(b"AUTH PLAIN AHJlbGF5AHMzY3JldA==\r\n")
        stream.feed(b"235 ok\r\n")
        await introducing
    else:
        with pytest.raises(ConnectFailed) as caught:
            await introducing
        assert caught.value.reply is replies.UPSTREAM_TLS
        assert stream.sent == b""


async def test_xoauth2_renews_a_refused_token() -> None:
    tokens = Tokens("old", "new")
    credentials = Credentials("relay", tokens=tokens)
    async with ScriptedUpstream(tokens={"relay": "new"}, mechanisms=("PLAIN", "XOAUTH2")) as upstream:
        settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=credentials, timeouts=PATIENT)
        async with relaying(settings) as forwarder:
            assert (await relay(forwarder)).told.text.startswith(replies.UPSTREAM_LOGIN.text + ": 535")
            assert tokens.invalidated == 1
            assert (await relay(forwarder)).told.code == 250
            assert upstream.kept[0].user == "relay"


async def test_no_token_means_no_mail() -> None:
    for credentials in (Credentials("relay", tokens=Tokens()), Credentials("relay", tokens=Tokens("not a token"))):
        async with ScriptedUpstream(tokens={"relay": "x"}, mechanisms=("XOAUTH2",)) as upstream:
            settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=credentials, timeouts=PATIENT)
            async with relaying(settings) as forwarder:
                assert (await relay(forwarder)).told is replies.UPSTREAM_LOGIN
            assert "AUTH" not in upstream.verbs


@pytest.mark.parametrize(
    "challenge",
    [
        b"r=other,s=c2FsdHNhbHRzYWx0,i=4096",  # not our nonce
        b"r=NONCEx,s=c2FsdHNhbHRzYWx0,i=%d" % (MAX_ITERATIONS + 1),  # hours of our processor
        b"r=NONCEx,s=c2FsdHNhbHRzYWx0",
        b"nonsense",
        b"\xff",
        b"",
    ],
)
async def test_scram_challenges_that_are_not_answered(challenge: bytes) -> None:
    mechanism = choose("scram-sha-256", ("SCRAM-SHA-256",), SECRET)
    assert mechanism is not None
    first = await mechanism.initial_response()
    assert first is not None
    with pytest.raises(ExchangeFailed):
        await mechanism.respond(challenge.replace(b"NONCE", first.partition(b"r=")[2]))


async def test_an_upstream_that_does_not_prove_itself_is_not_believed() -> None:
    mechanism = choose("auto", ("SCRAM-SHA-256",), SECRET)
    assert mechanism is not None
    first = await mechanism.initial_response()
    assert first is not None
    with pytest.raises(ExchangeFailed):
        mechanism.check_success()  # 235 at once
    await mechanism.respond(first.replace(b"n,,n=relay,", b"") + b"more,s=c2FsdHNhbHRzYWx0,i=4096")
    with pytest.raises(ExchangeFailed):
        await mechanism.respond(b"v=AAAA")


async def test_questions_that_never_end_are_not_answered() -> None:
    for name, questions in (("LOGIN", 2), ("PLAIN", 0)):
        mechanism = choose("auto", (name,), SECRET)
        assert mechanism is not None
        await mechanism.initial_response()
        for _ in range(questions):
            await mechanism.respond(b"?")
        with pytest.raises(ExchangeFailed):
            await mechanism.respond(b"?")
    with pytest.raises(ValueError):
        choose("cram-md5", ("CRAM-MD5",), SECRET)
    with pytest.raises(ExchangeFailed):
        choose("login", ("LOGIN",), Credentials("", ""))


async def test_auth_that_stalls_or_is_garbled_fails_the_connection() -> None:
    for fault in (Fault(Kind.CLOSE), Fault(Kind.GARBAGE), Fault(Kind.GOODBYE), Fault(Kind.REFUSE, b"334 !\r\n")):
        async with ScriptedUpstream(users=USERS, mechanisms=("PLAIN",), faults={Phase.AUTH: fault}) as upstream:
            settings = UpstreamSettings("up", "127.0.0.1", upstream.port, credentials=SECRET, timeouts=PATIENT)
            async with relaying(settings) as forwarder:
                assert (await relay(forwarder)).told.is_transient
            assert upstream.kept == []


# Closing ------------------------------------------------------------------------------------------------------


async def test_quit_is_said_without_waiting_for_its_reply() -> None:
    async with ScriptedUpstream(extensions=EXTENSIONS) as upstream:
        settings = UpstreamSettings("up", "127.0.0.1", upstream.port, timeouts=PATIENT)
        phases: list[tuple[DeliveryPhase, Reply | None]] = []
        connection = await open_connection(settings, None, "gw.example", lambda *step: phases.append(step))
        connection.close()
        connection.close()
        await connection.stream.wait_closed()
        assert phases[0] == (DeliveryPhase.CONNECT, None)
        assert "1 messages" not in repr(connection)
