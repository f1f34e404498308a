"""The index of the spool: which message waits for what, in one SQLite database.

One connection, in one thread, for the whole life of the spool: two connections that checkpoint at once have corrupted
databases of versions that are still in use. WAL with synchronous=FULL, since only FULL syncs the log at each commit.

Times are milliseconds since the epoch. The columns of the lease (owner, until, epoch) are those that a database shared
by several gateways needs; here the lock of the directory says already that there is one owner.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.spool.embedded.files import Placement
from otel_smtp.spool.messages import (
    ContentRef,
    Counts,
    DeliveryState,
    Kind,
    Lease,
    NewMessage,
    NoSuchMessage,
    Shown,
    SpooledRecipient,
    SpoolError,
    StaleLease,
    StorageBroken,
    Verdict,
)

SCHEMA_VERSION: Final = 1

# Few indexes: each costs a page of the log in every commit. What looks at everything does so once a minute at most.
_SCHEMA: Final = """
CREATE TABLE msg(
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, arrived_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
  warned INTEGER NOT NULL DEFAULT 0, held_at INTEGER, forced INTEGER NOT NULL DEFAULT 0,
  reverse_path TEXT NOT NULL, parameters TEXT NOT NULL, carrier TEXT NOT NULL,
  file TEXT NOT NULL, offset INTEGER NOT NULL, octets INTEGER NOT NULL, header_octets INTEGER NOT NULL,
  digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE dlv(
  msg_id TEXT NOT NULL REFERENCES msg(id) ON DELETE CASCADE, d INTEGER NOT NULL, dest TEXT NOT NULL,
  state TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0, next_at INTEGER NOT NULL,
  lease_owner TEXT, lease_until INTEGER, lease_epoch INTEGER NOT NULL DEFAULT 0,
  possible_duplicate INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(msg_id, d)) WITHOUT ROWID;
CREATE INDEX dlv_due ON dlv(dest, attempts > 0, next_at) WHERE state = 'ready';
CREATE TABLE rcpt(
  msg_id TEXT NOT NULL, d INTEGER NOT NULL, n INTEGER NOT NULL, addr TEXT NOT NULL, notify INTEGER, orcpt TEXT,
  last TEXT NOT NULL DEFAULT '', PRIMARY KEY(msg_id, d, n),
  FOREIGN KEY(msg_id, d) REFERENCES dlv(msg_id, d) ON DELETE CASCADE) WITHOUT ROWID;
CREATE TABLE tally(name TEXT PRIMARY KEY, recipients INTEGER NOT NULL) WITHOUT ROWID;
"""
_ROWS_AT_ONCE: Final = 32  # of a statement: its texts are kept prepared, one for each number of rows
_INSERT_MESSAGES: Final = (
    "INSERT INTO msg(id, kind, arrived_at, expires_at, warned, reverse_path, parameters, carrier, file, offset, octets,"
    " header_octets, digest) VALUES {}"
)
_INSERT_DELIVERIES: Final = (
    "INSERT INTO dlv(msg_id, d, dest, state, attempts, next_at, lease_owner, lease_epoch, possible_duplicate) VALUES {}"
)
_INSERT_RECIPIENTS: Final = "INSERT INTO rcpt(msg_id, d, n, addr, notify, orcpt, last) VALUES {}"
_ADD_TO_TALLY: Final = (
    "INSERT INTO tally VALUES {} ON CONFLICT DO UPDATE SET recipients = recipients + excluded.recipients"
)
_LEASE_COLUMNS: Final = (
    "d, dlv.lease_epoch, msg.id, kind, reverse_path, parameters, dest, attempts, arrived_at, expires_at, carrier, "
    "file, offset, octets, digest, header_octets, possible_duplicate"
)

_Row = tuple[str, int]  # a delivery: the message's id, and which of its deliveries


class Index:
    """The database, opened; to be used by the thread that opened it. Nothing is committed but by `commit`.

    Attributes:
        messages: how many there are.
    """

    def __init__(self, path: Path) -> None:
        """Open it, or make it.

        Raises:
            SpoolError: it was made by a newer version.
            sqlite3.Error: it cannot be opened.
        """
        database = self._connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            database.close()
            raise SpoolError(f"{path}: made by a newer version (schema {version}; this one knows {SCHEMA_VERSION})")
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        # Rows of new messages, written together: each statement is a moment in which the event loop takes the
        # interpreter, and this thread waits to have it back.
        self._new: dict[str, list[tuple[Any, ...]]] = {
            _INSERT_MESSAGES: [],
            _INSERT_DELIVERIES: [],
            _INSERT_RECIPIENTS: [],
        }
        self._has_new = False
        self._ended: Counter[str] = Counter()
        # How many messages lie in each file; an index for it would cost a page of the log in each commit.
        self._uses = Counter(dict(database.execute("SELECT file, count(*) FROM msg GROUP BY file").fetchall()))
        self._uses_changed: Counter[str] = Counter()
        self.messages = self._uses.total()

    @property
    def _database(self) -> sqlite3.Connection:
        """The database, with all that was added."""
        if self._has_new:
            self._write_new()
        return self._connection

    def _write_new(self) -> None:
        self._has_new = False
        for statement, rows in self._new.items():  # messages before their deliveries, and those before recipients
            self._execute_for_all(statement, rows)
            rows.clear()

    def _execute_for_all(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Execute `INSERT ... VALUES {}` for many rows at once."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            row = f"({', '.join('?' * len(part[0]))})"
            self._connection.execute(
                statement.format(", ".join([row] * len(part))), [value for values in part for value in values]
            )

    def close(self) -> None:
        """Close it; what the log holds goes into the database."""
        self._connection.close()

    def check(self) -> None:
        """Read all of it.

        Raises:
            StorageBroken: it is damaged.
        """
        (found,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise StorageBroken(f"the index is damaged: {found}")

    # Transactions -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a group of changes."""
        self._forget()
        self._connection.execute("BEGIN IMMEDIATE")

    def _forget(self) -> None:
        self._ended.clear()
        self._uses_changed.clear()
        self._has_new = False
        for rows in self._new.values():
            rows.clear()

    def commit(self) -> Sequence[str]:
        """Make the changes durable, and give the files that lost their last message."""
        database = self._database
        self._execute_for_all(_ADD_TO_TALLY, list(self._ended.items()))
        database.execute("COMMIT")
        emptied: list[str] = []
        for file, change in self._uses_changed.items():
            self.messages += change
            self._uses[file] += change
            if not self._uses[file]:
                del self._uses[file]
                emptied.append(file)
        return emptied

    def roll_back(self) -> None:
        """Forget the changes since `begin`."""
        self._forget()
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    # Messages in and out ----------------------------------------------------------------------------------

    def insert(self, message: NewMessage, placement: Placement, *, now: float, owner: str | None) -> Sequence[Lease]:
        """Add a message.

        Args:
            owner: who attempts its deliveries at once; None: they wait until somebody asks for them.

        Returns:
            The deliveries, where there is an owner.
        """
        mail, arrived_at, expires_at = message.mail, _ms(now), _ms(now + message.expires_in)
        due_at = _ms(now + message.retry_in)
        self._has_new = True
        self._new[_INSERT_MESSAGES].append(
            (
                message.id, message.kind.value, arrived_at, expires_at, int(not mail.reverse_path), mail.reverse_path,
                _parameters(mail), json.dumps(dict(message.carrier)), placement.file, placement.offset,
                placement.octets, message.header_octets, placement.digest,
            )
        )  # fmt: skip
        self._uses_changed[placement.file] += 1
        leases: list[Lease] = []
        is_leased = owner is not None
        state = DeliveryState.LEASED if is_leased else DeliveryState.READY
        for row, (destination, recipients) in enumerate(message.deliveries.items()):
            self._new[_INSERT_DELIVERIES].append(
                (
                    message.id, row, destination, state.value, message.attempts + int(is_leased), due_at, owner, int(is_leased),
                    int(message.is_possible_duplicate),
                )
            )  # fmt: skip
            self._new[_INSERT_RECIPIENTS].extend(
                (
                    message.id,
                    row,
                    n,
                    one.address,
                    one.notify.value if one.notify is not None else None,
                    one.orcpt,
                    message.last_replies.get(one.address, ""),
                )  # fmt: skip
                for n, one in enumerate(recipients)
            )
            self._ended["accepted" if message.kind is Kind.MAIL else "notified"] += len(recipients)
            if is_leased:
                leases.append(
                    Lease(
                        row, 1, message.id, message.kind, mail, destination,
                        [SpooledRecipient(n, one) for n, one in enumerate(recipients)],
                        1, now, now + message.expires_in, message.carrier, ContentRef(placement.octets, placement),
                        message.header_octets, message.is_possible_duplicate,
                    )
                )  # fmt: skip
        return leases

    def due(self, now: float, wanted: Mapping[str, int], owner: str, until: float) -> Sequence[Lease]:
        """Lease what is due, and count the attempt.

        New messages and those tried before take turns, so that a backlog never starves new mail. Among those, the ones
        due first, one of each sender after the other within a sample, so that one sender's thousands do not hold up
        all others.

        Args:
            wanted: how many at most, by destination.
        """
        leases: list[Lease] = []
        for destination, most in wanted.items():
            again, new = (self._sample(destination, now, most, was_tried=tried) for tried in (True, False))
            chosen = [row for pair in _interleave(new, again) for row in pair][:most]
            for row in chosen:
                self._database.execute(
                    "UPDATE dlv SET state = 'leased', attempts = attempts + 1, lease_owner = ?, lease_until = ?,"
                    " lease_epoch = lease_epoch + 1 WHERE msg_id = ? AND d = ?",
                    (owner, _ms(until), *row),
                )
                leases.append(self._lease(*row))
        return leases

    def _sample(self, destination: str, now: float, most: int, *, was_tried: bool) -> Sequence[_Row]:
        rows = self._database.execute(
            "SELECT msg_id, d, reverse_path FROM dlv JOIN msg ON msg.id = msg_id WHERE state = 'ready' AND dest = ?"
            " AND (attempts > 0) = ? AND next_at <= ? AND expires_at > ? ORDER BY next_at LIMIT ?",
            (destination, int(was_tried), _ms(now), _ms(now), 8 * most),
        ).fetchall()
        turns: dict[str, int] = {}
        ordered: list[tuple[int, _Row]] = []
        for message_id, delivery, reverse_path in rows:
            turn = turns[reverse_path] = turns.get(reverse_path, 0) + 1
            ordered.append((turn, (message_id, delivery)))
        ordered.sort(key=lambda entry: entry[0])
        return [row for _, row in ordered[:most]]

    def next_due(self, destinations: Iterable[str]) -> float | None:
        """When the next delivery to one of `destinations` is due; None: none waits."""
        times = [
            at
            for destination in destinations
            for tried in (0, 1)
            for (at,) in self._database.execute(
                "SELECT next_at FROM dlv WHERE state = 'ready' AND dest = ? AND (attempts > 0) = ?"
                " ORDER BY next_at LIMIT 1",
                (destination, tried),
            )
        ]
        return min(times) / 1000 if times else None

    def destinations(self) -> Sequence[str]:
        """All destinations that anything waits for."""
        return [dest for (dest,) in self._database.execute("SELECT DISTINCT dest FROM dlv")]

    def overdue(self, now: float, most: int, owner: str) -> Sequence[Lease]:
        """Lease what is too old, without counting an attempt: to be ended."""
        # CROSS JOIN is SQLite's way to say which table leads: few messages are too old, and all have deliveries.
        rows = self._database.execute(
            "SELECT msg_id, d FROM msg CROSS JOIN dlv ON msg_id = msg.id WHERE expires_at <= ? AND held_at IS NULL"
            " AND state = 'ready' LIMIT ?",
            (_ms(now), most),
        ).fetchall()
        for row in rows:
            self._database.execute(
                "UPDATE dlv SET state = 'leased', lease_owner = ?, lease_epoch = lease_epoch + 1"
                " WHERE msg_id = ? AND d = ?",
                (owner, *row),
            )
        return [self._lease(*row) for row in rows]

    def unwarned(self, arrived_before: float, most: int) -> Sequence[Lease]:
        """Deliveries whose sender is due a warning; not leased, only shown."""
        rows = self._database.execute(
            "SELECT msg_id, d FROM msg CROSS JOIN dlv ON msg_id = msg.id WHERE warned = 0 AND arrived_at <= ?"
            " AND state = 'ready' AND attempts > 0 AND kind = 'mail' LIMIT ?",
            (_ms(arrived_before), most),
        ).fetchall()
        return [self._lease(*row) for row in rows]

    def warned(self, message_id: str) -> bool:
        """Note that the sender was warned; False where that was noted before, or the message is gone."""
        found = self._database.execute("UPDATE msg SET warned = 1 WHERE id = ? AND warned = 0", (message_id,))
        return found.rowcount == 1

    def finish(
        self,
        lease: Lease,
        verdicts: Sequence[Verdict],
        *,
        next_at: float,
        is_possible_duplicate: bool = False,
        counts_attempt: bool = True,
        hold: bool = False,
    ) -> None:
        """Note what an attempt came to.

        Args:
            next_at: when what has not ended is due again.
            is_possible_duplicate: an upstream may have taken it without our knowing.
            counts_attempt: False: nobody was asked; it was no attempt.
            hold: what has not ended waits for an operator.

        Raises:
            StaleLease: the lease is not its delivery's last one.
        """
        ended = [verdict for verdict in verdicts if verdict.end is not None]
        is_over = len(ended) == len(lease.recipients)
        if not (is_over and self._drop_message_of_one_delivery(lease)):
            self._own(lease)
            if is_over:
                self._drop_delivery(lease.message_id, lease.delivery)
        for verdict in ended:
            assert verdict.end is not None
            name = verdict.end.value if lease.kind is Kind.MAIL else f"notified_{verdict.end.value}"
            self._ended[name] += 1
        if is_over:
            return
        self._database.executemany(
            "DELETE FROM rcpt WHERE msg_id = ? AND d = ? AND n = ?",
            [(lease.message_id, lease.delivery, verdict.number) for verdict in ended],
        )
        self._database.executemany(
            "UPDATE rcpt SET last = ? WHERE msg_id = ? AND d = ? AND n = ?",
            [
                (str(verdict.reply), lease.message_id, lease.delivery, verdict.number)
                for verdict in verdicts
                if verdict.end is None and verdict.reply is not None
            ],
        )
        self._database.execute(
            "UPDATE dlv SET state = ?, next_at = ?, crashes = 0, attempts = attempts - ?, lease_owner = NULL,"
            " possible_duplicate = max(possible_duplicate, ?) WHERE msg_id = ? AND d = ?",
            (
                (DeliveryState.HELD if hold else DeliveryState.READY).value, _ms(next_at), int(not counts_attempt),
                int(is_possible_duplicate), lease.message_id, lease.delivery,
            ),
        )  # fmt: skip
        if hold:
            self._database.execute(
                "UPDATE msg SET held_at = ? WHERE id = ? AND held_at IS NULL", (_ms(next_at), lease.message_id)
            )

    def mark_corrupt(self, lease: Lease) -> None:
        """Its content is damaged: it waits for an operator, and counts as nothing else."""
        self._own(lease)
        self._database.execute(
            "UPDATE dlv SET state = 'corrupt', lease_owner = NULL WHERE msg_id = ? AND d = ?",
            (lease.message_id, lease.delivery),
        )

    def _own(self, lease: Lease) -> None:
        found = self._database.execute(
            "SELECT state, lease_epoch FROM dlv WHERE msg_id = ? AND d = ?", (lease.message_id, lease.delivery)
        ).fetchone()
        if found != (DeliveryState.LEASED.value, lease.epoch):
            raise StaleLease(f"delivery {lease.delivery} of {lease.message_id} is not ours any more")

    def _drop_message_of_one_delivery(self, lease: Lease) -> bool:
        """What becomes of nearly every message, in one statement; False where it has other deliveries, or is lost."""
        found = self._database.execute(
            "DELETE FROM msg WHERE id = ?1 AND (SELECT count(*) = 1 AND max(d = ?2 AND state = 'leased' AND"
            " lease_epoch = ?3) FROM dlv WHERE msg_id = ?1)",
            (lease.message_id, lease.delivery, lease.epoch),
        )
        if not found.rowcount:
            return False
        assert isinstance(lease.content.key, Placement)
        self._uses_changed[lease.content.key.file] -= 1
        return True

    def _drop_delivery(self, message_id: str, delivery: int) -> None:
        execute = self._database.execute
        execute("DELETE FROM dlv WHERE msg_id = ? AND d = ?", (message_id, delivery))
        if execute("SELECT 1 FROM dlv WHERE msg_id = ? LIMIT 1", (message_id,)).fetchone() is None:
            (file,) = execute("DELETE FROM msg WHERE id = ? RETURNING file", (message_id,)).fetchone()
            self._uses_changed[file] -= 1

    def _lease(self, message_id: str, delivery: int) -> Lease:
        row = self._database.execute(
            f"SELECT {_LEASE_COLUMNS} FROM dlv JOIN msg ON msg.id = msg_id WHERE msg_id = ? AND d = ?",  # noqa: S608
            (message_id, delivery),
        ).fetchone()
        (
            number, epoch, message_id, kind, reverse_path, parameters, destination, attempts, arrived_at, expires_at,
            carrier, file, offset, octets, digest, header_octets, possible_duplicate,
        ) = row  # fmt: skip
        recipients = [
            SpooledRecipient(n, Recipient(addr, Notify(notify) if notify is not None else None, orcpt), last)
            for n, addr, notify, orcpt, last in self._database.execute(
                "SELECT n, addr, notify, orcpt, last FROM rcpt WHERE msg_id = ? AND d = ? ORDER BY n",
                (message_id, delivery),
            )
        ]
        return Lease(
            number, epoch, message_id, Kind(kind), _mail(reverse_path, parameters), destination, recipients, attempts,
            arrived_at / 1000, expires_at / 1000, json.loads(carrier),
            ContentRef(octets, Placement(file, offset, octets, digest)),
            header_octets, bool(possible_duplicate),
        )  # fmt: skip

    # At start and at stop ---------------------------------------------------------------------------------

    def take_back_leases(self, *, crashes_allowed: int | None, now: float) -> tuple[int, Sequence[str]]:
        """Take back what is leased, since nobody can be attempting it.

        Args:
            crashes_allowed: the process that had them died in the midst: that many times a message may be part of a
                crash before it is held, since it may be the cause. None: they were given back in good order.

        Returns:
            How many there were, and the messages that are held now.
        """
        if crashes_allowed is None:
            # Whoever was cut short has recorded it; what is left came to an end that nobody could record.
            found = self._database.execute(
                "UPDATE dlv SET state = 'ready', next_at = min(next_at, ?), attempts = attempts - 1,"
                " lease_owner = NULL, possible_duplicate = 1 WHERE state = 'leased'",
                (_ms(now),),
            )
            return found.rowcount, ()
        found = self._database.execute(
            "UPDATE dlv SET state = 'ready', next_at = ?, crashes = crashes + 1, lease_owner = NULL,"
            " possible_duplicate = 1 WHERE state = 'leased'",
            (_ms(now),),
        )
        held = [
            message_id
            for (message_id,) in self._database.execute(
                "UPDATE dlv SET state = 'held' WHERE state = 'ready' AND crashes >= ? RETURNING msg_id",
                (crashes_allowed,),
            ).fetchall()
        ]
        for message_id in held:
            self._database.execute("UPDATE msg SET held_at = ? WHERE id = ?", (_ms(now), message_id))
        return found.rowcount, held

    def files(self) -> set[str]:
        """The files that messages need."""
        return {file for (file,) in self._database.execute("SELECT DISTINCT file FROM msg")}

    def without_file(self, files: Iterable[str]) -> Sequence[str]:
        """Mark the messages in `files`, which are not there, as corrupt; their ids."""
        lost: list[str] = []
        for file in files:
            for (message_id,) in self._database.execute("SELECT id FROM msg WHERE file = ?", (file,)).fetchall():
                self._database.execute("UPDATE dlv SET state = 'corrupt' WHERE msg_id = ?", (message_id,))
                lost.append(message_id)
        return lost

    def move(self, seconds: float) -> int:
        """Let what waits be due sooner, as it would have been had the clock not been set back; how many there are.

        Args:
            seconds: by which it was set, below 0.
        """
        return self._database.execute(
            "UPDATE dlv SET next_at = next_at + ? WHERE state = 'ready'", (_ms(seconds),)
        ).rowcount

    # What operators see and do ----------------------------------------------------------------------------

    def counts(self, now: float) -> Counts:
        """How much there is of what."""
        states = dict(self._database.execute("SELECT state, count(*) FROM dlv GROUP BY state").fetchall())
        deferred, next_due_at = self._database.execute(
            "SELECT count(*), min(next_at) FROM dlv WHERE state = 'ready' AND next_at > ?", (_ms(now),)
        ).fetchone()
        # The ids begin with the time.
        first = self._database.execute("SELECT arrived_at FROM msg ORDER BY id LIMIT 1").fetchone()
        return Counts(
            ready=states.get("ready", 0) - deferred,
            deferred=deferred,
            active=states.get("leased", 0),
            held=states.get("held", 0),
            corrupt=states.get("corrupt", 0),
            oldest_arrived_at=first[0] / 1000 if first is not None else None,
            next_due_at=next_due_at / 1000 if next_due_at is not None else None,
        )

    def tally(self) -> Mapping[str, int]:
        """Recipients that were ever accepted, and how many of them ended in which way."""
        return dict(self._database.execute("SELECT name, recipients FROM tally").fetchall())

    def page(self, after: str, most: int) -> Sequence[Shown]:
        """At most `most` messages whose ids follow `after`, in the order of their ids, which is that of arrival."""
        ids = self._database.execute("SELECT id FROM msg WHERE id > ? ORDER BY id LIMIT ?", (after, most)).fetchall()
        return [self.show(message_id) for (message_id,) in ids]

    def find(self, trace_id: str | None, sender: str | None, recipient: str | None, most: int) -> Sequence[Shown]:
        """The first messages that fit all that is given."""
        ids = self._database.execute(
            "SELECT id FROM msg WHERE (?1 IS NULL OR instr(carrier, ?1)) AND (?2 IS NULL OR reverse_path = ?2)"
            " AND (?3 IS NULL OR id IN (SELECT msg_id FROM rcpt WHERE addr = ?3)) ORDER BY id LIMIT ?4",
            (trace_id, sender, recipient, most),
        ).fetchall()
        return [self.show(message_id) for (message_id,) in ids]

    def show(self, message_id: str) -> Shown:
        """One message.

        Raises:
            NoSuchMessage: there is none of that id.
        """
        row = self._database.execute(
            "SELECT kind, arrived_at, expires_at, octets, reverse_path, carrier, forced, file, offset, digest,"
            " header_octets FROM msg WHERE id = ?",
            (message_id,),
        ).fetchone()
        if row is None:
            raise NoSuchMessage(f"no message {message_id}")
        (
            kind, arrived_at, expires_at, octets, reverse_path, carrier, forced, file, offset, digest, header_octets,
        ) = row  # fmt: skip
        deliveries = self._database.execute(
            "SELECT d, state, attempts, next_at FROM dlv WHERE msg_id = ? ORDER BY next_at", (message_id,)
        ).fetchall()
        states = [DeliveryState(state) for _, state, _, _ in deliveries]
        recipients = [
            (addr, DeliveryState(state), last)
            for delivery, state, _, _ in deliveries
            for addr, last in self._database.execute(
                "SELECT addr, last FROM rcpt WHERE msg_id = ? AND d = ? ORDER BY n", (message_id, delivery)
            )
        ]
        return Shown(
            id=message_id,
            kind=Kind(kind),
            state=next((state for state in _MOST_TELLING if state in states), DeliveryState.READY),
            arrived_at=arrived_at / 1000,
            expires_at=expires_at / 1000,
            octets=octets,
            reverse_path=reverse_path,
            recipients=recipients,
            attempts=max((attempts for _, _, attempts, _ in deliveries), default=0),
            next_attempt_at=deliveries[0][3] / 1000 if deliveries else 0.0,
            carrier=json.loads(carrier),
            is_forced_to_expire=bool(forced),
            content=ContentRef(octets, Placement(file, offset, octets, digest)),
            header_octets=header_octets,
        )

    def retry(self, message_id: str, now: float) -> bool:
        """Make a message due now; whether anything changed. Errors as `show`."""
        self._exists(message_id)
        return self._changed("UPDATE dlv SET next_at = ? WHERE msg_id = ? AND state = 'ready'", _ms(now), message_id)

    def hold(self, message_id: str, now: float) -> bool:
        """Let a message wait for an operator; it does not age meanwhile. What is being attempted is left alone."""
        self._exists(message_id)
        if not self._changed("UPDATE dlv SET state = 'held' WHERE msg_id = ? AND state = 'ready'", message_id):
            return False
        self._changed("UPDATE msg SET held_at = ? WHERE id = ? AND held_at IS NULL", _ms(now), message_id)
        return True

    def release(self, message_id: str, now: float) -> bool:
        """Let a held message, or a corrupt one, go on."""
        self._exists(message_id)
        if not self._changed(
            "UPDATE dlv SET state = 'ready', crashes = 0, next_at = ?"
            " WHERE msg_id = ? AND state IN ('held', 'corrupt')",
            _ms(now), message_id,
        ):  # fmt: skip
            return False
        self._changed(
            "UPDATE msg SET expires_at = expires_at + (? - held_at), held_at = NULL"
            " WHERE id = ? AND held_at IS NOT NULL",
            _ms(now), message_id,
        )  # fmt: skip
        return True

    def expire(self, message_id: str, now: float) -> bool:
        """Let a message be too old: it goes back to its sender. Held ones are released for that."""
        self._exists(message_id)
        self._changed(
            "UPDATE dlv SET state = 'ready', next_at = ? WHERE msg_id = ? AND state = 'held'", _ms(now), message_id
        )
        return self._changed(
            "UPDATE msg SET expires_at = min(expires_at, ?), held_at = NULL, forced = 1 WHERE id = ?",
            _ms(now), message_id,
        )  # fmt: skip

    def reset(self, message_id: str, now: float, expires_at: float) -> bool:
        """Begin anew: no attempt was made, and it has just arrived."""
        self._exists(message_id)
        self._changed(
            "UPDATE msg SET expires_at = ?, warned = (reverse_path = ''), forced = 0 WHERE id = ?",
            _ms(expires_at), message_id,
        )  # fmt: skip
        return self._changed(
            "UPDATE dlv SET attempts = 0, crashes = 0, next_at = ? WHERE msg_id = ? AND state = 'ready'",
            _ms(now), message_id,
        )  # fmt: skip

    def delete(self, message_id: str) -> int:
        """Remove a message.

        Returns:
            How many recipients will not get it.

        Raises:
            NoSuchMessage: there is none of that id.
            SpoolError: it is being attempted: nobody can say what it would come to.
        """
        self._exists(message_id)
        deliveries = self._database.execute("SELECT d, state FROM dlv WHERE msg_id = ?", (message_id,)).fetchall()
        if any(state == DeliveryState.LEASED for _, state in deliveries):
            raise SpoolError(f"{message_id} is being delivered; hold it, or try again")
        removed = 0
        (kind,) = self._database.execute("SELECT kind FROM msg WHERE id = ?", (message_id,)).fetchone()
        for delivery, _ in deliveries:
            (recipients,) = self._database.execute(
                "SELECT count(*) FROM rcpt WHERE msg_id = ? AND d = ?", (message_id, delivery)
            ).fetchone()
            removed += recipients
            self._drop_delivery(message_id, delivery)
        self._ended["removed" if kind == Kind.MAIL else "notified_removed"] += removed
        return removed

    def _exists(self, message_id: str) -> None:
        if self._database.execute("SELECT 1 FROM msg WHERE id = ?", (message_id,)).fetchone() is None:
            raise NoSuchMessage(f"no message {message_id}")

    def _changed(self, statement: str, *values: Any) -> bool:
        return self._database.execute(statement, values).rowcount > 0


_MOST_TELLING: Final = (DeliveryState.LEASED, DeliveryState.CORRUPT, DeliveryState.HELD, DeliveryState.READY)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _interleave(first: Sequence[_Row], second: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    for index in range(max(len(first), len(second))):
        yield [*first[index : index + 1], *second[index : index + 1]]


def _parameters(mail: Mail) -> str:
    """MAIL's parameters as JSON, those that were given."""
    given = {
        "size": mail.size,
        "body": mail.body,
        "smtputf8": mail.smtputf8 or None,
        "ret": mail.ret,
        "envid": mail.envid,
        "require_tls": mail.require_tls or None,
        "auth": mail.auth,
    }
    return json.dumps({name: value for name, value in given.items() if value is not None})


def _mail(reverse_path: str, parameters: str) -> Mail:
    given = json.loads(parameters)
    body, ret = given.pop("body", None), given.pop("ret", None)
    return Mail(reverse_path, body=body and Body(body), ret=ret and DsnReturn(ret), **given)
