"""What of a message becomes JSON in a row."""

import json

import pytest

from otel_smtp.smtp.envelope import Notify, Recipient
from otel_smtp.spool.encoding import recipient_of
from otel_smtp.spool.messages import SpooledRecipient
from otel_smtp.spool.postgresql.rows import as_json, recipients_json


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({}, {}),
        ([0, "user@example.net", None, None, ""], [0, "user@example.net", None, None, ""]),
        (["grüße@example.net", '"a\\b"@example.net'], ["grüße@example.net", '"a\\b"@example.net']),
        ("a\0b", "ab"),
        ("a\\u0000b\\", "a\\u0000b\\"),
        ("\\\0b", "\\b"),
        ("an upstream's \udcff", "an upstream's ?"),
    ],
)
def test_postgresql_takes_it(value: object, kept: object) -> None:
    text = as_json(value)
    assert json.loads(text) == kept
    assert " " not in text.replace("an upstream's ", "")
    text.encode()


@pytest.mark.parametrize(
    "recipients",
    [
        [],
        [SpooledRecipient(0, Recipient("user@example.net"))],
        [
            SpooledRecipient(0, Recipient("grüße@example.net", Notify.NEVER)),
            SpooledRecipient(
                1, Recipient('"a\\b"@x.example', Notify.SUCCESS | Notify.DELAY, 'rfc822;"a"'), "450 \\ busy"
            ),
            SpooledRecipient(3, Recipient("c@example.net", None, "rfc822;c@example.net"), '450 4.7.1 "later"'),
        ],
    ],
    ids=len,
)
def test_recipients_come_back_as_they_went(recipients: list[SpooledRecipient]) -> None:
    assert [recipient_of(values) for values in json.loads(recipients_json(recipients))] == recipients
