"""What holds for every client whatever, and a model of a session that the engine must agree with.

The first half throws octets at the engine: arbitrary ones, and plausible commands mixed with junk, cut anywhere and
answered at any time. The second half is a model of RFC 5321's sessions and of the nine states, which shares nothing
with the engine's tables and is driven side by side with it.
"""

import random
from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from otel_smtp.smtp.envelope import Body
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server import dispatching, protocol, receiving
from otel_smtp.smtp.states import TlsMode
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.engine import HOSTNAME, SMALL_LIMITS, EngineDriver, Record, base64_of

POLICIES: Final = {
    "plain": ServerPolicy(HOSTNAME, limits=SMALL_LIMITS),
    "all offered": ServerPolicy(
        HOSTNAME,
        tls_mode=TlsMode.STARTTLS,
        auth_mechanisms=("PLAIN", "LOGIN"),
        auth_in_clear=True,
        limits=SMALL_LIMITS,
    ),
    "all required": ServerPolicy(
        HOSTNAME,
        tls_mode=TlsMode.STARTTLS,
        tls_required=True,
        auth_mechanisms=("PLAIN",),
        auth_required=True,
        rejects_bare_line_ends=True,
        limits=SMALL_LIMITS,
    ),
    "implicit TLS": ServerPolicy(HOSTNAME, tls_mode=TlsMode.IMPLICIT, limits=SMALL_LIMITS),
    "LMTP": ServerPolicy(HOSTNAME, is_lmtp=True, limits=SMALL_LIMITS),
    "patient": ServerPolicy(
        HOSTNAME, tls_mode=TlsMode.STARTTLS, auth_mechanisms=("PLAIN",), auth_in_clear=True
    ),  # the defaults: sessions last
}
SCRIPT: Final = UpstreamScript(
    mail=(scripted_reply("250 2.1.0 Ok"), scripted_reply("451 4.4.1 Later")),
    content=(scripted_reply("250 2.0.0 Ok"), scripted_reply("554 5.7.1 No"), scripted_reply("451 4.3.0 Later")),
    recipients={"refused@there.example": scripted_reply("550 5.1.1 Nobody")},
)

COMMANDS: Final = (
    b"EHLO client.example\r\n",
    b"HELO client.example\r\n",
    b"LHLO client.example\r\n",
    b"MAIL FROM:<a@client.example>\r\n",
    b"MAIL FROM:<>\r\n",
    b"MAIL FROM:<a@client.example> BODY=BINARYMIME\r\n",
    b"MAIL FROM:<a@client.example> SIZE=201\r\n",
    b"RCPT TO:<b@there.example>\r\n",
    b"RCPT TO:<refused@there.example>\r\n",
    b"RCPT TO:<\xc3\xa4@there.example>\r\n",
    b"DATA\r\n",
    b"Subject: x\r\n\r\nHello\r\n.\r\n",
    b".\r\n",
    b"..\r\n",
    b"a\0b\r\n.\r\n",
    b"a\nb\r.\r\n.\r\n",
    b"Received: x\r\n" * 3 + b"\r\n.\r\n",
    b"y" * 70 + b"\r\n.\r\n",
    b"BDAT 0 LAST\r\n",
    b"BDAT 5\r\nhello",
    b"BDAT 7 LAST\r\nworld\r\n",
    b"BDAT 6\r\nQUIT\r\n",
    b"BDAT 201\r\n",
    b"BDAT 401\r\n",
    b"BDAT x\r\n",
    b"RSET\r\n",
    b"NOOP\r\n",
    b"VRFY x\r\n",
    b"EXPN x\r\n",
    b"HELP\r\n",
    b"STARTTLS\r\n",
    b"AUTH PLAIN AHVzZXIAc2VjcmV0\r\n",
    b"AUTH PLAIN AHVzZXIAd3Jvbmc=\r\n",
    b"AUTH PLAIN\r\n",
    b"AHVzZXIAc2VjcmV0\r\n",
    b"AUTH LOGIN\r\n",
    b"dXNlcg==\r\n",
    b"*\r\n",
    b"x" * 90 + b"\r\n",
    b"x" * 4000,
    b"GET / HTTP/1.1\r\n",
    b"\x16\x03\x01",
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
)
# Without QUIT until the end: a session that ends at its third command proves little.
SAYINGS = st.lists(st.one_of(st.sampled_from(COMMANDS), st.binary(max_size=12)), max_size=25).map(b"".join)
TRANSACTION: Final = b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@there.example>\r\n"
FLIGHTS = st.lists(
    st.one_of(
        SAYINGS,
        SAYINGS.map(lambda said: TRANSACTION + said),
        SAYINGS.map(lambda said: TRANSACTION + b"DATA\r\n" + said),
        st.binary(max_size=60),
    ),
    max_size=6,
)


def cuts(octets: bytes, chance: random.Random) -> Iterator[bytes]:
    """`octets` in pieces: whole, one by one, or anyhow."""
    match chance.randrange(3):
        case 0:
            yield octets
        case 1 if len(octets) < 300:
            yield from (octets[at : at + 1] for at in range(len(octets)))
        case _:
            places = sorted(chance.randrange(len(octets) + 1) for _ in range(chance.randrange(6)))
            for start, end in zip([0, *places], [*places, len(octets)], strict=True):
                if start < end:
                    yield octets[start:end]


def run(policy: ServerPolicy, flights: list[bytes], chance: random.Random | None) -> Record:
    """A whole session. With `chance`, octets are cut and decisions come late; without, neither."""
    late = (lambda: False) if chance is None else (lambda: chance.random() < 0.5)
    driver = EngineDriver(policy, SCRIPT, answers_late=late)
    if policy.tls_mode is TlsMode.IMPLICIT:
        driver.protocol.tls_started("1.3", "x")
    driver.protocol.greet()
    # The greeting phase is the dullest: most sessions should be past it.
    for flight in [b"LHLO c.example\r\n" if policy.is_lmtp else b"EHLO c.example\r\n", *flights]:
        if flight:
            driver.feed([flight] if chance is None else cuts(flight, chance))
        driver.settle()
        driver.sent()
        if driver.protocol.phase is Phase.HANDSHAKE and driver.ending is None:
            driver.protocol.tls_started("1.3", "x")
    driver.end_of_stream()
    driver.sent()
    return driver.closed()


@given(st.sampled_from(sorted(POLICIES)), FLIGHTS, st.integers(0, 2**32))
def test_any_client_gets_replies_or_a_close_and_cutting_changes_nothing(
    policy: str, flights: list[bytes], seed: int
) -> None:
    whole = run(POLICIES[policy], flights, None)
    cut = run(POLICIES[policy], flights, random.Random(seed))
    event(f"messages taken: {len(whole.messages)}")
    assert cut.transitions == whole.transitions
    assert cut.replies == whole.replies
    assert cut.events == whole.events
    assert cut.messages == whole.messages


# What a common mail consists of, as those write it who take the short ways through the engine, and nearly so.
COMMON: Final = (
    b"MAIL FROM:<a@client.example>\r\n",
    b"MAIL FROM:<a@client.example> SIZE=200\r\n",
    b"mail from:<a@client.example> size=201 body=8BITMIME\r\n",
    b"MAIL FROM:<" + b"a" * 50 + b"@client.example> SIZE=10\r\n",  # over the limit of a line
    b"RCPT TO:<b@there.example>\r\n",
    b"rcpt to:<c@there.example>\r\n",
    b"RCPT TO:<" + b"b" * 60 + b"@there.example>\r\n",
    b"DATA\r\n",
    b"data\r\n",
    b"QUIT",
    b"\r\n",
)
MESSAGES: Final = (
    b"Subject: x\r\n\r\nHello\r\n.\r\n",
    b"Subject: x\r\n\r\n.\r\n",
    b"\r\nx\r\n.\r\n",
    b".\r\n",
    b"x\r\n\r\n..dot\r\n.\r\n",
    b"x: \xc3\xa4\r\n\r\n\xff\r\n.\r\n",
    b"x: y\r\n\r\nbare\nend\r\n.\r\n",
    b"x: y\r\n\r\nz\r\n.\r\nNOOP\r\n",
    b"x: " + b"y" * 60 + b"\r\n\r\n" + b"z" * 50 + b"\r\n.\r\n",
    b"x: y\r\n\r\n" + b"z" * 250 + b"\r\n.\r\n",
    b"x: y\r\n\r\nno end\r\n",
)
ODD = st.one_of(
    st.sampled_from(COMMON),
    st.sampled_from(MESSAGES),
    st.sampled_from(COMMANDS),
    st.tuples(st.sampled_from(COMMON), st.sampled_from(COMMON)).map(b"".join),
)


@st.composite
def turns_of_a_mail(draw: st.DrawFn) -> list[bytes]:
    """What a client says in one turn each: a mail, of which something may be odd, too much, or missing."""
    turns = [
        draw(st.sampled_from(COMMON[:4])),
        *draw(st.lists(st.sampled_from(COMMON[4:7]), min_size=1, max_size=5)),
        draw(st.sampled_from(COMMON[7:9])),
        draw(st.sampled_from(MESSAGES)),
    ]
    for odd in draw(st.lists(ODD, max_size=2)):
        at = draw(st.integers(0, len(turns)))
        turns[at : at + draw(st.integers(0, 1))] = [odd]
    return turns


def by_the_long_way(policy: ServerPolicy, flights: list[bytes]) -> Record:
    """As `run`, by an engine without short ways: it holds what comes, reads it as lines, and parses by the grammar."""
    modules = (protocol, dispatching)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "common_mail", lambda line: None)
            patch.setattr(module, "common_recipient", lambda line: None)
        patch.setattr(protocol, "DATA_LINES", frozenset())
        patch.setattr(dispatching, "COMMON_LINES", {})
        patch.setattr(receiving, "whole_message", lambda *_: None)
        return run(policy, flights, None)


@given(st.sampled_from(sorted(POLICIES)), st.lists(turns_of_a_mail(), max_size=4))
def test_short_ways_lead_where_the_long_way_does(policy: str, mails: list[list[bytes]]) -> None:
    flights = [turn for mail in mails for turn in mail]
    short, long = run(POLICIES[policy], flights, None), by_the_long_way(POLICIES[policy], flights)
    event(f"messages taken: {len(short.messages)}")
    assert short.transitions == long.transitions
    assert short.replies == long.replies
    assert short.events == long.events
    assert short.messages == long.messages


@given(st.binary(max_size=400), st.integers(0, 2**32))
def test_arbitrary_octets_never_raise(octets: bytes, seed: int) -> None:
    for policy in POLICIES.values():
        run(policy, [octets], random.Random(seed))


@given(FLIGHTS)
def test_no_reply_repeats_an_octet_that_would_end_a_line(flights: list[bytes]) -> None:
    for _, reply in run(POLICIES["plain"], flights, None).replies:
        assert all(line.isascii() and line.isprintable() for line in reply.lines)


LINES = st.lists(
    st.one_of(
        st.sampled_from([b"", b".", b"..", b".x", b"Subject: x", b"x: y", b" folded", b"text", b"\x80\xff"]),
        st.binary(max_size=20),
    ),
    max_size=12,
)


@given(LINES, st.integers(0, 2**32))
def test_content_arrives_as_it_was_sent(lines: list[bytes], seed: int) -> None:
    lines = [line.translate(None, b"\r\n\0") for line in lines]
    content = b"".join(line + b"\r\n" for line in lines)
    if content.startswith((b" ", b"\t")):
        content = b"\r\n" + content  # so that it does not go on with our own field
    stuffed = b"".join((b"." if line.startswith(b".") else b"") + line + b"\r\n" for line in lines)
    record = run(ServerPolicy(HOSTNAME), [TRANSACTION + b"DATA\r\n" + stuffed + b".\r\n"], random.Random(seed))
    assert [message.content for message in record.messages] == [content]


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(0, 2**32))
def test_binary_content_arrives_as_it_was_sent(chunks: list[bytes], seed: int) -> None:
    said = b"".join(b"BDAT %d\r\n%b" % (len(chunk), chunk) for chunk in chunks) + b"BDAT 0 LAST\r\n"
    opening = b"MAIL FROM:<a@client.example> BODY=BINARYMIME\r\nRCPT TO:<b@there.example>\r\n"
    record = run(ServerPolicy(HOSTNAME), [opening + said], random.Random(seed))
    content = b"".join(chunks)
    if content.startswith((b" ", b"\t")):
        content = b"\r\n" + content  # as above
    assert [message.content for message in record.messages] == [content]


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b".", b"\r\n", b"x", b"RSET", b"\r\n.\r", b"\n."]), max_size=30), st.data()
)
def test_only_crlf_dot_crlf_ends_data(parts: list[bytes], data: st.DataObject) -> None:
    said = b"".join(parts)
    where = (b"\r\n" + said + b"\r\n.\r\n").index(b"\r\n.\r\n") - 2
    seed = data.draw(st.integers(0, 2**32))
    record = run(ServerPolicy(HOSTNAME), [TRANSACTION + b"DATA\r\n" + said + b"\r\n.\r\n"], random.Random(seed))
    content = record.messages[0].content
    # As many line ends as were sent before the end, none of them bare.
    before = said[: max(where, 0)] if where + 2 <= len(said) else said
    assert content.count(b"\r") == content.count(b"\n") == content.count(b"\r\n")
    assert content.replace(b"\r\n", b"").replace(b".", b"") == before.translate(None, b"\r\n.")


class Session(RuleBasedStateMachine):
    """A client and a model of what it must be told, command by command.

    The model knows the rules of RFC 5321 4.1.4, 3207, 4954 and 3030 and the definitions of the states, and no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver = EngineDriver(
            ServerPolicy(
                HOSTNAME,
                tls_mode=TlsMode.STARTTLS,
                auth_mechanisms=("PLAIN",),
                auth_in_clear=True,
                limits=ServerLimits(errors=1000, junk_commands=1000, auth_failures=1000),
            ),
            UpstreamScript(recipients={"refused@there.example": scripted_reply("550 5.1.1 Nobody")}),
        )
        self.states = ["New"]
        self.level = "New"
        self.has_said_hello = False
        self.is_tls = False
        self.is_authenticated = False
        self.mail: Body | None = None
        self.is_in_transaction = False
        self.recipients = 0
        self.is_chunking = False
        self.content = b""
        self.taken: list[bytes] = []

    # The model's means ----------------------------------------------------------------------------------------

    def enter(self, *levels: str) -> None:
        for level in levels:
            if level != self.level:
                self.states.append(level)
                self.level = level

    def pulse(self, state: str) -> None:
        self.states.append(state)

    def says(self, octets: bytes, code: int) -> None:
        """The client says `octets` and must get exactly one reply, with `code`."""
        self.driver.feed([octets])
        self.driver.settle()
        sent = self.driver.sent()
        assert [reply[:3] for reply in sent] == [str(code)], (octets, sent)

    def refused(self, octets: bytes, code: int) -> None:
        self.pulse("Error")
        self.says(octets, code)

    def forget_transaction(self) -> None:
        self.is_in_transaction = self.is_chunking = False
        self.recipients = 0
        self.content = b""

    def reset(self) -> None:
        self.pulse("Reset")
        self.states.append("Active")
        self.level = "Active"
        self.forget_transaction()

    # What the client may say ----------------------------------------------------------------------------------

    @initialize()
    def connects(self) -> None:
        self.driver.protocol.greet()
        self.enter("Active")
        assert self.driver.sent()[0].startswith("220 ")

    @rule(verb=st.sampled_from([b"EHLO", b"HELO"]))
    def says_hello(self, verb: bytes) -> None:
        if self.is_in_transaction:
            self.reset()
        self.has_said_hello = True
        self.says(verb + b" client.example\r\n", 250)

    @rule(body=st.sampled_from([None, Body.EIGHT_BIT_MIME, Body.BINARY_MIME]))
    def says_mail(self, body: Body | None) -> None:
        line = b"MAIL FROM:<a@client.example>" + (b"" if body is None else b" BODY=" + body.encode()) + b"\r\n"
        if not self.has_said_hello or self.is_in_transaction:
            self.refused(line, 503)
            return
        self.enter("Active")
        self.says(line, 250)
        self.forget_transaction()
        self.is_in_transaction = True
        self.mail = body

    @rule(is_refused=st.booleans())
    def says_rcpt(self, is_refused: bool) -> None:
        line = b"RCPT TO:<%b@there.example>\r\n" % (b"refused" if is_refused else b"b")
        if not self.is_in_transaction or self.is_chunking:
            self.refused(line, 503)
        elif is_refused:
            self.refused(line, 550)
        else:
            self.says(line, 250)
            self.recipients += 1

    def ends(self, octets: bytes, reply: Reply | None, content: bytes) -> None:
        """The end of a message that the upstream answers with `reply`, or takes."""
        if reply is None:
            self.enter("Active")
            self.taken.append(content)
            self.says(octets, 250)
        else:
            self.driver.refuse_next_content(reply)
            self.refused(octets, reply.code)
        self.enter("Idle")
        self.forget_transaction()

    @rule(verdict=st.sampled_from([None, None, "451 4.3.0 Later", "554 5.7.1 No"]))
    def says_data(self, verdict: str | None) -> None:
        if not self.recipients or self.is_chunking or self.mail is Body.BINARY_MIME:
            self.refused(b"DATA\r\n", 503)
            if self.is_chunking:
                self.enter("Idle")
                self.forget_transaction()
            return
        self.enter("Data")
        self.says(b"DATA\r\n", 354)
        self.ends(b"..x\r\n.\r\n", None if verdict is None else scripted_reply(verdict), b".x\r\n")

    @rule()
    def says_data_with_nul(self) -> None:
        if self.recipients and not self.is_chunking and self.mail is not Body.BINARY_MIME:
            self.enter("Data")
            self.says(b"DATA\r\n", 354)
            self.refused(b"a\0b\r\n.\r\n", 554)
            self.enter("Idle")
            self.forget_transaction()

    @rule(chunk=st.sampled_from([b"", b"RSET\r\n", b"x\r\n"]), is_last=st.booleans())
    def says_bdat(self, chunk: bytes, is_last: bool) -> None:
        octets = b"BDAT %d%b\r\n%b" % (len(chunk), b" LAST" if is_last else b"", chunk)
        if not self.recipients:
            self.refused(octets, 503)
            return
        self.enter("Data")
        self.is_chunking = True
        self.content += chunk
        if is_last:
            self.ends(octets, None, self.content)
        else:
            self.says(octets, 250)

    @rule()
    def says_rset(self) -> None:
        self.reset()
        self.says(b"RSET\r\n", 250)

    @rule(said=st.sampled_from([(b"NOOP", 250), (b"VRFY x", 252), (b"HELP", 214)]))
    def says_what_changes_nothing(self, said: tuple[bytes, int]) -> None:
        self.says(said[0] + b"\r\n", said[1])

    @rule(said=st.sampled_from([(b"FROB", 500), (b"EXPN x", 502), (b"RSET x", 501), (b"MAIL", 501), (b"RCPT", 501)]))
    def says_what_is_refused_anywhere(self, said: tuple[bytes, int]) -> None:
        self.refused(said[0] + b"\r\n", said[1])

    @rule(password=st.sampled_from([b"secret", b"wrong"]))
    def says_auth(self, password: bytes) -> None:
        line = b"AUTH PLAIN " + base64_of(b"\0user\0" + password).encode() + b"\r\n"
        if self.is_in_transaction:
            self.refused(line, 503)
            return
        self.states.append("Auth")
        self.level = "Auth"
        if not self.has_said_hello or self.is_authenticated:
            self.refused(line, 503)
            self.level = "Active"  # falls back, unrecorded
        elif password == b"wrong":
            self.refused(line, 535)
            self.level = "Active"
        else:
            self.enter("Active")
            self.says(line, 235)
            self.is_authenticated = True

    @rule()
    def says_starttls(self) -> None:
        if self.is_in_transaction or not self.has_said_hello or self.is_tls:
            self.refused(b"STARTTLS\r\n", 503)
            return
        self.enter("StartTLS")
        self.says(b"STARTTLS\r\n", 220)
        self.enter("Active")
        self.driver.protocol.tls_started("1.3", "x")
        self.is_tls = True
        self.has_said_hello = self.is_authenticated = False

    @precondition(lambda self: self.is_in_transaction)
    @rule()
    def begins_a_line(self) -> None:
        self.driver.feed([b"NO"])
        self.driver.settle()
        assert self.driver.sent() == []
        self.says(b"OP\r\n", 250)

    @invariant()
    def the_states_are_the_models(self) -> None:
        assert list(self.driver.record.states) == self.states
        assert self.driver.protocol.level == self.level

    @invariant()
    def what_was_taken_is_what_was_sent(self) -> None:
        assert [message.content for message in self.driver.record.messages] == self.taken

    def teardown(self) -> None:
        self.driver.end_of_stream()
        record = self.driver.closed()
        assert [reply for _, reply in record.replies if reply.error_type is ErrorType.INTERNAL] == []
        super().teardown()


Session.TestCase.settings = settings(stateful_step_count=40)
TestSession = Session.TestCase
