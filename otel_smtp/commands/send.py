"""`otel-smtp send`: a test mail through a gateway, with the replies and the trace id.

It uses the standard library's client on purpose: any application can do what that can.
"""

import email.policy
import json
import os
import re
import smtplib
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import Any, Final

import click

from otel_smtp.commands.options import FAILED, WRONG, check_address, console, fail, global_flags, global_options, parse
from otel_smtp.config import Secret, Settings, UpstreamUrl
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode

# In the gateway's final 250, and in refusals of mail; other servers' replies have none.
_TRACE: Final = re.compile(r"\btrace=([0-9a-f]{32})\b")
_ANY_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
# Commands that may be shown; anything else sent during AUTH is a credential.
_SHOWN: Final = frozenset({"ehlo", "helo", "starttls", "mail", "rcpt", "data", "rset", "noop", "quit"})

OnExchange = Callable[[str, int, str], None]
"""Called with the command ("MAIL FROM:<...>", never a credential), the code of its reply, and the reply's text."""


@click.command()
@click.argument("gateway", metavar="[GATEWAY]", required=False)
@click.option("--to", "-t", multiple=True, required=True, metavar="ADDRESS", help="Recipient; repeatable.")
@click.option(
    "--from",
    "-f",
    "sender",
    default="otel-smtp@localhost",
    metavar="ADDRESS",
    show_default=True,
    help='Sender; "" is the null reverse-path.',
)
@click.option("--starttls", is_flag=True, help="Require STARTTLS, with a verified certificate.")
@click.option("--ca-file", type=click.Path(path_type=Path), metavar="FILE", help="Authorities to trust, PEM.")
@click.option("--user", metavar="NAME", help="Log in with this name.")
@click.option(
    "--password-file", type=click.Path(path_type=Path), metavar="FILE", help="File with the password as its first line."
)
@click.option("--file", type=click.Path(path_type=Path), metavar="FILE", help="Message to send, as .eml.")
@click.option("--size", metavar="SIZE", help='Size of the test mail, for example "5MiB".')
@click.option("--timeout", default="30s", metavar="DURATION", show_default=True, help="Timeout of each reply.")
@global_flags("Print one line of JSON: outcome, exchanges, trace id.")
@click.pass_context
def send(
    context: click.Context,
    gateway: str | None,
    *,
    to: tuple[str, ...],
    sender: str,
    starttls: bool,
    ca_file: Path | None,
    user: str | None,
    password_file: Path | None,
    file: Path | None,
    size: str | None,
    timeout: str,
    as_json: bool,
) -> None:
    """Send a test mail; print replies and trace id.

    GATEWAY is host:port or a URL with smtp://, smtp+starttls:// or smtps://. The default is the first listener of the
    settings that can be used without TLS; without settings, 127.0.0.1:2525.
    """
    from otel_smtp.commands.terminal.tables import exchange_line
    from otel_smtp.config.addresses import UpstreamUrlKind
    from otel_smtp.config.values import Duration, Size

    check_address(sender, "--from", may_be_null=True)
    for address in to:
        check_address(address, "--to")
    output = console()
    gateway = gateway or own_listener(global_options(context).settings(needs_upstream=False))
    url = gateway if "://" in gateway else f"smtp{'+starttls' if starttls else ''}://{gateway}"
    target = parse(UpstreamUrlKind(schemes=("smtp", "smtp+starttls", "smtps")), url, "GATEWAY")
    octets = parse(Size(), size, "--size") if size else 0
    timeout_seconds = parse(Duration(), timeout, "--timeout")
    for is_wrong, words in (
        (starttls and target.tls is not TlsMode.STARTTLS, f"--starttls: contradicts {target}; use smtp+starttls://"),
        (ca_file and target.tls is TlsMode.OFF, f"--ca-file: has no effect with {target}; add --starttls"),
        (user is not None and password_file is None, "--user: needs --password-file"),
        (user is None and password_file is not None, "--password-file: needs --user"),
        (file and size, "--size: contradicts --file, whose message is sent as it is"),
    ):
        if is_wrong:
            fail(WRONG, words)
    content = _read(file, "--file") if file else sample_message(sender=sender, recipients=to, octets=octets)
    password = _password(password_file) if password_file else None
    if ca_file:
        _check_authorities(ca_file)
    exchanges: list[dict[str, str | int]] = []

    def report(said: str, code: int, text: str) -> None:
        exchanges.append({"sent": said, "code": code, "text": text})
        if not as_json:
            output.print(exchange_line(said, code, text), soft_wrap=True)

    refused, failure = to, ""
    try:
        refused = send_message(
            target,
            sender=sender,
            recipients=to,
            content=content,
            on_exchange=report,
            user=user,
            password=password,
            ca_file=str(ca_file) if ca_file else None,
            timeout=timeout_seconds,
        )
        if refused:
            failure = f"refused for {', '.join(refused)}"
    except SendingFailed as why:
        failure = str(why)
    traces = [found[1] for exchange in exchanges if (found := _TRACE.search(str(exchange["text"])))]
    if as_json:
        told = {
            "is_accepted": refused != to,
            "refused": list(refused),
            "trace_id": traces[-1] if traces else None,
            "failure": failure or None,
            "exchanges": exchanges,
        }
        click.echo(json.dumps(told))
        raise SystemExit(FAILED if failure else 0)
    if traces:
        output.print(f"trace {traces[-1]}", style="bold")
    if failure:
        fail(FAILED, failure)


def own_listener(settings: Settings) -> str:
    """The address at which the settings' gateway takes mail from this machine without TLS."""
    plain = (one for one in settings.listener if one.protocol == "smtp" and not one.tls_required)
    addresses = (address for one in plain if one.tls is not TlsMode.IMPLICIT for address in one.address)
    found = next((address for address in addresses if address.port), None)  # no unix socket, no port of the kernel's
    if found is None:
        fail(WRONG, "GATEWAY is missing: no listener of the settings takes SMTP without TLS at a known port")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(found.host, found.host)  # noqa: S104 - where it listens
    return str(Endpoint(host, found.port))


def _read(path: Path, option: str) -> bytes:
    """The content of a file that an option names."""
    try:
        return path.read_bytes()
    except OSError as error:
        fail(WRONG, f"{option}: cannot read {path}: {(error.strerror or str(error)).lower()}")


def _password(path: Path) -> Secret:
    lines = _read(path, "--password-file").splitlines()
    try:
        return Secret(lines[0].decode("utf-8-sig"))
    except (IndexError, UnicodeDecodeError):
        fail(WRONG, f"--password-file: the first line of {path} is no password in UTF-8")


def _check_authorities(path: Path) -> None:
    _read(path, "--ca-file")
    try:
        ssl.create_default_context(cafile=path)
    except OSError:
        fail(WRONG, f"--ca-file: {path} holds no certificate in PEM")


class SendingFailed(Exception):
    """The message was accepted for no recipient; the text names the step and the reason."""


class _Client(smtplib.SMTP):
    """The standard library's client, reporting each exchange."""

    _sent = "connect"

    def __init__(self, on_exchange: OnExchange, host: str, port: int, **more: Any) -> None:
        # The constructor connects, so that STARTTLS knows the name to verify.
        self._on_exchange = on_exchange
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
        self._on_exchange(self._sent, code, _text(text))
        # Only the content is sent without a command.
        self._sent = "(content)"
        return code, text


class _TlsClient(_Client, smtplib.SMTP_SSL):
    """The same, over implicit TLS."""


def _connect(gateway: UpstreamUrl, on_exchange: OnExchange, context: ssl.SSLContext | None, timeout: float) -> _Client:
    host, port = gateway.endpoint.host, gateway.endpoint.port
    assert port is not None  # only lmtp has sockets without one
    if gateway.tls is TlsMode.IMPLICIT:
        return _TlsClient(on_exchange, host, port, timeout=timeout, context=context)
    return _Client(on_exchange, host, port, timeout=timeout)


def sample_message(*, sender: str, recipients: Sequence[str], octets: int = 0) -> bytes:
    """A message of at least `octets` and at most one line more."""
    now = datetime.now(UTC)
    is_ascii = "".join([sender, *recipients]).isascii()
    message = EmailMessage(email.policy.default.clone(utf8=not is_ascii))  # RFC 6532 where the addresses need it
    message["From"], message["To"] = sender or "mailer-daemon@otel-smtp.invalid", ", ".join(recipients)
    message["Subject"] = "Test mail of otel-smtp"
    message["Date"], message["Message-ID"] = format_datetime(now), make_msgid(domain="otel-smtp.invalid")
    message.set_content(f"Sent by otel-smtp send at {now.isoformat(timespec='seconds')}.\n")
    head = message.as_bytes()
    line = b"0123456789" * 7 + b"\n"
    # Line ends become two octets on the wire.
    missing = octets - len(head) - head.count(b"\n")
    return head + line * max(0, -(-missing // (len(line) + 1)))


def send_message(
    gateway: UpstreamUrl,
    *,
    sender: str,
    recipients: Sequence[str],
    content: bytes,
    on_exchange: OnExchange,
    user: str | None = None,
    password: Secret | None = None,
    ca_file: str | None = None,
    timeout: float = 30.0,
) -> tuple[str, ...]:
    """Send one message.

    Args:
        gateway: where to connect, and with which TLS; certificates are verified.
        content: with any line ends.
        on_exchange: called at each reply.
        timeout: seconds for each reply.

    Returns:
        The recipients that were refused.

    Raises:
        SendingFailed: the message was accepted for no recipient.
    """
    context = None if gateway.tls is TlsMode.OFF else ssl.create_default_context(cafile=ca_file)
    step = f"connecting to {gateway}"
    try:
        with _connect(gateway, on_exchange, context, timeout) as client:
            step = "EHLO"
            client.ehlo_or_helo_if_needed()
            if gateway.tls is TlsMode.STARTTLS:
                step = "STARTTLS"
                client.starttls(context=context)
                client.ehlo_or_helo_if_needed()
            if user is not None:
                step = "AUTH"
                _log_in(client, user, password.reveal() if password is not None else "")
            step = "the message"
            options = ["BODY=8BITMIME"] if not content.isascii() and client.has_extn("8bitmime") else []
            if not "".join([sender, *recipients]).isascii():
                options.append("SMTPUTF8")  # RFC 6531; raises where the gateway does not offer it
            # Octets are sent as they are, so a bare LF would be our fault (RFC 5321 2.3.8).
            wire = _ANY_LINE_END.sub(b"\r\n", content)
            refused = client.sendmail(sender, recipients, wire, mail_options=options)
    except smtplib.SMTPRecipientsRefused as error:
        raise SendingFailed(f"every recipient was refused: {_first(error)}") from error
    except smtplib.SMTPResponseException as error:
        raise SendingFailed(f"{step} was refused: {error.smtp_code} {_text(error.smtp_error)}") from error
    except (smtplib.SMTPException, OSError) as error:
        raise SendingFailed(f"{step} failed: {_why(error)}") from error
    return tuple(refused)


def _log_in(client: _Client, user: str, password: str) -> None:
    """Log in by the first mechanism that both sides have.

    The standard library's `login` goes on to the next mechanism after a 535: a wrong password would count twice.
    """
    client.user, client.password = user, password  # where the mechanisms of smtplib look for them
    offered = client.esmtp_features.get("auth", "").upper().split()
    for mechanism, answer in (("PLAIN", client.auth_plain), ("LOGIN", client.auth_login)):
        if mechanism in offered:
            client.auth(mechanism, answer)
            return
    raise smtplib.SMTPNotSupportedError(f"the gateway offers {', '.join(offered) or 'no AUTH'}, not PLAIN or LOGIN")


def _why(error: Exception) -> str:
    """The error in words; for TLS without OpenSSL's names."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS: {error.reason.lower().replace('_', ' ')}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)


def _first(error: smtplib.SMTPRecipientsRefused) -> str:
    code, text = next(iter(error.recipients.values()))
    return f"{code} {_text(text)}"


def _text(text: bytes | str) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
