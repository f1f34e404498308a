"""The replies whose counts start at 0.

A counter that starts at 1 hides its first event from `increase()`. Per verb, these are the codes of RFC 5321 4.3.2 and
the extensions that the gateway sends or passes on. Other codes of an upstream are counted from their first occurrence.
"""

from collections.abc import Mapping, Sequence
from typing import Final

_REFUSALS: Final = (421, 450, 451, 452, 501, 503, 530, 550, 552, 553, 554)
_HELLO: Final = (250, 421, 501, 503)

EXPECTED_REPLIES: Final[Mapping[str | None, Sequence[int]]] = {
    None: (220, 421, 554),  # the greeting, and what is said unasked
    "EHLO": _HELLO,
    "HELO": _HELLO,
    "LHLO": _HELLO,
    "STARTTLS": (220, 454, 501, 503, 554),  # RFC 3207 4
    "AUTH": (235, 334, 421, 454, 501, 503, 504, 535, 538),  # RFC 4954 6
    "MAIL": (250, *_REFUSALS, 555),
    "RCPT": (250, *_REFUSALS, 551, 555),
    "DATA": (250, 354, *_REFUSALS),
    "BDAT": (250, *_REFUSALS),  # RFC 3030 2
    "RSET": (250,),
    "NOOP": (250,),
    "VRFY": (252,),
    "EXPN": (502,),
    "HELP": (214,),
    "QUIT": (221,),
    "other": (421, 500),
}
"""None: no verb."""
