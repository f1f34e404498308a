"""ServerProtocol: the server side of a session, from octets to decisions and from replies to octets.

How it is driven::

    protocol = ServerProtocol(policy, handler, ...)
    protocol.accepted(TlsMode.OFF)          # New
    protocol.greet()                        # Active, 220
    protocol.receive_data(octets)           # runs what they hold, as far as it goes; calls the handler on the way
    protocol.reply(...)                     # the handler's decision, within its call or later; runs on from there
    write(protocol.data_to_send())          # after each of these calls; then close, once `close_reason` is set
    protocol.closed(reason)                 # Closed, once, whatever happened

What the engine promises:

* It answers by itself where no decision is needed: syntax, order, limits, EHLO, NOOP, and so on. Decisions are asked
  of the `Handler`; until one is made nothing further is run.
* Replies leave in the order of their commands. Recipients of a pipelined group are asked about together.
* `_send` is the one place where a reply is written, so it is the one place where Error is raised; every state is
  recorded inside the call that decides the reply, before `data_to_send` can give its octets.
* A transaction is one object, made at MAIL and dropped at its end: nothing of it can reach the next.
* Cutting the input differently changes neither what the handler is asked nor replies nor states. (Recipients may be
  asked about one by one. Where content is refused, what is handed up of it before its end may be less or more.)

Most commands come alone, as one line in one piece, with nothing else to be read. They and content that comes in one
piece do not pass through the receive buffer; what `receive_data` does with them is what `run` would do.

The class is written in layers, one subject each, and each on the one before: `replying` (the state of a session, its
replies and ends), `securing` (STARTTLS and AUTH), `receiving` (content), `dispatching` (commands, the envelope), and
`protocol`, which reads the lines and is what the driver holds.
"""

from otel_smtp.smtp.server.protocol import ServerProtocol

__all__ = ["ServerProtocol"]
