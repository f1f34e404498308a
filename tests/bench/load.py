"""Load in a process of its own: the engine of `otel-smtp bench`, and connections that are only held.

python -m tests.bench.load '{"host": ..., "port": ..., "seconds": 1.0, ...}'    prints what came of it
python -m tests.bench.load hold PORT COUNT    opens so many connections, says EHLO on each, prints {"held": N}
                                              and keeps them until standard input ends
"""

import json
import resource
import socket
import sys
import time

from otel_smtp.commands.load_generator import Load, LoadPlan


def send(plan: LoadPlan) -> dict[str, object]:
    """The figures of one run."""
    result = Load(plan).run()
    p50, p99 = result.percentiles_ms(50, 99)
    return {
        "accepted": result.accepted,
        "failed": result.failed,
        "failures": dict(result.failures.most_common(5)),
        "reconnects": result.reconnects,
        "seconds": result.seconds,
        "p50_ms": p50,
        "p99_ms": p99,
    }


_OPENED_AT_ONCE = 50
HOLD_SECONDS = 60  # a relay that takes longer for its connections is left out


def hold(port: int, count: int) -> None:
    """Keep `count` connections open after their EHLO, until standard input ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[socket.socket] = []
    ends = time.monotonic() + HOLD_SECONDS
    while len(held) < count:
        if time.monotonic() > ends:
            raise SystemExit(f"only {len(held)} connections in {HOLD_SECONDS} s")
        # Several at once: some servers wait a while before they greet.
        opened = [
            socket.create_connection(("127.0.0.1", port), timeout=30)
            for _ in range(min(_OPENED_AT_ONCE, count - len(held)))
        ]
        for connection in opened:
            _reply(connection)
            connection.sendall(b"EHLO idle.example.com\r\n")
        for connection in opened:
            _reply(connection)
        held += opened
    print(json.dumps({"held": len(held)}), flush=True)
    sys.stdin.read()


def _reply(connection: socket.socket) -> None:
    """Read one whole reply; anything but 2yz ends the program with it."""
    received = b""
    while not (received.endswith(b"\r\n") and received.splitlines()[-1][3:4] == b" "):
        if not (data := connection.recv(4096)):
            raise SystemExit(f"closed after {received!r}")
        received += data
    if received[:1] != b"2":
        raise SystemExit(f"refused: {received!r}")


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(int(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(send(LoadPlan(**json.loads(sys.argv[1])))), flush=True)
