"""Values that the status page shows of rooms that `status` does not import. The gateway makes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpstreamView:
    """An upstream at this moment.

    Attributes:
        tls: "off", "starttls" or "implicit".
        breaker: "closed" (in use), "open" (in backoff for `retry_seconds` more) or "half-open" (one probe).
        waiting: transactions waiting for a connection.
        last_success_seconds, last_failure_seconds: ages; None if there was none.
        last_failure: its class, never a peer's text.
    """

    name: str
    address: str
    tls: str
    idle: int
    busy: int
    limit: int
    waiting: int = 0
    breaker: str = "closed"
    retry_seconds: float | None = None
    last_success_seconds: float | None = None
    last_failure_seconds: float | None = None
    last_failure: str | None = None


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A message in the spool; domains only, as redaction allows.

    Attributes:
        next_attempt_seconds: until the next attempt; None if none is scheduled (held).
        last_reply: what was said of a recipient at the last attempt, as redaction allows: "451 4.4.1 No answer".
    """

    spool_id: str
    state: str
    age_seconds: float
    attempts: int
    recipients: int
    domains: Sequence[str]
    next_attempt_seconds: float | None
    last_reply: str | None
    trace_id: str | None


@dataclass(frozen=True, slots=True)
class QueueView:
    """The spool at this moment.

    Attributes:
        counts: messages by state.
        oldest_age_seconds: None if it is empty.
        messages: the oldest few.
    """

    counts: Mapping[str, int]
    oldest_age_seconds: float | None
    messages: Sequence[QueuedMessage]
