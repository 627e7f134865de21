"""Bundles are signed at registration, and where a public key is named, others are neither promoted nor fetched."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from project import Project

from vismem.errors import UserError
from vismem.registry import fetch, inspect
from vismem.registry.tracking import versions
from vismem.serving.champion import follower
from vismem.serving.publish import publish

PLAIN, PEM = serialization.NoEncryption(), serialization.Encoding.PEM


def write_keys(folder: Path, name: str) -> dict[str, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return {"signing_key": private, "public_key": public}


def use(project: Project, **keys: Path | None) -> None:
    registry = project.config.registry.model_copy(update={"signing_key": None, "public_key": None, **keys})
    project.config = project.config.model_copy(update={"registry": registry})


def test_only_what_the_trusted_key_signed_is_promoted_and_fetched(project: Project, tmp_path: Path) -> None:
    ours, theirs = write_keys(tmp_path, "ours"), write_keys(tmp_path, "theirs")
    use(project, **ours)
    assert project.release(b"one", score=66.0)["promoted"]
    assert "signed it" in inspect.verify(project.config, "champion")
    assert (fetch.fetch_bundle(project.config.registry, "champion", tmp_path / "cache") / "README.md").is_file()

    for keys, score, said in (
        ({}, 68.0, "vismem version 2 has no signature"),
        ({"signing_key": theirs["signing_key"]}, 69.0, "vismem version 3 is not signed by the key"),
    ):
        use(project, public_key=ours["public_key"], **keys)
        made = project.release(str(score).encode(), score)
        assert (made["promoted"], made["reasons"]) == (False, [next(iter(made["reasons"]))])
        assert made["reasons"][0].startswith(said)
        with pytest.raises(UserError, match=said):
            fetch.fetch_bundle(project.config.registry, made["version"], tmp_path / "cache")
    assert project.champion() == "1"

    use(project, **ours)  # the same bundle again, signed: its version is the one that is there
    made = project.release(b"69.0", score=69.0)
    assert (made["promoted"], made["version"]) == (True, "3")


def test_what_was_fetched_before_a_key_was_named_is_held_to_it_too(project: Project, tmp_path: Path) -> None:
    keys, cache, models = write_keys(tmp_path, "ours"), tmp_path / "cache", tmp_path / "models"
    project.release(b"one", score=66.0)
    fetched, published = fetch.fetch_bundle(project.config.registry, "1", cache), publish(project.config, models)
    use(project, **keys)
    with pytest.raises(UserError, match="vismem version 1 has no signature"):
        fetch.fetch_bundle(project.config.registry, "1", cache)
    with pytest.raises(UserError, match="vismem version 1 has no signature"):
        publish(project.config, models)
    deployed = project.artifacts / "deploy" / "model_repository"
    shutil.copytree(published.repository, deployed)
    with pytest.raises(UserError, match="vismem version 1 has no signature"):
        follower(project.config, project.artifacts)()
    project.run("register")
    shutil.rmtree(deployed)
    shutil.copytree(publish(project.config, models).repository, deployed)
    assert follower(project.config, project.artifacts)() == deployed
    assert fetch.fetch_bundle(project.config.registry, "1", cache) == fetched
    assert publish(project.config, models) == published


def test_files_changed_with_all_their_hashes_are_found_by_the_signature_alone(project: Project, tmp_path: Path) -> None:
    from vismem.provenance import sha256_file, write_manifest

    use(project, **write_keys(tmp_path, "ours"))
    made = project.release(b"one", score=66.0)
    kept = project.artifacts.parent / "mlartifacts" / "models" / made["model_id"] / "artifacts" / "bundle"
    (kept / "vismem" / "memory.safetensors").write_bytes(b"onE")
    manifest = write_manifest(kept)
    project.store.client.set_model_version_tag("vismem", "1", "manifest_sha256", sha256_file(manifest))
    with pytest.raises(UserError, match=r"not signed by the key of registry\.public_key \(Signature mismatch"):
        inspect.verify(project.config, "1")
    use(project)
    assert inspect.verify(project.config, "1").endswith("agree")


def test_the_signature_is_one_that_the_package_s_own_command_verifies(project: Project, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, "ours")
    use(project, **keys)
    project.build(b"one")
    project.run("register")
    (version,) = versions(project.store)
    kept = project.artifacts.parent / "mlartifacts" / "models" / version.model_id / "artifacts"
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(kept / "bundle")]
    options = ["--signature", str(kept / "bundle.sig"), "--public_key", str(keys["public_key"])]
    subprocess.run([*command, *options], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["missing", "no key", "rsa"])
def test_a_key_that_cannot_sign_is_said_before_anything_is_written(project: Project, tmp_path: Path, kind: str) -> None:
    key = tmp_path / "key.pem"
    if kind == "no key":
        key.write_text("secret")
    elif kind == "rsa":
        made = rsa.generate_private_key(65537, 2048)
        key.write_bytes(made.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))
    use(project, signing_key=key)
    project.build(b"one")
    with pytest.raises(UserError, match=r"registry\.signing_key .*key\.pem signs nothing .*elliptic private key"):
        project.run("register")
    assert versions(project.store) == []
