"""Settings that were read again: what holds at once, what waits for a restart, and that nothing of it is forgotten."""

from typing import Any

import msgspec
import pytest

from otel_smtp.config import Settings, change, load
from otel_smtp.config.changing import AT_ONCE
from otel_smtp.config.settings import SCHEMA, Key

UPSTREAM = {"name": "a", "url": "smtp://127.0.0.1:25"}
LISTENER = {"name": "local", "address": ["127.0.0.1:2525"]}


def settings(**tables: Any) -> Settings:
    return load(values={"upstream": [UPSTREAM], "listener": [LISTENER], **tables})


def test_nothing_has_changed() -> None:
    made = change(settings(), settings())
    assert (made.changed, made.needs_restart) == ((), ())
    assert made.settings == settings()


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"limits": {"recipients": 7}}, "limits.recipients"),
        ({"timeouts": {"command": "1m"}}, "timeouts.command"),
        ({"delivery": {"strategy": "buffered"}}, "delivery.strategy"),
        ({"telemetry": {"addresses": "none"}}, "telemetry.addresses"),
        ({"log": {"level": "error"}}, "log.level"),
        ({"listener": [{**LISTENER, "allow": ["10.0.0.0/8"]}]}, "listener.0.allow"),
        ({"upstream": [{**UPSTREAM, "connections": 3}]}, "upstream.0.connections"),
        ({"upstream": [{**UPSTREAM, "timeout": {"connect": "1s"}}]}, "upstream.0.timeout"),
        ({"upstream": [UPSTREAM, {"name": "b", "url": "smtp://127.0.0.1:26"}]}, "upstream"),
    ],
)
def test_what_holds_at_once(tables: dict[str, Any], key: str) -> None:
    after = settings(**tables)
    made = change(settings(), after)
    assert (made.changed, made.needs_restart) == ((key,), ())
    assert made.settings == after


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"workers": 2}, "workers"),
        ({"hostname": "other.example"}, "hostname"),
        ({"status": {"address": "off"}}, "status.address"),
        ({"log": {"format": "json"}}, "log.format"),
        ({"telemetry": {"state_events": "both"}}, "telemetry.state_events"),
        ({"spool": {"max_age": "6d"}}, "spool.max_age"),
        ({"listener": [{**LISTENER, "name": "other"}]}, "listener"),
        ({"listener": [LISTENER, {"name": "other", "address": ["127.0.0.1:2526"]}]}, "listener"),
    ],
)
def test_what_needs_a_restart_stays_as_it_was(tables: dict[str, Any], key: str) -> None:
    made = change(settings(), settings(**tables))
    assert made.changed == ()
    assert key in made.needs_restart
    assert msgspec.structs.replace(made.settings, origins=settings().origins, warnings=()) == settings()


def test_receivers_of_outcomes_change_at_once() -> None:
    queue: dict[str, Any] = {"delivery": {"mode": "queue"}, "spool": {"directory": "spool"}}
    app = {"url": "https://app.example/", "key": "a key of thirty-two octets, here"}
    before, after = settings(**queue), settings(**queue, notify=[app])
    assert change(before, after)[1:] == (("notify",), ())
    rotated = settings(**queue, notify=[app | {"key": "another of thirty-two octets, so"}])
    made = change(after, rotated)
    assert made[1:] == (("notify.0.key",), ())
    assert made.settings.notify == rotated.notify


def test_what_waits_for_a_restart_is_told_each_time() -> None:
    after = settings(workers=2, limits={"recipients": 7})
    once = change(settings(), after)
    again = change(once.settings, after)
    assert (again.changed, again.needs_restart) == ((), ("workers",))
    assert again.settings.limits.recipients == 7


def test_a_listener_that_moves_keeps_all_that_was_checked_with_its_address() -> None:
    """Who may relay suits the address: what is right for loopback would be an open relay elsewhere."""
    before = settings(listener=[{**LISTENER, "address": ["0.0.0.0:2525"], "allow": ["10.0.0.0/8"]}])
    after = settings(listener=[{**LISTENER, "allow": ["0.0.0.0/0"]}])
    made = change(before, after)
    assert made.changed == ()
    assert made.needs_restart == ("listener.0.address", "listener.0.allow")
    assert made.settings.listener == before.listener


def test_only_settings_are_named() -> None:
    for table, names in AT_ONCE.items():
        keys = {name for name, entry in SCHEMA[table].items() if isinstance(entry, Key) or entry in AT_ONCE}
        assert names <= keys


def test_a_new_limit_needs_a_restart_and_so_does_what_it_holds_for() -> None:
    limit = {"name": "rate", "rate": "30/m"}
    limited = {"upstream": [{**UPSTREAM, "connections": 3, "limits": ["rate"]}]}
    before = settings()
    new = change(before, settings(limit=[limit], **limited))
    assert new.needs_restart == ("upstream", "limit")
    assert new.settings.upstream == before.upstream
    assert new.changed == ()
    # So it is with connections that are shared out.
    three, four = (settings(upstream=[{**UPSTREAM, "connections_total": total}]) for total in (3, 4))
    for old, other in ((before, three), (three, four)):
        new = change(old, other)
        assert new.needs_restart == ("upstream",)
        assert new.settings.upstream == old.upstream
    assert change(three, before).needs_restart == ()
    # One that is there already may hold for an upstream from now on.
    new = change(settings(limit=[limit]), settings(limit=[limit], **limited))
    assert new.needs_restart == ()
    assert new.settings.upstream[0].limits == ("rate",)


def test_an_upstream_at_an_address_that_a_listener_keeps_waits_for_the_restart() -> None:
    """The new settings have no loop. Half of them would."""
    before = settings()
    after = settings(listener=[LISTENER | {"address": ["127.0.0.1:2526"]}], upstream=[{"url": "smtp://127.0.0.1:2525"}])
    made = change(before, after)
    assert made.settings.upstream == before.upstream
    assert (made.changed, made.needs_restart) == ((), ("listener.0.address", "upstream.0.name", "upstream.0.url"))


def test_receivers_wait_for_the_restart_that_brings_the_queue() -> None:
    before = settings()
    after = settings(
        delivery={"mode": "queue", "strategy": "buffered"},
        spool={"directory": "spool"},
        notify=[{"url": "https://app.example/", "key": "a key of thirty-two octets, here"}],
    )
    made = change(before, after)
    assert made.settings.notify == ()
    assert made.changed == ("delivery.strategy",)
    assert made.needs_restart == ("delivery.mode", "spool.directory", "notify")


def test_a_program_that_verifies_tokens_changes_settings_without_users() -> None:
    values: dict[str, Any] = {
        "upstream": [UPSTREAM],
        "listener": [LISTENER | {"auth": "required", "auth_in_clear": True}],
    }
    before = load(values=values, verifies_tokens=True)
    after = load(values=values | {"limits": {"hops": 7}}, verifies_tokens=True)
    assert change(before, after)[1:] == (("limits.hops",), ())
    moved = [values["listener"][0] | {"auth": "optional"}]
    assert change(before, load(values=values | {"listener": moved}, verifies_tokens=True)).changed == (
        "listener.0.auth",
    )
