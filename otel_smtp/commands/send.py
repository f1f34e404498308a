"""A test mail through a gateway: what was said on both sides, and the trace that it left.

Uses the standard library's client on purpose: what it can do, any application can.
"""

import os
import re
import smtplib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any, Final

from otel_smtp.config import Secret, UpstreamUrl
from otel_smtp.smtp.states import TlsMode

# As our final 250 says it; foreign servers say nothing of the kind.
_TRACE: Final = re.compile(r"\btrace=([0-9a-f]{32})\b")
_ANY_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
# What may be shown as it was sent; whatever else goes out during AUTH is a credential.
_SHOWN: Final = frozenset({"ehlo", "helo", "starttls", "mail", "rcpt", "data", "rset", "noop", "quit"})

Tell = Callable[[str, int, str], None]
"""Called with what was sent ("mail FROM:<...>", never a credential), the code of its reply, and the reply's text."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How it went.

    Attributes:
        refused: recipients that the message was not accepted for; the others have it.
        trace_id: out of the final reply; None where it names none.
    """

    refused: tuple[str, ...]
    trace_id: str | None


class SendingFailed(Exception):
    """The message was accepted for nobody; says at which step and why."""


class _Client(smtplib.SMTP):
    """The standard library's client, overheard."""

    last_reply = ""
    _sent = "connect"

    def __init__(self, tell: Tell, host: str, port: int, **more: Any) -> None:
        # Connecting is the constructor's doing, so that STARTTLS knows the name to verify.
        self._tell = tell
        super().__init__(host, port, local_hostname=os.uname().nodename, **more)

    def putcmd(self, cmd: str, args: str = "") -> None:
        verb = cmd.split(" ", 1)[0].lower()
        if verb == "auth":
            self._sent = f"AUTH {args.split(' ', 1)[0]}"
        elif verb in _SHOWN:
            self._sent = f"{cmd.upper()} {args}".strip()
        else:
            self._sent = "(credential)"
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        code, text = super().getreply()
        self.last_reply = text.decode("ascii", "replace")
        self._tell(self._sent, code, self.last_reply)
        # The one thing that is sent without a command is the content.
        self._sent = "(content)"
        return code, text


class _TlsClient(_Client, smtplib.SMTP_SSL):
    """The same, over implicit TLS."""


def _connected(gateway: UpstreamUrl, tell: Tell, context: ssl.SSLContext | None, timeout: float) -> _Client:
    host, port = gateway.endpoint.host, gateway.endpoint.port
    assert port is not None  # only lmtp has sockets without one
    if gateway.tls is TlsMode.IMPLICIT:
        return _TlsClient(tell, host, port, timeout=timeout, context=context)
    return _Client(tell, host, port, timeout=timeout)


def sample_message(*, sender: str, recipients: Sequence[str], octets: int = 0) -> bytes:
    """A message of at least `octets`, and hardly more."""
    now = datetime.now(UTC)
    message = EmailMessage()
    message["From"], message["To"] = sender or "mailer-daemon@otel-smtp.invalid", ", ".join(recipients)
    message["Subject"] = "Test mail of otel-smtp"
    message["Date"], message["Message-ID"] = format_datetime(now), make_msgid(domain="otel-smtp.invalid")
    message.set_content(f"Sent by otel-smtp send at {now.isoformat(timespec='seconds')}.\n")
    head = message.as_bytes()
    line = b"0123456789" * 7 + b"\n"
    # Line ends become two octets on the wire.
    missing = octets - len(head) - head.count(b"\n")
    return head + line * max(0, -(-missing // (len(line) + 1)))


def send(
    gateway: UpstreamUrl,
    *,
    sender: str,
    recipients: Sequence[str],
    content: bytes,
    tell: Tell,
    user: str | None = None,
    password: Secret | None = None,
    ca_file: str | None = None,
    timeout: float = 30.0,
) -> Sent:
    """Send one message, telling every reply as it comes.

    Args:
        gateway: where to connect, and with which TLS; certificates are verified.
        content: with any line ends.
        tell: called for each exchange.
        timeout: seconds for each of them.

    Raises:
        SendingFailed: it was accepted for nobody.
    """
    context = None if gateway.tls is TlsMode.OFF else ssl.create_default_context(cafile=ca_file)
    step = f"connecting to {gateway}"
    try:
        with _connected(gateway, tell, context, timeout) as client:
            step = "EHLO"
            client.ehlo_or_helo_if_needed()
            if gateway.tls is TlsMode.STARTTLS:
                step = "STARTTLS"
                client.starttls(context=context)
                client.ehlo_or_helo_if_needed()
            if user is not None:
                step = "AUTH"
                client.login(user, password.reveal() if password is not None else "")
            step = "the message"
            options = ["BODY=8BITMIME"] if not content.isascii() and client.has_extn("8bitmime") else []
            # Octets are sent as they are; a bare LF would be a fault of ours (RFC 5321 2.3.8).
            wire = _ANY_LINE_END.sub(b"\r\n", content)
            refused = client.sendmail(sender, recipients, wire, mail_options=options)
            trace = _TRACE.search(client.last_reply)
    except smtplib.SMTPRecipientsRefused as error:
        raise SendingFailed(f"every recipient was refused: {_first(error)}") from error
    except smtplib.SMTPResponseException as error:
        raise SendingFailed(f"{step} was refused: {error.smtp_code} {_text(error.smtp_error)}") from error
    except (smtplib.SMTPException, OSError) as error:
        raise SendingFailed(f"{step} failed: {error}") from error
    return Sent(tuple(refused), trace[1] if trace else None)


def _first(error: smtplib.SMTPRecipientsRefused) -> str:
    code, text = next(iter(error.recipients.values()))
    return f"{code} {_text(text)}"


def _text(text: bytes | str) -> str:
    return text.decode("ascii", "replace") if isinstance(text, bytes) else text
