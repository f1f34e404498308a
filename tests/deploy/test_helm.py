"""The Helm chart: linted and rendered by helm where it is at hand; its values by their schema everywhere."""

import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml

from otel_smtp.config import load

CHART: Final = Path(__file__).parent.parent.parent / "deploy/helm/otel-smtp"
VALUES: Final = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: Final = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def helm() -> str:
    # Debian has no package of it, so even CI may have to do without.
    path = shutil.which("helm")
    if path is None:
        pytest.skip("helm is not installed: the chart is neither linted nor rendered")
    return path


def render(*options: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [helm(), "template", "gw", str(CHART), "--kube-version", "1.34.0", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_the_values_are_by_their_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)
    assert VALUES.keys() <= SCHEMA["properties"].keys()


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 2},
        {"replicas": "two"},
        {"settings": ""},
        {"queue": {"enable": True}},
        {"sharedQueue": {"secret": ""}},
    ],
)
def test_a_wrong_value_is_refused_by_the_schema(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**VALUES, **wrong}, SCHEMA)


def test_the_charts_settings_are_settings() -> None:
    document = tomllib.loads(VALUES["settings"])
    for upstream in document["upstream"]:
        assert upstream.pop("password_file").startswith("/etc/otel-smtp/secret/")
        upstream["password"] = "secret"
    settings = load(values=document)
    assert settings.listener[0].is_exposed


def test_the_chart_is_of_the_packages_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((CHART.parent.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == project["version"]


def test_helm_finds_no_fault() -> None:
    done = subprocess.run([helm(), "lint", "--strict", str(CHART)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ((), {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}),
        (("--set", "replicas=1,networkPolicy.enabled=false"), {"ConfigMap", "Deployment", "Service"}),
        (
            ("--set", "queue.enabled=true,queue.storageClassName=fast,existingSecret="),
            {"ConfigMap", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"},
        ),
        (
            ("--set", "sharedQueue.enabled=true"),
            {"ConfigMap", "Deployment", "Job", "Service", "PodDisruptionBudget", "NetworkPolicy"},
        ),
        (
            ("--set", "sharedQueue.enabled=true,sharedQueue.ownerUrlKey="),
            {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"},
        ),
    ],
)
def test_what_helm_makes_is_valid_by_kubernetes_own_schema(options: tuple[str, ...], kinds: set[str]) -> None:
    documents = render(*options)
    assert {document["kind"] for document in documents} == kinds
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_a_rendered_gateway_is_locked_down_and_says_who_it_is() -> None:
    documents = render("--set", "telemetry.endpoint=http://collector:4318")
    (workload,) = (document for document in documents if document["kind"] == "Deployment")
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    security = container["securityContext"]
    assert (security["runAsNonRoot"], security["readOnlyRootFilesystem"]) == (True, True)
    assert security["capabilities"] == {"drop": ["ALL"]}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
    assert "k8s.pod.name=$(POD_NAME)" in environment["OTEL_RESOURCE_ATTRIBUTES"]
    (config,) = (document for document in documents if document["kind"] == "ConfigMap")
    assert tomllib.loads(config["data"]["gateway.toml"]) == tomllib.loads(VALUES["settings"])


def test_a_shared_queue_reaches_gateways_and_migration_as_different_users() -> None:
    documents = render("--set", "sharedQueue.enabled=true")
    keys = {}
    for document in documents:
        if document["kind"] in ("Deployment", "Job"):
            pod = document["spec"]["template"]["spec"]
            [queue] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "queue"]
            keys[document["kind"]] = queue["items"][0]["key"]
            environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
            assert environment["OTELSMTP_SPOOL__URL_FILE"] == "/etc/otel-smtp/queue/url"
    assert keys == {"Deployment": "url", "Job": "owner-url"}


def test_a_queue_for_each_and_one_for_all_exclude_each_other() -> None:
    both = "queue.enabled=true,sharedQueue.enabled=true"
    template = [helm(), "template", "gw", str(CHART), "--kube-version", "1.34.0", "--set", both]
    done = subprocess.run(template, capture_output=True, text=True)
    assert done.returncode != 0
    assert "choose one" in done.stderr


def test_other_settings_make_other_pods(tmp_path: Path) -> None:
    def annotations(*options: str) -> dict[str, str]:
        (workload,) = (document for document in render(*options) if document["kind"] == "Deployment")
        found: dict[str, str] = workload["spec"]["template"]["metadata"]["annotations"]
        return found

    (tmp_path / "other.toml").write_text(VALUES["settings"] + "\n[limits]\nrecipients = 5\n")
    assert annotations() != annotations("--set-file", f"settings={tmp_path / 'other.toml'}")
