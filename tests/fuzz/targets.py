"""What can be fuzzed: each target takes one input and raises if something that must hold does not."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.fuzz import client, headers, proxy, sasl, server, settings

CORPUS: Final = Path(__file__).resolve().parent / "corpus"
MAX_INPUT_OCTETS: Final = 2048

TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "server": server.run,
    "client": client.run,
    "proxy": proxy.run,
    "sasl": sasl.run,
    "settings": settings.run,
    "headers": headers.run,
}
