"""The attacks: each goes to ten times a bound of the ledger, or on until it is cut off."""

import base64
import itertools
import json
import os
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Final

from otel_smtp.server.conversation import UNREAD_REPLIES_SECONDS
from otel_smtp.server.guesses import GUESS_SECONDS
from otel_smtp.server.users import HASHING_THREADS
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.status.http import ANSWER_SECONDS
from otel_smtp.telemetry.exporting import LEAST_QUEUE_OCTETS, MAX_BATCH_OCTETS
from otel_smtp.telemetry.logs import LINES_A_SECOND
from tests.bounds.driving import KEPT, MIB, Drive, Site
from tests.bounds.peers import crumbling, dripping, flooding, served, silent, sink, stalling
from tests.support.dialogue import UpstreamScript

OPEN: Final = b"EHLO client.example\r\nMAIL FROM:<>\r\nRCPT TO:<b@there.example>\r\n"
LINE: Final = b"x" * 1022 + b"\r\n"
RCPT: Final = b"RCPT TO:<b@there.example>\r\n"


# What attacks are made of ------------------------------------------------------------------------------------------


def connected(port: int, *, seconds: float = 30) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), seconds)


def greeted(port: int) -> socket.socket:
    connection = connected(port)
    assert connection.recv(1000).startswith(b"220 ")
    return connection


def rest(connection: socket.socket) -> bytes:
    """The last octets until the other side ends the connection."""
    tail = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            tail = (tail + data)[-2000:]
    return tail


def says(port: int, *pieces: bytes) -> bytes:
    """The last octets that are said to a client that sends `pieces` without reading, as far as it is let."""
    with greeted(port) as connection:
        with suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        return rest(connection)


class Chunks:
    """Sends chunk after chunk of two octets, as far as it is let, and reads no reply."""

    def __init__(self, connection: socket.socket) -> None:
        assert connection.recv(1000).startswith(b"220 ")
        connection.sendall(OPEN)
        connection.setblocking(False)
        self._connection = connection
        self._unsent = b""

    def send(self) -> bool:
        """Send some; False where the connection is over."""
        self._unsent = self._unsent or b"BDAT 2\r\n\r\n" * 1000  # lines, or the content's one line would be too long
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except ConnectionError:
            return False
        return True


def side_by_side(amount: int, work: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(amount) as threads:
        for done in [threads.submit(work, number) for number in range(amount)]:
            done.result()


def flood(port: int, octets: bytes, times: int) -> None:
    """Send the same again and again, and read what comes."""
    with greeted(port) as connection, selectors.DefaultSelector() as selector:
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        left, held = times, b""
        with suppress(ConnectionError):
            while left or held:
                for _, ready in selector.select(30):
                    if ready & selectors.EVENT_READ and not connection.recv(1 << 20):
                        return
                    if ready & selectors.EVENT_WRITE:
                        if not held:
                            held, left = octets, left - 1
                        held = held[connection.send(held) :]
            connection.setblocking(True)
            connection.sendall(b"QUIT\r\n")
            rest(connection)


# Connections and time ----------------------------------------------------------------------------------------------


def connections(site: Site) -> None:
    with ExitStack() as held:
        for _ in range(640):
            connection = held.enter_context(connected(site.port))
            with suppress(ConnectionError):
                connection.recv(100)


def connections_of_one_address(site: Site) -> None:
    answers: Counter[bytes] = Counter()
    with ExitStack() as held:
        for _ in range(80):
            connection = held.enter_context(connected(site.port))
            connection.sendall(b"PROXY TCP4 198.51.100.1 192.0.2.1 40000 25\r\n")
            answers[connection.recv(100)[:4]] += 1
    assert answers[b"421 "] >= 70


def silence_between_commands(site: Site) -> None:
    def wait(_: int) -> None:
        with greeted(site.port) as connection:
            connection.settimeout(10)
            assert b"421 4.4.2" in rest(connection)

    side_by_side(10, wait)


def dripping_content(site: Site) -> None:
    def drip(head: bytes, piece: bytes) -> None:
        with greeted(site.port) as connection:
            connection.sendall(OPEN + head)
            with suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(piece)
                    time.sleep(0.2)  # the drip, far below limits.octets_per_second
                raise AssertionError("twenty seconds for content")
            answers = rest(connection)
            assert not answers or b"421 " in answers  # a reset may overtake them

    side_by_side(10, lambda number: drip(*((b"DATA\r\n", b"x\r\n"), (b"", b"BDAT 1\r\nx"))[number % 2]))


def a_long_session(site: Site) -> None:
    with greeted(site.port) as connection:
        connection.settimeout(10)
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 10:
                connection.sendall(b"NOOP\r\n")
                if b"421 " in connection.recv(1000):
                    return
                time.sleep(0.05)  # so that time ends the session, and not limits.junk_commands
        assert time.monotonic() - began < 10


def silent_handshakes(site: Site) -> None:
    def wait(_: int) -> None:
        with greeted(site.port) as connection:
            connection.settimeout(10)
            connection.sendall(b"EHLO c\r\nSTARTTLS\r\n")
            rest(connection)

    side_by_side(20, wait)


def proxy_headers_without_end(site: Site) -> None:
    def wait(_: int) -> None:
        with connected(site.port) as connection:
            connection.settimeout(50)
            connection.sendall(b"PROXY TCP4 ")
            assert b"554 " in rest(connection)

    side_by_side(20, wait)


def replies_that_nobody_reads(site: Site) -> None:
    with ExitStack() as stack:
        held = []
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", site.port))
            held.append(Chunks(connection))
        began = time.monotonic()
        ends = began + 10 * UNREAD_REPLIES_SECONDS
        while held and time.monotonic() < ends:
            held = [chunks for chunks in held if chunks.send()]
            time.sleep(0.01)  # of a connection that is not read, only sending shows the end
        assert not held
        assert time.monotonic() - began > UNREAD_REPLIES_SECONDS / 2  # it was that which ended them


# What one connection holds and does --------------------------------------------------------------------------------


def tiny_chunks_unread(site: Site) -> None:
    with ExitStack() as stack:
        # As many as leave one of the connections that are opened to an upstream at first.
        held = [Chunks(stack.enter_context(connected(site.port))) for _ in range(4)]
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            assert all(chunks.send() for chunks in held)
            time.sleep(0.001)  # a processor is left for the gateway and the honest client


def pipelined_commands(site: Site) -> None:
    side_by_side(8, lambda _: flood(site.port, OPEN + b"BDAT 1\r\nx" * 1000 + b"RSET\r\n", 10))


def own_faults(site: Site) -> None:
    assert b"421 4.7.0 Too many errors" in says(site.port, b"EHLO c\r\n" + b"FROBNICATE\r\n" * 100)


def two_million_recipients(site: Site) -> None:
    with greeted(site.port) as connection:
        with suppress(ConnectionError):
            connection.sendall(OPEN)
            for _ in range(200):
                connection.sendall(RCPT * 10_000)
        rest(connection)


def recipients(site: Site) -> None:
    assert b"421 4.7.0 Too many refused" in says(site.port, OPEN + RCPT * 10_000)


def junk_commands(site: Site) -> None:
    assert b"421 4.7.0 Too many commands" in says(site.port, b"NOOP\r\n" * 1000)
    assert b"421 4.7.0 Too many commands" in says(site.port, OPEN + b"BDAT 0\r\n" * 1000)


def command_lines(site: Site) -> None:
    assert b"500 5.5.2" in says(site.port, b"EHLO c\r\n", b"NOOP " + b"x" * 20_480 + b"\r\n")
    assert b"421 4.5.2" in says(site.port, b"EHLO c\r\n", b"NOOP ", *[b"x" * MIB] * 10)


def many_messages(site: Site) -> None:
    with greeted(site.port) as connection:
        for _ in range(50):
            connection.sendall(OPEN + b"BDAT 3 LAST\r\nx\r\n")
        assert b"421 " in rest(connection)


def login(user: str, password: str) -> bytes:
    return b"AUTH PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()) + b"\r\n"


def guesses(site: Site) -> None:
    def guess(number: int) -> None:
        with suppress(ConnectionError), greeted(site.port) as connection:
            connection.sendall(b"EHLO c\r\n" + b"".join(login("bob", f"{number} {again}") for again in range(30)))
            connection.settimeout(60)
            rest(connection)

    began = time.monotonic()
    side_by_side(10, guess)
    assert time.monotonic() - began > 15 * GUESS_SECONDS  # thirty, of which ten or so go before they are slowed


def guesses_that_wait(site: Site) -> None:
    for _ in range(10):  # so that those that follow wait
        with greeted(site.port) as connection:
            connection.sendall(b"EHLO c\r\n" + login("bob", "x"))
            while b"535 " not in connection.recv(1000):
                pass
    with ExitStack() as held:
        for number in range(640):
            connection = held.enter_context(connected(site.port))
            with suppress(ConnectionError):
                connection.recv(1000)
                connection.sendall(b"EHLO c\r\n" + login("bob", str(number)))
        time.sleep(2)  # they go on waiting, beside the honest client: nothing reports that


def guesses_from_everywhere(site: Site) -> None:
    def guess(first: int) -> None:
        for address in range(5120):
            source = f"10.{first}.{address // 256}.{address % 256}"
            with connected(site.port) as connection:
                connection.sendall(f"PROXY TCP4 {source} 192.0.2.1 40000 25\r\n".encode())
                connection.recv(1000)
                connection.sendall(b"EHLO c\r\nAUTH PLAIN AA==\r\n")
                connection.shutdown(socket.SHUT_WR)
                assert b"535 " in rest(connection)

    side_by_side(8, guess)


# What a message holds ----------------------------------------------------------------------------------------------


def large_message(site: Site) -> None:
    # Of ten times the limit, the connection is ended at twice the limit; the end may overtake its own words.
    said = says(site.port, OPEN + b"DATA\r\n", *[LINE * 1024] * 250, b".\r\n")
    assert b"552 5.3.4" in said or b"354 " in said or not said


def large_messages_side_by_side(site: Site) -> None:
    def send(_: int) -> None:
        assert b"250 2.0.0" in says(site.port, OPEN + b"DATA\r\n", *[LINE * 1024] * 5, b".\r\n")

    side_by_side(10, send)


def text_lines(site: Site) -> None:
    assert b"554 5.6.0" in says(site.port, OPEN + b"DATA\r\n", b"\r\n" + b"x" * 655_350 + b"\r\n.\r\n")


def header_blocks(site: Site) -> None:
    assert b"554 5.6.0" in says(site.port, OPEN + b"DATA\r\n", *[b"X: " + LINE] * 5_120, b"\r\n.\r\n")
    assert b"554 5.6.0" in says(site.port, OPEN + b"DATA\r\n", b"X: y\r\n" * 100_000, b"\r\n.\r\n")


def received_fields(site: Site) -> None:
    assert b"554 5.4.6" in says(site.port, OPEN + b"DATA\r\n", b"Received: from x by y; now\r\n" * 1_000, b"\r\n.\r\n")


def refused_recipients(site: Site) -> None:
    for _ in range(10):
        flood(site.port, b"EHLO c\r\nMAIL FROM:<>\r\n" + b"RCPT TO:<x@there.example>\r\n" * 500 + b"RSET\r\n", 1)


# What telemetry keeps of it ----------------------------------------------------------------------------------------


def events_of_one_transaction(site: Site) -> None:
    flood(site.port, OPEN, 1)
    flood(site.port, OPEN + RCPT * 20_000, 1)


def long_words(site: Site) -> None:
    for _ in range(100):
        long = b"x" * 1900
        said = b"EHLO " + long + b"\r\nMAIL FROM:<" + long + b"@client.example>\r\n" + long + b"\r\n"
        says(site.port, said)


def many_domains(site: Site) -> None:
    for _ in range(20):
        names = b"".join(b"RCPT TO:<b@d%d.example>\r\n" % number for number in range(100))
        says(site.port, b"EHLO c\r\nMAIL FROM:<>\r\n" + names + b"BDAT 3 LAST\r\nx\r\n")


def lines_alike(site: Site) -> None:
    for _ in range(100):
        says(site.port, OPEN + b"BDAT 3 LAST\r\nx\r\n")
    side_by_side(8, lambda _: [says(site.port, b"FROBNICATE\r\n" * 11) for _ in range(100)])
    seconds: Counter[tuple[str, str]] = Counter()
    for line in site.log.splitlines():
        said = json.loads(line)
        if said["level"] not in ("info",):
            seconds[said["timestamp"][:19], said["event"]] += 1
    assert not seconds or max(seconds.values()) <= LINES_A_SECOND


def mail_of_many_domains(site: Site) -> None:
    mails = [
        b"MAIL FROM:<a@s%d.example>\r\nRCPT TO:<b@r%d.example>\r\nBDAT 3 LAST\r\nx\r\n" % (number, number)
        for number in range(10_240)
    ]
    for first in range(0, len(mails), 1024):
        flood(site.port, b"EHLO c\r\n" + b"".join(mails[first : first + 1024]), 1)


def lines_unread(site: Site) -> None:
    side_by_side(4, lambda _: flood(site.port, OPEN + b"BDAT 3 LAST\r\nx\r\n", 5_000))


def events_without_end(site: Site) -> None:
    # Some hundred octets for each refused command.
    side_by_side(4, lambda _: flood(site.port, b"FROBNICATE\r\n" * 1000, 300))
    if site.status_port:  # what is worked out for who looks is bounded with it
        for path in (b"/api/traces", b"/api/traces?q=frobnicate", b"/api/traces?q=nothing"):
            with connected(site.status_port) as connection:
                connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
                rest(connection)


# Upstreams ---------------------------------------------------------------------------------------------------------


def words_of_an_upstream(site: Site) -> None:
    for name in (b"long", b"many", b"endless"):
        for _ in range(5):
            said = b"EHLO c\r\nMAIL FROM:<>\r\nRCPT TO:<" + name + b"@there.example>\r\n"
            assert b"451 4.5.0" in says(site.port, said)


def open_transactions(site: Site) -> None:
    with ExitStack() as held:
        for _ in range(40):
            held.enter_context(greeted(site.port)).sendall(OPEN)
        time.sleep(3)  # they stay open, beside the honest client: nothing reports that


def an_upstream_that_stalls(site: Site) -> None:
    def wait(number: int) -> None:
        name = (b"stall", b"late")[number % 2]
        said = b"EHLO c\r\nMAIL FROM:<>\r\nRCPT TO:<" + name + b"@there.example>\r\nDATA\r\n"
        with greeted(site.port) as connection:
            connection.settimeout(20)
            connection.sendall(said)
            time.sleep(0.5)  # the end of the content is not to come with its begin; the upstream says nothing meanwhile
            with suppress(ConnectionError):
                connection.sendall(b".\r\n")
                connection.shutdown(socket.SHUT_WR)
            assert b"451 " in rest(connection)

    side_by_side(4, wait)


def a_thousand_recipients(site: Site) -> None:
    for _ in range(3):
        names = b"".join(b"RCPT TO:<r%d@there.example>\r\n" % number for number in range(1000))
        assert b"250 2.0.0" in says(site.port, b"EHLO c\r\nMAIL FROM:<>\r\n" + names + b"BDAT 3 LAST\r\nx\r\n")


def mail_that_stays(site: Site) -> None:
    mail = b"MAIL FROM:<>\r\nRCPT TO:<x@there.example>\r\nBDAT 3 LAST\r\nx\r\n"
    for _ in range(10):
        says(site.port, b"EHLO c\r\n" + mail * 10)
    assert b"452 4.3.1" in says(site.port, b"EHLO c\r\n" + mail)


# Collectors and receivers ------------------------------------------------------------------------------------------


def a_few_mails(site: Site) -> None:
    for _ in range(5):
        says(site.port, b"EHLO c\r\n" + b"MAIL FROM:<>\r\nRCPT TO:<b@there.example>\r\nBDAT 3 LAST\r\nx\r\n" * 20)
        time.sleep(0.5)  # so that each round is exported by itself; the collector's answer is what is driven


def outcomes(site: Site) -> None:
    for _ in range(10):
        says(site.port, b"EHLO c\r\n" + b"MAIL FROM:<>\r\nRCPT TO:<b@there.example>\r\nBDAT 3 LAST\r\nx\r\n" * 100)


# Readers of the status port ----------------------------------------------------------------------------------------


def probed(site: Site) -> None:
    with connected(site.status_port, seconds=5) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def silent_readers(site: Site) -> None:
    with ExitStack() as held:
        for number in range(640):
            held.enter_context(connected(site.status_port))
            if number % 64 == 63:
                probed(site)


def readers_that_come_and_go(site: Site) -> None:
    for _ in range(10_000):
        connected(site.status_port).close()
    probed(site)


def slow_requests(site: Site) -> None:
    def wait(_: int) -> None:
        with connected(site.status_port) as connection:
            connection.sendall(b"GET /")
            rest(connection)

    side_by_side(16, wait)
    probed(site)


def answers_that_nobody_reads(site: Site) -> None:
    flood(site.port, b"FROBNICATE\r\n" * 1000, 20)
    with ExitStack() as stack:
        held = []
        for _ in range(20):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", site.status_port))
            connection.sendall(b"GET /api/traces HTTP/1.1\r\nHost: localhost\r\n\r\n")
            held.append(connection)
        time.sleep(ANSWER_SECONDS + 5)  # a client that reads nothing is not shown the end of its connection
        probed(site)


def scrapes(site: Site) -> None:
    ends = time.monotonic() + 3

    def read(number: int) -> None:
        for again in itertools.count():
            for path in ("/metrics", f"/api/traces?q=x{number}-{again}", "/api/connections"):
                with suppress(OSError), connected(site.status_port) as connection:
                    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    rest(connection)
            if time.monotonic() > ends:
                return

    side_by_side(8, read)


def streams(site: Site) -> None:
    answers: Counter[bytes] = Counter()
    for path in ("/api/stream", "/api/tail"):
        with ExitStack() as held:
            for _ in range(160):
                connection = held.enter_context(connected(site.status_port))
                connection.settimeout(0.2)
                with suppress(OSError):
                    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    answers[connection.recv(12)] += 1
    assert answers[b"HTTP/1.1 503"]


# Neighbours --------------------------------------------------------------------------------------------------------


def refill(site: Site) -> None:
    """Hold all connections, and open another one for each that is closed."""
    if os.geteuid() == 0:
        os.setuid(65534)  # another owner of sockets than the honest client
    with ExitStack() as stack, selectors.DefaultSelector() as selector:

        def open_one() -> None:
            connection = stack.enter_context(connected(site.port))
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)

        for _ in range(640):
            open_one()
        ends = time.monotonic() + 5
        while time.monotonic() < ends:
            for key, _ in selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                with suppress(ConnectionError):
                    if key.fileobj.recv(65536):
                        continue
                selector.unregister(key.fileobj)
                key.fileobj.close()
                with suppress(OSError):
                    open_one()


def queue_commands(site: Site) -> None:
    def commanding() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(str(site.directory / "spool" / "control"))
        return connection

    with ExitStack() as held:
        for _ in range(160):
            connection = held.enter_context(commanding())
            with suppress(OSError):
                for _ in range(40):
                    connection.sendall(b"x" * MIB)


# ----------------------------------------------------------------------------------------------------------------------


def _refusing(code: int, **lines: tuple[str, ...]) -> UpstreamScript:
    kind = ErrorType.UPSTREAM_REFUSED if code >= 500 else ErrorType.UPSTREAM_UNAVAILABLE
    return UpstreamScript(
        recipients={f"{name}@there.example": Reply(code, None, text, kind) for name, text in lines.items()}
    )


BEHIND_A_PROXY: Final = {"listener.proxy_protocol_from": ["127.0.0.0/8"], "listener.allow": ["0.0.0.0/0"]}
WITH_TLS: Final = {"listener.tls": "starttls", "listener.tls_cert": "cert.pem", "listener.tls_key": "key.pem"}
WITH_AUTH: Final = {"listener.auth": "optional", "listener.auth_in_clear": True, "listener.auth_users_file": "users"}
# What a hash takes stays with its thread's heap for the next one.
HASHING: Final = KEPT + HASHING_THREADS * 19 * MIB
# What waits for a collector is owed to it.
OWED: Final = KEPT + LEAST_QUEUE_OCTETS + 2 * MAX_BATCH_OCTETS
PROXIED: Final = b"PROXY TCP4 198.51.100.200 192.0.2.1 40000 25\r\n"
WITH_STATUS: Final = {"status.address": "127.0.0.1:0"}
QUEUEING: Final = {"delivery.mode": "queue", "spool.directory": "{directory}/spool"}
NOTIFYING: Final = {
    **QUEUEING, "notify.url": "{peer}/", "notify.key": "a key of thirty-two octets, here", "notify.most_pending": 100,
    "notify.timeout": 1,
}  # fmt: skip
GENEROUS: Final = {"limits.errors": 1_000_000, "limits.junk_commands": 1_000_000}
EXPORTING: Final = {"OTEL_EXPORTER_OTLP_ENDPOINT": "{peer}"}


DRIVES: Final = (
    Drive(("connections",), "640 of 64", connections),
    Drive(
        ("connections of one address",), "80 of 8", connections_of_one_address,
        {**BEHIND_A_PROXY, "limits.connections_per_client": 8}, head=PROXIED,
    ),
    Drive(
        ("time between commands",), "ten times a second", silence_between_commands,
        {"timeouts.command": 1, "timeouts.command_under_stress": 1},
    ),
    Drive(
        ("time for content, by DATA or in chunks",), "ten times two seconds", dripping_content,
        {"timeouts.data": 2, "limits.octets_per_second": 1},
    ),
    Drive(
        ("time of a connection",), "ten times a second", a_long_session, {**GENEROUS, "timeouts.session": 1},
        mails_per_connection=10,
    ),
    Drive(
        ("time of a TLS handshake",), "ten times a second", silent_handshakes,
        {**WITH_TLS, "timeouts.tls_handshake": 1},
    ),
    Drive(
        ("seconds for a PROXY header",), "on until it is closed", proxy_headers_without_end, BEHIND_A_PROXY,
        head=PROXIED,
    ),
    Drive(
        ("seconds in which it reads no reply",), "on until it is closed", replies_that_nobody_reads, is_long=True,
    ),
    Drive(
        ("octets that are not read yet, or replies that it does not read, each",), "as much as is taken in 3 s",
        tiny_chunks_unread,
    ),
    Drive(
        ("commands in one turn of the event loop, of all connections that pipeline beyond it",), "80,000 at once",
        pipelined_commands,
    ),
    Drive(("commands refused for its own fault",), "100 of 10", own_faults),
    Drive(
        ("other refused commands, between two messages that are accepted",), "2,000,000 of 2,000",
        two_million_recipients,
    ),
    Drive(("recipients",), "10,000 of 1,000", recipients),
    Drive(("commands, and empty chunks, that move no mail",), "1,000 of 100", junk_commands),
    Drive(("octets of a line",), "20 KiB, and 10 MiB, of 2 KiB", command_lines),
    Drive(
        ("messages on a connection",), "50 of 5", many_messages, {"limits.messages_per_connection": 5},
        mails_per_connection=5,
    ),
    Drive(
        (
            "failed logins on a connection",
            "failed logins of an address in a minute",
            "passwords that are hashed at once; the rest waits",
            "seconds between two logins of an owner, or address, that has failed so often",
        ),
        "30 of 3 on each of 10 connections", guesses,
        WITH_AUTH, keeps=HASHING,
    ),
    Drive(
        ("of its logins that wait",), "640 of 64", guesses_that_wait,
        {**WITH_AUTH, "limits.connections": 800}, keeps=HASHING,
    ),
    Drive(
        ("addresses and names with failed logins, and with good ones, that are remembered",), "40,960 of 4,096",
        guesses_from_everywhere,
        {**BEHIND_A_PROXY, **WITH_AUTH}, head=PROXIED, keeps=HASHING, is_long=True,
    ),
    Drive(("octets of a message",), "250 MiB of 25 MiB", large_message),
    Drive(
        ("octets of a message in memory",), "50 MiB of 256 KiB each", large_messages_side_by_side,
        {"upstream.url": "{peer}"}, peer=sink,
    ),
    Drive(("octets of a text line",), "640 KiB of 64 KiB", text_lines),
    Drive(("the header block",), "5 MiB of 512 KiB; 100,000 lines of 10,000", header_blocks),
    Drive(("Received fields",), "1,000 of 100", received_fields),
    Drive(
        ("refused recipients that are reported one by one",), "500 of 50, ten times", refused_recipients, WITH_STATUS,
        script=_refusing(550, x=("no",)),
    ),
    Drive(
        ("events of a span, between transactions; four times as many wherever it is",), "20,000 of 2,000",
        events_of_one_transaction, {**WITH_STATUS, **GENEROUS, "limits.refusals": 100_000},
    ),
    Drive(("characters of an attribute",), "1,900 of 256", long_words, WITH_STATUS),
    Drive(("domains on a span",), "100 of 10", many_domains, WITH_STATUS),
    Drive(
        ("domains, and kinds of spans and events, that are kept encoded",), "10,240 of 1,024", mail_of_many_domains,
        {**WITH_STATUS, "upstream.url": "{peer}"}, peer=sink, is_long=True,
    ),
    Drive(("log lines alike in a second",), "800 connections of 11 faults", lines_alike, {"log.level": "info"}),
    Drive(
        ("octets of traces in memory, and of those in which something failed",), "1,200,000 events", events_without_end,
        {**WITH_STATUS, **GENEROUS}, is_long=True,
    ),
    Drive(
        ("octets of a reply's line", "lines of a reply"), "20 KiB of 2 KiB; 1,000 of 100; 10 MiB", words_of_an_upstream,
        script=_refusing(550, long=("x" * 20_480,), many=("x",) * 1_000, endless=("x" * 10 * MIB,)),
    ),
    Drive(
        ("connections to it",), "40 of 4", open_transactions, {"upstream.connections": 4},
    ),
    Drive(
        ("connections of all gateways",), "40 of 4", open_transactions, {"upstream.connections_total": 4},
    ),
    Drive(
        ("the time that it takes",), "on until it is given up", an_upstream_that_stalls,
        {"upstream.url": "{peer}", "upstream.timeout.command": 1, "upstream.timeout.reply": 1},
        peer=lambda: served(stalling, "smtp"),
    ),
    Drive(("phases of an attempt",), "3,000 of 64", a_thousand_recipients, WITH_STATUS),
    Drive(
        ("mail that waits in the spool",), "100 of 10", mail_that_stays, {**QUEUEING, "spool.most_messages": 10},
        script=_refusing(451, x=("later",)), may_be_refused=True,
    ),
    Drive(
        ("octets of telemetry that wait to be exported",), "1,200,000 events", events_without_end, GENEROUS, EXPORTING,
        lambda: served(silent, "http"), keeps=OWED, is_long=True,
    ),
    Drive(
        ("octets of a collector's answer",), "without end", a_few_mails, {},
        {**EXPORTING, "OTEL_BSP_SCHEDULE_DELAY": "100"}, lambda: served(flooding, "http"),
    ),
    Drive(
        ("pieces in which a collector's answer may come",), "without end", a_few_mails, {},
        {**EXPORTING, "OTEL_BSP_SCHEDULE_DELAY": "100"}, lambda: served(crumbling, "http"),
    ),
    Drive(
        ("outcomes that wait for it", "requests to it at once"), "1,000 of 100", outcomes, NOTIFYING,
        peer=lambda: served(silent, "http"),
    ),
    Drive(
        ("the time that a receiver takes",), "on until it is closed", outcomes, NOTIFYING,
        peer=lambda: served(dripping, "http"),
    ),
    Drive(
        ("octets of a receiver's answer",), "without end", outcomes, NOTIFYING, peer=lambda: served(flooding, "http"),
    ),
    Drive(("connections, and those of one address",), "640 of 64 and 32", silent_readers, WITH_STATUS),
    Drive(("connections, and those of one address",), "10,000 that come and go", readers_that_come_and_go, WITH_STATUS),
    Drive(
        ("seconds until a request is complete, and until its answer is read",), "on until they are closed",
        slow_requests, WITH_STATUS,
    ),
    Drive(
        ("seconds until a request is complete, and until its answer is read",), "on until they are closed",
        answers_that_nobody_reads, {**WITH_STATUS, **GENEROUS}, is_long=True,
    ),
    Drive(("requests in a second, and at once", "answers that are kept"), "as many as can be", scrapes, WITH_STATUS),
    Drive(
        ("octets of log lines that nobody reads",), "20,000 lines", lines_unread,
        {"log.level": "info", "upstream.url": "{peer}"}, peer=sink, is_log_read=False, is_long=True,
    ),
    Drive(("streams of the page, and followers",), "160 of 16", streams, WITH_STATUS),
    Drive(
        (
            "connections of one owner on this machine, while another wants one",
            "part of the connections that may wait in line for one, and seconds that they wait",
        ),
        "640 of 64, again and again", refill,
    ),
    Drive(
        (
            "octets of a request to the spool's socket",
            "queue commands at once, seconds until one is sent, and until its answer is read",
        ),
        "40 MiB of 4 MiB, on 160 of 16", queue_commands, QUEUEING,
    ),
)  # fmt: skip
