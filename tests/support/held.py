"""How many octets an engine holds: found by walking it, so that a buffer that is new is counted too."""

from collections import deque
from typing import Final

# Values that travel hold octets of their own (a Reply its wire form); only the machines' own octets are meant.
_MODULES: Final = ("otel_smtp.smtp.server", "otel_smtp.smtp.client", "otel_smtp.smtp.framing")


def held_octets(machine: object) -> int:
    """The octets in `bytes` anywhere in a machine of the SMTP engine, through its slots and their containers."""
    total = 0
    waiting = [machine]
    seen: set[int] = set()
    while waiting:
        held = waiting.pop()
        match held:
            case bytes() | bytearray():
                total += len(held)
            case list() | deque() | tuple():
                waiting.extend(held)
            case _ if type(held).__module__ in _MODULES and id(held) not in seen:
                seen.add(id(held))
                waiting.extend(
                    getattr(held, name) for kind in type(held).__mro__ for name in getattr(kind, "__slots__", ())
                )
    return total
