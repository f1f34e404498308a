"""The spool's values: messages, deliveries, recipients, views of them."""

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

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no characters that people confuse
_TIME_BITS, _RANDOM_BITS, _DIGITS = 48, 80, 26
_HALF: Final = (1 << _RANDOM_BITS // 2) - 1
_PAIRS: Final = tuple(first + second for first in _ALPHABET for second in _ALPHABET)

_last = 0
_time_written = (-1, "")  # the last id's time, to about a second, and its digits, which many ids share
_making = threading.Lock()


def new_id() -> str:
    """A unique name for a message or a file, never used again: 26 characters, sorted by time.

    Short ids that repeat have made operators delete the wrong mail; 80 random bits per millisecond do not. Within one
    process they only grow, even within a millisecond or if the clock is set back. They are not secret: a generator that
    asks the kernel each time would cost the spool's thread its turn.
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
    # Unrolled, with numbers that fit a machine word: this runs for every message.
    high, low = number >> 40 & _HALF, number & _HALF
    return (
        written + _PAIRS[time_of_it & 1023]
        + _PAIRS[high >> 30] + _PAIRS[high >> 20 & 1023] + _PAIRS[high >> 10 & 1023] + _PAIRS[high & 1023]
        + _PAIRS[low >> 30] + _PAIRS[low >> 20 & 1023] + _PAIRS[low >> 10 & 1023] + _PAIRS[low & 1023]
    )  # fmt: skip


class SpoolError(Exception):
    """The spool cannot do what was requested; the text says why, for operators."""


class StorageFull(SpoolError):
    """No room: new mail is refused with 452, and queued mail is not touched."""


class StorageBroken(SpoolError):
    """The disk or the index failed. Nothing is accepted or delivered until the gateway is restarted."""


class StorageAway(SpoolError):
    """The database cannot be reached or is read-only now: 451, and retries."""


class StorageBusy(StorageAway):
    """The database accepts messages, but slower than they come: 451 meanwhile."""


class ContentLost(SpoolError):
    """A content is missing or incomplete."""


class StaleLease(SpoolError):
    """A result came from a gateway that no longer owns the delivery; it is refused."""


class NoSuchMessage(SpoolError):
    """There is no message with this id."""


class DeliveryState(StrEnum):
    """The state of a delivery: the recipients of one destination within one message."""

    READY = "ready"  # due, now or later
    LEASED = "leased"  # being attempted
    HELD = "held"  # until an operator releases it
    CORRUPT = "corrupt"  # its content is damaged or gone


class End(StrEnum):
    """The end of an accepted recipient; each has exactly one."""

    DELIVERED = "delivered"
    FAILED = "failed"  # refused permanently; bounced if the sender wants a notice
    EXPIRED = "expired"  # too old; bounced as above
    REMOVED = "removed"  # by an operator


class Kind(StrEnum):
    """The kind of a message: a client's or our own."""

    MAIL = "mail"  # a client's
    # Of ours:
    BOUNCE = "bounce"
    DELAY_WARNING = "delay_warning"
    SUCCESS_REPORT = "success_report"
    NOTIFICATION = "notification"  # any of these, as stored by earlier versions
    # For the application, by HTTP and not by mail: a recipient's outcome.
    OUTCOME = "outcome"


NOTICES: Final = frozenset(Kind) - {Kind.MAIL, Kind.OUTCOME}
"""The kinds that report on a mail. They age even while held: a report must not come years later."""

_REPLIES_CHARACTERS: Final = 1_000_000  # about all recipients of a message
_MOST_REPLY_CHARACTERS: Final = 1000
_LEAST_REPLY_CHARACTERS: Final = 100

OUTCOME_PREFIX: Final = "notify "
"""The prefix of outcomes' destinations; no upstream's name has a space."""


def trace_id_of(carrier: Mapping[str, str]) -> str | None:
    """The trace id of a stored trace context (W3C Trace Context 3.2), if any."""
    parts = carrier.get("traceparent", "").split("-")
    return parts[1] if len(parts) >= 4 else None


class NewMessage(NamedTuple):
    """A message on its way into the spool. The store sets its time of arrival, as gateways' clocks differ.

    Attributes:
        deliveries: its recipients by destination, the name of the upstreams that serve them.
        header_octets: length of the header block at the head of the content.
        expires_in: seconds until it expires.
        carrier: the trace context of its transaction.
        is_possible_duplicate: an upstream may have it already.
        retry_in: seconds until its first attempt here; 0: it is due at once.
        attempts: how many were made before it was queued.
        last_replies: their replies, as text, by recipient address.
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
    """A reference to content in a store.

    Attributes:
        key: its place, for the store that made the reference.
    """

    octets: int
    key: object


class SpooledRecipient(NamedTuple):
    """A recipient that has not ended."""

    number: int  # within its delivery
    recipient: Recipient
    last_reply: str = ""  # the upstream's last reply, or ours; "" before the first attempt


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another gateway had a delivery before, and was silent for too long.

    Attributes:
        gateway: its name in telemetry (`service.instance.id`).
        silent_seconds: the time of its silence when it was declared dead.
    """

    gateway: str
    silent_seconds: float


class Lease(NamedTuple):
    """One delivery, leased to one runner for one attempt.

    Attributes:
        delivery, epoch: the store's numbers; a result with an older epoch is refused.
        attempt: the attempt's number, from 1, committed before this lease was given.
        arrived_at, expires_at: seconds since the epoch, by the store's clock.
        is_possible_duplicate: an upstream may have taken an earlier attempt.
        taken_over: the gateway of the previous attempt, if that gateway died.
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
    """A delivery being moved from one store to another; times are as in `MovedMessage`.

    Attributes:
        due_in: negative if it is due already.
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
    """A queued message being moved from one store to another, with its whole state. Times are durations in
    seconds, since the clocks of two stores differ.

    Attributes:
        age: since it arrived.
        expires_in: negative if it has expired.
        held_for: for how long it has not aged; None: it ages.
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
    """An attempt's result for one recipient.

    Attributes:
        end: None: it will be retried.
        reply: of the upstream, or ours; None without one.
    """

    number: int
    end: End | None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class MessageView:
    """A queued message for operators; times are seconds since the epoch.

    Attributes:
        recipients: address, state of its delivery, last reply.
        next_attempt_at: of the delivery due first.
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
    """A gateway that shares the queue. Its name is its `service.instance.id` in telemetry.

    Attributes:
        started_at: seconds since the epoch.
        alive_for: seconds until other gateways may take its deliveries over; negative: seconds since.
        leases: deliveries that it attempts.
        is_this: it is the reporting gateway itself.
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
    """A gateway that no longer shares the queue.

    Attributes:
        id: of its incarnation, as `Peer` has it.
        at: seconds since the epoch.
        silent_seconds: the time of its silence when it was declared dead; None: it left in order.
        deliveries: how many it had, which continue elsewhere.
        found_by: the gateway that declared it dead; "" if it left in order.
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
        departures: those known to this process, the latest first.
    """

    gateways: Sequence[Peer]
    departures: Sequence[Departure] = ()


@dataclass(frozen=True, slots=True)
class ShareOfQueue:
    """This process's part in a shared queue.

    Attributes:
        is_housekeeper: it does the counting for all.
        gateways: their number.
        away_seconds: how long the database has been silent, beyond what leases allow; 0: it answers.
        taken_over: deliveries of dead gateways that this process let others continue.
        stale: results discarded as too late.
        unanswered: messages stored although their client was answered 451.
    """

    is_housekeeper: bool
    gateways: int
    away_seconds: float
    taken_over: int
    stale: int
    unanswered: int


class StoreVerb(StrEnum):
    """An operation of a store, as metrics distinguish them.

    SUBMIT, FINISH: make messages, and results of attempts, durable; concurrent ones share a group. CLAIM: lease due
    deliveries. READ: read content. LIMIT: permits and connection slots. OTHER: operators' commands, and upkeep.
    """

    SUBMIT = "submit"
    FINISH = "finish"
    CLAIM = "claim"
    READ = "read"
    LIMIT = "limit"
    OTHER = "other"


Timing = tuple[StoreVerb, float, int]
"""An operation of a store: the verb, its duration in seconds, and how many messages and results shared it; 0 if these
are counted for another verb, or for none.
"""
Timings = deque[Timing]

MOST_TIMINGS: Final = 8192
"""The most timings kept until they are read; the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The spool at one moment: deliveries by state, and the arrival of the oldest message.

    Attributes:
        ready: due now. deferred: due later. active: being attempted.
        oldest_arrived_at: seconds since the epoch; None while it is empty.
        next_due_at: of the deferred ones; as above.
        dead_octets: disk space of messages that have ended.
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
        """The numbers by the names of the states."""
        return {name: getattr(self, name) for name in ("ready", "deferred", "active", "held", "corrupt")}

    @property
    def total(self) -> int:
        """All deliveries."""
        return self.ready + self.deferred + self.active + self.held + self.corrupt


@dataclass(frozen=True, slots=True)
class Backlog:
    """The outcomes that wait for one receiver, or are being sent, without held ones.

    Attributes:
        oldest_arrived_at: seconds since the epoch; None if none waits.
    """

    pending: int = 0
    oldest_arrived_at: float | None = None


def reply_room(recipients: int) -> int:
    """The most characters of a reply that are kept for each recipient, and reported to the sender.

    The result of an attempt is one step, whose size is bounded.

    Args:
        recipients: how many recipients have a reply.
    """
    return max(_LEAST_REPLY_CHARACTERS, min(_MOST_REPLY_CHARACTERS, _REPLIES_CHARACTERS // max(1, recipients)))


def is_for_receiver(destination: str) -> bool:
    """Whether a destination is that of outcomes for the application, and not of mail."""
    return destination.startswith(OUTCOME_PREFIX)


def accepted_name(kind: Kind) -> str:
    """The tally's name for accepted recipients."""
    match kind:
        case Kind.MAIL:
            return "accepted"
        case Kind.OUTCOME:
            return "outcomes"
        case _:
            return "notified"


def end_name(kind: Kind, end: End) -> str:
    """The tally's name for an end."""
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
    """The error for a result that comes too late."""
    return StaleLease(f"delivery {lease.delivery} of {lease.message_id} is not ours any more")
