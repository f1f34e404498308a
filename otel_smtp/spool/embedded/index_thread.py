"""The one thread that uses the index."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from otel_smtp.spool.embedded.index import Index, index_error
from otel_smtp.spool.messages import SpoolError, StorageBroken

T = TypeVar("T")


class IndexThread:
    """Runs operations on the index one after the other, in the order of the calls.

    Args:
        latch: called with an error after which the disk cannot be trusted.

    Attributes:
        index: the index, once `begin` was called; use it only within the thread.
    """

    def __init__(self, latch: Callable[[StorageBroken], None]) -> None:
        self._latch = latch
        self._executor: ThreadPoolExecutor | None = None
        self.index: Index | None = None

    def start(self) -> None:
        """Start the thread."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="spool-index")

    async def close(self) -> None:
        """Close the index, if there is one, and end the thread. Idempotent."""
        if self._executor is None:
            return
        if self.index is not None:
            await self.run(Index.close)
        self._executor.shutdown(wait=True)
        self._executor = None

    async def run(self, work: Callable[[Index], T]) -> T:
        """Run an operation on the index.

        Raises:
            SpoolError: it failed, or the spool is closed.
        """
        index = self.index
        if index is None:
            raise SpoolError("the spool is closed")
        return await self.call(lambda: work(index))

    async def call(self, work: Callable[[], T]) -> T:
        """Run a function in the thread; errors as `run`."""
        if self._executor is None:
            raise SpoolError("the spool is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except sqlite3.Error as error:
            failure = index_error(error)
            self._tell(failure)
            raise failure from error
        except StorageBroken as error:
            self._tell(error)
            raise
        except RuntimeError as error:
            raise SpoolError("the spool is closed") from error

    def _tell(self, error: SpoolError) -> None:
        # Waiting mail is found by the index: if that is broken, no more mail must be accepted.
        if isinstance(error, StorageBroken):
            self._latch(error)
