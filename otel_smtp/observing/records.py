"""The records of what happens: one per connection, per transaction and per delivery attempt.

While a mail is under way, the session and the forwarder write its facts into these records, as plain attributes and
entries of lists. Observers get a record when it is complete and interpret it then, which keeps observing cheap. Only
its owner writes a record: the session its connection and transactions, the forwarder its deliveries. Observers only
read, except for two slots of their own: `trace` and `counted`.

Times are nanoseconds of the monotonic clock. `wall_offset_ns` added to one gives nanoseconds since the epoch; it is
taken once per connection, so that the order of times is the order of what happened.

Everything that a peer can make grow is bounded: refused recipients and phases by the constants below, transitions and
replies by the segments into which the session cuts them.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from otel_smtp.observing.values import (
    ConnectionInfo,
    DeliveryPhase,
    Endpoint,
    Fate,
    MessageKind,
    Outcome,
    SpoolAction,
    TlsInfo,
    TraceHeaders,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, TlsMode, Transition

# Each is an event of a span; beyond this the count says enough.
MOST_REFUSED: Final = 50
# An attempt has about ten phases beside those of its recipients.
MOST_PHASES: Final = 64
# The last transitions that a connection keeps of its earlier segments.
EARLIER_TRANSITIONS: Final = 24

# Looking a member up in its enumeration costs as much as a call; every mail uses these.
_MAIL: Final = MessageKind.MAIL
_RCPT: Final = DeliveryPhase.RCPT
_REFUSED: Final = Outcome.REFUSED
_DEFERRED: Final = Outcome.DEFERRED
_Accepted = tuple[str, str, str, TlsMode]  # listener, protocol, transport and TLS, as `ConnectionInfo` has them
_NO_CARRIER: Final[Mapping[str, str]] = MappingProxyType({})

# Faults of attempts that decide a transaction; the last one gives the reason.
_OF_ATTEMPTS: Final = frozenset(
    {
        ErrorType.UPSTREAM_UNAVAILABLE,
        ErrorType.UPSTREAM_AUTH,
        ErrorType.UPSTREAM_TLS,
        ErrorType.UPSTREAM_PROTOCOL,
        ErrorType.OUTCOME_UNKNOWN,
        ErrorType.INTERNAL,
    }
)


class ConnectionEnd(NamedTuple):
    """How a connection ended.

    Attributes:
        octets_received, octets_sent: of the application.
        reason: None while it is open. `at_ns`: when it was closed; 0 while it is open.
    """

    octets_received: int = 0
    octets_sent: int = 0
    reason: CloseReason | None = None
    at_ns: int = 0


_OPEN: Final = ConnectionEnd()


class ConnectionRecord:
    """One client connection.

    Attributes:
        id, listener, transport: as `ConnectionInfo` has them.
        client, server: the two ends as the client sees them: the socket's, or those named by a trusted PROXY header.
        opened_ns, wall_offset_ns: see the head of the module.
        hello_verb, hello_name: the last accepted EHLO, HELO or LHLO, as the peer sent it; "" before.
        tls: what the handshake agreed on; None in the clear.
        user: the name the client authenticated as; None before. `auth_mechanism`: of the last attempt, successful or
            not.
        messages, errors: messages that got their final reply; replies of 400 and above, and failed handshakes.
        segment: number of the current segment, from 1. `begun_ns`: when it began.
        transitions: those of the current segment, the oldest first, each recorded before the client can see its reply.
        replies: of the current segment, each with the verb that it answers ("other" or None if unknown).
        earlier: the last transitions of the segments before, for views that show a path.
        failure: why it failed, in words for operators, if no reply says so: a TLS handshake.
        end: how it ended, once it is closed.
        trace: what tracing keeps of the current segment; None until needed.
        counted_transitions, counted_replies: how many of the current segment's the metrics have counted.
    """

    __slots__ = (
        "_accepted",
        "_socket",
        "auth_mechanism",
        "begun_ns",
        "client",
        "counted_replies",
        "counted_transitions",
        "earlier",
        "end",
        "errors",
        "failure",
        "hello_name",
        "hello_verb",
        "id",
        "messages",
        "opened_ns",
        "replies",
        "segment",
        "server",
        "tls",
        "trace",
        "transitions",
        "user",
        "wall_offset_ns",
    )

    def __init__(self, info: ConnectionInfo, opened_ns: int, wall_offset_ns: int) -> None:
        self.id = info.id
        self._accepted = _one_of_accepted(info.listener, info.protocol, info.transport, info.tls_mode)
        self._socket: tuple[Endpoint, Endpoint] | None = None  # the ends that a PROXY header named
        self.client = info.peer
        self.server = info.local
        self.opened_ns = self.begun_ns = opened_ns
        self.wall_offset_ns = wall_offset_ns
        self.hello_verb = self.hello_name = ""
        self.tls: TlsInfo | None = None
        self.user: str | None = None
        self.auth_mechanism: str | None = None
        self.messages = 0
        self.errors = 0
        self.segment = 1
        self.transitions: list[Transition] = []
        self.replies: list[tuple[str | None, Reply]] = []
        self.earlier: tuple[Transition, ...] = ()
        self.failure: str | None = None
        self.end = _OPEN
        self.trace: Any = None
        self.counted_transitions = self.counted_replies = 0

    @property
    def listener(self) -> str:
        """See `ConnectionInfo`."""
        return self._accepted[0]

    @property
    def transport(self) -> str:
        """See `ConnectionInfo`."""
        return self._accepted[2]

    @property
    def info(self) -> ConnectionInfo:
        """Its identity from accept on, built on demand: most of it is the same for all connections of a listener."""
        peer, local = self._socket or (self.client, self.server)
        return ConnectionInfo(self.id, peer, local, *self._accepted)

    def proxied(self, client: Endpoint, server: Endpoint) -> None:
        """Note the ends that a trusted PROXY header named."""
        self._socket = self._socket or (self.client, self.server)
        self.client = client
        self.server = server

    def begin_segment(self, now_ns: int) -> None:
        """Begin a new segment, once observers have been given the current one."""
        self.earlier = (*self.earlier, *self.transitions)[-EARLIER_TRANSITIONS:]
        self.transitions = []
        self.replies = []
        self.counted_transitions = self.counted_replies = 0
        self.segment += 1
        self.begun_ns = now_ns


@lru_cache(maxsize=64)
def _one_of_accepted(*accepted: Any) -> _Accepted:
    """Share one object among all connections of a listener."""
    return accepted


class RecipientRecord(NamedTuple):
    """The fate of a recipient that did not get the mail, or not yet.

    Attributes:
        reply: the reply that says so; None if no upstream was asked.
        upstream: the name of the upstream whose reply it is; None if it is ours.
    """

    at_ns: int
    recipient: Recipient
    fate: Fate
    reply: Reply | None
    upstream: str | None = None


class TransactionRecord:
    """One mail transaction, from MAIL to its final reply; or a later attempt at a message from the spool.

    Attributes:
        connection: None for a message from the spool: its transaction ended long ago.
        number: from 1 on its connection; 0 for a message from the spool.
        attempt: the number of this attempt at a message from the spool, from 1; 0 for a client's transaction.
        accepted: recipients that were accepted, though some may have been refused with the content (LMTP upstreams
            answer for each). `refused`: the first `MOST_REFUSED` that were refused or deferred, at RCPT or then;
            `own_count`: all of those, each with a reply of its own. `refused_count`, `deferred_count`: by 5yz and 4yz,
            with those for whom one reply refused the content; `lost_count`: of both, those accepted before.
        trace_headers: of the header block; None until it has been read. `message_id`: likewise; None without one.
        octets: of the content, once it is complete. `added_octets`: of our own Received field, which stands before a
            client's content: an upper bound until the header block has been read; 0 of a message from the spool.
        spool_id: under which the message is durable; None if it is not.
        deliveries: attempts, in the order in which they began.
        ended_ns: 0 while it is open.
        outcome, reply, error_type: how it ended; `reply` is the one sent to the client, if any.
        failure: why it failed, if not by an upstream's reply: the deciding attempt's failure, or our own.
        kind: what it is. `action`: what happened to a message in the spool without an attempt, if the record is of
            that. `operator`: who did it; None: no operator.
        carrier: for a message from the spool, the trace context that was stored with it, as headers.
        is_possible_duplicate: an upstream may have taken an earlier attempt.
        taken_over: in a shared queue, the dead gateway that had it before, and the seconds of its silence; None: none.
        has_lost_lease: likewise, called before more of the message is sent; True: another gateway may have it by now,
            and the attempt was aborted. None: it cannot be lost.
        waited_seconds: for a mail from the spool, since its acceptance when this attempt began; None for anything else,
            notices among it.
        is_8bit_offered: 8BITMIME had been offered to the client; only set where MAIL asks for it.
        trace: what tracing keeps of it.
    """

    __slots__ = (
        "__weakref__",
        "accepted",
        "action",
        "added_octets",
        "attempt",
        "begun_ns",
        "carrier",
        "connection",
        "deferred_count",
        "deliveries",
        "ended_ns",
        "error_type",
        "failure",
        "has_lost_lease",
        "is_8bit_offered",
        "is_possible_duplicate",
        "kind",
        "lost_count",
        "mail",
        "message_id",
        "number",
        "octets",
        "operator",
        "outcome",
        "own_count",
        "refused",
        "refused_count",
        "reply",
        "spool_id",
        "taken_over",
        "trace",
        "trace_headers",
        "waited_seconds",
        "wall_offset_ns",
    )

    def __init__(
        self, mail: Mail, number: int, connection: ConnectionRecord | None, begun_ns: int, wall_offset_ns: int
    ) -> None:
        self.mail = mail
        self.number = number
        self.attempt = 0
        self.connection = connection
        self.begun_ns = begun_ns
        self.wall_offset_ns = wall_offset_ns
        self.accepted: list[Recipient] = []
        self.refused: Sequence[RecipientRecord] = ()
        self.refused_count = self.deferred_count = self.own_count = self.lost_count = 0
        self.trace_headers: TraceHeaders | None = None
        self.message_id: str | None = None
        self.octets: int | None = None
        self.added_octets = 0
        self.spool_id: str | None = None
        self.deliveries: list[DeliveryRecord] = []
        self.ended_ns = 0
        self.outcome: Outcome | None = None
        self.reply: Reply | None = None
        self.error_type: ErrorType | None = None
        self.failure: str | None = None
        self.kind = _MAIL
        self.action: SpoolAction | None = None
        self.operator: str | None = None
        self.carrier = _NO_CARRIER
        self.is_possible_duplicate = False
        self.taken_over: tuple[str, float] | None = None
        self.has_lost_lease: Callable[[], bool] | None = None
        self.waited_seconds: float | None = None
        self.is_8bit_offered = True
        self.trace: Any = None

    @classmethod
    def resumed(
        cls,
        spool_id: str,
        carrier: Mapping[str, str],
        mail: Mail,
        *,
        kind: MessageKind = MessageKind.MAIL,
        attempt: int = 1,
        is_possible_duplicate: bool = False,
        waited_seconds: float | None = None,
    ) -> "TransactionRecord":
        """The record of an attempt at a message from the spool, or of an action on it.

        Args:
            carrier: the result of `Observer.carrier` when the message was stored.
            attempt: its number in the life of the message, from 1, which its deliveries share.
        """
        now_ns = time.monotonic_ns()
        record = cls(mail, 0, None, now_ns, time.time_ns() - now_ns)
        record.spool_id = spool_id
        record.kind = kind
        record.attempt = attempt
        record.carrier = carrier
        record.is_possible_duplicate = is_possible_duplicate
        record.waited_seconds = waited_seconds
        return record

    def refuse(self, recipient: Recipient, reply: Reply, now_ns: int) -> None:
        """Note a recipient that was refused or deferred."""
        self.own_count += 1
        is_deferred = reply.is_transient
        if is_deferred:
            self.deferred_count += 1
        else:
            self.refused_count += 1
        if len(self.refused) < MOST_REFUSED:
            fate = Fate.DEFERRED if is_deferred else Fate.REFUSED
            refused = RecipientRecord(now_ns, recipient, fate, reply, self._who_said(recipient, reply))
            self.refused = (*self.refused, refused)

    def end_in_spool(self, fates: Sequence[tuple[Recipient, Fate, Reply | None]], now_ns: int) -> None:
        """Note the fates of undelivered recipients of a message from the spool; the caller notifies the observers.

        They are noted in the deciding attempt or, without one, here.
        """
        self.ended_ns = now_ns
        if not self.deliveries:
            self.refused = [RecipientRecord(now_ns, recipient, fate, reply) for recipient, fate, reply in fates]
            self.own_count = len(fates)
            return
        decided: dict[int, list[RecipientRecord]] = {}  # by the attempt
        if fates:
            said = {id(one.recipient): (where, one.reply) for where in self.deliveries for one in where.refused}
            for recipient, fate, reply in fates:
                delivery, its_reply = said.get(id(recipient), (None, None))
                if delivery is None or its_reply != reply:
                    delivery, upstream = self._deciding(reply), self._upstream_of(reply)
                else:
                    upstream = delivery.upstream
                refused = RecipientRecord(delivery.ended_ns or now_ns, recipient, fate, reply, upstream)
                decided.setdefault(id(delivery), []).append(refused)
        for delivery in self.deliveries:
            delivery.refused = decided.get(id(delivery), ())

    def _deciding(self, reply: Reply | None) -> "DeliveryRecord":
        """The last attempt that ended with a reply, or failed as it says; of several transactions with upstreams each
        has its own. The last one, where none did."""
        attempts = self.deliveries[::-1]
        if reply is not None:
            for delivery in attempts:
                if delivery.reply == reply:
                    return delivery
            for delivery in attempts:
                if delivery.error_type is reply.error_type:
                    return delivery
        return attempts[0]

    def refuse_content(self, reply: Reply, verdicts: Sequence[Reply], now_ns: int) -> None:
        """Note that accepted recipients do not get the mail after all.

        Args:
            reply: the final one; it applies to recipients without a verdict of their own.
            verdicts: in the order in which the recipients were accepted; there may be fewer.
        """
        for recipient, verdict in zip(self.accepted, verdicts, strict=False):
            if not verdict.is_positive:
                self.refuse(recipient, verdict, now_ns)
                self.lost_count += 1
        rest = len(self.accepted) - len(verdicts)
        if reply.code < 400 or rest <= 0 or reply.error_type is ErrorType.OUTCOME_UNKNOWN:
            return  # the rest have it, or it is unknown
        self.lost_count += rest
        # One reply for all of them is the transaction's own. But an upstream may have refused it because of some.
        for delivery in self.deliveries[-1:]:
            for one in delivery.refused:
                if not any(known.recipient is one.recipient for known in self.refused) and rest:
                    assert one.reply is not None
                    self.refuse(one.recipient, one.reply, one.at_ns)
                    rest -= 1
        if reply.is_transient:
            self.deferred_count += rest
        else:
            self.refused_count += rest

    def _who_said(self, recipient: Recipient, reply: Reply) -> str | None:
        """The upstream that sent or caused this reply; None if it is ours alone."""
        for delivery in reversed(self.deliveries):
            if any(one.recipient is recipient for one in delivery.refused):
                return delivery.upstream
        return self._upstream_of(reply)

    def _upstream_of(self, reply: Reply | None) -> str | None:
        """The upstream whose words a reply has: all of it, or in a refusal of ours that quotes them."""
        if reply is None or not self.deliveries:
            return None
        if reply.error_type is ErrorType.UPSTREAM_REFUSED:
            return self._deciding(reply).upstream
        for delivery in reversed(self.deliveries):
            said = delivery.reply
            if said is not None and delivery.error_type is reply.error_type and f": {said.code}" in reply.text:
                return delivery.upstream
        return None

    def end(self, outcome: Outcome, reply: Reply | None, now_ns: int) -> None:
        """Note how it ended; the caller notifies the observers."""
        self.outcome = outcome
        self.reply = reply
        self.error_type = error_type = reply.error_type if reply is not None else None
        self.ended_ns = now_ns
        if error_type is not None and error_type in _OF_ATTEMPTS and self.failure is None:
            self.failure = next((one.failure for one in reversed(self.deliveries) if one.failure is not None), None)


class DeliveryRecord:
    """One attempt at one upstream, from the wait for a connection to the final reply.

    Attributes:
        upstream, server: its configured name and address.
        attempt: from 1 within this transaction; the transaction's own number where that is a message from the spool.
        pool_wait_ns: the wait for a connection; None if one was available at once.
        is_reused: the connection had served another mail before.
        peer, tls: the connection that served the attempt, if any.
        phases: (when, which, the upstream's reply, if any).
        accepted_count, refused_count, deferred_count: recipients by the upstream's last answer about each.
        refused: the first `MOST_REFUSED` of those that it refused or deferred.
        paced: the name of the limit that held it back, and the wait in nanoseconds; None: it did not wait.
        round_trips: the number of waits for an answer.
        ended_ns: 0 while it is under way.
        outcome, error_type: how it ended. `reply`: the upstream's own final reply, if any.
        failure: why it failed, in words for operators, if not by a reply.
        trace: what tracing keeps of it.
    """

    __slots__ = (
        "_transaction",
        "accepted_count",
        "attempt",
        "begun_ns",
        "deferred_count",
        "ended_ns",
        "error_type",
        "failure",
        "is_reused",
        "outcome",
        "paced",
        "peer",
        "phases",
        "pool_wait_ns",
        "refused",
        "refused_count",
        "reply",
        "round_trips",
        "server",
        "tls",
        "trace",
        "upstream",
    )

    def __init__(
        self, transaction: TransactionRecord, upstream: str, server: Endpoint, attempt: int, begun_ns: int
    ) -> None:
        # The transaction holds its attempts. If each held it in turn, every mail would wait for the garbage collector.
        self._transaction = weakref.ref(transaction)
        self.upstream = upstream
        self.server = server
        self.attempt = transaction.attempt or attempt
        self.begun_ns = begun_ns
        self.pool_wait_ns: int | None = None
        self.is_reused = False
        self.peer: Endpoint | None = None
        self.tls: TlsInfo | None = None
        self.phases: list[tuple[int, DeliveryPhase, Reply | None]] = []
        self.accepted_count = self.refused_count = self.deferred_count = 0
        self.refused: Sequence[RecipientRecord] = ()
        self.paced: tuple[str, int] | None = None
        self.round_trips = 0
        self.ended_ns = 0
        self.outcome: Outcome | None = None
        self.reply: Reply | None = None
        self.error_type: ErrorType | None = None
        self.failure: str | None = None
        self.trace: Any = None

    @property
    def transaction(self) -> TransactionRecord:
        """The transaction of this attempt.

        The forwarder keeps its record until the attempt has ended and observers have been notified.

        Raises:
            ReferenceError: an observer kept the attempt, but not the transaction.
        """
        transaction = self._transaction()
        if transaction is None:
            raise ReferenceError("the record of the transaction is gone")
        return transaction

    def refuse(self, recipient: Recipient, reply: Reply, now_ns: int) -> None:
        """Note a recipient that the upstream refused or deferred; one that is asked about again counts once."""
        refused = [*self.refused]
        for place, one in enumerate(refused):
            if one.recipient is recipient:
                del refused[place]
                self._count(one.fate, -1)
                break
        fate = Fate.DEFERRED if reply.is_transient else Fate.REFUSED
        self._count(fate, 1)
        if len(refused) < MOST_REFUSED:
            refused.append(RecipientRecord(now_ns, recipient, fate, reply, self.upstream))
        self.refused = refused

    def _count(self, fate: Fate, by: int) -> None:
        if fate is Fate.DEFERRED:
            self.deferred_count += by
        else:
            self.refused_count += by

    def note_pace(self, limit: str, now_ns: int, wait_ns: int) -> None:
        """Note that a limit held it back; of several waits the sum counts."""
        self.paced = (limit, wait_ns + (0 if self.paced is None else self.paced[1]))
        self.phases = [phase for phase in self.phases if phase[1] is not DeliveryPhase.PACED]
        self.phases.append((now_ns, DeliveryPhase.PACED, None))

    def recipient_phase(self, now_ns: int, reply: Reply) -> None:
        """Note when a recipient was answered.

        A thousand recipients must not make a thousand phases: of equal answers in a row only the last is kept, and
        beyond `MOST_PHASES` only the last of all.
        """
        phases = self.phases
        if phases and phases[-1][1] is _RCPT:
            before = phases[-1][2]
            if len(phases) >= MOST_PHASES or (before is not None and before.code == reply.code):
                phases[-1] = (now_ns, _RCPT, reply)
                return
        phases.append((now_ns, _RCPT, reply))

    def end(self, outcome: Outcome, reply: Reply | None, error_type: ErrorType | None, now_ns: int) -> None:
        """Note how it ended; an answer of the upstream to the whole content applies to all accepted recipients."""
        self.outcome = outcome
        self.reply = reply
        self.error_type = error_type
        self.ended_ns = now_ns
        if reply is not None and self.accepted_count:
            if outcome is _REFUSED:
                self.refused_count += self.accepted_count
                self.accepted_count = 0
            elif outcome is _DEFERRED:
                self.deferred_count += self.accepted_count
                self.accepted_count = 0
