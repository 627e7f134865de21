"""A registered version as MLflow's users load it: `mlflow.pyfunc.load_model("models:/vismem@champion")`.

MLflow imports this module by the name that stands in the version's MLmodel, where VisMem must be installed. A bundle
with ONNX graphs answers by them, without torch.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from vismem.provenance import check_manifest
from vismem.registry import BUNDLE
from vismem.runtime.images import decoded_base64
from vismem.runtime.limits import MAX_PATCHES, RequestError, check_request
from vismem.serving.answering import Busy, Runtime
from vismem.serving.exchange import Answer, Token
from vismem.serving.pieces import Chunk

_SERVED = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # MLflow sets it where others ask: they name no files of that machine


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "Answering":
    """MLflow's entry. `model_config`: `threads` of graphs, or `dtype`, `device`, `base` (`VisMem.from_pretrained`).

    UserError where a file is not as the bundle's manifest says.
    """
    bundle, settings = Path(path) / BUNDLE, model_config or {}
    if (bundle / "onnx").is_dir():
        check_manifest(bundle)
        return Answering(Runtime.open(bundle, **{"max_patches": MAX_PATCHES, **settings}))
    from vismem.generation.torch_executor import TorchExecutor
    from vismem.inference import VisMem

    return Answering(Runtime(TorchExecutor(VisMem.from_pretrained(bundle, **settings).model)))


class Answering:
    """The model that MLflow wraps. Rows of a call are decoded together; MLflow fills in what a caller left out."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def predict(self, data: pd.DataFrame, params: Mapping[str, Any]) -> pd.DataFrame:
        """One row per question: the answer, the same with its memories marked, and how many tokens and memories."""
        with ThreadPoolExecutor(self.runtime.rows) as pool:
            return pd.DataFrame(pool.map(lambda row: self._whole(row, params), data.to_dict("records")))

    def predict_stream(self, data: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[str]:
        """The answer to one question piece by piece, with ⟨short⟩ and ⟨long⟩ where a memory is invoked."""
        pieces = (Token(chunk.text, chunk.event).marked for chunk in self._chunks(data, params))
        return filter(None, pieces)

    def _whole(self, row: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        chunks = list(self._chunks(row, params))
        answer = Answer.of([Token(chunk.text, chunk.event) for chunk in chunks], vars(chunks[-1].usage), 0.0)
        counts = {"tokens": answer.tokens, "memories": len(answer.invocations)}
        return {"answer": str(answer), "marked": answer.marked, **counts}

    def _chunks(self, row: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[Chunk]:
        """MlflowException where the request is at fault (a server's 400), or there is too much to do (503)."""
        try:
            question, files = row["question"], [_encoded(row["image"])]
            longest = params["max_new_tokens"]
            longest = self.runtime.executor.new_tokens if longest is None else longest
            images = check_request(files, question.encode(errors="surrogatepass"), longest)
            chunks = self.runtime.generate(images, question, **params)
            del files, images  # while the answer is decoded
            yield from chunks
        except RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except Busy as error:
            raise MlflowException(str(error), TEMPORARILY_UNAVAILABLE) from None


def _encoded(image: str) -> bytes:
    """The file: base64, as a data URL or bare; outside of a server also a path. RequestError where it is neither."""
    local = _SERVED not in os.environ
    if local and os.path.isfile(image):
        return Path(image).read_bytes()
    try:
        return decoded_base64(image)
    except ValueError:
        also = " nor the path of a file here" if local else ""
        raise RequestError(f"the image '{image[:60]}' is not base64{also}: send the encoded file as base64") from None
