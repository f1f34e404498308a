"""What a run of the tests leaves untested on this machine, and which packages bring what is missing."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

_PACKAGE: Final = re.compile(r"\(Debian package ([a-z0-9.+-]+)\)")


def lines(reasons: Iterable[str]) -> list[str]:
    """What to print at the end of a run.

    Args:
        reasons: why a test was skipped, one for each; a package is named as "(Debian package NAME)".

    Returns:
        One line for each reason, the most frequent first, and one that installs all packages named; none where
        nothing was skipped.
    """
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    said = [
        f"{count:5} skipped: {reason}" for reason, count in sorted(counts.items(), key=lambda each: (-each[1], each))
    ]
    packages = sorted({name for reason in counts for name in _PACKAGE.findall(reason)})
    return [*said, *([f"to run them too: apt-get install {' '.join(packages)}"] if packages else [])]
