"""The upstream relay: a `Forwarder` for upstreams in the order of preference, transparent or buffered.

A transaction walks along the upstreams that serve its mail until one gives a usable answer. It may do so as long as
the client has no answer that rests on a particular upstream, or that answer can be had again elsewhere: what was
accepted for the client is put to the next upstream anew, and must be accepted again. It ends where the content has left
with its end (`Delivery.has_ended_content`): then the mail may have been delivered, and a second try might deliver it
twice.

One connection that dies says little about its upstream. So whoever was lost with a kept connection, or in the middle of
a transaction, is tried once more on a fresh one, before the next in order.
"""

import asyncio
import copy
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from otel_smtp.forwarding.base import Capabilities, DeliveryFailed, Permanent, RelayTransaction, Transient
from otel_smtp.forwarding.content import Content, collect
from otel_smtp.forwarding.delivery import Delivery, lacking
from otel_smtp.forwarding.faults import (
    ConnectionLost,
    NoConnectionFree,
    OutOfStep,
    Reclaimed,
    TimedOut,
    Unsuitable,
    UpstreamFault,
)
from otel_smtp.forwarding.pool import PoolSnapshot
from otel_smtp.forwarding.routes import Routes
from otel_smtp.forwarding.settings import MEMORY_LIMIT_OCTETS, Strategy, UpstreamSettings
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.observing import DeliveryObserver, Endpoint, Outcome, TransactionObserver
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import Extensions, is_safe_path
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import TlsMode

logger: Final = logging.getLogger("otel_smtp.forwarding.upstream")

LOOK_SECONDS: Final = 60.0  # how old what a probe is told may be; a provider need not see us more often
LOOK_AGAIN_SECONDS: Final = 5.0  # while none can be reached, so that its return is soon known
CLOSE_GRACE_SECONDS: Final = 5.0
"""How long `close` waits for the reply to messages whose client is gone already."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UpstreamSnapshot:
    """One upstream at one moment, for the status page."""

    name: str
    endpoint: Endpoint
    pool: PoolSnapshot
    is_reachable: bool = True
    last_success_seconds: float | None = None  # ago
    last_failure_seconds: float | None = None  # ago
    last_failure: str | None = None


class UpstreamForwarder:
    """Relays each mail to the first of its upstreams that gives a usable answer.

    Args:
        upstreams: the preferred one first; at least one.
        strategy: when they are asked.
        hostname: what we call ourselves in EHLO.
        memory_limit_octets: of one message's body; more goes to a temporary file.

    Raises:
        OSError: a file of an upstream's TLS settings cannot be read.
    """

    def __init__(
        self,
        upstreams: Sequence[UpstreamSettings],
        *,
        strategy: Strategy = Strategy.TRANSPARENT,
        hostname: str,
        memory_limit_octets: int = MEMORY_LIMIT_OCTETS,
    ) -> None:
        if not upstreams:
            raise ValueError("an upstream relay needs an upstream")
        self._smarthosts = [Smarthost(settings, hostname) for settings in upstreams]
        self._routes = Routes(list(zip(upstreams, self._smarthosts, strict=True)))
        self._transaction: type[_Transaction] = _Transparent if strategy is Strategy.TRANSPARENT else _Buffered
        self._memory_limit = memory_limit_octets
        self._extensions: Extensions | None = None
        self._capabilities = Capabilities()
        self._unwatched: set[asyncio.Task[None]] = set()
        self._looking: set[asyncio.Task[None]] = set()
        self._look_again_at = 0.0

    def __repr__(self) -> str:
        return f"<UpstreamForwarder {self._transaction.__name__} {self._smarthosts!r}>"

    def capabilities(self) -> Capabilities:
        """What the last EHLO of the preferred upstream said; everything, while it has said nothing."""
        preferred = self._smarthosts[0]
        extensions = preferred.extensions
        if extensions is not None and extensions is not self._extensions:
            self._extensions = extensions
            self._capabilities = Capabilities(
                size=extensions.size,
                eight_bit_mime=extensions.eight_bit_mime,
                smtputf8=extensions.smtputf8,
                binary_mime=extensions.binary_mime,
                dsn=extensions.dsn,
                require_tls=extensions.require_tls and preferred.settings.tls is not TlsMode.OFF,
            )
        return self._capabilities

    async def begin(self, mail: Mail, seen: TransactionObserver) -> RelayTransaction:
        """Open a transaction. Nobody is asked yet.

        Raises:
            Permanent: no upstream serves the sender, or each that does is known to lack what the mail needs.
        """
        if (refusal := self.refusal(mail)) is not None:
            raise Permanent(refusal)
        serving = self._routes.for_mail(mail)
        return self._transaction(self, mail, seen, lambda recipient: Routes.for_recipient(serving, recipient))

    def refusal(self, mail: Mail) -> Reply | None:
        """Why a mail is refused without asking anybody: see `begin`."""
        if not is_safe_path(mail.reverse_path):
            return replies.BAD_SENDER
        serving = self._routes.for_mail(mail)
        if not serving:
            return replies.RELAY_DENIED
        refusals = [_known_lack(mail, row.upstream) for row in serving]
        return refusals[0] if all(refusals) else None

    def destination(self, mail: Mail, recipient: Recipient) -> str | Reply:
        """The names of the upstreams that serve a recipient, the preferred one first, or why none does."""
        if (refusal := _bad_recipient(mail, recipient)) is not None:
            return refusal
        route = Routes.for_recipient(self._routes.for_mail(mail), recipient)
        return ",".join(smarthost.settings.name for smarthost in route) if route else replies.RELAY_DENIED

    def concurrency(self, destination: str) -> int:
        """How many mails may be under way: as many as the one of its upstreams bears that bears most."""
        names = destination.split(",")
        # The settings may have changed since the name was noted; the route is then found anew, whatever it is.
        named = [smarthost for smarthost in self._smarthosts if smarthost.settings.name in names] or self._smarthosts
        return max(smarthost.concurrency() for smarthost in named)

    def for_spool(self) -> "UpstreamForwarder":
        """The same upstreams and connections, for mail whose client is gone: each recipient has its own verdict."""
        other = copy.copy(self)
        other._transaction = _Spooled
        return other

    def snapshot(self) -> Sequence[UpstreamSnapshot]:
        """The upstreams at this moment, in the order of preference."""
        now = time.monotonic()  # the loop's clock, also where no loop runs
        return [
            UpstreamSnapshot(
                smarthost.settings.name,
                smarthost.settings.endpoint,
                smarthost.snapshot(),
                smarthost.is_reachable,
                None if smarthost.heard_at is None else max(0.0, now - smarthost.heard_at),
                None if smarthost.failed_at is None else max(0.0, now - smarthost.failed_at),
                smarthost.failure,
            )
            for smarthost in self._smarthosts
        ]

    def look_if_stale(self) -> None:
        """Find out in the background which upstreams can be reached, where nothing has been heard of them for long.

        For probes, which ask often and must not wait: the answer is there when they ask again. No mail is sent.
        """
        now = asyncio.get_running_loop().time()
        if self._looking or now < self._look_again_at:
            return
        known = max((smarthost.heard_at or 0.0 for smarthost in self._smarthosts), default=0.0)
        if known and now - known < LOOK_SECONDS:
            return
        self._look_again_at = now + (LOOK_SECONDS if self.is_reachable else LOOK_AGAIN_SECONDS)
        for smarthost in self._smarthosts:
            task = asyncio.get_running_loop().create_task(smarthost.look())
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    @property
    def is_looking(self) -> bool:
        """Whether it is being found out which can be reached."""
        return bool(self._looking)

    @property
    def is_reachable(self) -> bool:
        """Whether any upstream can be reached, as far as is known."""
        return any(smarthost.is_reachable for smarthost in self._smarthosts)

    async def close(self, *, grace_seconds: float = CLOSE_GRACE_SECONDS) -> None:
        """Close the connections, those in use when their mail is done with them. Idempotent.

        Args:
            grace_seconds: how long messages whose client is gone may wait for their reply.
        """
        if self._unwatched:
            await asyncio.wait(self._unwatched, timeout=grace_seconds)
        for task in [*self._unwatched, *self._looking]:
            task.cancel()
        for smarthost in self._smarthosts:
            smarthost.close()

    async def take_in(self, chunks: AsyncIterator[bytes]) -> Content:
        """Collect the content of a transaction; errors as `collect`."""
        return await collect(chunks, memory_limit_octets=self._memory_limit)

    def watch(self, finishing: Coroutine[Any, Any, None]) -> None:
        """Let a delivery come to its end though nobody waits for it any more."""
        task = asyncio.get_running_loop().create_task(finishing)
        self._unwatched.add(task)
        task.add_done_callback(self._unwatched.discard)


def _bad_recipient(mail: Mail, recipient: Recipient) -> Reply | None:
    if not is_safe_path(recipient.address) or not recipient.address:
        return replies.BAD_RECIPIENT
    if not recipient.address.isascii() and not mail.smtputf8:
        return replies.NEEDS_SMTPUTF8
    return None


def _known_lack(mail: Mail, smarthost: Smarthost) -> Reply | None:
    if smarthost.extensions is None:
        return None
    return lacking(mail, smarthost.extensions, is_tls=smarthost.settings.tls is not TlsMode.OFF)


class _Walk:
    """One mail's way along its upstreams."""

    def __init__(self, mail: Mail, seen: TransactionObserver) -> None:
        self._mail = mail
        self._seen = seen
        self._left: deque[Smarthost] | None = None  # not tried yet; None before the route is known
        self._once_more: tuple[Smarthost, DeliveryObserver] | None = None
        self._wants_fresh = False  # `_once_more`: on a connection that was not used before
        self._tried_again: set[Smarthost] = set()
        self._faults: list[UpstreamFault] = []
        self._attempts = 0
        self.delivery: Delivery | None = None

    def lead_along(self, smarthosts: Sequence[Smarthost]) -> None:
        """Set the route, before the first attempt; later, keep to those of it that are among `smarthosts`."""
        if self._left is None:
            self._left = deque(smarthosts)
        else:
            self._left = deque(smarthost for smarthost in self._left if smarthost in smarthosts)

    async def do(self, work: Callable[[Delivery], Awaitable[T]]) -> T:
        """Do `work` with the delivery at hand, else with the next that can be had, until its answer is usable.

        Raises:
            DeliveryFailed: there is nobody left to ask, or nobody else may be asked.
        """
        while True:
            if self.delivery is None:
                self.delivery = await self._begin()
            delivery = self.delivery
            try:
                return await work(delivery)
            except UpstreamFault as fault:
                self.delivery = None
                self._fail(delivery, fault)
            except RemoteProtocolError as error:  # found when a command was about to be sent: a late reply was there
                self.delivery = None
                self._fail(delivery, OutOfStep(str(error)))

    def _fail(self, delivery: Delivery, fault: UpstreamFault) -> None:
        smarthost = delivery.smarthost
        if delivery.has_ended_content:
            # The one case that must never be tried again: it may have been delivered.
            unknown = replies.OUTCOME_UNKNOWN if isinstance(fault, ConnectionLost) else fault.reply
            delivery.end(Outcome.UNKNOWN, None, error_type=ErrorType.OUTCOME_UNKNOWN)
            logger.error("outcome of a delivery unknown", extra={"upstream": smarthost.settings.name})
            raise Transient(unknown) from fault
        if isinstance(fault, Reclaimed):
            self._once_more = (smarthost, delivery.hand_over())
            self._wants_fresh = False
            return
        if (
            isinstance(fault, ConnectionLost)
            and not isinstance(fault, TimedOut)
            and (delivery.was_reused or delivery.is_open)
            and smarthost not in self._tried_again
        ):
            self._tried_again.add(smarthost)
            self._once_more = (smarthost, delivery.hand_over())
            self._wants_fresh = True
            return
        delivery.end(Outcome.DEFERRED, fault.upstream_reply, error_type=fault.reply.error_type)
        self._faults.append(fault)
        if fault.reply is replies.UPSTREAM_PROTOCOL:
            # What it makes of the mail is anybody's guess; whoever comes next would be asked behind its back.
            raise Transient(fault.reply) from fault

    async def _begin(self) -> Delivery:
        """The next attempt, with a connection at hand."""
        while True:
            if self._once_more is not None:
                (smarthost, seen), self._once_more = self._once_more, None
                delivery = await self._open(smarthost, seen, fresh=self._wants_fresh)
            elif self._left:
                smarthost = self._left.popleft()
                self._attempts += 1
                settings = smarthost.settings
                seen = self._seen.delivery_begun(settings.name, settings.endpoint, attempt=self._attempts)
                delivery = await self._open(smarthost, seen, fresh=False)
            else:
                raise self._nobody_left()
            if delivery is not None:
                return delivery

    async def _open(self, smarthost: Smarthost, seen: DeliveryObserver, *, fresh: bool) -> Delivery | None:
        """An attempt at `smarthost`; None where it came to nothing."""
        try:
            connection, reused = await smarthost.acquire(seen, fresh=fresh)
        except UpstreamFault as fault:
            self._faults.append(fault)
            seen.ended(Outcome.DEFERRED, fault.upstream_reply, round_trips=0, error_type=fault.reply.error_type)
            return None
        except BaseException:
            seen.ended(Outcome.ABORTED, None, round_trips=0)
            raise
        delivery = Delivery(smarthost, connection, self._mail, seen, was_reused=reused)
        try:
            delivery.check()
        except Unsuitable as fault:
            self._faults.append(fault)
            delivery.end(Outcome.REFUSED, None, error_type=fault.reply.error_type)
            return None
        return delivery

    def _nobody_left(self) -> DeliveryFailed:
        """What the client is told: rather that it may try again than that it may not."""
        faults = self._faults
        tried = [fault for fault in faults if not isinstance(fault, NoConnectionFree)] or faults
        reply = next((fault.reply for fault in reversed(tried) if fault.reply.is_transient), None)
        if reply is not None:
            return Transient(reply)
        return Permanent(tried[0].reply) if tried else Transient(replies.UPSTREAM_UNAVAILABLE)


class _Transaction(ABC):
    """What both strategies share: recipients and their routes, the content, and the end."""

    def __init__(
        self,
        forwarder: UpstreamForwarder,
        mail: Mail,
        seen: TransactionObserver,
        route_of: Callable[[Recipient], Sequence[Smarthost]],
    ) -> None:
        self._forwarder = forwarder
        self._mail = mail
        self._route_of = route_of
        self._route: Sequence[Smarthost] = ()
        self._accepted: list[Recipient] = []
        self._walk = _Walk(mail, seen)
        self._refusal: Reply | None = None  # the last one, of a recipient or of MAIL
        self.verdicts: Sequence[Reply] = ()

    @property
    def spool_id(self) -> str | None:
        """Nothing is made durable here."""
        return None

    @abstractmethod
    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`."""

    async def content(self, chunks: AsyncIterator[bytes]) -> Reply:
        """See `MailTransaction.content`."""
        try:
            content = await self._forwarder.take_in(chunks)
            try:
                reply = await self._walk.do(lambda delivery: self._deliver(delivery, content))
            finally:
                content.close()
        except DeliveryFailed as failed:
            reply = failed.reply
        except asyncio.CancelledError:
            self._let_finish()
            raise
        finally:
            await self.abort()
        return reply

    async def abort(self) -> None:
        """See `MailTransaction.abort`."""
        delivery, self._walk.delivery = self._walk.delivery, None
        if delivery is None:
            return
        refusal = self._refusal if not self._accepted else None
        if delivery.has_ended_content:
            delivery.end(Outcome.UNKNOWN, None, error_type=ErrorType.OUTCOME_UNKNOWN)
        elif refusal is not None:
            delivery.end(_outcome_of(refusal), refusal, error_type=refusal.error_type, answered=True)
        else:
            delivery.end(Outcome.ABORTED, None)

    async def _deliver(self, delivery: Delivery, content: Content) -> Reply:
        reply = await self._send(delivery, content)
        self.verdicts = delivery.verdicts
        self._walk.delivery = None
        own = None if reply.error_type not in (None, ErrorType.UPSTREAM_REFUSED) else reply
        delivery.end(_outcome_of(reply), own, error_type=reply.error_type, answered=True)
        return reply

    @abstractmethod
    async def _send(self, delivery: Delivery, content: Content) -> Reply:
        """Put what is still to be put, and send the content."""

    def _let_finish(self) -> None:
        """The client is gone, and the message is out of our hands: its outcome is recorded all the same."""
        delivery = self._walk.delivery
        if delivery is not None and delivery.has_ended_content:
            self._walk.delivery = None
            self._forwarder.watch(_finish(delivery))

    def _judge(self, recipient: Recipient) -> Reply | None:
        """What can be said of a recipient without asking anybody; None where somebody must be asked."""
        if (refusal := _bad_recipient(self._mail, recipient)) is not None:
            return refusal
        route = self._route_of(recipient)
        if not route:
            return replies.RELAY_DENIED
        if not self._route:
            self._route = route
            self._walk.lead_along(route)
        elif route[0] is not self._route[0] or not self._is_served_here(route):
            return replies.OTHER_ROUTE
        elif route != self._route:
            # The same upstream first, other ones behind it: only those that serve both are left.
            self._route = [smarthost for smarthost in self._route if smarthost in route]
            self._walk.lead_along(self._route)
        return None

    def _is_served_here(self, route: Sequence[Smarthost]) -> bool:
        """Whether the upstream that has the transaction now, perhaps not the preferred one, is among `route`."""
        delivery = self._walk.delivery
        return delivery is None or delivery.smarthost in route

    def _is_full(self) -> bool:
        """Whether the upstream takes no more recipients in one transaction (RFC 9422 3.2)."""
        extensions = self._route[0].extensions
        most = extensions.limits.get("RCPTMAX") if extensions is not None else None
        return most is not None and len(self._accepted) >= most > 0


class _Transparent(_Transaction):
    """Recipients are put to the upstream as they come."""

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`."""
        answers = [self._judge(recipient) for recipient in batch]
        asked = [recipient for recipient, answer in zip(batch, answers, strict=True) if answer is None]
        if asked:
            verdicts = iter(await self._ask(asked))
            answers = [next(verdicts) if answer is None else answer for answer in answers]
        return [answer for answer in answers if answer is not None]

    async def _ask(self, asked: Sequence[Recipient]) -> Sequence[Reply]:
        if self._refusal is not None and not self._accepted and self._walk.delivery is None:
            return [self._refusal] * len(asked)  # MAIL itself was refused
        verdicts = await self._walk.do(lambda delivery: self._put(delivery, asked))
        for recipient, verdict in zip(asked, verdicts, strict=True):
            if verdict.is_positive:
                self._accepted.append(recipient)
            else:
                self._refusal = verdict
        delivery = self._walk.delivery
        if delivery is not None and delivery.is_open:
            delivery.park()
        elif delivery is not None:
            self._walk.delivery = None
            delivery.end(_outcome_of(verdicts[0]), verdicts[0], error_type=verdicts[0].error_type, answered=True)
        return verdicts

    async def _put(self, delivery: Delivery, asked: Sequence[Recipient]) -> Sequence[Reply]:
        """Ask about `asked`; where an upstream takes over from another, about those accepted before as well."""
        before = [] if delivery.is_open else self._accepted
        verdicts = await delivery.ask([*before, *asked])
        if not all(verdict.is_positive for verdict in verdicts[: len(before)]):
            raise UpstreamFault("recipients that another upstream had accepted are refused")
        return verdicts[len(before) :]

    async def _send(self, delivery: Delivery, content: Content) -> Reply:
        if not delivery.is_open:
            await self._put(delivery, [])
        return await delivery.send(content)


class _Buffered(_Transaction):
    """Recipients are accepted by us, and put to the upstream with the content."""

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`."""
        return [self._accept(recipient) for recipient in batch]

    def _accept(self, recipient: Recipient) -> Reply:
        refusal = self._judge(recipient)
        if refusal is None and self._is_full():
            refusal = replies.TOO_MANY_RECIPIENTS
        if refusal is not None:
            return refusal
        self._accepted.append(recipient)
        return replies.RECIPIENT_OK

    async def _send(self, delivery: Delivery, content: Content) -> Reply:
        return await delivery.burst(self._accepted, content)


class _Spooled(_Transparent):
    """Recipients are put to the upstream together; a single one with the content, as its refusal is the message's."""

    _is_burst = False

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`."""
        if len(batch) > 1 or self._accepted:
            return await super().recipients(batch)
        refusal = self._judge(batch[0])
        if refusal is not None:
            return [refusal]
        self._accepted.append(batch[0])
        self._is_burst = True
        return [replies.RECIPIENT_OK]

    async def _send(self, delivery: Delivery, content: Content) -> Reply:
        if self._is_burst:
            return await delivery.burst(self._accepted, content)
        return await super()._send(delivery, content)


def _outcome_of(reply: Reply) -> Outcome:
    if reply.is_positive:
        return Outcome.RELAYED
    return Outcome.DEFERRED if reply.is_transient else Outcome.REFUSED


async def _finish(delivery: Delivery) -> None:
    """Wait for the reply to a message, for the record."""
    try:
        reply = await delivery.outcome()
    except UpstreamFault:
        delivery.end(Outcome.UNKNOWN, None, error_type=ErrorType.OUTCOME_UNKNOWN)
    except BaseException:
        delivery.end(Outcome.UNKNOWN, None, error_type=ErrorType.OUTCOME_UNKNOWN)
        raise
    else:
        delivery.end(_outcome_of(reply), reply, error_type=reply.error_type, answered=True)
        logger.info("outcome of a message whose client is gone", extra={"code": reply.code})
