"""A record that waits to be told with others says then what it said when its transaction ended."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from otel_smtp.observing import DeliveryRecord, Observer, TransactionRecord, fan_out
from otel_smtp.observing.fan_out import MOST_WAITING
from tests.bench.lab import KIB, Client, serving

_Said = list[tuple[str, object]]
_THEIRS = ("__weakref__", "_transaction", "trace")  # a reference, and what is an observer's own


def _said(transaction: TransactionRecord) -> _Said:
    """All that a record and its deliveries say."""
    records: list[TransactionRecord | DeliveryRecord] = [transaction, *transaction.deliveries]
    said: _Said = []
    for record in records:
        for name in type(record).__slots__:
            if name not in _THEIRS:
                value = getattr(record, name)
                said.append((name, [*value] if isinstance(value, list) else value))
    return said


class _Comparing(Observer):
    """Compares what a record says when its transaction has ended and when it is told with others."""

    def __init__(self) -> None:
        self.observer = fan_out([self], lambda work: None)  # until they are many
        self.at_the_end: list[_Said] = []
        self.together: list[int] = []

    def transaction_ended(self, transaction: TransactionRecord) -> None:
        self.at_the_end.append(_said(transaction))

    def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
        assert [*map(_said, transactions)] == self.at_the_end
        self.at_the_end.clear()
        self.together.append(len(transactions))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("strategy", ["transparent", "buffered"])
@pytest.mark.parametrize("is_queued", [False, True])
async def test_nobody_writes_to_a_record_whose_transaction_has_ended(
    strategy: str, is_queued: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    comparing = _Comparing()
    async with serving(lambda: comparing, strategy, spool=tmp_path / "spool" if is_queued else None) as accept:  # type: ignore[arg-type,return-value]  # as far as used
        client = Client(KIB)
        accept(client)
        await client.mails(MOST_WAITING + 9)
    assert sum(comparing.together) == MOST_WAITING + 9
    assert comparing.together[0] == MOST_WAITING, "else this would show little"
    assert not caplog.records, "an observer that raises is dropped"
