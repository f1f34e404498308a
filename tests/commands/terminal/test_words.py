"""The text beside a bar: attributes in words, the most important first."""

from typing import Any

import pytest

from otel_smtp.commands.terminal.words import counted, duration, event_words, octets, span_words


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("smtp.state.new", {"smtp.tls.mode": "off", "smtp.state": "New", "smtp.state.sequence": 1}, []),
        ("smtp.state.new", {"smtp.tls.mode": "implicit"}, ["implicit"]),
        ("smtp.state.auth", {"smtp.auth.mechanism": "PLAIN"}, ["PLAIN"]),
        ("smtp.state.reset", {"smtp.reset.cause": "rset"}, ["rset"]),
        (
            "smtp.state.data",
            {"smtp.transaction.number": 2, "smtp.transaction.recipient_count": 1},
            ["message 2", "1 recipient"],
        ),
        (
            "smtp.state.error",
            {"error.type": "syntax", "smtp.reply.enhanced_code": "5.5.2", "smtp.reply.code": 500, "smtp.verb": "other"},
            ["other", "500 5.5.2", "syntax"],
        ),
        (
            "smtp.state.closed",
            {
                "smtp.close.reason": "quit",
                "smtp.connection.messages": 0,
                "smtp.connection.octets_received": 1536,
                "smtp.connection.octets_sent": 20,
                "smtp.connection.duration": 0.1,
            },
            ["quit", "0 messages", "1.5 KiB in, 20 B out"],
        ),
        ("smtp.upstream.pool", {}, []),
        ("whatever", {"b": 0.123456789, "a": ("x", "y"), "smtp.c": True}, ["a=x,y", "b=0.1235", "c=true"]),
    ],
)
def test_events(name: str, attributes: dict[str, Any], expected: list[str]) -> None:
    assert [word.text for word in event_words(name, attributes)] == expected


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("smtp.connection", {}, []),
        (
            "smtp.connection",
            {
                "client.address": "192.0.2.1",
                "client.port": 7,
                "network.peer.address": "10.0.0.1",
                "network.peer.port": 9,
            },
            ["192.0.2.1:7", "by 10.0.0.1"],  # a PROXY header
        ),
        (
            "smtp.connection",
            {"client.address": "::1", "client.port": 7, "network.peer.address": "::1", "smtp.connection.segment": 1},
            ["[::1]:7"],
        ),
        ("smtp.connection", {"smtp.connection.segment": 2, "tls.protocol.version": "1.3"}, ["segment 2", "TLS 1.3"]),
        ("smtp.connection", {"server.address": "/run/gw.sock"}, ["→ /run/gw.sock"]),
        (
            "smtp.transaction",
            {"smtp.outcome": "aborted", "smtp.mail.from.domain": "", "smtp.rcpt.domains": ("a.example", "b.example")},
            ["aborted", "<> → a.example,b.example"],
        ),
        ("smtp.transaction", {"smtp.mail.from.domain": "a.example"}, ["from a.example"]),
        ("smtp.transaction", {"smtp.spool.id": "7"}, ["spool.id=7"]),
        (
            "smtp.delivery",
            {
                "server.address": "mail.example",
                "server.port": 25,
                "network.peer.address": "192.0.2.7",
                "smtp.delivery.attempt": 2,
                "smtp.round_trips": 1,
                "error.type": "upstream_tls",
            },
            ["→ mail.example:25", "192.0.2.7", "attempt 2", "1 round trip", "upstream_tls"],
        ),
        ("smtp.delivery", {"smtp.pool.reused": True, "smtp.pool.wait": 0.00002}, ["connection reused"]),
        (
            "smtp.delivery",
            {"smtp.pool.reused": False, "smtp.pool.wait": 0.5},
            ["new connection", "waited 500.0 ms"],
        ),
    ],
)
def test_spans(name: str, attributes: dict[str, Any], expected: list[str]) -> None:
    assert [word.text for word in span_words(name, attributes)] == expected


def test_figures_for_people() -> None:
    assert [octets(count) for count in (0, 1023, 1024, 5 * 1024 * 1024)] == ["0 B", "1023 B", "1.0 KiB", "5.0 MiB"]
    assert [duration(ns) for ns in (0, 1_230_000, 53_120_000, 2_500_000_000)] == [
        "0.00 ms", "1.23 ms", "53.1 ms", "2.50 s",
    ]  # fmt: skip
    assert [counted(count, "mail") for count in (0, 1, 2)] == ["0 mails", "1 mail", "2 mails"]
