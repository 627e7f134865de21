"""User names and passwords in the address of a registry are shown nowhere."""

import json
from pathlib import Path

import pytest
from project import Project

from vismem.cli import main
from vismem.errors import UserError, mask_credentials
from vismem.messages import Caller
from vismem.preflight import check_registry, preflight
from vismem.provenance import lineage
from vismem.registry.tracking import open_store


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://alice:s3cret@host:5432/mlflow", "postgresql://***@host:5432/mlflow"),
        ("mysql+pymysql://alice:sl/ash@host/db is dead", "mysql+pymysql://***@host/db is dead"),
        ("'https://alice:s3cret@at@host/path'", "'https://***@host/path'"),
        ("https://s3cret@host, http://alice:s3cret@b", "https://***@host, http://***@b"),
        ("postgresql://host/db?user=alice&password=s3cret", "postgresql://host/db?user=***&password=***"),
        ("postgresql://alice:s3'cret@host/db", "postgresql://***@host/db"),
        (
            "https://b/f?X-Amz-Signature=s3cret&api_key=s3cret&private_token=s3cret&sslpassword=s3cret&n=1",
            "https://b/f?X-Amz-Signature=***&api_key=***&private_token=***&sslpassword=***&n=1",
        ),
        (
            "https://b/f?sv=1&sig=s3cret&pwd=s3cret&auth=s3cret&AWSAccessKeyId=s3cret&signed=1",
            "https://b/f?sv=1&sig=***&pwd=***&auth=***&AWSAccessKeyId=***&signed=1",
        ),
        ('{"uri":"http://alice:s3cret@h","mail":"a@b.c"}', '{"uri":"http://***@h","mail":"a@b.c"}'),
        ("http://host/path, mail a@b.c", "http://host/path, mail a@b.c"),
        ("http://host:80/a and http://host:80/b", "http://host:80/a and http://host:80/b"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_credentials_are_masked_and_nothing_else(text: str, shown: str) -> None:
    assert mask_credentials(text) == shown
    assert str(UserError(f"wrong: {text}")) == f"wrong: {shown}"


def test_what_a_server_refuses_is_printed_without_credentials() -> None:
    error = OSError("403 Client Error: Forbidden for url: http://alice:s3cret@host/api")
    assert Caller.of(None).explain(error) == "403 Client Error: Forbidden for url: http://***@host/api"


def test_a_store_s_address_is_masked_in_errors_checks_listings_runs_and_lineage(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://alice:s3cret@127.0.0.1:9"
    dead = project.config.registry.model_copy(update={"tracking_uri": address})
    said = [check_registry(dead).seen]
    with pytest.raises(UserError) as error:
        open_store(dead)
    said.append(str(error.value))
    with pytest.raises(UserError):
        preflight(project.config.model_copy(update={"registry": dead}), tmp_path, tmp_path / "report.md")
    said.append((tmp_path / "report.md").read_text())
    assert all("http://***@127.0.0.1:9" in text for text in said)

    base = project.config.base.model_copy(update={"model": address})
    project.config = project.config.model_copy(update={"base": base})
    project.build(b"one")
    made = project.run("register")
    run = project.store.client.get_run(made["run_id"])
    logged = project.store.client.get_logged_model(made["model_id"])
    assert run.data.params["base.model"] == logged.params["base"] == "http://***@127.0.0.1:9"
    said += [json.dumps(lineage(project.config)), str(run.data)]

    monkeypatch.setattr("vismem.registry.listing.models", lambda config, data: [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (tmp_path / "params.yaml").write_text("{}")
    assert main(["models", "--params", str(tmp_path / "params.yaml")]) == 0
    assert main(["ui", "--params", str(tmp_path / "params.yaml")]) == 0  # behind a server: its address is printed
    printed = capsys.readouterr()
    assert "the model's page: http://***@127.0.0.1:9/#/models/vismem" in printed.out
    said += [printed.out, printed.err]
    assert not [text for text in said if "alice" in text or "s3cret" in text]
