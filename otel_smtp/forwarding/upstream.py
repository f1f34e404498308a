"""The upstream relay: a `Forwarder` for upstreams in order of preference, transparent or buffered.

A transaction tries the upstreams that serve its mail until one gives a usable answer; see `delivery` for how, and
`attempts` for retries.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from otel_smtp.forwarding.base import LEAST, MailTransaction, Permanent, Transient
from otel_smtp.forwarding.ceiling import Ceiling
from otel_smtp.forwarding.delivery import Delivery
from otel_smtp.forwarding.pace import AnyLimit, Pace
from otel_smtp.forwarding.routes import Routes, Serving, whatever_they_serve
from otel_smtp.forwarding.settings import MEMORY_LIMIT_OCTETS, PACE_PATIENCE_SECONDS, Strategy, UpstreamSettings
from otel_smtp.forwarding.slots import AnySlots
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.forwarding.snapshots import UpstreamSnapshot
from otel_smtp.forwarding.transaction import Buffered, Spooled, Transaction, Transparent, bad_recipient
from otel_smtp.net import Sweep
from otel_smtp.observing import Observer, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import is_safe_path
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import BEYOND_SIZE, EXTENSIONS, Extensions, missing_extension
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode

PROBE_AFTER_SECONDS: Final = 60.0  # the greatest age of a probe's answer; a provider need not see us more often
PROBE_AGAIN_SECONDS: Final = 5.0  # while none can be reached, so that its return is noticed soon
CLOSE_GRACE_SECONDS: Final = 5.0
"""How long `close` waits for the replies to messages whose client has gone."""

_NO_NEEDS: Final = [*BEYOND_SIZE]
_STRATEGIES: Final[dict[Strategy, type[Transaction]]] = {
    Strategy.TRANSPARENT: Transparent,
    Strategy.BUFFERED: Buffered,
}


class UpstreamForwarder:
    """Relays each mail to the first of its upstreams that gives a usable answer.

    Args:
        upstreams: the preferred one first; at least one.
        strategy: when they are asked.
        hostname: what we call ourselves in EHLO.
        observer: provides trace headers, and is notified of deliveries that end after their transaction.
        sweep: the sweep of all deadlines here.
        ceilings: of the upstreams' connections, by name, if workers share them.
        limits: for pacing upstreams, by name.
        slots: of the upstreams' connections, by name, for those that have any.
        pace_patience_seconds: how long a client's mail waits for them.
        memory_limit_octets: for one message's body; the rest goes to a temporary file.
        shown: makes an upstream's words, which may name people, fit for log lines.

    Raises:
        OSError: a file of an upstream's TLS settings cannot be read.
    """

    def __init__(
        self,
        upstreams: Sequence[UpstreamSettings],
        *,
        strategy: Strategy = Strategy.TRANSPARENT,
        hostname: str,
        observer: Observer,
        sweep: Sweep,
        ceilings: Mapping[str, Ceiling] | None = None,
        limits: Mapping[str, AnyLimit] | None = None,
        slots: Mapping[str, AnySlots] | None = None,
        pace_patience_seconds: float = PACE_PATIENCE_SECONDS,
        memory_limit_octets: int = MEMORY_LIMIT_OCTETS,
        shown: Callable[[str], str] = str,
    ) -> None:
        if not upstreams:
            raise ValueError("an upstream relay needs an upstream")
        self.observer = observer
        self.memory_limit_octets = memory_limit_octets
        self._hostname = hostname
        self._shown = shown
        self._sweep = sweep
        self._retired: list[Smarthost] = []
        self._limits = limits or {}
        self._slots = slots or {}
        self.pace_patience_seconds = pace_patience_seconds
        self._room_made: Callable[[], None] = _nothing
        shared = ceilings or {}
        self._relay_by([self._smarthost(one, shared.get(one.name)) for one in upstreams], strategy)
        self._watched: set[Delivery] = set()
        self._all_ended: asyncio.Event | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._probe_again_at = 0.0

    def __repr__(self) -> str:
        return f"<UpstreamForwarder {self._strategy.__name__} {self._smarthosts!r}>"

    def _smarthost(self, settings: UpstreamSettings, ceiling: Ceiling | None = None) -> Smarthost:
        pace: Pace | None = None
        if settings.paced_by:
            pace = Pace([self._limits[name] for name in settings.paced_by], lambda: self._room_made())
            if pace.most_recipients is not None:  # more of them never leave at once
                most = min(settings.recipients_per_transaction, pace.most_recipients)
                settings = replace(settings, recipients_per_transaction=most)
        return Smarthost(
            settings,
            self._hostname,
            self._sweep,
            ceiling,
            pace,
            self._forget_promise,
            self._slots.get(settings.name),
            lambda: self._room_made(),
            self._shown,
        )

    def _relay_by(self, smarthosts: Sequence[Smarthost], strategy: Strategy) -> None:
        self._smarthosts = smarthosts
        self._routes = routes = Routes([(smarthost.settings, smarthost) for smarthost in smarthosts])
        # The `destination` of all mail; "": it depends on sender or recipient.
        self._name_of_all = _name(smarthosts) if routes.for_all is not None and routes.for_all.for_all else ""
        self._strategy = _STRATEGIES[strategy]
        self._capabilities: Extensions | None = None

    # Forwarder --------------------------------------------------------------------------------------------

    def capabilities(self) -> Extensions:
        """The common extensions of all upstreams that some mail prefers, by their last EHLOs; the minimum while one of
        them is being asked.

        If none of these can be reached, the first of the others that is known counts.
        """
        if self._capabilities is None:
            self._capabilities = self._promise()
        return self._capabilities

    def _promise(self) -> Extensions:
        preferred = self._routes.preferred
        if any(one.is_unheard for one in preferred):
            return LEAST
        known = [one for one in (*preferred, *self._smarthosts) if one.extensions is not None]
        if not known:
            return LEAST
        return _common([_capabilities_of(one) for one in known if one in preferred] or [_capabilities_of(known[0])])

    def _forget_promise(self) -> None:
        self._capabilities = None

    def begin(
        self,
        mail: Mail,
        record: TransactionRecord,
        *,
        strategy: type[Transaction] | None = None,
        destination: str | None = None,
    ) -> MailTransaction:
        """Open a transaction. No upstream is asked yet.

        Args:
            strategy: None: ours.
            destination: its upstreams serve the mail, whatever their patterns; None: the patterns decide.

        Raises:
            Permanent: no upstream serves the sender, or the mail is too big for all that do.
            Transient: all that do are known to lack an extension that the mail needs, and that was offered earlier.
        """
        if destination is not None:
            serving = whatever_they_serve(self._named(destination))
        else:
            serving = self._routes.for_all or self._routes.for_mail(mail)
        # Most mail needs no extension, fits the first upstream's SIZE, and is not refused here.
        reverse_path, size, *needs = mail
        known = serving.upstreams[0].extensions if serving.upstreams else None
        is_plain = needs == _NO_NEEDS and reverse_path.isascii()
        if (
            known is None
            or not is_plain
            or (size is not None and known.size and size > known.size)
            or not is_safe_path(reverse_path)
        ) and (refusal := _refusal(mail, serving)) is not None:
            raise Transient(refusal) if refusal.is_transient else Permanent(refusal)
        return (strategy or self._strategy)(self, mail, record, serving, is_plain)

    # Relay ------------------------------------------------------------------------------------------------

    def refusal(self, mail: Mail) -> Reply | None:
        """The permanent refusal of a mail that needs no upstream: see `begin`."""
        return _refusal(mail, self._routes.for_mail(mail))

    def destination(self, mail: Mail, recipient: Recipient) -> str | Reply:
        """The names of the upstreams that serve a recipient, the preferred one first, or why none does."""
        if (refusal := bad_recipient(mail, recipient)) is not None:
            return refusal
        if self._name_of_all:
            return self._name_of_all
        route = self._routes.for_mail(mail).for_recipient(recipient)
        return _name(route) if route else replies.RELAY_DENIED

    def keeps_8bit(self) -> bool:
        """See `Relay.keeps_8bit`."""
        return self.capabilities().eight_bit_mime and all(
            one.extensions is None or one.extensions.eight_bit_mime for one in self._routes.preferred
        )

    def concurrency(self, destination: str) -> int:
        """How many mails may be under way: as many as its least limited upstream takes."""
        named = self._named(destination)
        if len(named) == 1 or named[0].pace is not None:
            return named[0].concurrency()  # its mail waits for its limits, even if another upstream has room
        return max(smarthost.concurrency() for smarthost in named)

    def _named(self, destination: str) -> Sequence[Smarthost]:
        if destination == self._name_of_all:
            return self._smarthosts
        names = destination.split(",")
        # The settings may have changed since the name was noted; then any upstream may serve it.
        return [smarthost for smarthost in self._smarthosts if smarthost.settings.name in names] or self._smarthosts

    def watch_room(self, made: Callable[[], None]) -> None:
        """See `Relay.watch_room`."""
        self._room_made = made

    def for_spool(self) -> "SpoolRelay":
        """The same upstreams and connections for mail without a client: each recipient has its own verdict."""
        return SpoolRelay(self)

    # Knowledge ----------------------------------------------------------------------------------------

    async def learn(self, *, wait_seconds: float = 0.0) -> None:
        """Learn the upstreams' extensions in the background, for `capabilities` and for choosing among them.

        Args:
            wait_seconds: how long to wait for the upstreams that some mail prefers: until these answer, clients are
                offered the minimum.
        """
        await asyncio.wait(self._begin_to_learn(), timeout=wait_seconds)

    def _begin_to_learn(self) -> Sequence[asyncio.Task[None]]:
        """Ask each unknown upstream; returns the tasks for those that some mail prefers."""
        for task in self._background:
            task.cancel()  # some for former upstreams
        loop = asyncio.get_running_loop()
        learning = {one: loop.create_task(one.learn()) for one in self._smarthosts}
        for task in learning.values():
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        return [learning[one] for one in self._routes.preferred]

    # Status -----------------------------------------------------------------------------------------------

    def snapshot(self) -> Sequence[UpstreamSnapshot]:
        """The upstreams at this moment, in the order of preference."""
        now = time.monotonic()  # the loop's clock, even without a running loop
        return [
            UpstreamSnapshot(
                smarthost.settings.name,
                smarthost.endpoint,
                smarthost.snapshot(),
                smarthost.is_reachable,
                None if smarthost.retry_at is None else max(0.0, smarthost.retry_at - now),
                None if smarthost.heard_at is None else max(0.0, now - smarthost.heard_at),
                None if smarthost.failed_at is None else max(0.0, now - smarthost.failed_at),
                smarthost.failure,
            )
            for smarthost in self._smarthosts
        ]

    @property
    def is_reachable(self) -> bool:
        """Whether any upstream can be reached, as far as known."""
        return any(smarthost.is_reachable for smarthost in self._smarthosts)

    def probe_if_stale(self) -> None:
        """Probe upstreams in the background that have not been heard from for long.

        For health checks, which ask often and must not wait: they find the answer at their next request. No mail is
        sent.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._probes or now < self._probe_again_at:
            return
        known = max((smarthost.heard_at or 0.0 for smarthost in self._smarthosts), default=0.0)
        if known and now - known < PROBE_AFTER_SECONDS:
            return
        self._probe_again_at = now + (PROBE_AFTER_SECONDS if self.is_reachable else PROBE_AGAIN_SECONDS)
        for smarthost in self._smarthosts:
            probe = loop.create_task(smarthost.probe())
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    # New settings ---------------------------------------------------------------------------------------

    def replacement(
        self, upstreams: Sequence[UpstreamSettings], *, strategy: Strategy, unchanged: Collection[str]
    ) -> Callable[[], None]:
        """Prepare to relay by new settings.

        Args:
            upstreams: in order of preference; at least one.
            strategy: when they are asked.
            unchanged: names of upstreams whose settings stay the same. They keep their connections and our knowledge of
                them, and read their TLS files again.

        Returns:
            A function that makes the change. Open transactions end with the upstreams with which they began.

        Raises:
            OSError: a file of an upstream's TLS settings cannot be used; then nothing has changed.
        """
        known = {one.settings.name: one for one in self._smarthosts if one.settings.name in unchanged}
        kept = [(one, one.tls_context()) for one in known.values()]
        smarthosts = [known.get(one.name) or self._smarthost(one) for one in upstreams]

        def relay_by_them() -> None:
            for smarthost, context in kept:
                smarthost.secure_by(context)
            self._retired = [one for one in self._retired if not one.is_over]
            for smarthost in self._smarthosts:
                if smarthost not in smarthosts:
                    smarthost.retire()
                    self._retired.append(smarthost)
            self._relay_by(smarthosts, strategy)
            self._begin_to_learn()

        return relay_by_them

    # The end ----------------------------------------------------------------------------------------------

    async def give_slots_back(self) -> None:
        """Close idle connections with slots, and wait until the upstreams have noticed.

        For a gateway that is about to stop while others go on.
        """
        await asyncio.gather(*(smarthost.parted() for smarthost in (*self._smarthosts, *self._retired)))

    async def close(self, *, grace_seconds: float = CLOSE_GRACE_SECONDS) -> None:
        """Close the connections, those in use after their mail. Idempotent.

        Args:
            grace_seconds: how long messages without a client may wait for their reply.
        """
        if self._watched:
            self._all_ended = asyncio.Event()
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._all_ended.wait()
            except TimeoutError:
                pass
        for delivery in tuple(self._watched):
            delivery.give_up()
        for task in (*self._probes, *self._background):
            task.cancel()
        for smarthost in (*self._smarthosts, *self._retired):
            smarthost.close()

    def watch(self, delivery: Delivery) -> None:
        """Note a delivery that continues without its client, for `close` to await."""
        self._watched.add(delivery)

    def unwatch(self, delivery: Delivery) -> None:
        """Forget a delivery that has ended."""
        self._watched.discard(delivery)
        if not self._watched and self._all_ended is not None:
            self._all_ended.set()


def _nothing() -> None:
    """Ignore a notification."""


def _name(route: Sequence[Smarthost]) -> str:
    """The destination that stands for these upstreams."""
    return ",".join([smarthost.settings.name for smarthost in route])


def _capabilities_of(smarthost: Smarthost) -> Extensions:
    offered, settings = smarthost.extensions, smarthost.settings
    assert offered is not None
    if settings.reencode_8bit and not offered.eight_bit_mime:
        offered = replace(offered, eight_bit_mime=True)
    return offered if settings.tls is not TlsMode.OFF else replace(offered, require_tls=False)


def _common(each: Sequence[Extensions]) -> Extensions:
    """The extensions that all offer, with the greatest size: a mail too big for its own upstream is refused at MAIL."""
    if len(each) == 1:
        return each[0]
    fields: dict[str, Any] = {
        row.field: all(getattr(one, row.field) for one in each)
        for row in EXTENSIONS
        if row.is_relayed and row.field != "size"
    }
    sizes = [one.size for one in each]
    return Extensions(size=max(size for size in sizes if size) if all(sizes) else None, **fields)


def _refusal(mail: Mail, serving: Serving[Smarthost]) -> Reply | None:
    if not is_safe_path(mail.reverse_path):
        return replies.BAD_SENDER
    refusal: Reply | None = None
    for smarthost in serving.upstreams:
        extensions = smarthost.extensions
        if extensions is None:
            return None
        missing = missing_extension(mail, extensions, is_tls=smarthost.settings.tls is not TlsMode.OFF)
        if missing is None or missing is replies.NEEDS_8BITMIME:
            return None  # the content may still be 7-bit
        refusal = refusal or missing
    return refusal or replies.RELAY_DENIED


class SpoolRelay:
    """A `Relay` over the upstreams of a forwarder, for the spool: see `UpstreamForwarder.for_spool`.

    It shares the forwarder's methods: delegating would cost some calls per message.
    """

    def __init__(self, forwarder: UpstreamForwarder) -> None:
        self._begin = forwarder.begin
        self.capabilities = forwarder.capabilities
        self.refusal = forwarder.refusal
        self.destination = forwarder.destination
        self.keeps_8bit = forwarder.keeps_8bit
        self.concurrency = forwarder.concurrency
        self.watch_room = forwarder.watch_room

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """As `UpstreamForwarder`."""
        return self._begin(mail, record, strategy=Spooled)

    def begin_along(self, destination: str, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """See `Relay.begin_along`."""
        return self._begin(mail, record, strategy=Spooled, destination=destination)
