"""What follows from what an upstream offers, and from what it answers: for one mail, as pure functions."""

from collections.abc import Sequence
from typing import Final

from otel_smtp.forwarding.faults import quoting
from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import MAX_KEPT_CHARACTERS
from otel_smtp.smtp.envelope import Body, Mail
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import ErrorType, Reply


def missing_extension(mail: Mail, extensions: Extensions, *, is_tls: bool) -> Reply | None:
    """The refusal of a mail that needs what an upstream does not offer; None if it offers all.

    A client is refused what was not offered to it (see `smtp.extensions.unsupported`), so what is missing here was
    offered in good faith, and the upstream has changed, or another one stands in for it: the refusal is for now. Only
    8BITMIME is taken from clients that were not offered it, and NEEDS_8BITMIME says that the content must be looked at.

    DSN parameters are not needed: they are left out where they are not offered (RFC 3461 5.2.2 lets a relay do so).
    """
    if (mail.smtputf8 or not mail.reverse_path.isascii()) and not extensions.smtputf8:
        return replies.UPSTREAM_LACKS_SMTPUTF8
    if mail.body is Body.BINARY_MIME and not extensions.binary_mime:
        return replies.UPSTREAM_LACKS_BINARYMIME
    if mail.body is Body.EIGHT_BIT_MIME and not extensions.eight_bit_mime:
        return replies.NEEDS_8BITMIME
    # "When the MAIL FROM return-path is empty, the REQUIRETLS parameter SHOULD NOT cause a bounce message to be
    # discarded" (RFC 8689 5): it is asked for where it is offered.
    if mail.require_tls and mail.reverse_path and not (extensions.require_tls and is_tls):
        return replies.UPSTREAM_LACKS_REQUIRETLS
    if mail.size is not None and extensions.size is not None and mail.size > extensions.size:
        return replies.MESSAGE_TOO_BIG
    return None


_ABOUT_CREDENTIALS: Final = frozenset({530, 534, 535, 538})


def is_about_credentials(reply: Reply) -> bool:
    """Whether a refusal says that the gateway has to log in, or to log in otherwise (RFC 4954 6).

    Nothing is wrong with the mail then: to pass it on as 5yz would tell the client to give the mail up.
    """
    return reply.code in _ABOUT_CREDENTIALS


def outcome_of(refusal: Reply) -> Outcome:
    """How an attempt ended that was refused."""
    if refusal.error_type is ErrorType.OUTCOME_UNKNOWN:
        return Outcome.UNKNOWN
    return Outcome.DEFERRED if refusal.is_transient or is_about_credentials(refusal) else Outcome.REFUSED


def wants_another_transaction(refusal: Reply) -> bool:
    """Whether a recipient was refused because there are too many in this transaction, or on this connection.

    452 says so, and 552 where servers follow RFC 821 (RFC 5321 4.5.3.1.10); but not where the enhanced code says that
    something else is full.
    """
    enhanced = refusal.enhanced
    if refusal.code == 452:
        return enhanced is None or enhanced[1:] == (5, 3)
    return refusal.code == 552 and (enhanced is None or enhanced.subject != 2)


def fold(verdicts: Sequence[Reply]) -> Reply:
    """One final reply for what was answered for each recipient of a message, in their order.

    All accepted: the first. None accepted: a refusal that lets the client try again, if there is one. Some of both says
    for how many, as a client that is told nothing of single recipients must not take it for success: 451 where another
    try may help one of the others (those who have it may get it twice then), else the first refusal's code and words,
    so that nobody gets a copy with each of many tries.
    """
    refusals = [reply for reply in verdicts if reply.code >= 400]
    if not refusals:
        return verdicts[0]
    unknown = next((reply for reply in refusals if reply.error_type is ErrorType.OUTCOME_UNKNOWN), None)
    passing = unknown or next((reply for reply in refusals if reply.is_transient), None)
    if len(refusals) == len(verdicts):
        return passing or refusals[0]
    count = f"taken for {len(verdicts) - len(refusals)} of {len(verdicts)} recipients"
    if unknown is not None:
        return _with_behind(unknown, count)
    if passing is not None:
        return quoting(replies.SOME_RECIPIENTS_DEFERRED.with_text(f"Message {count}"), passing)
    return _with_behind(refusals[0], count)


def _with_behind(reply: Reply, remark: str) -> Reply:
    *lines, last = reply.lines
    return reply.with_text(*lines, f"{last[: MAX_KEPT_CHARACTERS - len(remark) - 3]} ({remark})".lstrip())
