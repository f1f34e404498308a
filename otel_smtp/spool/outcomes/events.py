"""An outcome as a CloudEvent, and its signature headers. No clock and no I/O.

The body is a CloudEvent in JSON, structured mode (CloudEvents 1.0.2, JSON format, HTTP binding 3.2), with the trace
context of the mail according to the distributed tracing extension. The signature is that of Standard Webhooks 1.0.0:
HMAC-SHA256 over id, time and body, so that a receiver can refuse changed and replayed events.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.messages import Lease, SpooledRecipient, trace_id_of

CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
LEAST_KEY_OCTETS: Final = 24  # Standard Webhooks: "between 24 bytes (192 bits) and 64 bytes (512 bits)"
KEY_PREFIX: Final = "whsec_"
TYPE_PREFIX: Final = "smtp.recipient."


class RecipientOutcome(StrEnum):
    """The outcome of a recipient of queued mail."""

    DELIVERED = "delivered"  # an upstream took it
    BOUNCED = "bounced"  # refused permanently, and the sender gets a bounce
    REFUSED = "refused"  # refused permanently, and no bounce is sent
    EXPIRED = "expired"  # too old


class BadKey(ValueError):
    """A key cannot be used; the text says why without quoting the key."""


def key_of(text: str) -> bytes:
    """The key in a file's text: `whsec_` and base64, as in Standard Webhooks, or the text itself.

    Raises:
        BadKey: it is too short, or not base64.
    """
    if text.startswith(KEY_PREFIX):
        encoded = text.removeprefix(KEY_PREFIX).rstrip("=")
        try:
            key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except binascii.Error:
            raise BadKey(f"what follows {KEY_PREFIX} is not base64") from None
    else:
        key = text.encode()
    if len(key) < LEAST_KEY_OCTETS:
        raise BadKey(f"the key has {len(key)} octets, and needs {LEAST_KEY_OCTETS}")
    return key


def signed_headers(key: bytes, event_id: str, unix_seconds: int, body: bytes) -> dict[str, str]:
    """The signature headers of a body sent at a given time (Standard Webhooks, "Signature scheme")."""
    signed = f"{event_id}.{unix_seconds}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode("ascii")
    return {
        "content-type": CONTENT_TYPE,
        "webhook-id": event_id,
        "webhook-timestamp": str(unix_seconds),
        "webhook-signature": f"v1,{signature}",
    }


@dataclass(frozen=True, slots=True)
class Told:
    """The facts of one recipient in a CloudEvent.

    Attributes:
        source: the gateway, as a URI reference.
        ended_at: seconds since the epoch.
        upstream: the name of the one that decided; the route's, if none was asked.
        message_id: the mail's Message-ID field, if it has one.
        reply: the upstream's, or ours in its place; None without one.
        is_final: `reply` decided; otherwise it is the last one before the mail expired.
    """

    outcome: RecipientOutcome
    source: str
    ended_at: float
    upstream: str
    message_id: str | None
    reply: Reply | None
    is_final: bool


def event_body(event_id: str, lease: Lease, recipient: SpooledRecipient, told: Told) -> bytes:
    """The CloudEvent of one recipient's outcome, as JSON in UTF-8.

    Args:
        event_id: without full stops, which separate the signed parts.
        lease: of the mail.
    """
    trace = {name: lease.carrier[name] for name in ("traceparent", "tracestate") if lease.carrier.get(name)}
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": told.source,
        "type": f"{TYPE_PREFIX}{told.outcome}",
        "subject": recipient.recipient.address,
        "time": _timestamp(told.ended_at),
        "datacontenttype": "application/json",
        **trace,
        "data": {
            "outcome": told.outcome.value,
            "recipient": recipient.recipient.address,
            "original_recipient": recipient.recipient.orcpt,
            "sender": lease.mail.reverse_path,
            "message_id": told.message_id,
            "envelope_id": lease.mail.envid,
            "queue_id": lease.message_id,
            "trace_id": trace_id_of(lease.carrier),
            "accepted_time": _timestamp(lease.arrived_at),
            "attempts": lease.attempt,
            "upstream": told.upstream,
            "reply": _reply(told.reply),
            "reply_is_final": told.is_final,
            "possible_duplicate": lease.is_possible_duplicate,
        },
    }
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def _reply(reply: Reply | None) -> Mapping[str, object] | None:
    if reply is None:
        return None
    enhanced = str(reply.enhanced) if reply.enhanced is not None else None
    return {"code": reply.code, "enhanced_code": enhanced, "text": reply.text}


def source_of(hostname: str) -> str:
    """The `source` of a gateway's events."""
    return f"otel-smtp://{hostname}"


def _timestamp(unix_seconds: float) -> str:
    """RFC 3339, in UTC."""
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
