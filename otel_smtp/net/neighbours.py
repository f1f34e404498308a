"""The owner of the socket at the other end of a connection on this machine, as the kernel knows it.

SO_PEERCRED gives the process that connected a unix socket. For a TCP connection over loopback we ask the kernel by
NETLINK_SOCK_DIAG (sock_diag(7)), which needs no privilege: it returns the user and the control group of the socket at
the other end. This distinguishes the containers of a pod, which share loopback and often the user.

The kernel answers at once, in some twenty microseconds. The owner is unknown on systems other than Linux, in a sandbox
without netlink, or once the peer has gone.
"""

import ipaddress
import os
import socket
import struct
import sys
from typing import Final

from otel_smtp.net.stream import Stream

_SOCK_DIAG: Final = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST: Final = 1  # NLM_F_REQUEST
_CGROUP_ID: Final = 21  # INET_DIAG_CGROUP_ID, since Linux 5.8
_ANY_COOKIE: Final = 0xFFFFFFFF

_HEAD: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_QUESTION: Final = struct.Struct("=BBBBI")  # struct inet_diag_req_v2, up to the socket
_PORTS: Final = struct.Struct("!HH")  # struct inet_diag_sockid
_REST: Final = struct.Struct("=III")
_OWNER: Final = struct.Struct("=II")  # of struct inet_diag_msg
_OWNER_AT: Final = 64
_ANSWER_OCTETS: Final = 72
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred


def owner_of_peer(stream: Stream) -> str | None:
    """The owner of the other end of a connection, in words that are the same for all of the owner's connections.

    Returns:
        ``"uid 1000"``, or ``"uid 1000, cgroup 4711"``; None: unknown.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        if stream.peer.port is None:
            return _by_credentials(stream)
        return _by_socket((stream.peer.host, stream.peer.port), (stream.local.host, stream.local.port or 0))
    except (OSError, ValueError, struct.error):
        return None


def _by_credentials(stream: Stream) -> str | None:
    descriptor = stream.fileno()
    if descriptor < 0:
        return None
    with socket.socket(socket.AF_UNIX, fileno=os.dup(descriptor)) as same:
        _, user, _ = _CREDENTIALS.unpack(same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"uid {user}"


def _by_socket(peer: tuple[str, int], local: tuple[str, int]) -> str | None:
    """Ask for the TCP socket bound to `peer` and connected to `local`: the peer's view, with the ends swapped."""
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    own = ipaddress.ip_address(local[0].partition("%")[0])
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    question = (
        _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
        + _PORTS.pack(peer[1], local[1])
        + address.packed.ljust(16, b"\0")
        + own.packed.ljust(16, b"\0")
        + _REST.pack(0, _ANY_COOKIE, _ANY_COOKIE)
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _SOCK_DIAG) as kernel:
        kernel.send(_HEAD.pack(_HEAD.size + len(question), _BY_FAMILY, _REQUEST, 1, 0) + question)
        answer = kernel.recv(8192)
    length, kind, *_ = _HEAD.unpack_from(answer)
    if kind != _BY_FAMILY or length < _HEAD.size + _ANSWER_OCTETS:
        return None  # an error: there is no such socket, or none of this namespace
    return _owner(answer[_HEAD.size : length])


def _owner(answer: bytes) -> str | None:
    user, inode = _OWNER.unpack_from(answer, _OWNER_AT)
    if not inode:
        return None  # closed already: it has no owner
    at = _ANSWER_OCTETS
    while at + _ATTRIBUTE.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == _CGROUP_ID:
            group = int.from_bytes(answer[at + _ATTRIBUTE.size : at + length], sys.byteorder)
            return f"uid {user}, cgroup {group}"
        at += (length + 3) & ~3
    return f"uid {user}"
