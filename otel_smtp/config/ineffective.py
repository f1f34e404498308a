"""Valid settings without effect beside the others, of which an operator who set them expects something.

They are warnings: a shared file or an injected environment may set more than one gateway uses. Settings that promise
protection, such as a users file without logins, are refused instead; see `consistency`.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from otel_smtp.config.addresses import covers_everybody
from otel_smtp.config.settings import ListenerTable, NotifyTable, Settings, TelemetryTable, UpstreamTable
from otel_smtp.smtp.states import TlsMode

_OF_THE_PAGE: Final = ("status.allow", "status.hosts", "status.trace_url", "status.token", "status.token_file")


def ineffective(settings: Settings, origins: Mapping[str, str]) -> Iterator[str]:
    """Name the settings without effect, and why.

    Args:
        settings: without contradictions.
        origins: by key path, where a setting was set; a default promises nothing.
    """
    for index, listener in enumerate(settings.listener):
        yield from _of_listener(f"listener.{index}", listener, origins)
    yield from _behind_one_for_all(settings.upstream)
    mode = settings.delivery.mode
    if mode == "queue" and settings.delivery.strategy == "buffered":
        yield "delivery.strategy has no effect with delivery.mode = queue: no client waits for the upstream"
    if mode == "direct" and (keys := [key for key in origins if key.startswith("spool.")]):
        yield _sentence(_without_files(keys), "no effect with delivery.mode = direct, which has no queue")
    if settings.spool.bounce != "mail":
        if "spool.warn_after" in origins and settings.spool.warn_after is not None:
            yield f"spool.warn_after has no effect with spool.bounce = {settings.spool.bounce}"
        for index, receiver in enumerate(settings.notify):
            yield from _of_receiver(f"notify.{index}", receiver, settings.spool.bounce)
    yield from _of_telemetry(settings.telemetry, origins)
    if settings.status.address is None and (keys := [key for key in _OF_THE_PAGE if key in origins]):
        yield _sentence(_without_files(keys), "no effect with status.address = off")


def _of_listener(path: str, listener: ListenerTable, origins: Mapping[str, str]) -> Iterator[str]:
    if listener.auth_in_clear:
        if listener.auth == "off":
            yield f"{path}.auth_in_clear has no effect with {path}.auth = off"
        elif listener.tls is TlsMode.IMPLICIT:
            yield f"{path}.auth_in_clear has no effect with {path}.tls = implicit"
    if listener.open_relay and (listener.auth == "required" or not covers_everybody(listener.allow)):
        yield f"{path}.open_relay has no effect: {path} is no open relay"
    if all(address.port is None for address in listener.address):
        if listener.auth != "required" and f"{path}.allow" in origins:
            yield f"{path}.allow has no effect on unix sockets: all who can open them may relay"
        if listener.proxy_protocol_from:
            yield f"{path}.proxy_protocol_from has no effect on unix sockets"


def _behind_one_for_all(upstreams: tuple[UpstreamTable, ...]) -> Iterator[str]:
    """Routes that get no mail as long as an earlier upstream can be reached."""
    all_mail = next((n for n, one in enumerate(upstreams) if not one.senders and not one.recipients), len(upstreams))
    for index, upstream in enumerate(upstreams[all_mail + 1 :], all_mail + 1):
        keys = [f"upstream.{index}.{name}" for name in ("senders", "recipients") if getattr(upstream, name)]
        if keys:
            yield (
                f"{' and '.join(keys)}: upstream.{all_mail}, which is for all mail, is asked first; "
                f"move it behind upstream.{index} to prefer this one"
            )


def _of_receiver(path: str, receiver: NotifyTable, bounce: str) -> Iterator[str]:
    if "bounced" in receiver.events and "refused" not in receiver.events:
        yield f"{path}.events lists bounced, but with spool.bounce = {bounce} such recipients are reported as refused"


def _of_telemetry(telemetry: TelemetryTable, origins: Mapping[str, str]) -> Iterator[str]:
    if telemetry.addresses_hash_key is not None and telemetry.addresses != "hash":
        yield f"telemetry.addresses_hash_key has no effect with telemetry.addresses = {telemetry.addresses}"
    if "telemetry.slow" in origins and "slow" not in telemetry.keep:
        yield "telemetry.slow has no effect unless telemetry.keep lists slow"
    if "telemetry.keep_rate" in origins and not telemetry.keep:
        yield "telemetry.keep_rate has no effect without telemetry.keep"


def _without_files(keys: list[str]) -> list[str]:
    """The keys without secrets that came from files, which are listed by the files' keys."""
    return [key for key in keys if f"{key}_file" not in keys]


def _sentence(keys: list[str], what: str) -> str:
    return f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} {what}"
