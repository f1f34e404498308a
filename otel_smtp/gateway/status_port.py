"""A gateway's status port: makes the values that `status` needs for probes, metrics and the page."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_smtp import __version__
from otel_smtp.config import Settings
from otel_smtp.forwarding.ceiling import SharedCeilings
from otel_smtp.forwarding.limits import SharedLimits
from otel_smtp.forwarding.slots import SharedSlots
from otel_smtp.gateway.ports import bind
from otel_smtp.observing import Endpoint
from otel_smtp.status.live import LiveView
from otel_smtp.status.search import RecordedForm
from otel_smtp.status.traces import RecentTraces
from otel_smtp.telemetry.environment import own_resource
from otel_smtp.telemetry.redaction import Addresses, Redaction
from otel_smtp.telemetry.shapes import EncodedSpan

if TYPE_CHECKING:
    from otel_smtp.gateway.gateway import Gateway
    from otel_smtp.status.acting import QueueActions
    from otel_smtp.status.server import StatusServer
    from otel_smtp.status.views import QueueView, UpstreamView

logger: Final = logging.getLogger("otel_smtp.gateway.status_port")


class Process(NamedTuple):
    """This process among those of a gateway.

    Attributes:
        number: from 0. The first one has the operator's status port and asks the others for their status.
        status_ports: by number, each process's status port on the loopback. The first's is not used.
        token: the secret by which they authenticate to each other.
        sockets: that this one listens on, by the listeners' addresses.
        limits, slots: the shared ones; None: each process has its own.
        ceilings: the upstreams' learnt connection caps, if shared.
    """

    number: int
    status_ports: Sequence[int]
    token: str
    sockets: Mapping[Endpoint, Sequence[socket.socket]]
    ceilings: SharedCeilings | None = None
    limits: SharedLimits | None = None
    slots: SharedSlots | None = None


class StatusPort:
    """The status page and probes of one gateway.

    Args:
        gateway: whose status it is.
        address: as set by the operator.
        redaction: what the page may show of hosts and addresses.
        process: this one among the gateway's processes; None if it is the only one.

    Attributes:
        live: observes the gateway's connections for the page.
        listening: the address, with its real port; None while nothing listens.
    """

    def __init__(
        self, gateway: "Gateway", address: Endpoint, redaction: Redaction, process: Process | None = None
    ) -> None:
        self._gateway = gateway
        self._process = process
        self._address = address
        self._redaction = redaction
        self._traces = RecentTraces(catch_up=gateway.catch_up)
        self._server: StatusServer | None = None
        self.live = LiveView(shown_host=redaction.ip, shown_name=redaction.host_name)
        self.listening: Endpoint | None = None

    def show(self, redaction: Redaction) -> None:
        """Change what the page may show of hosts and addresses. Finished spans stay unchanged."""
        self._redaction = redaction
        self.live.show(redaction.ip, redaction.host_name)

    @property
    def keep(self) -> Callable[[Sequence[EncodedSpan], bool], None]:
        """Keeps finished spans for the page, those of traces with a fault for longer."""
        return self._traces.add

    async def start(self, *, is_required: bool) -> None:
        """Listen.

        Args:
            is_required: the operator set the address. The default may be taken, by another gateway for example; then
                mail is relayed without a status port.

        Raises:
            CannotListen: the address cannot be bound, and it is required.
        """
        # A cold start is measured to the first greeting, and this brings a web server: the event loop greets meanwhile.
        await asyncio.to_thread(_import_server)
        from otel_smtp.status.http import LOOPBACK, Network
        from otel_smtp.status.server import StatusServer
        from otel_smtp.status.siblings import Siblings

        gateway, process = self._gateway, self._process
        siblings: Siblings | None = None
        address, token = self._address, ""
        allow: Sequence[Network] = gateway.settings.status.allow
        if process is not None and process.number == 0:
            siblings = Siblings(0, dict(enumerate(process.status_ports[1:], start=1)), process.token)
        elif process is not None:
            is_required = False
            address, allow = Endpoint("127.0.0.1", process.status_ports[process.number]), LOOPBACK
            token = process.token
        self._server = StatusServer(
            live=self.live,
            traces=self._traces,
            checks={"draining": self._draining, **self._delivery_checks()},
            metrics=gateway.metrics,
            upstreams=self._upstreams,
            queue=self._queue if gateway.spool is not None else None,
            actions=self._actions(),
            resource=_resource(process.number if process is not None else None),
            trace_url=gateway.settings.status.trace_url,
            untraced=gateway.untraced,
            recorded_mailbox=lambda text: recorded_mailbox(text, self._redaction),
            allow=allow,
            reloads=lambda: gateway.told_of_reloads(),
            hosts=(gateway.settings.hostname, *gateway.settings.status.hosts),
            about=_about(gateway.settings, gateway.ready.traces_to),
            tail=gateway.mail_tail,
            siblings=siblings,
            number=process.number if process is not None else 0,
            token=token,
        )
        try:
            sock = bind(address, is_shared=process is not None, is_dual_stack=True)
        except OSError as error:
            if is_required:
                raise
            logger.warning("no status port: address in use", extra={"address": str(address), "error": str(error)})
            return
        self.listening = Endpoint(address.host, self._server.start(sock).port)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None and self.listening is not None:
            await self._server.stop()

    def _draining(self) -> str | None:
        return "shutting down" if self._gateway.is_draining else None

    def _no_upstream(self) -> str | None:
        return None if self._gateway.can_reach_an_upstream() else "no upstream can be reached"

    async def _queue(self) -> "QueueView":
        from otel_smtp.gateway.status_views import queue_view

        assert self._gateway.spool is not None
        return queue_view(self._gateway.spool, self._redaction)

    def _actions(self) -> "QueueActions | None":
        """The actions on the queue: none without a queue or a token."""
        from otel_smtp.status.acting import QueueActions

        token = self._gateway.settings.status.token
        if self._gateway.spool is None or token is None:
            return None
        return QueueActions(self._act, token.reveal())

    async def _act(self, command: str, ids: Sequence[str], client: str) -> Sequence[Mapping[str, Any]]:
        from otel_smtp.spool.messages import SpoolError

        spool = self._gateway.spool
        assert spool is not None
        shown = self._redaction.ip(client)
        request = {"command": command, "ids": list(ids), "operator": f"page at {shown}" if shown else "page"}
        try:
            done = [answer async for answer in spool.operations.run(request)]
            await spool.runner.look()  # the operator should see the result
        except SpoolError as error:
            return [{"queue_id": one, "error": str(error)} for one in ids]
        return [answer for answer in done if "queue_id" in answer]

    def _delivery_checks(self) -> Mapping[str, Callable[[], str | None]]:
        """The checks that keep the gateway from accepting mail. With a queue, only its own state counts."""
        spool = self._gateway.spool
        return {"upstream": self._no_upstream} if spool is None else {"spool": spool.problem}

    def _upstreams(self) -> "Sequence[UpstreamView]":
        from otel_smtp.gateway.status_views import upstream_views

        tls = {upstream.name: str(upstream.url.tls) for upstream in self._gateway.settings.upstream}
        return upstream_views(self._gateway.upstreams(), tls)


def _import_server() -> None:
    import otel_smtp.gateway.status_views
    import otel_smtp.status.server
    import otel_smtp.telemetry.metrics_page  # noqa: F401 - for the first scrape


def recorded_mailbox(text: str, redaction: Redaction) -> RecordedForm:
    """A searched mailbox, or part of one, in the form that spans have."""
    choice = f"telemetry.addresses = {redaction.addresses}"
    is_address = "@" in text.strip("@")
    match redaction.addresses:
        case Addresses.DOMAIN if is_address:
            domain = redaction.domain(text)
            return RecordedForm(domain, f"traces hold domains, not addresses ({choice}): searched for {domain}")
        case Addresses.DOMAIN | Addresses.FULL:
            return RecordedForm(text)
        case Addresses.HASH if is_address:
            return RecordedForm(redaction.mailbox(text))
        case Addresses.HASH:
            return RecordedForm(None, f"traces hold hashes of whole addresses ({choice}): give a whole address")
        case Addresses.NONE:
            return RecordedForm(None, f"traces hold nothing of senders and recipients ({choice})")


def _resource(worker: int | None) -> Mapping[str, str | int]:
    """The gateway that made the API's traces: several may contribute to a trace of mail from a shared queue."""
    attributes = own_resource(worker, version=__version__).attributes
    return {name: value if isinstance(value, int) else str(value) for name, value in attributes.items()}


def _about(settings: Settings, traces_to: str) -> Mapping[str, str]:
    """The head of the page."""
    about = {"hostname": settings.hostname, "version": __version__, "traces to": traces_to}
    if settings.workers > 1:
        about["processes"] = str(settings.workers)
    return about


def age_seconds(since: float | None) -> float | None:
    """How long ago a time since the epoch is; None for None."""
    return None if since is None else max(0.0, time.time() - since)
