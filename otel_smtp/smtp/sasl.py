"""SASL messages, both sides: PLAIN, LOGIN, XOAUTH2, OAUTHBEARER (RFC 4954, RFC 4616, RFC 7628).

Pure: octets to credentials and back. Verifying credentials, and SCRAM's key exchange, are not done here.

Two servers can disagree about a message only if it can be read in two ways, so ambiguous messages are refused: base64
has one form, PLAIN has exactly two NULs, a name holds no control or invisible character, and an authorization identity
that differs from the authenticated one is refused (acting for another user is not supported).

Secrets are kept out of every ``repr``.
"""

import base64
import binascii
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Final

from otel_smtp.smtp.paths import is_visible

MECHANISMS: Final = ("PLAIN", "LOGIN", "SCRAM-SHA-256", "XOAUTH2", "OAUTHBEARER")
"""Every mechanism that the gateway supports, and every name that telemetry may show; all others are "other"."""

LOGIN_CHALLENGES: Final = (b"Username:", b"Password:")
"""LOGIN's prompts, in order; clients look for exactly these words (draft-murchison-sasl-login)."""

MAX_NAME_OCTETS: Final = 255
"""RFC 4616 2: authcid = 1*SAFE, of which RFC 2595 6 says "1*255"."""

OAUTH_REFUSED: Final = b'{"status":"invalid_token","schemes":"bearer"}'
"""The challenge that tells an OAuth client why it fails; its answer is ignored (RFC 7628 3.2.3)."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # b64token (RFC 6750 2.1)
_GS2_HEADER = re.compile(r"[ny],(?:a=([^,]*))?,")
_KEY = re.compile(r"[A-Za-z]+")  # of a kvpair (RFC 7628 3.1)
_SEPARATOR: Final = "\x01"


class SaslError(ValueError):
    """A message is malformed; the text never quotes it."""


@dataclass(frozen=True, slots=True)
class Password:
    """A name and its password."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A token and the name that the client claims."""

    name: str  # "" where OAUTHBEARER named none
    token: str = field(repr=False)


def decode_base64(text: bytes) -> bytes:
    """Decode `text`, which must be canonical base64 (RFC 4648 4, RFC 4954 4).

    White space, other alphabets, missing or superfluous padding and stray bits under the padding are refused.

    Raises:
        SaslError: it is not.
    """
    try:
        decoded = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise SaslError("not base64") from None
    if base64.b64encode(decoded) != text:
        raise SaslError("not canonical base64")
    return decoded


def prepare_name(name: str) -> str:
    """`name` in the form in which names are compared (NFKC, as SASLprep has it: RFC 4013 2.2).

    Raises:
        SaslError: it is empty, too long, or holds control or invisible characters.
    """
    try:
        prepared = unicodedata.normalize("NFKC", name)
        too_long = len(prepared.encode()) > MAX_NAME_OCTETS
    except UnicodeEncodeError:
        raise SaslError("not a name") from None
    if not prepared or too_long or not is_visible(prepared):
        raise SaslError("not a name")
    return prepared


def parse_plain(message: bytes) -> Password:
    """Read PLAIN's one message: authzid NUL authcid NUL password (RFC 4616 2).

    Raises:
        SaslError: it is malformed, or asks to act for another user.
    """
    parts = message.split(b"\0")
    if len(parts) != 3:
        raise SaslError("PLAIN has exactly two NULs")
    authorized, name, password = (_text(part) for part in parts)
    name = prepare_name(name)
    if authorized and prepare_name(authorized) != name:
        raise SaslError("an authorization identity of its own")
    return Password(name, _password(password))


def build_plain(name: str, password: str) -> bytes:
    """PLAIN's one message.

    Raises:
        SaslError: name or password cannot be sent by it.
    """
    return b"\0".join((b"", _name_to_send(name), _password(password).encode()))


def parse_login(name: bytes, password: bytes) -> Password:
    """Read LOGIN's two answers.

    Raises:
        SaslError: one of them is malformed.
    """
    return Password(prepare_name(_text(name)), _password(_text(password)))


def build_login(name: str, password: str) -> tuple[bytes, bytes]:
    """LOGIN's two answers; errors as `build_plain`."""
    return _name_to_send(name), _password(password).encode()


def parse_xoauth2(message: bytes) -> BearerToken:
    """Read XOAUTH2's one message: "user=" name ^A "auth=Bearer " token ^A ^A.

    Raises:
        SaslError: it is malformed.
    """
    pairs = _pairs(_text(message))
    if set(pairs) != {"user", "auth"}:
        raise SaslError("XOAUTH2 has user and auth")
    return BearerToken(prepare_name(pairs["user"]), _bearer(pairs["auth"]))


def build_xoauth2(name: str, token: str) -> bytes:
    """XOAUTH2's one message; errors as `build_plain`."""
    return b"user=%b\x01auth=Bearer %b\x01\x01" % (_name_to_send(name), _token_to_send(token))


def parse_oauthbearer(message: bytes) -> BearerToken:
    """Read OAUTHBEARER's one message: a GS2 header, ^A, pairs each with ^A, ^A (RFC 7628 3.1).

    Host and port in the message are ignored: the client's idea of the server's address proves nothing.

    Raises:
        SaslError: it is malformed, or wants channel binding.
    """
    header, separator, rest = _text(message).partition(_SEPARATOR)
    match = _GS2_HEADER.fullmatch(header)
    if match is None or not separator:
        raise SaslError("no GS2 header")
    name = "" if not match[1] else prepare_name(_unescape(match[1]))
    return BearerToken(name, _bearer(_pairs(rest).get("auth", "")))


def _text(octets: bytes) -> str:
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        raise SaslError("not UTF-8") from None


def _password(password: str) -> str:
    if not password or "\0" in password:
        raise SaslError("not a password")
    return password


def _name_to_send(name: str) -> bytes:
    if not name or not is_visible(name):
        raise SaslError("not a name")
    return name.encode()


def _token_to_send(token: str) -> bytes:
    if _TOKEN.fullmatch(token) is None:
        raise SaslError("not a bearer token")
    return token.encode("ascii")


def _pairs(text: str) -> dict[str, str]:
    """The key=value pairs of `text`, each followed by ^A, and the last by one more."""
    if not text.endswith(_SEPARATOR * 2):
        raise SaslError("pairs without their end")
    pairs: dict[str, str] = {}
    for pair in text[:-2].split(_SEPARATOR):
        key, equals, value = pair.partition("=")
        if not equals or _KEY.fullmatch(key) is None or not is_visible(value) or key.lower() in pairs:
            raise SaslError("not a pair, or one given twice")
        pairs[key.lower()] = value
    return pairs


def _bearer(value: str) -> str:
    scheme, _, token = value.partition(" ")
    token = token.lstrip(" ")
    if scheme.lower() != "bearer" or _TOKEN.fullmatch(token) is None:
        raise SaslError("no bearer token")
    return token


def _unescape(name: str) -> str:
    """A saslname as text: "=2C" is a comma, "=3D" an equals sign, any other "=" is wrong (RFC 5801 4)."""
    if re.search("=(?!2C|3D)", name) is not None:
        raise SaslError("not a saslname")
    return name.replace("=2C", ",").replace("=3D", "=")
