"""TLS towards upstreams: verified, 1.2 or newer without CBC, with sessions resumed."""

import ssl
from typing import Any, Self

from otel_smtp.net import require_modern_tls


class UpstreamTlsContext(ssl.SSLContext):
    """A client's context that offers the previous connection's session.

    Event loops have no parameter for it, but all of them make the TLS object by `wrap_bio`. A resumed handshake saves
    the certificates and their verification; the session came from a verified handshake of the same context.

    Attributes:
        kept_session: the session to offer in the next handshake.
    """

    kept_session: ssl.SSLSession | None = None

    @classmethod
    def create(
        cls, *, ca_file: str | None = None, certificate_file: str | None = None, key_file: str | None = None
    ) -> Self:
        """A context that verifies certificate and name.

        Args:
            ca_file: PEM file of authorities; None: the system's.
            certificate_file, key_file: our own certificate, for upstreams that demand one; the key may be in the same
                file.

        Raises:
            OSError: a file cannot be read; ssl.SSLError: it cannot be used.
        """
        context = cls(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name by default
        require_modern_tls(context)
        if ca_file is not None:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        if certificate_file is not None:
            context.load_cert_chain(certificate_file, key_file)
        return context

    def keep_session(self, tls: ssl.SSLObject | None) -> None:
        """Keep the session of a connection that has read something: TLS 1.3 sends its tickets late."""
        if tls is not None and tls.session is not None and tls.session.has_ticket:
            self.kept_session = tls.session

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """As `ssl.SSLContext.wrap_bio`, with the kept session."""
        if kwargs.get("session") is None:
            kwargs["session"] = self.kept_session
        return super().wrap_bio(*args, **kwargs)
