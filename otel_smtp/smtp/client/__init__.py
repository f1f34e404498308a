"""ClientProtocol: our side of the conversation with an upstream, as a value machine.

Theory of operation
-------------------
Commands are *queued*, and `data_to_send` gives out as many of them as may travel now: all of a group where the upstream
offers PIPELINING, up to the command that must end it (RFC 2920 3.1); else one at a time. The driver sends what it is
given, hands every piece that arrives to `receive`, and gets one `Answer` for each command, in order. So the same
strategy is right with and without PIPELINING, and cutting what arrives differently changes nothing.

Replies are bounded, and matched to commands by order alone. Whatever does not fit (an unsolicited reply, a
class that the command cannot have, a line that is no reply, octets behind the 220 of STARTTLS) is a fault of the
upstream: `fault` is set, and the engine takes nothing more, as one reply too many would make every following answer
that of another command. ExchangeAnswers that came before the fault stay true: a reply that has been read counts.

One writer makes every command line. It refuses what could end the line, open another path or smuggle a parameter. That
is `LocalProtocolError`, as such an argument should have been refused long before; `is_safe_path` is how.

Content is put into wire form here: dots are stuffed for DATA, or the octets are counted for BDAT. A piece in which
there is nothing to stuff is passed on as it is, uncopied.

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
