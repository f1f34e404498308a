"""Loading settings: merge the sources key by key, read each value by its kind, collect all problems."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from otel_smtp.config.addresses import ReceiverUrlKind, UpstreamUrl, UpstreamUrlKind
from otel_smtp.config.changing import patient
from otel_smtp.config.consistency import Consistency
from otel_smtp.config.ineffective import ineffective
from otel_smtp.config.problems import Problem, SettingsError, unknown_key
from otel_smtp.config.settings import (
    SCHEMA,
    Key,
    NotifyTable,
    RateLimitTable,
    Settings,
    SpoolTable,
    Table,
    Tables,
    UpstreamTable,
)
from otel_smtp.config.values import BadValue, FilePath, Given, Rate
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode

PREFIX: Final = "OTELSMTP_"


# A tree like that of the settings: tables as dicts by key, lists of tables as dicts by index, values as Given.
_Node = dict[str | int, Any]


class Flag(NamedTuple):
    """A setting as text.

    Attributes:
        source: where it was set, for messages.
        key: its path.
        layer: a higher one wins; 2 for flags.
    """

    source: str
    key: str
    value: str
    layer: int = 2


def assignment(text: str) -> Flag:
    """`key=value` of `--set` as a flag.

    Raises:
        SettingsError: there is no "=" in it.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise SettingsError([Problem("--set", "", text, 'allowed: key=value, as "limits.recipients=50"')])
    return Flag(f"--set {key.strip()}", key.strip(), value.strip())


class _Loader:
    """Merges the sources into one tree and builds the settings from it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.tree: _Node = {}
        self.origins: dict[str, str] = {}

    @property
    def broken(self) -> tuple[str, ...]:
        """Key paths of the invalid settings so far."""
        return tuple(problem.key for problem in self.problems)

    def add(self, source: str, key: str, value: object, message: str) -> None:
        self.problems.append(Problem(source, key, value, message))

    # Sources

    def file(self, path: Path, *, named_by: str = "") -> None:
        """Read a TOML file.

        Args:
            named_by: what names it, where that is not beside the message.
        """
        import tomllib  # only a file needs it

        source = str(path)
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            self.add(source, "", None, f"cannot be read: {error.strerror}{named_by and f' ({named_by} names it)'}")
        except UnicodeDecodeError:
            self.add(source, "", None, "is not UTF-8, which TOML must be")
        except tomllib.TOMLDecodeError as error:
            self.add(source, "", None, f"is not TOML: {error}")
        else:
            self.values(document, source, path.absolute().parent)

    def values(self, document: Mapping[str, object], source: str, directory: Path | None) -> None:
        """Take a tree of plain values, as from TOML."""
        self._merge(Settings, document, self.tree, "", source, directory)

    def _merge(
        self,
        table: type[Table],
        document: Mapping[str, object],
        node: _Node,
        prefix: str,
        source: str,
        directory: Path | None,
    ) -> None:
        entries = SCHEMA[table]
        for name, value in document.items():
            path = f"{prefix}{name}"
            match entries.get(name):
                case None:
                    self.add(source, path, None, unknown_key(name, list(entries)))
                case Key():
                    _place(node, name, Given(value, source, directory=directory))
                case Tables(item):
                    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value) or not value:
                        self.add(source, path, value, f"allowed: tables, each headed [[{path}]]")
                        continue
                    tables = node.setdefault(name, {})
                    for index, one in enumerate(value):
                        child = tables.setdefault(index, {})
                        self._merge(item, one, child, f"{path}.{index}.", source, directory)
                case struct:
                    if not isinstance(value, dict):
                        self.add(source, path, value, f"allowed: a table, headed [{path}]")
                        continue
                    self._merge(struct, value, node.setdefault(name, {}), f"{path}.", source, directory)

    def environment(self, environ: Mapping[str, str]) -> None:
        """Take the variables that begin with OTELSMTP_; an empty one counts as unset, as with OpenTelemetry's."""
        ours = {name: value for name, value in sorted(environ.items()) if name.startswith(PREFIX) and value}
        ours.pop(f"{PREFIX}CONFIG", None)
        if listen := ours.pop(f"{PREFIX}LISTEN", None):
            self.listen(listen.split(","), f"environment {PREFIX}LISTEN")
        if upstream := ours.pop(f"{PREFIX}UPSTREAM", None):
            self.upstreams(upstream.split(","), f"environment {PREFIX}UPSTREAM")
        for name, value in ours.items():
            if not _FROM_KUBERNETES.fullmatch(name):
                key = name.removeprefix(PREFIX).lower().replace("__", ".")
                self.one(Flag(f"environment {name}", key, value, layer=1))

    def one(self, flag: Flag) -> None:
        """Take one value by its key path."""
        node: _Node = self.tree
        table: type[Table] = Settings
        parts = flag.key.split(".")
        walked = ""
        while True:
            name, parts = parts[0], parts[1:]
            entries = SCHEMA[table]
            entry = entries.get(name)
            walked += name
            if entry is None:
                hint = "; levels are separated by __" if "_" in name and flag.source.startswith("environment") else ""
                self.add(flag.source, walked, None, unknown_key(name, list(entries)) + hint)
                return
            if isinstance(entry, Key):
                if parts:
                    self.add(flag.source, flag.key, None, f"{walked} is a value and has no keys below it")
                else:
                    _place(node, name, Given(flag.value, flag.source, is_text=True, layer=flag.layer))
                return
            if isinstance(entry, Tables):
                if not parts or not re.fullmatch("[0-9]{1,3}", parts[0]):
                    self.add(flag.source, walked, None, f"there can be several: give a number, as {walked}.0.KEY")
                    return
                node, table = node.setdefault(name, {}).setdefault(int(parts[0]), {}), entry.item
                walked += f".{parts.pop(0)}"
            else:
                node, table = node.setdefault(name, {}), entry
            if not parts:
                self.add(flag.source, walked, None, f"is a table; give one of its keys: {', '.join(SCHEMA[table])}")
                return
            walked += "."

    def listen(self, addresses: Sequence[str], source: str) -> None:
        """Take the short form for the addresses of the only listener."""
        if self._is_single("listener", source, "address"):
            node = self.tree.setdefault("listener", {}).setdefault(0, {})
            node["address"] = Given([address.strip() for address in addresses], source, is_text=True)

    def upstreams(self, urls: Sequence[str], source: str) -> None:
        """Take the short form for upstreams: URLs in order of preference."""
        if self._is_single("upstream", source, "url"):
            tables = self.tree.setdefault("upstream", {})
            for index, url in enumerate(urls):
                tables.setdefault(index, {})["url"] = Given(url.strip(), source, is_text=True)

    def _is_single(self, name: str, source: str, key: str) -> bool:
        count = len(self.tree.get(name, {}))
        if count > 1:
            self.add(source, "", None, f"{count} tables [[{name}]] are set: name one, as {name}.0.{key}")
        return count <= 1

    # Building

    def build(self, *, needs_upstream: bool, is_command: bool) -> Settings:
        """Read every value by its kind. An invalid one is collected as a problem and replaced by its default."""
        is_known_wrong = any(not problem.key or problem.key.startswith("upstream") for problem in self.problems)
        if needs_upstream and not self.tree.get("upstream") and not is_known_wrong:
            how = (
                "set [[upstream]] url, OTELSMTP_UPSTREAM or --upstream, for example smtp://127.0.0.1:1025"
                if is_command
                else 'pass upstream=["smtp://127.0.0.1:1025"], for example, or name a file that has [[upstream]] url'
            )
            self.add("settings", "upstream", None, f"none is set; {how}")
        fields = self._fields(Settings, self.tree, "")
        return Settings(**fields)

    def _fields(self, table: type[Table], node: _Node, prefix: str) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, entry in SCHEMA[table].items():
            path = f"{prefix}{name}"
            if isinstance(entry, Key):
                given = node.get(name)
                if given is not None:
                    self._read(entry, given, path, fields, name)
                if entry.secret:
                    self._read_secret(entry, node, prefix, name, fields)
            elif isinstance(entry, Tables):
                built = [
                    self._table(entry.item, child, f"{path}.{index}.")
                    for index, child in self._in_order(node.get(name, {}), path)
                ]
                if built:
                    fields[name] = tuple(built)
            else:
                fields[name] = self._table(entry, node.get(name, {}), f"{path}.")
        return fields

    def _table(self, table: type[Table], node: _Node, prefix: str) -> Table:
        before = len(self.problems)
        fields = self._fields(table, node, prefix)
        if table is UpstreamTable and "url" not in fields:
            if len(self.problems) == before:
                self.add(_any_source(node), f"{prefix}url", None, f"is missing; allowed: {UpstreamUrlKind().allowed}")
            fields["url"] = _NOWHERE
        for name, instead in _REQUIRED.get(table, {}).items():
            if name not in fields:
                if len(self.problems) == before:
                    self.add(_any_source(node), f"{prefix}{name}", None, "is missing")
                fields[name] = instead
        return table(**fields)

    def _in_order(self, tables: _Node, path: str) -> Iterator[tuple[int, _Node]]:
        for position, index in enumerate(sorted(tables)):
            if index != position:
                self.add(
                    _any_source(tables[index]), f"{path}.{index}", None, f"there is no {path}.{position} before it"
                )
                return
            yield position, tables[index]

    def _read(self, key: Key, given: Given, path: str, fields: dict[str, Any], name: str) -> None:
        try:
            value = key.kind.parse(given)
        except BadValue as why:
            # No secrets, and no URL that contains one.
            is_url = isinstance(key.kind, UpstreamUrlKind | ReceiverUrlKind)
            is_secret = key.secret or (is_url and "@" in str(given.value))
            more = f"{why}; " if str(why) else ""
            self.add(given.source, path, "***" if is_secret else given.value, f"{more}allowed: {key.kind.allowed}")
            return
        if key.must_be_readable and value is not None and (unreadable := _unreadable(value)):
            self.add(given.source, path, given.value, unreadable)
            return
        fields[name] = value
        self.origins[path] = given.source

    def _read_secret(self, key: Key, node: _Node, prefix: str, name: str, fields: dict[str, Any]) -> None:
        """Fill a secret from the file that `<key>_file` names."""
        given = node.get(f"{name}_file")
        if given is None:
            return
        if name in node:
            self.add(given.source, f"{prefix}{name}_file", given.value, f"{name} is set too; set only one of them")
            return
        try:
            path = FilePath(may_be_empty=True).parse(given)
        except BadValue:
            return  # reported with `<key>_file` itself
        if path is None or _unreadable(path):
            return  # likewise; reading a device or pipe might never end
        try:
            # Editors and `echo` end a file with one line end; any further one belongs to the secret.
            # Some write a byte order mark, which "utf-8-sig" removes.
            text = path.read_text(encoding="utf-8-sig").removesuffix("\n").removesuffix("\r")
            fields[name] = key.kind.parse(Given(text, given.source))
            self.origins[f"{prefix}{name}"] = given.source
        except OSError:
            pass  # reported with `<key>_file` itself
        except BadValue:
            message = f"the file's content is invalid; allowed: {key.kind.allowed}"
            self.add(given.source, f"{prefix}{name}_file", given.value, message)
        except UnicodeDecodeError:
            self.add(given.source, f"{prefix}{name}_file", given.value, "the file's content is not UTF-8 text")


# Replaces an upstream with an invalid URL, so that the others keep their numbers. Never leaves `load`.
_NOWHERE: Final = UpstreamUrl("smtp", TlsMode.OFF, "smtp", Endpoint("", 0))

# Keys that a table must have, and placeholders for missing ones, as above.
_REQUIRED: Final[Mapping[type[Table], Mapping[str, Any]]] = {
    RateLimitTable: {"name": "", "rate": Rate(1, 1.0)},
    NotifyTable: {"url": ""},
}

# Kubernetes sets these in every pod of a namespace that has a service called "otelsmtp".
_FROM_KUBERNETES: Final = re.compile(r"OTELSMTP_(?:SERVICE_HOST|SERVICE_PORT(?:_.*)?|PORT(?:_[0-9]+_.*)?)")


def _place(node: _Node, name: str, given: Given) -> None:
    """Set a value. A secret and its file are two spellings of one key, of which the later source's wins."""
    other = node.get(twin := name.removesuffix("_file") if name.endswith("_file") else f"{name}_file")
    if other is not None and other.layer < given.layer:
        del node[twin]
    node[name] = given


def _any_source(node: _Node) -> str:
    """The source of any value of a table."""
    for value in node.values():
        return value.source if isinstance(value, Given) else _any_source(value)
    return "settings"


def _unreadable(path: Path) -> str | None:
    try:
        if not path.is_file():
            return f"no such file: {path}" if not path.exists() else f"not a regular file: {path}"
    except OSError as error:  # this user may not look into its directory, or no file may have such a name
        return f"cannot be read: {error.strerror}: {str(path)[:120]}"
    return None if os.access(path, os.R_OK) else f"this user cannot read the file: {path}"


def _file_limit() -> int | None:
    """How many files this process may have open; None: no limit."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def load(
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Sequence[Flag] = (),
    listen: Sequence[str] = (),
    upstream: Sequence[str] = (),
    values: Mapping[str, object] | None = None,
    needs_upstream: bool = True,
    verifies_tokens: bool = False,
    is_command: bool = False,
    file_limit: int | None = None,
) -> Settings:
    """Read, merge and check the settings.

    Args:
        file: TOML file; None: the one that OTELSMTP_CONFIG of `environ` names, if any.
        environ: environment variables; those that begin with OTELSMTP_ are settings. None: none are read.
        flags: values of flags, see `assignment`; later ones win.
        listen: addresses of the one listener.
        upstream: URLs of upstreams, in order of preference.
        values: a tree of plain values in place of a file, for programs that embed the gateway.
        needs_upstream: refuse settings without an upstream.
        verifies_tokens: the program passes a token verifier to its `Gateway`, so that a listener with AUTH needs no
            users file.
        is_command: messages use the names of the commands' options for the parameters.
        file_limit: how many files the process may open; None: as the system says.

    Raises:
        SettingsError: with all problems.
    """
    environ = {} if environ is None else environ
    loader = _Loader()
    if values is not None:
        loader.values(values, "settings", None)
    if file is not None:
        loader.file(Path(file))
    elif named := environ.get(f"{PREFIX}CONFIG"):
        loader.file(Path(named), named_by=f"{PREFIX}CONFIG")
    loader.environment(environ)
    if listen:
        loader.listen(listen, "--listen" if is_command else "load(listen=...)")
    if upstream:
        loader.upstreams(upstream, "--upstream" if is_command else "load(upstream=...)")
    for flag in flags:
        loader.one(flag)
    settings = loader.build(needs_upstream=needs_upstream, is_command=is_command)

    checks = Consistency(settings, loader.origins, loader.broken, verifies_tokens=verifies_tokens)
    checks.run()
    connections = checks.connections(_file_limit() if file_limit is None else file_limit)
    if problems := loader.problems + checks.problems:
        raise SettingsError(problems)
    return msgspec.structs.replace(
        settings,
        limits=msgspec.structs.replace(settings.limits, connections=connections),
        upstream=patient(settings.upstream, settings.delivery.mode, loader.origins),
        spool=_warning_in_time(settings.spool, loader.origins),
        origins=loader.origins,
        warnings=(*checks.warnings, *ineffective(settings, loader.origins)),
    )


def _warning_in_time(spool: SpoolTable, origins: Mapping[str, str]) -> SpoolTable:
    """A default must not contradict a setting: for mail with a short lifetime, warn after half of it."""
    if spool.warn_after is None or "spool.warn_after" in origins:
        return spool
    return msgspec.structs.replace(spool, warn_after=min(spool.warn_after, spool.max_age / 2))
