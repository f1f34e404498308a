"""The envelope of a transaction upstream: MAIL, recipients, and the meaning of their answers.

An upstream limits the recipients of a transaction, by announcement or by refusing one too many. The client was promised
room for those beyond, so they are left for a further transaction (see `further`).
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from time import monotonic, monotonic_ns
from typing import Any, Final

from otel_smtp.forwarding.attempts import Attempts
from otel_smtp.forwarding.authentication import without_secrets
from otel_smtp.forwarding.base import MessageAnswered, RecipientsAnswered
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.faults import CredentialsRefused, Spent, UpstreamFault
from otel_smtp.forwarding.pace import WaitingMail
from otel_smtp.forwarding.settings import TracePolicy
from otel_smtp.forwarding.tickets import Parked
from otel_smtp.forwarding.verdicts import is_about_credentials, outcome_of, wants_another_transaction
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import MAIL, NO_ANSWERS, RSET, Answer, ExchangeAnswers
from otel_smtp.smtp.envelope import Body, Recipient
from otel_smtp.smtp.extensions import is_ascii, of_ascii_content
from otel_smtp.smtp.received import TRACEPARENT_FIELD_OCTETS
from otel_smtp.smtp.replies import Reply

MOST_TRANSACTIONS: Final = 50
"""The most transactions for one message; a thousand recipients need ten of the size that any server takes."""

_MAIL: Final = frozenset({RSET, MAIL})
# See `smtp.client.answers` for the reason of these names.
_INJECT: Final = TracePolicy.INJECT
_parked: Final = partial(tuple.__new__, Parked)  # as `answer_of` there


class Enveloping(Attempts):
    """The envelope; see `Delivery` for arguments and attributes."""

    __slots__ = (
        "_after",
        "_asked",
        "_content",
        "_delivered",
        "_header",
        "_is_full",
        "_judged",
        "_mail_refusal",
        "_more",
        "_octets",
        "_promised",
        "_refusal",
        "_sent_octets",
        "_sent_pieces",
        "accepted",
        "left",
        "wants_fresh",
    )

    _after: Callable[[Any, ExchangeAnswers], None]  # the step that takes the answers
    accepted: list[Recipient]
    left: list[Recipient]
    wants_fresh: bool
    _is_full: bool  # no further recipient is sent: the transaction is full, or MAIL was refused
    _promised: list[Recipient] | None  # see `promised`; None: no recipient was left
    _asked: Sequence[Recipient]  # set with the next
    _judged: RecipientsAnswered | None
    _delivered: MessageAnswered | None
    _refusal: Reply | None  # the last refusal, of a recipient or MAIL
    _mail_refusal: Reply | None
    _more: WaitingMail | None  # permission for further recipients
    # Set when they are needed.
    _content: Content
    _header: bytes
    _octets: int  # of the outgoing header block and the body
    _sent_octets: int
    _sent_pieces: int

    @abstractmethod
    def _settled(self, answers: ExchangeAnswers, fault: UpstreamFault | None) -> None:
        """An exchange is over: note what was answered, and take the next step."""

    @property
    def promised(self) -> Sequence[Recipient]:
        """Accepted and left recipients, in order of arrival."""
        return self.accepted if self._promised is None else self._promised

    def _recipients_to_come(self) -> int:
        """See `Attempts`."""
        asked = len(self._asked) if self._judged is not None else 0
        return min(len(self.accepted) + asked, self._smarthost.most_recipients)

    def _has_ascii_recipients(self) -> bool:
        """See `Attempts`."""
        asked = self._asked if self._judged is not None else ()
        return all(map(is_ascii, self.accepted)) and all(map(is_ascii, asked))

    def _answer_for_all(self, reply: Reply) -> None:
        """Answer the pending question with `reply`: no upstream is left."""
        judged, self._judged = self._judged, None
        delivered, self._delivered = self._delivered, None
        if judged is not None:
            judged([reply] * len(self._asked))
        elif delivered is not None:
            delivered(reply, ())

    # Put ---------------------------------------------------------------------------------------------------

    def put_recipients(self) -> None:
        """Send the pending recipients, preceded, if this upstream takes over from another, by those accepted before."""
        connection, is_open = self._connection, self._is_open
        asked = self._asked
        accepted: Sequence[Recipient] = self.accepted
        most = connection.most_recipients
        if is_open:
            extensions = connection.protocol.extensions
            if self._mail.smtputf8 and not extensions.smtputf8 and not all(map(is_ascii, asked)):
                self._pass_by(replies.UPSTREAM_LACKS_SMTPUTF8)
                return
        elif accepted:
            accepted = self._fitting()
        if self._is_full or len(accepted) + len(asked) > most:
            asked = asked[: most - len(accepted)]
            self._is_full = True
            if not asked and is_open:
                self._recipients_answered(NO_ANSWERS)
                return
        if is_open:
            connection.protocol.send_envelope(None, asked)
        else:
            self._send_envelope(None, [*accepted, *asked] if accepted else asked)
        self._after = _RECIPIENTS_ANSWERED
        connection.exchange(self._settled, stop_at=_MAIL)

    def _send_envelope(self, octets: int | None, recipients: Sequence[Recipient]) -> None:
        """Queue MAIL and its first recipients.

        Args:
            octets: of the outgoing message; None: the client's content, or its declared size plus our own fields, since
                it declared the message as sent to us (RFC 1870 6.1).
        """
        connection = self._connection
        if octets is None:
            record = self._record
            octets = self._mail.size if record.octets is None else record.octets
            if octets is not None:
                octets += record.added_octets
                if self._smarthost.settings.trace_context is _INJECT:
                    octets += TRACEPARENT_FIELD_OCTETS
        if connection.needs_reset:
            connection.protocol.send_reset()
        # Until the upstream has taken the message. RFC 3030 2 demands RSET even after a refused chunk.
        connection.needs_reset = True
        mail = self._mail
        if not self._is_plain and self._delivered is not None and mail.smtputf8:
            if not self._content.is_8bit:
                mail = of_ascii_content(mail, recipients)
            elif mail.body is None and not connection.protocol.extensions.smtputf8:
                mail = mail._replace(body=Body.EIGHT_BIT_MIME)  # as which it can go
        connection.protocol.send_envelope(mail, recipients, size=octets)

    def _fitting(self) -> Sequence[Recipient]:
        """Recipients accepted before, as many as this upstream takes at once; the others are left."""
        most = self._connection.most_recipients
        if len(self.accepted) > most:
            self._leave(range(most, len(self.accepted)))
        return self.accepted

    def _recipients_answered(self, answers: ExchangeAnswers) -> None:
        verdicts: Sequence[Reply] = answers.verdicts
        if answers.refusal is None and not self._is_full and (self._is_open or not self.accepted):
            self._is_open = True
            self.accepted += self._asked
        else:
            if not self._is_open and (refusal := answers[0].reply).code >= 400:
                self._sender_refused(refusal)
                return
            verdicts = self._sorted_out(answers)
        judged, self._judged = self._judged, None
        if judged is not None:
            # The connection is parked until the client continues, and may be taken away meanwhile.
            self._connection.parked = _parked((monotonic(), self._reclaimed))
            judged(verdicts)

    def _sorted_out(self, answers: ExchangeAnswers) -> Sequence[Reply]:
        """Sort the verdicts on the pending recipients: some are refused or left, or others were sent before them."""
        verdicts = [*answers.verdicts]
        before = len(self.accepted)
        if not self._is_open:
            self._is_open = True
            self._check_accepted_before(verdicts[:before])
            del verdicts[:before]
            before = len(self.accepted)
        beyond: list[int] = []
        for number, verdict in enumerate(verdicts):
            recipient = self._asked[number]
            if verdict.code < 400:
                self.accepted.append(recipient)
            elif wants_another_transaction(verdict):
                beyond.append(number)
            else:
                verdicts[number] = self._refuse(recipient, verdict)
        if beyond or self._is_full:
            self._divide(before, verdicts, beyond)
        return verdicts

    def _check_accepted_before(self, verdicts: Sequence[Reply]) -> None:
        """Check this connection's verdicts on recipients accepted before."""
        beyond = set()
        for number, verdict in enumerate(verdicts):
            if verdict.code >= 400:
                if not wants_another_transaction(verdict):
                    raise UpstreamFault("what another upstream had accepted is refused", upstream_reply=verdict)
                beyond.add(number)
        if not beyond:
            return
        if len(beyond) == len(verdicts):
            self._check_quota(verdicts[0])
            raise UpstreamFault("what another upstream had accepted is refused", upstream_reply=verdicts[0])
        self._note_limit()
        self._leave(beyond)

    # Refused -----------------------------------------------------------------------------------------------

    def _refuse(self, recipient: Recipient, verdict: Reply) -> Reply:
        """Note a refused recipient; returns the reply to the client."""
        self._refusal = verdict
        told = self._for_client(verdict)
        self._attempt.refuse(recipient, told, monotonic_ns())
        return told

    def _keep_refusals(self, answers: Sequence[Answer]) -> None:
        """Judge the recipients whose refusal was read before the connection was lost, and ask about the others alone.

        An upstream that refuses a recipient and closes the connection would do so again.
        """
        asked, judged = self._asked, self._judged
        told: dict[int, Reply] = {}
        for number, (_, verdict) in enumerate(answers):
            if verdict.code >= 400 and not wants_another_transaction(verdict):
                told[number] = self._refuse(asked[number], verdict)
        if not told or judged is None:
            return
        self._is_open = True  # a connection lost in the middle of a transaction is worth a second one
        self._asked = [recipient for number, recipient in enumerate(asked) if number not in told]
        self._judged = partial(_judge_the_rest, judged, len(asked), told)

    def _sender_refused(self, refusal: Reply) -> None:
        self._check_sender_refusal(refusal)
        if self.accepted:
            raise UpstreamFault("a sender that another upstream had accepted is refused", upstream_reply=refusal)
        self._refused_by(refusal)

    def _check_sender_refusal(self, refusal: Reply) -> None:
        """Raise if a refusal of MAIL is no answer to the mail."""
        if is_about_credentials(refusal):
            self.has_ended_content = False
            raise CredentialsRefused(self._without_secrets(refusal))
        if refusal.is_transient and self._was_reused and self._may_try_again:
            self.has_ended_content = False
            self._connection.is_spent = True
            raise Spent("MAIL refused on a connection that has served before", upstream_reply=refusal)

    def _refused_by(self, refusal: Reply) -> None:
        """MAIL was refused, and with it the pending question."""
        self._refusal = self._mail_refusal = refusal
        self._is_full = True
        self._count_as_refused()
        self._end(outcome_of(refusal), refusal, refusal.error_type, answered=True)
        self._answer_for_all(refusal)

    def _count_as_refused(self) -> None:
        """MAIL was refused: that answers each pending recipient."""
        asked = len(self.accepted) + (len(self._asked) if self._judged is not None else 0)
        self._attempt.accepted_count = asked  # the end of the attempt counts them

    def _for_client(self, refusal: Reply) -> Reply:
        """The reply to the client for a refusal; a refusal of our credentials says nothing about the mail."""
        if refusal.code < 530 or not is_about_credentials(refusal):
            return refusal
        fault = CredentialsRefused(self._without_secrets(refusal))
        self._smarthost.credentials_refused(fault, self._named())
        return fault.quoted_reply

    def _without_secrets(self, refusal: Reply) -> Reply:
        credentials = self._smarthost.settings.credentials
        return refusal if credentials is None else without_secrets(refusal, credentials)

    # Recipients beyond one transaction -----------------------------------------------------------------------

    def _promise(self, recipient: Recipient) -> Reply:
        """Leave a recipient that was not sent, or is one too many."""
        # The number accepted on a fresh connection is the connection's limit.
        is_measured = self.wants_fresh and not self._was_reused
        most = max(1, len(self.accepted)) if is_measured else self._connection.most_recipients
        if len(self.left) >= (MOST_TRANSACTIONS - 1) * most:
            return replies.TOO_MANY_RECIPIENTS
        if self._promised is None:
            self._promised = list(self.accepted)
        self._is_full = True
        self.left.append(recipient)
        self._promised.append(recipient)
        return replies.RECIPIENT_OK

    def _leave(self, numbers: Collection[int]) -> None:
        """Leave some accepted recipients: this upstream takes fewer than the one before, or than was known.

        Args:
            numbers: their indexes among the accepted.
        """
        if self._promised is None:
            self._promised = list(self.accepted)
        self._is_full = True
        self.left += [recipient for number, recipient in enumerate(self.accepted) if number in numbers]
        self.accepted = [recipient for number, recipient in enumerate(self.accepted) if number not in numbers]

    def _note_limit(self) -> None:
        """There was one recipient too many for the transaction or for the connection, it is unknown which."""
        self.wants_fresh = True
        self._connection.is_spent = True

    def _check_quota(self, refusal: Reply) -> None:
        """Raise if the refusal of the first recipients is no answer: earlier mails may have used up the connection's
        quota.
        """
        if self._was_reused and self._smarthost not in self._tried.again:
            self.has_ended_content = False
            self._connection.is_spent = True
            raise Spent("recipients refused on a connection that has served before", upstream_reply=refusal)

    def _divide(self, before: int, verdicts: list[Reply], beyond: Collection[int]) -> None:
        """Leave this group's recipients that are too many for the transaction, and complete `verdicts`.

        Args:
            before: how many had been accepted before them.
            verdicts: on the recipients that were sent.
            beyond: indexes of those that were one too many.
        """
        asked = self._asked
        if beyond and not self.accepted:
            # One too many without another recipient is a refusal like any other.
            self._check_quota(verdicts[min(beyond)])
            for number in beyond:
                self._refusal = verdicts[number]
                self._attempt.refuse(asked[number], verdicts[number], monotonic_ns())
            beyond = ()
        if beyond:
            self._note_limit()
        promised = self._promised = self.accepted[:before] if self._promised is None else self._promised
        for number, recipient in enumerate(asked):
            if number >= len(verdicts):
                verdicts.append(self._promise(recipient))
            elif number in beyond:
                verdicts[number] = self._promise(recipient)
            elif verdicts[number].code < 400:
                promised.append(recipient)


def _judge_the_rest(judged: RecipientsAnswered, count: int, told: Mapping[int, Reply], rest: Sequence[Reply]) -> None:
    """Complete the verdicts on `count` recipients.

    Args:
        told: those known before, by the recipients' indexes.
        rest: those on the others.
    """
    others = iter(rest)
    judged([told[number] if number in told else next(others) for number in range(count)])


# Looking a function up in its class costs as much as a call; each mail takes these steps.
_RECIPIENTS_ANSWERED: Final = Enveloping._recipients_answered
