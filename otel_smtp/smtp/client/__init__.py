"""ClientProtocol: our side of the conversation with an upstream, as a value machine.

Theory of operation
-------------------
Commands are *queued*, and `data_to_send` returns as many of them as may be sent now: a whole group if the upstream
offers PIPELINING, up to the command that must end it (RFC 2920 3.1); otherwise one at a time. The driver sends these
octets, passes every piece that arrives to `receive`, and gets one `Answer` for each command, in order. So the same
strategy works with and without PIPELINING, and cutting the input differently changes nothing.

Replies are bounded, and matched to commands by order alone. Anything out of place (an unsolicited reply, a reply of a
class that the command cannot have, a line that is no reply, octets behind the 220 of STARTTLS) is a fault of the
upstream: the engine sets `fault` and takes nothing more, since one surplus reply would shift every later answer to the
wrong command. Answers that came before the fault stay valid: a reply that has been read counts.

One writer makes every command line. It raises `LocalProtocolError` for an argument that could end the line, open
another path or smuggle a parameter: callers must have refused it long before, by `is_safe_path`.

Content is put into wire form here: dots are stuffed for DATA, or octets are counted for BDAT. A piece without dots to
stuff is passed on uncopied.

`answers` reads a reply, `commanding` writes commands and content, `protocol` matches the one to the other.
"""

from otel_smtp.smtp.client.answers import (
    CONTENT,
    DATA,
    MAIL,
    MAX_KEPT_CHARACTERS,
    MAX_REPLY_LINE_OCTETS,
    MAX_REPLY_LINES,
    NO_ANSWERS,
    RCPT,
    RSET,
    Answer,
    Awaited,
    ExchangeAnswers,
    challenge_of,
)
from otel_smtp.smtp.client.commanding import is_safe_path
from otel_smtp.smtp.client.protocol import ClientProtocol

__all__ = [
    "CONTENT",
    "DATA",
    "MAIL",
    "MAX_KEPT_CHARACTERS",
    "MAX_REPLY_LINES",
    "MAX_REPLY_LINE_OCTETS",
    "NO_ANSWERS",
    "RCPT",
    "RSET",
    "Answer",
    "Awaited",
    "ClientProtocol",
    "ExchangeAnswers",
    "challenge_of",
    "is_safe_path",
]
