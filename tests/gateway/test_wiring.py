"""Settings as the rooms get them. What a room holds by default is what the settings say by default."""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_type_hints

import pytest

from otel_smtp import Settings, load
from otel_smtp.config import LimitsTable, TimeoutsTable, UpstreamTimeoutTable
from otel_smtp.config.consistency import HANDED_ON_MESSAGES
from otel_smtp.forwarding.settings import PoolLimits, ReplyLimits, TracePolicy, UpstreamSettings
from otel_smtp.forwarding.settings import Timeouts as ForwardingTimeouts
from otel_smtp.forwarding.slots import IDLE_SECONDS, TURN_MESSAGES, SlotSettings
from otel_smtp.gateway import wiring
from otel_smtp.server.listener import Server
from otel_smtp.server.policy import ListenerPolicy, ServerTimeouts
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.spool.schedule import Schedule
from otel_smtp.telemetry.redaction import Redaction
from otel_smtp.telemetry.setup import TelemetryOptions

SETTINGS: Final[dict[str, Any]] = {
    "upstream": [{"url": "smtp://mail.example.com"}],
    "delivery": {"mode": "queue"},
    "spool": {"directory": "/nonexistent"},
}


def rooms(settings: Settings) -> Iterator[Any]:
    """Every value object that is made of settings."""
    policy = wiring.listener_policy(settings, settings.listener[0], tls_context=None, authenticator=None)
    upstream = wiring.upstream_settings(settings.upstream[0])
    redaction = wiring.redaction(settings)
    yield from (policy, policy.protocol, policy.protocol.limits, policy.timeouts)
    yield from (upstream, upstream.limits, upstream.reply_limits, upstream.timeouts)
    yield wiring.spool_settings(settings).schedule
    yield redaction
    yield wiring.telemetry_options(
        settings, redaction, span_sinks=(), memories=(), open_connections=lambda: iter(()),
        upstream_connections=lambda: iter(()), spool=lambda: None, shared_queue=lambda: None,
        store_timings=tuple, receivers=tuple,
    )  # fmt: skip


ROOMS: Final = (
    ListenerPolicy, ServerPolicy, ServerLimits, ServerTimeouts,
    UpstreamSettings, PoolLimits, ReplyLimits, ForwardingTimeouts,
    Schedule, Redaction, TelemetryOptions,
)  # fmt: skip

# Where they differ on purpose: a setting's default is derived from others, or is the operator's side of a room that
# is stricter by itself.
DIFFERENT: Final = {
    (ListenerPolicy, "allow"),  # nobody may relay, until somebody says who
    (ForwardingTimeouts, "reply"),  # longer in mode queue, which is compared below
    (TelemetryOptions, "version"),
    (TelemetryOptions, "policies"),  # one for each listener
    (TelemetryOptions, "upstreams"),
    (TelemetryOptions, "mechanisms"),  # known to the protocol's room
    (TelemetryOptions, "open_connections"),
    (TelemetryOptions, "upstream_connections"),
    (TelemetryOptions, "spool"),
    (TelemetryOptions, "shared_queue"),
    (TelemetryOptions, "store_verbs"),  # those of a queue, which the mode has
}


def defaults(room: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass that have a default."""
    found = {}
    for field in dataclasses.fields(room):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def test_every_room_is_looked_at() -> None:
    assert tuple(type(room) for room in rooms(load(values=SETTINGS))) == ROOMS


@pytest.mark.parametrize("number", range(len(ROOMS)), ids=[room.__name__ for room in ROOMS])
def test_a_rooms_defaults_are_those_of_the_settings(number: int) -> None:
    room = list(rooms(load(values=SETTINGS)))[number]
    for name, default in defaults(type(room)).items():
        if (type(room), name) not in DIFFERENT and not dataclasses.is_dataclass(default):
            assert getattr(room, name) == default, name


def test_the_difference_is_one() -> None:
    by_type = {type(room): room for room in rooms(load(values=SETTINGS))}
    called = ("open_connections", "upstream_connections", "spool")
    for room, name in DIFFERENT - {(TelemetryOptions, name) for name in called}:
        assert getattr(by_type[room], name) != defaults(room)[name], (room, name)


def test_an_upstream_in_mode_direct_has_the_rooms_reply_timeout() -> None:
    settings = load(upstream=["smtp://mail.example.com"])
    assert wiring.upstream_settings(settings.upstream[0]).timeouts == ForwardingTimeouts()


def test_connections_that_are_shared_out_are_few_and_handed_on() -> None:
    def limits(**more: Any) -> tuple[int, int, float]:
        settings = load(values={"upstream": [{"url": "smtp://mail.example.com", "connections_total": 3, **more}]})
        assert wiring.slot_settings(settings) == [SlotSettings("mail.example.com:25", 3)]
        made = wiring.upstream_settings(settings.upstream[0]).limits
        return made.connections, made.messages, made.idle_seconds

    assert limits() == (3, TURN_MESSAGES, IDLE_SECONDS)
    assert limits(connections=5, messages_per_connection=500, connection_idle="1m") == (3, TURN_MESSAGES, IDLE_SECONDS)
    assert limits(connections=2, messages_per_connection=7, connection_idle="2s") == (2, 7, 2.0)
    assert TURN_MESSAGES == HANDED_ON_MESSAGES
    assert wiring.slots(load(upstream=["smtp://mail.example.com"]), None, None) == {}


def test_the_servers_defaults_are_those_of_the_settings() -> None:
    limits = LimitsTable()
    parameters = inspect.signature(Server).parameters
    assert parameters["stress_percent"].default == limits.stress
    assert parameters["auth_failures_per_minute"].default == limits.auth_failures_per_minute


@pytest.mark.parametrize(
    ("room", "table"),
    [(ServerLimits, LimitsTable), (ServerTimeouts, TimeoutsTable), (ForwardingTimeouts, UpstreamTimeoutTable)],
)
def test_settings_that_are_passed_on_by_name_have_the_rooms_types(room: type[Any], table: type[Any]) -> None:
    ours, theirs = get_type_hints(room), get_type_hints(table)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 4
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_each_setting_arrives(tmp_path: Path) -> None:
    """Not one is forgotten on the way: each limit and timeout with a value of its own."""
    numbers = iter(range(1001, 2000))
    limits = {name: next(numbers) for name in LimitsTable.__struct_fields__ if name not in ("stress", "connections")}
    timeouts = {name: float(next(numbers)) for name in TimeoutsTable.__struct_fields__}
    upstream_timeouts = {name: float(next(numbers)) for name in UpstreamTimeoutTable.__struct_fields__}
    settings = load(
        values={
            "limits": limits,
            "timeouts": timeouts,
            "upstream": [{"url": "lmtp://127.0.0.1", "timeout": upstream_timeouts, "trace_context": "keep"}],
        }
    )
    policy, protocol, server_limits, server_timeouts, upstream, *_ = rooms(
        load(values={**SETTINGS, "limits": limits, "timeouts": timeouts})
    )
    assert dataclasses.asdict(server_limits) == {name: limits[name] for name in dataclasses.asdict(server_limits)}
    assert dataclasses.asdict(server_timeouts) == {
        **{name: timeouts[name] for name in timeouts if name != "shutdown_grace"},
        "octets_per_second": limits["octets_per_second"],
    }
    wired = wiring.upstream_settings(settings.upstream[0])
    assert dataclasses.asdict(wired.timeouts) == {**upstream_timeouts, "pool": ForwardingTimeouts().pool}
    assert (wired.is_lmtp, wired.trace_context) == (True, TracePolicy.KEEP)
    assert policy.protocol is protocol
    assert upstream.trace_context is TracePolicy.STRIP
