"""What deploy/ has for several gateways on one queue: the roles in a real database, compose and Kubernetes."""

import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import asyncpg
import kubernetes_validate
import pytest
import yaml

from otel_smtp.commands.queue import ask_queue
from otel_smtp.config import SpoolTable, load
from otel_smtp.config.values import Secret
from otel_smtp.smtp import replies
from otel_smtp.spool.messages import End, SpoolError, Verdict
from otel_smtp.spool.postgresql import QueueLocation, migrate_place
from tests.spool.messages import leased, queued
from tests.spool.postgresql.schemas import store
from tests.support.postgresql import connected, server

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy"
GATEWAYS: Final = DEPLOY / "kubernetes/gateways"
DATABASE: Final = "with_roles"


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, QueueLocation]]:
    """A database with the roles of deploy/postgresql; where it is, by the role."""
    running = server()
    for name in ("owner", "gateway"):
        (tmp_path / name).write_text(f"secret of '{name}'\n")
    running.do(f"CREATE DATABASE {DATABASE}")
    try:
        running.run_file(DEPLOY / "postgresql/roles.sql", DATABASE, QUEUE_PASSWORDS=str(tmp_path))
        running.do("CREATE ROLE otel_smtp_reader LOGIN", f"GRANT CONNECT ON DATABASE {DATABASE} TO otel_smtp_reader")
        roles = ("otel_smtp_owner", "otel_smtp_gateway", "otel_smtp_reader")
        yield {role: QueueLocation(running.url(DATABASE, user=role)) for role in roles}
    finally:
        running.do(f"DROP DATABASE {DATABASE} WITH (FORCE)")
        running.do("DROP ROLE otel_smtp_owner, otel_smtp_gateway, otel_smtp_reader")


async def ask(place: QueueLocation, **request: Any) -> list[Any]:
    return [answer async for answer in ask_queue(None, SpoolTable(url=Secret(place.url)), request)]


async def test_each_role_can_do_its_work_and_no_more(places: dict[str, QueueLocation]) -> None:
    owner, gateway, reader = places.values()
    with pytest.raises(SpoolError):
        await migrate_place(gateway, dry_run=False)
    await migrate_place(owner, dry_run=False)
    server().run_file(DEPLOY / "postgresql/reader.sql", DATABASE, user="otel_smtp_owner")

    serving = store(gateway)
    await serving.open()
    try:
        one = await queued(serving)
        large = await queued(serving, None, b"Subject: x\r\n\r\n", b"x" * 200_000)
        async with connected(gateway.url) as connection:
            for statement in (
                "CREATE TABLE otel_smtp.more (x int)", "DROP TABLE otel_smtp.msg", "CREATE SCHEMA more",
                "UPDATE otel_smtp.meta SET version = 9", "DELETE FROM otel_smtp.meta", "TRUNCATE otel_smtp.meta",
                "INSERT INTO otel_smtp.meta SELECT * FROM otel_smtp.meta",
            ):  # fmt: skip
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)

        listed = await ask(reader, command="list")
        assert [row["queue_id"] for row in listed] == [one, large]
        assert (await ask(reader, command="counts"))[0]["ready"] == 2
        assert (await ask(reader, command="show", ids=[one]))[0]["queue_id"] == one
        for request in ({"command": "export", "ids": [one]}, {"command": "export", "ids": [large]}):
            with pytest.raises(SpoolError, match="permission denied"):
                await ask(reader, **request)
        [_, held] = await ask(reader, command="hold", ids=[one], operator="nobody")
        assert "permission denied" in held["error"]
        async with connected(reader.url) as connection:
            for statement in ("SELECT content FROM otel_smtp.msg", "SELECT data FROM otel_smtp.chunk"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)

        for lease in await leased(serving):
            await serving.finish(lease, (Verdict(0, End.DELIVERED, replies.OK),))
        assert await ask(gateway, command="list") == []
    finally:
        await serving.close()


async def test_who_may_write_what_version_the_schema_has_loses_that_when_it_is_migrated(
    places: dict[str, QueueLocation],
) -> None:
    owner, gateway, _ = places.values()
    await migrate_place(owner, dry_run=False)
    async with connected(owner.url) as connection:
        await connection.execute("GRANT UPDATE ON otel_smtp.meta TO otel_smtp_gateway, PUBLIC")
    statements = [
        f'REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON "otel_smtp".meta FROM {who}'
        for who in ("PUBLIC", "otel_smtp_gateway")
    ]
    assert await migrate_place(owner, dry_run=True) == statements
    assert await migrate_place(owner, dry_run=False) == statements
    assert await migrate_place(owner, dry_run=False) == []
    async with connected(gateway.url) as connection:
        assert await connection.fetchval("SELECT count(*) FROM otel_smtp.meta") == 1
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE otel_smtp.meta SET version = 9")


async def test_a_later_versions_tables_are_the_gateways_too(places: dict[str, QueueLocation]) -> None:
    async with connected(places["otel_smtp_owner"].url) as connection:
        await connection.execute("CREATE TABLE otel_smtp.later (x int)")
    async with connected(places["otel_smtp_gateway"].url) as connection:
        await connection.execute("INSERT INTO otel_smtp.later VALUES (1)")
        assert await connection.fetchval("SHOW synchronous_commit") == "on"


def documents(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((GATEWAYS / name).read_text(encoding="utf-8")) if each]


def pod(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["template"]["spec"]
    return found


def test_the_settings_in_the_manifests_are_settings(tmp_path: Path) -> None:
    document = tomllib.loads((GATEWAYS / "gateway.toml").read_text(encoding="utf-8"))
    url_file = Path(document["spool"].pop("url_file"))
    [queue] = documents("queue.yaml")
    [mount] = pod(queue)["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == str(url_file.parent)
    [volume] = pod(queue)["volumes"]
    assert volume["secret"]["items"] == [{"key": "url", "path": url_file.name}]
    document["spool"]["url"] = "postgresql://otel_smtp_gateway@db.example.com/mail"
    document["upstream"][0].pop("password_file")
    document["upstream"][0]["password"] = "secret"
    assert load(values=document).delivery.mode == "queue"


@pytest.mark.parametrize(("name", "place"), [("migrate.yaml", 0), ("database.yaml", 0)])
def test_a_container_is_locked_down(name: str, place: int) -> None:
    [container] = pod(documents(name)[place])["containers"]
    security = container["securityContext"]
    assert (security["runAsNonRoot"], security["readOnlyRootFilesystem"]) == (True, True)
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_migration_and_gateways_are_different_users_of_the_database() -> None:
    keys = {
        name: [
            volume["secret"]["items"][0]["key"] for volume in pod(documents(name)[0])["volumes"] if "secret" in volume
        ]
        for name in ("migrate.yaml", "queue.yaml")
    }
    assert keys == {"migrate.yaml": ["owner-url"], "queue.yaml": ["url"]}
    guide = (DEPLOY / "guides/gateways.md").read_text(encoding="utf-8")
    for key in ("superuser", "owner", "gateway", "owner-url", "url"):
        assert f"--from-file={key}" in guide


def test_kustomize_builds_two_gateways_and_their_database() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    built = subprocess.run([kubectl, "kustomize", str(GATEWAYS)], capture_output=True, check=True)
    made = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built.stdout)}
    for document in made.values():
        kubernetes_validate.validate(document, "1.34", strict=True)
    deployment = made["Deployment", "otel-smtp"]
    assert deployment["spec"]["replicas"] == 2
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    [near] = pod(deployment)["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= labels.items()
    budget = made["PodDisruptionBudget", "otel-smtp"]["spec"]
    assert (budget["minAvailable"], budget["selector"]["matchLabels"]) == (1, labels)
    [container] = pod(deployment)["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert {mount["name"] for mount in container["volumeMounts"]} == {"config", "secret", "tmp", "queue"}
    assert {volume["name"] for volume in pod(deployment)["volumes"]} == {"config", "secret", "tmp", "queue"}
    [config] = [each for (kind, name), each in made.items() if kind == "ConfigMap" and "gateway.toml" in each["data"]]
    assert 'mode = "queue"' in config["data"]["gateway.toml"]
    database = made["StatefulSet", "otel-smtp-database"]
    roles = {volume["name"]: volume for volume in pod(database)["volumes"]}["roles"]["configMap"]["name"]
    assert "otel_smtp_gateway" in made["ConfigMap", roles]["data"]["roles.sql"]
    policy = made["NetworkPolicy", "otel-smtp-database"]["spec"]["ingress"][0]["from"][0]["podSelector"]
    reached_by = policy["matchExpressions"][0]["values"]
    job = made["Job", "otel-smtp-migrate"]
    assert {labels["app"], job["spec"]["template"]["metadata"]["labels"]["app"]} == set(reached_by)


def test_the_compose_project_has_two_gateways_with_names_of_their_own() -> None:
    [project] = yaml.safe_load_all((DEPLOY / "compose.gateways.yaml").read_text(encoding="utf-8"))
    services = project["services"]
    first, second = services["gateway"], services["gateway-2"]
    assert first["environment"]["OTEL_RESOURCE_ATTRIBUTES"] != second["environment"]["OTEL_RESOURCE_ATTRIBUTES"]
    assert not set(first["ports"]) & set(second["ports"])
    assert first["configs"] == second["configs"]
    urls = {name: config["content"] for name, config in project["configs"].items() if name.endswith("-url")}
    for role, service in (("owner", services["migrate"]), ("gateway", first)):
        target = service["environment"]["OTELSMTP_SPOOL__URL_FILE"]
        assert service["configs"] == [{"source": f"{role}-url", "target": target}]
        password = project["configs"][f"{role}-password"]["content"]
        assert f"//otel_smtp_{role}:{password}@database/" in urls[f"{role}-url"]
    assert {config["target"].rpartition("/")[2] for config in services["database"]["configs"]} == {"owner", "gateway"}
