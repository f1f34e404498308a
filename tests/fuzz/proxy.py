"""Target: the PROXY header. Octet 0 says how the rest, the header and what follows it, is cut.

Claimed: only `ProxyProtocolError` is raised; cutting changes nothing; reading `octets_wanted` takes nothing of what
stands behind the header; what is taken for an address is one; no text has control characters.
"""

import ipaddress

from otel_smtp.observing import Endpoint
from otel_smtp.server.proxy_protocol import MAX_V2_OCTETS, ProxyHeader, ProxyHeaderParser, ProxyProtocolError
from tests.fuzz.server import pieces


def run(data: bytes) -> None:
    """Parse one header whole, cut, and as the listener reads it."""
    if not data:
        return
    cut, octets = data[0], data[1:]
    whole = _parsed([octets] if octets else [])
    parts = list(pieces(octets, cut))
    assert _parsed(parts) == whole
    careful = _carefully(octets)
    if whole is not None and careful is not None:
        assert careful == ProxyHeader(whole.source, whole.destination)
    else:
        assert careful == whole
    for endpoint in (whole.source, whole.destination) if whole is not None else ():
        _judge(endpoint)


def _parsed(parts: list[bytes]) -> ProxyHeader | None:
    """The header, with all that stands behind it; None where there is none."""
    parser = ProxyHeaderParser()
    for index, part in enumerate(parts):
        try:
            header = parser.feed(part)
        except ProxyProtocolError:
            return None
        if header is not None:
            return ProxyHeader(header.source, header.destination, header.rest + b"".join(parts[index + 1 :]))
    return None


def _carefully(octets: bytes) -> ProxyHeader | None:
    parser = ProxyHeaderParser()
    position = 0
    while position < len(octets):
        wanted = parser.octets_wanted
        assert 0 < wanted <= MAX_V2_OCTETS
        try:
            header = parser.feed(octets[position : position + wanted])
        except ProxyProtocolError:
            return None
        position += wanted
        if header is not None:
            assert header.rest == b"", "took what stands behind the header"
            return header
    return None


def _judge(endpoint: Endpoint | None) -> None:
    if endpoint is None:
        return
    assert endpoint.host.isprintable()
    if endpoint.port is not None:
        assert 0 <= endpoint.port <= 0xFFFF
        address = ipaddress.ip_address(endpoint.host)
        assert getattr(address, "ipv4_mapped", None) is None
