"""The PROXY header, versions 1 and 2: the client behind a load balancer (haproxy's proxy-protocol.txt).

Pure: octets in, a header out. The listener decides from which peers a header is required and trusted; a header from any
other peer must never be parsed, or every client could choose its own address.

Input is bounded: version 1 by its own 107 octets, version 2 by `MAX_V2_OCTETS`. Additional fields (TLVs) of version 2
are skipped.
"""

import ipaddress
import re
import struct
from dataclasses import dataclass
from typing import Final

from otel_smtp.observing import Endpoint

MAX_V1_OCTETS: Final = 107
"""The longest header of version 1 (section 2.1), CRLF included."""

MAX_V2_OCTETS: Final = 4096
"""Our bound on a version 2 header. The addresses take 232; the rest is room for additional fields, some hundred octets
from a proxy that passes TLS details. The length field itself allows 65551.
"""

SHORTEST_HEADER_OCTETS: Final = 15
"""``PROXY UNKNOWN`` CRLF: this much can be read at once without reading beyond any header."""

_V1_START: Final = b"PROXY "
_V2_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_FIXED_OCTETS: Final = 16
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_UNIX_PATH_OCTETS: Final = 108


class ProxyProtocolError(Exception):
    """The input is no PROXY header; the text never quotes it."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A complete header.

    Attributes:
        source: the client; None if the proxy speaks for itself (LOCAL, a health check) or does not know (UNKNOWN): then
            the connection's own peer counts. An IPv4-mapped IPv6 address is given as IPv4.
        destination: the address that the client connected to; None together with `source`.
        rest: octets behind the header, which belong to the session.
    """

    source: Endpoint | None
    destination: Endpoint | None
    rest: bytes = b""


class ProxyHeaderParser:
    """Takes the octets of one header in pieces of any size."""

    __slots__ = ("_octets",)

    def __init__(self) -> None:
        self._octets = b""

    @property
    def octets_wanted(self) -> int:
        """How many more octets the header has at least: reading that many never reads beyond it."""
        have = len(self._octets)
        if have < SHORTEST_HEADER_OCTETS:
            return SHORTEST_HEADER_OCTETS - have
        if not self._octets.startswith(_V2_SIGNATURE):
            return 1 if self._octets.endswith(b"\r") else 2
        return _V2_FIXED_OCTETS - have if have < _V2_FIXED_OCTETS else _v2_octets(self._octets) - have

    def feed(self, data: bytes) -> ProxyHeader | None:
        """Take octets from the peer.

        Returns:
            The header, once it is complete; None: more is needed.

        Raises:
            ProxyProtocolError: this is not a PROXY header or its beginning, or exceeds the bounds. Close the
                connection.
        """
        octets = self._octets = self._octets + data
        if octets.startswith(_V2_SIGNATURE):
            return _parse_v2(octets)
        if octets.startswith(_V1_START):
            return _parse_v1(octets)
        if not _V2_SIGNATURE.startswith(octets) and not _V1_START.startswith(octets):
            raise ProxyProtocolError("no PROXY header")
        return None


def _parse_v1(octets: bytes) -> ProxyHeader | None:
    end = octets.find(b"\r\n", 0, MAX_V1_OCTETS)
    if end < 0:
        if len(octets) >= MAX_V1_OCTETS:
            raise ProxyProtocolError("version 1 header too long")
        return None
    try:
        words = octets[:end].decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise ProxyProtocolError("version 1 header is not ASCII") from None
    rest = octets[end + 2 :]
    match words[1:]:
        # "the receiver must ignore anything presented before the CRLF"
        case ["UNKNOWN", *_]:
            return ProxyHeader(None, None, rest)
        case ["TCP4", source, destination, source_port, destination_port]:
            version = 4
        case ["TCP6", source, destination, source_port, destination_port]:
            version = 6
        case _:
            raise ProxyProtocolError("malformed version 1 header")
    return ProxyHeader(
        _v1_endpoint(source, source_port, version), _v1_endpoint(destination, destination_port, version), rest
    )


def _v1_endpoint(host: str, port: str, version: int) -> Endpoint:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ProxyProtocolError("malformed address in a version 1 header") from None
    if address.version != version or "%" in host or _PORT.fullmatch(port) is None or int(port) > 0xFFFF:
        raise ProxyProtocolError("malformed address or port in a version 1 header")
    return _endpoint(address, int(port))


def _v2_octets(octets: bytes) -> int:
    """The whole length of the version 2 header that begins in `octets`."""
    return _V2_FIXED_OCTETS + int.from_bytes(octets[14:16], "big")


def _parse_v2(octets: bytes) -> ProxyHeader | None:
    if len(octets) < _V2_FIXED_OCTETS:
        return None
    version, command = octets[12] >> 4, octets[12] & 0xF
    if version != 2 or command > 1:
        raise ProxyProtocolError("unknown version or command")
    length = _v2_octets(octets)
    if length > MAX_V2_OCTETS:
        raise ProxyProtocolError("version 2 header too long")
    if len(octets) < length:
        return None
    body, rest = octets[_V2_FIXED_OCTETS:length], octets[length:]
    if command == 0:
        # LOCAL: "the receiver must accept this connection as valid and must use the real connection endpoints"
        return ProxyHeader(None, None, rest)
    source, destination = _v2_endpoints(octets[13], body)
    return ProxyHeader(source, destination, rest)


def _v2_endpoints(family: int, body: bytes) -> tuple[Endpoint | None, Endpoint | None]:
    try:
        match family:
            case 0x00:  # unspecified
                return None, None
            case 0x11:  # TCP over IPv4
                source4, destination4, source_port, destination_port = struct.unpack_from("!4s4sHH", body)
                return (
                    _endpoint(ipaddress.IPv4Address(source4), source_port),
                    _endpoint(ipaddress.IPv4Address(destination4), destination_port),
                )
            case 0x21:  # TCP over IPv6
                source6, destination6, source_port, destination_port = struct.unpack_from("!16s16sHH", body)
                return (
                    _endpoint(ipaddress.IPv6Address(source6), source_port),
                    _endpoint(ipaddress.IPv6Address(destination6), destination_port),
                )
            case 0x31:  # unix stream
                source_path, destination_path = struct.unpack_from(f"!{_UNIX_PATH_OCTETS}s{_UNIX_PATH_OCTETS}s", body)
                return _unix_endpoint(source_path), _unix_endpoint(destination_path)
    except struct.error:
        raise ProxyProtocolError("version 2 header shorter than its addresses") from None
    # Datagrams cannot carry SMTP; other values "must be rejected as invalid by receivers".
    raise ProxyProtocolError("unknown address family or protocol")


def _endpoint(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Endpoint:
    # A dual-stack proxy writes ::ffff:192.0.2.1; limits and networks must see the same client either way.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return Endpoint(str(mapped or address), port)


def _unix_endpoint(path: bytes) -> Endpoint:
    # An unnamed socket has no path; an abstract one begins with NUL.
    name = path.rstrip(b"\0").decode("ascii", "backslashreplace")
    return Endpoint("".join(character if character.isprintable() else "?" for character in name))
