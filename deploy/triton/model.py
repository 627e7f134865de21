"""Triton's side of a served VisMem model: requests become `Runtime.stream` calls, chunks become responses.

`vismem/serving/repository.py` copies this file beside the bundle and what it needs of the library. It holds no logic
of the model. Nothing that lies beside it is imported before it is verified.
"""

import contextlib
import hashlib
import itertools
import json
import locale
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Of optional inputs; that of MAX_NEW_TOKENS is the bundle's.
DEFAULTS = {"PROMPT": b"", "MESSAGES": b"", "TEMPERATURE": 0.0, "SEED": 0, "MEMORY": b"learned", "STREAM": True}
sys.dont_write_bytecode = True  # the repository stays as it was written
INTERVAL, GONE = "interval_ms", "gone"  # parameters of a request
LOOK_SECONDS = 0.02  # between two looks whether the client is still there
STOP_VARIABLE = "VISMEM_STOP_FILE"
locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # Triton's stub ignores the environment's: files would be read as ASCII


def verify(model: Path, version: str) -> None:
    """Compare the version's files with the model's manifest.json. RuntimeError names the first that differs."""
    listed: dict[str, str] = json.loads((model / "manifest.json").read_text())["files"]
    expected = {name: value for name, value in listed.items() if name.startswith(f"{version}/")}
    paths = (path for path in (model / version).rglob("*") if path.is_symlink() or not path.is_dir())
    found = {path.relative_to(model).as_posix() for path in paths}
    for name in sorted(expected.keys() | found):
        if name not in expected:
            raise RuntimeError(f"{model}/{name} is not in manifest.json: run `vismem deploy` again")
        if name not in found:
            raise RuntimeError(f"{model}/{name} is missing: run `vismem deploy` again")
        with (model / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                raise RuntimeError(f"{model}/{name} has changed: run `vismem deploy` again")


class TritonPythonModel:
    """One loaded version. Requests beyond `workers` wait in Triton's queue, where they can time out or be cancelled."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify this version's folder, then load the runtime and the bundle from it."""
        model = Path(args["model_repository"]).resolve()  # what is there while this version is served
        folder = model / args["model_version"]
        pb_utils.Logger.log_info(f"loading {args['model_name']} from {folder}")  # `vismem serve` reads it
        verify(model, args["model_version"])
        sys.path.insert(0, str(folder))
        from vismem.runtime.access import close_shared_memory, own_token, token_refusal
        from vismem.runtime.chat import parse_messages, said
        from vismem.runtime.limits import MAX_PATCHES, RequestError, check_request
        from vismem.serving.answering import Busy, Runtime
        from vismem.serving.golden import check_golden
        from vismem.serving.pieces import STOPPED
        from vismem.serving.request_log import RequestLog

        close_shared_memory()
        self.token, self.token_refusal = own_token(), token_refusal
        self.check_request, self.busy, self.stopped = check_request, Busy, STOPPED
        self.parse_messages, self.said, self.request_error = parse_messages, said, RequestError
        workers = int(os.environ.get("VISMEM_WORKERS", "8"))  # answers at a time; they are decoded together
        threads = int(os.environ.get("VISMEM_THREADS", "1"))  # of onnxruntime
        queue = json.loads(args["model_config"])["dynamic_batching"]["default_queue_policy"]
        self.deadline = int(queue["default_timeout_microseconds"]) / 1e6  # seconds
        max_patches = int(os.environ.get("VISMEM_MAX_PATCHES", MAX_PATCHES))
        self.runtime = Runtime.open(folder / "bundle", threads, max_patches=max_patches, rows=workers)
        check_golden(self.runtime, folder / "bundle")  # while the version before, if there is one, still answers
        self.runtime.metrics.show_evaluation(folder / "bundle")
        manifest = hashlib.sha256((folder / "bundle" / "manifest.json").read_bytes()).hexdigest()
        served = {"version": args["model_version"], "manifest_sha256": manifest}
        self.runtime.log = RequestLog.from_environment(served, self.runtime.metrics.logged)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="answer")
        self.free = threading.BoundedSemaphore(workers)
        self.running: set[Future[None]] = set()
        self.watched: dict[threading.Event, Callable[[], bool]] = {}  # to be set once the client has left
        self.watching = threading.Lock()
        self.draining = self.stopping = self.ended = False  # none begins; a running one ends at once; all have ended
        # The process, so that no two that serve one version at a time share a series: tritonserver 2.51 crashes then.
        labels = {"model": args["model_name"], "version": args["model_version"], "process": str(os.getpid())}
        self.reporter = threading.Thread(target=self._report, args=(labels,), daemon=True)
        self.reporter.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to a free worker; responses go out through the request's sender.

        While all workers are busy this waits, so that Triton's queue fills; no longer than the queue's deadline.
        """
        for request in requests:
            sender = request.get_response_sender()
            parameters = parameters_of(request)
            gone = client_gone(parameters, sender)
            if refused := self.token_refusal(self.token, str(parameters.get("authorization", ""))):
                error = failure(refused, pb_utils.TritonError.INVALID_ARG)
            elif self.draining:
                error = failure(self.stopped, pb_utils.TritonError.UNAVAILABLE)
            elif self._reserve_worker(gone):
                running = self.pool.submit(self._answer, request, parameters, sender, gone)
                self.running.add(running)
                running.add_done_callback(self.running.discard)
                continue
            else:
                self.runtime.metrics.refused.labels("busy").inc(not gone())
                error = failure(f"all workers were busy for {self.deadline:g} s", pb_utils.TritonError.UNAVAILABLE)
            sender.send(error, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _reserve_worker(self, gone: Callable[[], bool]) -> bool:
        """Wait for a free worker; False when the deadline has passed or the client has gone."""
        end = time.monotonic() + self.deadline
        while not self.free.acquire(timeout=0.1):
            if gone() or time.monotonic() > end:
                return False
        return True

    def finalize(self) -> None:
        """Stop the running answers at their next token."""
        self.stopping = True
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.runtime.log:
            self.runtime.log.close()
        self.ended = True
        self.reporter.join()

    def _report(self, labels: dict[str, str]) -> None:
        """Twice a second: show the runtime's counters among Triton's metrics, and look whether the server stops.

        Triton ends a model only after its running answers, so a file that STOP_VARIABLE names says it before; the file
        `drain` beside it asks for a file `idle-PID` once no answer runs. This thread alone touches metrics:
        tritonserver 2.51 crashes where two do.
        """
        stop = Path(os.environ.get(STOP_VARIABLE, "/nowhere/stop"))
        families: dict[str, Any] = {}
        shown: dict[tuple[str, ...], tuple[Any, float]] = {}
        last = False
        while not last:
            last = self.ended
            for family in self.runtime.metrics.registry.collect():
                kind = pb_utils.MetricFamily.GAUGE if family.type == "gauge" else pb_utils.MetricFamily.COUNTER
                for name, own, value in (sample[:3] for sample in family.samples):
                    if name.endswith("_created"):
                        continue
                    if (key := (name, *own.values())) not in shown:
                        if name not in families:
                            families[name] = pb_utils.MetricFamily(name, family.documentation, kind)
                        shown[key] = families[name].Metric(labels | own), 0.0
                    metric, before = shown[key]
                    metric.increment(value - before)
                    shown[key] = metric, value
            if self.draining and not self.running:
                stop.with_name(f"idle-{os.getpid()}").touch()
            self.draining = self.draining or stop.with_name("drain").exists()
            self.stopping = self.stopping or stop.exists()
            time.sleep(0 if last else 0.5)

    def _watch(self) -> None:
        """Let answers end whose client has left, also before their first token, and all where the server stops."""
        while not self.ended:
            with self.watching:  # an answer that has ended must not be asked about
                for left, gone in self.watched.items():
                    if self.stopping or gone():
                        left.set()
            time.sleep(LOOK_SECONDS)

    def _begin(self, request: Any, parameters: dict[str, Any], left: threading.Event) -> tuple[Any, float]:
        """The chunks of an answer, which hold no image, and the seconds of them that a response may collect."""
        files, prompt, messages, options, interval = read_request(request, parameters, self.runtime.executor.new_tokens)
        chat = self.parse_messages(messages) if messages else None
        asked = self.said(chat).encode(errors="surrogatepass") if chat else prompt
        images = self.check_request(files, asked, options["max_new_tokens"])
        options |= {"gone": left, "every": interval}
        return self.runtime.stream(images, chat or prompt.decode(), **options), interval

    def _answer(self, request: Any, parameters: dict[str, Any], sender: Any, gone: Callable[[], bool]) -> None:
        """Answer a request. A fault becomes an error response and ends this request only."""
        left = threading.Event()
        with self.watching:
            self.watched[left] = gone
        try:
            stream, interval = self._begin(request, parameters, left)
            with contextlib.closing(stream):
                for chunks in collected(stream, interval):
                    sender.send(response_of(chunks))
        except self.request_error as error:
            self.runtime.metrics.refused.labels("invalid").inc()
            sender.send(failure(str(error), pb_utils.TritonError.INVALID_ARG))
        except self.busy as error:
            sender.send(failure(self.stopped if self.stopping else str(error), pb_utils.TritonError.UNAVAILABLE))
        except Exception as error:  # noqa: BLE001 - the server's boundary: the reason is logged, other requests continue
            pb_utils.Logger.log_error(traceback.format_exc())
            sender.send(failure(f"the model failed: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL))
        finally:
            with self.watching:
                del self.watched[left]
            try:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            finally:
                self.free.release()


def read_request(
    request: Any, parameters: dict[str, Any], longest: int
) -> tuple[list[bytes], bytes, bytes, dict[str, Any], float]:
    """Image files, prompt, messages, options of `generate`, seconds that a response may collect; or a RequestError."""
    from vismem.runtime.images import image_file  # verified by now
    from vismem.runtime.limits import RequestError

    files, stop = list(map(image_file, _several(request, "IMAGE"))), _several(request, "STOP")
    values: dict[str, Any] = {**DEFAULTS, "MAX_NEW_TOKENS": longest}
    for name in values:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            value = tensor.as_numpy()
            if value.size != 1:
                raise RequestError(f"{name} must hold one value, not {value.size}")
            values[name] = value.item()
    prompt, messages, stream = bytes(values.pop("PROMPT")), bytes(values.pop("MESSAGES")), values.pop("STREAM")
    if prompt and messages:
        raise RequestError("PROMPT and MESSAGES are both there: send one of them")
    values["MEMORY"], values["STOP"] = decoded("MEMORY", values["MEMORY"]), [decoded("STOP", text) for text in stop]
    if not 0 <= values["TEMPERATURE"] <= 100:  # refuses NaN too
        raise RequestError(f"TEMPERATURE is {values['TEMPERATURE']}: it must lie in 0..100 (0 is greedy)")
    if values["SEED"] < 0:
        raise RequestError(f"SEED is {values['SEED']}: it must not be negative")
    milliseconds = parameters.get(INTERVAL, 0)
    if type(milliseconds) is not int or milliseconds < 0:
        raise RequestError(f"the parameter {INTERVAL} is {milliseconds!r}: it must be a number of milliseconds")
    interval = milliseconds / 1000 if stream else math.inf
    return files, prompt, messages, {name.lower(): value for name, value in values.items()}, interval


def parameters_of(request: Any) -> dict[str, Any]:
    """A request's parameters, among them its header `Authorization`; none where that is no text."""
    with contextlib.suppress(UnicodeDecodeError):
        return {name.lower(): value for name, value in json.loads(request.parameters() or "{}").items()}
    return {}


def client_gone(parameters: dict[str, Any], sender: Any) -> Callable[[], bool]:
    """Tells whether the client has gone; of a client of NAME_unary, `unary.py` says so with a file."""
    name = str(parameters.get(GONE))
    file = f"/dev/shm/vismem-{name}" if re.fullmatch("[0-9a-f]{32}", name) else ""
    return lambda: sender.is_cancelled() or os.path.exists(file)


def decoded(name: str, data: bytes) -> str:
    """An input's text. RequestError for one that is not UTF-8."""
    from vismem.runtime.limits import RequestError

    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RequestError(f"{name} is not UTF-8 text") from None


def _several(request: Any, name: str) -> list[bytes]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else [bytes(data) for data in tensor.as_numpy().reshape(-1)]


def collected(stream: Iterator[list[Any]], interval: float) -> Iterator[list[Any]]:
    """The chunks of each response: all if the interval is infinite, one if it is 0."""
    if interval == math.inf:
        yield list(itertools.chain(*stream))
    elif interval:
        yield from stream
    else:
        yield from ([chunk] for chunks in stream for chunk in chunks)


def failure(message: str, code: Any) -> Any:
    """An error response."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def response_of(chunks: list[Any]) -> Any:
    """A response with the outputs TEXT, EVENT and USAGE, one entry per chunk."""
    outputs = {
        "TEXT": [chunk.text.encode() for chunk in chunks],
        "EVENT": [chunk.event.encode() for chunk in chunks],
        "USAGE": [json.dumps(vars(chunk.usage)).encode() if chunk.usage else b"" for chunk in chunks],
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor(k, np.array(v, dtype=object)) for k, v in outputs.items()])
