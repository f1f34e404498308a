"""Contexts for clients: versions, sessions between listeners, certificates replaced and broken."""

import ssl
from pathlib import Path

import pytest
import trustme

from otel_smtp.server.tls import CertificateError, server_context

AUTHORITY = trustme.CA()
FIRST = AUTHORITY.issue_cert("localhost")
SECOND = AUTHORITY.issue_cert("localhost")


def write(directory: Path, certificate: trustme.LeafCert, *, key: trustme.LeafCert | None = None) -> tuple[Path, Path]:
    certificate_file, key_file = directory / "cert.pem", directory / "key.pem"
    certificate_file.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key_file.write_bytes((key or certificate).private_key_pem.bytes())
    key_file.chmod(0o600)
    return certificate_file, key_file


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    return context


def shake_hands(
    server_context: ssl.SSLContext, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLObject:
    """The client's end of a connection on which one octet went from server to client: so its tickets have arrived."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    left = [client, server]
    while left:
        side = left.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            left.append(side)
    server.write(b"x")
    assert client.read(1) == b"x"
    return client


def test_a_handshake_gives_tls_1_3_and_the_certificate(tmp_path: Path) -> None:
    tls = server_context(*write(tmp_path, FIRST))
    client = shake_hands(tls, client_context())
    assert client.version() == "TLSv1.3"
    assert not client.session_reused


def test_tls_1_2_is_the_oldest(tmp_path: Path) -> None:
    tls = server_context(*write(tmp_path, FIRST))
    context = client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(tls, context).version() == "TLSv1.2"
    assert tls.minimum_version is ssl.TLSVersion.TLSv1_2
    assert tls.options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.parametrize(
    ("suite", "is_taken"),
    [
        ("ECDHE-RSA-AES128-GCM-SHA256", True),
        ("ECDHE-RSA-CHACHA20-POLY1305", True),
        ("ECDHE-RSA-AES256-SHA384", False),  # CBC
        ("ECDHE-RSA-AES128-SHA", False),  # CBC, and with SHA-1
        ("AES128-GCM-SHA256", False),  # the key is sent under the server's own, for good
        ("AES256-SHA256", False),
    ],
)
def test_tls_1_2_has_authenticated_encryption_and_nothing_else(tmp_path: Path, suite: str, is_taken: bool) -> None:
    tls = server_context(*write(tmp_path, trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.RSA)))
    context = client_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suite)
    if is_taken:
        assert (shake_hands(tls, context).cipher() or ("",))[0] == suite
    else:
        with pytest.raises(ssl.SSLError, match=r"(?i)no.shared.cipher"):
            shake_hands(tls, context)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed_on_its_own_listener_only(tmp_path: Path, version: ssl.TLSVersion) -> None:
    files = write(tmp_path, FIRST)
    one, other = server_context(*files), server_context(*files)
    context = client_context()
    context.minimum_version = context.maximum_version = version
    session = shake_hands(one, context).session
    assert session is not None
    assert shake_hands(one, context, session).session_reused
    assert not shake_hands(other, context, session).session_reused


@pytest.mark.parametrize("fault", ["missing", "cut", "mismatch", "empty", "directory"])
def test_a_broken_pair_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    certificate, key = write(tmp_path, FIRST)
    match fault:
        case "missing":
            certificate.unlink()
        case "cut":
            certificate.write_bytes(certificate.read_bytes()[:100])
        case "mismatch":
            write(tmp_path, SECOND, key=FIRST)
        case "empty":
            key.write_bytes(b"")
        case "directory":
            key.unlink()
            key.mkdir(mode=0o700)
    with pytest.raises(CertificateError) as caught:
        server_context(certificate, key)
    assert str(certificate) in str(caught.value)


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    certificate, key = write(tmp_path, FIRST)
    private_key = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateError, match="passphrase"):
        server_context(certificate, key)


def test_a_key_that_all_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = write(tmp_path, FIRST)
    server_context(certificate, key)
    assert not caplog.records
    key.chmod(0o644)
    server_context(certificate, key)
    assert [record.message for record in caplog.records] == ["private key readable by every user"]
