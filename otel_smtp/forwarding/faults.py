"""Faults of upstreams, classified by their consequences.

A refusal (4yz or 5yz to MAIL, RCPT, DATA or the content) is no fault: it is an answer, and is passed on. A fault means
that this upstream, on this connection, gave no usable answer; the next one may be asked until the end of the message
has been sent.
"""

from typing import ClassVar

from otel_smtp.smtp import replies
from otel_smtp.smtp.client import MAX_KEPT_CHARACTERS
from otel_smtp.smtp.replies import Reply


class UpstreamFault(Exception):
    """An upstream could not be used.

    Args:
        reply: to the client, if the upstream sent none; None: the class's own.

    Attributes:
        reply: the reply to the client if no other upstream is left, without the upstream's words: see `quoted_reply`.
        upstream_reply: the upstream's own reply that caused it, if it gave one.
    """

    usual: ClassVar[Reply] = replies.UPSTREAM_UNAVAILABLE

    def __init__(self, what: str, reply: Reply | None = None, upstream_reply: Reply | None = None) -> None:
        super().__init__(what)
        if reply is None:
            reply = self.usual if upstream_reply is None else replies.UPSTREAM_REFUSES
        self.reply = reply
        self.upstream_reply = upstream_reply

    @property
    def quoted_reply(self) -> Reply:
        """`reply`, with the upstream's code and words where it gave any."""
        return quoting(self.reply, self.upstream_reply)


class ConnectFailed(UpstreamFault):
    """No connection for mail could be opened: counted by the breaker."""


class Unsuitable(UpstreamFault):
    """It works, but lacks an extension that this mail needs; `reply` names it. Not counted by the breaker."""


class NoConnectionFree(UpstreamFault):
    """The pool had none: all were busy for too long, or the upstream is in backoff. Nothing was tried."""


class Paced(UpstreamFault):
    """One of our limits holds the mail back for longer than it may wait. Nothing was tried."""

    usual = replies.UPSTREAM_PACED


class CredentialsRefused(UpstreamFault):
    """It demands credentials in the middle of a transaction, or no longer accepts ours."""

    usual = replies.UPSTREAM_CREDENTIALS

    def __init__(self, upstream_reply: Reply) -> None:
        super().__init__("credentials refused", replies.UPSTREAM_CREDENTIALS, upstream_reply)


class ConnectionLost(UpstreamFault):
    """It closed the connection, or said 421."""

    usual = replies.UPSTREAM_LOST


class Spent(ConnectionLost):
    """It refuses MAIL temporarily on a used connection; it may accept it on another one."""


class TimedOut(ConnectionLost):
    """It stayed silent for too long, or took no more content."""

    usual = replies.UPSTREAM_SILENT


class OutOfStep(UpstreamFault):
    """It broke the protocol."""

    def __init__(self, what: str, upstream_reply: Reply | None = None) -> None:
        super().__init__(what, replies.UPSTREAM_PROTOCOL, upstream_reply)


def quoting(own: Reply, said: Reply | None) -> Reply:
    """Our own reply, followed by an upstream's words."""
    if said is None:
        return own
    return own.with_text(f"{own.text}: {said}"[:MAX_KEPT_CHARACTERS])
