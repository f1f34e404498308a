"""What is asked of the backends, dashboards and alerts and examples, against the names that the gateway gives."""

import json
import re
import smtplib
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from otel_smtp.observing import Outcome
from otel_smtp.server.users import users_line
from otel_smtp.telemetry import attributes
from otel_smtp.telemetry.gauges import SharedQueue
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.metrics_page import MetricsPage
from tests.support.capture import CapturingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import gateway
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


SHARING: Final = Metrics(
    spool=lambda: ({"deferred": 1}, 0.0, 0), shared_queue=lambda: SharedQueue(True, 2, 0.0, 0, 0, 0),
    store_verbs=["submit"],
)  # fmt: skip
"""What a gateway tells that shares its queue."""


def known_series() -> dict[str, set[str]]:
    """Series name -> its labels, as the metrics page has them."""
    labels = {
        name.replace(".", "_"): {label.replace(".", "_") for label in metric.labels}
        for name, metric in attributes.METRICS.items()
    }
    series = {"up": set[str]()}
    alone = Metrics(spool=lambda: ({"deferred": 1}, 0.0, 0))
    for family in [*MetricsPage(alone).collect(), *MetricsPage(SHARING).collect()]:
        metric = max((name for name in labels if family.name.startswith(name)), key=len)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        series |= {family.name + suffix: labels[metric] for suffix in suffixes}
    return series


SERIES: Final = known_series()
_SELECTOR: Final = re.compile(r"\b(up|smtp_(?:server|client|telemetry|spool)_\w+)(?:\{([^}]*)\})?(?=[\s\[)]|$)")


def unknown_names(query: str) -> list[str]:
    """Series and labels of a PromQL query that the metrics page does not have."""
    grouped = [label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in group.split(",")]
    selected = _SELECTOR.findall(re.sub(r"(?:by|on) \([^)]*\)", "", query))
    found = [name for name, _ in selected if name not in SERIES]
    for name, matchers in selected:
        known = SERIES.get(name, set()) | {"instance", "job"} | ({"le"} if name.endswith("_bucket") else set())
        found += [label for label in re.findall(r"(\w+)(?:=~|!~|!=|=)\"", matchers) if label not in known]
    known = {"le", "instance"}.union(*(SERIES.get(name, set()) for name, _ in selected))
    return found + [label for label in grouped if label not in known]


@pytest.mark.parametrize("query", promql())
def test_a_query_asks_for_series_and_labels_that_exist(query: str) -> None:
    assert _SELECTOR.search(re.sub(r"(?:by|on) \([^)]*\)", "", query))
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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The metrics page of a running gateway with a queue, after one mail, one refused command and one login."""
    directory = tmp_path_factory.mktemp("gateway")
    status = unclaimed_port()
    settings = {
        "listener.auth": "optional",
        "listener.auth_in_clear": True,
        "listener.auth_users_file": str(directory / "users"),
        "upstream.limits": ["provider-rate"],
        "delivery.mode": "queue",
        "spool.directory": str(directory / "spool"),
        "status.address": f"127.0.0.1:{status}",
    }
    (directory / "users").write_text(users_line("app", "secret") + "\n")
    limit = {"OTELSMTP_LIMIT__0__NAME": "provider-rate", "OTELSMTP_LIMIT__0__RATE": "1000/s"}
    with (
        CapturingUpstream() as upstream,
        gateway({**settings, "upstream.url": upstream.url}, directory, environ=limit) as running,
    ):
        with smtplib.SMTP("127.0.0.1", running.port) as client:
            client.login("app", "secret")
            client.docmd("WHAT")
            client.sendmail("a@client.example", ["b@there.example"], b"Subject: hi\r\n\r\nHello.\r\n")
        with urllib.request.urlopen(f"http://127.0.0.1:{status}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    sharing = SHARING.page("text/plain")[0].decode()
    return [
        sample for one in (text, sharing) for family in text_string_to_metric_families(one) for sample in family.samples
    ]


def missing_series(query: str, page: Sequence[Sample]) -> list[str]:
    """Selectors of a PromQL query, and alternatives within these, that match no series of a metrics page."""
    found = []
    for name, matchers in _SELECTOR.findall(re.sub(r"(?:by|on) \([^)]*\)", "", query)):
        series = [sample.labels for sample in page if sample.name == name]
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
            if label in ("instance", "job"):  # which Prometheus adds
                continue
            alternatives = value.split("|") if operator == "=~" else [re.escape(value)]
            found += [
                f'{name}{{{label}="{wanted}"}}'
                for wanted in alternatives
                if not any(re.fullmatch(wanted, labels.get(label, "")) for labels in series)
            ]
        if not series and name != "up":
            found.append(name)
    return found


@pytest.mark.parametrize("query", promql())
def test_a_query_finds_series_on_the_page_of_a_running_gateway(query: str, page: list[Sample]) -> None:
    assert missing_series(query, page) == []


def test_a_series_that_is_not_there_is_missed(page: list[Sample]) -> None:
    assert missing_series('smtp_server_transactions_total{smtp_outcome=~"relayed|bounced"}', page) == [
        'smtp_server_transactions_total{smtp_outcome="bounced"}'
    ]
    assert missing_series('smtp_server_transactions_total{smtp_outcome="relayed"} > 0', page) == []
    assert missing_series("smtp_spool_age_minutes", page) == ["smtp_spool_age_minutes"]
    assert missing_series('smtp_client_delivery_age_seconds_bucket{le="61.0"}', page) != []


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
