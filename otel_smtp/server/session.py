"""One client connection: a stream, the protocol engine, a forwarder, and the deadlines between them.

The path of a mail through a session::

    client octets -> data_received -> ServerProtocol -> mail_requested       -> forwarder.begin
                                                        recipients_requested -> transaction.recipients
                                                        message_received     -> transaction.message: our Received field
                                                                                and the header block; the body
                     replies, one write <- _step      <-            the decisions, at once or by a call back later

All of it happens in plain calls, within the call in which the transport delivers the octets, or the upstream's answer.
Every such call from outside is a `_step`: it begins with the time and ends by writing the replies, after everything for
observers has been recorded. Content that comes in pieces is received by `header_received`, `content_received` and
`content_ended`, and forwarded by `content`, `write` and `finish`. Only rare work is done in coroutines: PROXY headers,
TLS handshakes, AUTH, and a gentle end.

Reading stops, so that further octets stay in the kernel, for each of these reasons: the forwarder takes content slower
than it comes, a decision is awaited and more has come already, the client does not read its replies, or it has
pipelined more than its turn. This bounds the octets that the engine holds.

The client may vanish at any moment. Before its content is complete the transaction is aborted, and nothing is relayed.
After that the delivery continues to its end, so that its outcome is recorded, and only the reply is lost.

The class is written in layers: `conversation` (the turns of stream and engine, time, the end), `admission` (the
client's identity), and the transaction, here.
"""

import logging
import time
from collections.abc import Sequence
from typing import Final

from otel_smtp.forwarding.base import DeliveryFailed, MailTransaction
from otel_smtp.net import Stream
from otel_smtp.observing import ConnectionRecord, Outcome, TraceHeaders, TransactionRecord, trace_fields
from otel_smtp.server.admission import Admission
from otel_smtp.server.conversation import REPLIES_TO_CONTENT, Pause, internal_error
from otel_smtp.server.policy import House, ListenerPolicy
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.received import RECEIVED_TAIL_OCTETS, HeaderFacts, received_field, received_head, with_protocol
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.server import ServerProtocol

logger: Final = logging.getLogger("otel_smtp.server.session")
_NO_TRACE: Final = TraceHeaders()
_EIGHT_BIT_MIME: Final = Body.EIGHT_BIT_MIME
_RELAYED: Final = Outcome.RELAYED


class Session(Admission):
    """Serves one accepted connection until it is closed. It is the engine's `Handler` and the stream's `Receiver`.

    Args:
        stream: the accepted connection.
        record: its record for observers, still empty.
        policy: its listener's.
        house: the server.

    Attributes:
        record: see above; it grows with the session.
        client_counted: the address under which the server counts this session, if it does; set by the server.
    """

    __slots__ = ()

    def __init__(self, stream: Stream, record: ConnectionRecord, policy: ListenerPolicy, house: House) -> None:
        protocol = ServerProtocol(
            policy.protocol,
            self,
            offer=house.offer,
            recorded=record.transitions,
            said=record.replies,
            on_illegal=house.illegal_step,
        )
        super().__init__(stream, record, policy, house, protocol)

    # The transaction ---------------------------------------------------------------------------------------------

    def mail_requested(self, mail: Mail) -> Reply:
        """See `Handler`."""
        protocol, record, house = self._protocol, self.record, self._house
        if self._policy.protocol.auth_mechanisms and not protocol.is_authenticated and not self._is_allowed():
            return replies.AUTH_REQUIRED
        transaction = TransactionRecord(mail, protocol.transactions + 1, record, protocol.now_ns, record.wall_offset_ns)
        head = self._received_head or self._make_received_head(is_utf8=False)
        transaction.added_octets = len(head) + RECEIVED_TAIL_OCTETS
        if mail.body is _EIGHT_BIT_MIME:
            transaction.is_8bit_offered = protocol.offers_8bit
        try:
            forwarded = house.forwarder.begin(mail, transaction)
        except DeliveryFailed as failure:
            return self._refuse_mail(transaction, failure.reply)
        except Exception:  # noqa: BLE001 - logged there
            transaction.failure = internal_error()
            self._log_forwarder("MAIL")
            return self._refuse_mail(transaction, replies.INTERNAL)
        self._transaction = transaction
        self._forwarded = forwarded
        self._trace_id = None
        return replies.SENDER_OK

    def _refuse_mail(self, transaction: TransactionRecord, reply: Reply) -> Reply:
        transaction.end(outcome_of(reply), reply, self._protocol.now_ns)
        self._house.observer.transaction_ended(transaction)
        return reply

    def recipients_requested(self, recipients: Sequence[Recipient]) -> None:
        """See `Handler`."""
        forwarded = self._forwarded
        assert forwarded is not None
        self._batch = recipients
        try:
            forwarded.recipients(recipients, self._recipients_answered)
        except Exception:  # noqa: BLE001 - logged there
            self._log_forwarder("RCPT")
            self._recipients_answered([replies.INTERNAL] * len(recipients))

    def _recipients_answered(self, decided: Sequence[Reply]) -> None:
        transaction = self._transaction
        batch, self._batch = self._batch, ()
        if transaction is None or not batch:
            return  # the transaction was given up before the upstream's answer
        protocol = self._protocol
        protocol.now_ns = now_ns = time.monotonic_ns()
        for recipient, reply in zip(batch, decided, strict=False):  # the engine checks their number
            if reply.code < 300:
                transaction.accepted.append(recipient)
            else:
                transaction.refuse(recipient, reply, now_ns)
        # A segment grows by mails and their recipients, so its bound is checked here.
        if len(self.record.replies) >= self._house.segments.transitions - REPLIES_TO_CONTENT:
            protocol.has_news = True
        self._step(decided, protocol.answer)

    def recipient_refused(self, recipient: Recipient, reply: Reply) -> None:
        """See `Handler`."""
        assert self._transaction is not None
        self._transaction.refuse(recipient, reply, self._protocol.now_ns)

    def as_sent(self, reply: Reply, *, is_of_content: bool) -> Reply:
        """See `Handler`: adds the trace id. Before there is a header block that is the connection's trace, which has
        the Error event.
        """
        if not self._policy.trace_in_reply:
            return reply
        # A reply out of turn belongs to no message, though the last one's id may still be set.
        trace_id = self._trace_id if is_of_content and reply.error_type is not ErrorType.SEQUENCE else None
        if trace_id is None:
            trace_id = trace_fields(self._house.observer.connection_carrier(self.record)).get("trace_id")
        return reply if trace_id is None else reply.with_trace(trace_id)

    def content_begun(self) -> None:
        """See `Handler`."""
        self._began = self._content_began = self._loop.time()
        self._request_octets = self._content_octets = self._stream.octets_received
        self._failed_content = None

    def message_received(self, block: bytes, facts: HeaderFacts, body: bytes) -> None:
        """See `Handler`."""
        transaction, forwarded = self._transaction, self._forwarded
        assert transaction is not None
        assert forwarded is not None
        transaction.octets = len(block) + len(body)
        block = self._headed(block, facts)
        try:
            forwarded.message(block, body, self._message_answered)
        except Exception:  # noqa: BLE001 - logged there
            self._fail_content()
            self._answer_failed_content(forwarded)

    def header_received(self, block: bytes, facts: HeaderFacts) -> None:
        """See `Handler`."""
        forwarded = self._forwarded
        assert forwarded is not None
        try:
            forwarded.content(self._content_resumed)
        except Exception:  # noqa: BLE001 - logged there
            self._fail_content()
        self.content_received(self._headed(block, facts))

    def _headed(self, block: bytes, facts: HeaderFacts) -> bytes:
        """Note the facts of the header block; returns the block with our Received field."""
        transaction = self._transaction
        assert transaction is not None
        _, traceparents, tracestate, transaction.message_id = facts
        has_trace = traceparents or tracestate
        transaction.trace_headers = TraceHeaders(traceparents, tracestate) if has_trace else _NO_TRACE
        # Our Received field (RFC 5321 4.4); its head is the same for all messages of a session except SMTPUTF8 ones.
        head = self._received_head
        if head is None or transaction.mail.smtputf8:
            head = self._make_received_head(is_utf8=transaction.mail.smtputf8)
        self._trace_id = self._house.observer.trace_id(transaction)
        received = received_field(head, self._trace_id or self.record.id, time.time())
        transaction.added_octets = len(received)
        return received + block

    def content_received(self, data: bytes) -> None:
        """See `Handler`."""
        if self._failed_content is not None:
            return  # the client's content is read to its end all the same
        forwarded = self._forwarded
        assert forwarded is not None
        try:
            goes_on = forwarded.write(data)
        except Exception:  # noqa: BLE001 - logged there
            self._fail_content()
        else:
            if not goes_on:
                self._pause(Pause.CONTENT)
                self._held_back_at = self._loop.time()

    def _content_resumed(self) -> None:
        if self._pauses & Pause.CONTENT:
            held_back = self._loop.time() - self._held_back_at  # that time was not the client's
            self._began += held_back
            self._content_began += held_back
            self._resume(Pause.CONTENT)

    def _fail_content(self) -> None:
        self._log_forwarder("content")
        self._failed_content = replies.INTERNAL

    def content_ended(self, octets: int) -> None:
        """See `Handler`."""
        transaction, forwarded = self._transaction, self._forwarded
        assert transaction is not None
        assert forwarded is not None
        transaction.octets = octets
        if self._pauses:
            self._content_resumed()  # there is no more content to hold back
        if self._failed_content is None:
            try:
                forwarded.finish(self._message_answered)
                return
            except Exception:  # noqa: BLE001 - logged there
                self._fail_content()
        self._answer_failed_content(forwarded)

    def _answer_failed_content(self, forwarded: MailTransaction) -> None:
        assert self._failed_content is not None
        forwarded.abort()
        self._message_answered(self._failed_content, ())

    def _message_answered(self, reply: Reply, verdicts: Sequence[Reply]) -> None:
        transaction, forwarded = self._transaction, self._forwarded
        if transaction is None or forwarded is None:
            return  # given up, at a shutdown
        self._protocol.now_ns = now_ns = time.monotonic_ns()
        if verdicts or reply.code >= 400:
            transaction.refuse_content(reply, verdicts, now_ns)
        if reply.code < 300:
            outcome = _RELAYED
            if (spool_id := forwarded.spool_id) is not None:
                transaction.spool_id = spool_id
                outcome = Outcome.QUEUED
            elif transaction.refused:
                outcome = Outcome.PARTLY_RELAYED
            trace_id = self._trace_id
            names_trace = trace_id is not None and self._policy.trace_in_reply
            reply = replies.message_accepted(trace_id) if names_trace else replies.OK
        else:
            outcome = outcome_of(reply)
            if outcome is not Outcome.UNKNOWN and any(verdict.is_positive for verdict in verdicts):
                outcome = Outcome.PARTLY_RELAYED
        self._transaction = self._forwarded = None
        transaction.end(outcome, reply, now_ns)
        self._house.observer.transaction_ended(transaction)
        if self._policy.protocol.is_lmtp:
            # RFC 2033 4.2: each recipient has its own reply, and verdicts may be fewer.
            rest = [reply] * (len(transaction.accepted) - len(verdicts))
            self._step((*verdicts, *rest), self._protocol.answer)
        else:
            self._step((reply,), self._protocol.answer)
        self.record.messages = self._protocol.messages

    def transaction_aborted(self, reply: Reply | None) -> None:
        """See `Handler`."""
        transaction, forwarded = self._transaction, self._forwarded
        self._transaction = self._forwarded = None
        if transaction is None or forwarded is None:
            return
        self._content_resumed()
        outcome = Outcome.ABORTED if reply is None else outcome_of(reply)
        if reply is None and not transaction.accepted and transaction.refused:
            # No recipient was left, so there was no mail to send: the last refusal decides the outcome.
            reply = transaction.refused[-1].reply
            assert reply is not None
            outcome = outcome_of(reply)
        try:
            forwarded.abort()  # first, so that its attempts end with it
        except Exception:  # noqa: BLE001 - logged there
            self._log_forwarder("abort")
        if reply is not None:
            transaction.refuse_content(reply, (), self._protocol.now_ns)
        transaction.end(outcome, reply, self._protocol.now_ns)
        self._house.observer.transaction_ended(transaction)

    def _log_forwarder(self, step: str) -> None:
        if self._transaction is not None:
            self._transaction.failure = internal_error()
        logger.exception("forwarding failed: internal error", extra={**self._named(), "step": step})

    def _make_received_head(self, *, is_utf8: bool) -> bytes:
        record, protocol, tls = self.record, self._protocol, self.record.tls
        head = received_head(
            helo=record.hello_name,
            peer_host=record.client.host,
            by=self._policy.protocol.hostname,
            with_protocol=with_protocol(
                is_extended=record.hello_verb == "EHLO" or record.hello_verb == "LHLO",
                is_tls=protocol.is_tls,
                is_authenticated=protocol.is_authenticated,
                is_lmtp=self._policy.protocol.is_lmtp,
                is_utf8=is_utf8,
            ),
            tls=f"{tls.version} {tls.cipher}" if tls is not None else None,
            is_anonymous=not self._policy.names_client,
        )
        if not is_utf8:
            self._received_head = head
        return head


def outcome_of(reply: Reply) -> Outcome:
    """The outcome of a transaction with the final reply `reply`."""
    if 200 <= reply.code < 300:
        return Outcome.RELAYED
    if reply.error_type is ErrorType.OUTCOME_UNKNOWN:
        return Outcome.UNKNOWN
    return Outcome.REFUSED if reply.is_permanent else Outcome.DEFERRED
