"""Tables of the terminal in any width."""

from io import StringIO

import pytest
from rich.console import Console

from otel_smtp.commands.terminal.tables import settings_table

ROWS = [
    ("upstream.0.url", "smtp://127.0.0.1:1025", "gateway.toml"),
    ("upstream.0.recipients_per_transaction", "10", "--set"),
    ("spool.retry", "30s, 1m, 2m, 5m, 10m, 20m", "environment OTELSMTP_SPOOL__RETRY"),
]
WORDS = [word for row in ROWS for cell in row for word in cell.split()]


def drawn(width: int) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(settings_table("Settings that are set", ROWS, width))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 84, 120])
def test_no_word_is_broken_that_fits_into_a_line(width: int) -> None:
    lines = drawn(width).splitlines()
    assert max(map(len, lines)) <= width
    assert set(WORDS) <= {word for line in lines for word in line.split()}


def test_where_the_columns_fit_there_is_a_line_for_each_setting() -> None:
    assert len(drawn(120).splitlines()) == 2 + len(ROWS)
    assert len(drawn(70).splitlines()) == 1 + 2 * len(ROWS)


def test_no_settings_are_a_table_too() -> None:
    console = Console(file=StringIO(), width=40)
    console.print(settings_table("Settings that are set", [], 40))
