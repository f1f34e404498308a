"""An index that was set aside: searched, after reading the log, for messages whose records the log has lost."""

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
        is_current: it is whole, and belongs to this log, which has all ends since it was written.
        ids: of the messages that it knows.

    Raises:
        sqlite3.Error: it cannot be read.
    """

    def __init__(self, path: Path, markers: Mapping[int, bytes]) -> None:
        self._path = None  # only SQLite handles its files
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                raise sqlite3.DatabaseError(f"its version is {version}")
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
        # Without a log, or before there was one, the index is the only source.
        return not markers or segment == 0 or (segment in markers and meta["marker"] == markers[segment].hex())

    def tell(self, ids: Sequence[str], reason: str) -> list[NotFound]:
        """The facts of these messages, which only this index knows, and the reason."""
        wanted = set(ids)
        return [
            NotFound(message_id, sender, recipients.strip("\n").split("\n"), reason, is_queued=False)
            for message_id, sender, recipients in self._database.execute(
                "SELECT id, sender, recipients FROM message ORDER BY id"
            )
            if message_id in wanted
        ]
