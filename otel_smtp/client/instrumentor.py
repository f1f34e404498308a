"""The common part of both instrumentors: which messages get a span, and how a client library's methods are replaced.

A message is sent by `sendmail`, or by a program that calls `mail`, `rcpt` and `data` itself. `sendmail` calls these
three too; they then note what the server said in the transaction that is under way. In a direct use `data` opens the
span and dates it back to `mail`. Inside `sendmail` the transaction is found by the current context, since tasks may
take turns on one connection; in a direct use it belongs to the connection.
"""

import contextlib
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from opentelemetry import context, trace
from opentelemetry.instrumentation.dependencies import get_dependency_conflicts
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]  # not typed
from opentelemetry.instrumentation.utils import is_instrumentation_enabled, unwrap
from opentelemetry.trace import TracerProvider
from wrapt import wrap_function_wrapper

from .message_span import AddressDetail, ClientTransaction, MailServer, MessageSpan, ServerReply
from .version import __version__

logger: Final = logging.getLogger(__name__)

ADDRESSES_VARIABLE: Final = "OTEL_PYTHON_SMTP_ADDRESSES"
# Marks the class whose methods are replaced. This package may be installed under both of its names, each with its own
# entry points: the second instrumentor finds the mark and leaves the class alone, or each message would get two spans.
_MARK: Final = "__otel_smtp_client__"


class Arguments(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def value(self, index: int, name: str) -> Any:
        """One of them; None if the call lacks it, which the called function will report."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    def replaced(self, index: int, name: str, value: object) -> "Arguments":
        """The same arguments with one replaced, which the call must have."""
        if index < len(self.args):
            return Arguments((*self.args[:index], value, *self.args[index + 1 :]), self.kwargs)
        return Arguments(self.args, {**self.kwargs, name: value})


Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


class Sending:
    """The messages that one client library sends.

    Args:
        server_of: the server that a client of the library is connected to.
        reply_of: the reply in what the library returns for a command.
        reply_in: the reply that an exception of the library carries; None if it carries none.

    Its methods raise no error of their own: a fault in tracing is logged, the first as a warning, and the message is
    sent unchanged.
    """

    def __init__(
        self,
        tracer: trace.Tracer,
        addresses: AddressDetail,
        server_of: Callable[[Any], MailServer],
        reply_of: Callable[[Any], ServerReply],
        reply_in: Callable[[BaseException], ServerReply | None],
    ) -> None:
        self._tracer = tracer
        self._addresses = addresses
        self._server_of = server_of
        self._reply_of = reply_of
        self._reply_in = reply_in
        self._fault_level = logging.WARNING
        self._under_way: ContextVar[tuple[object, ClientTransaction] | None] = ContextVar("smtp_send", default=None)
        self._direct: WeakKeyDictionary[Any, ClientTransaction] = WeakKeyDictionary()

    @contextlib.contextmanager
    def harmless(self) -> Iterator[None]:
        """Log a fault in tracing instead of raising it into the mail."""
        try:
            yield
        except Exception:
            # Lowered first: a log handler may send mail, whose tracing fails likewise.
            level, self._fault_level = self._fault_level, logging.DEBUG
            logger.log(level, "mail not traced in full", exc_info=True)

    @contextlib.contextmanager
    def message(self, client: object, arguments: Arguments, index: int, name: str) -> Iterator[Arguments]:
        """Trace the sending of a whole message; its span is current inside.

        Args:
            arguments: of the call that sends it; the message is argument `index`, called `name`.

        Yields:
            The arguments to call with.
        """
        with self._open(client, ClientTransaction(), arguments, index, name) as opened:
            yield opened

    @contextlib.contextmanager
    def content(
        self, client: object, arguments: Arguments, name: str, octets: Callable[[Any], int]
    ) -> Iterator[tuple[Arguments, ClientTransaction]]:
        """Trace the sending of content, within `message` or directly.

        Args:
            arguments: of the call; the content is the first, called `name`.
            octets: the content's size on the wire.

        Yields:
            The arguments to call with, and the transaction, for `answered`.
        """
        transaction = self._current(client)
        if transaction is not None:
            self._note_content(transaction, arguments.value(0, name), octets)
            yield arguments, transaction
            return
        transaction = ClientTransaction()
        with self.harmless():
            transaction = self._direct.pop(client, transaction)
        with self._open(client, transaction, arguments, 0, name) as opened:
            self._note_content(transaction, opened.value(0, name), octets)
            yield opened, transaction

    def sender(self, client: object, transaction: ClientTransaction, address: object) -> None:
        """MAIL was answered. A refusal ends the transaction, as no other call may follow.

        Args:
            transaction: made before the command was sent; kept if the message is sent directly.
        """
        with self.harmless():
            current = self._current(client)
            if current is None:
                current = self._direct[client] = transaction
            current.sender = str(address)

    def recipient(self, client: object, address: object, answer: object) -> None:
        """RCPT was answered."""
        with self.harmless():
            transaction = self._current(client) or self._direct.get(client)
            if transaction is not None:
                transaction.note_recipient(str(address), self._reply_of(answer))

    def answered(self, transaction: ClientTransaction, answer: object) -> None:
        """The content was answered."""
        with self.harmless():
            transaction.reply = self._reply_of(answer)

    def _current(self, client: object) -> ClientTransaction | None:
        under_way = self._under_way.get()
        return under_way[1] if under_way is not None and under_way[0] is client else None

    def _note_content(self, transaction: ClientTransaction, content: object, octets: Callable[[Any], int]) -> None:
        with self.harmless():
            transaction.octets = octets(content)

    @contextlib.contextmanager
    def _open(
        self, client: object, transaction: ClientTransaction, arguments: Arguments, index: int, name: str
    ) -> Iterator[Arguments]:
        span: MessageSpan | None = None
        if is_instrumentation_enabled():
            with self.harmless():
                span = self._span(client, transaction)
                message = arguments.value(index, name)
                traced = span.with_context(message)
                if traced is not message:
                    arguments = arguments.replaced(index, name, traced)
        if span is None:
            yield arguments
            return
        under_way = self._under_way.set((client, transaction))
        token = context.attach(span.in_context())
        try:
            yield arguments
        except BaseException as error:
            with self.harmless():
                span.end(error)
            raise
        else:
            with self.harmless():
                span.end(None)
        finally:
            context.detach(token)
            # A coroutine that is dropped half-way is closed in another context.
            with contextlib.suppress(ValueError):
                self._under_way.reset(under_way)

    def _span(self, client: object, transaction: ClientTransaction) -> MessageSpan:
        return MessageSpan(
            self._tracer,
            transaction,
            self._server_of(client),
            addresses=self._addresses,
            reply_in=self._reply_in,
        )


class MailInstrumentor(BaseInstrumentor):  # type: ignore[misc]  # as above
    """Instruments the client class of one library.

    `instrument` takes, all optional:
        tracer_provider: the global one if None.
        addresses: "none", "domain" or "full"; OTEL_PYTHON_SMTP_ADDRESSES if None, else "domain".
    """

    _replaced: tuple[str, ...] = ()  # the methods now replaced

    @abstractmethod
    def _client_class(self) -> type:
        """The library's class whose instances send mail."""

    @abstractmethod
    def _wrappers(self, tracer: trace.Tracer, addresses: AddressDetail) -> Mapping[str, Wrapper]:
        """The replacements of its methods."""

    def _instrument(
        self, *, tracer_provider: TracerProvider | None = None, addresses: str | None = None, **_: Any
    ) -> None:
        # `opentelemetry-instrument` does not check this: it looks only at what the whole distribution instruments.
        if (conflict := get_dependency_conflicts(self.instrumentation_dependencies())) is not None:
            logger.error("mail not traced: %s", conflict)
            return
        client = self._client_class()
        if getattr(client, _MARK, False):
            logger.debug("%s already instrumented under this package's other name", client.__qualname__)
            return
        tracer = trace.get_tracer(__name__.rpartition(".")[0], __version__, tracer_provider)
        wrappers = self._wrappers(tracer, _addresses(addresses))
        for method, wrapper in wrappers.items():
            wrap_function_wrapper(client, method, wrapper)
        setattr(client, _MARK, True)
        self._replaced = tuple(wrappers)

    def _uninstrument(self, **_: Any) -> None:
        if not self._replaced:
            return
        client = self._client_class()
        for method in self._replaced:
            unwrap(client, method)
        delattr(client, _MARK)
        self._replaced = ()


def _addresses(wanted: str | None) -> AddressDetail:
    chosen = os.environ.get(ADDRESSES_VARIABLE, "") if wanted is None else wanted
    try:
        return AddressDetail(chosen.strip().lower() or AddressDetail.DOMAIN)
    except ValueError:
        logger.warning("mailboxes in spans: %r is not one of %s; showing domains", chosen, ", ".join(AddressDetail))
        return AddressDetail.DOMAIN
