"""Damaged model repositories: `vismem serve` refuses to start on one, and the model itself refuses to load."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import make_repository

from vismem.errors import UserError
from vismem.serving import server as server_module
from vismem.serving.server import triton_server


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-3])


def add(file: Path) -> None:
    file.write_text("raise SystemExit")


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "settings": ("7/bundle/word.txt", cut, "has changed"),
    "bundle_manifest": ("7/bundle/manifest.json", cut, "has changed"),
    "code": ("7/vismem/runtime/prompt.py", cut, "has changed"),
    "model": ("7/model.py", cut, "has changed"),
    "missing": ("7/vismem/runtime/limits.py", Path.unlink, "is missing"),
    "unknown": ("7/numpy.py", add, "is not in manifest.json"),
    "linked": ("7/numpy", lambda path: path.symlink_to("/etc/hostname"), "is not in manifest.json"),
}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A repository with one model for each kind of damage."""
    repository = make_repository(tmp_path)
    for name, (file, damage, _) in DAMAGE.items():
        model = shutil.copytree(repository / "vismem", repository / name)
        config = model / "config.pbtxt"
        config.write_text(config.read_text().replace('name: "vismem"', f'name: "{name}"'))
        damage(model / file)
    return repository


def test_a_server_does_not_start_on_a_damaged_repository_and_names_each_file(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is damaged: ") as fault, triton_server(damaged, log=tmp_path / "log"):
        pass
    for name, (file, _, problem) in DAMAGE.items():
        assert f"{name}: {file} {problem.replace('manifest.json', 'the manifest')}" in str(fault.value)
    assert "vismem: " not in str(fault.value)
    assert not (tmp_path / "log").exists()


def test_a_damaged_model_is_not_loaded_by_any_triton(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `vismem serve` in front of it."""
    monkeypatch.setattr(server_module, "check_repository", lambda repository: None)
    with (
        pytest.raises(UserError, match="tritonserver exited with status 1"),
        triton_server(damaged, log=tmp_path / "log"),
    ):
        pass
    log = (tmp_path / "log").read_text()
    assert "successfully loaded 'vismem'" in log
    for name, (file, _, problem) in DAMAGE.items():
        assert f"failed to load '{name}'" in log, name
        if name != "model":  # model.py verifies all but itself; this one is cut and no longer Python
            assert f"{name}/{file} {problem}" in log, name
