"""Automatic instrumentation of `aiosmtplib`: a CLIENT span and a `traceparent` for each message.

FastAPI-Mail sends through it.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import aiosmtplib
from opentelemetry.trace import Tracer

from .instrumentor import Arguments, MailInstrumentor, Sending, Wrapper
from .message_span import AddressDetail, ClientTransaction, MailServer, ServerReply

_Call = Callable[..., Awaitable[Any]]


class AiosmtplibInstrumentor(MailInstrumentor):
    """Instruments `aiosmtplib.SMTP`, and with it `aiosmtplib.send`.

    ::

        AiosmtplibInstrumentor().instrument()

    or, without a line of code, ``opentelemetry-instrument python app.py``. See `MailInstrumentor` for the arguments.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """The versions of aiosmtplib whose methods it replaces."""
        return ("aiosmtplib >= 3.0, < 6",)

    def _client_class(self) -> type:
        return aiosmtplib.SMTP

    def _wrappers(self, tracer: Tracer, addresses: AddressDetail) -> Mapping[str, Wrapper]:
        return _Wrappers(tracer, addresses).by_method()


class _Wrappers:
    """The replacements of the methods of `aiosmtplib.SMTP`."""

    def __init__(self, tracer: Tracer, addresses: AddressDetail) -> None:
        self._sending = Sending(tracer, addresses, _server_of, lambda answer: ServerReply(*answer), _reply_in)

    def by_method(self) -> Mapping[str, Wrapper]:
        """The wrappers by the name of the method."""
        return {"sendmail": self._sendmail, "mail": self._mail, "rcpt": self._rcpt, "data": self._data}

    async def _sendmail(
        self, wrapped: _Call, client: aiosmtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self._sending.message(client, Arguments(args, kwargs), 2, "message") as traced:
            return await wrapped(*traced.args, **traced.kwargs)

    async def _mail(
        self, wrapped: _Call, client: aiosmtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        transaction = ClientTransaction()
        answer = await wrapped(*args, **kwargs)
        self._sending.sender(client, transaction, Arguments(args, kwargs).value(0, "sender"))
        return answer

    async def _rcpt(
        self, wrapped: _Call, client: aiosmtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        address = Arguments(args, kwargs).value(0, "recipient")
        try:
            answer = await wrapped(*args, **kwargs)
        except aiosmtplib.SMTPRecipientRefused as refusal:
            self._sending.recipient(client, address, (refusal.code, refusal.message))
            raise
        self._sending.recipient(client, address, answer)
        return answer

    async def _data(
        self, wrapped: _Call, client: aiosmtplib.SMTP, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self._sending.content(client, Arguments(args, kwargs), "message", _octets) as (traced, transaction):
            answer = await wrapped(*traced.args, **traced.kwargs)
            self._sending.answered(transaction, answer)
            return answer


def _server_of(client: aiosmtplib.SMTP) -> MailServer:
    peer = client.get_transport_info("peername") if client.is_connected else None
    if isinstance(peer, str):  # a unix socket
        return MailServer(client.hostname or peer, None, None)
    address = (peer[0], peer[1]) if peer else None
    name = client.hostname or (address[0] if address else "localhost")
    return MailServer(name, address[1] if address else client.port, address)


def _reply_in(error: BaseException) -> ServerReply | None:
    match error:
        case aiosmtplib.SMTPResponseException():
            return ServerReply(error.code, error.message)
        case aiosmtplib.SMTPRecipientsRefused() if error.recipients:
            replies = [ServerReply(one.code, one.message) for one in error.recipients]
            # A deferred recipient makes the whole message deferred.
            return min(replies, key=lambda reply: reply.code // 100)
        case _:
            return None


def _octets(content: str | bytes) -> int:
    """Octets of the content, dot-stuffing aside; line ends become CRLF."""
    if isinstance(content, str):
        return len(content) + content.count("\n") + content.count("\r") - 2 * content.count("\r\n")
    return len(content) + content.count(b"\n") + content.count(b"\r") - 2 * content.count(b"\r\n")
