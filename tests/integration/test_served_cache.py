"""What a server keeps of images and prompts: answers are the same with it, and work is done once. Both executors."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_families
import tiny_stages
from PIL import Image

from vismem.export.onnx import write_graphs
from vismem.generation.decode_state import DecodeState
from vismem.generation.onnx_executor import OnnxExecutor
from vismem.generation.torch_executor import TorchExecutor
from vismem.runtime.bundle import Bundle
from vismem.serving.answering import Runtime

Make = Callable[[int], Runtime]


@pytest.fixture(scope="module", params=["onnx", "qwen2_5_vl", "internvl", "llava_onevision"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A runtime with so many bytes of cache."""
    folder = tmp_path_factory.mktemp("model")
    family = "qwen2_5_vl" if request.param == "onnx" else request.param
    model = tiny_stages.eager_model(tiny_families.save_base(folder / "base", family))
    if request.param != "onnx":
        return lambda size: Runtime(TorchExecutor(model, cache_bytes=size))
    write_graphs(model, folder / "bundle" / "onnx", 18)
    model.backbone.processor.save_pretrained(folder / "bundle" / "processor")
    bundle = Bundle(folder / "bundle", threads=1)
    return lambda size: Runtime(OnnxExecutor(bundle, cache_bytes=size))


def counted(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often images were seen, and prompts read."""
    counts, executor = Counter[str](), runtime.executor
    if isinstance(executor, OnnxExecutor):
        places: Any = {"seen": (executor, "_see"), "read": (executor, "_decode")}
    else:
        places = {"seen": (executor.backbone, "features"), "read": (DecodeState, "prefill")}  # type: ignore[attr-defined]
    for name, (of, function) in places.items():
        original = getattr(of, function)

        def counting(*given: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += given[-1] != 1.0  # of the graphs, without those that memories are formed by
            return original(*given)

        monkeypatch.setattr(of, function, counting)
    return counts


def ask(runtime: Runtime, sample: Any, question: str | None = None, **options: Any) -> list[Any]:
    images = [Image.open(io.BytesIO(data)) for data in sample.images]
    options = {"max_new_tokens": 8, "memory": "off"} | options
    return [chunk.token for chunk in runtime.generate(images, question or sample.question, **options)]


def test_a_prompt_is_read_once_and_an_image_seen_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, sample = make(10**9), tiny.samples()[0]
    counts = counted(runtime, monkeypatch)
    first = ask(runtime, sample)
    assert counts == {"seen": 1, "read": 1}
    assert ask(runtime, sample) == first
    assert counts == {"seen": 1, "read": 1}
    ask(runtime, sample, "and now?")
    assert counts == {"seen": 1, "read": 2}
    ask(runtime, tiny.samples()[1], sample.question)  # another image
    assert counts == {"seen": 2, "read": 3}


def test_answers_are_those_without_a_cache(make: Make) -> None:
    without, with_much, with_little = make(0), make(10**9), make(20_000)
    samples = [sample for sample in tiny_families.samples() if sample.images][:3]
    for _ in range(2):
        for sample in samples:
            for options in (
                {"memory": "learned"},
                {"memory": "short"},
                {"memory": "off", "temperature": 1.0, "seed": 3},
            ):
                expected = ask(without, sample, **options)
                assert ask(with_much, sample, **options) == expected
                assert ask(with_little, sample, **options) == expected
    kept = with_little.executor.cache  # type: ignore[attr-defined]
    assert kept.held <= 20_000
    assert len(with_much.executor.cache.kept) >= 2 * len(samples)  # type: ignore[attr-defined]
    assert not without.executor.cache.kept  # type: ignore[attr-defined]
