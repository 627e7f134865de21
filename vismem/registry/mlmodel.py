"""A bundle as a logged model that MLflow loads and serves: beside it MLmodel, pinned requirements, an input example.

The code is `vismem.pyfunc`, of the installed package: no code and nothing that unpickles is in the registry.
"""

import base64
import tempfile
from importlib import metadata
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from vismem.config import BaseConfig
from vismem.data.sample import StoredSamples
from vismem.errors import mask_credentials
from vismem.registry import BUNDLE
from vismem.registry.tracking import LARGE_FILES, Store
from vismem.services import environment

_INPUTS = {"image": "string", "question": "string"}
_OUTPUTS = {"answer": "string", "marked": "string", "tokens": "long", "memories": "long"}
# None: the evaluation's, which the bundle says
_PARAMS = ("memory", "string", "learned"), ("max_new_tokens", "long", None), ("temperature", "double", 0.0)
SIGNATURE = ModelSignature(
    *(Schema([ColSpec(kind, name) for name, kind in columns.items()]) for columns in (_INPUTS, _OUTPUTS)),
    ParamSchema([ParamSpec(*param) for param in (*_PARAMS, ("seed", "long", 0))]),
)
_ALWAYS = ("mlflow", "vismem", "numpy", "pandas", "pillow", "tokenizers")
_GRAPHS, _TORCH = ("onnxruntime",), ("torch", "transformers", "accelerate", "safetensors")


def log_bundle(store: Store, run_id: str, bundle: Path, test: Path, base: BaseConfig) -> str:
    """Keep the bundle as a logged model of the run; return its id.

    `test`: the folder of the test split; its first question about one image is the example. A bundle without graphs is
    served in the base's `dtype`, in which it was scored.
    """
    graphs, experiment = (bundle / "onnx").is_dir(), store.client.get_run(run_id).info.experiment_id
    params = {"base": mask_credentials(base.model)}
    model = store.client.create_logged_model(experiment, store.model, run_id, params=params, model_type="vismem")
    model_id = str(model.model_id)
    asked = (one for one in StoredSamples(test) if len(one.images) == 1 and not one.videos)
    example = next(
        ({"image": base64.b64encode(one.images[0]).decode(), "question": one.question} for one in asked), None
    )
    try:
        with environment(LARGE_FILES):
            store.client.log_model_artifacts(model_id, str(bundle), BUNDLE)
        with tempfile.TemporaryDirectory() as made:
            mlflow.pyfunc.save_model(
                beside := f"{made}/model",
                loader_module="vismem.pyfunc",
                mlflow_model=Model(model_id=model_id),
                signature=SIGNATURE,
                input_example=None if example is None else pd.DataFrame([example]),
                pip_requirements=[f"{n}=={metadata.version(n)}" for n in _ALWAYS + (_GRAPHS if graphs else _TORCH)],
                model_config={"threads": 1} if graphs else {"dtype": base.dtype, "device": None, "base": None},
                streamable=True,
            )
            store.client.log_model_artifacts(model_id, beside)
    except BaseException:
        store.client.finalize_logged_model(model_id, "FAILED")
        raise
    store.client.finalize_logged_model(model_id, "READY")
    return model_id
