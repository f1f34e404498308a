"""What goes wrong with an upstream, by what may follow from it.

A refusal (4yz or 5yz to MAIL, RCPT, DATA or the content) is no fault: it is an answer, and is passed on. A fault means
that this upstream, on this connection, gave no usable answer; the next one may be asked as long as the end of the
message has not been sent.
"""

from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply


class UpstreamFault(Exception):
    """An upstream could not be used.

    Attributes:
        reply: the reply to the client if no other upstream is left.
        upstream_reply: the upstream's own reply that caused it, if it gave one.
    """

    def __init__(
        self, what: str, reply: Reply = replies.UPSTREAM_UNAVAILABLE, upstream_reply: Reply | None = None
    ) -> None:
        super().__init__(what)
        self.reply = reply
        self.upstream_reply = upstream_reply


class ConnectFailed(UpstreamFault):
    """No connection that could take mail: counted by the breaker."""


class Unsuitable(UpstreamFault):
    """It works, and lacks what this mail needs; `reply` says what. Not counted by the breaker."""


class NoConnectionFree(UpstreamFault):
    """The pool had none: all were busy for too long, or the upstream is in backoff. Nothing was tried."""


class ConnectionLost(UpstreamFault):
    """It went away, or said 421."""


class TimedOut(ConnectionLost):
    """It stayed silent for too long, or took no more content."""


class OutOfStep(UpstreamFault):
    """It broke the protocol."""

    def __init__(self, what: str) -> None:
        super().__init__(what, replies.UPSTREAM_PROTOCOL)
