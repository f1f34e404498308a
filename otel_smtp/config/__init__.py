"""Settings: keys, defaults, and the checks at start.

Theory of operation
-------------------
The structures of `settings` are the one home of every setting: a field is a setting, its name is the key, its default
is the default, and its `Key` has the meaning, the form of the value and the source of the default. `loading` merges the
sources and reads each value by its kind (`values`, `addresses`), `consistency` finds settings that contradict each
other, `problems` words the errors, `description` makes the list of effective settings, the reference table and the JSON
Schema, `changing` decides which new values a running gateway takes.

Settings come from four places, each over the one before: defaults, the TOML file, the environment
(`OTELSMTP_LIMITS__RECIPIENTS`, `OTELSMTP_LISTENER__0__TLS`), flags (`--set limits.recipients=50`). They are merged key
by key; no source replaces another as a whole. `Settings.origins` remembers where each value came from.

All problems are collected and reported at once: source, key, value, what is allowed. The value of a secret is never
shown. Settings of `OTEL_*` variables have no second name here.

The loader reads files and nothing else. It resolves no name and opens no socket; `check --connect` does.
"""

from otel_smtp.config.addresses import Network, UpstreamUrl
from otel_smtp.config.changing import Change, change
from otel_smtp.config.description import Row, describe, documented_settings, json_schema, settings_table
from otel_smtp.config.loading import PREFIX, Flag, assignment, load
from otel_smtp.config.problems import Problem, SettingsError
from otel_smtp.config.settings import (
    DeliveryTable,
    LimitsTable,
    ListenerTable,
    LogTable,
    Settings,
    SpoolTable,
    StatusTable,
    TelemetryTable,
    TimeoutsTable,
    UpstreamTable,
    UpstreamTimeoutTable,
)
from otel_smtp.config.values import Secret

__all__ = [
    "PREFIX",
    "Change",
    "DeliveryTable",
    "Flag",
    "LimitsTable",
    "ListenerTable",
    "LogTable",
    "Network",
    "Problem",
    "Row",
    "Secret",
    "Settings",
    "SettingsError",
    "SpoolTable",
    "StatusTable",
    "TelemetryTable",
    "TimeoutsTable",
    "UpstreamTable",
    "UpstreamTimeoutTable",
    "UpstreamUrl",
    "assignment",
    "change",
    "describe",
    "documented_settings",
    "json_schema",
    "load",
    "settings_table",
]
