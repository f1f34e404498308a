"""The policy of a listener's sessions, and the interface of the server to which they belong."""

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from otel_smtp.forwarding.base import Forwarder
from otel_smtp.observing import Endpoint, FanOut
from otel_smtp.server.exchanges import Authenticator
from otel_smtp.server.guesses import Guesses
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.policy import ServerPolicy
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import IllegalTransition

if TYPE_CHECKING:
    from otel_smtp.server.conversation import Conversation

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class ServerTimeouts:
    """Deadlines towards clients, in seconds.

    Attributes:
        command: from the last reply to the end of the next command line (RFC 5321 4.5.3.2.7 demands 300).
        command_under_stress: the same, while most of the allowed connections are taken.
        data: a whole DATA or BDAT exchange.
        tls_handshake: one handshake.
        session: the whole connection; None: no bound.
        octets_per_second: content buys time beyond `command` at this rate; Postfix's smtpd_min_data_rate.
    """

    command: float = 300.0
    command_under_stress: float = 10.0
    data: float = 1200.0
    tls_handshake: float = 30.0
    session: float | None = None
    octets_per_second: int = 500

    @property
    def shortest(self) -> float:
        """The least time that any input of a client has."""
        return min(self.command, self.command_under_stress, self.data)


@dataclass(frozen=True, slots=True)
class Segments:
    """Where to cut a connection's record into segments, which observers get one at a time.

    Attributes:
        transitions: the number that ends a segment.
        age_seconds: the age that ends a segment, so that a long connection is visible while it is open.
    """

    transitions: int = 500
    age_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class ListenerPolicy:
    """The policy for every connection of one listener.

    Attributes:
        tls_context: for its handshakes; None without TLS.
        allow: networks that may relay without AUTH; unix sockets always may.
        proxy_protocol_from: networks whose PROXY header is required and trusted.
        trace_in_reply: the final 250, and refusals of MAIL, RCPT or content, name the trace.
        names_client: our Received field names the client: its greeting and its address.
    """

    name: str
    protocol: ServerPolicy
    timeouts: ServerTimeouts
    tls_context: ssl.SSLContext | None = None
    authenticator: Authenticator | None = None
    allow: tuple[Network, ...] = ()
    proxy_protocol_from: tuple[Network, ...] = ()
    trace_in_reply: bool = True
    names_client: bool = True


class House(Protocol):
    """The server as its sessions see it: the state that all of them share."""

    @property
    def forwarder(self) -> Forwarder:
        """Where accepted mail goes."""
        ...

    @property
    def observer(self) -> FanOut:
        """The observers."""
        ...

    @property
    def segments(self) -> Segments:
        """Where to cut records."""
        ...

    @property
    def is_stressed(self) -> bool:
        """Whether most of the allowed connections are taken."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether the gateway shuts down."""
        ...

    def offer(self) -> Extensions:
        """The extensions that the forwarder can promise now; the same object while nothing changes."""
        ...

    def admit(self, session: "Conversation", client: Endpoint) -> Reply | None:
        """Count a client that its PROXY header named; the refusal, where it has too many connections."""
        ...

    def may_authenticate(self, client: Endpoint) -> bool:
        """Whether this address may authenticate: false after too many failures."""
        ...

    @property
    def guesses(self) -> Guesses:
        """Failed logins, and turns to have a password verified."""
        ...

    def illegal_step(self, step: IllegalTransition) -> None:
        """A state step that is not in the table."""
        ...

    def wait_turn(self, session: "Conversation") -> None:
        """Call `session.take_turn` in a later turn of the event loop, behind the sessions already waiting."""
        ...

    def ended(self, session: "Conversation") -> None:
        """The session is over, and its socket closed or closing. Idempotent."""
        ...


def is_in(networks: Sequence[Network], host: str) -> bool:
    """Whether the IP address `host` lies in one of `networks`; an IPv4-mapped IPv6 address counts as IPv4."""
    if not networks:
        return False  # as for the PROXY headers of most listeners
    address = _address(host)
    return address is not None and any(address in network for network in networks if network.version == address.version)


@lru_cache(maxsize=1024)  # clients return, and parsing an address takes as long as the rest of an accept
def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address `host`, as IPv4 if it is mapped; None if it is none."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if address.version == 6 else address


def is_loopback(host: str) -> bool:
    """Whether `host`, a peer's address from a socket or a PROXY header, is a loopback address."""
    return host == "::1" or host.startswith(("127.", "::ffff:127."))
