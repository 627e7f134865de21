"""Step export: the trained model as a bundle that serves, explains itself and can be verified file by file."""

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from vismem.config import Config
from vismem.data.revisions import read_revisions
from vismem.errors import UserError
from vismem.evaluation.evaluate import pick
from vismem.evaluation.panels import to_sheet
from vismem.evaluation.plots import score_panels
from vismem.export.card import PICTURE, model_card
from vismem.export.onnx import WEIGHTS, write_graphs
from vismem.export.parity import check_parity, comparable, too_large
from vismem.files import empty_folder, write_json
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.models.kinds import MemoryKind
from vismem.models.reference import Base
from vismem.models.vismem import VisMemModel
from vismem.progress import progress
from vismem.provenance import file_hashes, lineage, write_manifest
from vismem.records import WITHOUT_GRAPHS, Metrics, ParityReport
from vismem.runtime.bundle import Bundle
from vismem.runtime.limits import MAX_NEW_TOKENS, MAX_PATCHES
from vismem.serving.answering import Runtime
from vismem.serving.golden import write_golden
from vismem.serving.metrics import PER_ANSWER


def export(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write the bundle into `out` and return the step's line.

    `vismem/`: what VisMem adds, and a reference to the base with the hash of its weights; `processor/`; with
    `export.graphs`, `onnx/`: four graphs in float32, all weights once, `runtime.json`, compared with torch in float32;
    `golden/`, questions with their answers, which a server asks before it serves the bundle. `parity.json`;
    `README.md`, the model card, with `scores.png`; `lineage.json`; `manifest.json`. Failed parity does not raise: the
    gate reads it. Raises UserError where metrics, test questions or a model that can be exported are missing.
    """
    empty_folder(out)
    metrics = Metrics.read(inputs["evaluate"])
    dtype = "float32" if config.export.graphs else config.base.dtype  # of graphs, whatever it was trained in
    model = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"], dtype)
    model.new_tokens = min(config.evaluate.max_new_tokens, MAX_NEW_TOKENS)  # what a request may ask for
    model.save_pretrained(out / "vismem")
    Base.of_step(inputs["base"]).write(out / "vismem")
    model.backbone.processor.save_pretrained(out / "processor")
    (out / "training").mkdir()
    for curve in inputs["stage2"].glob("*.csv"):
        shutil.copy(curve, out / "training")
    parity = _with_graphs(model, config, inputs, out) if config.export.graphs else WITHOUT_GRAPHS
    parity.write(out)
    origin = lineage(config, inputs["validate"] / "data", {name: inputs[name] for name in ("base", "stage2")})
    if metrics.invocation:
        used = metrics.invocation.overall
        origin[PER_ANSWER] = {kind.value: getattr(used, kind.value).per_answer for kind in MemoryKind}
    origin["revisions"] = [kept.model_dump() for kept in read_revisions(inputs["validate"])]
    (out / PICTURE).write_bytes(to_sheet(score_panels(metrics)))
    (out / "README.md").write_text(model_card(config, model, metrics, parity, origin))
    write_json(out / "lineage.json", origin | {"files": file_hashes(out)})
    write_manifest(out)
    if not parity.graphs:
        return f"bundle of what VisMem adds to {config.base.model}, without graphs: `vismem api` serves it"
    size = (out / "onnx" / WEIGHTS).stat().st_size / 1e6
    verdict = "equal to torch" if parity.passed else "NOT equal to torch"
    return (
        f"bundle with 4 graphs over {size:.1f} MB of weights; {verdict}: {parity.greedy_equal} of {parity.items} "
        f"answers, memories within {parity.max_memory_difference:.1e}"
    )


def _with_graphs(model: VisMemModel, config: Config, inputs: Mapping[str, Path], out: Path) -> ParityReport:
    """Write graphs and golden questions; compare answers to test questions with those of `model`, both in float32."""
    drawn = pick(inputs["validate"] / "data" / "test", config.export.parity_items, config.seed)
    samples = comparable(model, drawn, MAX_PATCHES)
    write_graphs(model, out / "onnx", config.export.opset)
    graphs, tokens = OnnxExecutor(Bundle(out, threads=1)), config.export.parity_tokens
    with progress("export: parity with torch"):
        parity = check_parity(model, graphs, samples, max_new_tokens=tokens, tolerance=config.export.tolerance)
    graphs.max_patches = MAX_PATCHES  # as a server's: it asks every golden question before it serves the bundle
    questions = [(sample.images, sample.question) for sample in samples if not sample.videos]
    with closing(Runtime(graphs)) as runtime:
        if not write_golden(runtime, questions, out) and questions:  # whole images and coarse ones count together
            raise UserError(too_large(MAX_PATCHES))
    return parity
