"""An outcome as a CloudEvent, and its signature."""

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from typing import Any

import pytest

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import EnhancedStatus, Reply
from otel_smtp.spool.messages import ContentRef, Kind, Lease, SpooledRecipient
from otel_smtp.spool.outcomes.events import BadKey, RecipientOutcome, Told, event_body, key_of, signed_headers
from tests.spool.messages import CARRIER, TRACE_ID

LEASE = Lease(
    0, 1, "01mail", Kind.MAIL, Mail("app@example.com", envid="order+2B7"), "provider", (), 3, 1_767_225_600.25,
    1_767_657_600.0, CARRIER, ContentRef(10, "01mail"), 5, False,
)  # fmt: skip
USER = SpooledRecipient(0, Recipient("user@example.net", orcpt="rfc822;User@example.net"))
REFUSED = Reply(550, EnhancedStatus(5, 1, 1), ("No such user", 'says "us"'))
TOLD = Told(
    RecipientOutcome.BOUNCED,
    "otel-smtp://gw.example.com",
    1_767_225_601.5,
    "provider",
    "<1@example.com>",
    REFUSED,
    True,
)


def event(lease: Lease = LEASE, recipient: SpooledRecipient = USER, told: Told = TOLD) -> Any:
    return json.loads(event_body("01event", lease, recipient, told))


def test_the_event_says_who_what_why_and_who_said_so() -> None:
    assert event() == {
        "specversion": "1.0",
        "id": "01event",
        "source": "otel-smtp://gw.example.com",
        "type": "smtp.recipient.bounced",
        "subject": "user@example.net",
        "time": "2026-01-01T00:00:01.500Z",
        "datacontenttype": "application/json",
        "traceparent": CARRIER["traceparent"],
        "data": {
            "outcome": "bounced",
            "recipient": "user@example.net",
            "original_recipient": "rfc822;User@example.net",
            "sender": "app@example.com",
            "message_id": "<1@example.com>",
            "envelope_id": "order+2B7",
            "queue_id": "01mail",
            "trace_id": TRACE_ID,
            "accepted_time": "2026-01-01T00:00:00.250Z",
            "attempts": 3,
            "upstream": "provider",
            "reply": {"code": 550, "enhanced_code": "5.1.1", "text": 'No such user says "us"'},
            "reply_is_final": True,
            "possible_duplicate": False,
        },
    }


def test_what_is_not_known_is_null_and_a_mail_without_a_trace_has_no_context() -> None:
    bare = event(LEASE._replace(carrier={}), told=replace(TOLD, message_id=None, reply=None))
    assert "traceparent" not in bare
    assert bare["data"]["trace_id"] is bare["data"]["message_id"] is bare["data"]["reply"] is None


@pytest.mark.parametrize("address", ["jörg@example.net", "half\ud800@example.net", 'q"\\@x.example', "nul\0@x.example"])
def test_whatever_an_address_holds_the_event_is_json_in_utf_8(address: str) -> None:
    found = event(recipient=SpooledRecipient(0, Recipient(address)))
    assert found["subject"] == address.encode("utf-8", "replace").decode()


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # The example of the specification's reference implementations.
    key = key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"


def test_a_key_that_is_plain_text_is_used_as_it_is() -> None:
    key = "correct horse battery staple"
    expected = hmac.new(key.encode(), b"1.2.{}", hashlib.sha256).digest()
    signature = signed_headers(key_of(key), "1", 2, b"{}")["webhook-signature"]
    assert signature == f"v1,{base64.b64encode(expected).decode()}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("too short", "has 9 octets, and needs 24"),
        ("", "has 0 octets"),
        ("whsec_c2hvcnQ=", "has 5 octets"),
        ("whsec_*** no base64, however long it may be ***", "is not base64"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_without_being_shown(text: str, why: str) -> None:
    with pytest.raises(BadKey, match=why) as refused:
        key_of(text)
    assert not text or text not in str(refused.value)


def test_keys_that_are_long_enough_are_taken() -> None:
    assert key_of("x" * 24) == b"x" * 24
    encoded = base64.b64encode(b"y" * 25).decode()
    assert key_of(f"whsec_{encoded}") == key_of(f"whsec_{encoded.rstrip('=')}") == b"y" * 25
