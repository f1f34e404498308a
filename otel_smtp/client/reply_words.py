"""Which of an upstream's words may be shown: harmless words are recognised and kept, all others are hidden.

Upstreams repeat what clients sent: addresses in any spelling (bare, quoted, percent-encoded, encoded), subjects,
display names. No list of such spellings is ever complete, so this one lists what to keep: reply codes and enhanced
codes, numbers, queue ids, plain words, references to a provider's help explain a refusal. A word in a place where names
stand (behind "user", before "...") is kept only if replies are known to use it.

A plain word cannot be distinguished from another plain word: a name amid a sentence stays.
"""

import base64
import binascii
import contextlib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

HIDDEN: Final = "..."

# A mailbox inside free text, wider than RFC 5321's grammar on purpose: a quoted or bare local part up to the @, then
# anything that could be a domain or an address literal.
_MAILBOX: Final = r"""(?:"(?:[^"\\]|\\.){0,256}"|[^\s<>()\[\],;:"'@]{1,256})@(?:\[[^\]\s]{0,64}\]|[\w.-]*)"""
_PIECE: Final = re.compile(
    rf"""
      (?P<mailbox>{_MAILBOX})
    | (?P<spelled>[\w.+-]{{1,64}}\s?[(\[{{]\s?at\s?[)\]}}]\s?[\w.-]{{1,255}})
    | (?P<quoted>"[^"]*(?:"|\Z) | (?<!\w)['`][^'`]*(?:['`](?!\w)|\Z) | [\u201c\u201e\xab][^\u201c\u201d\xbb]*)
    | (?P<url>https?://[^\s<>"']+)
    | (?P<word>[^\s<>()\[\]{{}},;"@]+)
    | (?P<space>\s+)
    | (?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_PLAIN: Final = re.compile(r"[^\W\d_]{1,32}(?:['/-][^\W\d_]{1,32}){0,4}")
_CODE: Final = re.compile(r"#?(?:[245]\d\d[- ]?)?(?:[245]\.\d{1,3}\.\d{1,3})?")
_NUMBER: Final = re.compile(r"[+-]?\d{1,6}(?:[.,:/-]\d{1,4}){0,6}(?:[A-Za-z]{1,3}|%)?")
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?")
_ID: Final = re.compile(r"[A-Za-z0-9]{1,64}(?:[-._][A-Za-z0-9]{1,64}){0,8}")
_LIKE_A_NAME: Final = re.compile(r"[A-Za-z]+(?:[._-][A-Za-z]+)*[._-]?\d{0,4}|\d+(?:[._-]\d+)*")
# "ann.lee", "ann_lee42": no queue makes such ids, and "as" may precede a person's name too.
_JOINED_NAMES: Final = re.compile(r"[A-Za-z]{2,}(?:[._][A-Za-z]{2,})+\d{0,4}")
_DOMAIN: Final = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.){1,10}([A-Za-z]{2,24}|xn--[A-Za-z0-9-]{1,59})")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{12,}={0,2}")
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2}){8,}")
_LEADING: Final = "-*#.:/!'"
_TRAILING: Final = ".:!?'-*/"
# Behind these the next word is an id, of whatever shape.
_BEFORE_ID: Final = frozenset(
    {"as", "id", "qp", "ref", "reference", "ticket", "queue", "internalid", "hostname", "trace"}
)
# Behind these the next word may be a name.
_BEFORE_NAME: Final = frozenset(
    {
        "rcpt",
        "user",
        "username",
        "userid",
        "mailbox",
        "account",
        "recipient",
        "alias",
        "address",
        "sender",
        "member",
        "name",
    }
)
# Behind these and a colon or equals sign, the rest of the text is a person's own words.
_BEFORE_WORDS: Final = frozenset({"subject", "from", "to", "cc", "bcc", "reply-to", "header", "body", "message-id"})
_TECHNICAL: Final = frozenset(
    {
        "8bitmime",
        "base64",
        "e-mail",
        "ipv4",
        "ipv6",
        "oauth2",
        "rfc2821",
        "rfc2822",
        "rfc5321",
        "rfc5322",
        "rfc6531",
        "rfc7505",
        "rfc821",
        "rfc822",
        "sha1",
        "sha256",
        "smtputf8",
        "tlsv1",
        "tlsv1.2",
        "tlsv1.3",
        "utf-8",
        "xoauth2",
    }
)
# Words of replies, in places where a word may also be a name.
_WORDS: Final = """
    a able accept accepted accepting access account accounts action active address addresses administrator again age
    alias aliases all allowed already also an and another any are as at attempts authenticated authentication authorized
    available bad be been before being blacklisted block blocked bounced box but by can can't cannot check closed code
    command complaints complexity content correct could currently database deactivated deferred delayed deleted delivery
    denied desk directory disabled disk do does doesn't domain doubtful due duplicate e-mail email empty error errors
    exceed exceeded exceeds exist existing exists expired failed failure field file filter for format found from frozen
    full get greylisted group has have here host id if ignored in inactive inbox incorrect index info insufficient
    interface into invalid is isn't it its limit limited limits list listed local locked log lookup loop mail mailbox
    mailboxes map maximum may member message messages might missing moved must name names needs never no non-existent
    none nonexistent not now null of off ok on only open or other our out over overquota paused permanently permission
    please policy possible prohibited protected quota quotas rate receive received receiving recipient recipients
    refused reject rejected relay relaying removed reputation required requires restricted retired reuse route said
    search see send sender senders sending server service should size space spam storage store such suspended syntax
    table temporarily temporary terminated than that the their there this time timeout to today too tried try unable
    unauthorized unavailable undeliverable unknown unreachable unroutable unrouteable until unverified usage user
    username users using valid verification verified verify virtual was were what which while whitelist who will with
    within without wrong you your resolution
"""
_VOCABULARY: Final = frozenset(_WORDS.split())
_GENERIC_DOMAINS: Final = frozenset(
    {
        "com",
        "net",
        "org",
        "edu",
        "gov",
        "mil",
        "int",
        "info",
        "biz",
        "eu",
        "dev",
        "app",
        "cloud",
        "mail",
        "email",
        "online",
        "site",
        "tech",
        "example",
        "test",
        "invalid",
        "localhost",
        "local",
        "internal",
        "lan",
        "arpa",
    }
)
# Services that list senders, not a person's domain; shown under every policy.
_LISTS: Final = (".spamhaus.org", ".spamcop.net", ".sorbs.net", ".barracudacentral.org", ".surbl.org", ".uribl.com")


@dataclass(frozen=True, slots=True)
class Shown:
    """How recognised words are shown.

    Attributes:
        mailbox: takes a mailbox as it stood in the text.
        ip: takes an IP address; None hides it.
        has_domains: domains are shown.
    """

    mailbox: Callable[[str], str]
    ip: Callable[[str], str | None]
    has_domains: bool


def shown_words(text: str, shown: Shown) -> str:
    """`text` with everything that is not recognised replaced by `HIDDEN`. Takes time that grows with its length."""
    return _Reading(shown).of(text)


class _Reading:
    """One pass over a text."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._out: list[str] = []
        self._before = ""  # the plain word before, in lower case
        self._is_hidden = False  # what was written last

    def of(self, text: str) -> str:
        in_angles = False
        for found in _PIECE.finditer(text):
            kind, piece = found.lastgroup, found[0]
            if kind == "space":
                self._out.append(" ")
            elif kind == "mark":
                in_angles = piece == "<" or (in_angles and piece != ">")
                self._put(piece if piece in "<>()[]{},;" else HIDDEN)
            elif kind == "mailbox":
                self._put(self._shown.mailbox(piece))
            elif kind == "word" and not in_angles:
                if self._ends_at(piece):
                    break
                self._put(self._word(piece))
            elif kind == "url":
                self._put(self._url(piece))
            elif kind == "quoted" and piece[0] in "\"'`":
                self._put(f"{piece[0]}{HIDDEN}{piece[0]}")
            else:
                self._put(HIDDEN)
        return "".join(self._out).strip()

    def _put(self, piece: str) -> None:
        is_hidden = piece == HIDDEN
        if is_hidden and self._is_hidden:
            if self._out[-1] == " ":
                self._out.pop()
            return
        self._is_hidden = is_hidden
        self._out.append(piece)

    def _ends_at(self, word: str) -> bool:
        """Whether all behind `word` is a person's own words; if so, it has been written."""
        label, sign, _ = word.partition(":") if ":" in word else word.partition("=")
        if sign and label.lower() in _BEFORE_WORDS:
            self._put(label + sign)
            self._out.append(f" {HIDDEN}")
            return True
        return False

    def _word(self, word: str) -> str:
        core = word.lstrip(_LEADING)
        leading = word[: len(word) - len(core)]
        core = core.rstrip(_TRAILING)
        trailing = word[len(leading) + len(core) :]
        before, self._before = self._before, ""
        if not core:
            self._before = before
            return word
        if len(core) > 128:
            return HIDDEN
        if _PLAIN.fullmatch(core):
            small = core.lower()
            # sendmail: "ann... User unknown"
            may_be_name = before in _BEFORE_NAME or trailing.startswith("..")
            if may_be_name and small not in _VOCABULARY:
                return HIDDEN + trailing.lstrip(".")
            self._before = small
            return word
        known = self._known(core, before)
        return HIDDEN + trailing.lstrip(".") if known is None else leading + known + trailing

    def _known(self, core: str, before: str) -> str | None:
        """A word that is not plain, as it is shown; None if it is not recognised."""
        if core.lower() in _TECHNICAL or _CODE.fullmatch(core):
            return core
        address = _ip(core)
        if address is not None:
            return self._shown.ip(core)
        if before in _BEFORE_NAME:
            return None
        if _NUMBER.fullmatch(core) or _MOMENT.fullmatch(core):
            return core
        key, sign, value = core.partition("=")
        if sign:
            return self._pair(key, value)
        if _hides_text(core):
            return None
        domain = _DOMAIN.fullmatch(core)
        if domain is not None and domain[1].lower() in _GENERIC_DOMAINS | {domain[1].lower()[:2]}:
            is_shown = self._shown.has_domains or f".{core.lower()}".endswith(_LISTS)
            return core if is_shown else None
        if _ID.fullmatch(core) is None:
            return None
        if before in _BEFORE_ID:
            return None if before != "hostname" and _JOINED_NAMES.fullmatch(core) else core
        return None if len(core) < 5 or _LIKE_A_NAME.fullmatch(core) else core

    def _pair(self, key: str, value: str) -> str | None:
        small = key.lower()
        if small in _BEFORE_NAME or not (small in _BEFORE_ID or small in _VOCABULARY or small == "p"):
            return None
        if _PLAIN.fullmatch(value):
            return f"{key}={value}"
        if _DOMAIN.fullmatch(value) and small != "hostname":
            return None
        known = self._known(value, small)
        return None if known is None else f"{key}={known}"

    def _url(self, url: str) -> str:
        """Scheme, host, plain path and the plain parts of the query. All else may name a person."""
        self._before = ""
        if not self._shown.has_domains:
            return HIDDEN
        scheme, _, rest = url.partition("://")
        place, mark, query = rest.partition("?")
        host, _, path = place.partition("/")
        trailing = url[len(url.rstrip(_TRAILING)) :]
        if not _DOMAIN.fullmatch(host.rstrip(_TRAILING)):
            return HIDDEN
        steps: list[str] = []
        for step in path.rstrip(_TRAILING).split("/"):
            if step and not (_PLAIN.fullmatch(step) or _NUMBER.fullmatch(step)):
                return f"{scheme}://{'/'.join([host, *steps, HIDDEN])}"
            steps.append(step)
        told = f"{scheme}://{place}"
        if not mark:
            return told
        query = query.rstrip(_TRAILING)
        key, sign, value = query.partition("=")
        if sign and len(key) <= 2 and _PLAIN.fullmatch(key) and _PLAIN.fullmatch(value):
            return f"{told}?{query}{trailing}"
        return f"{told}?{HIDDEN}"


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _hides_text(word: str) -> bool:
    """Whether `word` is readable text in base64 or in hexadecimal digits; an id almost never is."""
    decoded = []
    if _HEX.fullmatch(word):
        decoded.append(bytes.fromhex(word))
    if _BASE64.fullmatch(word):
        bare = word.rstrip("=").replace("-", "+").replace("_", "/")
        with contextlib.suppress(binascii.Error):  # no base64 after all
            decoded.append(base64.b64decode(bare + "=" * (-len(bare) % 4)))
    return any(octets.isascii() and octets.decode("ascii").isprintable() for octets in decoded)
