"""What we offer an upstream of TLS 1.2."""

import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from otel_smtp.forwarding.tls import TlsFileError, UpstreamTlsContext


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"ca_file": "text"}, r"^ca_file .*/text: no certificate or crl found$"),
        ({"ca_file": "nowhere"}, r"^ca_file .*/nowhere: No such file or directory$"),
        ({"certificate_file": "text", "key_file": "key"}, r"^tls_cert .*/text, tls_key .*/key: .*not "),
        ({"certificate_file": "cert", "key_file": "other"}, r"tls_key .*/other: key values mismatch$"),
        # Without a refusal OpenSSL would ask for the passphrase at the terminal.
        (
            {"certificate_file": "cert", "key_file": "locked"},
            r"tls_key .*/locked: the key is protected by a passphrase$",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(names: dict[str, str], expected: str, tmp_path: Path) -> None:
    ca = trustme.CA()
    mine, other = ca.issue_cert("us.example"), ca.issue_cert("us.example")
    mine.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    mine.private_key_pem.write_to_path(tmp_path / "key")
    other.private_key_pem.write_to_path(tmp_path / "other")
    (tmp_path / "text").write_text("no certificate\n")
    key = serialization.load_pem_private_key(mine.private_key_pem.bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "locked").write_bytes(key.private_bytes(pem, pkcs8, locked))
    with pytest.raises(TlsFileError, match=expected):
        UpstreamTlsContext.create(**{key: str(tmp_path / name) for key, name in names.items()})
    UpstreamTlsContext.create(certificate_file=str(tmp_path / "cert"), key_file=str(tmp_path / "key"))
