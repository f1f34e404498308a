"""What is shown of a person is bounded, whatever a peer wrote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.paths import is_visible
from otel_smtp.telemetry.attributes import MAX_DOMAINS, MAX_VALUE_CHARACTERS
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction, clean


@pytest.mark.parametrize("length", [1, MAX_VALUE_CHARACTERS - 2, MAX_VALUE_CHARACTERS - 1, MAX_VALUE_CHARACTERS, 2000])
def test_an_address_literal_keeps_its_brackets_within_the_bound(length: int) -> None:
    shown = Redaction(Addresses.FULL).domain(f"a@[{'x' * length}]")
    assert shown == f"[{'x' * min(length, MAX_VALUE_CHARACTERS - 2)}]"


INVISIBLE = ["\x00", "\x7f", "\x85", "\xa0", "\xad", "\u061c", "\u180e", "\u200b", "\u202e", "\u2028", "\u3000"]
INVISIBLE += ["\ud800", "\ufdd0", "\ufeff", "\ufff9", "\U000e0041"]


@pytest.mark.parametrize("character", [*INVISIBLE, "a", "\xe9", "\u200c", "\u200d", "\u5b57", "\U0001f600"])
def test_what_a_path_refuses_is_cleaned_and_nothing_else(character: str) -> None:
    text = f"a{character}b"
    assert is_visible(text) is (clean(text) == text) is (character not in INVISIBLE)


@given(st.text(max_size=20))
def test_what_is_clean_is_visible_but_for_the_mark_of_what_was_taken_out(text: str) -> None:
    assert is_visible(clean(text).replace("\ufffd", ""))
    assert clean(clean(text)) == clean(text)


def test_domains_of_recipients_are_the_first_few_distinct_ones() -> None:
    recipients = [Recipient(f"a@{name}") for name in ("B.example", "b.EXAMPLE", *(f"x{n}.example" for n in range(20)))]
    shown = Redaction().domains([Recipient("Postmaster"), *recipients])
    assert shown == ("b.example", *(f"x{n}.example" for n in range(MAX_DOMAINS - 1)))
    assert Redaction(Addresses.NONE).domains(recipients) == ()


@pytest.mark.parametrize(
    ("address", "domain"),
    [
        ("", ""),
        ("postmaster", ""),
        ("A@B.Example", "b.example"),
        ('"a@b"@c.example', "c.example"),
        ("a@[192.0.2.1]", None),
    ],
)
def test_a_senders_domain_is_shown_as_far_as_its_address_may_be(address: str, domain: str | None) -> None:
    redaction = Redaction(client_ip=ClientIp.NONE)
    assert redaction.domain(address) == redaction.domain(address) == domain
    assert Redaction(Addresses.NONE).domain(address) is None
