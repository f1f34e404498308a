"""What of a message becomes JSON in a row."""

import json

import pytest

from otel_smtp.spool.postgresql.rows import as_json


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({}, {}),
        ([0, "user@example.net", None, None, ""], [0, "user@example.net", None, None, ""]),
        (["grüße@example.net", '"a\\b"@example.net'], ["grüße@example.net", '"a\\b"@example.net']),
        ("a\0b", "ab"),
        ("an upstream's \udcff", "an upstream's ?"),
    ],
)
def test_postgresql_takes_it(value: object, kept: object) -> None:
    text = as_json(value)
    assert json.loads(text) == kept
    assert " " not in text.replace("an upstream's ", "")
    text.encode()
