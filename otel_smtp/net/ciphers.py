"""Cipher suites of TLS, for both sides of the gateway."""

import ssl
from typing import Final

# Authenticated encryption with a fresh key for each session, and nothing else (RFC 9325 4.2): no CBC, whose padding has
# been an oracle again and again, and no key transport by RSA. OpenSSL's level 2 refuses keys below 112 bits. TLS 1.3
# has no other suites.
TLS_1_2_SUITES: Final = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!aDSS"


def require_modern_tls(context: ssl.SSLContext) -> None:
    """TLS 1.2 or newer (RFC 8996, and RFC 8997 for mail), and of TLS 1.2 only suites with authenticated encryption."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS_1_2_SUITES)
