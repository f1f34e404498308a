"""The picture of open connections: what a handle is told is what the page shows, redacted, and gone when closed."""

from otel_smtp.observing import ConnectionInfo, Endpoint, Outcome, TlsInfo
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.states import CloseReason, ConnState, StateMachine
from otel_smtp.status.live import CONNECTIONS_SHOWN, PATH_LENGTH, LiveView

LOCAL = Endpoint("127.0.0.1", 2525)


def info(number: int = 1) -> ConnectionInfo:
    return ConnectionInfo(f"{number:032x}", Endpoint("192.0.2.7", 40000 + number), LOCAL, "local")


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def live_view(clock: Clock | None = None) -> LiveView:
    return LiveView(shown_host=str, shown_name=str, clock=clock or Clock())


def test_a_connection_shows_its_level_and_since_when() -> None:
    clock = Clock()
    view = live_view(clock)
    machine = StateMachine(view.connection_opened(info()).conn_state)
    machine.enter(ConnState.NEW)
    clock.now += 1
    machine.enter(ConnState.ACTIVE)
    clock.now += 5
    machine.enter(ConnState.ERROR, verb="RCPT", reply_code=550)
    [row] = view.snapshot()
    assert row["peer"] == "192.0.2.7:40001"
    assert row["state"] == "Active", "a pulse does not change the level"
    assert row["since_unix_milliseconds"] - row["opened_unix_milliseconds"] == 1000
    assert row["errors"] == 1
    assert [(step["state"], step["code"]) for step in row["path"]] == [("New", None), ("Active", None), ("Error", 550)]


def test_the_same_connections_give_the_same_snapshot_while_time_passes() -> None:
    clock = Clock()
    view = live_view(clock)
    view.connection_opened(info())
    before = view.snapshot()
    clock.now += 60
    assert view.snapshot() == before


def test_tls_login_and_messages_are_shown_and_the_user_is_not() -> None:
    view = live_view()
    handle = view.connection_opened(info())
    machine = StateMachine(handle.conn_state)
    handle.tls_established(TlsInfo("1.3", "TLS_AES_256_GCM_SHA384"))
    handle.hello("EHLO", "app.example.com")
    handle.authenticated("reports@example.com", "SCRAM-SHA-256")
    machine.enter(ConnState.NEW)
    machine.enter(ConnState.ACTIVE)
    machine.enter(ConnState.IDLE, messages=3)
    [row] = view.snapshot()
    assert row["tls"] == {"version": "1.3", "cipher": "TLS_AES_256_GCM_SHA384"}
    assert (row["hello"], row["auth"], row["messages"]) == ("app.example.com", "SCRAM-SHA-256", 3)
    assert "reports" not in str(row)


def test_what_redaction_hides_is_not_shown() -> None:
    view = LiveView(shown_host=lambda _: None, shown_name=lambda _: None)
    view.connection_opened(info()).hello("EHLO", "annas-laptop")
    [row] = view.snapshot()
    assert (row["peer"], row["hello"]) == ("", "")


def test_beside_a_shortened_address_no_port_is_shown() -> None:
    view = LiveView(shown_host=lambda _: "192.0.2.0", shown_name=str)
    view.connection_opened(info())
    assert view.snapshot()[0]["peer"] == "192.0.2.0"


def test_a_proxied_client_is_shown_instead_of_the_proxy() -> None:
    view = live_view()
    view.connection_opened(info()).proxied(Endpoint("2001:db8::1", 5), LOCAL)
    assert view.snapshot()[0]["peer"] == "[2001:db8::1]:5"


def test_a_closed_connection_is_forgotten_and_stays_counted() -> None:
    view = live_view()
    handle = view.connection_opened(info())
    handle.transaction_begun(Mail(""), 1).ended(Outcome.RELAYED, None)
    handle.closed(CloseReason.QUIT, octets_received=1, octets_sent=1)
    view.connection_refused("capacity")
    assert view.snapshot() == []
    assert view.counters() == {
        "connections_open": 0,
        "connections_accepted": 1,
        "connections_refused": {"capacity": 1},
        "transactions": {"relayed": 1},
    }


def test_what_a_connection_can_make_grow_is_bounded() -> None:
    view = live_view()
    handle = view.connection_opened(info())
    machine = StateMachine(handle.conn_state)
    machine.enter(ConnState.NEW)
    machine.enter(ConnState.ACTIVE)
    for _ in range(10 * PATH_LENGTH):
        machine.enter(ConnState.ERROR, verb="NOOP", reply_code=500)
    handle.hello("EHLO", "x" * 1000)
    [row] = view.snapshot()
    assert len(row["path"]) == PATH_LENGTH
    assert len(row["hello"]) == 64


def test_more_connections_than_a_page_holds_are_counted_only() -> None:
    view = live_view()
    for number in range(CONNECTIONS_SHOWN + 5):
        view.connection_opened(info(number))
    assert len(view.snapshot()) == CONNECTIONS_SHOWN
    assert view.counters()["connections_open"] == CONNECTIONS_SHOWN + 5


def test_each_change_moves_the_version() -> None:
    view = live_view()
    seen = [view.version]
    handle = view.connection_opened(info())
    seen.append(view.version)
    StateMachine(handle.conn_state).enter(ConnState.NEW)
    seen.append(view.version)
    handle.closed(CloseReason.QUIT, octets_received=0, octets_sent=0)
    seen.append(view.version)
    assert len(set(seen)) == len(seen)


def test_replies_that_are_told_need_no_handling() -> None:
    live_view().connection_opened(info()).replied("RCPT", replies.Reply(550, None, ("no",)))
