"""deploy/compose.yaml: valid to the letter, pinned, without a secret, and the same servers as `vismem stack`."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from vismem.registry.server import mlflow_command, mlflow_settings
from vismem.stack import BUCKET, MLFLOW_FILES, seaweedfs_command

ROOT = Path(__file__).parents[2]
SECRETS = {name: f"the-{name}" for name in ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}


def filled_in(text: str, values: dict[str, str]) -> str:
    """The file with `${NAME:?message}` and `${NAME:-default}` replaced as compose does it. KeyError for one unset."""
    named = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: values[found[1]], text)
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: values.get(found[1], found[2]), named)


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "deploy" / "compose.yaml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(filled_in(text, SECRETS))["services"])


def test_it_is_a_valid_compose_file_and_a_misspelt_key_is_not(text: str) -> None:
    merged = yaml.safe_dump(yaml.safe_load(filled_in(text, SECRETS)))
    PyCompose.from_yaml(merged).validate()
    for right, wrong in (("retries:", "retires:"), ("service_healthy", "service_happy")):
        assert right in merged
        with pytest.raises(ValueError, match=wrong.strip(":")):
            PyCompose.from_yaml(merged.replace(right, wrong))


def test_it_holds_no_secret_and_starts_with_none_missing(text: str) -> None:
    for name in SECRETS:
        with pytest.raises(KeyError, match=name):
            filled_in(text, {key: value for key, value in SECRETS.items() if key != name})
    assert "deploy/.env" in (ROOT / ".gitignore").read_text()


def test_every_image_is_pinned_and_mlflow_s_is_this_version_s(services: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert services["mlflow"]["image"] == f"vismem-train:{version}"
    for service in services.values():
        assert re.search(r":[\d.]+(-\w+)?$", service["image"])


def test_every_server_is_watched_restarted_and_open_to_this_machine_only(services: dict[str, Any]) -> None:
    servers = {name: service for name, service in services.items() if name != "bucket"}
    assert set(servers) == {"postgres", "s3", "mlflow"}
    for service in servers.values():
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_its_s3_server_runs_with_the_stack_s_options(services: dict[str, Any]) -> None:
    def options(command: list[str]) -> set[str]:  # less where it listens, and where its data is
        own = re.compile(r"-(dir|ip|ip\.bind|(master|volume|filer|s3)\.port(\.grpc)?)=")
        return {option for option in command if re.match("-.{2,}", option) and not own.match(option)}

    assert options(services["s3"]["command"]) == options(seaweedfs_command("weed", Path("data"), {}))
    assert f"s3.bucket.create -name {BUCKET} " in services["bucket"]["command"][0]
    assert services["mlflow"]["depends_on"]["bucket"]["condition"] == "service_completed_successfully"


def test_mlflow_s_server_has_one_command_and_the_same_settings_here_and_on_a_cluster(services: dict[str, Any]) -> None:
    """Only addresses, the number of workers and the database differ; on a cluster the database is in a secret."""
    manifests = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "base" / "mlflow.yaml").read_text()))
    (settings,) = [item["data"] for item in manifests if item["kind"] == "ConfigMap"]
    (pod,) = [item["spec"]["template"]["spec"] for item in manifests if item["kind"] == "Deployment"]
    wanted = mlflow_settings("", MLFLOW_FILES)
    database = "MLFLOW_BACKEND_STORE_URI"
    for command, given in (
        (services["mlflow"]["command"], services["mlflow"]["environment"]),
        (pod["containers"][0]["command"], {**settings, database: "in a secret"}),
    ):
        assert command[:2] == ["mlflow", "server"]
        assert [option.split("=")[0] for option in command[2:]] == ["--host", "--port", "--workers"]
        assert [option.split("=")[0] for option in mlflow_command(5000)[4:]] == ["--host", "--port", "--workers"]
        assert given.keys() >= wanted.keys()
        assert {name: given[name] for name in wanted if name != database}.items() <= wanted.items()
