"""What we offer an upstream of TLS 1.2."""

import ssl

import pytest
import trustme

from otel_smtp.forwarding.tls import UpstreamTlsContext


def agree(upstream: ssl.SSLContext, ours: ssl.SSLContext) -> str:
    """The suite that a handshake ends with."""
    to_upstream, to_us = ssl.MemoryBIO(), ssl.MemoryBIO()
    us = ours.wrap_bio(to_us, to_upstream, server_hostname="localhost")
    left = [us, upstream.wrap_bio(to_upstream, to_us, server_side=True)]
    while left:
        side = left.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            left.append(side)
    cipher = us.cipher()
    assert cipher is not None
    return cipher[0]


@pytest.mark.parametrize(
    ("suite", "is_taken"),
    [
        ("ECDHE-RSA-AES256-GCM-SHA384", True),
        ("ECDHE-RSA-CHACHA20-POLY1305", True),
        ("ECDHE-RSA-AES128-SHA256", False),  # CBC
        ("AES256-GCM-SHA384", False),  # no forward secrecy
    ],
)
def test_an_upstream_of_tls_1_2_gets_authenticated_encryption_or_nothing(suite: str, is_taken: bool) -> None:
    authority = trustme.CA()
    upstream = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", key_type=trustme.KeyType.RSA).configure_cert(upstream)
    upstream.maximum_version = ssl.TLSVersion.TLSv1_2
    upstream.set_ciphers(suite)
    ours = UpstreamTlsContext.create()
    authority.configure_trust(ours)
    if is_taken:
        assert agree(upstream, ours) == suite
    else:
        with pytest.raises(ssl.SSLError, match=r"(?i)no.shared.cipher"):
            agree(upstream, ours)
