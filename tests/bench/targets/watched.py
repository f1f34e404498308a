"""The gateway's own command, and beside it a thread that counts what the process holds, for the long run.

python -m tests.bench.targets.watched SOCKET serve ...    each connection to SOCKET is answered by the counts
"""

import gc
import json
import socket
import sys
import threading

from otel_smtp.commands.cli import main


def watch(path: str) -> None:
    """Answer on a Unix socket, one connection after the other, as long as the process runs."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            with connection:
                gc.collect()
                counts = {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks()}
                connection.sendall(json.dumps(counts).encode())


def counts(path: str) -> dict[str, int]:
    """Ask a watched process."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        return dict(json.loads(asking.makefile().read()))


if __name__ == "__main__":
    threading.Thread(target=watch, args=(sys.argv.pop(1),), daemon=True).start()
    main()
