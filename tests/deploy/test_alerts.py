"""Which alerts are raised: by Prometheus' own rule tests, on what a gateway counts while things happen to it.

A story names the series that are not 0; the others of their closed sets exist and stay 0, as on a gateway's page.
There is a value every 15 seconds.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.tools import tool

ALERTS: Final = yaml.safe_load(
    (Path(__file__).parent.parent.parent / "deploy/prometheus/alerts.yaml").read_text(encoding="utf-8")
)
RULES: Final = [rule for group in ALERTS["groups"] for rule in group["rules"]]
SEVERITY: Final = {rule["alert"]: rule["labels"]["severity"] for rule in RULES}

OUTCOMES: Final = ("relayed", "partly_relayed", "queued", "refused", "deferred", "aborted", "unknown")
DELIVERY: Final = "smtp_client_delivery_duration_seconds_count"
TRANSACTIONS: Final = "smtp_server_transactions_total"
MESSAGES: Final = "smtp_spool_messages"
AGE: Final = "smtp_spool_age_seconds"
RECIPIENTS: Final = "smtp_server_recipients_total"
AWAY: Final = "smtp_spool_away_seconds"
TAKEN_OVER: Final = "smtp_spool_taken_over_total"
STALE: Final = "smtp_spool_stale_total"
UNANSWERED: Final = "smtp_spool_unanswered_total"
FIRST_ATTEMPT: Final = "smtp_client_first_attempt_age_seconds"


def transactions(outcome: str) -> str:
    return f'{TRANSACTIONS}{{instance="gw:9925",smtp_outcome="{outcome}"}}'


def attempts(outcome: str, upstream: str = "provider") -> str:
    return f'{DELIVERY}{{instance="gw:9925",smtp_upstream_name="{upstream}",smtp_outcome="{outcome}"}}'


def messages(state: str) -> str:
    return f'{MESSAGES}{{instance="gw:9925",smtp_spool_state="{state}"}}'


def on_gateway(name: str, **labels: str) -> str:
    matchers = ",".join(f'{label}="{value}"' for label, value in {"instance": "gw:9925", **labels}.items())
    return f"{name}{{{matchers}}}"


DROPPED: Final = on_gateway(
    "smtp_telemetry_dropped_total", smtp_telemetry_signal="traces", smtp_telemetry_drop_reason="queue_full"
)
UP: Final = on_gateway("up", job="otel-smtp")
AT_START: Final[Mapping[str, str]] = {
    UP: "1x4000",
    on_gateway(AGE): "0x4000",
    on_gateway("smtp_server_connection_duration_seconds_count"): "0x4000",
    on_gateway("smtp_server_refused_total", smtp_refused_reason="capacity"): "0x4000",
    on_gateway(
        "smtp_telemetry_dropped_total", smtp_telemetry_signal="traces", smtp_telemetry_drop_reason="queue_full"
    ): ("0x4000"),
    **{transactions(outcome): "0x4000" for outcome in OUTCOMES},
    on_gateway(RECIPIENTS, smtp_recipient_fate="expired"): "0x4000",
    **{attempts(outcome): "0x4000" for outcome in OUTCOMES if outcome != "queued"},
    **{on_gateway(name): "0x4000" for name in (AWAY, TAKEN_OVER, STALE, UNANSWERED)},
    **{messages(state): "0x4000" for state in ("ready", "deferred", "active", "held", "corrupt")},
}


@dataclass(frozen=True)
class Story:
    """What happened.

    Attributes:
        series: told every 15 seconds, in promtool's notation.
        at: when it is looked at. `alerts`: which fire then.
    """

    series: Mapping[str, str]
    at: str
    alerts: tuple[str, ...] = field(default=())


# A busy gateway: 100 mails per second, all of them relayed.
BUSY: Final = {
    transactions("relayed"): "0+1500x4000",
    attempts("relayed"): "0+1500x4000",
    on_gateway("smtp_server_connection_duration_seconds_count"): "0+150x4000",
}
# Attempts at one greylisted mail from the queue: at once, after 30 s, 1, 2, 5 minutes; then the upstream takes it.
GREYLISTED: Final = {
    transactions("queued"): "0 1x4000",
    attempts("deferred"): "0 1x1 2x3 3x7 4x4000",
    attempts("relayed"): "0x34 1x4000",
    messages("deferred"): "0 1x33 0x4000",
    on_gateway(AGE): "0+15x34 0x4000",
}

STORIES: Final[Mapping[str, Story]] = {
    "nothing happens": Story({}, "8h"),
    "all is well": Story(BUSY, "8h"),
    # One mail -----------------------------------------------------------------------------------------------------
    **{f"one greylisted mail, after {minutes} min": Story(GREYLISTED, f"{minutes}m") for minutes in (2, 5, 8, 30)},
    "one greylisted mail that its client brings again and again": Story(
        {transactions("deferred"): "0 1x7 2x7 3x4000", attempts("deferred"): "0 1x7 2x7 3x4000"}, "5m"
    ),
    "one deferred mail in four minutes beside 6,000 a minute": Story(
        {**BUSY, transactions("deferred"): "0 0x15 1x15 2x15 3x4000"}, "40m"
    ),
    "one mail to a server that has been away for two days": Story(
        {messages("deferred"): "1x4000", on_gateway(AGE): "172800+15x4000", attempts("deferred"): "0x239 1x240 2x240"},
        "90m",
    ),
    "a few dead addresses wait among much mail": Story(
        {**BUSY, messages("deferred"): "40x4000", on_gateway(AGE): "86400+15x4000"}, "2h"
    ),
    "ten wrong addresses among mail that is relayed": Story(
        {transactions("refused"): "0+1x10 10x4000", attempts("refused"): "0+1x10 10x4000", **BUSY}, "4m"
    ),
    # Several gateways on one queue --------------------------------------------------------------------------------
    "the database of the queue fails over within seconds": Story({**BUSY, on_gateway(AWAY): "0x40 7 0x4000"}, "12m"),
    "the database of the queue stays away": Story(
        {on_gateway(AWAY): "0x40 0+15x4000"}, "15m", ("SmtpQueueDatabaseAway",)
    ),
    "a gateway died with three deliveries": Story(
        {**BUSY, on_gateway(TAKEN_OVER): "0x40 3x4000"}, "15m", ("SmtpGatewayDied",)
    ),
    "a result came too late": Story({**BUSY, on_gateway(STALE): "0x40 1x4000"}, "15m", ("SmtpMailMayComeTwice",)),
    "a client was told 451 for a stored mail": Story(
        {**BUSY, on_gateway(UNANSWERED): "0x40 1x4000"}, "15m", ("SmtpMailMayComeTwice",)
    ),
    # An upstream fails for all ------------------------------------------------------------------------------------
    "an upstream fails for all: direct": Story(
        {
            transactions("relayed"): "0+15x40 600x4000",  # one mail per second, until the tenth minute
            attempts("relayed"): "0+15x40 600x4000",
            transactions("deferred"): "0x40 0+15x4000",
            attempts("deferred"): "0x40 0+3x4000",  # and then it is in backoff
        },
        "15m",
        ("SmtpMailDeferred", "SmtpUpstreamFails"),
    ),
    "an upstream fails for all: queue": Story(
        {
            transactions("queued"): "0+15x4000",
            attempts("relayed"): "0+15x40 600x4000",
            attempts("deferred"): "0x40 4x4000",  # and then it is in backoff
            messages("ready"): "0x40 0+15x4000",
            on_gateway(AGE): "0x40 0+15x4000",
        },
        "15m",
        ("SmtpQueueStands",),
    ),
    "an upstream that is in backoff: queue": Story(
        {
            transactions("queued"): "0+1x4000",
            attempts("deferred"): "0 1x7 2x7 3x15 4x31 5x4000",
            messages("ready"): "0+1x4000",
            on_gateway(AGE): "0+15x4000",
        },
        "5m",
        ("SmtpQueueStands",),
    ),
    "one of two upstreams fails for all": Story(
        {
            **BUSY,
            attempts("deferred", "second"): "0+3x4000",
            attempts("relayed", "second"): "0x4000",
        },
        "5m",
        ("SmtpUpstreamFails",),
    ),
    "an account is suspended": Story(
        {transactions("refused"): "0+2x4000", attempts("refused"): "0+2x4000"}, "10m", ("SmtpUpstreamRefusesAll",)
    ),
    "it is the same at two gateways: one page": Story(
        {
            attempts("deferred"): "0+1x4000",
            attempts("deferred").replace("gw:", "gw2:"): "0+1x4000",
        },
        "5m",
        ("SmtpUpstreamFails",),
    ),
    # A share ------------------------------------------------------------------------------------------------------
    "a tenth is deferred": Story(
        {
            transactions("relayed"): "0+9x4000",
            attempts("relayed"): "0+9x4000",
            transactions("deferred"): "0+1x4000",
            attempts("deferred"): "0+1x4000",
        },
        "40m",
        ("SmtpMailDeferredInPart",),
    ),
    "a third is refused": Story(
        {
            transactions("relayed"): "0+2x4000",
            attempts("relayed"): "0+2x4000",
            transactions("refused"): "0+1x4000",
            attempts("refused"): "0+1x4000",
        },
        "50m",
        ("SmtpMailRefused",),
    ),
    "much of the queue is old": Story(
        {
            transactions("queued"): "0+1x4000",
            attempts("relayed"): "0+1x4000",
            messages("deferred"): "60x4000",
            on_gateway(AGE): "0+15x4000",
        },
        "50m",
        ("SmtpQueueOld",),
    ),
    "one recipient's mail expires": Story({on_gateway(RECIPIENTS, smtp_recipient_fate="expired"): "0 1x4000"}, "20m"),
    "mail of several recipients expires": Story(
        {on_gateway(RECIPIENTS, smtp_recipient_fate="expired"): "0 8x4000"}, "20m", ("SmtpMailExpires",)
    ),
    # The first one counts -----------------------------------------------------------------------------------------
    "an outcome is unknown": Story({transactions("unknown"): "0x40 1x4000"}, "11m", ("SmtpOutcomeUnknown",)),
    "an outcome is unknown, from the queue": Story(
        {attempts("unknown"): "0x40 1x4000"}, "11m", ("SmtpOutcomeUnknown",)
    ),
    "a queued mail is held": Story({messages("held"): "1x4000"}, "20m", ("SmtpQueueNeedsOperator",)),
    # The gateway itself -------------------------------------------------------------------------------------------
    "the gateway is down": Story({UP: "0x4000"}, "5m", ("SmtpGatewayDown",)),
    "clients connect and nothing was ever relayed": Story(
        {on_gateway("smtp_server_connection_duration_seconds_count"): "0+1x4000"},
        "8h",
        ("SmtpNoMailThoughClientsConnect",),
    ),
    "clients are turned away": Story(
        {
            on_gateway("smtp_server_refused_total", smtp_refused_reason="capacity"): "0+5x4000",
            on_gateway("smtp_server_connection_duration_seconds_count"): "0+10x4000",
        },
        "20m",
        ("SmtpConnectionsRefused",),
    ),
    "some spans are let go": Story({DROPPED: "0 20x4000"}, "40m"),
    "spans are let go": Story({DROPPED: "0+20x4000"}, "40m", ("SmtpTelemetryDropped",)),
    "mail waits for a connection": Story(
        {
            on_gateway(f"smtp_client_pool_wait_seconds_{kind}", smtp_upstream_name="provider", **labels): "0+20x4000"
            for kind, labels in (("count", {}), ("bucket", {"le": "+Inf"}), ("bucket", {"le": "5.0"}))
        },
        "20m",
        ("SmtpUpstreamWait",),
    ),
    "first attempts are late": Story(
        {
            on_gateway(f"{FIRST_ATTEMPT}_count", smtp_upstream_name="provider"): "0+10x4000",
            on_gateway(f"{FIRST_ATTEMPT}_bucket", smtp_upstream_name="provider", le="60.0"): "0+9x4000",
        },
        "30m",
        ("SmtpFirstAttemptLate",),
    ),
    "first attempts are in time": Story(
        {
            on_gateway(f"{FIRST_ATTEMPT}_count", smtp_upstream_name="provider"): "0+10x4000",
            on_gateway(f"{FIRST_ATTEMPT}_bucket", smtp_upstream_name="provider", le="60.0"): "0+10x4000",
        },
        "30m",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", STORIES)
def test_the_alerts_of_a_story_are_these_and_no_other(name: str, tmp_path: Path) -> None:
    story = STORIES[name]
    # promtool compares labels and texts too; the names are what this is about.
    rules: list[dict[str, Any]] = [
        {**rule, "annotations": {}, "labels": {}, "expr": f"group({rule['expr']})"} for rule in RULES
    ]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in {**AT_START, **story.series}.items()],
        "alert_rule_test": [
            {
                "eval_time": story.at,
                "alertname": alert,
                "exp_alerts": [{"exp_labels": {}}] if alert in story.alerts else [],
            }
            for alert in SEVERITY
        ],
    }
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "15s", "tests": [test]})
    )
    done = subprocess.run(
        [tool("promtool"), "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_raised_by_a_story() -> None:
    assert {alert for story in STORIES.values() for alert in story.alerts} == {*SEVERITY}


def test_a_failing_upstream_and_an_unknown_outcome_wake_somebody() -> None:
    pages = {alert for alert, severity in SEVERITY.items() if severity == "page"}
    assert {
        "SmtpGatewayDown",
        "SmtpUpstreamFails",
        "SmtpMailDeferred",
        "SmtpQueueStands",
        "SmtpOutcomeUnknown",
    } <= pages
    assert {*SEVERITY.values()} == {"page", "ticket"}
