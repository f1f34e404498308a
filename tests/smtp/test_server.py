"""The engine's memory, whatever a client sends: what is said and what is recorded, the dialogues tell."""

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import Auth
from otel_smtp.smtp.events import (
    AuthRequested,
    AuthResponded,
    ConnectionEnding,
    ContentEnded,
    MailRequested,
    RecipientRequested,
    Wait,
)
from otel_smtp.smtp.extensions import Offer
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.server import ServerLimits, ServerPolicy, ServerProtocol
from otel_smtp.smtp.states import TlsMode, Transition

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

    def __init__(self, limits: ServerLimits) -> None:
        self.last: Reply | None = None
        self.replies = 0
        self.has_ended = False
        policy = ServerPolicy("gw.example.com", limits=limits)
        offer = Offer(chunking=True, binary_mime=True)
        self._protocol = ServerProtocol(policy, self._seen, offer=lambda: offer, on_reply=self._replied)
        self._protocol.accepted(TlsMode.OFF)
        self._protocol.greet()

    def _seen(self, transition: Transition) -> None:
        pass

    def _replied(self, verb: str | None, reply: Reply) -> None:
        self.last = reply
        self.replies += 1

    def feed(self, octets: bytes) -> None:
        """The client sends `octets`; all that can be answered is, positively."""
        self._protocol.receive_data(octets)
        unanswered: list[Reply] = []
        while True:
            event = self._protocol.next_event()
            match event:
                case MailRequested():
                    self._protocol.reply(replies.SENDER_OK)
                case RecipientRequested():
                    unanswered.append(replies.RECIPIENT_OK)
                case ContentEnded():
                    self._protocol.reply(replies.OK)
                case ConnectionEnding():
                    self.has_ended = True
                case Wait():
                    if not unanswered:
                        break
                    for reply in unanswered:
                        self._protocol.reply(reply)
                    unanswered.clear()
        self._protocol.data_to_send()


ENVELOPE: Final = b"EHLO c\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@there.example>\r\n"


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
        (recipients_beyond_the_limit, False, replies.TOO_MANY_RECIPIENTS),
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
