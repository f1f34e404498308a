"""Target: `ClientProtocol`. The input is what is asked of it, how the replies are cut, and what the upstream says.

Octet 0 says what is asked for, 1 how the replies are cut, 2 and 3 how many octets the envelope and the content have;
they follow. The rest is what the upstream says; an octet 0xFF ends a flight of it. After each flight the client asks
for what comes next, as a delivery does.

Claimed: nothing but the two documented errors is raised; a message succeeds only by a 2yz that came after all of it was
sent; answers are the replies in their order; each command is one line without control octets; the upstream gets the
content as it was; cutting the replies changes nothing; what is held is bounded.
"""

import re
from dataclasses import dataclass, field
from typing import Final

from otel_smtp.smtp.client import Answer, Awaited, ClientProtocol, challenge_of, is_safe_path
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.errors import LocalProtocolError, RemoteProtocolError
from tests.fuzz.server import pieces
from tests.support.held import held_octets

HEAD_OCTETS: Final = 4
MAX_LINE_OCTETS: Final = 200
MAX_LINES: Final = 12

_COMMAND: Final = re.compile(rb"(?:[ -~]|[\xc2-\xf4][\x80-\xbf]+)*")
_REPLY: Final = re.compile(rb"(?:([2-5][0-9][0-9])-[^\n]*\n)*([2-5][0-9][0-9])(?: [^\n]*|\r?)\n")
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


@dataclass(slots=True)
class Wishes:
    """What octet 0 asks for."""

    bits: int

    @property
    def is_lmtp(self) -> bool:
        """LHLO, and a reply for each recipient."""
        return bool(self.bits & 1)

    @property
    def wants_chunks(self) -> bool:
        """BDAT, where it is offered."""
        return bool(self.bits & 2)

    @property
    def in_pieces(self) -> bool:
        """The content travels in pieces."""
        return bool(self.bits & 4)

    @property
    def wants_tls(self) -> bool:
        """STARTTLS, where it is offered."""
        return bool(self.bits & 8)

    @property
    def wants_auth(self) -> bool:
        """AUTH, where it is offered."""
        return bool(self.bits & 16)

    @property
    def says_helo(self) -> bool:
        """HELO in place of EHLO."""
        return bool(self.bits & 32)

    @property
    def is_in_group(self) -> bool:
        """The content's command is queued with the envelope."""
        return bool(self.bits & 64)

    @property
    def is_utf8(self) -> bool:
        """MAIL with SMTPUTF8, and every other parameter."""
        return bool(self.bits & 128)


@dataclass(slots=True)
class Story:
    """What one conversation did."""

    answers: list[tuple[Awaited | None, int]] = field(default_factory=list)
    sent: bytearray = field(default_factory=bytearray)
    is_broken: bool = False
    had_success: bool = False


class _Delivery:
    """Asks as a delivery does: a step for each flight of the upstream."""

    def __init__(self, wishes: Wishes, envelope: list[str], content: bytes) -> None:
        self.wishes = wishes
        self.client = ClientProtocol(
            is_lmtp=wishes.is_lmtp, max_reply_line_octets=MAX_LINE_OCTETS, max_reply_lines=MAX_LINES
        )
        self.story = Story()
        self.commands: list[bytes] = []
        self.asked = 0  # replies that are due for what was sent
        self.end_is_sent = False
        self._envelope = envelope
        self._content = content
        self._stage = "hello"
        self._has_tls = False

    def send(self) -> None:
        self.story.sent += self.client.data_to_send()

    def read(self, data: bytes) -> list[Answer]:
        """All answers there are."""
        found: list[Answer] = []
        while answers := self.client.receive(data):
            data = b""  # what lies behind the last answer is judged by the next call
            for answer in answers:
                found.append(answer)
                self.story.answers.append((answer.verb, answer.reply.code))
                self._judge(answer)
        return found

    def _judge(self, answer: Answer) -> None:
        verb, reply = answer
        assert reply.wire.isascii()
        assert all(line.isprintable() for line in reply.lines)
        if verb is Awaited.CONTENT and reply.is_positive:
            assert self.end_is_sent, "success before the end of the content"
            self.story.had_success = True

    def ask(self, answers: list[Answer]) -> None:
        """What comes next; raises RemoteProtocolError."""
        client, wishes = self.client, self.wishes
        last = answers[-1] if answers else None
        if last is not None and last.verb is Awaited.DATA and last.reply.code == 354 and not client.is_closing:
            self._send_content()
            self.send()
            return
        if client.is_closing or not client.is_settled or not client.is_in_step:
            self.send()
            return
        match self._stage:
            case "hello":
                if wishes.says_helo and not wishes.is_lmtp:
                    client.send_helo("gw.example")
                else:
                    client.send_hello("gw.example")
                self._stage = "secure"
            case "secure" if wishes.wants_tls and client.extensions.starttls and not self._has_tls:
                client.send_starttls()
                self._stage = "handshake"
            case "handshake" if last is not None and last.reply.is_positive:
                client.tls_started()
                assert not client.extensions.starttls
                self._has_tls = True
                self._stage = "hello"
                self.ask([])
                return
            case "secure" | "handshake" if wishes.wants_auth and "LOGIN" in client.extensions.auth_mechanisms:
                client.send_auth("LOGIN")
                self._stage = "auth"
            case "auth" if last is not None and last.reply.code == 334:
                try:
                    challenge_of(last.reply)
                except RemoteProtocolError:
                    self._stage = "quit"  # the connection is closed without another word
                else:
                    client.send_auth_response(b"s3cret")
            case "secure" | "handshake" | "auth":
                self._begin()
            case "envelope":
                if client.accepted_recipients:
                    self._begin_content()
                else:
                    client.send_reset()
                    self._stage = "reset"
            case "content" | "reset":
                client.send_quit()
                self._stage = "quit"
            case _:
                return
        self.send()

    def _begin(self) -> None:
        wishes = self.wishes
        reverse_path, *recipients = self._envelope
        everything = wishes.is_utf8
        self._queue(
            lambda: self.client.send_envelope(
                Mail(
                    reverse_path,
                    size=len(self._content),
                    body=Body.EIGHT_BIT_MIME if everything else None,
                    smtputf8=everything,
                    ret=DsnReturn.HEADERS if everything else None,
                    envid=reverse_path if everything else None,
                    require_tls=everything,
                    auth=reverse_path if everything else None,
                )
            )
        )
        for address in recipients:
            self._queue(
                lambda address=address: self.client.send_envelope(
                    None,
                    [Recipient(address, Notify.NEVER if everything else None, address if everything else None)],
                )
            )
        self._stage = "envelope"
        if wishes.is_in_group:
            self._begin_content()

    def _queue(self, command: object) -> None:
        assert callable(command)
        try:
            command()
        except LocalProtocolError:
            return  # an argument that must not stand in a command: nothing of it may travel, see `_judge_wire`

    def _begin_content(self) -> None:
        client, content = self.client, self._content
        half = len(content) // 2
        self._stage = "content"
        if not (self.wishes.wants_chunks and client.extensions.chunking):
            client.send_data()
        elif self.wishes.in_pieces and client.is_settled:
            client.begin_last_chunk(len(content))
            self.send()
            client.send_chunk_octets(content[:half])
            self.send()
            client.send_chunk_octets(content[half:])
            self.end_is_sent = True
        else:
            client.send_last_chunk(content[:half], content[half:])

    def _send_content(self) -> None:
        client, content = self.client, self._content
        third = len(content) // 3 if self.wishes.in_pieces else 0
        client.send_content(content[:third])
        self.send()
        client.send_content(content[third : 2 * third])
        client.send_content(content[2 * third :])
        client.end_content()
        self.end_is_sent = True


def run(data: bytes) -> None:
    """One conversation twice: whole flights, and cut."""
    if len(data) < HEAD_OCTETS:
        return
    for address in data[HEAD_OCTETS:].decode("utf-8", "surrogateescape").split("\n")[:5]:
        if is_safe_path(address) and address.isascii():
            ClientProtocol().send_envelope(None, [Recipient(address)])  # what is called safe is not refused
    whole = _converse(data, is_cut=False)
    cut = _converse(data, is_cut=True)
    assert cut.answers[: len(whole.answers)] == whole.answers
    if whole.answers == cut.answers:
        assert cut.is_broken == whole.is_broken
        assert cut.sent == whole.sent
    else:
        # What came with the last reply made it doubtful; behind it, it is only a fault.
        assert whole.is_broken
        more = [verb for verb, _ in cut.answers[len(whole.answers) :]]
        assert more in ([more[0]], [Awaited.CONTENT, Awaited.QUIT])
    assert not whole.had_success or cut.had_success


def _converse(data: bytes, *, is_cut: bool) -> Story:
    wishes, cut, envelope_octets, content_octets = Wishes(data[0]), data[1], data[2] & 127, data[3]
    end = HEAD_OCTETS + envelope_octets
    envelope = data[HEAD_OCTETS:end].decode("utf-8", "surrogateescape").split("\n")[:5]
    content = _LINE_END.sub(b"\r\n", data[end : end + content_octets])
    said = data[end + content_octets :]
    delivery = _Delivery(wishes, envelope, content)
    heard = bytearray()
    for flight in said.split(b"\xff"):
        answers: list[Answer] = []
        try:
            for piece in pieces(flight, cut) if is_cut else ([flight] if flight else []):
                heard += piece
                answers += delivery.read(piece)
                _check_bound(delivery.client)
                if delivery.client.fault is not None:
                    raise delivery.client.fault
            if wishes.wants_chunks:
                # Once the last octet of a group has travelled, its end may be answered.
                delivery.end_is_sent = delivery.end_is_sent or b" LAST\r\n" in delivery.story.sent
            delivery.ask(answers)
            delivery.end_is_sent = delivery.end_is_sent or b" LAST\r\n" in delivery.story.sent
        except RemoteProtocolError:
            assert delivery.client.fault is not None
            assert delivery.client.data_to_send() == b""
            break
    story = delivery.story
    story.is_broken = delivery.client.fault is not None
    _judge_order(bytes(heard), [code for _, code in story.answers])
    _judge_wire(bytes(story.sent), content, is_data=(Awaited.DATA, 354) in story.answers, is_utf8=wishes.is_utf8)
    return story


def _check_bound(client: ClientProtocol) -> None:
    if client.fault is None and not client.queued:
        # The lines of one reply, and one that is not whole.
        assert held_octets(client) <= MAX_LINE_OCTETS * (MAX_LINES + 1)


def _judge_order(heard: bytes, codes: list[int]) -> None:
    """The answers are the upstream's replies, in their order."""
    position = 0
    for code in codes:
        match = _REPLY.match(heard, position)
        assert match is not None, "an answer without a reply"
        assert int(match[2]) == code
        position = match.end()


def _judge_wire(sent: bytes, content: bytes, *, is_data: bool, is_utf8: bool) -> None:
    """Read what was sent as a server would."""
    position = 0
    while position < len(sent):
        end = sent.index(b"\r\n", position)
        line = sent[position:end]
        position = end + 2
        assert _COMMAND.fullmatch(line), f"a command of {line!r}"
        assert line.isascii() or (is_utf8 and b"SMTPUTF8" in sent)
        if line.startswith((b"MAIL ", b"RCPT ")):
            # Whoever looks for the end of the path finds the one that was meant.
            assert line.split(b":", 1)[1].startswith(b"<")
        elif line.startswith(b"BDAT "):
            octets = int(line.split()[1])
            assert sent[position : position + octets] in content
            position += octets
        elif line == b"DATA" and is_data:
            end = sent.find(b"\r\n.\r\n", end)
            if end < 0:
                # The upstream broke the protocol in its midst.
                assert content.startswith((b"\r\n" + sent[position:]).replace(b"\r\n.", b"\r\n")[2:])
                return
            received = (b"\r\n" + sent[position : end + 2]).replace(b"\r\n.", b"\r\n")[2:]
            assert received in (content, content + b"\r\n")
            position = end + 5
