"""The picture of open connections: what their records say is what the page shows, redacted, and gone when closed."""

from collections.abc import Callable

import pytest

from otel_smtp.observing import Endpoint
from otel_smtp.smtp import replies
from otel_smtp.status.live import CONNECTIONS_SHOWN, PATH_LENGTH, LiveView
from tests.telemetry.driving import Client, FakeClock

LOCAL = Endpoint("127.0.0.1", 2525)


def live_view(clock: FakeClock | None = None) -> LiveView:
    clock = clock or FakeClock()
    return LiveView(shown_host=str, shown_name=str, clock=lambda: clock.now_ns / 1e9)


def test_a_connection_shows_its_level_and_since_when() -> None:
    clock = FakeClock()
    view = live_view(clock)
    client = Client(view, clock=clock)
    clock.advance(1)
    client.ehlo().message()
    clock.advance(5)
    client.refused("RCPT", replies.RELAY_DENIED)
    [row] = view.snapshot()
    assert row["peer"] == "192.0.2.7:50732"
    assert row["state"] == "Idle", "a pulse does not change the level"
    assert row["since_unix_milliseconds"] - row["opened_unix_milliseconds"] == 1000
    assert row["errors"] == 1
    states = [(step["state"], step["code"]) for step in row["path"]]
    assert states == [*((state, None) for state in ["New", "Active", "Data", "Active", "Idle"]), ("Error", 550)]


def test_a_level_holds_through_pulses_resets_and_segments() -> None:
    clock = FakeClock()
    view = live_view(clock)
    client = Client(view, clock=clock)
    for _ in range(2 * PATH_LENGTH):
        clock.advance(1)
        client.refused("RCPT", replies.RELAY_DENIED)
    clock.advance(1)
    client.rset()
    client.rotate()
    [row] = view.snapshot()
    assert row["state"] == "Active"
    assert [step["state"] for step in row["path"]][-3:] == ["Error", "Reset", "Active"]
    assert len(row["path"]) == PATH_LENGTH
    client.mail()
    assert len(view.snapshot()[0]["path"]) == PATH_LENGTH


def test_the_same_connections_give_the_same_snapshot_while_time_passes() -> None:
    clock = FakeClock()
    view = live_view(clock)
    Client(view, clock=clock)
    before = view.snapshot()
    clock.advance(60)
    assert view.snapshot() == before


def test_tls_login_and_messages_are_shown_and_the_user_is_not() -> None:
    view = live_view()
    client = Client(view).starttls().ehlo("app.example.com").auth("reports@example.com")
    client.message().message().message()
    [row] = view.snapshot()
    assert row["tls"] == {"version": "1.3", "cipher": "TLS_AES_256_GCM_SHA384"}
    assert (row["hello"], row["auth"], row["messages"]) == ("app.example.com", "PLAIN", 3)
    assert "reports" not in str(row)


def test_a_login_that_failed_is_not_shown() -> None:
    view = live_view()
    Client(view).ehlo().auth(reply=replies.AUTH_FAILED)
    assert view.snapshot()[0]["auth"] is None


def test_what_redaction_hides_is_not_shown() -> None:
    view = LiveView(shown_host=lambda _: None, shown_name=lambda _: None)
    Client(view).ehlo("annas-laptop")
    [row] = view.snapshot()
    assert (row["peer"], row["hello"]) == ("", "")


def test_beside_a_shortened_address_no_port_is_shown() -> None:
    view = LiveView(shown_host=lambda _: "192.0.2.0", shown_name=str)
    Client(view)
    assert view.snapshot()[0]["peer"] == "192.0.2.0"


def test_a_proxied_client_is_shown_instead_of_the_proxy() -> None:
    view = live_view()
    Client(view).proxied(Endpoint("2001:db8::1", 5), LOCAL)
    assert view.snapshot()[0]["peer"] == "[2001:db8::1]:5"


def test_a_closed_connection_is_forgotten_and_stays_counted() -> None:
    view = live_view()
    Client(view).ehlo().message().quit()
    view.connection_refused("capacity")
    assert view.snapshot() == []
    assert view.counters() == {
        "connections_open": 0,
        "connections_accepted": 1,
        "connections_refused": {"capacity": 1},
        "transactions": {"relayed": 1},
    }


def test_what_a_client_says_of_itself_is_bounded() -> None:
    view = live_view()
    Client(view).ehlo("x" * 1000)
    assert len(view.snapshot()[0]["hello"]) == 64


def test_more_connections_than_a_page_holds_are_counted_only() -> None:
    view = live_view()
    for _ in range(CONNECTIONS_SHOWN + 5):
        Client(view)
    assert len(view.snapshot()) == CONNECTIONS_SHOWN
    assert view.counters()["connections_open"] == CONNECTIONS_SHOWN + 5


CHANGES: list[Callable[[Client], object]] = [
    lambda client: client.ehlo().mail(),
    lambda client: client.rcpt(reply=replies.RELAY_DENIED),
    lambda client: client.rcpt().data(),
    lambda client: client.header().final(),
    lambda client: client.quit(),
]


@pytest.mark.parametrize("rotates", [False, True])
def test_each_change_grows_the_version_and_nothing_else_does(rotates: bool) -> None:
    view = live_view()
    seen = [view.version]
    clients = [Client(view), Client(view)]
    seen.append(view.version)
    for client in clients:
        client.message()
        for change in CHANGES:
            change(client)
            seen.append(view.version)
            view.snapshot()
            if rotates and client.record.end.reason is None:
                client.rotate()
            assert view.version == seen[-1]
    assert seen == sorted(set(seen))


def test_a_connection_that_cannot_be_shown_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    view = live_view()
    clients = [Client(view) for _ in range(3)]
    del clients[1].record.transitions
    assert [len(view.snapshot()), len(view.snapshot())] == [2, 2]
    assert len(caplog.records) == 1
