"""Each file of deploy/ against the program, and against the validator of its kind where there is one."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from otel_smtp.config import Settings, TimeoutsTable, load
from otel_smtp.gateway.gateway import TELEMETRY_FLUSH_SECONDS
from otel_smtp.telemetry import attributes
from tests.support.tools import tool

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose.*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def settings_of(text: str) -> Settings:
    """Load settings as the program would; secrets lie elsewhere."""
    document = tomllib.loads(text)
    for upstream in document["upstream"]:
        assert upstream.pop("password_file").startswith(
            ("/etc/otel-smtp/secret/", "/run/credentials/otel-smtp.service/")
        )
        upstream["password"] = "secret"
    return load(values=document)


@pytest.mark.parametrize(
    "path", sorted(set(DEPLOY.rglob("*.yaml")) - set(DEPLOY.rglob("templates/*"))), ids=lambda path: path.name
)
def test_every_yaml_file_is_yaml(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_a_compose_project_sets_what_the_program_reads_and_mounts_what_is_there(path: Path, tmp_path: Path) -> None:
    (project,) = documents(path)
    gateway = project["services"]["gateway"]
    environ = {key: value for key, value in gateway["environment"].items() if key.startswith("OTELSMTP_")}
    for config in gateway.get("configs", ()):
        there = tmp_path / config["source"]
        there.write_text(project["configs"][config["source"]]["content"])
        environ = {key: value.replace(config["target"], str(there)) for key, value in environ.items()}
    settings = load(environ=environ)
    assert settings.upstream[0].url.endpoint.host in project["services"]
    assert settings.listener[0].is_exposed
    (network,) = project["networks"]["default"]["ipam"]["config"]
    assert [str(allowed) for allowed in settings.listener[0].allow] == [network["subnet"]]
    for service in project["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in project.get("volumes", {}) or (DEPLOY / source).exists(), volume
        for name in service.get("depends_on", ()):
            assert name in project["services"]
        assert not service.get("image", "x:1").endswith(":latest")
    collector = gateway["environment"]["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
    assert re.fullmatch(r"http://([a-z]+):4318/v1/traces", collector)[1] in project["services"]  # type: ignore[index]


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


def test_the_units_settings_are_settings_and_its_password_is_the_credential() -> None:
    text = (DEPLOY / "systemd/gateway.toml").read_text(encoding="utf-8")
    settings_of(text)
    name = Path(tomllib.loads(text)["upstream"][0]["password_file"]).name
    unit = (DEPLOY / "systemd/otel-smtp.service").read_text(encoding="utf-8")
    assert f"LoadCredential={name}:" in unit


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
    probes = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    # A sidecar's readiness is its pod's: an upstream that is away would take the application out of its Service.
    readiness = set() if container.get("restartPolicy") == "Always" else {"readinessProbe"}
    assert set(probes) == {"startupProbe", "livenessProbe"} | readiness
    assert all(f'"{path}"' in served for path in probes.values())
    assert probes["livenessProbe"] == "/livez", "a gateway without an upstream is not cured by a restart"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    config = container["args"][container["args"].index("--config") + 1]
    assert str(Path(config).parent) in mounted
    assert "/tmp" in mounted


@pytest.mark.parametrize("container", containers(), ids=["sidecar", "standalone"])
def test_a_container_says_which_pod_it_is_by_the_downward_api(container: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in container["env"]}
    names = list(variables)
    pairs = dict(pair.split("=") for pair in variables["OTEL_RESOURCE_ATTRIBUTES"]["value"].split(","))
    fields = {
        "k8s.pod.name": "metadata.name",
        "k8s.pod.uid": "metadata.uid",
        "k8s.namespace.name": "metadata.namespace",
        "k8s.node.name": "spec.nodeName",
    }
    assert {"k8s.container.name": container["name"]}.items() <= pairs.items()
    for attribute, path in fields.items():
        (variable,) = re.fullmatch(r"\$\((\w+)\)", pairs[attribute]).groups()  # type: ignore[union-attr]  # or it fails
        assert variables[variable]["valueFrom"]["fieldRef"]["fieldPath"] == path
        # Kubernetes replaces a reference by a variable that stands before it, and leaves others as they are.
        assert names.index(variable) < names.index("OTEL_RESOURCE_ATTRIBUTES")


def manifests() -> list[Path]:
    return [
        *DEPLOY.glob("kubernetes/standalone/*.yaml"),
        DEPLOY / "kubernetes/base/config.yaml",
        *(DEPLOY / "kubernetes/gateways" / f"{name}.yaml" for name in ("database", "migrate")),
    ]


@pytest.mark.parametrize(
    "path", [path for path in manifests() if path.name != "kustomization.yaml"], ids=lambda path: path.name
)
def test_a_manifest_is_valid_by_kubernetes_own_schema(path: Path) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_the_sidecar_is_a_native_one() -> None:
    assert containers()[0]["restartPolicy"] == "Always"


def test_kustomize_builds_the_standalone_gateway() -> None:
    built = subprocess.run(
        [kubectl(), "kustomize", str(DEPLOY / "kubernetes/standalone")], capture_output=True, check=True
    )
    kinds = {document["kind"] for document in yaml.safe_load_all(built.stdout)}
    assert kinds == {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"}


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


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd/otel-smtp.service").read_text(encoding="utf-8")
    assert re.search(r"^ExecStart=\S+/otel-smtp serve --config ", unit, re.MULTILINE)
    # The program is not installed where this runs; any that is will do.
    (tmp_path / "otel-smtp.service").write_text(unit.replace("/opt/otel-smtp/bin/otel-smtp", "/bin/true"))
    told = subprocess.run(
        [tool("systemd-analyze"), "verify", str(tmp_path / "otel-smtp.service")], capture_output=True, text=True
    )
    assert "otel-smtp.service" not in told.stderr, told.stderr


def test_the_unit_is_as_locked_down_as_it_says(tmp_path: Path) -> None:
    # 1.2 of 10 as it stands; 2 leaves room for what a newer systemd learns to weigh.
    subprocess.run(
        [tool("systemd-analyze"), "security", "--offline=true", "--threshold=20", "otel-smtp.service"],
        cwd=DEPLOY / "systemd", check=True, capture_output=True,
    )  # fmt: skip


def test_the_unit_leaves_the_drain_its_time() -> None:
    unit = (DEPLOY / "systemd/otel-smtp.service").read_text(encoding="utf-8")
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])  # type: ignore[index]  # it stands there
    assert seconds >= TimeoutsTable().shutdown_grace + TELEMETRY_FLUSH_SECONDS


def test_pods_leave_the_drain_its_time() -> None:
    toml = documents(DEPLOY / "kubernetes/base/config.yaml")[0]["data"]["gateway.toml"]
    sidecar = settings_of(toml).timeouts.shutdown_grace
    standalone = settings_of((DEPLOY / "kubernetes/standalone/gateway.toml").read_text()).timeouts.shutdown_grace
    pods = [
        documents(DEPLOY / path)[0]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for path in ("kubernetes/base/sidecar.yaml", "kubernetes/standalone/gateway.yaml")
    ]
    assert pods[0] >= 30 + sidecar + TELEMETRY_FLUSH_SECONDS, "the application's own grace comes first"
    assert pods[1] >= 5 + standalone + TELEMETRY_FLUSH_SECONDS, "after the pause of preStop"


def test_the_collector_keeps_every_trace_with_an_error_event() -> None:
    (collector,) = documents(DEPLOY / "collector/collector.yaml")
    declared = {kind: set(collector[kind]) for kind in ("receivers", "processors", "exporters")}
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in declared.items():
            assert set(pipeline[kind]) <= names
    text = json.dumps(collector)
    assert any(f'\\"{event}\\"' in text for event in attributes.EVENTS if event == "smtp.state.error")


def test_the_readme_tells_of_every_file() -> None:
    told = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for path in DEPLOY.rglob("*"):
        relative = path.relative_to(DEPLOY)
        if path.is_file() and path.name != "README.md":
            assert any(str(part) in told for part in (relative, *relative.parents) if str(part) != "."), relative
