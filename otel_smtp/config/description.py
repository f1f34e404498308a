"""Settings for people and editors: the rows of `otel-smtp check`, the reference table and the JSON Schema."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from otel_smtp.config.changing import holds_at_once
from otel_smtp.config.settings import SCHEMA, Key, Settings, Table, Tables
from otel_smtp.config.values import Choice


class Row(NamedTuple):
    """An effective setting: key path, value as written in a file, where it was set."""

    key: str
    value: str
    origin: str


def describe(settings: Settings) -> list[Row]:
    """Every effective setting with the origin of its value; secrets are masked."""
    return list(_rows(settings, "", settings.origins))


def _rows(table: Table, prefix: str, origins: Mapping[str, str]) -> Iterator[Row]:
    for name, entry in SCHEMA[type(table)].items():
        value = getattr(table, name)
        path = f"{prefix}{name}"
        if isinstance(entry, Key):
            shown = "" if value is None and not _may_be_none(entry) else entry.kind.show(value)
            yield Row(path, shown, origins.get(path, "default"))
        elif isinstance(entry, Tables):
            for index, item in enumerate(value):
                yield from _rows(item, f"{path}.{index}.", origins)
        else:
            yield from _rows(value, f"{path}.", origins)


def _may_be_none(key: Key) -> bool:
    """Whether None is a value ("off") rather than the absence of one."""
    return bool(getattr(key.kind, "may_be_off", False))


class Documented(NamedTuple):
    """A setting's row in the reference: key, default, what a new value needs (reload or restart), meaning with the
    source of the default. Default and meaning are Markdown.
    """

    key: str
    default: str
    holds_after: str
    meaning: str


def documented_settings() -> list[Documented]:
    """The reference of all settings."""
    return list(_documented(Settings, ""))


def settings_table() -> str:
    """The reference as a table in Markdown."""
    rows = ["| key | default | holds after | meaning |", "|---|---|---|---|"]
    rows += (f"| `{row.key}` | {' | '.join(row[1:])} |" for row in documented_settings())
    return "\n".join(rows)


def _documented(table: type[Table], prefix: str) -> Iterator[Documented]:
    defaults = {field.name: field for field in msgspec.structs.fields(table)}
    for name, entry in SCHEMA[table].items():
        path = f"{prefix}{name}"
        if isinstance(entry, Key):
            default = entry.default or _default_text(entry, defaults[name].default)
            meaning = f"{entry.meaning} ({entry.source})" if entry.source else entry.meaning
            if isinstance(entry.kind, Choice) and not all(f"`{word}`" in meaning for word in entry.kind.words):
                meaning = f"{', '.join(f'`{word}`' for word in entry.kind.words)}: {meaning}"
            yield Documented(path, default, "reload" if holds_at_once(table, name) else "restart", meaning)
        elif isinstance(entry, Tables):
            yield from _documented(entry.item, f"{path}[].")
        else:
            yield from _documented(entry, f"{path}.")


def _default_text(key: Key, default: object) -> str:
    if default is None and not _may_be_none(key):
        return ""
    shown = key.kind.show(default)
    return f"`{shown}`" if shown else ""


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of a settings file, for editors: keys, kinds of values, meanings, defaults.

    It knows less than `load`, which finds contradictions, and files that cannot be read.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of otel-smtp",
        **_table_schema(Settings),
    }


def _table_schema(table: type[Table]) -> dict[str, Any]:
    defaults = {field.name: field for field in msgspec.structs.fields(table)}
    properties: dict[str, Any] = {}
    for name, entry in SCHEMA[table].items():
        if isinstance(entry, Key):
            properties[name] = _key_schema(entry, defaults[name].default)
        elif isinstance(entry, Tables):
            properties[name] = {"type": "array", "minItems": 1, "items": _table_schema(entry.item)}
        else:
            properties[name] = _table_schema(entry)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _key_schema(key: Key, default: object) -> dict[str, Any]:
    meaning = f"{key.meaning} ({key.source})" if key.source else key.meaning
    told = key.default or ("" if default is msgspec.NODEFAULT else _default_text(key, default))
    return {"description": f"{meaning}. Default: {told}" if told else meaning, **key.kind.schema}
