"""Reading the settings again while the gateway runs: on SIGHUP, which `otel-smtp reload` sends.

Wrong settings, certificates or users files change nothing. The log reports what changed, what waits for a restart and
what was refused; the status port shows the same.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from otel_smtp.config import Change, Settings, SettingsError, change
from otel_smtp.gateway.gateway import WRONG_FILES

logger: Final = logging.getLogger("otel_smtp.gateway.reloading")

ReadSettings = Callable[[], Settings]
"""Reads the settings from their sources at start; raises SettingsError."""


@dataclass(frozen=True, slots=True)
class Reload:
    """The result of one reload.

    Attributes:
        at_unix_seconds: when.
        changed, needs_restart: see `Change`.
        problems: why nothing was changed; empty after a successful reload.
    """

    at_unix_seconds: float
    changed: Sequence[str] = ()
    needs_restart: Sequence[str] = ()
    problems: Sequence[str] = ()


class Reloading:
    """The settings of one process, and reading them again.

    Args:
        settings: as they were read at start.
        read: reads them again.
        apply: puts them in force; if it cannot, raises one of `WRONG_FILES`, with nothing changed.
        is_silent: another process of the gateway logs the same.
    """

    def __init__(
        self,
        settings: Settings,
        read: ReadSettings,
        apply: Callable[[Settings], None],
        *,
        is_silent: bool = False,
    ) -> None:
        self._settings = settings
        self._read = read
        self._apply = apply
        self._level = logging.DEBUG if is_silent else logging.INFO
        self._is_silent = is_silent
        self._count = 0
        self._last: Reload | None = None

    @property
    def settings(self) -> Settings:
        """The settings in force, as they were read."""
        return self._settings

    def again(self) -> Reload:
        """Read the settings, and apply them if nothing is wrong. Never raises."""
        problems: Sequence[str] = ()
        made: Change | None = None
        try:
            made = change(self._settings, self._read())
            self._apply(made.settings)
        except SettingsError as error:
            problems = [str(problem) for problem in error.problems]
        except WRONG_FILES as error:
            problems = [str(error)]
        except Exception as error:
            # Whatever it was, the gateway goes on unchanged.
            logger.exception("settings not reloaded: internal error")
            problems = [f"internal error: {type(error).__name__}"]
        self._count += 1
        if problems or made is None:
            self._last = Reload(time.time(), problems=problems)
            if not self._is_silent:
                logger.error("settings not reloaded, nothing was changed", extra={"problems": list(problems)})
            return self._last
        self._settings = made.settings
        self._last = Reload(time.time(), made.changed, made.needs_restart)
        for warning in made.settings.warnings:
            logger.log(self._level, "questionable setting", extra={"setting": warning})
        logger.log(self._level, "settings reloaded", extra={"changed": list(made.changed)})
        if made.needs_restart and not self._is_silent:
            logger.warning("settings need a restart", extra={"settings": list(made.needs_restart)})
        return self._last

    def told(self, signals: int) -> Mapping[str, Any]:
        """For the status port: the process that takes SIGHUP, and the result of the last reload.

        Args:
            signals: the id of the process to send SIGHUP to.
        """
        last = self._last
        return {
            "pid": signals,
            "pid_namespace": pid_namespace(),
            "reloads": self._count,
            "last_reload": None
            if last is None
            else {
                "at_unix_seconds": last.at_unix_seconds,
                "changed": list(last.changed),
                "needs_restart": list(last.needs_restart),
                "problems": list(last.problems),
            },
        }


def pid_namespace() -> str:
    """The namespace of this process's ids; "" if the system does not tell."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
