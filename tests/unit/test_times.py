"""The time left of a run: from the last run of the same parameters, else the usual, corrected by this run's speed."""

from pathlib import Path

import pytest

from vismem import times
from vismem.config import Config, parse_config
from vismem.steps import STEPS
from vismem.times import Times, usual_seconds


class Clock:
    """A clock that stands still between its moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(times, "time", made)
    return made


def run(kept: Times, clock: Clock, **seconds: float) -> None:
    for name, took in seconds.items():
        kept.begin(name)
        clock.now += took
        kept.end()


def test_the_default_s_time_is_known_before_it_was_ever_run_and_another_base_s_is_not(tmp_path: Path) -> None:
    assert usual_seconds(Config()).keys() == {step.name for step in STEPS}
    assert Times(tmp_path / "s.json", Config()).left(["prepare"]) == usual_seconds(Config())["prepare"]
    for other in (
        {"base": {"model": "org/name"}},
        {"prepare": {"sources": [{"kind": "nlvr", "path": "x", "split": "test"}]}},
    ):
        assert Times(tmp_path / "s.json", parse_config(other)).left(["prepare"]) is None


def test_more_work_takes_longer() -> None:
    less, more = usual_seconds(Config()), usual_seconds(parse_config({"stage1": {"warm_start": {"steps": 2000}}}))
    assert more["stage1"] > less["stage1"]
    assert {name for name in less if more[name] != less[name]} == {"stage1"}


def test_a_step_takes_as_long_as_the_last_time_while_its_parameters_and_those_before_it_stay(
    tmp_path: Path, clock: Clock
) -> None:
    file, own = tmp_path / "s.json", {"base": {"model": "org/name"}}
    run(Times(file, parse_config(own)), clock, base=40, stage1=400, stage2=100)
    assert Times(file, parse_config(own)).left(["base", "stage1", "stage2"]) == 540
    assert Times(file, parse_config(own | {"seed": 1, "deploy": {"grpc_port": 0}})).left(["stage1", "stage2"]) == 500
    changed = Times(file, parse_config(own | {"stage1": {"steps": 7}}))
    assert changed.left(["base"]) == 40
    assert changed.left(["stage1"]) is None
    assert changed.left(["stage2"]) is None


def test_a_slower_machine_is_seen_by_its_first_steps(tmp_path: Path, clock: Clock) -> None:
    kept, usual = Times(tmp_path / "s.json", Config()), usual_seconds(Config())
    run(kept, clock, prepare=3 * usual["prepare"])
    assert kept.left(["stage1"]) == pytest.approx(3 * usual["stage1"])


def test_a_step_that_did_not_end_and_a_damaged_file_teach_nothing(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "s.json"
    Times(file, Config()).begin("prepare")
    assert not file.exists()
    for damaged in ("{", "[]", '{"prepare": 1}'):
        file.write_text(damaged)
        assert Times(file, Config()).left(["prepare"]) == usual_seconds(Config())["prepare"]
