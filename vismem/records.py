"""The JSON files that steps judge each other by: typed, and written and read only here. A missing field is an error.

Figures may be NaN or infinite: the gate refuses these in a sentence (`vismem.registry.gate`), the reader does not fail.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vismem.errors import UserError
from vismem.files import read_json, write_json

SIGNIFICANT = 0.05  # p below which a difference is shown; an interval covers the rest, 95 %
VANILLA, VISMEM = "vanilla", "vismem"  # the arms that every comparison is about
EXAMPLE = "example"  # the images of deploy's example: example-1.png and so on
OVERALL = "overall"  # the group of all items

Sha256 = Annotated[str, Field(min_length=1)]
Interval = tuple[float, float]


def portable(name: str) -> str:
    """An arm's name where `@` may not stand, in files' and metrics' names: `vismem@1` becomes `vismem-at-most-1`."""
    return name.replace("@", "-at-most-")


class Part(BaseModel):
    """A part of a record: frozen, and without fields that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Record(Part):
    """The content of a JSON file, `FILE` in the output folder of the step `STEP`."""

    FILE: ClassVar[str]
    STEP: ClassVar[str]

    def __init_subclass__(cls, file: str, step: str) -> None:
        cls.FILE, cls.STEP = file, step

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in `folder`. UserError where the file is missing, not JSON, or lacks or adds a field."""
        path, hint = folder / cls.FILE, f"run `vismem {cls.STEP}` again"
        values = read_json(path, hint)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"{path} is damaged ({'; '.join(problems[:3])}{more}): {hint}") from None

    def write(self, folder: Path) -> None:
        """Write the file into `folder`, in one replace."""
        write_json(folder / self.FILE, self.model_dump(mode="json"))


def p_value(p: float) -> str:
    """A p-value as people write it; never 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


class Difference(Part):
    """A paired difference of two arms in percentage points, its 95 % interval, and the permutation test's p."""

    delta: float
    ci95: Interval
    p: float
    p_holm: float | None = None  # p among the comparisons of its table; None: chosen beforehand, stands alone
    detectable: float | None = None  # true difference that such data show 8 times of 10; None: nothing varies

    @property
    def judged_p(self) -> float:
        """The p that decides: Holm's where the comparison stands beside others."""
        return self.p if self.p_holm is None else self.p_holm

    def exceeds(self, limit: float) -> bool:
        """Whether the difference is shown to be above `limit`: the whole interval is, and p is below SIGNIFICANT.

        p is about a difference from 0, so that it plays no part where `limit` is negative.
        """
        return self.ci95[0] > limit and (limit < 0 or self.judged_p < SIGNIFICANT)

    @property
    def outcome(self) -> Literal["better", "worse", "not shown"]:
        """What the interval and the test show; headline, report, colours and gate all go by it."""
        if self.exceeds(0.0):
            return "better"
        return "worse" if self.ci95[1] < 0 and self.judged_p < SIGNIFICANT else "not shown"


class KindUse(Part):
    """How often one kind of memory was invoked per answer, and its mean relative position (None: never invoked)."""

    per_answer: float
    mean_position: float | None


class MemoryUse(Part):
    """The percentage of answers with any memory, and the use of each kind."""

    answers_with_memory: float
    short: KindUse
    long: KindUse


class Invocation(Part):
    """VisMem's use of memory, overall and by task."""

    overall: MemoryUse
    tasks: dict[str, MemoryUse]


class TaskScores(Part):
    """One task's score in percent by arm."""

    capability: str
    n: int
    arms: dict[str, float]


class BenchmarkScores(Part):
    """One benchmark's accuracy in percent by arm, over its n rows; `set_apart` more are in quarantine.

    `figures`: arm -> what else the benchmark counts, HallusionBench's aAcc, fAcc, qAcc and their mean.
    """

    n: int
    set_apart: int
    arms: dict[str, float]
    figures: dict[str, dict[str, float]]


class YesNo(Part):
    """Yes/no questions apart: scores with, without and only on them, and how often each arm says yes."""

    n: int
    arms: dict[str, dict[str, float]]
    gain: dict[str, Difference]


def _complete(scores: dict[str, float]) -> dict[str, float]:
    if missing := {OVERALL, "seconds_per_sample"} - set(scores):
        raise ValueError(f"lacks {' and '.join(sorted(missing))}")
    return scores


class Metrics(Record, file="metrics.json", step="evaluate"):
    """`metrics.json` of `evaluate`. Scores in percent; groups are `overall` and the capabilities that have items.

    An arm has `visual_tokens` too: those of images and videos before its answers, on average.
    """

    n: int
    seed: int
    counts: dict[str, int]  # items by capability
    clusters: dict[str, int]  # group -> clusters of its items: those that share an image or a group of their source
    arms: dict[str, Annotated[dict[str, float], AfterValidator(_complete)]]  # arm -> group -> score; seconds_per_sample
    intervals: dict[str, dict[str, Interval]]  # arm -> group -> 95 % interval of the score
    gain: dict[str, Difference]  # group -> VisMem minus vanilla; empty without the arm vismem
    ablations: dict[str, dict[str, Difference]]  # arm -> group -> that arm minus vanilla
    pairs: dict[str, dict[str, Difference]] = {}  # arm -> each arm before it but vanilla -> arm minus other, overall
    overhead: dict[str, float]  # arm -> seconds over vanilla's, minus 1
    benchmarks: dict[str, BenchmarkScores]
    macro: dict[str, float]  # arm -> mean of its scores over the benchmarks; `overall` is the mean over items
    tasks: dict[str, TaskScores]  # of several benchmarks' tasks with one name: "BENCHMARK: TASK"
    yes_no: YesNo
    unparsed: dict[str, float]  # arm -> percentage of answers
    unfinished: dict[str, float]
    invocation: Invocation | None  # None without the arm vismem
    invocation_by_arm: dict[str, MemoryUse]
    stage2_sha256: Sha256  # the model whose scores these are
    test_sha256: Sha256  # the shards of the test split
    items_sha256: Sha256  # the ids of the items that were answered, which `evaluate.limit` draws

    @model_validator(mode="after")
    def _overall_is_there(self) -> Self:
        if OVERALL not in self.clusters:
            raise ValueError("clusters lacks overall")
        if VISMEM in self.arms and OVERALL not in self.gain:
            raise ValueError("gain lacks overall, and there is an arm vismem")
        return self


class RowCounts(Part):
    """Rows before and after validation."""

    total: int
    clean: int
    quarantined: int


class AllRowCounts(RowCounts):
    """Rows of all splits, and of each."""

    splits: dict[str, RowCounts]


class DataRule(Part):
    """One expectation of the data, and whether it holds."""

    name: str
    severity: Literal["error", "warning", "quarantine"]
    success: bool
    observed: str
    message: str


class Validation(Record, file="validation.json", step="validate"):
    """`validation.json` of `validate`."""

    success: bool
    rows: AllRowCounts
    data_sha256: Sha256
    rules: tuple[DataRule, ...]
    task_mix: dict[str, dict[str, float]]  # split -> task -> share of its clean rows


class ParityReport(Record, file="parity.json", step="export"):
    """`parity.json` of `export`: the ONNX runtime against torch, both in float32."""

    graphs: bool  # without, nothing but torch serves the bundle, in the precision in which it was scored
    passed: bool
    items: int
    greedy_equal: int  # items whose answers are equal token for token
    memories: int
    max_memory_difference: float  # infinite where a memory has another shape or is not finite
    tolerance: float
    differences: tuple[str, ...]
    seconds: dict[str, float]


WITHOUT_GRAPHS = ParityReport(
    graphs=False, passed=True, items=0, greedy_equal=0, memories=0, max_memory_difference=0.0, tolerance=0.0,
    differences=(), seconds={},
)  # fmt: skip


class RegisteredVersion(Record, file="version.json", step="register"):
    """`version.json` of `register`: the version in the registry, and the champion that it was judged against."""

    name: str
    version: str
    run_id: str
    model_id: str
    manifest_sha256: Sha256
    judged_against: str | None


class Rule(Part):
    """One rule's outcome. `reason` is a sentence with the figures, whichever way it went."""

    name: str
    passed: bool
    reason: str


class Verdict(Record, file="verdict.json", step="register"):
    """`verdict.json` of `register` and of `promote`: all rules of the gate; passed when every rule passed."""

    passed: bool
    rules: tuple[Rule, ...]

    def reasons(self) -> tuple[str, ...]:
        """Why it was refused: the broken rules' reasons; of a passed verdict, every rule's."""
        return tuple(rule.reason for rule in self.rules if self.passed or not rule.passed)


class Release(Record, file="release.json", step="promote"):
    """`release.json` of `promote`: whether the version is champion, and why (not)."""

    promoted: bool
    name: str
    version: str
    model_id: str
    previous: str | None  # the champion before
    reasons: tuple[str, ...]
    manifest_sha256: str = ""  # of the bundle that was judged; empty in a file that an earlier VisMem wrote
