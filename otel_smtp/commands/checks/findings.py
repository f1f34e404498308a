"""The findings of checks."""

from typing import Final, Literal, NamedTuple

Verdict = Literal["ok", "warning", "failed"]

# A person waits for the result.
TIMEOUT_SECONDS: Final = 5.0


class Finding(NamedTuple):
    """The result of one check."""

    verdict: Verdict
    subject: str
    detail: str
