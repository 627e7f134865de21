"""A stand-in for the API server of Kubeflow Pipelines, v2beta1: as much of it as the `kfp` command line calls.

It keeps what it gets and answers as the real one does: fields are those of the client's own models and an unknown one
is refused, the pipeline is parsed as a PipelineSpec, parameters are checked against its inputs, errors have the
gateway's form. What it cannot do is run anything: a run goes from PENDING to its end by being asked about.
"""

import json
import re
import threading
import urllib.parse
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import kfp_server_api as api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

PREFIX = "/apis/v2beta1/"
KINDS = {  # what the server accepts for a parameter of that type
    "NUMBER_INTEGER": ((int, float), "double or integer", "the parameter value is not of number value type"),
    "NUMBER_DOUBLE": ((int, float), "double or integer", "the parameter value is not of number value type"),
    "STRING": (str, "string", "the input parameter is not of string value type"),
    "BOOLEAN": (bool, "bool", "the input parameter is not of bool value type"),
    "LIST": (list, "list", "the input parameter is not of list value type"),
    "STRUCT": (dict, "struct", "the input parameter is not of struct value type"),
}
INVALID_ARGUMENT, NOT_FOUND = (400, 3), (404, 5)  # HTTP status, gRPC code


class RefusedError(Exception):
    """An answer that is an error: HTTP status, gRPC code, message."""

    def __init__(self, kind: tuple[int, int], message: str) -> None:
        super().__init__(message)
        self.status, self.code = kind


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str  # below /apis/v2beta1/
    query: dict[str, str]
    body: Any
    authorization: str | None


class KfpApi:
    """The running server, as a context manager; `endpoint` is its address, `requests` what it was asked, in order.

    `fail` maps "METHOD path" to an HTTP status and a message that it is to answer instead. `outcome` is how runs end.
    """

    def __init__(self, *, multi_user: bool = False, outcome: str = "SUCCEEDED") -> None:
        self.multi_user, self.outcome = multi_user, outcome
        self.requests: list[Request] = []
        self.fail: dict[str, tuple[int, str]] = {}
        self.experiments: dict[str, Any] = {}
        self.runs: dict[str, Any] = {}
        self.recurring_runs: dict[str, Any] = {}
        self._client = api.ApiClient()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                outer._handle(self)

            do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests to that path."""
        return [request for request in self.requests if (request.method, request.path) == (method, path)]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        address = urllib.parse.urlsplit(handler.path)
        data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else None
        query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
        identity = handler.headers.get("Authorization")
        request = Request(handler.command, address.path.removeprefix(PREFIX), query, body, identity)
        self.requests.append(request)
        try:
            if (failure := self.fail.get(f"{request.method} {request.path}")) is not None:
                raise RefusedError((failure[0], 13), failure[1])
            status, answer = 200, self._answer(request)
        except RefusedError as error:
            status, answer = error.status, {"code": error.code, "message": str(error), "details": []}
        text = json.dumps(self._client.sanitize_for_serialization(answer)).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def _answer(self, request: Request) -> Any:
        kind, _, rest = request.path.partition("/")
        name, _, verb = rest.partition(":")
        match request.method, kind, name, verb:
            case "GET", "healthz", "", "":
                return api.V2beta1GetHealthzResponse(multi_user=self.multi_user, pipeline_store="database")
            case "GET", "experiments", "", "":
                found = self._in_namespace(request, self.experiments.values())
                return api.V2beta1ListExperimentsResponse(experiments=found or None, total_size=len(found))
            case "POST", "experiments", "", "":
                return self._create_experiment(self._read(request.body, "V2beta1Experiment"))
            case "POST", "runs", "", "":
                return self._create_run(self._read(request.body, "V2beta1Run"))
            case "GET", "runs", "", "":
                found = self._of_experiment(request, self.runs.values())
                return api.V2beta1ListRunsResponse(runs=found or None, total_size=len(found))
            case "POST", "recurringruns", "", "":
                return self._create_recurring_run(self._read(request.body, "V2beta1RecurringRun"))
            case "GET", "recurringruns", "", "":
                found = self._of_experiment(request, self.recurring_runs.values())
                return api.V2beta1ListRecurringRunsResponse(recurring_runs=found or None, total_size=len(found))
            case "GET" | "POST" | "DELETE", "runs" | "recurringruns", _, _ if name:
                return self._one(request.method, kind, name, verb)
        raise RefusedError(NOT_FOUND, "Not Found")

    def _one(self, method: str, kind: str, name: str, verb: str) -> Any:
        """What is asked about, or done to, one run or recurring run."""
        kept = self.runs if kind == "runs" else self.recurring_runs
        if name not in kept:
            what = "Run" if kind == "runs" else "Job"
            raise RefusedError(NOT_FOUND, f"ResourceNotFoundError: {what} {name} not found")
        item = kept[name]
        match method, kind, verb:
            case "GET", "runs", "":
                before = item.state
                item.state = {"PENDING": "RUNNING", "RUNNING": self.outcome}.get(before, before)
                return self._with_state(item, before)
            case "GET", _, "":
                return item
            case "DELETE", _, "":
                del kept[name]
            case "POST", "runs", "terminate":
                item.state = "CANCELING"
            case "POST", "runs", "retry":
                if item.state not in ("FAILED", "CANCELED"):
                    raise RefusedError(INVALID_ARGUMENT, f"Run {name} cannot be retried: it has not failed")
                item.state = "RUNNING"
            case "POST", "runs", "archive":
                item.storage_state = "ARCHIVED"
            case "POST", "recurringruns", "enable" | "disable":
                item.status, item.mode = f"{verb}d".upper(), verb.upper()
            case _:
                raise RefusedError(NOT_FOUND, "Not Found")
        return {}

    @staticmethod
    def _with_state(item: Any, state: str) -> Any:
        shown = api.V2beta1Run(**{name: getattr(item, name) for name in item.openapi_types})
        shown.state = state
        return shown

    def _create_experiment(self, experiment: Any) -> Any:
        if self.multi_user and not experiment.namespace:
            raise RefusedError(INVALID_ARGUMENT, "An experiment cannot have an empty namespace in multi-user mode")
        if not experiment.display_name:
            raise RefusedError(INVALID_ARGUMENT, "Invalid input error: Experiment must have a non-empty name")
        if not self.multi_user:
            experiment.namespace = None
        experiment.experiment_id, experiment.created_at = str(uuid.uuid4()), _now()
        experiment.storage_state = "AVAILABLE"
        self.experiments[experiment.experiment_id] = experiment
        return experiment

    def _create_run(self, run: Any) -> Any:
        if not run.display_name:
            raise RefusedError(INVALID_ARGUMENT, "Invalid input error: The run name is empty")
        self._check(run)
        run.run_id, run.created_at, run.scheduled_at = str(uuid.uuid4()), _now(), _now()
        run.finished_at = datetime.fromtimestamp(0, UTC)
        run.storage_state, run.state = "AVAILABLE", "PENDING"
        run.state_history = [api.V2beta1RuntimeStatus(update_time=_now(), state="PENDING")]
        run.service_account = run.service_account or "pipeline-runner"
        self.runs[run.run_id] = run
        return run

    def _create_recurring_run(self, recurring: Any) -> Any:
        if not recurring.display_name:
            raise RefusedError(INVALID_ARGUMENT, "Invalid input error: The recurring run name is empty")
        self._check(recurring)
        recurring.recurring_run_id, recurring.created_at, recurring.updated_at = str(uuid.uuid4()), _now(), _now()
        recurring.status = "ENABLED" if recurring.mode == "ENABLE" else "DISABLED"
        self.recurring_runs[recurring.recurring_run_id] = recurring
        return recurring

    def _check(self, run: Any) -> None:
        """The experiment, the pipeline and the parameters of a run or recurring run, as the real server checks them."""
        if run.experiment_id not in self.experiments:
            raise RefusedError(NOT_FOUND, f"ResourceNotFoundError: Experiment {run.experiment_id} not found")
        spec = parse_pipeline(run.pipeline_spec)
        check_parameters(spec, (run.runtime_config and run.runtime_config.parameters) or {})

    def _in_namespace(self, request: Request, items: Any) -> list[Any]:
        """The experiments that the filter lets through, in the namespace asked for."""
        namespace = request.query.get("namespace") or ""
        if self.multi_user and not namespace:
            raise RefusedError(INVALID_ARGUMENT, "An experiment cannot have an empty namespace in multi-user mode")
        wanted = json.loads(request.query.get("filter") or "{}").get("predicates", [])
        for predicate in wanted:
            assert predicate["operation"] in (1, "EQUALS"), predicate
            items = [item for item in items if getattr(item, predicate["key"]) == predicate["stringValue"]]
        return [item for item in items if not self.multi_user or item.namespace == namespace]

    def _of_experiment(self, request: Request, items: Any) -> list[Any]:
        experiment = request.query.get("experiment_id")
        return [item for item in items if not experiment or item.experiment_id == experiment]

    def _read(self, body: Any, model: str) -> Any:
        """The body as the client's own model. An unknown field is refused."""
        _check_fields(body, model)
        return self._client.deserialize(SimpleNamespace(data=json.dumps(body)), model)


def parse_pipeline(document: Any) -> Any:
    """The PipelineSpec of what a run brings: a spec, or a spec and a platform spec."""
    spec, platform = document, None
    if isinstance(document, dict) and "pipeline_spec" in document:
        spec, platform = document["pipeline_spec"], document.get("platform_spec")
    try:
        parsed = json_format.ParseDict(spec or {}, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(platform or {}, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        raise RefusedError(INVALID_ARGUMENT, f"Invalid input error: invalid v2 pipeline spec: {error}") from None
    if parsed.schema_version != "2.1.0":
        raise RefusedError(
            INVALID_ARGUMENT,
            "KFP only supports schema version 2.1.0, but the pipeline spec has version " + parsed.schema_version,
        )
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", parsed.pipeline_info.name):
        raise RefusedError(INVALID_ARGUMENT, f"invalid v2 pipeline spec: name '{parsed.pipeline_info.name}'")
    return parsed


def check_parameters(spec: Any, given: dict[str, Any]) -> None:
    """As the server's validatePipelineJobInputs: none missing, none of another type, none that no one asked for."""
    wanted = spec.root.input_definitions.parameters
    for name, parameter in wanted.items():
        if name not in given:
            if not parameter.is_optional and not parameter.HasField("default_value"):
                message = f"parameter {name} is not optional, yet has neither default value nor user provided value"
                raise RefusedError(INVALID_ARGUMENT, f"Invalid input error: {message}")
            continue
        type_name = pipeline_spec_pb2.ParameterType.ParameterTypeEnum.Name(parameter.parameter_type)
        kinds, what, otherwise = KINDS[type_name]
        value = given[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            message = f"input parameter {name} requires type {what}, but {otherwise}"
            raise RefusedError(INVALID_ARGUMENT, f"Failed to create a new run: Invalid input error: {message}")
    if extra := sorted(set(given) - set(wanted)):
        message = f"parameter(s) provided are not required by pipeline: {', '.join(extra)}"
        raise RefusedError(INVALID_ARGUMENT, f"Failed to create a new run: Invalid input error: {message}")


def _check_fields(body: Any, model: str) -> None:
    """Refuse a field that the model, or one within it, does not have."""
    known = getattr(api, model)
    names = {known.attribute_map[name]: kind for name, kind in known.openapi_types.items()}
    for key, value in body.items():
        if key not in names:
            raise RefusedError(INVALID_ARGUMENT, f'proto: unknown field "{key}" of {model}')
        if isinstance(value, dict) and names[key].startswith("V2beta1"):
            _check_fields(value, names[key])


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
