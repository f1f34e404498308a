"""Writes the tables of the guides, and deploy/reference, out of the code: `python -m tests.readme`. `test_readme.py`
compares them."""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, cast

from otel_smtp.client import names
from otel_smtp.config import json_schema, settings_table
from otel_smtp.config.bounds import LEDGER
from otel_smtp.smtp.states import LEGAL, PULSES, ConnState
from otel_smtp.telemetry.attributes import tables
from tests.bench import report
from tests.manual import manual

README: Final = Path(__file__).parent.parent / "README.md"
REFERENCE: Final = README.parent / "deploy" / "reference"
PUBLISHED: Final = REFERENCE / "figures"  # by `python -m tests.bench --publish`
GUIDES: Final = README.parent / "deploy" / "guides"


def states_table() -> str:
    """What may follow what, as Markdown."""
    lines = ["| state | kind | may be followed by |", "|---|---|---|"]
    for state, allowed in LEGAL.items():
        following = ", ".join(other for other in ConnState if other in allowed) or "nothing"
        lines.append(f"| {state} | {'pulse' if state in PULSES else 'level'} | {following} |")
    return "\n".join(lines)


def figures() -> str:
    """What the README shows of the published run of the benchmark; empty: there is none."""
    published = PUBLISHED / report.JSON_NAME
    return report.readme(report.decode(published.read_bytes())) if published.exists() else ""


TABLES: Final[Mapping[str, tuple[Path, Callable[[], str]]]] = {
    "states": (GUIDES / "operating.md", states_table),
    "figures": (README, figures),
    "client": (GUIDES / "applications.md", names.table),
}


def constant(name: str) -> float:
    """The value of a constant, by module and name; of a class's attribute, too."""
    module, _, attribute = name.rpartition(".")
    try:
        return cast("float", getattr(importlib.import_module(module), attribute))
    except ModuleNotFoundError:
        module, _, owner = module.rpartition(".")
        return cast("float", getattr(getattr(importlib.import_module(module), owner), attribute))


def bounds_table() -> str:
    """The ledger of bounds, as Markdown."""
    lines = ["| whose | what grows | bound | beyond | test |", "|---|---|---|---|---|"]
    for row in LEDGER:
        values = [
            f"{constant(name):,g}" if name.startswith("otel_smtp.") else f"`{name}` ({setting_default(name)})"
            for name in row.by
        ]
        file, _, test = row.test.partition("::")
        lines.append(f"| {row.whose} | {row.what} | {', '.join(values)} | {row.beyond} | `{test}` in {file} |")
    return "\n".join(lines)


def setting_default(path: str) -> str:
    """The default of a setting, as its table shows it."""
    shown = re.escape(re.sub("^(upstream|notify)", r"\1[]", path))
    found = re.search(rf"^\| `{shown}` \| (.*?) \|", settings_table(), re.MULTILINE)
    if found is None:
        raise ValueError(f"no setting {path}")
    return found[1].strip("`")


def reference() -> dict[str, str]:
    """The files of deploy/reference: what each holds, by name."""
    made = "Made out of the code: do not edit."
    return {
        "otel-smtp.1": manual(),
        "settings.md": f"# Settings\n\n{made} `otel-smtp settings` prints the table.\n\n{settings_table().strip()}\n",
        "settings.schema.json": json.dumps(json_schema(), indent=2) + "\n",
        "bounds.md": f"# Bounds\n\n{made} What others can make grow, and what bounds it.\n\n{bounds_table()}\n",
        "telemetry.md": f"# Telemetry\n\n{made} `otel-smtp telemetry` prints the tables.\n\n{tables().strip()}\n",
    }


def with_tables() -> dict[Path, str]:
    """The documents that have tables, each put between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    texts: dict[Path, str] = {}
    for name, (path, table) in TABLES.items():
        text = texts.get(path) or path.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text) is None:
            raise ValueError(f"{path.name} has no place for {name}")
        texts[path] = pattern.sub(lambda match, table=table: f"{match[1]}{table().strip()}\n{match[2]}", text)  # type: ignore[misc]
    return texts


def write() -> None:
    """Write all of it."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in reference().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
    for path, text in with_tables().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
