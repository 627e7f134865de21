"""`vismem compare`: files of every harness read alike, arms paired by question, hostile files refused in a line."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from vismem.cli import main
from vismem.errors import UserError
from vismem.evaluation.compare import compare, read_arms, render, table
from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import Prediction, write_predictions
from vismem.evaluation.scored import Scored, read_scored

RIGHT = {"vanilla": "110010011010", "vismem": "111011011110"}  # by question
SECONDS = dict.fromkeys(RIGHT, 1.0)


def prediction(place: int, right: str, source: str = "Bench") -> Prediction:
    answer = "yes" if right == "1" else "no"
    return Prediction(
        id=f"{source}-{place}", task="task", capability="understanding", source=source, question="is it?",
        reference="yes", text=answer, marked_text=answer, extracted=answer, rule="whole reply", score=float(right),
        invocations=(), answer_length=1, finished=True, cluster=f"picture {place // 3}",
    )  # fmt: skip


def own(folder: Path, arm: str) -> Path:
    file = folder / f"{arm}.parquet"
    write_predictions([prediction(*item) for item in enumerate(RIGHT[arm])], file)
    return file


def lmms(folder: Path, arm: str) -> Path:
    """As lmms-eval 0.7.3 writes it."""
    file = folder / arm / "20261127_200421_samples_Bench.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"doc_id": place, "target": "yes", "filtered_resps": "yes" if right == "1" else "no",
         "token_counts": [{"output_tokens": 1}], "doc_hash": "74", "exact_match": float(right), "input": "is it?",
         "input_media": [f"{place // 3}.png"]}
        for place, right in enumerate(RIGHT[arm])
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def kit_rows(arm: str) -> list[dict[str, object]]:
    return [
        {"index": place, "question": "is it?", "answer": "yes", "image_path": f"{place // 3}.png",
         "prediction": "yes" if right == "1" else "no"}
        for place, right in enumerate(RIGHT[arm])
    ]  # fmt: skip


def kit_file(folder: Path, arm: str, ending: str) -> Path:
    """Where VLMEvalKit writes it: MODEL/RUN/MODEL_DATASET."""
    file = folder / f"m_{arm}" / "T20261127-121157" / f"m_{arm}_Bench{ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def kit_tsv(folder: Path, arm: str) -> Path:
    pd.DataFrame(kit_rows(arm)).to_csv(file := kit_file(folder, arm, ".tsv"), sep="\t", index=False, quoting=1)
    return file


def kit_json(folder: Path, arm: str) -> Path:
    (file := kit_file(folder, arm, ".json")).write_text(json.dumps(kit_rows(arm), indent=4))
    return file


def kit_judged(folder: Path, arm: str) -> Path:
    """What VLMEvalKit's evaluation adds: its own verdict, which counts, whatever the answer's words are."""
    rows = [row | {"hit": int(right), "prediction": "?"} for row, right in zip(kit_rows(arm), RIGHT[arm], strict=True)]
    pd.DataFrame(rows).to_csv(file := kit_file(folder, arm, "_exact_matching_result.tsv"), sep="\t", index=False)
    return file


def kit_xlsx(folder: Path, arm: str) -> Path:
    pytest.importorskip("openpyxl", reason="only VLMEvalKit's .xlsx files need it")
    pd.DataFrame(kit_rows(arm)).to_excel(file := kit_file(folder, arm, ".xlsx"), index=False)
    return file


KINDS = {**dict.fromkeys((kit_tsv, kit_json, kit_judged, kit_xlsx), "image_path"), own: None, lmms: "input_media"}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_harness_give_the_figures_of_an_evaluation(
    kind: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    predictions = {arm: [prediction(*item) for item in enumerate(right)] for arm, right in RIGHT.items()}
    metrics = summarise(predictions, SECONDS, seed=5, resamples=200)
    arms = read_arms({arm: [kind(tmp_path, arm)] for arm in RIGHT}, cluster=KINDS[kind])
    first, second = table(compare(arms, seed=5, resamples=200))
    gain, (low, high) = metrics["gain"]["overall"], metrics["intervals"]["vismem"]["overall"]
    assert (first["n"], first["clusters"], first["minus vanilla"]) == ("12", "4", "")
    assert second["score"] == f"{metrics['arms']['vismem']['overall']:.1f} ({low:.1f} to {high:.1f})"
    ends = "{:+.1f} to {:+.1f}".format(*gain["ci95"])
    assert second["minus vanilla"] == f"{gain['delta']:+.1f} ({ends}), p = {gain['p']:.3f}: not shown"


def test_harnesses_are_paired_with_each_other_and_clusters_come_from_the_one_that_knows(tmp_path: Path) -> None:
    arms = read_arms({"ours": [own(tmp_path, "vanilla")], "theirs": [kit_tsv(tmp_path, "vanilla")]})
    rows = table(compare(arms, seed=0, resamples=100))
    assert [row["clusters"] for row in rows] == ["4", "4"]
    assert rows[1]["minus ours"].startswith("+0.0 (-66.8 to +66.8), p = 1.000")


def test_benchmarks_stand_apart_and_p_is_corrected_over_all_of_them() -> None:
    def rows(right: str, score: str) -> dict[str, Scored]:
        names = [(f"{right}-{place}", value) for place, value in enumerate(score)]
        return {name: Scored(name, right, "yes", float(value), "") for name, value in names}

    zeros, ones = "0" * 9, "1" * 9
    arms = {"a": rows("X", zeros) | rows("Y", zeros), "b": rows("X", ones) | rows("Y", zeros)}
    found = table(compare(arms, seed=0, resamples=100))
    assert [(row["benchmark"], row["arm"], row["n"]) for row in found] == [
        ("X", "a", "9"), ("X", "b", "9"), ("Y", "a", "9"), ("Y", "b", "9"),
        ("overall", "a", "18"), ("overall", "b", "18"),
    ]  # fmt: skip
    said = [row["minus a"] for row in found]
    assert "p = 0.012: better" in said[1]  # 3 * 2 ** -8
    assert "p = 1.000: not shown" in said[3]


def test_the_command_prints_the_table_and_says_where_clusters_are_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [argument for arm in RIGHT for argument in ("--arm", arm, str(lmms(tmp_path, arm)))]
    assert main(["compare", *files]) == 0
    assert "Every question counts by itself" in (said := capsys.readouterr().out)
    assert "minus vanilla" in said
    assert main(["compare", *files, "--cluster", "input_media"]) == 0
    assert "Every question" not in capsys.readouterr().out
    for wrong in (files[:3], [*files[:3], *files[:3]], [*files[:3], "--arm", "vismem"]):
        with pytest.raises(SystemExit, match="2"):
            main(["compare", *wrong])
        assert "give --arm NAME FILE... twice or more" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_figures_and_every_answer_whatever_stands_in_it(
    kind: Callable[[Path, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.html"
    files = [argument for arm in RIGHT for argument in ("--arm", arm, str(kind(tmp_path, arm)))]
    assert main(["compare", *files, "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"compare: {out}\n")
    page = out.read_text()
    assert re.findall('data-right="(..)"', page) == [*map("".join, zip(*RIGHT.values(), strict=True))]
    assert page.count('<p class="question" dir="auto">is it?</p>') == 12
    assert "VisMem minus vanilla: +25.0 points" in page


def test_the_page_marks_memories_escapes_answers_and_holds_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(text: str) -> dict[str, Scored]:
        return {str(n): Scored(str(n), "Bench", "yes", n % 2, "", "<b>?</b>", text) for n in range(9)}

    arms = {"a": rows("<script>alert(1)</script>"), "b": rows("seen,<m_I^s> yes \ud83d")}
    found = compare(arms, seed=0, resamples=100)
    page = render(arms, found, seed=0)
    assert "<script>alert" not in page
    assert "<b>?</b>" not in page
    assert page.count('<span class="chip short">short-term memory</span>') == page.count('data-memory="ns"') == 9
    page.encode()
    monkeypatch.setattr("vismem.evaluation.report.LARGEST", 2_000)
    page = render(arms, found, seed=0)
    assert 0 < page.count("<article") < 9
    assert f"{page.count('<article')} of the 9 questions, drawn at random" in page


def changed(file: Path, change: Callable[[str], str], name: str = "") -> Path:
    target = file.with_name(name or file.name)
    target.write_text(change(file.read_text()))
    return target


def line(file: Path, **fields: object) -> Path:
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | fields), *rest]))
    return file


def other_parquet(folder: Path) -> Path:
    pd.DataFrame({"id": ["a"]}).to_parquet(file := folder / "other.parquet")
    return file


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no file": (lambda f: f / "none.tsv", "no file .*none.tsv"),
    "another kind": (lambda f: changed(lmms(f, "vismem"), str, "a.txt"), "no .parquet of"),
    "a name without its task": (lambda f: changed(lmms(f, "vismem"), str, "a.jsonl"), "keep the name"),
    "empty": (lambda f: changed(lmms(f, "vismem"), lambda _: ""), "holds no answers"),
    "an empty list": (lambda f: changed(kit_json(f, "vismem"), lambda _: "[]"), "no column index"),
    "no Parquet": (lambda f: changed(lmms(f, "vismem"), str, "b.parquet"), "is damaged, or of another kind"),
    "another Parquet": (other_parquet, "is damaged, or of another kind"),
    "a cut line": (lambda f: changed(lmms(f, "vismem"), lambda text: text[:-20]), "line 12: broken JSON"),
    "cut JSON": (lambda f: changed(kit_json(f, "vismem"), lambda text: text[:-20]), "is damaged, or of another kind"),
    "a cut field": (lambda f: changed(kit_tsv(f, "vismem"), lambda text: text[:-3]), "it ends within a row"),
    "nested too deep": (lambda f: changed(kit_json(f, "vismem"), lambda _: "[" * 10**5), "is damaged, or of"),
    "a short row": (lambda f: changed(kit_tsv(f, "vismem"), lambda text: text + '"12"\n'), "different columns"),
    "a key less": (
        lambda f: changed(kit_json(f, "vismem"), lambda text: text.replace('"answer"', '"reply"', 1)),
        "different columns",
    ),
    "no list of rows": (lambda f: changed(kit_json(f, "vismem"), lambda _: '{"a": 1}'), "no list of objects"),
    "a metric of words": (lambda f: line(lmms(f, "vismem"), exact_match="yes"), "line 1: no score, .*exact_match"),
    "several metrics": (lambda f: line(lmms(f, "vismem"), anls=0.5), "no score, or several; .*exact_match, .*anls"),
    "a score of a judge": (lambda f: line(lmms(f, "vismem"), exact_match=3.5), "the score 3.5 is not between 0 and 1"),
    "a score that is NaN": (lambda f: line(lmms(f, "vismem"), exact_match=float("nan")), "the score nan is not"),
    "a failed request": (
        lambda f: line(lmms(f, "vismem"), filtered_resps="[LMMS_EVAL_REQUEST_FAILED after 5 retries]"),
        "line 1: the answer is a failed request",
    ),
    "a failed request of the kit": (
        lambda f: changed(kit_tsv(f, "vismem"), lambda text: text.replace('"no"', '"Failed to obtain answer via"')),
        "row 4: the answer is a failed request",
    ),
    "an unfinished judgement": (
        lambda f: changed(kit_judged(f, "vismem"), lambda text: text.replace("\t1\n", "\t\n")),
        "row 1: 'hit' is no number but ''",
    ),
    "away from its folder": (lambda f: changed(kit_tsv(f, "vismem"), str, "c.tsv"), "a folder of the model's name"),
    "no such column": (lambda f: changed(kit_tsv(f, "vismem"), lambda t: t.replace("pred", "said")), "no column pred"),
    "a question twice": (lambda f: changed(lmms(f, "vismem"), lambda text: text * 2), "'Bench-0' is there twice"),
    "a question less": (
        lambda f: changed(lmms(f, "vismem"), lambda text: text.partition("\n")[2]),
        "vismem lacks 1 questions of vanilla, such as 'Bench-0'",
    ),
    "a question more": (
        lambda f: changed(lmms(f, "vismem"), lambda text: text + text.splitlines()[0].replace(": 0,", ": 99,", 1)),
        "vanilla lacks 1 questions of vismem, such as 'Bench-99'",
    ),
    "other data": (lambda f: line(lmms(f, "vismem"), target="no"), "'Bench-0' has another reference in vismem"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_compared_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, said = WRONG[case]
    file = make(tmp_path)
    files: dict[str, Sequence[Path]] = {"vanilla": [lmms(tmp_path, "vanilla")], "vismem": [file]}
    with pytest.raises(UserError, match=said):
        read_arms(files)
    assert main(["compare", "--arm", "vanilla", str(files["vanilla"][0]), "--arm", "vismem", str(file)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: no 'picture' to cluster by"):
        read_scored(lmms(tmp_path, "vismem"), cluster="picture")
    with pytest.raises(UserError, match="no column picture"):
        read_scored(kit_tsv(tmp_path, "vismem"), cluster="picture")


def test_a_metric_may_be_an_object_with_a_score_and_is_chosen_by_name(tmp_path: Path) -> None:
    file = lmms(tmp_path, "vismem")
    rows = [
        json.loads(text) | {"average": {"question_id": "q", "score": 0.25}} for text in file.read_text().splitlines()
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert {row.score for row in read_scored(file, metric="average")} == {0.25}
    assert read_scored(file, metric="average", cluster="question_id")[0].cluster == "Bench: q"
    assert [row.score for row in read_scored(file, metric="exact_match")] == [float(right) for right in RIGHT["vismem"]]


@pytest.mark.parametrize("kind", [own, lmms, kit_tsv, kit_json])
def test_a_file_cut_anywhere_is_read_or_refused_and_never_fails_otherwise(
    kind: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    file = kind(tmp_path, "vismem")
    whole, rows = file.read_bytes(), read_scored(file)
    for end in range(0, len(whole), max(1, len(whole) // 150)):
        file.write_bytes(whole[:end])
        try:
            found = read_scored(file)
        except UserError:
            continue
        told = [[replace(row, reference="") for row in each] for each in (found, rows[: len(found)])]
        assert told[0] == told[1]


def test_options_are_read_by_their_letters(tmp_path: Path) -> None:
    rows = [
        {"index": 7, "question": "which?", "A": "red", "B": float("nan"), "C": "blue", "D": None, "answer": "C",
         "prediction": said, "boxes": [1, 2]}
        for said in ("The answer is C.", "blue", "(A)")
    ]  # fmt: skip
    file = kit_file(tmp_path, "vismem", ".json")
    file.write_text(json.dumps(rows))
    assert [row.score for row in read_scored(file)] == [1.0, 1.0, 0.0]
