"""Content of a server session: DATA and BDAT, from the command to the final reply."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import (
    Bdat,
    Verb,
)
from otel_smtp.smtp.content import IncomingContent, whole_message
from otel_smtp.smtp.envelope import Body, Mail
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.handler import Asked
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server.replying import ChunkRefusal, IncomingChunk, OpenTransaction
from otel_smtp.smtp.server.securing import Securing
from otel_smtp.smtp.states import (
    ConnState,
    ContentBegun,
    TransactionOver,
)

_ACTIVE: Final = ConnState.ACTIVE
_BINARY: Final = Body.BINARY_MIME
_CONTENT: Final = Phase.CONTENT
_CONTENT_ASKED: Final = Asked.CONTENT
_DATA: Final = Verb.DATA
_DATA_STATE: Final = ConnState.DATA
_ENDING: Final = Phase.ENDING
_IDLE: Final = ConnState.IDLE
_READY: Final = Phase.READY
_new: Final = tuple.__new__  # a NamedTuple's own constructor is a function in Python
_GO_ON: Final = (_DATA, replies.SEND_CONTENT)


class Receiving(Securing):
    """A session that takes content."""

    __slots__ = ()

    def _run_data(self) -> None:
        transaction = self._transaction
        assert transaction is not None
        if transaction.mail.body is _BINARY:
            # RFC 3030 3: binary content cannot be sent by DATA.
            self._send(replies.BAD_SEQUENCE, _DATA)
            return
        self._begin_content(transaction, True)
        self.said.append(_GO_ON)
        self.out += replies.SEND_CONTENT.wire

    def _run_bdat(self, command: Bdat) -> None:
        transaction = self._transaction
        assert transaction is not None
        if not command.size and not command.last and not self._count_junk(Verb.BDAT):
            return
        octets = 0 if transaction.content is None else transaction.content.octets
        if octets + command.size > transaction.size_limit:
            if self.phase is Phase.CHUNKING:
                self.messages += 1
            self._drop_transaction(replies.MESSAGE_TOO_BIG)
            copies = self._final_replies(transaction) if command.last else 1
            self._read_off(command, replies.MESSAGE_TOO_BIG, copies=copies)
            return
        if transaction.by_data is None:
            self._begin_content(transaction, False)
        self.phase = _CONTENT
        self._chunk = IncomingChunk(command.size, is_last=command.last)

    def _begin_content(self, transaction: OpenTransaction, by_data: bool) -> None:
        transaction.by_data = by_data
        self.phase = _CONTENT
        self.enter(_DATA_STATE, _new(ContentBegun, (transaction.number, transaction.recipients)))
        self._handler.content_begun()

    def _begin_pieces(self, transaction: OpenTransaction) -> IncomingContent:
        """The content has not arrived as a whole."""
        mail = transaction.mail
        transaction.content = content = IncomingContent(
            self._policy.content_limits,
            transaction.size_limit,
            self._handler,
            is_binary=mail.body is _BINARY,
            by_data=transaction.by_data is True,
            refusal_of_8bit=_refusal_of_8bit(mail, transaction.offer),
            takes_8bit_bodies=transaction.offer.eight_bit_mime,
        )
        return content

    def _read_off(self, command: Bdat, reply: Reply, *, copies: int = 1) -> None:
        """Refuse a BDAT, and discard its octets so that they do not run as commands (RFC 3030 2)."""
        if command.size > 2 * self._policy.limits.message_size:
            # Too much to discard: the session ends, or a client could hold it for as long as it liked.
            self._send(replace(replies.BAD_ARGUMENT, closes=True), Verb.BDAT)
            return
        self._chunk = IncomingChunk(command.size, is_last=command.last)
        self._chunk.refusal = ChunkRefusal(reply, copies, self.phase)
        self.phase = Phase.CONTENT

    def _read_content(self) -> bool:
        if self._chunk is not None:
            return self._read_chunk(self._chunk)
        if not self.received.held:
            return False
        self._take_content(self.received.take(len(self.received)))
        return True

    def _take_content(self, data: bytes) -> None:
        """Take octets of DATA; octets behind its end go (back) to the buffer."""
        transaction = self._transaction
        assert transaction is not None
        content = transaction.content
        if content is None:
            whole = whole_message(data, self._policy.content_limits, transaction.size_limit)
            if whole is not None and (data.isascii() or _refusal_of_8bit(transaction.mail, transaction.offer) is None):
                self.asked = _CONTENT_ASKED
                block, facts, body = whole
                self._handler.message_received(block, facts, body)
                return
            content = self._begin_pieces(transaction)
        content.feed(data)
        if content.octets > 2 * transaction.size_limit:
            # The rest is discarded up to a bound; beyond it the connection ends, or a client could send without end.
            self._refuse_message(replace(replies.MESSAGE_TOO_BIG, closes=True), Verb.DATA)
        elif content.is_ended:
            if content.rest:
                self._hold_again(content.rest)
            self._finish_content(transaction, content)

    def _read_chunk(self, chunk: IncomingChunk) -> bool:
        data = self.received.take(chunk.remaining)
        chunk.remaining -= len(data)
        if chunk.refusal is None:
            transaction = self._transaction
            assert transaction is not None
            content = transaction.content or self._begin_pieces(transaction)
            if data:
                content.feed(data)
            if chunk.remaining == 0:
                self._end_chunk(chunk, transaction, content)
                return True
        elif chunk.remaining == 0:
            self._end_refused_chunk(chunk.refusal)
            return True
        return bool(data)

    def _end_chunk(self, chunk: IncomingChunk, transaction: OpenTransaction, content: IncomingContent) -> None:
        self._chunk = None
        if chunk.is_last:
            self._finish_content(transaction, content)
        elif (refusal := content.refusal()) is not None:
            self._refuse_message(refusal, Verb.BDAT)
        else:
            self.phase = Phase.CHUNKING
            self._send(replies.chunk_received(chunk.size), Verb.BDAT)

    def _end_refused_chunk(self, refusal: ChunkRefusal) -> None:
        self._chunk = None
        self.phase = refusal.phase
        for _ in range(refusal.copies):
            self._send(refusal.reply, Verb.BDAT)
        if self.level is ConnState.DATA and self._transaction is None:
            self._settle()

    def _finish_content(self, transaction: OpenTransaction, content: IncomingContent) -> None:
        refusal = content.finish()
        if refusal is not None:
            self._refuse_message(refusal, self._content_verb(), copies=self._final_replies(transaction))
        else:
            self.asked = Asked.CONTENT
            self._handler.content_ended(content.octets)

    def _refuse_message(self, reply: Reply, verb: Verb, *, copies: int = 1) -> None:
        """Refuse the message being received: Error, then Idle."""
        self.messages += 1
        self._drop_transaction(reply)
        for _ in range(copies):
            self._send(reply, verb)
        self._settle()

    def _final_replies(self, transaction: OpenTransaction) -> int:
        """The number of replies to the end of the content: one per recipient over LMTP (RFC 2033 4.2, 4.3)."""
        return transaction.recipients if self._policy.is_lmtp else 1

    def _answer_content(self, decided: Sequence[Reply]) -> None:
        transaction = self._transaction
        assert transaction is not None
        if len(decided) != (transaction.recipients if self._policy.is_lmtp else 1):
            raise LocalProtocolError("not as many replies as the content asks for")
        verb = _DATA if transaction.by_data else Verb.BDAT
        # As `_end_transaction` and `_settle`.
        self._transaction = self._chunk = None
        self.phase = _READY
        misconduct = self._misconduct
        if misconduct is not None:
            misconduct.junk = 0
        self.messages += 1
        reply = decided[0]
        if reply.code < 400 or any(reply.is_positive for reply in decided):
            if misconduct is not None:
                misconduct.refusals = 0
            if len(decided) == 1 and reply.code == 250 and reply.enhanced is not None:
                # The same as below, for most messages.
                self.settle(_new(TransactionOver, (self.messages,)))
                self.said.append((verb, reply))
                self.out += reply.wire
                return
            self.enter(_ACTIVE)
        wires = []  # one for each recipient over LMTP, joined once
        for reply in decided:
            if reply.code == 250 and reply.enhanced is not None and self.phase is not _ENDING:
                self.said.append((verb, reply))
                wires.append(reply.wire)
            else:
                self.out += b"".join(wires)
                wires.clear()
                self._send(reply.as_plain_success() if 250 < reply.code < 300 else reply, verb)
        self.out += b"".join(wires)
        if self.phase is not _ENDING:
            self.enter(_IDLE, _new(TransactionOver, (self.messages,)))


def _refusal_of_8bit(mail: Mail, offer: Extensions) -> Reply | None:
    """The refusal of content with octets above 127; None if the client may send it."""
    if mail.body is Body.EIGHT_BIT_MIME and not offer.eight_bit_mime:
        return replies.NEEDS_8BITMIME
    if mail.smtputf8 and "SMTPUTF8" not in offer.keywords:
        return replies.CONTENT_NEEDS_SMTPUTF8
    return None
