"""Writes the README's tables and deploy/reference out of the code: `python -m tests.readme`. `test_readme.py` compares
them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from otel_smtp.client import names
from otel_smtp.config import json_schema, settings_table
from otel_smtp.smtp.states import LEGAL, PULSES, ConnState
from otel_smtp.telemetry.attributes import tables

README: Final = Path(__file__).parent.parent / "README.md"
REFERENCE: Final = README.parent / "deploy" / "reference"


def states_table() -> str:
    """What may follow what, as Markdown."""
    lines = ["| state | kind | may be followed by |", "|---|---|---|"]
    for state, allowed in LEGAL.items():
        following = ", ".join(other for other in ConnState if other in allowed) or "nothing"
        lines.append(f"| {state} | {'pulse' if state in PULSES else 'level'} | {following} |")
    return "\n".join(lines)


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "states": states_table,
    "client": names.table,
}


def reference() -> dict[str, str]:
    """The files of deploy/reference: what each holds, by name."""
    made = "Made out of the code: do not edit."
    return {
        "settings.md": f"# Settings\n\n{made} `otel-smtp settings` prints the table.\n\n{settings_table().strip()}\n",
        "settings.schema.json": json.dumps(json_schema(), indent=2) + "\n",
        "telemetry.md": f"# Telemetry\n\n{made} `otel-smtp telemetry` prints the tables.\n\n{tables().strip()}\n",
    }


def with_tables(text: str) -> str:
    """`text` with each table put between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text) is None:
            raise ValueError(f"README.md has no place for {name}")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table().strip()}\n{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, text in reference().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
