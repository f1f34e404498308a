"""`python -m tests.bounds`: drives every row of the ledger of bounds far beyond it; see `driving` for what is claimed.

It prints a line of a table for each drive. `tests/end_to_end/test_bounds.py` runs a few of them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.bounds.drives import DRIVES
from tests.bounds.driving import MAILS, Driven, run


def main() -> int:
    """Run drives; the exit status is 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.bounds", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of an attack; again for more")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--mails", type=int, default=MAILS, help="of the honest client, at least, beside each")
    arguments = parser.parse_args()
    wrong = []
    print(Driven.HEADING, flush=True)
    for drive in DRIVES:
        if (arguments.only and drive.name not in arguments.only) or (arguments.quick and drive.is_long):
            continue
        with tempfile.TemporaryDirectory(prefix="otel-smtp-bounds-") as directory:
            try:
                driven = run(drive, Path(directory), mails=arguments.mails)
                print(driven.told(), flush=True)
                driven.check()
            except (AssertionError, TimeoutError) as error:
                wrong.append(drive.name)
                print(f"{drive.name}: {error}", file=sys.stderr, flush=True)
    print("every bound holds" if not wrong else f"NOT KEPT: {', '.join(wrong)}")
    return int(bool(wrong))


sys.exit(main())
