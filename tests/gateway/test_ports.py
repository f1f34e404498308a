"""Ports before they are listened on: bound alone or shared, and given back."""

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from otel_smtp import CannotListen, Gateway, Settings, load
from otel_smtp.gateway.ports import SharedPorts, bind, bind_all, with_present_addresses, without_ipv6_loopback
from otel_smtp.net.listening import stop_listening
from otel_smtp.observing import Endpoint

ANY_PORT = Endpoint("127.0.0.1", 0)


def needs_ipv6() -> None:
    try:
        bind(Endpoint("::1", 0)).close()
    except OSError:
        pytest.skip("this machine has no IPv6")


def address_of(sock: socket.socket) -> Endpoint:
    host, port = sock.getsockname()[:2]
    return Endpoint(host, port)


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_port_is_shared_only_if_both_ask_for_it(first: bool, second: bool) -> None:
    with bind(ANY_PORT, is_shared=first) as one:
        one.listen()
        with pytest.raises(OSError, match="in use"):
            bind(address_of(one), is_shared=second)


def test_a_port_is_shared_if_both_ask_for_it() -> None:
    with bind(ANY_PORT, is_shared=True) as one, bind(address_of(one), is_shared=True) as two:
        one.listen()
        two.listen()
        assert address_of(one) == address_of(two)


def test_a_port_is_free_again_while_connections_to_it_linger() -> None:
    with bind(ANY_PORT) as listening:
        listening.listen()
        address = address_of(listening)
        with socket.create_connection((address.host, address.port or 0)) as client:
            accepted, _ = listening.accept()
            accepted.close()  # first, so that this end waits in TIME_WAIT
            assert client.recv(1) == b""
    bind(address, is_shared=True).close()


def test_both_families_have_the_port_unless_one_takes_both() -> None:
    needs_ipv6()
    with bind(Endpoint("0.0.0.0", 0)) as four:
        four.listen()
        port = address_of(four).port
        bind(Endpoint("::", port)).close()
        with pytest.raises(OSError, match="in use"):
            bind(Endpoint("::", port), is_dual_stack=True)


def test_a_host_without_an_address_cannot_be_bound() -> None:
    with pytest.raises(OSError, match=r"not known|resolution"):
        bind(Endpoint("no such host", 0))


# Workers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def settings(path: str, **status: str) -> Settings:
    return load(
        values={
            "workers": 3,
            "listener": [{"address": ["127.0.0.1:0", "127.0.0.1:0"]}, {"name": "unix", "address": [f"unix:{path}"]}],
            "upstream": [{"url": "smtp://127.0.0.1:1"}],
            "status": status,
        }
    )


def test_workers_get_real_ports_that_are_held_and_given_back(path: str) -> None:
    with SharedPorts(settings(path, address="127.0.0.1:0")) as shared:
        first, second = shared.settings.listener[0].address
        status = shared.settings.status.address
        assert status is not None
        ports = {first.port, second.port, status.port, *shared.worker_status_ports}
        assert len(ports) == 3 + 3
        assert 0 not in ports
        assert shared.settings.listener[1].address == (Endpoint(path),)
        for address in (first, second, status):
            with bind(address, is_shared=True) as worker:
                worker.listen()
            with bind(address, is_shared=True) as worker:
                worker.listen()
    for address in (first, second, status):
        with bind(address) as alone:
            alone.listen()


def is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def test_each_place_has_sockets_of_its_own_that_outlive_its_worker(path: str) -> None:
    with SharedPorts(settings(path, address="off")) as shared:
        first, second = shared.settings.listener[0].address
        sockets = {(place, one): shared._listeners[one][place] for place in range(3) for one in (first, second)}
        assert len({sock.fileno() for (sock,) in sockets.values()}) == 6
        (unix,) = {sock for place in shared._listeners[Endpoint(path)] for sock in place}  # of all places
        for sock in (unix, *(sock for (sock,) in sockets.values())):
            sock.listen()
        shared.stop_listening(1)
        assert [is_listening(sockets[place, one][0]) for place in range(3) for one in (first, second)] == [
            *(True, True),
            *(False, False),
            *(True, True),
        ]
        assert is_listening(unix)
        sockets[1, first][0].listen()  # a worker is back
        assert address_of(sockets[1, first][0]) == first
        mine = shared.claim(1)  # what a worker does
        assert mine == {first: sockets[1, first], second: sockets[1, second], Endpoint(path): [unix]}
        assert {sock.fileno() for (place, _), (sock,) in sockets.items() if place != 1} == {-1}
        assert is_listening(unix)
        assert Path(path).is_socket()
        shared.close_listeners()
        assert not Path(path).exists()
    assert unix.fileno() == -1


def test_a_place_that_was_left_twice_serves_clients_again(path: str) -> None:
    with SharedPorts(settings(path, address="off")) as shared:
        address, _ = shared.settings.listener[0].address
        (sock,) = shared._listeners[address][0]
        sock.listen()
        stop_listening(sock)  # a worker drains
        shared.stop_listening(0)  # and is not back soon
        sock.listen()
        with socket.create_connection((address.host, address.port or 0), timeout=10):
            served, _ = sock.accept()
            served.setblocking(False)
            with served, pytest.raises(BlockingIOError):  # no end, and nothing yet
                served.recv(1)


def test_a_name_with_several_addresses_is_listened_at_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def resolved(host: str, *more: Any, **options: Any) -> list[Any]:
        hosts = ["127.0.0.2", "127.0.0.3"] if host == "here.example" else [host]
        return [found for one in hosts for found in resolve(one, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    with bind(Endpoint("here.example", 0)) as free:
        port = address_of(free).port
    bound = bind_all(Endpoint("here.example", port))
    assert [address_of(sock) for sock in bound] == [Endpoint("127.0.0.2", port), Endpoint("127.0.0.3", port)]
    bound[0].close()
    bound[1].listen()
    with bind(Endpoint("127.0.0.3", 0)) as other:
        other.listen()
        with pytest.raises(CannotListen, match="in use"):
            bind_all(Endpoint("here.example", address_of(other).port))
        bind(Endpoint("127.0.0.2", address_of(other).port)).close()  # the first of them was given back
    bound[1].close()


def test_what_is_no_socket_is_not_removed(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(CannotListen, match="in use"):
        SharedPorts(settings(path, address="off"))
    assert Path(path).read_text() == "mine"


def test_without_a_status_port_workers_have_none(path: str) -> None:
    with SharedPorts(settings(path, address="off")) as shared:
        assert shared.settings.status.address is None
        assert shared.worker_status_ports == ()


def test_a_taken_status_port_is_an_error_if_the_operator_asked_for_it(path: str) -> None:
    # The other gateway shares its port among its workers: that must not include ours.
    with bind(ANY_PORT, is_shared=True) as taken:
        taken.listen()
        asked = settings(path, address=str(address_of(taken)))
        with pytest.raises(OSError, match="in use"):
            SharedPorts(asked)
        with SharedPorts(msgspec.structs.replace(asked, origins={})) as shared:
            assert shared.settings.status.address is None
            assert shared.worker_status_ports == ()


def test_a_taken_listener_is_an_error_and_gives_back_what_was_held() -> None:
    with bind(ANY_PORT) as free:
        status = address_of(free)
    with bind(ANY_PORT) as taken:
        taken.listen()
        values = {
            "workers": 2,
            "listener": [{"address": [str(address_of(taken))]}],
            "upstream": [{"url": "smtp://127.0.0.1:1"}],
            "status": {"address": str(status)},
        }
        with pytest.raises(OSError, match="in use"):
            SharedPorts(load(values=values))
        bind(status).close()


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_listener_of_another_gateway_is_refused_whether_it_has_workers_or_not(is_shared: bool) -> None:
    with bind(ANY_PORT, is_shared=is_shared) as taken:
        values = {
            "workers": 2,
            "listener": [{"address": [str(address_of(taken))]}],
            "upstream": [{"url": "smtp://127.0.0.1:1"}],
        }
        taken.listen()
        with pytest.raises(CannotListen, match=r"listener\.0\.address .*in use"):
            SharedPorts(load(values=values))
    SharedPorts(load(values=values)).__exit__()


@pytest.mark.parametrize("backlog", [0, 100])
def test_a_unix_socket_of_another_gateway_is_refused(backlog: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    values = {
        "workers": 2,
        "listener": [{"address": [f"unix:{path}"]}],
        "upstream": [{"url": "smtp://127.0.0.1:1"}],
    }
    with socket.socket(socket.AF_UNIX) as taken, socket.socket(socket.AF_UNIX) as waiting:
        taken.bind(str(path))
        taken.listen(backlog)
        waiting.connect(str(path))  # with a backlog of none there is no room for another one
        with pytest.raises(CannotListen, match="in use"):
            SharedPorts(load(values=values))
    assert path.exists()
    SharedPorts(load(values=values)).__exit__()  # what a killed process left behind is in nobody's way


async def test_a_single_process_leaves_another_gateways_unix_socket_alone(tmp_path: Path) -> None:
    settings = load(
        values={
            "listener": [{"address": [f"unix:{tmp_path / 's'}"]}],
            "upstream": [{"url": "smtp://127.0.0.1:1"}],
            "status": {"address": "off"},
        }
    )
    async with Gateway(settings):
        with pytest.raises(CannotListen, match="in use"):
            await Gateway(settings).start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
    async with Gateway(settings):
        pass


def test_addresses_that_the_operator_set_stay() -> None:
    asked = load(upstream=["smtp://127.0.0.1:1"], listen=["127.0.0.1:0", "[::1]:0"])
    assert without_ipv6_loopback(asked).listener == with_present_addresses(asked).listener == asked.listener
    default = load(upstream=["smtp://127.0.0.1:1"])
    assert {address.host for address in default.listener[0].address} == {"127.0.0.1", "::1"}
    assert without_ipv6_loopback(default).listener[0].address == (Endpoint("127.0.0.1", 2525),)
