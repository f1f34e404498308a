"""TLS towards upstreams: verified, 1.2 or newer without CBC, with sessions resumed."""

import ssl
from typing import Any, NoReturn, Self

from otel_smtp.net import require_modern_tls


class TlsFileError(OSError):
    """A file of an upstream's TLS settings cannot be used; names the file and says what is wrong."""


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
            TlsFileError: a file cannot be read or used.
        """
        context = cls(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name by default
        require_modern_tls(context)
        try:
            if ca_file is not None:
                context.load_verify_locations(ca_file)
            else:
                context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        except OSError as error:
            raise TlsFileError(f"ca_file {ca_file}: {_why(error)}") from error
        if certificate_file is not None:
            try:
                context.load_cert_chain(certificate_file, key_file, password=_refuse_passphrase)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise TlsFileError(f"tls_cert {certificate_file}, tls_key {key_file}: {_why(error)}") from error
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


def _refuse_passphrase() -> NoReturn:
    # Without this OpenSSL would prompt on the terminal and block the whole process.
    raise ValueError("the key is protected by a passphrase")


def _why(error: Exception) -> str:
    """The reason in words, instead of OpenSSL's codes."""
    if isinstance(error, ssl.SSLError):
        if not error.reason:
            return "not in PEM, or not what it should be"
        return error.reason.lower().replace("_", " ")
    return (isinstance(error, OSError) and error.strerror) or str(error)
