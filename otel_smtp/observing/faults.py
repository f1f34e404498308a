"""Faults in our own code that reads what was observed: each costs what it was about and nothing else."""

import logging
from typing import Final

MOST_LOGGED: Final = 100  # kinds; what they are about are words of ours, and this keeps it so


class Faults:
    """Logs the first fault of each kind, with its traceback, and no others.

    Args:
        logger: logs them. `event`: in these words.
    """

    __slots__ = ("_event", "_logged", "_logger")

    def __init__(self, logger: logging.Logger, event: str) -> None:
        self._logger = logger
        self._event = event
        self._logged: set[str] = set()

    def note(self, about: str) -> None:
        """Log the current exception, if it is the first.

        Args:
            about: what it costs, in a word.
        """
        if about not in self._logged and len(self._logged) < MOST_LOGGED:
            self._logged.add(about)
            self._logger.exception(self._event, extra={"about": about})
