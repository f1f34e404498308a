"""Messages, deliveries and leases as rows of the tables, and back."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Final
from uuid import UUID

import asyncpg

from otel_smtp.smtp.envelope import Mail
from otel_smtp.spool.encoding import mail_of, parameters_of, recipient_of, recipient_values
from otel_smtp.spool.messages import (
    ContentRef,
    DeliveryState,
    Kind,
    Lease,
    MessageView,
    MovedMessage,
    NewMessage,
    SpooledRecipient,
    TakenOver,
    trace_id_of,
)

STATES: Final = {
    "r": DeliveryState.READY, "l": DeliveryState.LEASED, "h": DeliveryState.HELD, "c": DeliveryState.CORRUPT,
}  # fmt: skip
_LETTERS: Final = {state: letter for letter, state in STATES.items()}
_MOST_TELLING: Final = (DeliveryState.LEASED, DeliveryState.CORRUPT, DeliveryState.HELD, DeliveryState.READY)

Row = asyncpg.Record
_NUMBER: Final = itemgetter("d")


@dataclass(frozen=True, slots=True)
class ContentKey:
    """Where a content is, and whose lease brought it.

    Attributes:
        is_alone: the message had one delivery, and ends with it.
        incarnation: of the gateway that holds the lease; None: there is none.
    """

    message_id: str
    is_alone: bool
    incarnation: UUID | None


_encoded = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def as_json(value: object) -> str:
    """JSON that PostgreSQL takes: it has no NUL and no half of a surrogate pair in its texts."""
    text = _encoded(value).replace("\\u0000", "")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def recipients_json(recipients: Sequence[SpooledRecipient]) -> str:
    """What dlv.rcpt has."""
    return as_json([recipient_values(there) for there in recipients])


class NewRows:
    """The arguments of `submit` for some messages.

    Args:
        incarnation: of this gateway.
        lane: which of those that write at once; each counts in rows of its own.
    """

    def __init__(self, incarnation: UUID, lane: str) -> None:
        self._incarnation = incarnation
        self._lane = lane
        self._messages: list[tuple[object, ...]] = []
        self._deliveries: list[tuple[object, ...]] = []

    def add(
        self,
        message: NewMessage,
        octets: int,
        digest: bytes,
        content: bytes | None,
        *,
        is_leased: bool,
        is_marked: bool,
    ) -> None:
        """Add a message.

        Args:
            content: None: it is written as chunks.
            is_leased: its deliveries are attempted at once.
            is_marked: it may have been here, and be delivered.
        """
        sender = message.mail.reverse_path
        trace_id = trace_id_of(message.carrier)
        self._messages.append(
            (
                message.id, message.kind.value, message.expires_in, sender, as_json(parameters_of(message.mail)),
                as_json(dict(message.carrier)), _octets_of(trace_id), octets, message.header_octets, digest, content,
            )
        )  # fmt: skip
        for number, (destination, recipients) in enumerate(message.deliveries.items()):
            there = [
                SpooledRecipient(place, one, message.last_replies.get(one.address, ""))
                for place, one in enumerate(recipients)
            ]
            self._deliveries.append(
                (
                    message.id, number, destination, sender, is_leased, message.attempts, message.retry_in,
                    message.is_possible_duplicate or is_marked, recipients_json(there),
                )
            )  # fmt: skip

    def add_notice(self, message: NewMessage, content: bytes) -> None:
        """Add a message of our own."""
        digest = hashlib.sha256(content).digest()
        self.add(message, len(content), digest, content, is_leased=False, is_marked=False)

    @property
    def arguments(self) -> list[object]:
        """In the order of the statement."""
        return [
            self._incarnation,
            *map(list, zip(*self._messages, strict=True)),
            *map(list, zip(*self._deliveries, strict=True)),
            self._lane,
        ]


def _octets_of(trace_id: str | None) -> bytes | None:
    try:
        return bytes.fromhex(trace_id) if trace_id is not None else None
    except ValueError:
        return None


def moved_values(message: MovedMessage) -> list[object]:
    """The first arguments of `move_message`."""
    return [
        message.id, message.kind.value, message.age, message.expires_in, message.held_for, message.is_warned,
        message.is_forced_to_expire, message.mail.reverse_path, as_json(parameters_of(message.mail)),
        as_json(dict(message.carrier)), _octets_of(trace_id_of(message.carrier)),
    ]  # fmt: skip


def moved_deliveries(message: MovedMessage) -> list[tuple[object, ...]]:
    """The arguments of `move_delivery`."""
    return [
        (
            message.id, one.number, one.destination, message.mail.reverse_path, _LETTERS[one.state], one.attempts,
            one.crashes, one.due_in, one.is_possible_duplicate, recipients_json(one.recipients),
        )
        for one in message.deliveries
    ]  # fmt: skip


def new_leases(message: NewMessage, octets: int, rows: Sequence[Row], incarnation: UUID) -> list[Lease]:
    """The leases that a submission gave.

    Args:
        rows: what the statement said of the message's deliveries.
    """
    leases: list[Lease] = []
    deliveries = list(message.deliveries.items())
    for row in sorted(rows, key=_NUMBER) if len(rows) > 1 else rows:
        if row["state"] != "l" or not row["is_ours"]:
            continue
        destination, recipients = deliveries[row["d"]]
        leases.append(
            Lease(
                row["d"], row["epoch"], message.id, message.kind, message.mail, destination,
                [
                    SpooledRecipient(place, one, message.last_replies.get(one.address, ""))
                    for place, one in enumerate(recipients)
                ],
                row["attempts"], row["arrived_at"], row["expires_at"], message.carrier,
                ContentRef(octets, ContentKey(message.id, len(deliveries) == 1, incarnation)),
                message.header_octets, row["dup"],
            )
        )  # fmt: skip
    return leases


def lease_of(row: Row, incarnation: UUID | None) -> Lease:
    """A delivery that was leased, or is only shown."""
    return Lease(
        row["d"], row["epoch"], row["id"], Kind(row["kind"]), _mail(row), row["dest"],
        [recipient_of(there) for there in json.loads(row["rcpt"])],
        row["attempts"], row["arrived_at"], row["expires_at"], json.loads(row["carrier"]),
        _content(row, incarnation), row["header_octets"], row["dup"], _taken_over(row["taken_from"]),
    )  # fmt: skip


def _taken_over(text: str | None) -> TakenOver | None:
    return TakenOver(*json.loads(text)) if text is not None else None


def _mail(row: Row) -> Mail:
    return mail_of(row["reverse_path"], json.loads(row["parameters"]))


def _content(row: Row, incarnation: UUID | None) -> ContentRef:
    return ContentRef(row["octets"], ContentKey(row["id"], row["is_alone"], incarnation))


def shown(rows: Sequence[Row]) -> list[MessageView]:
    """Messages as operators see them.

    Args:
        rows: of the deliveries, sorted by message and when they are due.
    """
    return [_shown(list(of_one)) for _, of_one in groupby(rows, key=lambda row: row["id"])]


def _shown(rows: Sequence[Row]) -> MessageView:
    first = rows[0]
    deliveries = [row for row in rows if row["d"] is not None]
    states = [STATES[row["state"]] for row in deliveries]
    return MessageView(
        id=first["id"],
        kind=Kind(first["kind"]),
        state=next((state for state in _MOST_TELLING if state in states), DeliveryState.READY),
        arrived_at=first["arrived_at"],
        expires_at=first["expires_at"],
        octets=first["octets"],
        reverse_path=first["reverse_path"],
        recipients=[
            (there.recipient.address, state, there.last_reply)
            for row, state in zip(deliveries, states, strict=True)
            for there in map(recipient_of, json.loads(row["rcpt"]))
        ],
        attempts=max((row["attempts"] for row in deliveries), default=0),
        next_attempt_at=deliveries[0]["next_at"] if deliveries else 0.0,
        carrier=json.loads(first["carrier"]),
        is_forced_to_expire=first["forced"],
        content=_content(first, None),
        header_octets=first["header_octets"],
        gateways=sorted({row["gateway"] for row in deliveries if row["gateway"] is not None}),
        leased_at=min((row["next_at"] for row in deliveries if row["state"] == "l"), default=None),
    )


def key_of(content: ContentRef) -> ContentKey:
    """Where a content of this store is."""
    assert isinstance(content.key, ContentKey)
    return content.key


def small_content(row: Row) -> Sequence[bytes] | None:
    """Header block and body, if they are at hand and whole."""
    content: bytes | None = row["content"]
    if content is None or hashlib.sha256(content).digest() != row["digest"]:
        return None
    header_octets = row["header_octets"]
    return content[:header_octets], content[header_octets:]
