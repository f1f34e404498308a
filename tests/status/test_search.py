"""What is found of a trace, by which words, and what an address becomes where addresses are not held."""

from collections.abc import Mapping
from typing import Any

import pytest

from otel_smtp.gateway.status_port import recorded_mailbox
from otel_smtp.status.search import TraceIndex, parse
from otel_smtp.telemetry.redaction import Addresses, Redaction

TRACE_ID = "004bf92f3577b34da6a3ce929d0e0e47"
KEY = b"key"

TRANSACTION: Mapping[str, Any] = {
    "smtp.outcome": "partly_relayed",
    "smtp.mail.from.domain": "Shop.Example",
    "smtp.rcpt.domains": ("example.net", "example.org"),
    "smtp.message.id": "<17.Order@shop.example>",
    "smtp.spool.id": "01J9ZQ4T3M",
    "smtp.message.size": 551,
}
RECIPIENT: Mapping[str, Any] = {
    "smtp.rcpt.domain": "example.org",
    "smtp.rcpt.address": "ann@example.org",
    "smtp.reply.code": 550,
    "smtp.reply.enhanced_code": "5.1.1",
    "smtp.reply.text": "<ann@example.org>: Recipient address rejected: User unknown",
    "smtp.recipient.fate": "refused",
    "smtp.upstream.name": "provider",
}
DELIVERY: Mapping[str, Any] = {
    "smtp.reply.code": 250,
    "smtp.reply.enhanced_code": "2.0.0",
    "smtp.reply.text": "Ok: queued as 4XyZ12",
    "smtp.failure.reason": "certificate verify failed: self-signed certificate",
}
INDEX = TraceIndex(TRACE_ID, [TRANSACTION, RECIPIENT, DELIVERY], ["refused"])


@pytest.mark.parametrize(
    "query",
    [
        "to:example.org",
        "to:EXAMPLE.net",
        "to:ann@example.org",
        "to:<ann@example.org>",
        "from:shop",
        "code:550",
        "code:5xx",
        "code:5yz",
        "code:5",
        "code:5.1.1",
        "code:5.1",
        "code:250",
        "text:unknown",
        'text:"user unknown"',
        'text:"self-signed cert',
        "text:4xyz12",
        "id:3577b34",
        "id:3577B34",
        "id:004bf92f-3577-b34d-a6a3-ce929d0e0e47",
        "id:order@shop",
        "id:01J9ZQ",
        "577b34da6a3c",
        "5.1.1",
        "550",
        "01j9zq4t3m",
        "ann@example.org",
        "17.order@shop.example",
        "partly_relayed",
        "provider to:example.org code:5.1.1 text:unknown",
        "refused",
        "",
    ],
)
def test_it_is_found(query: str) -> None:
    assert INDEX.has(parse(query))


@pytest.mark.parametrize(
    "query",
    [
        "to:shop.example",
        "to:5.1.1",
        "from:example.org",
        "code:551",  # a size, and no code
        "551",
        "code:4xx",
        "code:5.1.10",
        "code:5.1.1.1",
        "code:.1.1",
        "code:refused",
        "text:example.net",
        "text:provider",
        "id:provider",
        "id:3577b35",
        "f92f3",  # of an id, but too short to be taken for one
        'text:"unknown user"',
        "to:example.org code:451",
    ],
)
def test_it_is_not_found(query: str) -> None:
    assert not INDEX.has(parse(query))


def test_the_beginning_of_an_enhanced_code_ends_at_a_dot() -> None:
    index = TraceIndex(TRACE_ID, [{"smtp.reply.enhanced_code": "5.10.0"}])
    assert index.has(parse("code:5.10"))
    assert not index.has(parse("code:5.1"))


def test_what_only_looks_like_a_field_is_a_word() -> None:
    index = TraceIndex(TRACE_ID, [{"client.address": "2001:db8::25", "smtp.helo": "to"}])
    assert index.has(parse("2001:db8::25"))
    assert index.has(parse("to:")), "no word yet: it is being typed"
    assert not index.has(parse("cc:ann"))


@pytest.mark.parametrize(
    ("addresses", "query", "is_found", "note"),
    [
        (Addresses.FULL, "to:ann@example.org", True, ""),
        (Addresses.FULL, "to:bob@example.org", False, ""),
        (Addresses.DOMAIN, "to:ann@example.org", True, "searched for example.org"),
        (Addresses.DOMAIN, "ann@example.org", True, "searched for example.org"),
        (Addresses.DOMAIN, "to:ann@example.com", False, "searched for example.com"),
        (Addresses.DOMAIN, "to:example.org", True, ""),
        (Addresses.DOMAIN, "to:@example.org", False, ""),
        (Addresses.HASH, "to:Ann@example.org", True, ""),
        (Addresses.HASH, "ann@example.org", True, ""),
        (Addresses.HASH, "to:bob@example.org", False, ""),
        (Addresses.HASH, "to:example.org", False, "give a whole address"),
        (Addresses.HASH, "relayed", True, ""),
        (Addresses.NONE, "to:ann@example.org", False, "nothing of senders and recipients"),
        (Addresses.NONE, "relayed", True, ""),
    ],
)
def test_an_address_is_searched_for_as_it_is_held(addresses: Addresses, query: str, is_found: bool, note: str) -> None:
    redaction = Redaction(addresses, hash_key=KEY if addresses is Addresses.HASH else b"")
    held = redaction.mailbox("ann@example.org"), redaction.domain("ann@example.org")
    shown = {
        name: value
        for name, value in zip(("smtp.rcpt.address", "smtp.rcpt.domain"), held, strict=True)
        if value is not None
    }
    asked = parse(query, lambda text: recorded_mailbox(text, redaction))
    assert TraceIndex(TRACE_ID, [{**shown, "smtp.outcome": "relayed"}]).has(asked) is is_found
    if note:
        [told] = asked.notes
        assert note in told
        assert f"telemetry.addresses = {addresses}" in told
    else:
        assert asked.notes == ()


def test_a_long_query_is_cut() -> None:
    assert len(parse("a " * 100_000).words) == 200
