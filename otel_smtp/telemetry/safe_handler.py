"""A log handler whose own errors never reach the logging code, and are reported once.

The standard library's handlers print a traceback on stderr for each record that they fail on: several times per mail,
and waiting for the reader of stderr. An error in a filter reaches the caller, which may be relaying a mail.
"""

import json
import logging
import traceback
from typing import Final

logger: Final = logging.getLogger("otel_smtp.telemetry.logs")

_SAID: Final = "log handler raised: lines may be missing, mail is unaffected"


class SafeHandler(logging.Handler):
    """Reports its first error, and no others."""

    _errors = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record passes, which it also does if a filter fails."""
        try:
            return super().filter(record)
        except Exception:  # noqa: BLE001 - the contract of handlers: an error is reported and never raised
            if not self._errors:
                self.handleError(record)
            return True

    def handle(self, record: logging.LogRecord) -> bool:
        """Write the record, if it passes; errors of `emit` stay here too."""
        try:
            return super().handle(record)
        except Exception:  # noqa: BLE001 - as above
            self.handleError(record)
            return True

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        """Report the current exception, if it is the first: by the handlers beside this one, and by this one if it
        can."""
        self._errors += 1
        if self._errors > 1:
            return
        about = {"handler": type(self).__qualname__, "about": record.name}
        told = traceback.format_exc()
        logger.exception(_SAID, extra=about)
        if self._errors > 1:  # this one cannot
            self.say_plainly(json.dumps({"level": "error", "event": _SAID, **about, "traceback": told}))

    def say_plainly(self, line: str) -> None:
        """Report it without the code that may have raised, if possible."""
