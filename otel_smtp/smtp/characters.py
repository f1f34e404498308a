"""Characters that hide or mislead: the one table, for code that refuses such text and for code that cleans it."""

import re
from typing import Final

INVISIBLE: Final = re.compile(
    "[\x00-\x1f\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\u3000"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
"""Characters that no mailbox, host name or log line needs and that mislead its reader: C0, DEL, C1 and NO-BREAK SPACE,
soft hyphen, other white space, line separators, direction marks and overrides, byte order marks, lone surrogates,
noncharacters, tags. The zero-width joiners U+200C and U+200D are not in it: names in several scripts need them (RFC
5892 A.1)."""
