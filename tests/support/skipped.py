"""What a run of the tests leaves untested on this machine, and which packages bring what is missing."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

_PACKAGES: Final = re.compile(r"\(Debian packages? ([a-z0-9.+ -]+)\)")


def lines(reasons: Iterable[str]) -> list[str]:
    """What to print at the end of a run.

    Args:
        reasons: why a test was skipped, one for each; packages are named as "(Debian packages NAME NAME)".

    Returns:
        One line for each reason, the most frequent first, and one that installs all packages named; none where
        nothing was skipped.
    """
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    said = [
        f"{count:5} skipped: {reason}" for reason, count in sorted(counts.items(), key=lambda each: (-each[1], each))
    ]
    packages = sorted({name for reason in counts for names in _PACKAGES.findall(reason) for name in names.split()})
    return [*said, *([f"to run them too: apt-get install {' '.join(packages)}"] if packages else [])]
