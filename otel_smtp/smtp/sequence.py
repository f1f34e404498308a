"""Which verb is legal when: RFC 5321 4.1.4, with RFC 3207 4 (STARTTLS), RFC 4954 4 (AUTH) and RFC 3030 2 (BDAT).

The phases are finer than the nine states that people see, and share no fact with them. A verb that its phase does not
list gets 503; other conditions of a verb (TLS on, a mechanism offered, a limit kept) are guards in the engine.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from otel_smtp.smtp.commands import Verb


class Phase(Enum):
    """Where a session stands in the order of commands.

    Code that runs for each mail keeps the members it needs, of this and other enums, as globals of its module: on
    Python 3.11 reading one from its class takes as long as three calls.
    """

    __hash__ = object.__hash__  # Enum's own is a Python function; this is called several times per command

    UNGREETED = auto()  # our 220 has not been sent; the client must wait
    CONNECTED = auto()  # greeted by us, no EHLO yet (again after TLS)
    READY = auto()  # EHLO or HELO done, no transaction
    MAIL = auto()  # a transaction without an accepted recipient
    RECIPIENTS = auto()  # a transaction with at least one
    CHUNKING = auto()  # between two BDAT chunks of one message
    CONTENT = auto()  # octets of DATA or of a BDAT chunk are read, no commands
    AUTHENTICATING = auto()  # lines of an AUTH exchange are read, no commands
    HANDSHAKE = auto()  # the handshake: the transport reads the octets
    ENDING = auto()  # the last reply is written


_GREETINGS: Final = frozenset({Verb.HELO, Verb.EHLO, Verb.LHLO})
_ANYWHERE: Final = frozenset({Verb.RSET, Verb.NOOP, Verb.VRFY, Verb.EXPN, Verb.HELP, Verb.QUIT})

SEQUENCE: Final[Mapping[Phase, frozenset[Verb]]] = {
    Phase.UNGREETED: frozenset(),
    Phase.CONNECTED: _ANYWHERE | _GREETINGS,
    Phase.READY: _ANYWHERE | _GREETINGS | {Verb.MAIL, Verb.AUTH, Verb.STARTTLS},
    # RFC 4954 4: no AUTH during a mail transaction.
    Phase.MAIL: _ANYWHERE | _GREETINGS | {Verb.RCPT},
    Phase.RECIPIENTS: _ANYWHERE | _GREETINGS | {Verb.RCPT, Verb.DATA, Verb.BDAT},
    # RFC 3030 2: DATA and BDAT cannot be mixed in one transaction, and no recipient joins once content has begun.
    Phase.CHUNKING: _ANYWHERE | _GREETINGS | {Verb.BDAT},
    Phase.CONTENT: frozenset(),
    Phase.AUTHENTICATING: frozenset(),
    Phase.HANDSHAKE: frozenset(),
    Phase.ENDING: frozenset(),
}

IN_TRANSACTION: Final = frozenset({Phase.MAIL, Phase.RECIPIENTS, Phase.CHUNKING, Phase.CONTENT})
