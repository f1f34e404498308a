"""Other relays: the null relay, Python's, Node's and Go's usual parts put together, Haraka, Postfix, any by command."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.bench.process import Child
from tests.bench.targets.base import Place, Running, Target, UnavailableError
from tests.bench.targets.gateway import collector
from tests.support.ports import unclaimed_port

_HERE: Final = Path(__file__).parent
_INSTALL_SECONDS: Final = 240
_GO_SMTP: Final = "github.com/emersion/go-smtp@v0.25.1"


def _aiosmtpd(place: Place, *, traced: bool) -> Running:
    port = unclaimed_port()
    child = Child(
        [
            sys.executable, "-m", "tests.bench.targets.aiosmtpd_relay", str(port), str(place.upstream_port),
            *(["--otel"] if traced else []),
        ],
        # Room for a segment's events: the SDK's own bound of 128 would drop the oldest and spare their encoding.
        environment={**collector(place.collector_port), "OTEL_SPAN_EVENT_COUNT_LIMIT": "512"} if traced else None,
        log=place.directory / "log",
    )  # fmt: skip
    return Running(child, port)


def _npm(place: Place, *packages: str) -> Path:
    """A directory with these packages installed; kept in the cache."""
    home = place.cache / packages[0].lower()
    if not (home / "node_modules" / packages[0]).is_dir():
        if shutil.which("npm") is None:
            raise UnavailableError("not installed: npm")
        home.mkdir(parents=True, exist_ok=True)
        (home / "package.json").write_text("{}", encoding="ascii")
        _installed(["npm", "install", "--no-audit", "--no-fund", *packages], home)
    return home


def _nodemailer(place: Place) -> Running:
    home = _npm(place, "nodemailer", "smtp-server")
    port = unclaimed_port()
    child = Child(
        ["node", _HERE / "nodemailer_relay.js", str(port), str(place.upstream_port)],
        environment={"NODE_PATH": str(home / "node_modules"), "NODE_ENV": "production"},
        log=place.directory / "log",
    )
    return Running(child, port)


def _go_smtp(place: Place) -> Running:
    source = (_HERE / "go_smtp_relay.go").read_bytes()
    home = place.cache / f"go-smtp-{hashlib.sha256(source).hexdigest()[:12]}"
    if not (home / "relay").exists():
        if shutil.which("go") is None:
            raise UnavailableError("not installed: go")
        home.mkdir(parents=True, exist_ok=True)
        (home / "main.go").write_bytes(source)
        (home / "go.mod").unlink(missing_ok=True)
        for command in (("mod", "init", "relay"), ("get", _GO_SMTP), ("build", "-o", "relay", ".")):
            _installed(["go", *command], home)
    port = unclaimed_port()
    child = Child(
        [home / "relay", f"127.0.0.1:{port}", f"127.0.0.1:{place.upstream_port}"], log=place.directory / "log"
    )
    return Running(child, port)


def _installed(command: Sequence[str], home: Path) -> None:
    """Run a package manager in `home`.

    Raises:
        UnavailableError: it fails, or is not done in time.
    """
    try:
        done = subprocess.run(
            command, cwd=home, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise UnavailableError(f"{' '.join(command)}: not done in {_INSTALL_SECONDS} s") from late
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UnavailableError(f"{' '.join(command)}: {last}")


# A file of one's own stands for the whole of its defaults: what is missing here is undefined there, and throws.
_HARAKA_CONNECTION: Final = """
[main]
smtputf8=true
[headers]
add_received=true
max_lines=1000
max_received=100
[max]
bytes=104857600
mime_parts=1000
line_length=512
data_line_length=992
[message]
greeting[]=relay.example.com
helo=hello
close=closing
[uuid]
banner_chars=0
deny_chars=0
"""


def _haraka(place: Place) -> Running:
    home = _npm(place, "Haraka")
    port = unclaimed_port()
    config = place.directory / "config"
    config.mkdir()
    for name, text in {
        "smtp.ini": f"listen=127.0.0.1:{port}\nnodes=0\n",
        "plugins": "relay\nqueue/smtp_forward\n",
        "relay.ini": "[relay]\nacl=true\n",
        "relay_acl_allow": "127.0.0.1/32\n",
        "smtp_forward.ini": f"host=127.0.0.1\nport={place.upstream_port}\nenable_outbound=true\n",
        "loglevel": "ERROR\n",
        "databytes": "104857600\n",
        "me": "relay.example.com\n",
        "host_list": "",
        "connection.ini": _HARAKA_CONNECTION,
    }.items():
        (config / name).write_text(text, encoding="ascii")
    child = Child(
        ["node", home / "node_modules" / "Haraka" / "bin" / "haraka", "-c", place.directory],
        environment={"NODE_ENV": "production"},
        log=place.directory / "log",
    )
    return Running(child, port)


_POSTFIX_MAIN: Final = """
compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = relay.example.com
mydestination =
mynetworks = 127.0.0.0/8
alias_maps =
local_recipient_maps =
relayhost = [127.0.0.1]:{upstream_port}
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_client_connection_count_limit = 0
default_process_limit = 100
default_destination_concurrency_limit = 20
message_size_limit = 104857600
mailbox_size_limit = 0
smtp_connection_cache_on_demand = yes
"""
_POSTFIX_SERVICES: Final = """
127.0.0.1:{port} inet n - n - - smtpd {options}
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
tlsmgr unix - - n 1000? 1 tlsmgr
"""
_QUEUES: Final = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved")


def _postfix(place: Place, *, options: str) -> Running:
    master = Path("/usr/lib/postfix/sbin/master")
    if not master.exists():
        raise UnavailableError(f"not installed: {master}")
    if os.geteuid() != 0:
        raise UnavailableError("Postfix starts as root only")
    home = place.directory
    port = unclaimed_port()
    config = home / "config"
    for directory, mode, owner, group in [
        (config, 0o755, "root", "root"),
        (home / "queue", 0o755, "root", "root"),
        (home / "queue/pid", 0o755, "root", "root"),
        (home / "data", 0o700, "postfix", "postfix"),
        (home / "queue/public", 0o2710, "postfix", "postdrop"),
        (home / "queue/maildrop", 0o1730, "postfix", "postdrop"),
        *((home / "queue" / name, 0o700, "postfix", "root") for name in (*_QUEUES, "trace")),
    ]:
        directory.mkdir()
        shutil.chown(directory, owner, group)
        directory.chmod(mode)
    (config / "main.cf").write_text(_POSTFIX_MAIN.format(home=home, upstream_port=place.upstream_port))
    (config / "master.cf").write_text(_POSTFIX_SERVICES.format(port=port, options=options))
    # -d: stays in our process group, so that all of it ends with us.
    return Running(Child([master, "-c", config, "-d"], log=home / "log"), port)


def _null(place: Place, *options: str) -> Running:
    port = unclaimed_port()
    arguments = ["-m", "tests.bench.targets.null_relay", str(port), str(place.upstream_port), *options]
    return Running(Child([sys.executable, *arguments], log=place.directory / "log"), port)


def named(text: str) -> Target:
    """A relay by its command line, as `--peer` takes it: `name=command {listen} {upstream}`.

    Both places become host:port; `{listen_port}` and `{upstream_port}` are the ports alone, `{directory}` an empty
    directory of its own. A language in brackets at the end of the name counts as the one that it is written in.

    Raises:
        ValueError: there is no name or no command, or the command does not say where to listen.
    """
    name, _, command = text.partition("=")
    words = shlex.split(command)
    if not name.strip() or not words:
        raise ValueError(f"{text!r}: wanted is 'name=command {{listen}} {{upstream}}'")
    if "{listen" not in command or "{upstream" not in command:
        raise ValueError(f"{text!r}: the command has no place {{listen}} or {{upstream}}")

    def begin(place: Place) -> Running:
        port = unclaimed_port()
        values = {
            "{listen}": f"127.0.0.1:{port}",
            "{upstream}": f"127.0.0.1:{place.upstream_port}",
            "{listen_port}": str(port),
            "{upstream_port}": str(place.upstream_port),
            "{directory}": str(place.directory),
        }
        arguments = [re.sub(r"\{\w+\}", lambda found: values.get(found[0], found[0]), word) for word in words]
        return Running(Child(arguments, log=place.directory / "log"), port)

    language = re.search(r"\((\w+)\)$", name.strip())
    return Target(name.strip(), begin, language=language[1] if language else "")


NULL = Target("null relay, nothing parsed", _null)
NULL_ASYNCIO = Target("null relay, asyncio's loop", lambda place: _null(place, "--asyncio"))
AIOSMTPD = Target("aiosmtpd + aiosmtplib", lambda place: _aiosmtpd(place, traced=False), language="Python")
AIOSMTPD_TRACED = Target(
    "aiosmtpd + aiosmtplib + OpenTelemetry SDK",
    lambda place: _aiosmtpd(place, traced=True),
    language="Python",
    exports_spans=True,
)
NODEMAILER = Target("nodemailer", _nodemailer, language="JavaScript")
GO_SMTP = Target("go-smtp", _go_smtp, language="Go")
HARAKA = Target("Haraka smtp_forward", _haraka, language="JavaScript")
POSTFIX_QUEUE = Target(
    "Postfix queue",
    lambda place: _postfix(place, options=""),
    language="C",
    answers_before_delivery=True,
    has_process_per_connection=True,
)
POSTFIX_PROXY = Target(
    "Postfix smtpd_proxy_filter",
    lambda place: _postfix(place, options=f"-o smtpd_proxy_filter=127.0.0.1:{place.upstream_port}"),
    language="C",
    has_process_per_connection=True,
)
