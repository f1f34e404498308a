"""Automatic instrumentation of the standard library's `smtplib`: a CLIENT span and a `traceparent` for each message.

Django, Flask-Mail, Celery tasks and logging's SMTPHandler send through it.
"""

import contextlib
import smtplib
from collections.abc import Callable, Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry.trace import Tracer

from .instrumentor import Arguments, MailInstrumentor, Sending, Wrapper
from .message_span import AddressDetail, ClientTransaction, MailServer, ServerReply

_Call = Callable[..., Any]


class SmtplibInstrumentor(MailInstrumentor):
    """Instruments `smtplib.SMTP`, and with it `SMTP_SSL` and `LMTP`.

    ::

        SmtplibInstrumentor().instrument()

    or, without a line of code, ``opentelemetry-instrument python app.py``. See `MailInstrumentor` for the arguments.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: the library comes with Python."""
        return ()

    def _client_class(self) -> type:
        return smtplib.SMTP

    def _wrappers(self, tracer: Tracer, addresses: AddressDetail) -> Mapping[str, Wrapper]:
        return _Wrappers(tracer, addresses).by_method()


class _Wrappers:
    """The replacements of the methods of `smtplib.SMTP`."""

    def __init__(self, tracer: Tracer, addresses: AddressDetail) -> None:
        self._sending = Sending(tracer, addresses, self._server_of, lambda answer: _reply(*answer), _reply_in)
        # `smtplib` keeps the host for itself.
        self._hosts: WeakKeyDictionary[smtplib.SMTP, str] = WeakKeyDictionary()

    def by_method(self) -> Mapping[str, Wrapper]:
        """The wrappers by the name of the method."""
        return {
            "connect": self._connect,
            "sendmail": self._sendmail,
            "mail": self._mail,
            "rcpt": self._rcpt,
            "data": self._data,
        }

    def _connect(self, wrapped: _Call, client: smtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._sending.harmless():
            self._hosts[client] = str(Arguments(args, kwargs).value(0, "host") or "localhost")
        return wrapped(*args, **kwargs)

    def _sendmail(self, wrapped: _Call, client: smtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._sending.message(client, Arguments(args, kwargs), 2, "msg") as traced:
            return wrapped(*traced.args, **traced.kwargs)

    def _mail(self, wrapped: _Call, client: smtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        transaction = ClientTransaction()
        answer = wrapped(*args, **kwargs)
        self._sending.sender(client, transaction, Arguments(args, kwargs).value(0, "sender"))
        return answer

    def _rcpt(self, wrapped: _Call, client: smtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = wrapped(*args, **kwargs)
        self._sending.recipient(client, Arguments(args, kwargs).value(0, "recip"), answer)
        return answer

    def _data(self, wrapped: _Call, client: smtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._sending.content(client, Arguments(args, kwargs), "msg", _octets) as (traced, transaction):
            answer = wrapped(*traced.args, **traced.kwargs)
            self._sending.answered(transaction, answer)
            return answer

    def _server_of(self, client: smtplib.SMTP) -> MailServer:
        protocol = "lmtp" if isinstance(client, smtplib.LMTP) else "smtp"
        host = self._hosts.get(client, "")
        if host.startswith("/"):
            return MailServer(host, None, None, protocol)
        peer: tuple[str, int] | None = None
        with contextlib.suppress(OSError):  # the connection is lost
            if client.sock is not None:
                address = client.sock.getpeername()
                if isinstance(address, str):  # a unix socket, connected to before `connect` was replaced
                    return MailServer(address, None, None, protocol)
                peer = (address[0], address[1])
        # As `connect` reads it: one colon parts host and port, more of them are an IPv6 address.
        name = host.partition(":")[0] if host.count(":") == 1 else host
        return MailServer(name or (peer[0] if peer else ""), peer[1] if peer else None, peer, protocol)


def _reply(code: int, text: bytes | str) -> ServerReply:
    return ServerReply(code, text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text))


def _reply_in(error: BaseException) -> ServerReply | None:
    match error:
        case smtplib.SMTPResponseException():
            return _reply(error.smtp_code, error.smtp_error)
        case smtplib.SMTPRecipientsRefused() if error.recipients:
            replies = [_reply(*answer) for answer in error.recipients.values()]
            # A deferred recipient makes the whole message deferred.
            return min(replies, key=lambda reply: reply.code // 100)
        case _:
            return None


def _octets(content: str | bytes) -> int:
    """Octets of the content, dot-stuffing aside: bytes go as they are, line ends of a str become CRLF."""
    if isinstance(content, bytes):
        return len(content)
    return len(content) + content.count("\n") + content.count("\r") - 2 * content.count("\r\n")
