"""What operators did to queued mail, for the log and the mail's trace, with the operator's name.

In a queue shared by several gateways, a command changes the database, which none of them need notice; so a deed can be
encoded as text, in which form one of them is asked to report it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from otel_smtp.observing import Fate, Observer, SpoolAction, TransactionRecord, trace_fields
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType
from otel_smtp.spool.aging import parsed
from otel_smtp.spool.attempts import MESSAGE_KINDS
from otel_smtp.spool.messages import Kind, MessageView

logger: Final = logging.getLogger("otel_smtp.spool.operators")

MOST_NAME_CHARACTERS: Final = 100
CRASHES: Final = "\n"
"""Stands for the operator, who cannot have this name, if a message is held because of repeated crashes."""

_ACTIONS: Final = {
    "hold": SpoolAction.HELD,
    "release": SpoolAction.RELEASED,
    "expire": SpoolAction.GIVEN_UP,
    "delete": SpoolAction.REMOVED,
}
"""The operator's commands that appear in a message's trace; an attempt has its own span."""


def operator_name(text: str) -> str:
    """A name fit for the log: one line, bounded; "unnamed" if empty."""
    return "".join(char for char in text if char.isprintable()).strip()[:MOST_NAME_CHARACTERS] or "unnamed"


@dataclass(frozen=True, slots=True)
class Deed:
    """An operator's action on a message.

    Attributes:
        command: as in `otel-smtp queue`.
        operator: the operator's name, or `CRASHES`.
        recipients: the message's recipients, each with the last reply about it.
    """

    command: str
    operator: str
    message_id: str
    kind: Kind
    attempts: int
    reverse_path: str
    carrier: Mapping[str, str]
    recipients: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, command: str, operator: str, before: MessageView) -> Self:
        """The deed of a command, on the message as it was before."""
        recipients = [(address, last) for address, _, last in before.recipients]
        return cls(
            command, operator, before.id, before.kind, before.attempts, before.reverse_path, before.carrier, recipients
        )

    def as_text(self) -> str:
        """Encode it in ASCII, for `parse`."""
        return json.dumps(
            [
                self.command, self.operator, self.message_id, self.kind.value, self.attempts, self.reverse_path,
                dict(self.carrier), self.recipients,
            ]
        )  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Self:
        """Decode another process's deed.

        Raises:
            ValueError: the text is not a deed, or comes from a newer program.
        """
        try:
            command, operator, message_id, kind, attempts, reverse_path, carrier, recipients = json.loads(text)
            return cls(
                str(command), CRASHES if operator == CRASHES else operator_name(operator),
                str(message_id), Kind(kind), int(attempts), str(reverse_path),
                {str(name): str(value) for name, value in carrier.items()},
                [(str(address), str(last)) for address, last in recipients],
            )  # fmt: skip
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no deed: {error}") from error

    def note(self, observer: Observer) -> None:
        """Report it in the log and in the message's trace."""
        if self.operator == CRASHES:
            self._note_crashes(observer)
            return
        level = logging.WARNING if self.command in ("delete", "expire") else logging.INFO
        logger.log(
            level, "queued message changed by an operator",
            extra={
                "spool_id": self.message_id, "command": self.command, "operator": self.operator,
                "recipients": len(self.recipients), **trace_fields(self.carrier),
            },
        )  # fmt: skip
        # An outcome is in no trace: operators' changes to it are only logged.
        if self.kind is not Kind.OUTCOME and (action := _ACTIONS.get(self.command)) is not None:
            observer.spool_acted(self.record(action))

    def _note_crashes(self, observer: Observer) -> None:
        record = self.record(SpoolAction.HELD)
        record.error_type, record.failure = ErrorType.INTERNAL, "it was part of too many crashes"
        observer.spool_acted(record)
        extra = {"spool_id": self.message_id, **trace_fields(self.carrier)}
        logger.critical("message held: being delivered during repeated crashes", extra=extra)

    def record(self, action: SpoolAction) -> TransactionRecord:
        """The record of what happened to the message; if it ended or waits, with each recipient's last reply."""
        record = TransactionRecord.resumed(
            self.message_id,
            self.carrier,
            Mail(self.reverse_path),
            kind=MESSAGE_KINDS[self.kind],
            attempt=self.attempts,
        )
        record.action = action
        record.operator = None if self.operator == CRASHES else self.operator
        fates = []
        if action in (SpoolAction.HELD, SpoolAction.REMOVED):
            fates = [(Recipient(address), Fate(action), parsed(last)) for address, last in self.recipients]
        record.end_in_spool(fates, record.begun_ns)
        return record


def note_crashes(held: MessageView, observer: Observer) -> None:
    """Report a message held because it was being delivered during too many crashes."""
    Deed.of("hold", CRASHES, held).note(observer)
