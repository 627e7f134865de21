"""Whether the statistics of an evaluation keep their promises where questions share images, in simulated evaluations.

    python benchmarks/coverage.py [--trials 2000] [--resamples 1000]

Two arms answer the same questions: an image is easy or hard for both, for each arm apart, and so is a question. Beside
ours stands what takes questions for independent: the bootstrap of questions, not widened, and McNemar's exact test.
Exits with status 1 where ours covers the truth in less than 92 or more than 97 % of the trials.
"""

from statistics import NormalDist
from typing import Any

import numpy as np
from common import parser, publish, table

from vismem.evaluation.statistics import Scores, paired_difference, score_interval
from vismem.records import Difference

SETTINGS = ((200, 1), (100, 4), (40, 20))  # images, questions of each
RATES = ((60, 60), (70, 60), (95, 95))  # percent that the arms have right in the long run
# Shares of what decides whether an answer is right: the image, the image for this arm, the question, the rest.
IMAGE, IMAGE_AND_ARM, QUESTION, REST = np.sqrt((0.1, 0.75, 0.1, 0.05))


def answered(images: int, questions: int, rates: tuple[int, int], rng: np.random.Generator) -> tuple[Scores, Scores]:
    """(images * questions,) scores in percent of two arms on the same questions, image after image."""
    hard = IMAGE * rng.standard_normal((1, images, 1)) + IMAGE_AND_ARM * rng.standard_normal((2, images, 1))
    hard = hard + QUESTION * rng.standard_normal((1, images, questions))
    hard = hard + REST * rng.standard_normal((2, images, questions))
    limits = np.array([NormalDist().inv_cdf(rate / 100) for rate in rates])
    first, second = 100.0 * (hard < limits[:, None, None]).reshape(2, -1)
    return first, second


def measured(found: list[Difference], truth: float) -> dict[str, float]:
    """Percent of the trials: the interval covers the truth, p is below 0.05, the gate's rule of the interval passes."""
    shares = {
        "covers": [one.ci95[0] <= truth <= one.ci95[1] for one in found],
        "p": [one.p < 0.05 for one in found],
        "gate": [one.exceeds(0.0) for one in found],
    }
    return {name: round(100 * float(np.mean(flags)), 1) for name, flags in shares.items()}


def main() -> int:
    """Simulate every setting, print, and judge the coverage."""
    options = {"trials": (2000, "evaluations per setting"), "resamples": (1000, "of the bootstrap")}
    args = parser(__doc__, **options).parse_args()
    rng, settings = np.random.default_rng(0), list[dict[str, Any]]()
    for images, questions in SETTINGS:
        clusters = np.repeat(np.arange(images), questions)
        for rates in RATES:
            trials = [answered(images, questions, rates, rng) for _ in range(args.trials)]
            ours, old = (
                [paired_difference(*arms, by, resamples=args.resamples, seed=n) for n, arms in enumerate(trials)]
                for by in (clusters, np.arange(images * questions))
            )
            scores = [score_interval(arm, clusters) for arm, _ in trials]
            row = {"images": images, "questions": questions, "rates": rates}
            truth = float(rates[0] - rates[1])
            covered = round(100 * float(np.mean([low <= rates[0] <= high for low, high in scores])), 1)
            sides = {"ours": measured(ours, truth), "by_questions": measured(old, truth)}
            settings.append({**row, **sides, "score_covers": covered})
    lines = [
        f"{row['images']} x {row['questions']} | {row['rates'][0]} and {row['rates'][1]} | "
        + " | ".join(f"{row[side][name]:.1f}" for name in ("covers", "p", "gate") for side in ("ours", "by_questions"))
        + f" | {row['score_covers']:.1f}"
        for row in settings
    ]
    columns = (f"{name}{side}" for name in ("covers", "p < 0.05", "gate passes") for side in ("", ", by questions"))
    header = " | ".join(("images x questions", "right, %", *columns, "covers one score"))
    publish({"trials": args.trials, "settings": settings}, table(header, lines), args.json)
    return 0 if all(92 <= row["ours"]["covers"] <= 97 for row in settings) else 1


if __name__ == "__main__":
    raise SystemExit(main())
