"""Commands, variables and paths in deploy/ are the program's own."""

import asyncio
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import pytest
import yaml

from otel_smtp.commands.cli import cli
from otel_smtp.gateway.ports import bind
from otel_smtp.observing import Endpoint
from otel_smtp.status.live import LiveView
from otel_smtp.status.server import StatusServer
from otel_smtp.status.traces import RecentTraces
from otel_smtp.telemetry import environment

ROOT: Final = Path(__file__).parent.parent.parent
DEPLOY: Final = ROOT / "deploy"
DOCKERFILE: Final = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def yaml_documents() -> Iterator[tuple[str, Any]]:
    for path in sorted({*DEPLOY.rglob("*.yaml")} - {*DEPLOY.rglob("templates/*")}):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(DEPLOY)), document


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Everything that stands under `key`, however deep."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, key)


def command_lines() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every command of the program that deploy/ holds: where, and its words behind `otel-smtp`."""
    for path, document in yaml_documents():
        for arguments in values_of(document, "args"):
            yield path, tuple(arguments)
    for file in sorted(DEPLOY.rglob("*")):
        if file.is_file() and file.suffix in {".yaml", ".service", ".md"}:
            for line in re.findall(r"otel-smtp ((?:send|serve|check)\b[^\n`]*)", file.read_text(encoding="utf-8")):
                yield str(file.relative_to(DEPLOY)), tuple(shlex.split(line))


def parse(name: str, arguments: list[str]) -> None:
    """Parse a command's options as `otel-smtp` does, and run nothing."""
    with click.Context(cli) as context:
        command = cli.get_command(context, name)
        assert command is not None
        command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize(("path", "words"), list(command_lines()))
def test_a_command_parses(path: str, words: tuple[str, ...]) -> None:
    name, *arguments = words
    parse(name, arguments)


def test_there_are_commands_to_check() -> None:
    told = {path for path, _ in command_lines()}
    assert {"compose.jaeger.yaml", "compose.tempo.yaml", "systemd/otel-smtp.service"} <= told
    assert {"kubernetes/base/sidecar.yaml", "kubernetes/standalone/gateway.yaml"} <= told


def test_a_wrong_option_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse("send", ["--to", "a@example.com", "--host", "gateway"])


def test_the_image_starts_the_program() -> None:
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(entrypoint) == ["otel-smtp"]
    name, *arguments = json.loads(command)
    parse(name, arguments)
    assert "\nUSER 10001" in DOCKERFILE
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source


async def test_the_images_health_check_tells_a_live_gateway_from_none() -> None:
    (line,) = re.findall(r"HEALTHCHECK [^\n]*\\\n\s+CMD (.*)$", DOCKERFILE, re.MULTILINE)
    _, *arguments = json.loads(line)
    server = StatusServer(
        live=LiveView(shown_host=str, shown_name=str), traces=RecentTraces(), checks={},
        metrics=lambda accept: (b"", "text/plain"),
    )  # fmt: skip
    address = server.start(bind(Endpoint("127.0.0.1", 0)))
    here = [word.replace("127.0.0.1:9925", f"127.0.0.1:{address.port}") for word in arguments]
    assert here != arguments
    assert await exit_status(here) == 0
    await server.stop()
    assert await exit_status(here) != 0


async def exit_status(arguments: list[str]) -> int:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, *arguments], capture_output=True, timeout=30, check=False
    )
    return done.returncode


class Asked(dict[str, str]):
    """An environment that remembers which variables were asked for."""

    def __init__(self, variables: dict[str, str]) -> None:
        super().__init__(variables)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def test_every_variable_is_one_that_the_program_or_the_sdk_reads() -> None:
    sdk = {
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_RESOURCE_ATTRIBUTES",
        "OTEL_SERVICE_NAME",
        "OTEL_TRACES_SAMPLER",
    }
    detected = {
        "OTEL_RESOURCE_ATTRIBUTES",
        "OTEL_SERVICE_NAME",
    }  # by the SDK's detectors, in the process's own environment
    asked = Asked({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    environment.read(asked)
    for path in sorted(DEPLOY.rglob("*")):
        # The guides describe applications' variables as well.
        if path.is_file() and path.suffix != ".png" and path.parent.name != "guides":
            for variable in re.findall(r"\bOTEL_[A-Z_]+\b", path.read_text(encoding="utf-8")):
                assert variable in sdk, f"{variable} in {path.name}"
                assert variable in asked.names | detected, f"{variable} is read by nobody"


def test_ports_agree() -> None:
    exposed = set(re.findall(r"\d+", re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[0]))
    assert exposed == {"2525", "9925"}
    for path, document in yaml_documents():
        for containers in values_of(document, "containers"):
            ours = [each for each in containers if each.get("image", "otel-smtp:").startswith("otel-smtp:")]
            named = {port["name"]: str(port["containerPort"]) for each in ours for port in each.get("ports", ())}
            assert set(named.values()) <= exposed, path
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text(encoding="utf-8"))
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["gateway:9925"]


@pytest.mark.parametrize("name", ["jaeger/config.yaml", "collector/collector.yaml"])
def test_a_pipeline_names_what_is_declared_and_hears_more_than_itself(name: str) -> None:
    config = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    for pipeline in config["service"]["pipelines"].values():
        for kind, used in pipeline.items():
            assert set(used) <= set(config[kind]), kind
    assert set(config["service"].get("extensions", ())) == set(config.get("extensions", ()))
    # Both listen on localhost unless told otherwise, which in a container is nobody.
    endpoints = [protocol["endpoint"] for protocol in config["receivers"]["otlp"]["protocols"].values()]
    assert endpoints == ["0.0.0.0:4317", "0.0.0.0:4318"]


def test_jaeger_stores_what_it_queries_and_finds_its_options() -> None:
    config = yaml.safe_load((DEPLOY / "jaeger/config.yaml").read_text(encoding="utf-8"))
    backends = set(config["extensions"]["jaeger_storage"]["backends"])
    assert config["extensions"]["jaeger_query"]["storage"]["traces"] in backends
    assert config["exporters"]["jaeger_storage_exporter"]["trace_storage"] in backends
    assert json.loads((DEPLOY / "jaeger/ui.json").read_text(encoding="utf-8")) == {"useOpenTelemetryTerms": True}
    compose = yaml.safe_load((DEPLOY / "compose.jaeger.yaml").read_text(encoding="utf-8"))
    mounted = {volume.split(":")[1] for volume in compose["services"]["jaeger"]["volumes"]}
    assert mounted == {config["extensions"]["jaeger_query"]["ui"]["config_file"], "/etc/jaeger/config.yaml"}


def test_tempo_writes_where_compose_has_the_rest() -> None:
    tempo = yaml.safe_load((DEPLOY / "tempo/tempo.yaml").read_text(encoding="utf-8"))
    assert not {"ingester", "compactor"} & set(tempo), "gone in Tempo 3"
    endpoints = [each["endpoint"] for each in tempo["distributor"]["receivers"]["otlp"]["protocols"].values()]
    assert endpoints == ["0.0.0.0:4317", "0.0.0.0:4318"]
    compose = yaml.safe_load((DEPLOY / "compose.tempo.yaml").read_text(encoding="utf-8"))["services"]
    (writes,) = tempo["metrics_generator"]["storage"]["remote_write"]
    assert writes["url"] == "http://prometheus:9090/api/v1/write"
    assert "--web.enable-remote-write-receiver" in compose["prometheus"]["command"]
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/datasources.yaml").read_text(encoding="utf-8"))
    for source in sources["datasources"]:
        host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]  # or it fails
        assert host in compose
        assert host != "tempo" or port == str(tempo["server"]["http_listen_port"])
    for where in (tempo["storage"]["trace"]["wal"]["path"], tempo["metrics_generator"]["storage"]["path"]):
        assert where.startswith(compose["tempo"]["tmpfs"][0])
