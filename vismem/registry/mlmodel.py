"""What MLflow needs beside a registered bundle to load and serve it: MLmodel, pinned requirements, an input example.

The code is `vismem.pyfunc`, of the installed package: no code and nothing that unpickles is in the registry.
"""

import base64
import itertools
from importlib import metadata
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from vismem.data.sample import iterate_samples
from vismem.runtime.limits import NEW_TOKENS

LOADER = "vismem.pyfunc"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "image"), ColSpec("string", "question")]),
    outputs=Schema(
        [
            ColSpec("string", "answer"),
            ColSpec("string", "marked"),
            ColSpec("long", "tokens"),
            ColSpec("long", "memories"),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("memory", "string", "learned"),
            ParamSpec("max_new_tokens", "long", NEW_TOKENS),
            ParamSpec("temperature", "double", 0.0),
            ParamSpec("seed", "long", 0),
        ]
    ),
)
_ALWAYS = ("mlflow", "vismem", "numpy", "pandas", "pillow", "tokenizers")
_GRAPHS, _TORCH = ("onnxruntime",), ("torch", "transformers", "accelerate", "safetensors")


def write_mlmodel(bundle: Path, test: Path, dtype: str, model_id: str, folder: Path) -> None:
    """Write these files into `folder`, which is made.

    `test`: the folder of the test split; its first question about one image is the example. `dtype`: that of torch,
    for a bundle without graphs.
    """
    graphs = (bundle / "onnx").is_dir()
    asked = (sample for sample in iterate_samples(test) if len(sample.images) == 1 and not sample.videos)
    example = [
        {"image": base64.b64encode(sample.images[0]).decode(), "question": sample.question}
        for sample in itertools.islice(asked, 1)
    ]
    mlflow.pyfunc.save_model(
        folder,
        loader_module=LOADER,
        mlflow_model=Model(model_id=model_id),
        signature=SIGNATURE,
        input_example=pd.DataFrame(example) if example else None,
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in _ALWAYS + (_GRAPHS if graphs else _TORCH)],
        model_config={"threads": 1} if graphs else {"dtype": dtype, "device": None, "base": None},
        streamable=True,
    )
