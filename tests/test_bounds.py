"""The ledger of bounds against the program: each row's bound exists, and the test that shows it does."""

import re
from pathlib import Path
from typing import Final

import pytest

from otel_smtp.config.bounds import LEDGER, Bound
from otel_smtp.config.settings import SCHEMA, Key
from otel_smtp.config.values import Duration, Integer, Size
from tests.readme import constant, setting_default
from tests.test_limits import TABLES

ROOT: Final = Path(__file__).parent.parent
# They say how often something is renewed or when to be strict, and bound nothing that grows.
NO_BOUNDS: Final = {
    "limits.stress",
    "timeouts.shutdown_grace",
    "upstream.messages_per_connection",
    "upstream.connection_age",
    "upstream.recipients_per_transaction",
    "upstream.connection_idle",
}


@pytest.mark.parametrize("row", LEDGER, ids=lambda row: row.what)
def test_a_row_holds(row: Bound) -> None:
    for name in row.by:
        if name.startswith("otel_smtp."):
            assert constant(name) > 0
        else:
            assert setting_default(name)
    file, _, test = row.test.partition("::")
    assert re.search(rf"^(?:async )?def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), row.test


def test_every_setting_that_bounds_somebody_is_in_the_ledger() -> None:
    settings = {
        f"{path}.{name}"
        for path, table in TABLES.items()
        for name, entry in SCHEMA[table].items()
        if isinstance(entry, Key) and isinstance(entry.kind, Integer | Size | Duration)
    }
    assert settings - NO_BOUNDS <= {name for row in LEDGER for name in row.by}
