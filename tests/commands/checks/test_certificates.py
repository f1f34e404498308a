"""Certificates of listeners: good, expiring, expired, with another's key."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from otel_smtp.commands.checks.certificates import check_certificate
from otel_smtp.config import ListenerTable
from otel_smtp.smtp.states import TlsMode


def listener_with(tmp_path: Path, certificate: trustme.LeafCert) -> ListenerTable:
    (tmp_path / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    return ListenerTable(tls=TlsMode.STARTTLS, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")


def test_a_good_certificate_with_its_names_and_expiry(tmp_path: Path) -> None:
    finding = check_certificate(listener_with(tmp_path, trustme.CA().issue_cert("gw.example", "127.0.0.1")))
    assert finding.verdict == "ok"
    assert finding.detail.startswith("is for gw.example, 127.0.0.1, until ")


@pytest.mark.parametrize(
    ("days", "verdict", "detail"),
    [(3, "warning", "(2 days)"), (-1, "failed", "cannot be used: certificate has expired")],
)
def test_a_certificate_that_expires_soon_or_has_expired(tmp_path: Path, days: int, verdict: str, detail: str) -> None:
    ends = datetime.now(UTC) + timedelta(days=days)
    leaf = trustme.CA().issue_cert("gw.example", not_before=ends - timedelta(days=30), not_after=ends)
    finding = check_certificate(listener_with(tmp_path, leaf))
    assert finding.verdict == verdict
    assert detail in finding.detail


def test_a_certificate_that_does_not_fit_its_key(tmp_path: Path) -> None:
    ca = trustme.CA()
    listener = listener_with(tmp_path, ca.issue_cert("gw.example"))
    (tmp_path / "key.pem").write_bytes(ca.issue_cert("gw.example").private_key_pem.bytes())
    finding = check_certificate(listener)
    assert (finding.verdict, finding.detail) == ("failed", "cannot be used: KEY_VALUES_MISMATCH")
    (tmp_path / "key.pem").unlink()
    assert check_certificate(listener).detail == "cannot be read: No such file or directory"
