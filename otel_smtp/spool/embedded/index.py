"""The index: waiting messages in an SQLite database that can be rebuilt from the log at any time.

It holds every message older than a moment; messages that come and go within that moment never touch it. So accepting
and delivering mail does not wait for it, and queries over many messages (due ones, lists, searches) need not read all
of them. It is written in the background, without its own sync: it records up to where in the log it is complete, and
the next start reads the log from there.

Not safe for several threads at once: all calls come from one.
"""

import contextlib
import gc
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from otel_smtp.spool.embedded.entries import Entry, Place
from otel_smtp.spool.embedded.files import open_regular, storage_error, sync_directory, write_zeros
from otel_smtp.spool.messages import OUTCOME_PREFIX, DeliveryState, Kind, SpoolError, StorageBroken, StorageFull

VERSION: Final = 1
BUSY_SECONDS: Final = 5.0  # how long to wait while another process has it locked
WAL_OCTETS: Final = 8 * 1024 * 1024  # twice its size when SQLite writes it back and starts over
_WAL_HEAD_OCTETS: Final = 32
_ROWS_AT_ONCE: Final = 200
_SENDERS_FOR_ONE: Final = 8  # senders tried to find one with due mail
_KNOWN_MOST: Final = 100  # rows of one sender that are read: the caller may know its first ones
_OUTCOME: Final = f"destination >= '{OUTCOME_PREFIX}' AND destination < '{OUTCOME_PREFIX[:-1]}!'"
_IS_OUTCOME: Final = f"EXISTS (SELECT 1 FROM delivery WHERE delivery.id = message.id AND {_OUTCOME})"  # noqa: S608

_TABLES: Final = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE message(id TEXT PRIMARY KEY, segment INT NOT NULL, at INT NOT NULL, octets INT NOT NULL,
    content_at INT NOT NULL, crc INT NOT NULL, arrived INT NOT NULL, expires INT, unwarned INT,
    sender TEXT NOT NULL, recipients TEXT NOT NULL, trace TEXT, entry TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE delivery(id TEXT, number INT, destination TEXT NOT NULL, state TEXT NOT NULL, tried INT NOT NULL,
    due INT NOT NULL, sender TEXT NOT NULL, PRIMARY KEY(id, number)) WITHOUT ROWID;
"""
_INDEXES: Final = """
CREATE INDEX message_segment ON message(segment, octets);
CREATE INDEX message_expires ON message(expires) WHERE expires IS NOT NULL;
CREATE INDEX message_unwarned ON message(unwarned) WHERE unwarned IS NOT NULL;
CREATE INDEX message_trace ON message(trace) WHERE trace IS NOT NULL;
CREATE INDEX delivery_due ON delivery(destination, tried, due) WHERE state = 'ready';
CREATE INDEX delivery_sender ON delivery(destination, tried, sender, due) WHERE state = 'ready';
CREATE INDEX delivery_other ON delivery(state) WHERE state != 'ready';
"""

_SENDER_INDEX: Final = next(line for line in _INDEXES.splitlines() if "delivery_sender" in line)


def index_error(error: sqlite3.Error) -> SpoolError:
    """The spool error for an error of the database."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StorageFull(f"the disk is full: {error}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return SpoolError(f"the index is busy: {error}")  # another process reads it; it will be free again
    return StorageBroken(f"the index failed: {error}")


class NoIndex(Exception):
    """There is no usable index; the text says why."""


class Index:
    """An index in a file, or in memory if the disk has no room for one.

    Args:
        path: None: in memory.

    Attributes:
        is_new: there was no index.
        messages: their number, known once it was checked, or if it is new.

    Raises:
        NoIndex: it is damaged, or not one of ours.
        SpoolError: it cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.is_new = path is None or not path.exists()
        self.messages = self._deliveries = 0
        if path is None:
            self._connect()
            return
        try:
            os.close(open_regular(path, os.O_RDWR | os.O_CREAT))
        except OSError as error:
            raise SpoolError(f"{path}: {error.strerror}") from error
        self._wal, self._reserve = path.with_name(f"{path.name}-wal"), path.with_name("index.reserve")
        if not self.is_new:
            self._lay_out()
        self._connect()
        if self.is_new:
            self.make_wal_again()

    def make_wal_again(self) -> None:
        """Replace SQLite's fresh write-ahead log by one with all its space allocated."""
        if self._path is None:
            return
        self._database.close()
        self._lay_out()
        self._connect()

    def _lay_out(self) -> None:
        """Give it a write-ahead log, if it has none, that was written in advance: it can be used on a full disk.

        One that begins with zeros is an empty one.
        """
        with contextlib.suppress(OSError):  # a full disk, or a foreign file: then there is none
            if self._wal.exists():
                return
            file = open_regular(self._reserve, os.O_RDWR | os.O_CREAT)
            try:
                if (octets := os.fstat(file).st_size) < WAL_OCTETS:
                    write_zeros(file, WAL_OCTETS)
                elif octets > WAL_OCTETS:
                    os.ftruncate(file, WAL_OCTETS)
                write_zeros(file, _WAL_HEAD_OCTETS)
            finally:
                os.close(file)
            self._reserve.rename(self._wal)

    def _connect(self) -> None:
        self._database = sqlite3.connect(
            self._path or ":memory:",
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._database.close()
            if isinstance(full := index_error(error), StorageFull):
                raise full from error
            raise NoIndex(str(error)) from error
        except BaseException:
            self._database.close()
            raise

    def _prepare(self) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        execute("PRAGMA cache_size = -16384")
        (version,) = execute("PRAGMA user_version").fetchone()
        if version == 0:
            (tables,) = execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if tables:
                raise NoIndex("it is none of ours")
            self.is_new = True
            self._database.executescript(f"BEGIN;{_TABLES}{_INDEXES}PRAGMA user_version = {VERSION};COMMIT;")
        elif version != VERSION:
            raise NoIndex(f"its version is {version}")
        else:
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk: queries are slower without it
                execute(_SENDER_INDEX.replace("INDEX", "INDEX IF NOT EXISTS"))  # an earlier release made none

    def check(self, *, thoroughly: bool) -> None:
        """See whether it is whole.

        Raises:
            NoIndex: it is not.
        """
        try:
            if thoroughly:
                (found,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise NoIndex(found)
            meta = self.meta()
            if "segment" not in meta:
                raise NoIndex("it is empty")
            (messages,) = self._database.execute("SELECT count(*) FROM message").fetchone()
            (deliveries,) = self._database.execute("SELECT count(*) FROM delivery").fetchone()
            if (messages, deliveries) != (meta["messages"], meta["deliveries"]):
                raise NoIndex(f"{messages} messages are in it, and it should have {meta['messages']}")
            self.messages, self._deliveries = messages, deliveries
        except sqlite3.DatabaseError as error:
            raise NoIndex(str(error)) from error

    def close(self) -> None:
        """Close it."""
        # SQLite removes the write-ahead log, and with it the space that the next start needs on a full disk.
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.link(self._wal, self._reserve)
        self._database.close()

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """For rebuilding from the log: SQL indexes are created at the end, all at once, and a crash costs only the work
        so far, so nothing is written twice or synced before the end.
        """
        self._database.execute("PRAGMA journal_mode = MEMORY")
        self._database.execute("PRAGMA synchronous = OFF")
        for line in _INDEXES.splitlines():
            if line.startswith("CREATE INDEX"):
                self._database.execute(f"DROP INDEX {line.split()[2]}")
        # Millions of values without one cycle: looking for cycles among them takes a sixth of the time.
        was_collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_collecting:
                gc.enable()
        # SQLite syncs the file itself: if we opened and closed it, the system would drop SQLite's locks on it.
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(f"BEGIN;{_INDEXES}COMMIT;")
        self.make_wal_again()

    # Its own state -----------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """`segment`, `at`: up to where in the log it is complete; `messages`, `deliveries`: how many it has; `seen_ms`:
        when that was; `is_clean`.
        """
        return dict(self._database.execute("SELECT name, value FROM meta").fetchall())

    # Writing ---------------------------------------------------------------------------------------------------

    def write(self, rows: Sequence[tuple[Any, ...]], gone: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Bring it up to date, all or nothing.

        Args:
            rows: made by `row_of` from new and changed messages.
            gone: messages that have ended.

        Raises:
            SpoolError: nothing was written.
        """
        execute = self._database.execute
        try:
            execute("BEGIN")
            messages, deliveries = self.messages + len(rows), self._deliveries + sum(len(row[1]) for row in rows)
            ids = [*gone, *(row[0][0] for row in rows)]
            for start in range(0, len(ids), _ROWS_AT_ONCE):
                part = ids[start : start + _ROWS_AT_ONCE]
                marks = ",".join("?" * len(part))
                messages -= execute(f"DELETE FROM message WHERE id IN ({marks})", part).rowcount  # noqa: S608 - marks
                deliveries -= execute(f"DELETE FROM delivery WHERE id IN ({marks})", part).rowcount  # noqa: S608
            self._database.executemany(
                "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [row[0] for row in rows]
            )
            self._database.executemany(
                "INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?)", [one for row in rows for one in row[1]]
            )
            self._database.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                list({**meta, "messages": messages, "deliveries": deliveries}.items()),
            )
            execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                if self._database.in_transaction:
                    execute("ROLLBACK")
            raise index_error(error) from error
        self.messages, self._deliveries = messages, deliveries

    def sync(self) -> None:
        """Make the writes durable, which SQLite itself does only when it moves its log into the database.

        Raises:
            StorageFull, StorageBroken: it is not.
        """
        if self._path is None:
            return
        try:
            # Only the log: SQLite's locks are on the database, and opening and closing that file would drop them.
            with contextlib.suppress(FileNotFoundError):  # on a full disk SQLite cannot make one, and writes nothing
                file = open_regular(self._wal, os.O_RDWR)
                try:
                    os.fdatasync(file)
                finally:
                    os.close(file)
            sync_directory(self._path.parent)
        except OSError as error:
            raise storage_error(error) from error

    def note_leased(self, leased: Sequence[tuple[str, int]]) -> None:
        """Do not offer these deliveries any more. The log has them as leased already; their rows are written later."""
        self._database.executemany("UPDATE delivery SET state = 'leased' WHERE id = ? AND number = ?", leased)

    # Reading ---------------------------------------------------------------------------------------------------

    def load(self, ids: Sequence[str]) -> list[Entry]:
        """The existing messages among these ids, in order of ids."""
        found: list[Entry] = []
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            part = ids[start : start + _ROWS_AT_ONCE]
            marks = ",".join("?" * len(part))
            found += self._entries(f"WHERE id IN ({marks}) ORDER BY id", part)
        return found

    def known(self, ids: Collection[str]) -> set[str]:
        """The existing ones among these ids."""
        found: set[str] = set()
        asked = list(ids)
        for start in range(0, len(asked), _ROWS_AT_ONCE):
            part = asked[start : start + _ROWS_AT_ONCE]
            marks = ",".join("?" * len(part))
            found.update(self._ids(f"SELECT id FROM message WHERE id IN ({marks})", part))  # noqa: S608 - marks
        return found

    def _entries(self, condition: str, values: Sequence[Any] = ()) -> list[Entry]:
        rows = self._database.execute(
            f"SELECT entry, segment, at, octets, content_at, crc FROM message {condition}",  # noqa: S608 - ours
            values,
        )
        entries = [_entry(*row) for row in rows]
        # A delivery's own row decides when it is due: a clock set back moves only the rows. It also decides whether it
        # is leased (`note_leased`).
        by_id = {entry.id: entry for entry in entries}
        for start in range(0, len(entries), _ROWS_AT_ONCE):
            part = [entry.id for entry in entries[start : start + _ROWS_AT_ONCE]]
            marks = ",".join("?" * len(part))
            for message_id, number, due, state in self._database.execute(
                f"SELECT id, number, due, state FROM delivery WHERE id IN ({marks})",  # noqa: S608
                part,
            ):
                if (delivery := by_id[message_id].delivery(number)) is not None:
                    delivery.due_ms = due
                    if state == DeliveryState.LEASED:
                        delivery.state = DeliveryState.LEASED
        return entries

    def move(self, due_ms: int, instants_ms: int, meta: Mapping[str, Any]) -> int:
        """Do to all messages what `Entry.move` does to one; returns their number."""
        execute = self._database.execute
        try:
            execute("BEGIN")
            if due_ms:
                execute("UPDATE delivery SET due = due + ? WHERE state IN ('ready', 'corrupt')", (due_ms,))
            # Places of the instants in `Entry.encode`.
            instants = ", ".join(f"'$[{place}]', json_extract(entry, '$[{place}]') + :by" for place in (2, 3, 4))
            moved = execute(
                "UPDATE message SET arrived = arrived + :by, expires = expires + :by, unwarned = unwarned + :by,"  # noqa: S608
                f" entry = json_set(entry, {instants})",
                {"by": instants_ms},
            )
            self._database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(meta.items()))
            execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise index_error(error) from error
        return moved.rowcount

    def due(
        self, destination: str, now_ms: int, most: int, *, was_tried: bool, is_known: Callable[[str], bool]
    ) -> list[tuple[int, str, int, str]]:
        """The first due, unexpired deliveries: due time, message, number, sender.

        Args:
            is_known: whether to skip a message, by its id, because the caller has newer facts than its row. While
                nothing can be written, such rows may be the first thousands.
        """
        found: list[tuple[int, str, int, str]] = []
        # CROSS JOIN makes SQLite begin with the left table.
        rows = self._database.execute(
            "SELECT due, id, number, delivery.sender FROM delivery CROSS JOIN message USING (id)"
            " WHERE state = 'ready' AND destination = ? AND tried = ? AND due <= ?"
            " AND (expires IS NULL OR expires > ?) ORDER BY due, id",
            (destination, int(was_tried), now_ms, now_ms),
        )
        with contextlib.closing(rows):
            for row in rows:
                if not is_known(row[1]):
                    found.append(row)
                    if len(found) == most:
                        break
        return found

    def due_of_senders(
        self,
        destination: str,
        now_ms: int,
        most: int,
        *,
        was_tried: bool,
        after: str | None,
        is_known: Callable[[str], bool],
    ) -> tuple[list[tuple[int, str, int, str]], str | None]:
        """The first due delivery of each of the next senders, in the order of their names.

        Args:
            after: continue with the sender that follows; None: start with the first.
            is_known: see `due`.

        Returns:
            The deliveries, and the last sender tried; None: there are no more senders.
        """
        found: list[tuple[int, str, int, str]] = []
        which = (destination, int(was_tried))
        for _ in range(_SENDERS_FOR_ONE * most):
            # One comparison, so that SQLite jumps to the place in its index.
            row = self._database.execute(
                "SELECT sender FROM delivery WHERE state = 'ready' AND destination = ? AND tried = ?"  # noqa: S608 - ours
                f" AND sender {'>=' if after is None else '>'} ? ORDER BY sender LIMIT 1",
                (*which, after or ""),
            ).fetchone()
            after = None if row is None else row[0]
            if after is None:
                break
            rows = self._database.execute(
                "SELECT due, id, number, delivery.sender FROM delivery CROSS JOIN message USING (id)"
                " WHERE state = 'ready' AND destination = ? AND tried = ? AND delivery.sender = ? AND due <= ?"
                " AND (expires IS NULL OR expires > ?) ORDER BY due, id LIMIT ?",
                (*which, after, now_ms, now_ms, _KNOWN_MOST),
            )
            with contextlib.closing(rows):
                if (first := next((one for one in rows if not is_known(one[1])), None)) is not None:
                    found.append(first)
            if len(found) == most:
                break
        return found, after

    def next_due(self, destination: str, now_ms: int) -> int | None:
        """When the next unexpired delivery is due."""
        times = [
            due
            for tried in (0, 1)
            for (due,) in self._database.execute(
                "SELECT due FROM delivery CROSS JOIN message USING (id)"
                " WHERE state = 'ready' AND destination = ? AND tried = ? AND (expires IS NULL OR expires > ?)"
                " ORDER BY due LIMIT 1",
                (destination, tried, now_ms),
            )
        ]
        return min(times, default=None)

    def overdue(self, now_ms: int, most: int, *, outcomes: bool) -> list[str]:
        """Expired waiting messages, including held ones that age; or outcomes."""
        return self._ids(
            "SELECT DISTINCT message.id FROM message CROSS JOIN delivery ON delivery.id = message.id"  # noqa: S608 - ours
            f" WHERE expires <= ? AND state IN ('ready', 'held') AND ({_OUTCOME}) = ? LIMIT ?",
            (now_ms, int(outcomes), most),
        )

    def unwarned(self, before_ms: int, most: int) -> list[str]:
        """Attempted messages that arrived before, and whose sender must be warned."""
        return self._ids("SELECT id FROM message WHERE unwarned <= ? ORDER BY unwarned LIMIT ?", (before_ms, most))

    def recipients(self) -> dict[Kind, int]:
        """How many recipients wait, by the kind of their messages."""
        rows = self._database.execute(
            "SELECT json_extract(entry, '$[1]'),"  # a place in `Entry.encode`
            " sum(length(recipients) - length(replace(recipients, char(10), '')) - 1) FROM message GROUP BY 1"
        )
        return {Kind(kind): recipients for kind, recipients in rows}

    def leased(self) -> list[str]:
        """Messages that are being attempted."""
        return self._ids("SELECT DISTINCT id FROM delivery WHERE state = 'leased'", ())

    def in_segment(self, segment: int, most: int) -> list[str]:
        """The messages in a segment."""
        return self._ids("SELECT id FROM message WHERE segment = ? LIMIT ?", (segment, most))

    def segments(self) -> dict[int, tuple[int, int]]:
        """The number of messages in each segment, and the octets of their records."""
        return {
            segment: (messages, octets)
            for segment, messages, octets in self._database.execute(
                "SELECT segment, count(*), sum(octets) FROM message GROUP BY segment"
            )
        }

    def destinations(self) -> dict[str, int]:
        """The number of deliveries for each destination."""
        return dict(
            self._database.execute("SELECT destination, count(*) FROM delivery GROUP BY destination").fetchall()
        )

    def outcomes(self) -> tuple[dict[str, int], int, int]:
        """Waiting or leased outcomes per destination; the number of all outcomes, including held ones, and the octets
        of their records.
        """
        by_destination = self._database.execute(
            f"SELECT destination, count(*) FROM delivery WHERE {_OUTCOME}"  # noqa: S608 - ours
            " AND state IN ('ready', 'leased') GROUP BY destination"
        )
        messages, octets = self._database.execute(
            "SELECT count(*), coalesce(sum(message.octets), 0)"  # noqa: S608 - ours
            f" FROM delivery CROSS JOIN message USING (id) WHERE {_OUTCOME}"
        ).fetchone()
        return dict(by_destination.fetchall()), messages, octets

    def oldest(self, destination: str) -> int | None:
        """The arrival of the oldest waiting message of a destination; the ids begin with the time."""
        row = self._database.execute(
            "SELECT arrived FROM message WHERE id ="
            " (SELECT min(id) FROM delivery WHERE state = 'ready' AND destination = ?)",
            (destination,),
        ).fetchone()
        return None if row is None else int(row[0])

    def larges(self) -> Iterator[str]:
        """Messages whose content has its own file."""
        for (message_id,) in self._database.execute("SELECT id FROM message WHERE content_at < 0"):
            yield message_id

    def large_octets(self) -> dict[str, int]:
        """The octets of contents with their own files, by message."""
        rows = self._database.execute(
            "SELECT id, json_extract(entry, '$[8]') FROM message WHERE content_at < 0"  # a place in `Entry.encode`
        )
        return dict(rows.fetchall())

    def corrupt(self) -> list[str]:
        """Messages whose content is damaged or lost."""
        return self._ids("SELECT DISTINCT id FROM delivery WHERE state = 'corrupt' ORDER BY id", ())

    def _ids(self, statement: str, values: Sequence[Any]) -> list[str]:
        return [message_id for (message_id,) in self._database.execute(statement, values)]

    # For operators ----------------------------------------------------------------------------------------

    def counts(self, now_ms: int) -> dict[str, Any]:
        """Deliveries of mail by state, `deferred` of the ready ones; `oldest` and `next_due`, in milliseconds."""
        execute = self._database.execute
        found: dict[str, Any] = dict(
            execute(
                f"SELECT state, count(*) FROM delivery WHERE state != 'ready' AND NOT ({_OUTCOME})"  # noqa: S608 - ours
                " GROUP BY state"
            ).fetchall()
        )
        (found["ready"],) = execute(
            f"SELECT count(*) FROM delivery WHERE state = 'ready' AND due <= ? AND NOT ({_OUTCOME})",  # noqa: S608
            (now_ms,),
        ).fetchone()
        found["deferred"], found["next_due"] = execute(
            f"SELECT count(*), min(due) FROM delivery WHERE state = 'ready' AND due > ? AND NOT ({_OUTCOME})",  # noqa: S608
            (now_ms,),
        ).fetchone()
        # The ids begin with the time.
        first = execute(f"SELECT arrived FROM message WHERE NOT {_IS_OUTCOME} ORDER BY id LIMIT 1").fetchone()  # noqa: S608
        found["oldest"] = first[0] if first is not None else None
        return found

    def page(self, after: str, most: int, *, outcomes: bool) -> list[Entry]:
        """The mail, or the outcomes, whose ids follow `after`."""
        chosen = _IS_OUTCOME if outcomes else f"NOT {_IS_OUTCOME}"
        return self._entries(f"WHERE id > ? AND {chosen} ORDER BY id LIMIT ?", (after, most))

    def find(self, trace_id: str | None, sender: str | None, recipient: str | None, most: int) -> list[Entry]:
        """The first mail that matches all given conditions."""
        wanted = [
            (condition, value)
            for condition, value in (
                ("trace = ?", trace_id),
                ("sender = ?", sender),
                ("instr(recipients, ?)", None if recipient is None else f"\n{recipient}\n"),
            )
            if value is not None
        ]
        where = " AND ".join([*(condition for condition, _ in wanted), f"NOT {_IS_OUTCOME}"])
        return self._entries(f"WHERE {where} ORDER BY id LIMIT ?", [*(value for _, value in wanted), most])


def row_of(entry: Entry, text: str | None = None) -> tuple[Any, ...]:
    """The row of a message for `Index.write`.

    Args:
        text: the result of `Entry.encode`, if known.
    """
    place = entry.place
    assert place is not None
    sender = entry.mail.reverse_path
    is_waiting = is_attempted = False
    addresses: list[str] = []
    for one in entry.deliveries:
        if one.state is DeliveryState.READY:
            is_waiting = True
            is_attempted |= one.attempts > 0
        elif one.state is DeliveryState.HELD:
            is_waiting = True
        addresses += [there.recipient.address for there in one.recipients]
    is_unwarned = is_attempted and not entry.is_warned and entry.kind is Kind.MAIL
    return (
        (
            entry.id, place.segment, place.at, place.octets, place.content_at, place.crc, entry.arrived_ms,
            entry.expires_ms if is_waiting and entry.held_ms is None else None,
            entry.arrived_ms if is_unwarned else None,
            sender, "\n".join(["", *addresses, ""]), entry.trace_id,
            entry.encode() if text is None else text,
        ),
        [
            (
                entry.id, one.number, one.destination, one.state.value, int(one.attempts > 0), one.due_ms, sender,
            )
            for one in entry.deliveries
        ],
    )  # fmt: skip


def _entry(text: str, segment: int, at: int, octets: int, content_at: int, crc: int) -> Entry:
    entry = Entry.from_values(json.loads(text))
    entry.place = Place(segment, at, octets, content_at, crc)
    entry.is_indexed = True
    return entry
