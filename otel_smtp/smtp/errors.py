"""Protocol errors by whose fault they are: ours or the peer's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_smtp.smtp.replies import Reply


class LocalProtocolError(Exception):
    """We used the engine wrongly: a bug in this package, never something a peer can cause."""


class RemoteProtocolError(Exception):
    """The peer broke the protocol.

    Attributes:
        reply: what to answer the client: the peer itself, or ours if the peer is an upstream.
        said: the upstream's reply that broke the protocol, if it was a reply.
    """

    def __init__(self, message: str, reply: "Reply", said: "Reply | None" = None) -> None:
        super().__init__(message)
        self.reply = reply
        self.said = said
