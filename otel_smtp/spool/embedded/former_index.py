"""An index that was set aside: asked, when the log was read, for messages of which the log has no record any more."""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from otel_smtp.spool.embedded.index import VERSION, Index, NoIndex
from otel_smtp.spool.store import NotFound


class FormerIndex(Index):
    """An index in lost+found/, only read.

    Args:
        markers: of the log's segments, by number.

    Attributes:
        is_current: it is whole, and of this log, which says what has ended since it was written.
        ids: of the messages that it knows.

    Raises:
        sqlite3.Error: it cannot be read.
    """

    def __init__(self, path: Path, markers: Mapping[int, bytes]) -> None:
        self._path = None  # SQLite alone sees to its files
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                raise sqlite3.DatabaseError(f"it is of version {version}")
            self.ids = frozenset(self._ids("SELECT id FROM message", ()))
            self.is_current = self._belongs_to(markers)
        except BaseException:
            self._database.close()
            raise

    def _belongs_to(self, markers: Mapping[int, bytes]) -> bool:
        try:
            self.check(thoroughly=True)
        except NoIndex:
            return False
        meta = self.meta()
        segment = int(meta["segment"])
        # Where there is no log at all, or was none yet, it is all there is.
        return not markers or segment == 0 or (segment in markers and meta["marker"] == markers[segment].hex())

    def tell(self, ids: Sequence[str], reason: str) -> list[NotFound]:
        """What it knows of these messages, which for some reason nothing else knows."""
        wanted = set(ids)
        return [
            NotFound(message_id, sender, recipients.strip("\n").split("\n"), reason, is_queued=False)
            for message_id, sender, recipients in self._database.execute(
                "SELECT id, sender, recipients FROM message ORDER BY id"
            )
            if message_id in wanted
        ]
