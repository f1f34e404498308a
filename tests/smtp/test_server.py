"""The engine's memory, whatever a client sends: what is said and what is recorded, the dialogues tell."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import Auth
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.smtp.received import HeaderFacts
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.server import ServerProtocol
from otel_smtp.smtp.server.replying import NOTHING_RECEIVED
from otel_smtp.smtp.states import TlsMode, Transition
from tests.support.events import AuthRequested, AuthResponded

MIB: Final = 1024 * 1024
PIECE: Final = 64 * 1024
# One line, one read and one header block at most (see ServerProtocol), each copied once or twice on its way.
BOUND: Final = 2 * MIB


class Forgetful:
    """A driver that keeps nothing of what the engine says: what grows is the engine's.

    Attributes:
        last: the reply given last.
        replies: how many were given.
    """

    def __init__(self, limits: ServerLimits, *, commands_per_turn: int = 100) -> None:
        self.last: Reply | None = None
        self.replies = 0
        policy = ServerPolicy("gw.example.com", limits=limits, commands_per_turn=commands_per_turn)
        offer = Extensions(chunking=True, binary_mime=True)
        self.protocol = ServerProtocol(policy, self, offer=lambda: offer, recorded=_Nowhere(), said=self)
        self.protocol.accepted(TlsMode.OFF)
        self.protocol.greet()

    @property
    def has_ended(self) -> bool:
        """Whether the engine has ended the session."""
        return self.protocol.close_reason is not None

    def append(self, said: tuple[str | None, Reply]) -> None:
        """Take a reply."""
        self.last = said[1]
        self.replies += 1

    def feed(self, octets: bytes) -> None:
        """The client sends `octets`; all that can be answered is, positively."""
        self.protocol.receive_data(octets)
        while self.protocol.wants_turn:
            self.protocol.data_to_send()
            self.protocol.run()
        self.protocol.data_to_send()

    def hello_received(self, verb: str, name: str) -> None:
        pass

    def mail_requested(self, mail: Mail) -> Reply:
        return replies.SENDER_OK

    def recipients_requested(self, recipients: Sequence[Recipient]) -> None:
        self.protocol.reply(*[replies.RECIPIENT_OK] * len(recipients))

    def tls_requested(self) -> None:
        raise AssertionError("TLS is not offered")

    def auth_requested(self, mechanism: str, initial_response: bytes | None) -> None:
        raise AssertionError("AUTH is not offered")

    def auth_responded(self, response: bytes) -> None:
        raise AssertionError("AUTH is not offered")

    def content_begun(self) -> None:
        pass

    def header_received(self, block: bytes, facts: HeaderFacts) -> None:
        pass

    def content_received(self, data: bytes) -> None:
        pass

    def as_sent(self, reply: Reply, *, is_of_content: bool) -> Reply:
        """See `Handler`."""
        return reply

    def recipient_refused(self, recipient: Recipient, reply: Reply) -> None:
        pass

    def message_received(self, block: bytes, facts: HeaderFacts, body: bytes) -> None:
        self.protocol.reply(replies.OK)

    def content_ended(self, octets: int) -> None:
        self.protocol.reply(replies.OK)

    def transaction_aborted(self, reply: Reply | None) -> None:
        pass


class _Nowhere:
    def append(self, transition: Transition) -> None:
        pass


ENVELOPE: Final = b"EHLO c\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@there.example>\r\n"


def test_a_session_that_waits_holds_no_buffer_of_its_own() -> None:
    idle, halfway = Forgetful(ServerLimits()), Forgetful(ServerLimits())
    said = ENVELOPE + b"DATA\r\nSubject: x\r\n\r\nText\r\n.\r\nNOOP\r\n"
    for octet in said:
        idle.feed(bytes([octet]))
        halfway.feed(bytes([octet]))
    halfway.feed(b"NO")
    assert idle.protocol.received is NOTHING_RECEIVED
    assert (NOTHING_RECEIVED.held, halfway.protocol.received.held) == (b"", b"NO")


def endless_command() -> Iterator[bytes]:
    yield b"NOOP "
    for _ in range(1024):
        yield b"x" * PIECE


def endless_lines_too_long() -> Iterator[bytes]:
    for _ in range(1024):
        yield (b"x" * 4000 + b"\r\n") * 16


def endless_text_line() -> Iterator[bytes]:
    yield ENVELOPE + b"DATA\r\n"
    for _ in range(1024):
        yield b"x" * PIECE


def endless_content() -> Iterator[bytes]:
    yield ENVELOPE + b"DATA\r\n"
    for _ in range(1024):
        yield b"12345678901234\r\n" * (PIECE // 16)


def endless_header() -> Iterator[bytes]:
    yield ENVELOPE + b"DATA\r\n"
    for _ in range(1024):
        yield b"X-Y: 123456789\r\n" * (PIECE // 16)


def tiny_chunks() -> Iterator[bytes]:
    yield ENVELOPE
    for _ in range(40):
        yield b"BDAT 2\r\n\r\n" * 500


def empty_chunks() -> Iterator[bytes]:
    yield ENVELOPE
    for _ in range(40):
        yield b"BDAT 0\r\n" * 500


def commands_before_the_first_hello() -> Iterator[bytes]:
    for _ in range(40):
        yield b"NOOP\r\n" * 500


def recipients_beyond_the_limit() -> Iterator[bytes]:
    yield ENVELOPE
    for number in range(40):
        yield b"".join(b"RCPT TO:<r%d.%d@there.example>\r\n" % (number, each) for each in range(500))


def messages_without_end() -> Iterator[bytes]:
    yield b"EHLO c\r\n"
    for _ in range(100):
        yield b"MAIL FROM:<>\r\nRCPT TO:<b@there.example>\r\nDATA\r\n" + b"x" * 1000 + b"\r\n.\r\n"


@pytest.mark.parametrize(
    ("stream", "has_ended", "last"),
    [
        (endless_command, True, replies.LINE_DISCARD_EXCEEDED),
        (endless_lines_too_long, True, replies.TOO_MANY_ERRORS),
        (endless_text_line, True, 552),
        (endless_content, True, 552),
        (endless_header, True, 552),
        (tiny_chunks, False, 250),
        (empty_chunks, True, replies.TOO_MANY_JUNK_COMMANDS),
        (commands_before_the_first_hello, True, replies.TOO_MANY_JUNK_COMMANDS),
        (recipients_beyond_the_limit, True, replies.TOO_MANY_REFUSALS),
        (messages_without_end, False, 250),
    ],
)
def test_no_client_makes_the_engine_grow(
    stream: Callable[[], Iterator[bytes]], has_ended: bool, last: Reply | int
) -> None:
    driver = Forgetful(ServerLimits(message_size=8 * MIB))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for octets in stream():
            driver.feed(octets)
            if driver.has_ended:
                break
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert driver.has_ended is has_ended
    assert driver.last is not None
    assert driver.last.code == last if isinstance(last, int) else driver.last is last
    assert peak - before < BOUND
    assert after - before < BOUND


def test_no_repr_shows_what_a_client_said_in_auth() -> None:
    """A repr ends up in an exception's text, and that in a log."""
    for said in (
        Auth("PLAIN", "AHVzZXIAc2VjcmV0"),
        AuthRequested("PLAIN", b"\0user\0secret"),
        AuthResponded(b"secret"),
    ):
        assert "secret" not in repr(said)
        assert "c2VjcmV0" not in repr(said)


def test_a_client_that_pipelines_gets_its_turn_and_no_more() -> None:
    driver = Forgetful(ServerLimits(junk_commands=10_000), commands_per_turn=10)
    protocol = driver.protocol
    protocol.receive_data(b"EHLO c\r\n" + b"NOOP\r\n" * 95)
    turns = []
    while protocol.wants_turn:
        turns.append(driver.replies)
        protocol.run()
    assert turns == [1 + 10 * turn for turn in range(1, 10)]  # the greeting is before them
    assert driver.replies == 97


def test_a_client_that_says_no_more_than_a_turn_holds_does_not_wait_for_one() -> None:
    driver = Forgetful(ServerLimits(), commands_per_turn=10)
    driver.protocol.receive_data(b"EHLO c\r\n" + b"NOOP\r\n" * 9)
    assert not driver.protocol.wants_turn
    assert driver.replies == 11


@pytest.mark.parametrize(
    ("before", "rest"),
    [
        (b"EHLO c\r\n", b"MAIL FROM:<a@client.example>\r\n"),
        (b"EHLO c\r\nMAIL FROM:<a@client.example>\r\n", b"RCPT TO:<b@there.example>\r\n"),
        (b"EHLO c\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@there.example>\r\n", b"DATA\r\n"),
    ],
)
def test_the_rest_of_a_line_that_is_too_long_is_no_command(before: bytes, rest: bytes) -> None:
    driver = Forgetful(ServerLimits(command_line=600))
    driver.feed(before)
    driver.feed(b"x" * 700)
    driver.feed(rest)
    assert driver.last is replies.LINE_TOO_LONG


class Asking(Forgetful):
    """Keeps whom it was asked about."""

    def __init__(self, limits: ServerLimits, *, commands_per_turn: int) -> None:
        self.asked: list[str] = []
        super().__init__(limits, commands_per_turn=commands_per_turn)

    def recipients_requested(self, recipients: Sequence[Recipient]) -> None:
        self.asked += [recipient.address for recipient in recipients]
        super().recipients_requested(recipients)


def test_nothing_is_run_before_commands_that_wait_for_their_turn() -> None:
    driver = Asking(ServerLimits(), commands_per_turn=2)
    driver.feed(b"EHLO c\r\nMAIL FROM:<a@client.example>\r\n")
    driver.protocol.receive_data(b"RCPT TO:<b@there.example>\r\nDATA\r\n")
    assert driver.protocol.wants_turn
    driver.feed(b"RCPT TO:<c@there.example>\r\n")  # behind DATA, so it is content
    assert driver.last is replies.SEND_CONTENT
    assert driver.asked == ["b@there.example"]
