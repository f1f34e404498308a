"""Target: `ServerProtocol`. The input is how the listener speaks, what is decided, how it is cut, and what is said.

Octets 0 and 1 are the policy's bits, 2 to 5 the decisions, taken in turn and again from the first, 6 says how the
octets are cut. The rest is what the client says; an octet 0xFF ends a flight, and the next octet is what happens then
(`_Act`). All decisions are made before anything happens, so that the cuts cannot move it.

Beside what `EngineDriver` and `Record` claim: cutting changes nothing, what is held is bounded, and, where the input is
cut into single octets, each reply comes with the octet that ends its command, names its verb, and is the only one.
"""

import re
from collections.abc import Iterator
from itertools import cycle
from typing import Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import Verb
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.states import CloseReason, TlsMode, Transition
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.engine import HOSTNAME, SMALL_LIMITS, EngineDriver, Record
from tests.support.events import TlsRequested
from tests.support.held import held_octets

HEAD_OCTETS: Final = 7
SEPARATOR: Final = 0xFF

# One octet of the input, by its lowest three bits; half of them are yes.
_VERDICTS: Final = (
    None,
    None,
    None,
    None,
    scripted_reply("550 5.7.1 No"),
    scripted_reply("451 4.3.0 Later"),
    scripted_reply("421 4.3.2 Closing"),
    scripted_reply("452"),
)


class _Act:
    """What the octet behind a separator says."""

    HANDSHAKE_FAILS: Final = ord("f")
    SHUTDOWN: Final = ord("s")
    TIMEOUT: Final = ord("t")
    BUG: Final = ord("b")
    END: Final = ord("e")
    GONE: Final = ord("g")


def policy_of(first: int, second: int) -> ServerPolicy:
    """The policy that two octets stand for."""
    tls = (TlsMode.OFF, TlsMode.STARTTLS, TlsMode.STARTTLS, TlsMode.IMPLICIT)[first & 3]
    return ServerPolicy(
        HOSTNAME,
        is_lmtp=bool(first & 4),
        tls_mode=tls,
        tls_required=bool(first & 8) and tls is not TlsMode.OFF,
        auth_mechanisms=((), ("PLAIN",), ("LOGIN",), ("PLAIN", "LOGIN"))[first >> 4 & 3],
        auth_required=bool(first & 64),
        auth_in_clear=bool(first & 128),
        rejects_bare_line_ends=bool(second & 1),
        limits=ServerLimits() if second & 2 else SMALL_LIMITS,
    )


def script_of(second: int) -> UpstreamScript:
    """What the upstream offers."""
    lacks = {"8BITMIME": 4, "SMTPUTF8": 8, "BINARYMIME": 16, "DSN": 32}
    return UpstreamScript(
        lacks=frozenset(keyword for keyword, bit in lacks.items() if second & bit), size=150 if second & 64 else None
    )


class Driver(EngineDriver):
    """Answers as the input decides."""

    def __init__(self, policy: ServerPolicy, second: int, decisions: bytes, *, is_late: bool) -> None:
        self._decisions = cycle(decisions)
        self.largest_piece_octets = 0
        self.line = bytearray()  # what was said of the command that is being said
        late = cycle((True, False, True, True, False)) if is_late else None
        super().__init__(
            policy, script_of(second), answers_late=(lambda: False) if late is None else (lambda: next(late))
        )

    def _verdict(self, otherwise: Reply) -> Reply:
        return _VERDICTS[next(self._decisions) & 7] or otherwise

    def mail_reply(self) -> Reply:
        """See `EngineDriver`."""
        return self._verdict(replies.SENDER_OK)

    def recipient_reply(self, recipient: Recipient) -> Reply:
        """See `EngineDriver`. Never a 421: it would end the session with the rest of its group handed up already."""
        verdict = self._verdict(replies.RECIPIENT_OK)
        return verdict if verdict.code != 421 else replies.UPSTREAM_UNAVAILABLE

    def tls_reply(self) -> Reply:
        """See `EngineDriver`."""
        return self._verdict(replies.TLS_READY)

    def content_replies(self, count: int) -> list[Reply]:
        """See `EngineDriver`."""
        return [self._verdict(replies.message_accepted()) for _ in range(count)]


def flights(said: bytes) -> Iterator[tuple[bytes, int]]:
    """Each flight, and what happens behind it."""
    start = 0
    while (end := said.find(SEPARATOR, start)) >= 0:
        yield said[start:end], said[end + 1] if end + 1 < len(said) else 0
        start = end + 2
    yield said[start:], 0


def pieces(flight: bytes, cut: int) -> Iterator[bytes]:
    """`flight` in pieces of a size that changes from piece to piece."""
    start = 0
    sizes = cycle((cut & 7 or 1, cut >> 3 & 7 or 2, cut >> 6 or 40))
    while start < len(flight):
        end = start + next(sizes)
        yield flight[start:end]
        start = end


def run(data: bytes) -> None:
    """One session twice: in whole flights, and cut."""
    if len(data) < HEAD_OCTETS:
        return
    whole = _session(data, is_cut=False)
    cut = _session(data, is_cut=True)
    assert cut.transitions == whole.transitions
    assert cut.replies == whole.replies
    assert cut.events == whole.events
    assert cut.messages == whole.messages


def _session(data: bytes, *, is_cut: bool) -> Record:
    policy = policy_of(data[0], data[1])
    cut = data[6] if is_cut else 0
    # Cut into single octets, answered at once: then it is known which octet each reply answers.
    is_judged = is_cut and cut < 128
    driver = Driver(policy, data[1], data[2:6], is_late=is_cut and not is_judged)
    protocol = driver.protocol
    if policy.tls_mode is TlsMode.IMPLICIT:
        if data[1] & 128:
            protocol.tls_failed()
            driver.settle()
            driver.sent()
            return driver.closed()
        protocol.tls_started("1.3", "x")
    protocol.greet()
    driver.settle()
    driver.sent()
    for flight, act in flights(data[HEAD_OCTETS:]):
        if is_judged:
            _feed_judged(driver, flight)
        else:
            for piece in pieces(flight, cut) if is_cut else ([flight] if flight else []):
                driver.feed([piece])
                _check_bound(driver, len(piece))
        driver.settle()
        driver.sent()
        _check_bound(driver, len(flight))
        if not _happens(driver, act):
            break
    driver.end_of_stream()
    driver.sent()
    record = driver.closed()
    protocol.closed(CloseReason.TIMEOUT)  # the second time says nothing
    assert record.transitions == driver.record.transitions
    return record


def _happens(driver: Driver, act: int) -> bool:
    """Make it happen; whether the session goes on."""
    protocol = driver.protocol
    if protocol.phase is Phase.HANDSHAKE and driver.ending is None and act != _Act.GONE:
        if act == _Act.HANDSHAKE_FAILS:
            protocol.tls_failed()
        elif act == _Act.SHUTDOWN:
            protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
        else:
            protocol.tls_started("1.3", "x")
    elif act == _Act.SHUTDOWN:
        protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
    elif act == _Act.TIMEOUT:
        protocol.fail(replies.TIMED_OUT, CloseReason.TIMEOUT)
    elif act == _Act.BUG:
        protocol.fail(None, CloseReason.INTERNAL_ERROR)
    elif act == _Act.END:
        driver.end_of_stream()
    driver.settle()
    driver.sent()
    return driver.ending is None and act not in (_Act.GONE, _Act.END)


def _check_bound(driver: Driver, fed_octets: int) -> None:
    driver.largest_piece_octets = max(driver.largest_piece_octets, fed_octets)
    driver.sent()  # replies that wait to be written are the driver's to take
    if driver.waits_for_data:
        limits = driver.policy.limits
        # One line, what one read brought, one header block, and what the readers cannot decide yet.
        bound = max(limits.command_line, limits.auth_line) + driver.largest_piece_octets + limits.header_size + 16
        assert held_octets(driver.protocol) <= bound, "more is held than the limits allow"


# The judge of single octets ----------------------------------------------------------------------------------------

_VERB: Final = re.compile(rb"[A-Za-z]+")
_COMMAND_PHASES: Final = (Phase.CONNECTED, Phase.READY, Phase.MAIL, Phase.RECIPIENTS, Phase.CHUNKING)


def _feed_judged(driver: Driver, flight: bytes) -> None:
    """Feed octet by octet; each reply must come with the CRLF of its command, alone, and name its verb."""
    line = driver.line
    for place, octet in enumerate(flight):
        if driver.ending is not None or driver.waits_for_handshake or driver.waits_for(TlsRequested):
            driver.feed([flight[place:]])  # nothing of it may be run
            return
        before = driver.protocol.phase
        recipients = driver.recipient_count
        count = len(driver.record.steps)
        driver.feed([bytes([octet])])
        given = [step for step in driver.record.steps[count:] if not isinstance(step, Transition)]
        line.append(octet)
        is_line = line.endswith(b"\r\n")
        if is_line:
            _check_bound(driver, 1)
        if before in _COMMAND_PHASES:
            _judge_command(driver, bytes(line), [(verb, reply.code) for verb, reply in given], is_line=is_line)
        elif before is Phase.AUTHENTICATING:
            assert len(given) == is_line or (not is_line and driver.protocol.phase is Phase.ENDING)
        elif before is Phase.CONTENT:
            assert len(given) <= (max(1, recipients) if driver.policy.is_lmtp else 1) or driver.ending is not None
            assert all(verb in (Verb.DATA, Verb.BDAT) for verb, _ in given)
        if is_line or driver.protocol.phase is not before:
            line.clear()


def _judge_command(driver: Driver, line: bytes, given: list[tuple[str | None, int]], *, is_line: bool) -> None:
    if not is_line:
        # TLS or HTTP is noticed at its first octets, a line without end at the bound of what is read off.
        assert not given or driver.protocol.phase is Phase.ENDING
        return
    word = _VERB.match(line)
    said = word[0].decode().upper() if word is not None else ""
    if said == Verb.BDAT and not given:
        assert driver.protocol.phase is Phase.CONTENT
        return
    if said == Verb.STARTTLS and driver.waits_for(TlsRequested):
        assert not given
        return
    if driver.protocol.phase is Phase.ENDING and not given:
        return  # TLS or HTTP
    if said == Verb.BDAT:
        return  # of no octets: as many replies as the message has recipients
    assert len(given) == 1, f"{len(given)} replies to {line!r}"
    verb = given[0][0]
    assert verb in (said, "other", None), f"{verb} answers {line!r}"
