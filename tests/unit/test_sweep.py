"""What `vismem sweep` makes of DVC's experiments: which have scores, which parameters differ, which are compared."""

from typing import Any

import pytest

from vismem.errors import UserError
from vismem.evaluation.sweep import SCORES, alike, described, experiments, panels, render, varied

Values = dict[str, Any]


def state(name: str | None, gain: float | None, **memory: Any) -> Values:
    """A revision, as `dvc exp show --json` has it; without a gain it is queued."""
    params = {"params.yaml": {"data": {"seed": 0, "memory": {"queries": 8, "short_length": 4} | memory}}}
    scores = {"vismem": 50.0} | (
        {"gain": {"points": gain, "low": gain - 1, "high": gain + 1}} if gain is not None else {}
    )
    metrics = {SCORES: {"data": scores} if gain is not None else {"error": {"msg": "no such file"}}}
    return {"rev": f"{name}0123456", "name": name, "data": {"params": params, "metrics": metrics}, "error": None}


def shown(*states: Values) -> list[Values]:
    workspace = {"rev": "workspace", "name": None, "data": None, "error": {"msg": "gone"}, "experiments": None}
    head = state("main", None) | {"experiments": [{"revs": [each], "name": each["name"]} for each in states]}
    return [workspace, head]


def one_at_a_time() -> list[Values]:
    return shown(
        state("a", 1.0, queries=2), state("b", 2.0, queries=16), state("c", 3.0),
        state("d", 4.0, short_length=2), state("queued", None, queries=64), state("again", 9.0),
    )  # fmt: skip


def test_experiments_with_scores_count_once_for_each_set_of_parameters() -> None:
    found = experiments(one_at_a_time())
    assert [(each.name, each.gain) for each in found] == [("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 4.0)]
    assert found[0].interval == (0.0, 2.0)
    assert found[0].parameters == {"seed": 0, "memory.queries": 2, "memory.short_length": 4}
    assert len(experiments(shown(state("whole", 1.0, queries=2), state("float", 1.0, queries=2.0)))) == 1
    with_head = one_at_a_time()
    with_head[1] |= state("main", 7.0, queries=3)
    assert [each.name for each in experiments(with_head)][-1] == "main"


def test_a_line_joins_what_differs_in_one_parameter_alone() -> None:
    found = experiments(one_at_a_time())
    values = varied(found)
    assert values == {"memory.queries": [2, 8, 16], "memory.short_length": [2, 4]}, "numbers in their order"
    lines = {key: [[each.name for each in line] for line in alike(found, key, values)] for key in values}
    assert lines == {"memory.queries": [["a", "c", "b"]], "memory.short_length": [["d", "c"]]}
    assert [panel.title for panel in panels(found, values)] == list(values)


def test_a_grid_has_a_line_for_each_value_of_the_other_parameter() -> None:
    found = experiments(shown(*(state(f"{q}{n}", q + n, queries=q, short_length=n) for q in (2, 4, 8) for n in (1, 2))))
    lines = alike(found, "memory.queries", varied(found))
    assert [[each.name for each in line] for line in lines] == [["21", "41", "81"], ["22", "42", "82"]]


def test_words_and_switches_are_values_too() -> None:
    found = experiments(
        shown(*(state(f"{init}{on}", 1.0, init=init, on=on) for init in ("b", "a") for on in (True, False)))
    )
    assert varied(found) == {"memory.init": ["a", "b"], "memory.on": [False, True]}
    assert "<td>None</td>" in render(shown(state("a", 1.0, init="x"), state("b", 2.0))), "an older one has no such key"


def test_the_page_says_what_each_point_is_and_runs_nothing() -> None:
    hostile = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>\ud83d'
    page = render(shown(state(hostile, -1.0, queries=2), state("b", 2.0)))
    assert page.encode()
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert page.count(" data-tip=") == 2
    said = described(experiments(shown(state("b", 2.0), state("c", 1.0, queries=2)))[0], ["memory.queries"])
    assert said == "memory.queries 8: +2.0 points (+1.0 to +3.0), b"
    assert f'data-tip="{said}"' in page
    assert "\N{MINUS SIGN}1.0" in page


@pytest.mark.parametrize("states", [(), (state("a", 1.0),), (state("a", 1.0), state("b", 1.0)), (state("a", None),)])
def test_nothing_to_compare_is_an_error_that_says_how_to_queue(states: tuple[Values, ...]) -> None:
    with pytest.raises(UserError, match=r"dvc exp run --queue -S 'memory.queries=2,4,8' evaluate"):
        render(shown(*states))
