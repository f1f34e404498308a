"""What of upstreams' words is shown: the providers' own stay readable, and nothing that names a person gets out."""

import base64
import binascii
import urllib.parse
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.smtp import replies
from otel_smtp.telemetry.attributes import MAX_VALUE_CHARACTERS
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction

DOMAIN: Final = Redaction(Addresses.DOMAIN)
NONE: Final = Redaction(Addresses.NONE)
HASH: Final = Redaction(Addresses.HASH, hash_key=b"key")
FULL: Final = Redaction(Addresses.FULL)
ANN: Final = HASH.mailbox("ann@example.org")

# As providers and servers say it; none of it names anybody.
AS_IT_IS: Final = (
    "Ok: queued as 4XyZ12",
    "OK a1-20020a5d4d01000000b0033b1dd4c5e3si5432101wrq.123 - gsmtp",
    "OK id=1tGkXj-0001aB-2C",
    "Ok 0100018c9e2faaaa-12345678-1234-1234-1234-123456789abc-000000",
    "Message accepted for delivery",
    "Requested action not taken: mailbox unavailable",
    "The email account that you tried to reach does not exist. Please try double-checking the recipient's email "
    "address for typos or unnecessary spaces.",
    "The email account that you tried to reach is over quota.",
    "Our system has detected an unusual rate of unsolicited mail originating from your IP address.",
    "4.2.2 mailbox is full",
    "552 5.2.2 Over quota",
    "name resolution failed: Name or service not known",
    "name resolution failed: Temporary failure in name resolution",
    "certificate verify failed: self-signed certificate",
    "no reply to DATA within 120 s",
    "connection refused",
    "sorry, no mailbox here by that name. (#5.1.1)",
    "Throttling failure: Maximum sending rate exceeded.",
    "Recipient address rejected: User unknown in virtual mailbox table",
    "Service unavailable; Client host [203.0.113.9] blocked using zen.spamhaus.org",
    "Message too large (25 MB > 10 MB)",
    "Must issue a STARTTLS command first",
    "Greylisted, please try again in 00:05:00",
    "too many connections from your IP, try again later",
    "User unknown; rejecting",
    "mailbox full, user over quota",
    "This message was rejected as spam (score 12.5, DKIM, SPF)",
    "4.7.1 Try again in 300s",
    "Upstream needs TLSv1.2, RFC 8996",
)


@pytest.mark.parametrize("redaction", [DOMAIN, NONE, HASH, FULL], ids=lambda redaction: str(redaction.addresses))
@pytest.mark.parametrize("text", [*AS_IT_IS, *(reply.text for reply in replies.named().values())])
def test_what_names_nobody_stays_as_it_is(text: str, redaction: Redaction) -> None:
    # Runs of blanks say nothing.
    assert redaction.text(text).split() == text.split()


@pytest.mark.parametrize(
    ("text", "domain", "none", "hashed"),
    [
        # An address
        (
            "<ann@example.org>: Recipient address rejected: User unknown",
            "<...@example.org>: Recipient address rejected: User unknown",
            "<...>: Recipient address rejected: User unknown",
            f"<{ANN}>: Recipient address rejected: User unknown",
        ),
        ('"ann lee"@example.org unknown', "...@example.org unknown", "... unknown", None),
        ("ann@[192.0.2.1] unknown", "...@[192.0.2.1] unknown", "... unknown", None),
        ("Rejected:ann@example.org", "...example.org", "...", "..."),
        # in another spelling
        ("ann%40example.org is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann=40example.org is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann(at)example.org is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann [AT] example.org is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann&#64;example.org is unknown", "...;example.org is unknown", "...;... is unknown", "...;... is unknown"),
        ("bad YW5uQGV4YW1wbGUub3Jn here", "bad ... here", "bad ... here", "bad ... here"),
        ("bad id=YW5uQGV4YW1wbGUub3Jn here", "bad ... here", "bad ... here", "bad ... here"),
        ("bad 616e6e406578616d706c652e6f7267 here", "bad ... here", "bad ... here", "bad ... here"),
        ("queued as YW5uQGV4YW1wbGUub3Jn", "queued as ...", "queued as ...", "queued as ..."),
        ("logged in as ann.lee, no", "logged in as ..., no", "logged in as ..., no", "logged in as ..., no"),
        ("queued as ann_lee42", "queued as ...", "queued as ...", "queued as ..."),
        ("rcpt ann refused", "rcpt ... refused", "rcpt ... refused", "rcpt ... refused"),
        # or a part of it
        ("<ann> unknown", "<...> unknown", "<...> unknown", "<...> unknown"),
        ("ann... User unknown", "... User unknown", "... User unknown", "... User unknown"),
        ("ann.lee... User unknown", "... User unknown", "... User unknown", "... User unknown"),
        ("Unknown user ann", "Unknown user ...", "Unknown user ...", "Unknown user ..."),
        ("No such user: ann", "No such user: ...", "No such user: ...", "No such user: ..."),
        ("user ann1985 does not exist", "user ... does not exist", "user ... does not exist", None),
        ("Mailbox 1985 is full", "Mailbox ... is full", "Mailbox ... is full", None),
        ("ann.lee is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann_lee is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann+shop is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("ann1985 is unknown", "... is unknown", "... is unknown", "... is unknown"),
        ("user=ann rejected", "... rejected", "... rejected", "... rejected"),
        ("rcpt=ann rejected", "... rejected", "... rejected", "... rejected"),
        ("+491701234567 unreachable", "... unreachable", "... unreachable", "... unreachable"),
        # What a person wrote
        ('Spam: "Your results, Ann" found', 'Spam: "..." found', 'Spam: "..." found', 'Spam: "..." found'),
        ("Spam: 'Your results' found", "Spam: '...' found", "Spam: '...' found", "Spam: '...' found"),
        ("Spam: `Your results' found", "Spam: `...` found", "Spam: `...` found", None),
        ("Spam: \u201cYour results\u201d found", "Spam: ... found", "Spam: ... found", None),
        ('Spam: "Your results', 'Spam: "..."', 'Spam: "..."', 'Spam: "..."'),
        ("bad Subject: Your results, Ann", "bad Subject: ...", "bad Subject: ...", "bad Subject: ..."),
        ("header From: Ann Lee is bad", "header From: ...", "header From: ...", "header From: ..."),
        # Places
        ("mail from example.com is refused", "mail from example.com is refused", "mail from ... is refused", None),
        (
            "see https://support.google.com/mail/?p=NoSuchUser a1-20020a5d4d01si5432 - gsmtp",
            "see https://support.google.com/mail/?p=NoSuchUser a1-20020a5d4d01si5432 - gsmtp",
            "see ... a1-20020a5d4d01si5432 - gsmtp",
            "see ... a1-20020a5d4d01si5432 - gsmtp",
        ),
        (
            "see https://help.example.com/u?e=ann%40example.org",
            "see https://help.example.com/u?...",
            "see ...",
            "see ...",
        ),
        ("see https://help.example.com/ann%40x/y", "see https://help.example.com/...", "see ...", "see ..."),
        ("see https://ann@example.org/", "see ...", "see ...", "see ..."),
        (
            "<1.ab@mail.example.com> [InternalId=41231686010573, Hostname=AM0PR04MB1234.prod.outlook.com] Queued",
            "<...@mail.example.com> [InternalId=41231686010573, Hostname=AM0PR04MB1234.prod.outlook.com] Queued",
            "<...> [InternalId=41231686010573, ...] Queued",
            None,
        ),
        (
            "Access denied. [AM0EUR02FT012.prod.outlook.com 2026-11-29T02:03:04.123Z 08DC123456789ABC]",
            "Access denied. [AM0EUR02FT012.prod.outlook.com 2026-11-29T02:03:04.123Z 08DC123456789ABC]",
            "Access denied. [... 2026-11-29T02:03:04.123Z 08DC123456789ABC]",
            None,
        ),
    ],
)
def test_what_may_name_somebody_goes(text: str, domain: str, none: str, hashed: str | None) -> None:
    assert DOMAIN.text(text) == domain
    assert NONE.text(text) == none
    if hashed is not None:
        assert HASH.text(text) == hashed
    assert FULL.text(text) == text


@pytest.mark.parametrize(
    ("client_ip", "shown"), [(ClientIp.FULL, "203.0.113.9"), (ClientIp.PREFIX, "203.0.113.0"), (ClientIp.NONE, "...")]
)
def test_ip_addresses_are_shown_as_those_of_clients(client_ip: ClientIp, shown: str) -> None:
    assert Redaction(client_ip=client_ip).text("host [203.0.113.9] is blocked") == f"host [{shown}] is blocked"


SPELLINGS: Final[tuple[Callable[[str], str], ...]] = (
    str,
    urllib.parse.quote_plus,
    lambda address: address.replace("@", "=40"),
    lambda address: address.replace("@", "(at)"),
    lambda address: f'"{address}',
    lambda address: f"<{address.partition('@')[0]}>",
    lambda address: f"user {address.partition('@')[0]}",
    lambda address: f"{address.partition('@')[0]}... rejected",
    lambda address: base64.b64encode(address.encode()).decode(),
    lambda address: base64.urlsafe_b64encode(address.encode()).decode().rstrip("="),
    lambda address: binascii.hexlify(address.encode()).decode(),
    lambda address: f"http://example.org/?{address}",
    lambda address: f"Subject: {address.partition('@')[0]}",
)


@given(
    st.sampled_from(["zebulon", "zeb.ulon", "Zebulon1985", "zebulon+shop", "z_ebulon"]),
    st.sampled_from(SPELLINGS),
    st.sampled_from(["", "5.1.1 ", "Recipient address rejected: ", "(", "Ok: queued as 4XyZ12, for "]),
    st.sampled_from(["", " unknown", ">", ")", "; see https://example.com/"]),
    st.sampled_from([DOMAIN, NONE, HASH]),
)
def test_no_spelling_of_a_local_part_is_shown(
    local: str, spelling: Callable[[str], str], before: str, after: str, redaction: Redaction
) -> None:
    spelled = spelling(f"{local}@example.org")
    shown = redaction.text(before + spelled + after)
    assert local.lower() not in shown.lower()
    if spelled.isalnum():
        assert spelled not in shown


@given(st.text(max_size=2 * MAX_VALUE_CHARACTERS + 10))
def test_any_text_is_shown_within_the_bound(text: str) -> None:
    for redaction in (DOMAIN, NONE, HASH):
        shown = redaction.text(text)
        assert len(shown) <= MAX_VALUE_CHARACTERS
        assert redaction.text(text) == shown
