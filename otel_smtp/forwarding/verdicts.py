"""Pure functions that interpret an upstream's answers for one mail."""

import re
from collections.abc import Sequence
from typing import Final

from otel_smtp.forwarding.faults import quoting
from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import MAX_KEPT_CHARACTERS
from otel_smtp.smtp.replies import ErrorType, Reply

_ABOUT_CREDENTIALS: Final = frozenset({530, 534, 535, 538})


def is_about_credentials(reply: Reply) -> bool:
    """Whether a refusal says that the gateway must log in, or log in differently (RFC 4954 6).

    Nothing is wrong with the mail then: a 5yz passed on would make the client give it up.
    """
    return reply.code in _ABOUT_CREDENTIALS


def outcome_of(refusal: Reply) -> Outcome:
    """The outcome of a refused attempt."""
    if refusal.error_type is ErrorType.OUTCOME_UNKNOWN:
        return Outcome.UNKNOWN
    return Outcome.DEFERRED if refusal.is_transient or is_about_credentials(refusal) else Outcome.REFUSED


def wants_another_transaction(refusal: Reply) -> bool:
    """Whether a recipient was refused for being one too many in this transaction, or on this connection.

    452 says so, and 552 from servers that follow RFC 821 (RFC 5321 4.5.3.1.10); unless the enhanced code says that
    something else is full.
    """
    enhanced = refusal.enhanced
    if refusal.code == 452:
        return enhanced is None or enhanced[1:] == (5, 3)
    return refusal.code == 552 and (enhanced is None or enhanced.subject != 2)


_TOO_MUCH: Final = re.compile(r"too many (?!recipients|rcpt)|too much mail|rate limit|throttl|slow down", re.IGNORECASE)
_ABOUT_ONE_MAIL: Final = re.compile(r"gr[ae]y-?list", re.IGNORECASE)


def asks_for_less(refusal: Reply) -> bool:
    """Whether an upstream says that it gets too much mail from us, rather than that something is wrong with this one.

    421 ends a working connection; 450 and 451 with X.7.x come from a policy (RFC 3463 3.8); others say it in words.
    Greylisting, which has the same codes, is about one sender and one recipient. A refusal of our credentials is passed
    on as a 451 4.7.0 of ours.
    """
    if not refusal.is_transient or wants_another_transaction(refusal) or refusal.error_type is ErrorType.UPSTREAM_AUTH:
        return False
    text = " ".join(refusal.lines)
    if refusal.code == 421 or _TOO_MUCH.search(text) is not None:
        return True
    is_policy = refusal.code in (450, 451) and refusal.enhanced is not None and refusal.enhanced.subject == 7
    return is_policy and _ABOUT_ONE_MAIL.search(text) is None


def fold(verdicts: Sequence[Reply]) -> Reply:
    """Combine the replies for each recipient of a message, in order, into one final reply.

    All accepted: the first. None accepted: a temporary refusal, if there is one. A mixed result says how many were
    accepted, since a client that gets one reply for all recipients must not take it for success: 451 if a retry may
    help one of the others (recipients who have the message may then get it twice), otherwise the first refusal's code
    and words, so that no recipient gets a copy with each of many attempts.
    """
    refused = sum(reply.code >= 400 for reply in verdicts)
    decisive = deciding(verdicts)
    if refused in (0, len(verdicts)):
        return decisive
    count = f"taken for {len(verdicts) - refused} of {len(verdicts)} recipients"
    if decisive.is_transient and decisive.error_type is not ErrorType.OUTCOME_UNKNOWN:
        return quoting(replies.SOME_RECIPIENTS_DEFERRED.with_text(f"Message {count}"), decisive)
    return with_remark(decisive, count)


def deciding(verdicts: Sequence[Reply]) -> Reply:
    """Which of the replies for each recipient is decisive for the final one: an outcome that is unknown, then a refusal
    that lets the client try again, then one for good; the first of those, or of all."""
    refusals = [reply for reply in verdicts if reply.code >= 400]
    unknown = (reply for reply in refusals if reply.error_type is ErrorType.OUTCOME_UNKNOWN)
    passing = (reply for reply in refusals if reply.is_transient)
    return next(unknown, None) or next(passing, None) or next(iter(refusals), verdicts[0])


def with_remark(reply: Reply, remark: str) -> Reply:
    """A reply with our remark appended; its own words are cut if they are too long."""
    *lines, last = reply.lines
    return reply.with_text(*lines, f"{last[: MAX_KEPT_CHARACTERS - len(remark) - 3]} ({remark})".lstrip())
