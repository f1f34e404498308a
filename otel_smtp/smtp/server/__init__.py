"""ServerProtocol: the server side of a session: octets in, decisions asked, replies out.

How it is driven::

    protocol = ServerProtocol(policy, handler, ...)
    protocol.accepted(TlsMode.OFF)          # New
    protocol.greet()                        # Active, 220
    protocol.receive_data(octets)           # runs what they hold, as far as it goes; calls the handler on the way
    protocol.reply(...)                     # the handler's decision, within its call or later; runs on from there
    write(protocol.data_to_send())          # after each of these calls; then close, once `close_reason` is set
    protocol.closed(reason)                 # Closed, once, whatever happened

The engine guarantees:

* It answers by itself if no decision is needed: syntax, order, limits, EHLO, NOOP, and so on. The `Handler` decides the
  rest; until it has, nothing further runs.
* Replies leave in the order of their commands. The recipients of a pipelined group are decided together.
* `_send` is the one place that writes a reply, and so the one place that raises Error; every state is recorded inside
  the call that decides the reply, before `data_to_send` can return its octets.
* A transaction is one object, made at MAIL and dropped at its end, so nothing of it can reach the next.
* Cutting the input differently changes neither the handler's questions nor replies nor states. (Recipients may be asked
  about one by one. Of refused content, more or less may reach the handler before its end.)

Most commands come alone, as one line in one piece. They, and content that comes in one piece, bypass the receive
buffer; `receive_data` treats them exactly as `run` would.

The class is built in layers, one subject each, each on top of the one before: `replying` (the state of a session, its
replies and ends), `securing` (STARTTLS and AUTH), `receiving` (content), `dispatching` (commands, the envelope), and
`protocol`, which reads lines and is the driver's interface.
"""

from otel_smtp.smtp.server.protocol import ServerProtocol

__all__ = ["ServerProtocol"]
