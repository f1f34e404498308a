"""Tables and lines for the output of `check` and `send`."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from otel_smtp.commands.terminal.words import code_style

VERDICTS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "bold red")}


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without frame lines. The first column stands out; long cells wrap."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        drawn.add_column(head, header_style="dim", style="cyan" if number == 0 else "", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def settings_table(title: str, rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """Keys, values and where they are set. A key is never broken, so that it can be searched and copied.

    Args:
        width: in columns; where a word of the others would not fit beside the keys, they stand below each key.
    """
    heads = ("key", "value", "set in")
    keys = max((len(key) for key, *_ in rows), default=0)
    words = (max((len(word) for row in rows for word in row[number].split()), default=0) for number in (1, 2))
    if keys + sum(2 + word for word in words) <= width:
        drawn = table(title, heads, rows)
        drawn.columns[0].no_wrap = True
        return drawn
    lines: list[RenderableType] = [Text(title, "bold")]
    for key, value, origin in rows:
        lines += [Text(key, "cyan"), Padding(Text.assemble(value, "  ", (origin, "dim")), (0, 0, 0, 2))]
    return Group(*lines)


def verdict_line(verdict: str, subject: str, detail: str) -> Text:
    """One finding of a check."""
    mark, style = VERDICTS[verdict]
    return Text.assemble((f"{mark} ", style), (subject, "bold"), "  ", detail)


def exchange_line(sent: str, code: int, text: str) -> Text:
    """A sent command and its reply."""
    first, *more = text.splitlines() or [""]
    line = Text.assemble(("→ ", "dim"), f"{sent}  ", (str(code), code_style(code)), f" {first}")
    return line.append(f"  (+{len(more)} lines)", "dim") if more else line
