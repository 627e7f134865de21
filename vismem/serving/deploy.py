"""Step deploy: the released version as a Triton model repository, smoke-tested over gRPC on a real tritonserver."""

import io
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.config import Config
from vismem.data.sample import Sample, iterate_samples
from vismem.errors import UserError
from vismem.files import write_json
from vismem.progress import progress
from vismem.provenance import MANIFEST, sha256_file
from vismem.records import EXAMPLE, Release
from vismem.serving.client import Client, challenger_name
from vismem.serving.exchange import Answer
from vismem.serving.repository import write_model_repository
from vismem.serving.server import triton_server


def deploy(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write `model_repository/`, `smoke.json`, its example's images and `tritonserver.log`; return the step's line.

    Reads export (the bundle), promote (`release.json`) and validate (test questions). A version that the gate refused
    is deployed as NAME_challenger, for trying out. Raises UserError if the server does not start or a check fails.
    """
    if not (inputs["export"] / "onnx").is_dir():
        raise UserError(
            f"{inputs['export']} has no ONNX graphs, and Triton serves nothing else: serve it by "
            f"`vismem api --model {inputs['export']}`, or export again with export.graphs true"
        )
    release = Release.read(inputs["promote"])
    promoted, version = release.promoted, int(release.version)
    model = config.deploy.model_name if promoted else challenger_name(config.deploy.model_name)
    repository = out / "model_repository"
    shutil.rmtree(repository, ignore_errors=True)
    manifest = write_model_repository(inputs["export"], repository, model, version) / MANIFEST
    rows = iterate_samples(inputs["validate"] / "data" / "test")
    samples = list(islice((sample for sample in rows if not sample.videos), 8))  # a bundle takes images only
    if not samples:
        raise UserError(f"{inputs['validate']}/data/test has no row without a video to smoke-test the server with")
    server_log = out / "tritonserver.log"
    with progress("deploy: tritonserver"), triton_server(repository, log=server_log) as server:
        smoke = smoke_test(server.grpc_url, model, samples)
    served = {"model": model, "version": version, "promoted": promoted, "manifest_sha256": sha256_file(manifest)}
    write_json(out / "smoke.json", served | smoke)
    example = next(sample for sample in samples if sample.id == smoke["id"])
    for number, image in enumerate(example.images, start=1):
        (out / f"{EXAMPLE}-{number}.{image_suffix(image)}").write_bytes(image)
    tested = f"{len(samples)} questions answered over gRPC, {smoke['latency_ms']['answer_p50']:.0f} ms at the median"
    if promoted:
        return f"deployed {model} version {version}: {tested}"
    reasons = "; ".join(release.reasons) or "no reason given"
    return f"NOT released, the gate refused version {version} ({reasons}): deployed as {model} for trying out; {tested}"


def image_suffix(image: bytes) -> str:
    """The file name's suffix that goes with an encoded image: png, jpeg or webp."""
    return str(Image.open(io.BytesIO(image)).format).lower()


def smoke_test(url: str, model: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Ask the served model real questions and one that it must refuse; return latencies and one example.

    Checks that no answer is empty, that streaming and collected answers agree, and that a broken image is refused
    while the server continues to answer. UserError names the first check that fails.
    """
    client = Client(f"grpc://{url}", model=model)
    answers: list[Answer] = []
    first_ms, answer_ms = [], []
    for sample in samples:
        started = time.perf_counter()
        pieces = client.stream(sample.images, sample.question)
        arrived = [(token, (time.perf_counter() - started) * 1000) for token in pieces]
        answers.append(Answer.of([token for token, _ in arrived], arrived[-1][0].usage or {}, arrived[-1][1] / 1000))
        if not answers[-1]:
            raise UserError(f"smoke test: {model} gave an empty answer to '{sample.question}' ({sample.id})")
        first_ms.append(arrived[0][1])
        answer_ms.append(arrived[-1][1])
    sample, answer = samples[0], answers[0]
    collected = client.ask(sample.images, sample.question)
    if collected.pieces != answer.pieces:
        raise UserError(
            f"smoke test: streamed and collected answers of {model} differ for {sample.id}: "
            f"'{answer.marked}' against '{collected.marked}'"
        )
    try:
        refused = client.ask([b"no image"], "What is this?")
    except UserError as error:
        if "does not decode" not in str(error):
            raise UserError(f"smoke test: a broken image is not refused as one that does not decode: {error}") from None
    else:
        raise UserError(f"smoke test: {model} answered '{refused}' to a broken image instead of refusing it")
    if client.ask(sample.images, sample.question).pieces != answer.pieces:
        raise UserError(f"smoke test: {model} answers {sample.id} differently after a refused request")
    remembered = [bool(answer.invocations) for answer in answers]
    example = remembered.index(True) if any(remembered) else 0  # one with a memory, if there is one
    return {
        "id": samples[example].id,
        "question": samples[example].question,
        "answer_marked": answers[example].marked,
        "answer": str(answers[example]),
        "reference": samples[example].answer,
        "latency_ms": {
            "first_token_p50": round(statistics.median(first_ms), 2),
            "answer_p50": round(statistics.median(answer_ms), 2),
            "answer_max": round(max(answer_ms), 2),
        },
        "items": len(answers),
        "items_with_memory": sum(remembered),
    }
