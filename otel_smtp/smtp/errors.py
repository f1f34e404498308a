"""Whose fault a protocol error is: ours or the peer's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_smtp.smtp.replies import Reply


class LocalProtocolError(Exception):
    """We used the engine wrongly: a bug in this package, never something a peer can cause."""


class RemoteProtocolError(Exception):
    """The peer broke the protocol.

    Attributes:
        reply: what to answer if the peer is a client; what to make of it for our client if the peer is an
            upstream.
        said: the reply by which an upstream did so, where it was one.
    """

    def __init__(self, message: str, reply: "Reply", said: "Reply | None" = None) -> None:
        super().__init__(message)
        self.reply = reply
        self.said = said
