"""Socket names as endpoints."""

import os
from functools import lru_cache
from typing import Any

from otel_smtp.observing.values import Endpoint


def endpoint(name: Any) -> Endpoint:
    """The result of getpeername or getsockname as an Endpoint; an IPv4-mapped IPv6 address becomes plain IPv4."""
    match name:
        case (str(host), int(port), *_):
            return Endpoint(_host(host), port)
        case str():
            return Endpoint(name)
        case bytes():  # Linux's abstract namespace
            return Endpoint(os.fsdecode(name).replace("\0", "@"))
        case _:
            return Endpoint("")


@lru_cache(maxsize=1024)  # a client has one address and many connections, each of which keeps it
def _host(name: str) -> str:
    return name.removeprefix("::ffff:") if "." in name else name
