"""The model NAME_unary: one request, one response, for clients without streams. It asks NAME and holds no weights."""

import contextlib
import json
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

MOST = 64  # requests at a time: more than NAME answers and lets wait, so that it refuses the surplus itself
MOST_BYTES = 90_000_000  # of one request, held until it is answered: more than NAME takes, also as base64
sys.dont_write_bytecode = True  # the repository stays as it was written
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Passes requests to NAME, many at a time, and joins the pieces of each answer.

    Triton 2.51 cancels no request that one model sends to another: NAME looks for a file that says that the client
    has gone.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Read the name."""
        folder = Path(args["model_repository"]).resolve() / args["model_version"]
        pb_utils.Logger.log_info(f"loading {args['model_name']} from {folder}")  # `vismem serve` reads it
        self.model = args["model_name"].removesuffix("_unary")
        sys.path.insert(0, str(folder))
        from vismem.runtime.access import close_shared_memory, own_token, token_refusal

        close_shared_memory()
        self.token, self.token_refusal = own_token(), token_refusal
        self.pool = ThreadPoolExecutor(MOST, thread_name_prefix="unary")
        self.free = threading.BoundedSemaphore(MOST)
        self.asking: dict[Path, Any] = {}  # the senders of running requests, by the file for that
        self.lock = threading.Lock()  # of `asking`: no sender is asked after its last response
        threading.Thread(target=self._look, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to a thread, which sends its response; one that is refused is not copied before."""
        for request in requests:
            authorization, sender = authorization_of(request), request.get_response_sender()
            if no_token := self.token_refusal(self.token, str(authorization.get("authorization", ""))):
                refused = pb_utils.TritonError(no_token, pb_utils.TritonError.INVALID_ARG)
            elif not self.free.acquire(blocking=False):
                refused = pb_utils.TritonError(
                    f"{MOST} requests are running: try again later", pb_utils.TritonError.UNAVAILABLE
                )
            else:
                try:
                    self.pool.submit(self._answer, inputs_of(request), authorization, sender)
                    continue
                except Exception as error:  # noqa: BLE001 - of this request alone: the others are answered
                    self.free.release()
                    refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse(error=refused), flags=FINAL)

    def finalize(self) -> None:
        """Wait for the running answers."""
        self.pool.shutdown()

    def _look(self) -> None:
        """Ten times a second: say of each request whether its client has gone."""
        while True:
            with self.lock:
                for gone in [file for file, sender in self.asking.items() if sender.is_cancelled()]:
                    gone.touch()
                    del self.asking[gone]
            time.sleep(0.1)

    def _answer(self, inputs: list[Any], authorization: dict[str, str], sender: Any) -> None:
        name = uuid.uuid4().hex
        gone = Path(f"/dev/shm/vismem-{name}")  # where Triton's own processes must be able to write
        with self.lock:
            self.asking[gone] = sender
        try:
            response = self._asked(
                [*inputs, pb_utils.Tensor("STREAM", np.array([False]))], {**authorization, "gone": name}
            )
        except Exception as error:  # noqa: BLE001 - the server's boundary; without a response the client would wait
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        with self.lock:
            self.asking.pop(gone, None)
        gone.unlink(missing_ok=True)
        try:
            sender.send(response, flags=FINAL)
        finally:
            self.free.release()

    def _asked(self, inputs: list[Any], parameters: dict[str, str]) -> Any:
        """NAME's answer as one response: TEXT, the whole answer, and USAGE. NAME's error where it sent one."""
        outputs = ["TEXT", "EVENT", "USAGE"]
        asked = pb_utils.InferenceRequest(
            model_name=self.model, requested_output_names=outputs, inputs=inputs, parameters=parameters
        )
        for response in asked.exec(decoupled=True):
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            if tensors := {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}:
                values = {"TEXT": b"".join(tensors["TEXT"]), "USAGE": tensors["USAGE"][-1]}
                outputs = [pb_utils.Tensor(name, np.array([value], dtype=object)) for name, value in values.items()]
                return pb_utils.InferenceResponse(outputs)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self.model} sent no answer"))


def inputs_of(request: Any) -> list[Any]:
    """Copies of a request's inputs: what it holds is gone once `execute` returns. ValueError: they are too large."""
    inputs, size = [], 0
    for tensor in request.inputs():
        array = np.array(tensor.as_numpy())
        size += sum(map(len, array.flat)) if array.dtype == object else array.nbytes
        if size > MOST_BYTES:
            raise ValueError(f"the request holds more than {MOST_BYTES} bytes")
        inputs.append(pb_utils.Tensor(tensor.name(), array))
    return inputs


def authorization_of(request: Any) -> dict[str, str]:
    """A request's header `Authorization`, which is a parameter here, for NAME to look at; none where it is no text."""
    with contextlib.suppress(UnicodeDecodeError):
        sent = json.loads(request.parameters() or "{}")
        return {name.lower(): value for name, value in sent.items() if name.lower() == "authorization"}
    return {}
