"""The twelve benchmarks of the paper's Table 1: where their questions are, what counts, and the paper's own figures.

Files, parts and overall figures are as VLMEvalKit (vlmeval/dataset) has them, HallusionBench's as its authors. Data
only; readers and evaluation use it.
"""

import ast
from dataclasses import dataclass
from typing import Any

from vismem.data.answer_forms import AnswerKind
from vismem.data.sample import Capability, Sample

_LETTER = "Answer with the letter of the right option."
_CHOICE, _POLAR, _ANY = (AnswerKind.CHOICE,), (AnswerKind.YES_NO,), tuple(AnswerKind)
_THREE = "mean of aAcc, fAcc and qAcc"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `vanilla` and `vismem`: the paper's scores of Qwen2.5-VL-7B without and with memory, percent."""

    name: str  # as in Table 1
    capability: Capability
    vanilla: float
    vismem: float
    file: str = ""  # `$LMUData/FILE.tsv`
    kinds: tuple[AnswerKind, ...] = _CHOICE  # of its answers; a row of another kind is set apart
    prompt: str = ""  # behind questions of its first kind, unless `prepare.instructions` has a text for that
    parts: tuple[str, ...] = ()  # values of the column `split` that the score is of; empty: all
    any_of: bool = False  # a reference that is a list names answers of which any one is right
    score: str = "mean over questions"  # as pages say it; `vismem.evaluation.benchmarks.score_of` has it
    judge: str = ""  # the rule by which a language model scores each answer from 0 to 1; empty: it is read by rules
    unsupported: str = ""  # why it cannot be asked


_MMVET = (  # MM-Vet (Yu et al., ICML 2024), as in VLMEvalKit's utils/mmvet.py; the wording is ours
    "The reference is one or several elements, joined by <AND> or <OR>. With <AND> the answer is totally right only if "
    "it has all of them, and its score is the share that it has; with <OR> any one of them makes it totally right."
)
_MV_MATH = (  # MV-MATH (Wang et al., CVPR 2025), evaluation/*.py of its repository; the wording is ours
    "The answer is right (1.0) if its final result is the reference: the same option, an equivalent expression or "
    "number, and for a reference of several parts all of them. Otherwise it is wrong (0.0)."
)
_MULTITRUST = "a toolbox (thu-ml/MMTrustEval) whose tasks have data sets, classifiers and metrics of their own"
_MMVU = "about videos, which its release (yale-nlp/MMVU) names by address; VLMEvalKit has no file of it"
_SEE, _REASON, _WRITE = Capability.UNDERSTANDING, Capability.REASONING, Capability.GENERATION
BENCHMARKS = (
    Benchmark("MMStar", _SEE, 62.6, 68.9, "MMStar", prompt=_LETTER),
    Benchmark("MMVet", _SEE, 66.0, 75.1, "MMVet", _ANY, judge=_MMVET),
    Benchmark("MMT-Bench", _SEE, 54.0, 62.5, "MMT-Bench_VAL", prompt=_LETTER),
    Benchmark("BLINK", _SEE, 55.4, 64.5, "BLINK", prompt=_LETTER),  # BLINK_circular is another
    Benchmark("MUIRBench", _SEE, 57.4, 69.8, "MUIRBench", prompt=_LETTER),
    Benchmark("MMMU", _REASON, 56.0, 63.9, "MMMU_DEV_VAL", _ANY, _LETTER, parts=("validation",), any_of=True),
    Benchmark("LogicVista", _REASON, 43.5, 55.7, "LogicVista", (*_CHOICE, AnswerKind.LETTERS)),
    Benchmark("MathVista", _REASON, 67.8, 79.8, "MathVista_MINI", _ANY),
    Benchmark("MV-Math", _REASON, 18.9, 41.4, "MV-MATH", _ANY, judge=_MV_MATH),
    Benchmark("HallusionBench", _WRITE, 52.3, 59.6, "HallusionBench", _POLAR, "Answer yes or no.", score=_THREE),
    Benchmark("MultiTrust", _WRITE, 64.8, 77.0, unsupported=_MULTITRUST),
    Benchmark("MMVU", _WRITE, 55.4, 68.2, unsupported=_MMVU),
)
BY_FILE = {benchmark.file: benchmark for benchmark in BENCHMARKS if benchmark.file}
CIRCULAR = ("circular", "mmbench", "ccbench", "mmcr")  # in the names of files of which a question is many rows


def in_every_order(file: str) -> bool:
    """Whether VLMEvalKit asks each question of that benchmark in several orders of its options, a row for each."""
    return any(word in file.lower() for word in CIRCULAR)


def references(sample: Sample) -> tuple[str, ...]:
    """The answers of which any one is right: the sample's own, or those that it lists where its benchmark does so."""
    any_of = sample.source in BY_FILE and BY_FILE[sample.source].any_of
    return (*map(str, _listed(sample.answer) if any_of else ()),) or (sample.answer,)


def lists_texts(sample: Sample) -> bool:
    """Whether the reference is a list of texts, and the benchmark none of ours: how it counts them is not known."""
    listed = _listed(sample.answer) if sample.source not in BY_FILE else []
    return bool(listed) and all(isinstance(text, str) for text in listed)


def _listed(text: str) -> list[Any]:
    """The entries of a list literal; none where it is no list."""
    try:
        return list(ast.literal_eval(text)) if text.startswith("[") else []
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []


def counted(sample: Sample) -> bool:
    """Whether a sample is of a part of its benchmark that the score is of; of other sources all are."""
    parts = BY_FILE[sample.source].parts if sample.source in BY_FILE else ()
    return not (parts and sample.part) or sample.part in parts
