"""Signals that come before anything can handle them.

The default of SIGHUP, SIGUSR1 and SIGUSR2 ends a process. Between the start of the program and its readiness that is
wrong for all three: a reload that comes early must happen late, and not end the gateway. So they are held back, by the
kernel, until there are handlers; one that came meanwhile is delivered then. SIGTERM and SIGINT are not: they may end a
process that does not serve yet.
"""

import signal
from typing import Final

HELD_BACK: Final = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})
"""The signals that wait for their handlers."""


def hold_back() -> None:
    """Let the signals of `HELD_BACK` wait; called before the process has any other thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)


def let_through() -> None:
    """Deliver them from now on, and what has come meanwhile; called in the main thread, once there are handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
