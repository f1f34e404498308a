"""What is asked of the backends, dashboards and alerts and examples, against the names that the gateway gives."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from otel_smtp.observing import Outcome
from otel_smtp.telemetry import attributes
from otel_smtp.telemetry.metrics import Metrics
from tests.support.tools import tool

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy"
DASHBOARD: Final = json.loads((DEPLOY / "grafana/dashboards/otel-smtp.json").read_text(encoding="utf-8"))
ALERTS: Final = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text(encoding="utf-8"))


def targets(source: str) -> list[dict[str, Any]]:
    return [
        target for panel in DASHBOARD["panels"] for target in panel["targets"] if target["datasource"]["uid"] == source
    ]


def promql() -> list[str]:
    return [target["expr"] for target in targets("prometheus")] + [
        rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]
    ]


def traceql() -> list[str]:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    examples = re.search(r"## Questions for Tempo\n\n```\n(.*?)```", readme, re.DOTALL)
    assert examples is not None
    return [target["query"] for target in targets("tempo") if "query" in target] + examples[1].splitlines()


def known_series() -> dict[str, set[str]]:
    """Series name -> its labels, as the metrics page has them."""
    labels = {
        name.replace(".", "_"): {label.replace(".", "_") for label in metric.labels}
        for name, metric in attributes.METRICS.items()
    }
    series = {"up": set[str]()}
    for family in Metrics(spool=lambda: ({"deferred": 1}, 0.0, 0)).collect():
        metric = max((name for name in labels if family.name.startswith(name)), key=len)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        series |= {family.name + suffix: labels[metric] for suffix in suffixes}
    return series


SERIES: Final = known_series()
_SELECTOR: Final = re.compile(r"\b(up|smtp_(?:server|client|telemetry|spool)_\w+)(?:\{([^}]*)\})?(?=[\s\[)]|$)")


def unknown_names(query: str) -> list[str]:
    """Series and labels of a PromQL query that the metrics page does not have."""
    grouped = [label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")]
    selected = _SELECTOR.findall(re.sub(r"by \([^)]*\)", "", query))
    found = [name for name, _ in selected if name not in SERIES]
    for name, matchers in selected:
        known = SERIES.get(name, set()) | {"instance", "job"}
        found += [label for label in re.findall(r"(\w+)(?:=~|!~|!=|=)\"", matchers) if label not in known]
    known = {"le", "instance"}.union(*(SERIES.get(name, set()) for name, _ in selected))
    return found + [label for label in grouped if label not in known]


@pytest.mark.parametrize("query", promql())
def test_a_query_asks_for_series_and_labels_that_exist(query: str) -> None:
    assert _SELECTOR.search(re.sub(r"by \([^)]*\)", "", query))
    assert unknown_names(query) == []


@pytest.mark.parametrize(
    ("query", "unknown"),
    [
        ("smtp_server_mails_total", ["smtp_server_mails_total"]),
        ("sum by (colour) (smtp_server_replies_total)", ["colour"]),
        ('smtp_server_replies_total{smtp_outcome="x"}', ["smtp_outcome"]),
        ("sum by (smtp_verb) (rate(smtp_server_replies_total[5m]))", []),
        ("sum by (smtp_verb) (smtp_server_refused_total)", ["smtp_verb"]),
    ],
)
def test_a_wrong_name_is_found(query: str, unknown: list[str]) -> None:
    assert unknown_names(query) == unknown


@pytest.mark.parametrize("query", promql())
def test_promtool_can_read_each_query(query: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    expression = query.replace("$__rate_interval", "1m")
    rules.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [{"record": "r", "expr": expression}]}]}))
    subprocess.run([tool("promtool"), "check", "rules", str(rules)], check=True, capture_output=True)


def test_promtool_accepts_rules_configuration_and_the_metrics_page() -> None:
    for arguments in (["check", "rules", "alerts.yaml"], ["check", "config", "prometheus.yaml"]):
        subprocess.run([tool("promtool"), *arguments], cwd=DEPLOY / "prometheus", check=True, capture_output=True)
    page = Metrics().page("text/plain")[0]
    subprocess.run([tool("promtool"), "check", "metrics"], input=page, check=True, capture_output=True)


def series(name: str, values: str) -> dict[str, str]:
    labels = ",".join(['instance="gw:9925"', *filter(None, [name.partition("{")[2].rstrip("}")])])
    return {"series": f"{name.partition('{')[0]}{{{labels}}}", "values": values}


RAISED: Final = {
    # What happened, minute by minute; when it is looked at; which alerts fire.
    "all is well": (
        [
            series('smtp_server_transactions_total{smtp_outcome="relayed"}', "0+60x480"),
            series("smtp_server_connection_duration_seconds_count", "0+60x480"),
            series('up{job="otel-smtp"}', "1x480"),
        ],
        "7h",
        [],
    ),
    "mail waits in the queue": ([series("smtp_spool_age_seconds", "0+60x60")], "50m", ["SmtpQueueOld"]),
    "mail in the queue is young": ([series("smtp_spool_age_seconds", "5x60")], "50m", []),
    "a queued mail is held": (
        [series('smtp_spool_messages{smtp_spool_state="held"}', "1x60")],
        "20m",
        ["SmtpQueueNeedsOperator"],
    ),
    "the gateway is down": ([series('up{job="otel-smtp"}', "0x10")], "5m", ["SmtpGatewayDown"]),
    "the upstream is away": (
        [series('smtp_server_transactions_total{smtp_outcome="deferred"}', "0+5x30")],
        "20m",
        ["SmtpMailDeferred"],
    ),
    "a third is refused": (
        [
            series('smtp_server_transactions_total{smtp_outcome="relayed"}', "0+20x60"),
            series('smtp_server_transactions_total{smtp_outcome="refused"}', "0+10x60"),
        ],
        "50m",
        ["SmtpMailRefused"],
    ),
    # The series of relayed mail does not even exist where none ever was.
    "clients connect and nothing was ever relayed": (
        [series("smtp_server_connection_duration_seconds_count", "0+1x480")],
        "8h",
        ["SmtpNoMailThoughClientsConnect"],
    ),
    "an outcome is unknown": (
        [series('smtp_server_transactions_total{smtp_outcome="unknown"}', "0x10 1x10")],
        "12m",
        ["SmtpOutcomeUnknown"],
    ),
    "spans are let go": (
        [series('smtp_telemetry_dropped_total{smtp_telemetry_drop_reason="queue_full"}', "0+3x60")],
        "40m",
        ["SmtpTelemetryDropped"],
    ),
}


@pytest.mark.parametrize("name", RAISED)
def test_an_alert_is_raised_when_it_should_be_and_no_other(name: str, tmp_path: Path) -> None:
    happened, looked_at, expected = RAISED[name]
    known = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    # promtool compares the labels and texts too; the names are what this is about.
    texts = [{**rule, "annotations": {}, "labels": {}} for group in ALERTS["groups"] for rule in group["rules"]]
    for rule in texts:
        rule["expr"] = f"group by (instance) ({rule['expr']})"
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": texts}]}))
    checks = [
        {
            "eval_time": looked_at,
            "alertname": alert,
            "exp_alerts": [{"exp_labels": {"instance": "gw:9925"}}] if alert in expected else [],
        }
        for alert in known
    ]
    test = {"interval": "1m", "input_series": happened, "alert_rule_test": checks}
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [test]})
    )
    done = subprocess.run(
        [tool("promtool"), "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


_INTRINSICS: Final = {"name", "duration", "status", "kind", "event:name"}


def unknown_in_traceql(query: str) -> list[str]:
    """Names in a TraceQL query that no span or event of ours bears, where it puts them."""
    bare = re.sub(r'"[^"]*"', '""', query)
    scopes = {
        "span": {on for on in attributes.On if on.value.endswith("span")},
        "event": {on for on in attributes.On if on.value.endswith("event")},
    }
    found = []
    for scope, name in re.findall(r"\b(span|event)\.([a-z_.]+)", bare):
        known = attributes.ATTRIBUTES.get(name)
        if known is None or not scopes[scope] & set(known.on):
            found.append(f"{scope}.{name}")
    names = {*attributes.SPANS, *attributes.EVENTS}
    return found + [name for name in re.findall(r'\bname = "([^"]*)"', query) if name not in names]


@pytest.mark.parametrize("query", traceql())
def test_a_trace_query_names_what_our_spans_bear(query: str) -> None:
    assert query.startswith("{ ")
    assert query.count("{") == query.count("}") == 1
    assert unknown_in_traceql(query) == []


@pytest.mark.parametrize(
    ("query", "unknown"),
    [
        ('{ name = "smtp.mail" }', ["smtp.mail"]),
        ("{ span.smtp.replycode = 550 }", ["span.smtp.replycode"]),
        ("{ span.smtp.state = 1 }", ["span.smtp.state"]),
        ("{ event.smtp.rcpt.domains = 1 }", ["event.smtp.rcpt.domains"]),
    ],
)
def test_a_wrong_name_in_a_trace_query_is_found(query: str, unknown: list[str]) -> None:
    assert unknown_in_traceql(query) == unknown


def test_the_dashboard_is_whole() -> None:
    provided = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/datasources.yaml").read_text(encoding="utf-8")
    )
    sources = {source["uid"]: source["type"] for source in provided["datasources"]}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert sources[panel["datasource"]["uid"]] == panel["datasource"]["type"], panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "no panel lies on another"


def test_latency_panels_show_exemplars_and_these_lead_to_traces() -> None:
    provided = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/datasources.yaml").read_text(encoding="utf-8")
    )
    (prometheus,) = [source for source in provided["datasources"] if source["uid"] == "prometheus"]
    destinations = {
        each["name"]: each["datasourceUid"] for each in prometheus["jsonData"]["exemplarTraceIdDestinations"]
    }
    assert destinations["trace_id"] == "tempo", "the label that our own exemplars bear"
    assert any(target.get("exemplar") for target in targets("prometheus") if "delivery_duration" in target["expr"])


def test_the_collector_takes_three_signals_and_decides_on_the_transaction() -> None:
    collector = yaml.safe_load((DEPLOY / "collector/collector.yaml").read_text(encoding="utf-8"))
    pipelines = collector["service"]["pipelines"]
    assert pipelines.keys() == {"traces", "metrics", "logs"}
    for part in ("receivers", "processors", "exporters"):
        assert {name for pipeline in pipelines.values() for name in pipeline[part]} == {*collector[part]}
    policies = {policy["name"]: policy for policy in collector["processors"]["tail_sampling"]["policies"]}
    refused = policies["a-refused-recipient"]["numeric_attribute"]
    assert (refused["key"], refused["min_value"]) == (attributes.RECIPIENTS_REFUSED, 1)
    outcome = policies["no-good-outcome"]["string_attribute"]
    assert outcome["key"] == attributes.OUTCOME
    assert {*outcome["values"]} - {"partly_relayed"} == {*map(str, Outcome)} - {"relayed", "queued", "partly_relayed"}
    for name in (attributes.RECIPIENTS_REFUSED, attributes.OUTCOME):
        assert attributes.On.TRANSACTION in attributes.ATTRIBUTES[name].on
