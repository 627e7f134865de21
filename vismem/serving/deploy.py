"""Step deploy: the released version behind a real server, asked: Triton where it has graphs, else `vismem api`."""

import io
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.config import Config
from vismem.data.sample import Sample, StoredSamples
from vismem.errors import UserError
from vismem.files import write_json
from vismem.progress import progress
from vismem.provenance import MANIFEST, sha256_file
from vismem.records import EXAMPLE, Release
from vismem.runtime.access import TOKEN_VARIABLE
from vismem.services import HOST, Service, check_http, free_ports, start_service
from vismem.serving.client import Client, challenger_name, own_client
from vismem.serving.exchange import Answer
from vismem.serving.repository import has_graphs, write_model_repository
from vismem.serving.server import triton_server

API_READY, API_ANSWER = 1800, 1800  # seconds: a large model is loaded, and may have no GPU here


def deploy(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    """Write `model_repository/`, `smoke.json`, its example's images and the server's log; return the step's line.

    Reads export (the bundle), promote (`release.json`) and validate (test questions). A version that the gate refused
    is deployed as NAME_challenger, for trying out. A bundle without graphs has no repository: `vismem api` serves it
    where it is. Raises UserError if the server does not start or a check fails, and for another bundle than the one
    that was judged.
    """
    release = Release.read(inputs["promote"])
    promoted, version = release.promoted, int(release.version)
    model = config.deploy.model_name if promoted else challenger_name(config.deploy.model_name)
    bundle, repository = inputs["export"], out / "model_repository"
    manifest = bundle / MANIFEST
    if release.manifest_sha256 and manifest.is_file() and sha256_file(manifest) != release.manifest_sha256:
        raise UserError(
            f"{bundle} is not what was judged as version {version}: run `vismem register` and `vismem promote` first"
        )
    shutil.rmtree(repository, ignore_errors=True)
    rows = StoredSamples(inputs["validate"] / "data" / "test")
    samples = list(islice((sample for sample in rows if not sample.videos), 8))  # a bundle takes images only
    if not samples:
        raise UserError(f"{inputs['validate']}/data/test has no row without a video to smoke-test the server with")
    if has_graphs(bundle):
        served_from = write_model_repository(bundle, repository, model, version)
        with progress("deploy: tritonserver"), triton_server(repository, log=out / "tritonserver.log") as server:
            smoke = smoke_test(own_client(server.grpc_url, model), samples)
    else:
        served_from = bundle
        running = api_server(bundle, model, config.base.dtype, out / "api.log")
        with progress("deploy: vismem api"), running as (address, _):
            smoke = smoke_test(Client(address, model=model, timeout=API_ANSWER), samples)
    hashed = sha256_file(served_from / MANIFEST)
    served = {"model": model, "version": version, "promoted": promoted, "manifest_sha256": hashed}
    write_json(out / "smoke.json", served | smoke)
    example = next(sample for sample in samples if sample.id == smoke["id"])
    for number, image in enumerate(example.images, start=1):
        (out / f"{EXAMPLE}-{number}.{image_suffix(image)}").write_bytes(image)
    tested = f"{len(samples)} questions answered by a server, {smoke['latency_ms']['answer_p50']:.0f} ms at the median"
    if promoted:
        return f"deployed {model} version {version}: {tested}"
    reasons = "; ".join(release.reasons) or "no reason given"
    return f"NOT released, the gate refused version {version} ({reasons}): deployed as {model} for trying out; {tested}"


def image_suffix(image: bytes) -> str:
    """The file name's suffix that goes with an encoded image: png, jpeg or webp."""
    return str(Image.open(io.BytesIO(image)).format).lower()


@contextmanager
def api_server(model: Path, name: str, dtype: str, log: Path) -> Iterator[tuple[str, Service]]:
    """`vismem api` on a model's folder, in a process of its own, ready to answer at the address, without a token."""
    address = f"http://{HOST}:{free_ports({'http': 0})['http']}"
    options = {"model": model, "name": name, "dtype": dtype, "port": address.rpartition(":")[2]}
    command = [sys.executable, "-m", "vismem.cli", "api", *(f"--{key}={value}" for key, value in options.items())]
    environment = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
    with start_service("vismem api", command, environment, log) as service:
        service.wait_until(lambda: check_http(f"{address}/health"), API_READY)
        yield address, service


def smoke_test(client: Client, samples: Sequence[Sample]) -> dict[str, Any]:
    """Ask the served model real questions and one that it must refuse; return latencies and one example.

    Checks that no answer is empty, that streaming and collected answers agree, and that a broken image is refused
    while the server continues to answer. UserError names the first check that fails.
    """
    model = client.model
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
