"""What the spool holds, as values."""

import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: nothing that people confuse
_TIME_BITS, _RANDOM_BITS, _DIGITS = 48, 80, 26
_HALF: Final = (1 << _RANDOM_BITS // 2) - 1
_PAIRS: Final = tuple(first + second for first in _ALPHABET for second in _ALPHABET)

_last = 0
_time_written = (-1, "")  # the time of the last id, but for its last second or so, and the digits: many ids share it
_making = threading.Lock()


def new_id() -> str:
    """A name for a message or a file that was never used before and never will be: 26 characters, sorted by time.

    Short ids that come again have made operators delete the wrong mail; 80 random bits a millisecond do not. Within one
    process they only grow, also within a millisecond and while the clock is set back. They are names and no secrets: a
    generator that asks the kernel each time would cost the spool's thread its turn.
    """
    global _last, _time_written
    now = time.time_ns() // 1_000_000
    with _making:
        number = _last = max(
            _last + 1,
            (now & ((1 << _TIME_BITS) - 1)) << _RANDOM_BITS | random.getrandbits(_RANDOM_BITS),
        )
        time_of_it = number >> _RANDOM_BITS
        if time_of_it >> 10 != _time_written[0]:
            digits = [_PAIRS[time_of_it >> place & 1023] for place in (40, 30, 20, 10)]
            _time_written = (time_of_it >> 10, "".join(digits))
        written = _time_written[1]
    # Written out, and in numbers that fit into a machine's word: this is done for every message.
    high, low = number >> 40 & _HALF, number & _HALF
    return (
        written + _PAIRS[time_of_it & 1023]
        + _PAIRS[high >> 30] + _PAIRS[high >> 20 & 1023] + _PAIRS[high >> 10 & 1023] + _PAIRS[high & 1023]
        + _PAIRS[low >> 30] + _PAIRS[low >> 20 & 1023] + _PAIRS[low >> 10 & 1023] + _PAIRS[low & 1023]
    )  # fmt: skip


class SpoolError(Exception):
    """The spool cannot do what is asked; the text says why, for operators."""


class StorageFull(SpoolError):
    """No room: the mail is refused with 452, and nothing that is queued is touched."""


class StorageBroken(SpoolError):
    """The disk or the index failed. Nothing is accepted or delivered until the gateway is restarted."""


class StorageAway(SpoolError):
    """The database cannot be reached or does not take anything now: 451, and it is tried again."""


class StorageBusy(StorageAway):
    """The database takes what it is given, and not as fast as it comes: 451, as long as that is so."""


class ContentLost(SpoolError):
    """A content is not there, or not all of it."""


class StaleLease(SpoolError):
    """A result came from a gateway that no longer owns the delivery; it is refused."""


class NoSuchMessage(SpoolError):
    """There is no message of that id."""


class DeliveryState(StrEnum):
    """Where a delivery stands: the messages of one destination within one message."""

    READY = "ready"  # due, now or later
    LEASED = "leased"  # being attempted
    HELD = "held"  # only an operator lets it go on
    CORRUPT = "corrupt"  # its content is damaged or gone


class End(StrEnum):
    """How an accepted recipient ended; each ends as exactly one of these."""

    DELIVERED = "delivered"
    FAILED = "failed"  # refused for good; bounced where the sender wants to know
    EXPIRED = "expired"  # too old; bounced as above
    REMOVED = "removed"  # by an operator


class Kind(StrEnum):
    """Whose message it is."""

    MAIL = "mail"  # a client's
    # Of ours:
    BOUNCE = "bounce"
    DELAY_WARNING = "delay_warning"
    SUCCESS_REPORT = "success_report"
    NOTIFICATION = "notification"  # any of these, as earlier versions stored them
    # For the application, by HTTP and not by mail: what became of a recipient.
    OUTCOME = "outcome"


NOTICES: Final = frozenset(Kind) - {Kind.MAIL, Kind.OUTCOME}
"""Those that report on a mail. They age also while they are held: a report must not come years later."""

OUTCOME_PREFIX: Final = "notify "
"""What the destinations of outcomes begin with; no upstream's name has a space."""


def trace_id_of(carrier: Mapping[str, str]) -> str | None:
    """The trace id of a stored trace context (W3C Trace Context 3.2); None where there is none."""
    parts = carrier.get("traceparent", "").split("-")
    return parts[1] if len(parts) >= 4 else None


class NewMessage(NamedTuple):
    """A message on its way into the spool. When it arrives is the store's to say: clocks of gateways differ.

    Attributes:
        deliveries: its recipients by destination, the name of the upstreams that serve them.
        header_octets: length of the header block at the head of the content.
        expires_in: after how many seconds it is given up.
        carrier: the trace context of its transaction.
        is_possible_duplicate: an upstream may have it already.
        retry_in: how many seconds it waits for its first attempt here; 0: it is due at once.
        attempts: how many were made at its recipients before it came here.
        last_replies: what they came to, as text, by the recipient's address.
    """

    id: str
    mail: Mail
    deliveries: Mapping[str, Sequence[Recipient]]
    header_octets: int
    expires_in: float
    carrier: Mapping[str, str] = MappingProxyType({})
    kind: Kind = Kind.MAIL
    is_possible_duplicate: bool = False
    retry_in: float = 0.0
    attempts: int = 0
    last_replies: Mapping[str, str] = MappingProxyType({})


class ContentRef(NamedTuple):
    """A content in a store.

    Attributes:
        key: where it is, for the store that gave it only.
    """

    octets: int
    key: object


class SpooledRecipient(NamedTuple):
    """A recipient that has not ended."""

    number: int  # within its delivery
    recipient: Recipient
    last_reply: str = ""  # what the upstream, or we, said last; "" before the first attempt


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another gateway had a delivery before, and was silent for too long.

    Attributes:
        gateway: its name in telemetry (`service.instance.id`).
        silent_seconds: for how long, when it was declared dead.
    """

    gateway: str
    silent_seconds: float


class Lease(NamedTuple):
    """One delivery, given to one runner for one attempt.

    Attributes:
        delivery, epoch: the store's: a result with an older epoch is refused.
        attempt: which this is, from 1; it was committed before this lease was given.
        arrived_at, expires_at: seconds since the epoch, by the store's clock.
        is_possible_duplicate: an attempt before may have been taken by an upstream.
        taken_over: from which gateway, if the attempt before was another's that died.
    """

    delivery: int
    epoch: int
    message_id: str
    kind: Kind
    mail: Mail
    destination: str
    recipients: Sequence[SpooledRecipient]
    attempt: int
    arrived_at: float
    expires_at: float
    carrier: Mapping[str, str]
    content: ContentRef
    header_octets: int
    is_possible_duplicate: bool
    taken_over: TakenOver | None = None


@dataclass(frozen=True, slots=True)
class MovedDelivery:
    """A delivery on its way from one store into another; times are as in `MovedMessage`.

    Attributes:
        due_in: negative where it is due already.
    """

    number: int
    destination: str
    state: DeliveryState
    attempts: int
    crashes: int
    due_in: float
    is_possible_duplicate: bool
    recipients: Sequence[SpooledRecipient]


@dataclass(frozen=True, slots=True)
class MovedMessage:
    """A queued message on its way from one store into another, with all that is known of it. Times are durations in
    seconds, since the clocks of two stores differ.

    Attributes:
        age: since it arrived.
        expires_in: negative where it is too old.
        held_for: since when it does not age; None: it does.
        content: the source's.
    """

    id: str
    kind: Kind
    mail: Mail
    carrier: Mapping[str, str]
    age: float
    expires_in: float
    held_for: float | None
    is_warned: bool
    is_forced_to_expire: bool
    header_octets: int
    content: ContentRef
    deliveries: Sequence[MovedDelivery]


class Verdict(NamedTuple):
    """What an attempt made of one recipient.

    Attributes:
        end: None: it is tried again.
        reply: of the upstream, or ours; None where there was none.
    """

    number: int
    end: End | None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class MessageView:
    """A queued message as operators see it; times are seconds since the epoch.

    Attributes:
        recipients: address, state of its delivery, last reply.
        next_attempt_at: of the delivery that is due first.
        header_octets: length of the header block at the head of the content.
        gateways: those that attempt it now, where several share the queue. leased_at: since when the first of them
            does; None: none does.
    """

    id: str
    kind: Kind
    state: DeliveryState
    arrived_at: float
    expires_at: float
    octets: int
    reverse_path: str
    recipients: Sequence[tuple[str, DeliveryState, str]]
    attempts: int
    next_attempt_at: float
    carrier: Mapping[str, str]
    is_forced_to_expire: bool
    content: ContentRef
    header_octets: int
    gateways: Sequence[str] = ()
    leased_at: float | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway that shares the queue. Its name is that in telemetry (`service.instance.id`).

    Attributes:
        started_at: seconds since the epoch.
        alive_for: for how many seconds nobody may take its deliveries over; below 0, for how long somebody may have.
        leases: deliveries that it attempts.
        is_this: it is the one that says so.
    """

    id: str
    name: str
    version: str
    started_at: float
    alive_for: float
    leases: int
    is_this: bool = False


@dataclass(frozen=True, slots=True)
class Departure:
    """A gateway that shares the queue no longer.

    Attributes:
        id: of its incarnation, as `Peer` has it.
        at: seconds since the epoch.
        silent_seconds: for how long it had said nothing when it was declared dead; None: it left in order.
        deliveries: that it had, and that go on elsewhere.
        found_by: the gateway that declared it dead; "" where it left in order.
    """

    id: str
    name: str
    at: float
    silent_seconds: float | None = None
    deliveries: int = 0
    found_by: str = ""


@dataclass(frozen=True, slots=True)
class Company:
    """All gateways of a shared queue.

    Attributes:
        departures: those that this process has heard of, the last first.
    """

    gateways: Sequence[Peer]
    departures: Sequence[Departure] = ()


@dataclass(frozen=True, slots=True)
class ShareOfQueue:
    """How this process stands in a shared queue.

    Attributes:
        is_housekeeper: it counts for all.
        gateways: how many there are.
        away_seconds: for how long the database has been silent, beyond what leases allow; 0: it answers.
        taken_over: deliveries of others that went on, as this process found out.
        stale: results that came too late.
        unanswered: messages that were stored though their client was answered 451.
    """

    is_housekeeper: bool
    gateways: int
    away_seconds: float
    taken_over: int
    stale: int
    unanswered: int


class StoreVerb(StrEnum):
    """An operation of a store, as metrics distinguish it.

    SUBMIT, FINISH: to make messages, and results of attempts, durable; those that come together share a group.
    CLAIM: what is due. READ: a content. LIMIT: permits and connection slots. OTHER: whatever operators ask, and upkeep.
    """

    SUBMIT = "submit"
    FINISH = "finish"
    CLAIM = "claim"
    READ = "read"
    LIMIT = "limit"
    OTHER = "other"


Timing = tuple[StoreVerb, float, int]
"""What a store did: the verb, how many seconds that took, and how many messages and results shared it; 0 where that is
counted for another verb, or for none."""
Timings = deque[Timing]

MOST_TIMINGS: Final = 8192
"""Which were not asked for; the oldest go."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The spool at one moment: messages by state, and the age of the oldest.

    Attributes:
        ready: due now. deferred: due later. active: being attempted.
        oldest_arrived_at: seconds since the epoch; None while it is empty.
        next_due_at: of those that are due later; as above.
        dead_octets: of the disk, held by messages that have ended.
    """

    ready: int = 0
    deferred: int = 0
    active: int = 0
    held: int = 0
    corrupt: int = 0
    oldest_arrived_at: float | None = None
    next_due_at: float | None = None
    dead_octets: int = 0

    def by_state(self) -> Mapping[str, int]:
        """How many there are of each state, by its name."""
        return {name: getattr(self, name) for name in ("ready", "deferred", "active", "held", "corrupt")}

    @property
    def total(self) -> int:
        """All deliveries."""
        return self.ready + self.deferred + self.active + self.held + self.corrupt


@dataclass(frozen=True, slots=True)
class Backlog:
    """The outcomes that wait for one receiver, or are being sent; not what an operator holds.

    Attributes:
        oldest_arrived_at: seconds since the epoch; None where none waits.
    """

    pending: int = 0
    oldest_arrived_at: float | None = None


def is_for_receiver(destination: str) -> bool:
    """Whether what has that destination is an outcome for the application, and no mail."""
    return destination.startswith(OUTCOME_PREFIX)


def accepted_name(kind: Kind) -> str:
    """The name in the tally of recipients that came."""
    match kind:
        case Kind.MAIL:
            return "accepted"
        case Kind.OUTCOME:
            return "outcomes"
        case _:
            return "notified"


def end_name(kind: Kind, end: End) -> str:
    """The name of an end in the tally."""
    return _END_NAMES[kind, end]


def _end_name(kind: Kind, end: End) -> str:
    match kind:
        case Kind.MAIL:
            return end.value
        case Kind.OUTCOME:
            return f"outcomes_{end.value}"
        case _:
            return f"notified_{end.value}"


_END_NAMES: Final = {(kind, end): _end_name(kind, end) for kind in Kind for end in End}


def stale(lease: Lease) -> StaleLease:
    """The error of a result that comes too late."""
    return StaleLease(f"delivery {lease.delivery} of {lease.message_id} is not ours any more")
