"""What follows from what an upstream offers, and from what it answers: for one mail, as pure functions."""

from collections.abc import Sequence

from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply


def missing_extension(mail: Mail, extensions: Extensions, *, is_tls: bool) -> Reply | None:
    """The refusal of a mail that needs what an upstream does not offer; None if it offers all.

    DSN parameters are not needed: they are left out where they are not offered (RFC 3461 5.2.2 lets a relay do so).
    """
    if (mail.smtputf8 or not mail.reverse_path.isascii()) and not extensions.smtputf8:
        return replies.NEEDS_SMTPUTF8
    if mail.body is Body.BINARY_MIME and not extensions.binary_mime:
        return replies.NEEDS_BINARYMIME
    if mail.body is Body.EIGHT_BIT_MIME and not extensions.eight_bit_mime:
        return replies.NEEDS_8BITMIME
    # "When the MAIL FROM return-path is empty, the REQUIRETLS parameter SHOULD NOT cause a bounce message to be
    # discarded" (RFC 8689 5): it is asked for where it is offered.
    if mail.require_tls and mail.reverse_path and not (extensions.require_tls and is_tls):
        return replies.REQUIRETLS_UNSUPPORTED
    if mail.size is not None and extensions.size is not None and mail.size > extensions.size:
        return replies.MESSAGE_TOO_BIG
    return None


def outcome_of(refusal: Reply) -> Outcome:
    """How an attempt ended that was refused."""
    return Outcome.DEFERRED if refusal.is_transient else Outcome.REFUSED


def fold(verdicts: Sequence[Reply]) -> Reply:
    """One reply for what LMTP answers once for each recipient.

    All accepted: the first. All refused: one that lets the client try again, if there is one. Some of both: 4yz, so
    that the client keeps the mail. Those who have it already get it twice, and nobody loses it.
    """
    refusals = [reply for reply in verdicts if reply.code >= 400]
    if not refusals:
        return verdicts[0]
    if len(refusals) < len(verdicts):
        return replies.SOME_RECIPIENTS_REFUSED
    return next((reply for reply in refusals if reply.is_transient), refusals[0])
