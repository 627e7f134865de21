"""Which deployed models `vismem serve` takes up, without a server: nothing here may be loaded."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in import make_repository

from vismem.errors import UserError
from vismem.serving import supervise
from vismem.serving.supervise import Releases


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    (tmp_path / "serving").mkdir()
    make_repository(tmp_path / "deploy")
    return Releases(tmp_path / "deploy" / "model_repository", tmp_path / "serving")


def deploy(releases: Releases, **options: Any) -> Path:
    """Another repository in the place of the one that is served."""
    folder = releases.source.parent
    shutil.rmtree(folder)
    return make_repository(folder, **options)


def update(releases: Releases) -> list[str]:
    lines = list[str]()
    releases.update(None, lines.append)  # type: ignore[arg-type]
    return lines


def fresh(releases: Releases) -> list[str]:
    return sorted(releases._fresh())


def test_a_served_release_lives_on_when_its_folder_is_deleted(releases: Releases) -> None:
    assert update(releases) == []
    before = {path.name for path in releases.repository.iterdir()}
    shutil.rmtree(releases.source)
    assert update(releases) == []
    word = releases.repository / "vismem" / "7" / "bundle" / "word.txt"
    assert (before, word.read_text()) == ({"vismem", "vismem_unary"}, "é")


def test_a_challenger_takes_no_champions_place(releases: Releases, tmp_path: Path) -> None:
    deploy(releases, name="vismem_challenger", version=8)
    assert update(releases) == fresh(releases) == []
    (tmp_path / "other").mkdir()
    challengers = Releases(releases.source, tmp_path / "other")
    deploy(challengers, name="vismem_challenger", version=9)
    assert fresh(challengers) == ["vismem_challenger"]
    deploy(challengers)
    assert fresh(challengers) == ["vismem"]


def test_releases_come_from_where_the_champion_is(releases: Releases, tmp_path: Path) -> None:
    """`vismem models rollback` changes no deployed folder."""
    other, lines = make_repository(tmp_path / "other", version=8), list[str]()
    releases.follow(lambda: other, lines.append)
    assert (fresh(releases), lines) == (["vismem"], [])

    def lost() -> Path:
        raise UserError("the registry does not answer")

    def full() -> Path:
        raise OSError(28, "No space left on device")

    for champion in (lost, lost, lambda: other, lost, full, full):
        releases.follow(champion, lines.append)
    reasons = ["the registry does not answer"] * 2 + ["[Errno 28] No space left on device"]
    assert lines == [f"the champion is not found: {reason}" for reason in reasons]
    assert releases.source == other


def test_a_unary_model_comes_after_its_model(releases: Releases) -> None:
    releases.served["vismem_unary"] = "that of an earlier library"
    assert fresh(releases) == ["vismem_unary"]
    deploy(releases, word="new")
    assert fresh(releases) == ["vismem"]
    releases.refused[releases._fresh()["vismem"]] = float("inf")
    assert fresh(releases) == []


@pytest.mark.parametrize("verdict", ["successfully loaded 'vismem'", "failed to load 'vismem'"])
def test_what_becomes_of_another_release_is_not_taken_for_the_new_one(releases: Releases, verdict: str) -> None:
    """Triton loads the one before once more where a deployment has removed its folder."""
    deploy(releases, version=8, word="new")
    value, before = releases._fresh()["vismem"], releases.served["vismem"]
    log = releases.source.parent / "log"
    log.touch()
    others = ("successfully loaded 'vismem'", "failed to load 'vismem'")
    each = [f"{releases.copies / before / '7'}\n{other}\n{releases.copies / value / '7'}\n{other}" for other in others]
    lines = iter([*each, f"{releases.copies / value / '8'}\nfailed to load 'vismem_unary'", verdict])

    def check() -> None:
        with log.open("a") as file:
            file.write(next(lines) + "\n")

    service = SimpleNamespace(log=log, check=check)
    written = list[str]()
    releases.update(SimpleNamespace(service=service), written.append)  # type: ignore[arg-type]
    assert next(lines, None) is None
    loaded = verdict.startswith("success")
    assert written == [
        "vismem: the new release answers now"
        if loaded
        else f"vismem: the new release is refused, the one before it serves on: {verdict}"
    ]
    assert releases.served["vismem"] == (value if loaded else before)
    assert (releases.copies / value).exists() == loaded
    assert (releases.repository / "vismem").resolve().name == releases.served["vismem"]


def test_two_models_that_change_together_are_both_loaded(releases: Releases, tmp_path: Path) -> None:
    deploy(releases, version=8, word="new")
    for model in make_repository(tmp_path / "plates", name="plates", version=8).iterdir():
        model.rename(releases.source / model.name)
    found, log = releases._fresh(), releases.source.parent / "log"
    log.touch()

    def check() -> None:
        with log.open("a") as file:
            file.writelines(f"{releases.copies / found[m] / '8'}\nsuccessfully loaded '{m}'\n" for m in found)

    written = list[str]()
    releases.update(SimpleNamespace(service=SimpleNamespace(log=log, check=check)), written.append)  # type: ignore[arg-type]
    assert sorted(found) == ["plates", "vismem"]
    assert written == [f"{model}: the new release answers now" for model in sorted(found)]
    assert {model: releases.served[model] for model in found} == found


def test_a_damaged_release_is_named_once_and_looked_at_again_later(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "RETRY_SECONDS", 1000.0)
    served = dict(releases.served)
    (deploy(releases, version=8) / "vismem" / "8" / "bundle" / "word.txt").write_text("other")
    (line,) = update(releases)
    assert line.startswith("not loaded: ")
    assert "vismem: 8/bundle/word.txt has changed" in line
    assert update(releases) == fresh(releases) == []
    monkeypatch.setattr(supervise.time, "monotonic", lambda now=supervise.time.monotonic: now() + 2000)
    assert fresh(releases) == ["vismem"]
    assert update(releases) == []
    assert releases.served == served


def test_a_release_that_is_replaced_while_it_is_copied_is_not_taken(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(releases, version=8)
    monkeypatch.setattr(supervise, "check_repository", lambda source: deploy(releases, version=9))
    (line,) = update(releases)
    assert "is being replaced" in line
    monkeypatch.setattr(supervise, "check_repository", shutil.rmtree)
    deploy(releases, version=10)
    assert "No such file" in update(releases)[0]
    assert not any((releases.copies / value).exists() for value in releases.refused)


def test_a_damaged_repository_is_not_begun_with(releases: Releases, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (releases.source / "vismem" / "config.pbtxt").write_text("x")
    with pytest.raises(UserError, match=r"config\.pbtxt has changed"):
        Releases(releases.source, tmp_path / "other")
