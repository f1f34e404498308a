"""The benchmark's OTLP collector: takes traces over http/protobuf, counts spans and events, keeps none.

Bodies are kept as they came and decoded when asked, so that counting costs nothing while a run lasts.

    python -m tests.bench.collector       prints {"port": N}; each line on standard input is answered by the counts.
"""

import asyncio
import json
import sys
import zlib
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n"
_UNDECODED_OCTETS: Final = 64 * 1024 * 1024


@dataclass(slots=True)
class Received:
    """What came so far."""

    requests: int = 0
    octets: int = 0
    spans: int = 0
    events: int = 0
    undecoded: list[bytes] = field(default_factory=list)
    undecoded_octets: int = 0

    def add(self, body: bytes) -> None:
        """One request's body, decompressed."""
        self.requests += 1
        self.octets += len(body)
        self.undecoded.append(body)
        self.undecoded_octets += len(body)
        if self.undecoded_octets > _UNDECODED_OCTETS:
            self.count()

    def count(self) -> None:
        """Decode what waits."""
        for body in self.undecoded:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    self.spans += len(scope.spans)
                    self.events += sum(len(span.events) for span in scope.spans)
        self.undecoded.clear()
        self.undecoded_octets = 0


async def _answer(received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", "0")))
            # Metrics and logs may come to the same port; they are taken and not counted.
            if head.startswith("post /v1/traces "):
                received.add(zlib.decompress(body, 31) if fields.get("content-encoding") == "gzip" else body)
            writer.write(_ANSWER)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve() -> None:
    """Serve on a free port of the loopback until standard input ends."""
    received = Received()
    server = await asyncio.start_server(
        lambda reader, writer: _answer(received, reader, writer), "127.0.0.1", 0, limit=1 << 20
    )
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        received.count()
        counts = {name: getattr(received, name) for name in ("requests", "octets", "spans", "events")}
        print(json.dumps(counts), flush=True)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
