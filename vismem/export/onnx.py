"""Writes a VisMemModel as four ONNX graphs over one weight file, and `runtime.json`, all that the runtime must know.

Tensors are told apart by content: each lies once in `weights.bin`, however many graphs use it.
"""

import hashlib
import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import nn

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.export import WITH_GRAPHS
from vismem.export.graphs import Builder, Decoder, ShortMemory, VisionEncoder
from vismem.files import write_json
from vismem.generation.prompts import prompt_text
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel
from vismem.progress import progress
from vismem.runtime.bundle import FORMAT
from vismem.runtime.chat import IMAGE, Turn
from vismem.runtime.prompt import composed

WEIGHTS = "weights.bin"
INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference needs them
ALIGNMENT = 64
WITHOUT = "with `export.graphs: false` export writes what VisMem adds, which `vismem api` serves"
DYNAMIC = torch.export.Dim.DYNAMIC


@dataclass(frozen=True)
class Graph:
    """One graph to write: a module, example arguments, which axes vary, and the names of what goes in and out."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    varying: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class WeightFile:
    """Appends tensors to one file; the same content is written once."""

    file: BinaryIO
    places: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, array: NDArray[Any]) -> int:
        """The offset at which the array's bytes lie."""
        data = np.ascontiguousarray(array).data.cast("B")  # no copy: an embedding table has gigabytes
        key = (hashlib.sha256(data).hexdigest(), len(data))
        if key not in self.places:
            self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
            self.places[key] = self.file.tell()
            self.file.write(data)
        return self.places[key]


def write_graphs(model: VisMemModel, folder: Path, opset: int) -> None:
    """Write `vision.onnx`, `short.onnx`, `builder.onnx`, `decoder.onnx`, `weights.bin` and `runtime.json`.

    `model` must be in float32 on the CPU. Raises UserError for a family without graphs, and for a chat template that
    is not made of parts (see `prompt_parts`).
    """
    if model.backbone.family not in WITH_GRAPHS:
        known = ", ".join(WITH_GRAPHS)
        raise UserError(f"export writes graphs for {known} only, not for {model.backbone.family}: {WITHOUT}")
    folder.mkdir(parents=True, exist_ok=True)
    settings = runtime_settings(model)
    with (folder / WEIGHTS).open("wb") as file, torch.no_grad():
        weights = WeightFile(file)
        rows = torch.cat([model.tokens.invoke, model.tokens.end])
        for name, tensor in (("embedding", model.backbone.embedding.weight), ("memory_rows", rows)):
            array = tensor.detach().numpy()
            settings["tensors"][name] = {"offset": weights.add(array), "shape": list(array.shape)}
        graphs = graphs_of(model)
        with progress("export: graphs", len(graphs)) as advance:
            for graph in graphs:
                onnx_ir.save(_exported(graph, weights, opset), folder / f"{graph.name}.onnx")
                advance()
    write_json(folder / "runtime.json", settings)


def graphs_of(model: VisMemModel) -> list[Graph]:
    """The four graphs with example arguments; every axis that varies between requests is dynamic."""
    decoder, vision = Decoder(model), VisionEncoder(model)
    width, count = model.backbone.width, model.memory_config.queries
    past = [torch.randn(2, decoder.kv_heads, 3, decoder.head_dim) for _ in range(2 * len(decoder.layers))]
    past_names = [f"{part}_{layer}" for layer in range(len(decoder.layers)) for part in ("key", "value")]
    patches = 4 * model.backbone.merge
    stream = [torch.randn(vision.heads, patches, vision.width // vision.heads) for _ in range(2 * len(vision.full))]
    stream_names = [f"stream_{part}_{block}" for block in vision.full for part in ("key", "value")]
    pixels = torch.randn(patches, vision.patch_embed.proj.weight[0].numel())
    numbers = torch.arange(patches) // model.backbone.merge
    rows, both = {0: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}
    return [
        Graph(
            "vision",
            vision,
            (pixels, torch.rand(patches, 2), numbers, numbers.clone(), torch.ones(1)),  # one object would be one input
            (rows, rows, rows, rows, None),
            ("pixels", "positions", "windows", "images", "adapter"),
            ("features", "patch_embeds", *stream_names),
        ),
        Graph(
            "short",
            ShortMemory(model),
            (
                torch.randn(count, width),
                torch.randn(5, width),
                torch.rand(patches, 2),
                torch.randn(patches // model.backbone.merge, width),
                torch.randn(patches, vision.width),
                stream,
            ),
            (None, rows, rows, rows, rows, [{1: DYNAMIC}] * len(stream)),
            ("queries", "segment", "positions", "features", "patch_embeds", *stream_names),
            ("memory",),
        ),
        Graph("builder", Builder(model), (torch.randn(7, width),), (rows,), ("state",), ("queries", "long_tokens")),
        Graph(
            "decoder",
            decoder,
            (torch.randn(2, 5, width), torch.ones(2, 8), torch.rand(3, 2, 5), torch.zeros(2), past),
            (both, both, {1: DYNAMIC, 2: DYNAMIC}, rows, [{0: DYNAMIC, 2: DYNAMIC}] * len(past)),
            ("embeddings", "mask", "positions", "adapter", *(f"past_{name}" for name in past_names)),
            ("logits", "hidden", "memory", *(f"present_{name}" for name in past_names)),
        ),
    ]


def runtime_settings(model: VisMemModel) -> dict[str, Any]:
    """All numbers that decoding needs beside the graphs, as JSON values."""
    backbone, processor = model.backbone, model.backbone.processor
    images, config = processor.image_processor, backbone.model.model.language_model.config
    switches = ("do_resize", "do_rescale", "do_normalize")
    sizes = ("rescale_factor", "patch_size", "temporal_patch_size", "merge_size")
    return {
        "format": FORMAT,
        "weights": WEIGHTS,
        "new_tokens": model.new_tokens,
        "tensors": {},
        "width": backbone.width,
        "decoder": {
            "kv_heads": config.num_key_value_heads,
            "head_width": config.hidden_size // config.num_attention_heads,
            "max_positions": config.max_position_embeddings,
        },
        "memory": {
            "queries": model.memory_config.queries,
            "short_length": model.length_of(MemoryKind.SHORT),
            "long_length": model.length_of(MemoryKind.LONG),
            "pool_images": model.long.patches,
            "max_per_answer": model.invocation_config.max_per_answer,
            "anywhere": model.invocation_config.anywhere,
        },
        "tokens": {
            "image": backbone.model.config.image_token_id,
            "stop": list(model.stop_ids),
            "delimiters": list(model.delimiter_ids),
            "invoke": [model.invoke_ids[kind] for kind in MemoryKind],
            "end": [model.end_ids[kind] for kind in MemoryKind],
        },
        "prompt": prompt_parts(processor),
        "image": {
            **{name: getattr(images, name) for name in switches + sizes},
            "resample": int(images.resample),
            "mean": list(images.image_mean),
            "std": list(images.image_std),
            "min_pixels": images.size["shortest_edge"],
            "max_pixels": images.size["longest_edge"],
            "prompt_pixels": backbone.prompt_pixels,
            "window_size": backbone.model.model.visual.window_size,
        },
    }


def prompt_parts(processor: Any) -> dict[str, Any]:
    """The chat template taken apart: `joints` between turns (see `composed`), and what stands for an `image`.

    There are joints of as many kinds of turns as the template can say. Raises UserError where a question after, before
    or between images is not made of such parts.
    """

    def render(*turns: Turn) -> str:
        images = sum(turn.parts.count(IMAGE) for turn in turns)
        return prompt_text(processor, Sample(id="", images=(b"",) * images, question="", answer="", chat=turns))

    def joints_of(*roles: str) -> dict[str, str]:
        pieces = render(*(Turn(role, (mark,)) for role in roles)).split(mark)
        names = [f"{before} {after}" for before, after in pairwise(("start", *roles, "end"))]
        return dict(zip(names, pieces, strict=True))

    def made_of(joints: dict[str, str], *turns: Turn) -> bool:
        images = repeat(image, sum(turn.parts.count(IMAGE) for turn in turns))
        return render(*turns) == composed(joints, turns, images)

    mark, asked = "\u241ftext\u241f", Turn("user", ("one ", IMAGE, "\ntwo"))
    joints = joints_of("user")
    image = render(Turn("user", (IMAGE, mark))).removeprefix(joints["start user"]).split(mark)[0]
    for turn in (*(Turn("user", (IMAGE,) * count + ("one",)) for count in range(4)), asked):
        if not made_of(joints, turn):
            raise UserError(f"the base's chat template does not put images where they stand in the question: {WITHOUT}")
    if processor.image_token not in image:
        raise UserError(f"the base's chat template has no {processor.image_token} for an image: {WITHOUT}")
    more = (asked, Turn("assistant", (" three\n",)), asked)
    for turns in (more, (Turn("system", ("four",)), *more)):
        with suppress(TemplateError, ValueError):  # the template refuses such turns, or says other things
            found = joints_of(*(turn.role for turn in turns))
            if made_of(found | joints, *turns):
                joints = found | joints
    return {"joints": joints, "image": image, "image_token": processor.image_token}


def _exported(graph: Graph, weights: WeightFile, opset: int) -> onnx_ir.Model:
    """The graph with its large tensors in the weight file and nothing of this machine in its metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            graph.module.eval(),
            graph.arguments,
            dynamo=True,
            dynamic_shapes=graph.varying,
            opset_version=opset,
            input_names=graph.inputs,
            output_names=graph.outputs,
            verbose=False,
        )
    assert program is not None
    model = program.model
    initializers = list(model.graph.initializers.values())
    for value in initializers:
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= INLINE_BYTES:
            offset, shape, name = weights.add(tensor.numpy()), onnx_ir.Shape(tensor.numpy().shape), value.name or ""
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )
    nodes = list(model.graph.all_nodes())
    outputs = [output for node in nodes for output in node.outputs]
    parts: list[Any] = [model, model.graph, *model.graph.inputs, *initializers, *nodes, *outputs]
    for part in parts:
        part.metadata_props.clear()  # the exporter leaves stack traces and build paths behind
        part.doc_string = None
    return model
