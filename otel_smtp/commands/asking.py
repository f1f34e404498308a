"""Asking a running gateway through its status port, for commands that inspect one."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import click

from otel_smtp.commands.options import WRONG, fail
from otel_smtp.config import Settings

url_option: Final = click.option(
    "--url", metavar="URL", help="Status port of the gateway; default: status.address of the settings."
)

_ANSWER_SECONDS: Final = 10.0
_MOST_OCTETS: Final = 64 * 1024 * 1024
_MOST_WORDS: Final = 200  # of an answer that refuses


class NoAnswer(Exception):
    """A gateway could not be asked; the text says which and why."""


class AskedGateway:
    """A gateway, seen through its status port.

    Args:
        url: the port's scheme, host and port number.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # The status port is near: a proxy for the Internet must not see its addresses.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, *path: str, seconds: float = _ANSWER_SECONDS, **parameters: str | float | bool) -> Any:
        """Its JSON answer as a value; None: not found (404).

        Args:
            path: the parts of the path, unescaped.
            seconds: how long it may take.

        Raises:
            NoAnswer: it does not answer, or refuses, or is not a gateway.
        """
        query = f"?{urlencode(parameters)}" if parameters else ""
        answer = self._get(f"/{'/'.join(quote(part, safe='') for part in path)}{query}", "application/json", seconds)
        try:
            return None if answer is None else json.loads(answer)
        except ValueError as error:
            raise NoAnswer(f"what answers at {self.url} is no gateway: {error}") from error

    def metrics(self) -> str:
        """Its metrics page, in Prometheus' text format.

        Raises:
            NoAnswer: as for `ask`.
        """
        answer = self._get("/metrics", "text/plain", _ANSWER_SECONDS)
        return "" if answer is None else answer.decode("utf-8", "replace")

    def _get(self, path: str, accept: str, seconds: float) -> bytes | None:
        request = urllib.request.Request(f"{self.url}{path}", headers={"accept": accept})  # noqa: S310 - http(s), see `running_gateway`
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return bytes(answer.read(_MOST_OCTETS))
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.NOT_FOUND and error.headers.get_content_type() == "application/json":
                return None
            shown = _shown(error.read(_MOST_WORDS).decode("utf-8", "replace"))
            raise NoAnswer(f"the gateway at {self.url} refuses: {error.code} {shown or error.reason}") from error
        except urllib.error.URLError as error:
            reason = getattr(error.reason, "strerror", None) or str(error.reason)
            raise NoAnswer(f"no gateway answers at {self.url}: {reason.lower()}") from error
        except TimeoutError as error:
            raise NoAnswer(f"the gateway at {self.url} did not answer within {seconds:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"no gateway answers at {self.url}: {_shown(str(error))}") from error


def _shown(words: str) -> str:
    """Another server's text, which may be any octets, made safe for a terminal."""
    return "".join(char for char in words[:_MOST_WORDS] if char.isprintable()).strip()


def running_gateway(settings: Settings, url: str | None) -> AskedGateway:
    """The gateway that `--url` names, or else the one that the settings describe.

    If neither names one, the process ends with status 2.
    """
    if url is not None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            fail(WRONG, f'--url = "{url}": allowed: http://host:port')
        return AskedGateway(f"{parts.scheme}://{parts.netloc}")
    address = settings.status.address
    if address is None:
        fail(WRONG, 'status.address is "off": there is no status port to ask; give --url')
    if address.port == 0:
        fail(WRONG, "status.address has port 0, which the kernel replaces at each start; give --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - where it listens
    return AskedGateway(f"http://{f'[{host}]' if ':' in host else host}:{address.port}")
