"""Each file of deploy/ against the program, and against the validator of its kind where there is one."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from otel_smtp.config import load
from otel_smtp.observer import Observer
from otel_smtp.telemetry import attributes
from otel_smtp.telemetry.metrics import Metrics
from tests.support.tools import tool

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose.*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def settings_of(text: str) -> None:
    """Load settings as the program would; secrets lie elsewhere."""
    document = tomllib.loads(text)
    for upstream in document["upstream"]:
        assert upstream.pop("password_file").startswith("/etc/otel-smtp/secret/")
        upstream["password"] = "secret"
    load(values=document)


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_file_is_yaml(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_a_compose_project_sets_what_the_program_reads_and_mounts_what_is_there(path: Path) -> None:
    (project,) = documents(path)
    gateway = project["services"]["gateway"]
    settings = load(
        environ={key: value for key, value in gateway["environment"].items() if key.startswith("OTELSMTP_")}
    )
    assert settings.upstream[0].url.endpoint.host in project["services"]
    assert settings.listener[0].is_exposed
    for service in project["services"].values():
        for volume in service.get("volumes", ()):
            assert (DEPLOY / volume.split(":")[0]).exists(), volume
        for name in service.get("depends_on", ()):
            assert name in project["services"]
        assert not service.get("image", "x:1").endswith(":latest")
    collector = gateway["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert re.fullmatch(r"http://([a-z]+):4318", collector)[1] in project["services"]  # type: ignore[index]


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_a_compose_project_is_valid_by_its_schema(path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)],
        check=True,
        capture_output=True,
    )


def test_the_settings_in_kubernetes_manifests_are_settings() -> None:
    (config,) = documents(DEPLOY / "kubernetes/base/config.yaml")
    settings_of(config["data"]["gateway.toml"])
    settings_of((DEPLOY / "kubernetes/standalone/gateway.toml").read_text(encoding="utf-8"))


def containers() -> list[dict[str, Any]]:
    (sidecar,) = documents(DEPLOY / "kubernetes/base/sidecar.yaml")
    deployment = documents(DEPLOY / "kubernetes/standalone/gateway.yaml")[0]
    return [
        *sidecar["spec"]["template"]["spec"]["initContainers"],
        *deployment["spec"]["template"]["spec"]["containers"],
    ]


@pytest.mark.parametrize("container", containers(), ids=["sidecar", "standalone"])
def test_a_container_is_locked_down_and_probed_over_the_status_port(container: dict[str, Any]) -> None:
    security = container["securityContext"]
    assert security["runAsNonRoot"]
    assert security["readOnlyRootFilesystem"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    served = (ROOT / "otel_smtp/status/server.py").read_text(encoding="utf-8")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in served
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    config = container["args"][container["args"].index("--config") + 1]
    assert str(Path(config).parent) in mounted
    assert "/tmp" in mounted


def test_the_sidecar_is_a_native_one() -> None:
    assert containers()[0]["restartPolicy"] == "Always"


def test_kustomize_builds_the_standalone_gateway() -> None:
    built = subprocess.run(
        [kubectl(), "kustomize", str(DEPLOY / "kubernetes/standalone")], capture_output=True, check=True
    )
    kinds = {document["kind"] for document in yaml.safe_load_all(built.stdout)}
    assert kinds == {"ConfigMap", "Deployment", "NetworkPolicy", "Service"}


def test_kustomize_puts_the_sidecar_beside_an_application(tmp_path: Path) -> None:
    application = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop"},
        "spec": {"selector": {}, "template": {"spec": {"containers": [{"name": "shop", "image": "shop:1"}]}}},
    }
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(application))
    base = tmp_path / "base"
    base.mkdir()
    for path in (DEPLOY / "kubernetes/base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["shop.yaml"], "components": ["base"]}))
    built = subprocess.run([kubectl(), "kustomize", str(tmp_path)], capture_output=True, check=True)
    (deployment,) = [each for each in yaml.safe_load_all(built.stdout) if each["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["containers"]] == ["shop"]
    assert [container["name"] for container in pod["initContainers"]] == ["otel-smtp"]


def kubectl() -> str:
    # No Debian package has one that knows components, so even CI may have to do without.
    path = shutil.which("kubectl")
    if path is None:
        pytest.skip("kubectl is not installed")
    return path


def known_series() -> set[str]:
    metrics = Metrics(Observer())
    names = set()
    for family in metrics.collect():
        names |= {family.name, f"{family.name}_total", f"{family.name}_bucket", f"{family.name}_count"}
    return names


def known_labels() -> set[str]:
    labels = {label.replace(".", "_") for metric in attributes.METRICS.values() for label in metric.labels}
    return labels | {"le", "instance", "job"}


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/otel-smtp.json").read_text(encoding="utf-8"))
    (alerts,) = documents(DEPLOY / "prometheus/alerts.yaml")
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]] + [
        rule["expr"] for group in alerts["groups"] for rule in group["rules"]
    ]


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_metrics_and_labels_that_exist(query: str) -> None:
    series = set(
        re.findall(r"\bsmtp_(?:server|client|telemetry|spool)_[a-z_]+", re.sub(r"\([^()]*\) ?\(", "((", query))
    )
    labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")} | set(
        re.findall(r"([a-z_]+)=\"", query)
    )
    assert series - labels <= known_series()
    assert labels <= known_labels()


def test_the_dashboard_has_panels_of_its_own_and_known_data_sources() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/otel-smtp.json").read_text(encoding="utf-8"))
    (provided,) = documents(DEPLOY / "grafana/provisioning/datasources/datasources.yaml")
    uids = {source["uid"] for source in provided["datasources"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(panel["datasource"]["uid"] in uids for panel in dashboard["panels"])


def test_promtool_accepts_rules_and_configuration(tmp_path: Path) -> None:
    for arguments in (["check", "rules", "alerts.yaml"], ["check", "config", "prometheus.yaml"]):
        subprocess.run([tool("promtool"), *arguments], cwd=DEPLOY / "prometheus", check=True, capture_output=True)
    page = Metrics(Observer()).page("text/plain")[0]
    subprocess.run([tool("promtool"), "check", "metrics"], input=page, check=True, capture_output=True)


@pytest.mark.parametrize("query", queries())
def test_promtool_can_read_each_query(query: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    expression = query.replace("$__rate_interval", "1m")
    rules.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [{"record": "r", "expr": expression}]}]}))
    subprocess.run([tool("promtool"), "check", "rules", str(rules)], check=True, capture_output=True)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd/otel-smtp.service").read_text(encoding="utf-8")
    assert re.search(r"^ExecStart=\S+/otel-smtp serve --config ", unit, re.MULTILINE)
    # The program is not installed where this runs; any that is will do.
    (tmp_path / "otel-smtp.service").write_text(unit.replace("/opt/otel-smtp/bin/otel-smtp", "/bin/true"))
    told = subprocess.run(
        [tool("systemd-analyze"), "verify", str(tmp_path / "otel-smtp.service")], capture_output=True, text=True
    )
    assert "otel-smtp.service" not in told.stderr, told.stderr


def test_the_collector_keeps_every_trace_with_an_error_event() -> None:
    (collector,) = documents(DEPLOY / "collector/collector.yaml")
    declared = {kind: set(collector[kind]) for kind in ("receivers", "processors", "exporters")}
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in declared.items():
            assert set(pipeline[kind]) <= names
    text = json.dumps(collector)
    assert any(f'\\"{event}\\"' in text for event in attributes.EVENTS if event == "smtp.state.error")


def test_the_image_runs_commands_that_exist() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["otel-smtp"]' in dockerfile
    assert 'CMD ["serve"]' in dockerfile
    assert "USER 10001" in dockerfile


def test_the_readme_tells_of_every_file() -> None:
    told = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for path in DEPLOY.rglob("*"):
        relative = path.relative_to(DEPLOY)
        if path.is_file() and path.name != "README.md":
            assert any(str(part) in told for part in (relative, *relative.parents) if str(part) != "."), relative
