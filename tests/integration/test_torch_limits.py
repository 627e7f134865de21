"""What one question may take of the torch executor: counted before any image is decoded, in every family."""

from typing import Any

import pytest
import tiny_families as families
import tiny_stages

from vismem.generation.prompts import inputs_of
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.vismem import VisMemModel
from vismem.runtime.chat import one_turn
from vismem.runtime.limits import RequestError

SAMPLES = [sample for sample in families.samples() if sample.images]


@pytest.fixture(scope="module", params=families.VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisMemModel:
    return tiny_stages.eager_model(families.save_base(tmp_path_factory.mktemp("base"), request.param))


def prepare(executor: TorchExecutor, sample: Any, tokens: int = 4) -> Any:
    return executor.prepare(families.pictures(sample), one_turn(sample.question, len(sample.images)), tokens)


def test_patches_are_counted_as_they_are_cut_and_beyond_the_limit_refused(model: VisMemModel) -> None:
    for sample in SAMPLES:
        inputs = inputs_of(model.backbone, [sample])
        cut = int(model.backbone.placed(inputs, model.backbone.features(inputs)).vision.mask.sum())
        sizes = [picture.size for picture in families.pictures(sample)]
        assert sum(model.backbone.patch_counts(sizes)) == cut > 0
        prepare(TorchExecutor(model, max_patches=cut), sample)
        with pytest.raises(RequestError, match=f"the images make {cut} patches: the limit is {cut - 1}"):
            prepare(TorchExecutor(model, max_patches=cut - 1), sample)


def test_an_answer_that_would_need_more_positions_than_there_are_is_refused(model: VisMemModel) -> None:
    executor, sample = TorchExecutor(model), SAMPLES[0]
    held = model.backbone.model.config.text_config.max_position_embeddings
    prompt = int(inputs_of(model.backbone, [sample]).positions.max()) + 1
    memories = model.limit(None) * (max(model.memory_config.short_length, model.memory_config.long_length) + 2)
    prepare(executor, sample, held - prompt - memories)
    with pytest.raises(RequestError, match=f"need {held + 1} positions, the model has {held}"):
        prepare(executor, sample, held - prompt - memories + 1)
