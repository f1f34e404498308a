"""Spans and events in words: the text beside a bar, the most important first."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from otel_smtp.telemetry import attributes as names

Attributes = Mapping[str, Any]


class Word(NamedTuple):
    """A piece of text that is not broken across lines, and its rich style."""

    text: str
    style: str = ""


# Attributes that a row already shows by its name, place or time.
_SHOWN_ALREADY: Final = frozenset(
    {
        names.CONNECTION_ID,
        names.LISTENER,
        names.STATE,
        names.STATE_PREVIOUS,
        names.STATE_LEVEL,
        names.STATE_SEQUENCE,
        names.STATE_PREVIOUS_DURATION,
        names.CONNECTION_DURATION,
        names.NETWORK_LOCAL_ADDRESS,
        names.NETWORK_LOCAL_PORT,
        names.NETWORK_PEER_PORT,
        names.TRANSACTION_NUMBER,
        names.UPSTREAM_NAME,
        names.MESSAGE_ID,
        names.NETWORK_TRANSPORT,
        names.NETWORK_TYPE,
        names.NETWORK_PROTOCOL_NAME,
        names.PEER_SERVICE,
        names.SERVICE_PEER_NAME,
    }
)

STATE_STYLES: Final[Mapping[str, str]] = {
    "New": "bold",
    "StartTLS": "blue",
    "Active": "green",
    "Auth": "magenta",
    "Data": "cyan",
    "Reset": "yellow",
    "Idle": "dim",
    "Error": "bold red",
    "Closed": "bold",
}

_OUTCOME_STYLES: Final[Mapping[str, str]] = {
    "relayed": "green",
    "partly_relayed": "yellow",
    "queued": "green",
    "refused": "red",
    "deferred": "yellow",
    "bounced": "red",
    "expired": "red",
    "removed": "red",
    "held": "yellow",
    "aborted": "yellow",
    "unknown": "bold red",
}


def code_style(code: int) -> str:
    """The colour of a reply code by its class (RFC 5321 4.2.1)."""
    return {2: "green", 3: "cyan", 4: "yellow", 5: "red"}.get(code // 100, "")


def outcome_style(outcome: str) -> str:
    """The colour of an outcome, or of a recipient's fate."""
    return _OUTCOME_STYLES.get(outcome, "")


def octets(count: int) -> str:
    """A size for people: one decimal from a kibibyte up."""
    for unit, factor in (("MiB", 1024 * 1024), ("KiB", 1024)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def counted(count: int, noun: str) -> str:
    """`1 recipient`, `2 recipients`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(nanoseconds: int) -> str:
    """A duration for people, with about three digits."""
    milliseconds = nanoseconds / 1e6
    if milliseconds < 10:
        return f"{milliseconds:.2f} ms"
    if milliseconds < 1000:
        return f"{milliseconds:.1f} ms"
    return f"{milliseconds / 1000:.2f} s"


class _Reader:
    """Takes attributes one by one; the rest is shown unchanged at the end."""

    def __init__(self, attributes: Attributes) -> None:
        self._left = dict(attributes)
        self.words: list[Word] = []

    def take(self, key: str) -> Any:
        return self._left.pop(key, None)

    def add(self, key: str, style: str = "") -> None:
        value = self.take(key)
        if value not in (None, ""):
            self.words.append(Word(plain(value), style))

    def add_reply(self) -> None:
        """Verb, code, enhanced code and text of a reply."""
        self.add(names.VERB, "bold")
        code, enhanced = self.take(names.REPLY_CODE), self.take(names.REPLY_ENHANCED_CODE)
        text = self.take(names.REPLY_TEXT)
        if code is not None:
            self.words.append(Word(plain(f"{code} {enhanced}" if enhanced else code), code_style(int(code))))
        if text:
            self.words.append(Word(plain(text)))

    def add_tls(self) -> None:
        version = self.take(names.TLS_PROTOCOL_VERSION)
        if version:
            self.words.append(Word(f"TLS {plain(version)}", "blue"))
        self.add(names.TLS_CIPHER, "dim")

    def rest(self) -> list[Word]:
        left = sorted((key, value) for key, value in self._left.items() if key not in _SHOWN_ALREADY)
        return self.words + [Word(f"{key.removeprefix('smtp.')}={plain(value)}", "dim") for key, value in left]


def plain(value: Any) -> str:
    """An attribute's value as text of one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(plain(item) for item in value)
    # A peer's text must not control the terminal, even if it was not cleaned before.
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def _endpoint(reader: _Reader, side: str) -> str:
    address, port = reader.take(f"{side}.address"), reader.take(f"{side}.port")
    if address is None:
        return ""
    host = f"[{plain(address)}]" if ":" in str(address) else plain(address)
    return host if port is None else f"{host}:{plain(port)}"


def event_words(name: str, attributes: Attributes) -> list[Word]:
    """The words of an event, its name aside."""
    reader = _Reader(attributes)
    reader.add(names.AUTH_MECHANISM, "magenta")
    mode = reader.take(names.TLS_MODE)
    if mode not in (None, "off"):
        reader.words.append(Word(plain(mode), "blue"))
    if (number := reader.take(names.TRANSACTION_NUMBER)) is not None:
        reader.words.append(Word(f"message {plain(number)}"))
    if (count := reader.take(names.RECIPIENT_COUNT)) is not None:
        reader.words.append(Word(counted(int(count), "recipient")))
    reader.add(names.RESET_CAUSE)
    if fate := reader.take(names.RECIPIENT_FATE):
        reader.words.append(Word(plain(fate), outcome_style(str(fate))))
    domain = reader.take(names.RCPT_DOMAIN)
    if who := reader.take(names.RCPT_ADDRESS) or domain:
        reader.words.append(Word(plain(who)))
    if more := reader.take(names.RECIPIENTS_NOT_SHOWN):
        reader.words.append(Word(f"and {counted(int(more), 'more recipient')}"))
    reader.add_reply()
    reader.add(names.ERROR_TYPE, "red")
    reader.add(names.FAILURE_REASON, "red")
    reader.add(names.CLOSE_REASON)
    reader.add_tls()
    _add_totals(reader)
    for address in (names.NETWORK_PEER_ADDRESS, names.CONNECTION_SEGMENT):
        reader.take(address)
    return reader.rest()


def _add_totals(reader: _Reader) -> None:
    if (messages := reader.take(names.CONNECTION_MESSAGES)) is not None:
        reader.words.append(Word(counted(int(messages), "message")))
    received, sent = reader.take(names.OCTETS_RECEIVED), reader.take(names.OCTETS_SENT)
    if received is not None and sent is not None:
        reader.words.append(Word(f"{octets(int(received))} in, {octets(int(sent))} out", "dim"))


def _add_pool(reader: _Reader) -> None:
    reused, wait = reader.take(names.POOL_REUSED), reader.take(names.POOL_WAIT)
    if reused is not None:
        reader.words.append(Word("connection reused", "green") if reused else Word("new connection"))
    # Less than a tenth of a millisecond is no wait.
    if wait is not None and float(wait) >= 0.0001:
        reader.words.append(Word(f"waited {duration(int(float(wait) * 1e9))}", "yellow"))


def span_words(name: str, attributes: Attributes) -> list[Word]:
    """The words of a span, its name and duration aside."""
    reader = _Reader(attributes)
    match name:
        case names.SPAN_CONNECTION:
            _add_connection(reader)
        case names.SPAN_TRANSACTION:
            _add_transaction(reader)
        case names.SPAN_DELIVERY:
            _add_delivery(reader)
        case names.SPAN_SPOOL:
            if action := reader.take(names.SPOOL_ACTION):
                reader.words.append(Word(plain(action), outcome_style(str(action))))
    reader.add(names.ERROR_TYPE, "red")
    reader.add(names.FAILURE_REASON, "red")
    reader.add_tls()
    return reader.rest()


def _add_connection(reader: _Reader) -> None:
    client, server = _endpoint(reader, "client"), _endpoint(reader, "server")
    peer = reader.take(names.NETWORK_PEER_ADDRESS)
    if client:
        reader.words.append(Word(client))
    if peer is not None and plain(peer) not in client:
        reader.words.append(Word(f"by {plain(peer)}", "dim"))  # a PROXY header named the client
    if server:
        reader.words.append(Word(f"→ {server}"))
    if helo := reader.take(names.HELO):
        reader.words.append(Word(f"“{plain(helo)}”", "italic"))
    if errors := reader.take(names.CONNECTION_ERRORS):
        reader.words.append(Word(counted(int(errors), "error"), "red"))
    segment = reader.take(names.CONNECTION_SEGMENT)
    if segment is not None and int(segment) > 1:
        reader.words.append(Word(f"segment {segment}"))
    # Its last event shows these.
    for key in (names.CLOSE_REASON, names.TLS_MODE, names.CONNECTION_MESSAGES):
        reader.take(key)
    for key in (names.OCTETS_RECEIVED, names.OCTETS_SENT):
        reader.take(key)


def _add_transaction(reader: _Reader) -> None:
    if outcome := reader.take(names.OUTCOME):
        reader.words.append(Word(plain(outcome), outcome_style(str(outcome))))
    reader.add_reply()
    sender, recipients = reader.take(names.MAIL_FROM_DOMAIN), reader.take(names.RCPT_DOMAINS)
    if sender is not None or recipients:
        to = f" → {plain(recipients)}" if recipients else ""
        reader.words.append(Word(f"{'' if to else 'from '}{plain(sender or '<>')}{to}"))
    if count := reader.take(names.RECIPIENT_COUNT):
        reader.words.append(Word(counted(int(count), "recipient")))
    for name, word, style in (
        (names.RECIPIENTS_REFUSED, "refused", "red"),
        (names.RECIPIENTS_DEFERRED, "deferred", "yellow"),
    ):
        if number := reader.take(name):
            reader.words.append(Word(f"{plain(number)} {word}", style))
    reader.take(names.RCPT_DOMAIN)
    if (size := reader.take(names.MESSAGE_SIZE)) is not None:
        reader.words.append(Word(octets(int(size))))
    reader.add(names.BODY, "dim")


def _add_delivery(reader: _Reader) -> None:
    if (kind := reader.take(names.MESSAGE_KIND)) not in (None, "mail"):
        reader.words.append(Word(plain(kind).replace("_", " "), "magenta"))
    reader.add_reply()
    peer = reader.take(names.NETWORK_PEER_ADDRESS)
    if server := _endpoint(reader, "server"):
        reader.words.append(Word(f"→ {server}"))
    if peer is not None and plain(peer) not in server:
        reader.words.append(Word(plain(peer), "dim"))  # the address of the name
    attempt = reader.take(names.DELIVERY_ATTEMPT)
    if attempt is not None and int(attempt) > 1:
        reader.words.append(Word(f"attempt {plain(attempt)}", "yellow"))
    if (trips := reader.take(names.ROUND_TRIPS)) is not None:
        reader.words.append(Word(counted(int(trips), "round trip"), "dim"))
    for name, word, style in (
        (names.DELIVERY_REFUSED, "refused", "red"),
        (names.DELIVERY_DEFERRED, "deferred", "yellow"),
    ):
        if number := reader.take(name):
            reader.words.append(Word(f"{plain(number)} {word}", style))
    _add_pool(reader)
    # Its reply code shows the outcome.
    for key in (names.OUTCOME, names.DELIVERY_ACCEPTED):
        reader.take(key)
