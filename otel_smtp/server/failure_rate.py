"""Counts of failed logins per client address: a sliding window in bounded memory."""

import ipaddress
from collections import OrderedDict, deque
from typing import Final

MOST_ADDRESSES: Final = 4096


class FailureRate:
    """Failed authentications per client address, over a sliding window.

    An IPv6 client is its /64: one customer has at least that, and addresses within it cost nothing.

    Args:
        limit: this many failures within the window are too many.
        window_seconds: the window.
        addresses: the most addresses to keep; beyond that the one that failed longest ago is forgotten.
    """

    def __init__(self, *, limit: int = 10, window_seconds: float = 60.0, addresses: int = MOST_ADDRESSES) -> None:
        self._limit = limit
        self._window_seconds = window_seconds
        self._addresses = addresses
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures)

    def count(self, host: str, now: float) -> None:
        """Note a failure of `host` at `now` (seconds of any monotonic clock)."""
        client = network_of(host)
        moments = self._failures.setdefault(client, deque(maxlen=self._limit))
        moments.append(now)
        self._failures.move_to_end(client)
        if len(self._failures) > self._addresses:
            self._failures.popitem(last=False)

    def is_exceeded(self, host: str, now: float) -> bool:
        """Whether `host` has failed too often within the window that ends `now`."""
        if not self._failures:
            return False
        moments = self._failures.get(network_of(host))
        return moments is not None and len(moments) == self._limit and now - moments[0] < self._window_seconds

    def count_of(self, host: str, now: float) -> int:
        """How often `host` has failed within the window that ends `now`, at most the limit."""
        moments = self._failures.get(network_of(host), ())
        return sum(now - moment < self._window_seconds for moment in moments)


def network_of(host: str) -> str:
    """The addresses that one client can use: an IPv4 address, the /64 of an IPv6 address; otherwise `host` itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
