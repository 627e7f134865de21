"""Questions a canary: those whose answers its bundle brings, and yours, which the version before it gets too."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from vismem.config import Config, JsonlSource
from vismem.data.clusters import cluster_ids
from vismem.data.readers import jsonl
from vismem.errors import UserError
from vismem.evaluation.answers import score
from vismem.evaluation.statistics import permutation_p
from vismem.serving.client import Client, own_client
from vismem.serving.exchange import (
    Answer,
    BusyError,
    DeadlineError,
    DisconnectedError,
    RefusedError,
    ServerError,
    UnauthorizedError,
)
from vismem.serving.golden import FILE, FOLDER, NEW_TOKENS
from vismem.serving.publish import Published

READY_SECONDS = 10.0  # for saying that it is ready
ALPHA = 0.05  # fewer right answers than the servers' with a smaller p are too few


class WrongAnswerError(UserError):
    """The canary answers, and not as it must: the version is at fault."""


def question_canary(config: Config, release: Published, own: Path, url: str, servers: str | None) -> str:
    """Ask the canary at `url` (gRPC host:port); the line that says how it went.

    `own`: JSON lines with reference answers, if the file is there; `servers`, with the version before, get them too.
    WrongAnswerError where a golden answer differs, a question fails, or significantly fewer own ones are answered right
    than by the servers. UserError where it, or the servers, cannot be reached, and for an own question that the servers
    refuse, too.
    """
    model, limit = config.deploy.model_name, config.evaluate.max_new_tokens
    _check_version(url, model, release.version)
    canary = own_client(url, model)
    golden = json.loads((release.bundle / FOLDER / FILE).read_text())
    for asked in golden:
        images = [(release.bundle / FOLDER / name).read_bytes() for name in asked["images"]]
        found = _ask(canary, images, asked["question"], NEW_TOKENS).marked
        if found != asked["answer"]:
            raise WrongAnswerError(f"it answers '{asked['question']}' by '{found}' instead of '{asked['answer']}'")
    told = f"the canary gave its {len(golden)} golden answers"
    if not own.is_file():
        return told
    samples = [sample for sample in jsonl.read(JsonlSource(kind="jsonl", path=own, split="test")) if not sample.videos]
    before = partial(own_client, servers, model) if servers else None
    right = [score(each, _ask(canary, each.images, each.question, limit, own.name, before)) for each in samples]
    told += f", {sum(right):g} of {len(samples)} of {own.name} right"
    if before is None or not samples:
        return told
    client = before()
    known = [score(sample, client.ask(sample.images, sample.question, max_new_tokens=limit)) for sample in samples]
    told += f", {sum(known):g} by the version before"
    p = permutation_p(np.array(right), np.array(known), np.array(cluster_ids(samples)))
    if sum(right) < sum(known) and p < ALPHA:
        raise WrongAnswerError(f"{told} (p = {p:.2g})")
    return told


def _ask(
    canary: Client,
    images: Sequence[bytes],
    question: str,
    limit: int,
    own: str = "",
    before: Callable[[], Client] | None = None,
) -> Answer:
    """The greedy answer. WrongAnswerError where the model fails or refuses the question.

    UserError where it refuses one of the file `own`, and the version before does, too: then neither is at fault.
    """
    try:
        return canary.ask(images, question, max_new_tokens=limit)
    except (BusyError, DeadlineError, DisconnectedError, UnauthorizedError):
        raise
    except ServerError as error:
        if own and isinstance(error, RefusedError) and (before is None or _refuses(before(), images, question)):
            raise UserError(f"{own}: '{question}' is refused: {error}; mend the file and run this again") from None
        raise WrongAnswerError(f"it fails at '{question}': {error}") from None


def _refuses(model: Client, images: Sequence[bytes], question: str) -> bool:
    try:
        model.ask(images, question, max_new_tokens=1)
    except UnauthorizedError:
        raise
    except RefusedError:
        return True
    return False


def _check_version(url: str, model: str, version: str) -> None:
    """UserError unless that version of the model answers at `url`."""
    try:
        with InferenceServerClient(url) as client:
            served = client.is_model_ready(model, version, client_timeout=READY_SECONDS)
    except InferenceServerException as error:
        raise UserError(f"no canary answers at {url}: {error.message()}") from None
    if not served:
        raise UserError(f"{url} does not serve version {version} of '{model}': another pod has answered")
