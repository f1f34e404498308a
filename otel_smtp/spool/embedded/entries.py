"""A queued message, in the one form used in memory, in records and in the index, as JSON."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Final, NamedTuple

from otel_smtp.smtp.envelope import Mail, Notify
from otel_smtp.spool.embedded.deliveries import DeliveryEntry
from otel_smtp.spool.encoding import mail_of, parameters_of, recipient_of
from otel_smtp.spool.messages import (
    NOTICES,
    ContentRef,
    DeliveryState,
    Kind,
    Lease,
    MessageView,
    MovedDelivery,
    MovedMessage,
    NewMessage,
    SpooledRecipient,
    Verdict,
    accepted_name,
    end_name,
    reply_room,
    stale,
    trace_id_of,
)

# When a million messages are read, a look-up costs a fraction of calling the class.
_KINDS: Final = {kind.value: kind for kind in Kind}
_STATES: Final = {state.value: state for state in DeliveryState}
_MAIL: Final = Kind.MAIL
_LEASED, _READY = DeliveryState.LEASED, DeliveryState.READY
_MOST_TELLING: Final = (DeliveryState.LEASED, DeliveryState.CORRUPT, DeliveryState.HELD, DeliveryState.READY)


# The constructor of a named tuple is a function in Python.
_lease: Final = partial(tuple.__new__, Lease)
_content_ref: Final = partial(tuple.__new__, ContentRef)
_spooled_recipient: Final = partial(tuple.__new__, SpooledRecipient)


class Place(NamedTuple):
    """The place of a message in the log.

    Attributes:
        segment, at, octets: of its record.
        content_at: within the segment; -1: the content has its own file.
        crc: CRC-32 of the content.
    """

    segment: int
    at: int
    octets: int
    content_at: int
    crc: int


class Entry:
    """One message. Instants are milliseconds since the epoch.

    Attributes:
        held_ms: since when it does not age; None: it does.
        place: None until it is durable.
        is_indexed: the index has a row of it, perhaps an older one.
        is_busy: a change of it is being written.
    """

    __slots__ = (
        "arrived_ms", "carrier", "deliveries", "expires_ms", "header_octets", "held_ms", "id", "is_busy", "is_forced",
        "is_indexed", "is_large", "is_warned", "kind", "mail", "octets", "place",
    )  # fmt: skip

    def __init__(
        self,
        message_id: str,
        kind: Kind,
        mail: Mail,
        carrier: Mapping[str, str],
        deliveries: list[DeliveryEntry],
        *,
        arrived_ms: int,
        expires_ms: int,
        header_octets: int,
        octets: int,
        is_large: bool,
        is_warned: bool,
        is_forced: bool = False,
        held_ms: int | None = None,
    ) -> None:
        self.id = message_id
        self.kind = kind
        self.mail = mail
        self.carrier = carrier
        self.deliveries = deliveries
        self.arrived_ms = arrived_ms
        self.expires_ms = expires_ms
        self.header_octets = header_octets
        self.octets = octets
        self.is_large = is_large
        self.is_warned = is_warned
        self.is_forced = is_forced
        self.held_ms = held_ms
        self.place: Place | None = None
        self.is_indexed = False
        self.is_busy = False

    @classmethod
    def of(cls, message: NewMessage, now_ms: int, octets: int, *, is_leased: bool, is_large: bool) -> "Entry":
        """Make the entry of a new message.

        Args:
            octets: of its content.
        """
        state = _LEASED if is_leased else _READY
        due_ms = now_ms + round(message.retry_in * 1000) if message.retry_in else now_ms
        last_replies = message.last_replies
        deliveries: list[DeliveryEntry] = []
        # Loops, as each comprehension is a call, and this runs for every message.
        for destination, recipients in message.deliveries.items():
            waiting: list[SpooledRecipient] = []
            for one in recipients:
                last_reply = last_replies.get(one.address, "") if last_replies else ""
                waiting.append(_spooled_recipient((len(waiting), one, last_reply)))
            deliveries.append(
                DeliveryEntry(
                    len(deliveries), destination, state, message.attempts + is_leased, 0, due_ms, int(is_leased),
                    message.is_possible_duplicate, waiting,
                )
            )  # fmt: skip
        return cls(
            message.id, message.kind, message.mail, message.carrier, deliveries,
            arrived_ms=now_ms, expires_ms=now_ms + round(message.expires_in * 1000),
            header_octets=message.header_octets, octets=octets, is_large=is_large,
            is_warned=not message.mail.reverse_path,
        )  # fmt: skip

    def copy(self) -> "Entry":
        """A copy that can be changed independently."""
        other = Entry(
            self.id, self.kind, self.mail, self.carrier, [one.copy() for one in self.deliveries],
            arrived_ms=self.arrived_ms, expires_ms=self.expires_ms, header_octets=self.header_octets,
            octets=self.octets, is_large=self.is_large, is_warned=self.is_warned, is_forced=self.is_forced,
            held_ms=self.held_ms,
        )  # fmt: skip
        other.place, other.is_indexed = self.place, self.is_indexed
        return other

    # As text ---------------------------------------------------------------------------------------------------

    def encode(self) -> str:
        """Encode the entry without its place."""
        # Assembled by hand, as this runs for every message: an encoder sets itself up for each document, which takes
        # three times as long. Only texts of peers need its escapes.
        mail = self.mail
        parameters = parameters_of(mail)
        deliveries = ""
        for one in self.deliveries:
            recipients = ""
            for number, (address, notify, orcpt), last_reply in one.recipients:
                plain = "null,null" if notify is None and orcpt is None else _optional(notify, orcpt)
                recipients += f",[{number},{quoted(address)},{plain},{quoted(last_reply)}]"
            deliveries += (
                f',[{one.number},{quoted(one.destination)},"{one.state}",{one.attempts},{one.crashes},{one.due_ms},'
                f"{one.epoch},{one.is_possible_duplicate:d},[{recipients[1:]}]]"
            )
        carrier = ""
        for name, value in self.carrier.items():
            carrier += f",{quoted(name)}:{quoted(value)}"
        held = "null" if self.held_ms is None else self.held_ms
        return (
            f'["{self.id}","{self.kind}",{self.arrived_ms},{self.expires_ms},{held},{self.is_warned:d},'
            f"{self.is_forced:d},{self.header_octets},{self.octets},{self.is_large:d},{quoted(mail.reverse_path)},"
            f"{_dumps(parameters) if parameters else 'null'},{{{carrier[1:]}}},[{deliveries[1:]}]]"
        )

    @classmethod
    def decode(cls, text: str | bytes) -> "Entry":
        """Decode the result of `encode`."""
        return cls.from_values(json.loads(text))

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> "Entry":
        """Make the entry from the parsed result of `encode`."""
        (
            message_id, kind, arrived_ms, expires_ms, held_ms, is_warned, is_forced, header_octets, octets, is_large,
            reverse_path, parameters, carrier, deliveries,
        ) = values  # fmt: skip
        return cls(
            message_id, _KINDS[kind], mail_of(reverse_path, parameters), carrier,
            [
                DeliveryEntry(
                    number, destination, _STATES[state], attempts, crashes, due_ms, epoch, bool(dup),
                    [recipient_of(there) for there in recipients],
                )
                for number, destination, state, attempts, crashes, due_ms, epoch, dup, recipients in deliveries
            ],
            arrived_ms=arrived_ms, expires_ms=expires_ms, header_octets=header_octets, octets=octets,
            is_large=bool(is_large), is_warned=bool(is_warned), is_forced=bool(is_forced), held_ms=held_ms,
        )  # fmt: skip

    # Views -------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> tuple[str, int]:
        """The tally's name for accepted recipients, and their number."""
        recipients = 0
        for one in self.deliveries:
            recipients += len(one.recipients)
        return "accepted" if self.kind is _MAIL else accepted_name(self.kind), recipients

    @property
    def is_outcome(self) -> bool:
        """Whether it is an outcome for the application, not mail."""
        return self.kind is Kind.OUTCOME

    @property
    def trace_id(self) -> str | None:
        """The trace id of the transaction that accepted it."""
        return trace_id_of(self.carrier)

    def fits(self, trace_id: str | None, sender: str | None, recipient: str | None) -> bool:
        """Whether it matches the search; None matches anything."""
        return (
            trace_id in (None, self.trace_id)
            and sender in (None, self.mail.reverse_path)
            and (
                recipient is None
                or any(recipient == there.recipient.address for one in self.deliveries for there in one.recipients)
            )
        )

    @property
    def is_leased(self) -> bool:
        """Whether any delivery is being attempted."""
        return any(one.state is DeliveryState.LEASED for one in self.deliveries)

    @property
    def is_corrupt(self) -> bool:
        """Whether any delivery waits for an operator because the content is damaged or lost."""
        return any(one.state is DeliveryState.CORRUPT for one in self.deliveries)

    def delivery(self, number: int) -> DeliveryEntry | None:
        """The delivery with this number, if it has not ended."""
        for one in self.deliveries:
            if one.number == number:
                return one
        return None

    def owned(self, lease: Lease) -> DeliveryEntry:
        """The delivery of a lease.

        Raises:
            StaleLease: it is no longer ours.
        """
        delivery = self.delivery(lease.delivery)
        if delivery is None or delivery.state is not _LEASED or delivery.epoch != lease.epoch:
            raise stale(lease)
        return delivery

    def lease_of(self, delivery: DeliveryEntry) -> Lease:
        """The lease of a delivery."""
        return _lease(
            (
                delivery.number, delivery.epoch, self.id, self.kind, self.mail, delivery.destination,
                delivery.recipients, delivery.attempts, self.arrived_ms / 1000, self.expires_ms / 1000, self.carrier,
                self.content_ref(), self.header_octets, delivery.is_possible_duplicate, None,
            )
        )  # fmt: skip

    def leases(self) -> list[Lease]:
        """Its leased deliveries."""
        leases: list[Lease] = []
        for one in self.deliveries:
            if one.state is _LEASED:
                leases.append(self.lease_of(one))  # noqa: PERF401 - a comprehension is a call more
        return leases

    def content_ref(self) -> ContentRef:
        """The reference to its content, by id, as its place may change."""
        return _content_ref((self.octets, self.id))

    def shown(self) -> MessageView:
        """The view for operators."""
        deliveries = sorted(self.deliveries, key=lambda one: one.due_ms)
        states = [one.state for one in deliveries]
        return MessageView(
            id=self.id,
            kind=self.kind,
            state=next((state for state in _MOST_TELLING if state in states), DeliveryState.READY),
            arrived_at=self.arrived_ms / 1000,
            expires_at=self.expires_ms / 1000,
            octets=self.octets,
            reverse_path=self.mail.reverse_path,
            recipients=[
                (there.recipient.address, one.state, there.last_reply) for one in deliveries for there in one.recipients
            ],
            attempts=max((one.attempts for one in deliveries), default=0),
            next_attempt_at=deliveries[0].due_ms / 1000 if deliveries else 0.0,
            carrier=self.carrier,
            is_forced_to_expire=self.is_forced,
            content=self.content_ref(),
            header_octets=self.header_octets,
        )

    def moved(self, now_ms: int) -> MovedMessage:
        """Its whole state, for another store."""
        return MovedMessage(
            id=self.id,
            kind=self.kind,
            mail=self.mail,
            carrier=self.carrier,
            age=(now_ms - self.arrived_ms) / 1000,
            expires_in=(self.expires_ms - now_ms) / 1000,
            held_for=None if self.held_ms is None else (now_ms - self.held_ms) / 1000,
            is_warned=self.is_warned,
            is_forced_to_expire=self.is_forced,
            header_octets=self.header_octets,
            content=self.content_ref(),
            deliveries=[
                MovedDelivery(
                    one.number, one.destination, one.state, one.attempts, one.crashes, (one.due_ms - now_ms) / 1000,
                    one.is_possible_duplicate, one.recipients,
                )
                for one in self.deliveries
            ],
        )  # fmt: skip

    # Changes ---------------------------------------------------------------------------------------------------

    def ended_by(self, lease: Lease, verdicts: Sequence[Verdict]) -> dict[str, int] | None:
        """The tally of ends if the attempt ends the message; None: something is left.

        Raises:
            StaleLease: the lease is not its delivery's latest one.
        """
        delivery = self.owned(lease)
        recipients = delivery.recipients
        if len(self.deliveries) > 1 or len(verdicts) < len(recipients):
            return None
        if len(recipients) == 1:  # like most messages'
            number, end, _ = verdicts[0]
            return None if end is None or number != recipients[0].number else {end_name(self.kind, end): 1}
        ended: dict[str, int] = {}
        for there, (number, end, _) in zip(recipients, verdicts, strict=False):
            if end is None or number != there.number:  # they are in the order of the recipients
                return None
            name = end_name(self.kind, end)
            ended[name] = ended.get(name, 0) + 1
        return ended

    def settle(
        self,
        lease: Lease,
        verdicts: Sequence[Verdict],
        *,
        now_ms: int,
        due_ms: int,
        is_possible_duplicate: bool,
        counts_attempt: bool,
        hold: bool,
    ) -> dict[str, int]:
        """Apply the result of an attempt; returns the tally of ends.

        Raises:
            StaleLease: the lease is not its delivery's latest one.
        """
        delivery = self.owned(lease)
        by_number = {verdict.number: verdict for verdict in verdicts}
        ended: dict[str, int] = {}
        left: list[SpooledRecipient] = []
        for there in delivery.recipients:
            verdict = by_number.get(there.number)
            if verdict is not None and verdict.end is not None:
                name = end_name(self.kind, verdict.end)
                ended[name] = ended.get(name, 0) + 1
            elif verdict is not None and verdict.reply is not None:
                last_reply = str(verdict.reply)[: reply_room(len(delivery.recipients))]
                left.append(SpooledRecipient(there.number, there.recipient, last_reply))
            else:
                left.append(there)
        delivery.recipients = left
        if not left:
            self.deliveries.remove(delivery)
            return ended
        delivery.state = DeliveryState.HELD if hold else DeliveryState.READY
        delivery.due_ms = due_ms
        delivery.crashes = 0
        delivery.attempts -= not counts_attempt
        delivery.is_possible_duplicate |= is_possible_duplicate
        if hold:
            self._stop_aging(now_ms)
        return ended

    def retry(self, now_ms: int) -> bool:
        """Make waiting deliveries due; returns whether anything changed."""
        return self._each(DeliveryState.READY, DeliveryState.READY, now_ms)

    def hold(self, now_ms: int) -> bool:
        """Hold waiting deliveries for an operator."""
        if not self._each(DeliveryState.READY, DeliveryState.HELD):
            return False
        self._stop_aging(now_ms)
        return True

    def release(self, now_ms: int) -> bool:
        """Release held and corrupt deliveries."""
        held = self._each(DeliveryState.HELD, DeliveryState.READY, now_ms)
        if not self._each(DeliveryState.CORRUPT, DeliveryState.READY, now_ms) and not held:
            return False
        for one in self.deliveries:
            one.crashes = 0
        self._age_again(now_ms)
        return True

    def expire(self, now_ms: int) -> bool:
        """Make it expire."""
        self._each(DeliveryState.HELD, DeliveryState.READY, now_ms)
        self._each(DeliveryState.CORRUPT, DeliveryState.READY, now_ms)
        self.expires_ms = min(self.expires_ms, now_ms)
        self.held_ms = None
        self.is_forced = True
        return True

    def reset(self, now_ms: int, expires_ms: int) -> bool:
        """Reset attempts and age, if anything waits."""
        if not self._each(DeliveryState.READY, DeliveryState.READY, now_ms):
            return False
        self.expires_ms = expires_ms
        self.is_forced = False
        for one in self.deliveries:
            if one.state is DeliveryState.READY:
                one.attempts = one.crashes = 0
        return True

    def move(self, due_ms: int, instants_ms: int) -> None:
        """The clock was set: shift due times and past times by this much."""
        self.arrived_ms += instants_ms
        self.expires_ms += instants_ms
        if self.held_ms is not None:
            self.held_ms += instants_ms
        for one in self.deliveries:
            # The log does not record lost contents: a delivery found to be corrupt is ready according to its records.
            if one.state in (DeliveryState.READY, DeliveryState.CORRUPT):
                one.due_ms += due_ms

    def _stop_aging(self, now_ms: int) -> None:
        if self.held_ms is None and self.kind not in NOTICES:
            self.held_ms = now_ms

    def _age_again(self, now_ms: int) -> None:
        if self.held_ms is not None:
            self.expires_ms += now_ms - self.held_ms
            self.held_ms = None

    def _each(self, state: DeliveryState, then: DeliveryState, due_ms: int | None = None) -> bool:
        found = [one for one in self.deliveries if one.state is state]
        for one in found:
            one.state = then
            if due_ms is not None:
                one.due_ms = due_ms
        return bool(found)

    def mark_corrupt(self, lease: Lease, now_ms: int) -> None:
        """Its content is damaged: it waits for an operator, and does not age until released.

        Raises:
            StaleLease: the lease is not its delivery's latest one.
        """
        self.owned(lease).state = DeliveryState.CORRUPT
        if self.held_ms is None:
            self.held_ms = now_ms

    def lose_content(self, now_ms: int) -> None:
        """Its content is gone: likewise."""
        self.is_large = True  # it has no file of its own either
        for one in self.deliveries:
            one.is_possible_duplicate |= one.state is _LEASED  # the content may be restored after having been delivered
            one.state = DeliveryState.CORRUPT
        if self.held_ms is None:
            self.held_ms = now_ms

    def take_back(self, *, crashes_allowed: int | None, now_ms: int) -> bool:
        """Take back leases that cannot be under way any more; returns whether the message is held now.

        Args:
            crashes_allowed: if its process died during an attempt: the number of such crashes after which a message is
                held, since it may be their cause. An outcome, a few lines of our own, is never held. None: the process
                ended in order, and the attempt does not count.
        """
        is_held = False
        for one in self.deliveries:
            if one.state is not DeliveryState.LEASED:
                continue
            one.state = DeliveryState.READY
            one.is_possible_duplicate = True
            one.due_ms = min(one.due_ms, now_ms)
            if crashes_allowed is None:
                one.attempts -= 1
                continue
            one.crashes += 1
            if one.crashes >= crashes_allowed and not self.is_outcome:
                one.state = DeliveryState.HELD
                is_held = True
        if is_held:
            self._stop_aging(now_ms)
        return is_held


_dumps: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def _optional(notify: Notify | None, orcpt: str | None) -> str:
    return f"{'null' if notify is None else notify.value},{_dumps(orcpt)}"


def dumps(value: object) -> str:
    """Compact JSON."""
    return _dumps(value)
