"""Settings that are each valid and contradict each other."""

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from otel_smtp.config.addresses import (
    ListenAddress,
    covers_everybody,
    is_local,
    is_loopback_host,
    literal_address,
    reached_host,
)
from otel_smtp.config.problems import Problem
from otel_smtp.config.settings import (
    ListenerTable,
    NotifyTable,
    RateLimitTable,
    Settings,
    TelemetryTable,
    UpstreamTable,
)
from otel_smtp.config.values import Duration
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode

_T = TypeVar("_T")

HANDED_ON_MESSAGES: Final = 100
"""The time of a turn with a connection slot; see `forwarding.slots`."""


class Consistency:
    """Finds contradictions between valid settings.

    A table with an invalid setting is left out: problems that follow from it would only confuse.

    Args:
        settings: as they were read; an invalid one has its default.
        origins: by key path, where a setting was set.
        broken: key paths of invalid settings.
        verifies_tokens: the program verifies bearer tokens, so clients can log in without a users file.

    Attributes:
        problems: found by `run`.
        warnings: allowed but questionable settings.
    """

    def __init__(
        self, settings: Settings, origins: Mapping[str, str], broken: Sequence[str], *, verifies_tokens: bool = False
    ) -> None:
        self._settings = settings
        self._verifies_tokens = verifies_tokens
        self._origins = origins
        self._broken = broken
        self.problems: list[Problem] = []
        self.warnings: list[str] = []

    def run(self) -> None:
        """Check everything."""
        settings = self._settings
        listeners = self._sound("listener", settings.listener)
        upstreams = self._sound("upstream", settings.upstream)
        for path, listener in listeners:
            self._listener(path, listener)
        for path, upstream in upstreams:
            self._upstream(path, upstream)
            self._loop(path, upstream, listeners)
        self._names_differ(listeners)
        self._names_differ(upstreams)
        self._limits(upstreams)
        self._slots(upstreams)
        self._notify(self._sound("notify", settings.notify))
        self._addresses_differ(listeners)
        if self._is_sound("delivery") and self._is_sound("spool"):
            self._spool(settings)
        if self._is_sound("telemetry"):
            self._telemetry(settings.telemetry)

    def _is_sound(self, path: str) -> bool:
        return not any(key == path or key.startswith(f"{path}.") for key in self._broken)

    def _sound(self, path: str, tables: Sequence[_T]) -> list[tuple[str, _T]]:
        return [(f"{path}.{index}", table) for index, table in enumerate(tables) if self._is_sound(f"{path}.{index}")]

    def _add(self, key: str, value: object, message: str) -> None:
        self.problems.append(Problem(self._origin(key), key, value, message))

    def _origin(self, key: str) -> str:
        """Where a setting was set; for a default or a missing one, where another of its table was."""
        table = f"{key.rpartition('.')[0]}."
        beside = (source for path, source in self._origins.items() if table != "." and path.startswith(table))
        return self._origins.get(key) or next(beside, "default")

    # Listeners

    def _listener(self, path: str, listener: ListenerTable) -> None:
        self._listener_tls(path, listener)
        self._listener_auth(path, listener)
        if listener.is_exposed:
            self._exposure(path, listener)
        if listener.protocol == "lmtp" and any(address.port == 25 for address in listener.address):
            self._add(f"{path}.protocol", "lmtp", "LMTP must not use port 25 (RFC 2033 5); choose another port")

    def _listener_tls(self, path: str, listener: ListenerTable) -> None:
        if listener.tls is TlsMode.OFF:
            for name in ("tls_cert", "tls_key"):
                if getattr(listener, name) is not None:
                    self._add(f"{path}.{name}", str(getattr(listener, name)), "has no effect with tls = off; "
                                 f"set {path}.tls to starttls or implicit")  # fmt: skip
            if listener.tls_required:
                self._add(f"{path}.tls_required", True, f"contradicts {path}.tls = off; allowed: starttls, implicit")
            return
        for name in ("tls_cert", "tls_key"):
            if getattr(listener, name) is None:
                self._add(f"{path}.tls", str(listener.tls), f"needs {path}.{name}")

    def _listener_auth(self, path: str, listener: ListenerTable) -> None:
        if listener.auth == "off":
            if listener.auth_users_file is not None:
                # An operator who names users believes that clients log in.
                self._add(
                    f"{path}.auth_users_file", str(listener.auth_users_file),
                    f"has no effect with auth = off; set {path}.auth to required or optional",
                )  # fmt: skip
            return
        if listener.auth_users_file is None and not self._verifies_tokens:
            self._add(f"{path}.auth", listener.auth, f"needs {path}.auth_users_file")
        if listener.tls is TlsMode.OFF and not listener.auth_in_clear:
            self._add(
                f"{path}.auth", listener.auth,
                f"needs TLS: set {path}.tls to starttls or implicit, or {path}.auth_in_clear = true",
            )  # fmt: skip

    def _exposure(self, path: str, listener: ListenerTable) -> None:
        """No open relay by mistake, and no password in the clear across a network."""
        exposed = [ListenAddress().show(address) for address in listener.address if not is_local(address)]
        has_auth_over_tls = listener.auth != "off" and listener.tls is not TlsMode.OFF and not listener.auth_in_clear
        if f"{path}.allow" not in self._origins and not has_auth_over_tls:
            self._add(
                f"{path}.address", exposed,
                f"other machines can reach it, so say who may relay: set {path}.allow to their networks, "
                f"or {path}.auth = required with {path}.tls = starttls or implicit",
            )  # fmt: skip
            return
        if covers_everybody(listener.allow) and listener.auth != "required":
            reach = f"lets any client that reaches {', '.join(exposed)} relay to anybody"
            if listener.open_relay:
                self.warnings.append(f"{self._origins[f'{path}.open_relay']}: {path}.allow {reach}")
            else:
                self._add(
                    f"{path}.allow", [str(network) for network in listener.allow],
                    f"{reach}: an open relay; name the networks of your own clients, set {path}.auth = required, "
                    f"or {path}.open_relay = true if that is meant",
                )  # fmt: skip
        self._believed_proxies(path, listener)
        if listener.auth != "off" and listener.auth_in_clear:
            self.warnings.append(f"{path}.auth_in_clear: clients send passwords in clear to {', '.join(exposed)}")

    def _believed_proxies(self, path: str, listener: ListenerTable) -> None:
        """A client whose own PROXY header is trusted chooses its address, and thereby whether it may relay."""
        proxies = listener.proxy_protocol_from
        chooses = listener.allow and listener.auth != "required" and not covers_everybody(listener.allow)
        if chooses and covers_everybody(proxies):
            self._add(
                f"{path}.proxy_protocol_from", [str(network) for network in proxies],
                f"any client could name itself an address of {path}.allow and relay; list only the load balancers, "
                f"or set {path}.allow = [] or {path}.auth = required",
            )  # fmt: skip

    def _names_differ(
        self,
        tables: Sequence[tuple[str, ListenerTable]]
        | Sequence[tuple[str, UpstreamTable]]
        | Sequence[tuple[str, RateLimitTable]]
        | Sequence[tuple[str, NotifyTable]],
    ) -> None:
        first: dict[str, str] = {}
        for path, table in tables:
            if table.name in first:
                self._add(f"{path}.name", table.name, f"is also the name of {first[table.name]}; names must differ")
            first.setdefault(table.name, path)

    def _addresses_differ(self, listeners: Sequence[tuple[str, ListenerTable]]) -> None:
        first: dict[Endpoint, str] = {}
        for path, listener in listeners:
            for address in listener.address:
                if address in first and address.port != 0:
                    self._add(f"{path}.address", str(address), f"is also an address of {first[address]}")
                first.setdefault(address, path)
        status = self._settings.status.address
        if status in first and status.port != 0 and self._is_sound("status"):
            self._add("status.address", str(status), f"is also an address of {first[status]}")

    # Upstreams

    def _upstream(self, path: str, upstream: UpstreamTable) -> None:
        url = upstream.url
        if upstream.username:
            if upstream.password is None and not upstream.token_url:
                self._add(f"{path}.username", upstream.username, f"needs {path}.password_file or {path}.password")
            if url.tls is TlsMode.OFF and not url.is_local:
                self._add(
                    f"{path}.username", upstream.username,
                    f"would be sent in clear to {url}; use smtp+starttls:// or smtps://",
                )  # fmt: skip
            if upstream.auth == "off":
                self._add(f"{path}.auth", "off", f"contradicts {path}.username")
        else:
            if upstream.password is not None:
                self._add(f"{path}.password", "***", f"needs {path}.username")
            if upstream.auth not in ("auto", "off"):
                self._add(f"{path}.auth", upstream.auth, f"needs {path}.username")
        self._upstream_tokens(path, upstream)
        if upstream.tls_cert is not None and upstream.tls_key is None:
            self._add(f"{path}.tls_cert", str(upstream.tls_cert), f"needs {path}.tls_key")
        if upstream.tls_key is not None and upstream.tls_cert is None:
            self._add(f"{path}.tls_key", str(upstream.tls_key), f"needs {path}.tls_cert")
        if url.tls is TlsMode.OFF:
            # An operator who names an authority believes that TLS is on.
            for name in ("ca_file", "server_name", "tls_cert"):
                if f"{path}.{name}" in self._origins:
                    shown = str(getattr(upstream, name))
                    self._add(f"{path}.{name}", shown, f"has no effect with {url}; use smtp+starttls:// or smtps://")

    def _upstream_tokens(self, path: str, upstream: UpstreamTable) -> None:
        if upstream.token_url:
            if not upstream.username or not upstream.client_id:
                self._add(f"{path}.token_url", upstream.token_url, f"needs {path}.username and {path}.client_id")
            if upstream.password is not None:
                self._add(f"{path}.password", "***", f"contradicts {path}.token_url")
            if upstream.auth not in ("auto", "xoauth2"):
                self._add(f"{path}.auth", upstream.auth, f"contradicts {path}.token_url: xoauth2 or auto")
            if upstream.client_secret is None and upstream.refresh_token is None:
                self._add(
                    f"{path}.token_url", upstream.token_url, f"needs {path}.client_secret or {path}.refresh_token"
                )
            return
        for name in ("client_id", "client_secret", "refresh_token", "scope"):
            if getattr(upstream, name):
                self._add(f"{path}.{name}", "***" if "_" in name else upstream.scope, f"needs {path}.token_url")

    def _slots(self, upstreams: Sequence[tuple[str, UpstreamTable]]) -> None:
        """Warn of settings never reached because connections are shared out."""
        for path, upstream in upstreams:
            total = upstream.connections_total
            if total is None:
                continue
            for name, most, why in (
                ("connections", total, f"{path}.connections_total lets all together have no more"),
                ("messages_per_connection", HANDED_ON_MESSAGES, f"{path}.connections_total lets others have a turn"),
            ):
                given = getattr(upstream, name)
                if given > most and f"{path}.{name}" in self._origins:
                    self.warnings.append(f"{path}.{name} = {given} is lowered to {most}: {why}")

    def _limits(self, upstreams: Sequence[tuple[str, UpstreamTable]]) -> None:
        limits = self._sound("limit", self._settings.limit)
        self._names_differ(limits)
        for path, limit in limits:
            if limit.burst > limit.rate.amount:
                self._add(f"{path}.burst", limit.burst, f"is more than {path}.rate lets leave: {limit.rate.amount}")
        if len(limits) < len(self._settings.limit):
            return  # the names of the others may be wrong
        names = [limit.name for _, limit in limits]
        for path, upstream in upstreams:
            for name in dict.fromkeys(upstream.limits):
                if name not in names:
                    known = ", ".join(names) or "there is no [[limit]]"
                    self._add(f"{path}.limits", list(upstream.limits), f"no [[limit]] is called {name}: {known}")
                elif upstream.limits.count(name) > 1:
                    self._add(f"{path}.limits", list(upstream.limits), f"names {name} twice")
        used = {name for _, upstream in upstreams for name in upstream.limits}
        self.warnings += [f"{path}: no upstream names it" for path, limit in limits if limit.name not in used]

    def _notify(self, receivers: Sequence[tuple[str, NotifyTable]]) -> None:
        self._names_differ(receivers)
        for path, receiver in receivers:
            if receiver.key is None:
                self._add(f"{path}.key_file", None, "is missing; nobody could tell unsigned outcomes from forged ones")
            if receiver.ca_file is not None and receiver.url.startswith("http:"):
                self._add(f"{path}.ca_file", str(receiver.ca_file), "has no effect with an http URL; use https")
            if self._is_sound("delivery") and self._settings.delivery.mode == "direct":
                self._add(
                    f"{path}.url", receiver.url,
                    "needs delivery.mode = queue or direct-then-queue: in mode direct the client has each recipient's "
                    "end in the replies",
                )  # fmt: skip

    def _loop(self, path: str, upstream: UpstreamTable, listeners: Sequence[tuple[str, ListenerTable]]) -> None:
        """Refuse an upstream that is our own listener: mail would loop until the hop limit."""
        target = upstream.url.endpoint
        for listener_path, listener in listeners:
            for address in listener.address:
                if self._is_same(target, address):
                    self._add(
                        f"{path}.url",
                        str(upstream.url),
                        f"is our own {listener_path} ({address}): mail would loop",
                    )
                    return

    def _is_same(self, target: Endpoint, address: Endpoint) -> bool:
        if target.port != address.port or target.port == 0:
            return False
        host, listening = reached_host(target.host), literal_address(address.host)
        if host in (address.host, reached_host(address.host)):
            return True
        if listening is not None and listening.is_unspecified:
            # It listens on all addresses, so every name of this machine is ours.
            return is_loopback_host(host) or host.lower() == self._settings.hostname.lower()
        is_by_name = "localhost" in (host.lower(), address.host.lower())
        return is_by_name and is_loopback_host(host) and is_loopback_host(address.host)

    # The rest

    def _spool(self, settings: Settings) -> None:
        spool, mode = settings.spool, settings.delivery.mode
        if mode != "direct" and spool.directory is None and spool.url is None:
            self._add("delivery.mode", mode, "needs spool.directory, or spool.url")
        if spool.url is not None and spool.directory is not None:
            self._add("spool.url", "***", "contradicts spool.directory; the queue is in one of them")
        if spool.url is None:
            for name in ("schema", "takeover_after"):
                if f"spool.{name}" in self._origins:
                    self._add(f"spool.{name}", getattr(spool, name), "has no effect without spool.url")
        if mode != "direct" and settings.workers > 1 and spool.url is None:
            self._add(
                "workers",
                settings.workers,
                f"delivery.mode = {mode} needs workers = 1, since one process owns spool.directory; "
                "several share a queue with spool.url",
            )
        if spool.notice_sender and spool.bounce != "mail":
            self._add("spool.notice_sender", spool.notice_sender, f"has no effect with spool.bounce = {spool.bounce}")
        is_set = "spool.warn_after" in self._origins  # the default follows
        if is_set and spool.warn_after is not None and spool.warn_after >= spool.max_age:
            shown = Duration().show(spool.warn_after)
            self._add("spool.warn_after", shown, 'must be before spool.max_age, or "off"')

    def _telemetry(self, telemetry: TelemetryTable) -> None:
        if telemetry.addresses == "hash" and telemetry.addresses_hash_key is None:
            # Without a key, anyone who knows an address could find it in the traces.
            self._add("telemetry.addresses", "hash", "needs telemetry.addresses_hash_key_file")

    def connections(self, file_limit: int | None) -> int:
        """The number of connections that fit into the process's file limit.

        A connection may need a socket to its client, one to an upstream, and a file of the spool; the last quarter is
        for everything else. A number that the operator set is refused if it does not fit; the default is lowered.
        """
        wanted = self._settings.limits.connections
        if file_limit is None or wanted <= file_limit // 4 or not self._is_sound("limits.connections"):
            return wanted
        room = max(1, file_limit // 4)
        if "limits.connections" in self._origins:
            self._add(
                "limits.connections", wanted,
                f"this process may open {file_limit} files; allowed: at most a quarter, {room} "
                "(raise the limit with ulimit -n or LimitNOFILE=)",
            )  # fmt: skip
            return wanted
        self.warnings.append(f"limits.connections lowered to {room}: this process may open only {file_limit} files")
        return room


def contradictions(settings: Settings) -> Sequence[Problem]:
    """Contradictions between settings that are each valid; see `Consistency`."""
    checks = Consistency(settings, settings.origins, ())
    checks.run()
    return checks.problems
