"""What several seeds' evaluations show together: arms, claims and transfer as plain values. Pure; scores in percent.

A pooled interval is over the questions of all seeds. The spread over seeds is reported beside it, since each seed also
trains anew, on other questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from recipes.study import budgets
from recipes.study.claims import EQUAL_SECONDS, TRANSFER, Answers, Values, compare, judge, of_arms, whole_order
from vismem.evaluation.metrics import is_yes_no, summarise
from vismem.evaluation.predictions import Prediction
from vismem.records import VANILLA


def study_figures(
    answers: Mapping[int, Answers],
    seconds: Mapping[int, Mapping[str, float]],
    lengths: Mapping[str, int],
    random: str,
    resamples: int,
) -> Values:
    """The figures of all arms, tasks and claims; `answers` and `seconds` (per question, by arm) are by seed.

    `lengths`: vectors of a memory by kind; `random`: the arm that stands for random invocation. arms {arm:
    `arm_figures`, by seed the milliseconds and the tokens per question (visual ones and memories' vectors), overhead
    (over vanilla, by seed)}; pooled: `summarise` of all questions; yes_no_tasks: those whose every question is answered
    yes or no; lengths {task: vanilla's tokens an answer, `mean` and `max`}; claims: `judge` of those about arms, and
    M4; budgets, needs and oracle: `recipes.study.budgets`.
    """
    scores, times = score_table(answers), pd.DataFrame(seconds)
    mean_seconds, overhead = times.mean(axis=1).to_dict(), times / times.loc[VANILLA] - 1
    arms = {
        arm: {
            **figures,
            "milliseconds": (1000 * times.loc[arm]).to_dict(),
            "tokens": {seed: tokens_read(rows[arm], lengths) for seed, rows in answers.items()},
            "overhead": overhead.loc[arm].tolist(),
        }
        for arm, figures in arm_figures(scores, resamples).items()
    }
    pooled = {  # seeds ask other questions under the same ids
        arm: [replace(a, id=f"{seed}/{a.id}") for seed, rows in answers.items() for a in rows[arm]] for arm in arms
    }
    asked = pooled[VANILLA]
    memories = budgets.mean_memories(answers)
    judged = judge(of_arms(random), scores, resamples)
    return {
        "arms": arms,
        "pooled": summarise(pooled, mean_seconds, seed=min(answers), resamples=resamples),
        "yes_no_tasks": sorted({a.task for a in asked} - {a.task for a in asked if not is_yes_no(a)}),
        "lengths": answer_lengths(asked),
        "random": random,
        "claims": [*judged, whole_order(judged)],
        "budgets": budgets.lines(scores, memories),
        "needs": budgets.needs(scores, resamples),
        "oracle": budgets.oracle(scores, resamples),
    }


def answer_lengths(answers: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """{task: tokens an answer, `mean` and `max`}."""
    rows = pd.DataFrame({"task": [a.task for a in answers], "tokens": [a.answer_length for a in answers]})
    found: dict[str, dict[str, float]] = rows.groupby("task")["tokens"].agg(["mean", "max"]).to_dict("index")
    return found


def tokens_read(answers: Sequence[Prediction], lengths: Mapping[str, int]) -> float:
    """Visual tokens before an answer and vectors of memories in it, on average."""
    vectors = sum(lengths[event.kind] for answer in answers for event in answer.invocations)
    return (sum(answer.visual_tokens for answer in answers) + vectors) / len(answers)


def long_figures(answers: Mapping[int, Answers], training: Mapping[str, Values], resamples: int) -> Values:
    """Of baselines that trained for about as long as VisMem: {arms (`arm_figures`), training, claims (`judge`)}.

    `training`: what each of them, and VisMem, took in the same repetitions.
    """
    scores = score_table(answers)
    claims = judge(EQUAL_SECONDS, scores, resamples)
    return {"arms": arm_figures(scores, resamples), "training": training, "claims": claims}


def transfer_figures(answers: Mapping[int, Answers], trained: Sequence[str], resamples: int) -> Values:
    """Figures of models trained on half of the tasks: on the tasks `trained` on, and on the others.

    {tasks, halves {"trained" or "untrained": {n, arms (`arm_figures`)}}, claims: `judge` on the untrained tasks}; a
    half without questions is left out.
    """
    scores = score_table(answers)
    known = scores.index.get_level_values("task").isin(trained)
    halves = {
        name: {"n": len(half), "arms": arm_figures(half, resamples)}
        for name, half in (("trained", scores[known]), ("untrained", scores[~known]))
        if len(half)
    }
    return {"tasks": list(trained), "halves": halves, "claims": judge(TRANSFER, scores[~known], resamples)}


def check_figures(checks: Mapping[int, Mapping[str, Values]], rollouts: float, resamples: int) -> Values:
    """What GRPO changed on validation questions: {check: {n, rollouts, found: `compare` of after with before}}.

    `checks`: a step's `checks.json` by seed, of which the arms count that were asked at both times.
    """
    found = {}
    for name in next(iter(checks.values()))["before"]:
        tables = {
            seed: 100 * pd.DataFrame({when: check[when][name] for when in ("before", "after")})
            for seed, check in checks.items()
        }
        table = pd.concat(tables, names=["seed"])
        found[name] = {"n": len(table), "rollouts": rollouts, "found": compare(table, "after", "before", resamples)}
    return found


def score_table(answers: Mapping[int, Answers]) -> pd.DataFrame:
    """(questions, arms) scores in percent; the index is each question's seed, task and cluster."""
    tables = {}
    for seed, by_arm in answers.items():
        scores = {arm: [100 * answer.score for answer in rows] for arm, rows in by_arm.items()}
        index = [(a.task, a.cluster or f"{seed}/{a.id}") for a in by_arm[VANILLA]]  # seeds ask others by the same ids
        tables[seed] = pd.DataFrame(scores, index=pd.MultiIndex.from_tuples(index, names=["task", "cluster"]))
    return pd.concat(tables, names=["seed"])


def arm_figures(scores: pd.DataFrame, resamples: int) -> Values:
    """{arm: {seeds {seed: score}, mean (of the seeds), spread, gain}}.

    `spread` is the sample standard deviation over seeds, None for one seed. `gain` is `compare` with vanilla, None for
    vanilla.
    """
    figures: Values = {}
    for arm in scores:
        seeds = {int(seed): float(rows.mean()) for seed, rows in scores[arm].groupby(level="seed")}
        spread = float(pd.Series(seeds).std()) if len(seeds) > 1 else None
        gain = compare(scores, arm, VANILLA, resamples) if arm != VANILLA else None
        figures[arm] = {"seeds": seeds, "mean": sum(seeds.values()) / len(seeds), "spread": spread, "gain": gain}
    return figures
