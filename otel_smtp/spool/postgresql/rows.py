"""Messages, deliveries and leases as rows of the tables, and back."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from json.encoder import encode_basestring as quoted
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.spool.encoding import mail_of, parameters_of, recipient_of
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


class ContentKey(NamedTuple):
    """The key of a content, with the lease under which it was found.

    Attributes:
        is_alone: the message had one delivery, and ends with it.
        incarnation: of the gateway that holds the lease; None: there is none.
    """

    message_id: str
    is_alone: bool
    incarnation: UUID | None


# The constructor of a named tuple is a function in Python.
_content_key: Final = partial(tuple.__new__, ContentKey)
_content_ref: Final = partial(tuple.__new__, ContentRef)
_lease: Final = partial(tuple.__new__, Lease)
_spooled_recipient: Final = partial(tuple.__new__, SpooledRecipient)

_encoded: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_NUL: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
_BOOLEANS: Final = ("false", "true")


def as_json(value: object) -> str:
    """JSON that PostgreSQL takes."""
    return _taken(_encoded(value))


def _taken(text: str) -> str:
    """JSON that PostgreSQL takes: it has no NUL and no half of a surrogate pair in its texts."""
    if "\\u0000" in text:
        text = _NUL.sub(r"\1", text)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _recipients_text(recipients: Iterable[SpooledRecipient]) -> str:
    """The value of dlv.rcpt: number, address, NOTIFY, ORCPT and last reply of each recipient."""
    text = ""
    for number, (address, notify, orcpt), last_reply in recipients:
        plain = "null,null"
        if notify is not None or orcpt is not None:
            plain = f"{'null' if notify is None else notify.value},{'null' if orcpt is None else quoted(orcpt)}"
        text += f",[{number},{quoted(address)},{plain},{quoted(last_reply)}]"
    return f"[{text[1:]}]"


def recipients_json(recipients: Iterable[SpooledRecipient]) -> str:
    """As JSON that PostgreSQL takes: see `_recipients_text`."""
    return _taken(_recipients_text(recipients))


def documents(rows: Iterable[str]) -> str:
    """JSON objects in an array that PostgreSQL takes."""
    return _taken(f"[{','.join(rows)}]")


class NewRows:
    """The arguments of `submit` for some messages.

    The JSON is assembled by hand: arrays per column cost three times as much, since the driver checks each value for
    being an array too; and an encoder sets itself up for each document.

    Args:
        incarnation: of this gateway.
        lane: the number of the writing lane; each has its own rows of counts.
    """

    def __init__(self, incarnation: UUID, lane: str) -> None:
        self._incarnation = incarnation
        self._lane = lane
        self._messages: list[str] = []
        self._contents: list[bytes | None] = []
        self._deliveries: list[str] = []

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
        sender = quoted(message.mail.reverse_path)
        parameters = parameters_of(message.mail)
        carrier = ""
        for name, value in message.carrier.items():
            carrier += f",{quoted(name)}:{quoted(value)}"
        trace_id = _octets_of(trace_id_of(message.carrier))
        trace = "null" if trace_id is None else f'"\\\\x{trace_id.hex()}"'
        self._messages.append(
            f'{{"id":"{message.id}","kind":"{message.kind}","expires_in":{message.expires_in},"reverse_path":{sender},'
            f'"parameters":{_encoded(parameters) if parameters else "{}"},"carrier":{{{carrier[1:]}}},'
            f'"trace_id":{trace},"octets":{octets},"header_octets":{message.header_octets},'
            f'"digest":"\\\\x{digest.hex()}"}}'
        )
        self._contents.append(content)
        leased = _BOOLEANS[is_leased]
        dup = _BOOLEANS[message.is_possible_duplicate or is_marked]
        for number, (destination, recipients) in enumerate(message.deliveries.items()):
            self._deliveries.append(
                f'{{"id":"{message.id}","d":{number},"dest":{quoted(destination)},"sender":{sender},'
                f'"is_leased":{leased},"attempts":{message.attempts},"retry_in":{message.retry_in},"dup":{dup},'
                f'"rcpt":{_recipients_text(_spooled(message, recipients))}}}'
            )

    def add_notice(self, message: NewMessage, content: bytes) -> None:
        """Add a message of our own."""
        digest = hashlib.sha256(content).digest()
        self.add(message, len(content), digest, content, is_leased=False, is_marked=False)

    @property
    def arguments(self) -> list[object]:
        """In the order of the statement."""
        return [
            self._incarnation, self._lane, documents(self._messages), self._contents, documents(self._deliveries),
        ]  # fmt: skip


def _spooled(message: NewMessage, recipients: Sequence[Recipient]) -> list[SpooledRecipient]:
    """Recipients of one delivery of a message, before any attempt here."""
    replies = message.last_replies
    waiting: list[SpooledRecipient] = []
    for one in recipients:
        waiting.append(_spooled_recipient((len(waiting), one, replies.get(one.address, "") if replies else "")))
    return waiting


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


def new_leases(
    message: NewMessage, octets: int, incarnation: UUID, arrived_at: float, *, is_marked: bool
) -> list[Lease]:
    """The leases of a new message, all of whose deliveries are ours.

    Args:
        is_marked: see `NewRows.add`.
    """
    deliveries = message.deliveries
    content = _content_ref((octets, _content_key((message.id, len(deliveries) == 1, incarnation))))
    leases: list[Lease] = []
    for destination, recipients in deliveries.items():
        leases.append(
            _lease(
                (
                    len(leases), 1, message.id, message.kind, message.mail, destination, _spooled(message, recipients),
                    message.attempts + 1, arrived_at, arrived_at + message.expires_in, message.carrier, content,
                    message.header_octets, message.is_possible_duplicate or is_marked, None,
                )
            )
        )  # fmt: skip
    return leases


def leases_again(
    message: NewMessage, octets: int, incarnation: UUID, found: Iterable[tuple[int, int, int, bool, float, float]]
) -> list[Lease]:
    """The leases of a message that was there already.

    Args:
        found: what `submit` returned about deliveries still ours.
    """
    new = new_leases(message, octets, incarnation, 0.0, is_marked=False)
    return [
        new[number]._replace(
            epoch=epoch, attempt=attempt, is_possible_duplicate=is_possible_duplicate, arrived_at=arrived_at,
            expires_at=expires_at,
        )
        for number, epoch, attempt, is_possible_duplicate, arrived_at, expires_at in sorted(found)
    ]  # fmt: skip


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
    """The key of a content of this store."""
    assert isinstance(content.key, ContentKey)
    return content.key


def small_content(row: Row) -> Sequence[bytes] | None:
    """Header block and body, if they are in memory and whole."""
    content: bytes | None = row["content"]
    if content is None or hashlib.sha256(content).digest() != row["digest"]:
        return None
    header_octets = row["header_octets"]
    return content[:header_octets], content[header_octets:]
