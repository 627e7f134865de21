"""A model of Kubeflow Pipelines: which pods a compiled pipeline makes of given arguments, and what each of them gets.

Rules: kubeflow/pipelines 2.17, backend/src/v2 (compiler, driver, metadata, launcher). Those of a single pod are in
kfp_argo.py and kfp_driver.py. Tasks take turns. What a container returns is the caller's to say.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import Any

import kfp_argo as argo
import kfp_driver as driver
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kfp_api import check_parameters

Values = dict[str, Any]

CONDITION = re.compile(r"(!\()?inputs\.parameter_values\['(.+?)'\] == '(.*?)'\)?")
DONE = ("COMPLETE", "CACHED", "CANCELED")  # CANCELED: its condition does not hold


class PodEndedError(Exception):
    """How a pod ended that did not succeed: FAILED (its launcher said so), or LOST (killed with its launcher)."""


@dataclass(frozen=True)
class Pod:
    """The pod of a task."""

    task: str
    manifest: Values
    inputs: Values  # the parameters, resolved
    command: list[str]  # what Kubeflow's launcher runs in it
    made: Values  # its output artifacts; what runs it may add metadata to them
    key: str | None  # in the cache; None: it is never looked up
    tries: dict[str, str]  # as argo.tried_again takes it

    @property
    def main(self) -> Values:
        """Its container."""
        main: Values = self.manifest["spec"]["containers"][0]
        return main

    @property
    def env(self) -> Values:
        """Variables by name: the value, or the secret and the key in it."""
        found: Values = {}
        for variable in self.main["env"]:
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            found[variable["name"]] = (secret["name"], secret["key"]) if secret else variable.get("value")
        return found

    @property
    def volumes(self) -> Values:
        """The volume at each path."""
        named = {volume["name"]: volume for volume in self.manifest["spec"]["volumes"]}
        return {mount["mountPath"]: named[mount["name"]] for mount in self.main["volumeMounts"]}


@dataclass
class Group:
    """A DAG that runs: its inputs, and of its tasks the states and outputs in ML Metadata."""

    name: str
    component: Values
    inputs: Values
    artifacts: Values
    parent: "Group | None" = None
    states: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Values] = field(default_factory=dict)

    @property
    def tasks(self) -> Values:
        """The tasks by name."""
        tasks: Values = self.component["dag"]["tasks"]
        return tasks

    def count(self) -> None:
        """What a launcher does at its end, and nobody else: set the group's state, and that of the ones around it."""
        if self.parent is None:
            return
        if sum(state in DONE for state in self.states.values()) == len(self.tasks):
            self.parent.states[self.name] = "COMPLETE"
        elif "FAILED" in self.states.values():
            self.parent.states[self.name] = "FAILED"
        else:
            return
        self.parent.count()


class Kubeflow:
    """A cluster with its cache and artifact store.

    `execute` runs a pod and gives its output parameters, or raises PodEndedError.
    """

    def __init__(self, execute: Callable[[Pod], Values], store: str = "minio://mlpipeline/v2/artifacts") -> None:
        self.execute, self.store = execute, store
        self.cache: dict[str, Values] = {}
        self.numbers = count(1)

    def run(
        self, pipeline: str, arguments: Mapping[str, Any] | None = None, ends: Mapping[str, list[str]] | None = None
    ) -> dict[str, Pod]:
        """The pods of a run of the compiled pipeline, in their order; a task that is tried again has one.

        `ends`: of tasks by name, how their first pods end instead of being executed: FAILED or LOST, see PodEndedError.
        Raises kfp_api.RefusedError for arguments that the API server refuses.
        """
        self.spec, *platform = _read(pipeline)
        given = dict(arguments or {})
        check_parameters(json_format.ParseDict(self.spec, pipeline_spec_pb2.PipelineSpec()), given)
        self.settings = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
        self.pods: dict[str, Pod] = {}
        self.ends, self.name = ends or {}, f"{self.spec['pipelineInfo']['name']}-{next(self.numbers)}"
        ports = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        defaults = {name: port.get("defaultValue") for name, port in ports.items()}
        self.run_group(Group("root", self.spec["root"], defaults | given, {}))
        return self.pods

    def run_group(self, group: Group) -> bool:
        """Run its tasks; returns whether Argo calls it succeeded: none failed, some may be skipped."""
        ended: dict[str, bool | None] = {}
        while waiting := sorted(set(group.tasks) - set(ended)):
            ready = [task for task in waiting if set(argo.depends(group.tasks[task])) <= set(ended)]
            ended |= dict.fromkeys(ready)  # where a task before them did not succeed, or their condition does not hold
            for name, inputs in [(name, self.drive(name, group, ended)) for name in ready]:
                if inputs is not None:
                    ended[name] = self.run_task(name, inputs, group)
        return False not in ended.values()

    def drive(self, name: str, group: Group, ended: Mapping[str, bool | None]) -> Values | None:
        """What a driver does for a task whose turn it is: resolve its inputs; None for one that is not to run.

        Drivers of tasks that may start at once are done before the first of these tasks ends.
        """
        task = group.tasks[name]
        if not argo.is_exit(task) and not all(ended[before] for before in argo.depends(task)):
            return None
        inputs = self.inputs(task, group)
        condition = task.get("triggerPolicy", {}).get("condition")
        group.states[name] = "RUNNING" if condition is None or _holds(condition, inputs) else "CANCELED"
        return inputs if group.states[name] == "RUNNING" else None

    def run_task(self, name: str, inputs: Values, group: Group) -> bool:
        """Run a task, or a group within the group; returns whether it succeeded."""
        component = self.component(group.tasks[name])
        artifacts = self.artifacts(group.tasks[name], group)
        if "dag" in component:
            return self.run_group(Group(name, component, inputs, artifacts, group))
        return self.run_container(name, component, inputs, artifacts, group)

    def component(self, task: Values) -> Values:
        """What the task runs."""
        found: Values = self.spec["components"][task["componentRef"]["name"]]
        return found

    def run_container(self, name: str, component: Values, inputs: Values, artifacts: Values, group: Group) -> bool:
        """Take a task from the cache, or make its pod and let it run."""
        task = group.tasks[name]
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        settings = self.settings.get(component["executorLabel"], {})
        defined = component.get("outputDefinitions", {})
        key = None
        if task.get("cachingOptions", {}).get("enableCache"):
            claims = [self.resolve(mount["pvcNameParameter"], group) for mount in settings.get("pvcMount", [])]
            key = driver.fingerprint(
                inputs, {port: [made["name"]] for port, made in artifacts.items()}, defined, container, claims
            )
        if key in self.cache:
            group.states[name], group.outputs[name] = "CACHED", self.cache[key]
            return True
        outputs = self.outputs(name, defined)
        lists = {port: {"artifacts": [made]} for port, made in artifacts.items()}
        executor_input = {"inputs": {"parameterValues": inputs, "artifacts": lists}, "outputs": outputs}
        made = {port: listed["artifacts"][0] for port, listed in outputs["artifacts"].items()}
        pod = self.pods[name] = self.pod(name, task, container, settings, executor_input, made, key, group)
        for number in count(1):
            group.states[name] = "RUNNING"
            ending, returned = self.attempt(pod, number)
            if ending == "COMPLETE":
                assert set(returned) == set(defined.get("parameters", {})), name
                held = {port: {**artifact, "name": str(next(self.numbers))} for port, artifact in made.items()}
                group.outputs[name] = {"parameters": returned, "artifacts": held}
                self.cache |= {key: group.outputs[name]} if key else {}
            if ending != "LOST":
                group.states[name] = ending
                group.count()
            if ending == "COMPLETE" or not argo.tried_again(pod.tries, "Failed", number, 0):
                break
        return ending == "COMPLETE"

    def attempt(self, pod: Pod, number: int) -> tuple[str, Values]:
        """How the task's pod of that number, from 1, ends: as is planned, or as it is executed; and its parameters."""
        planned = self.ends.get(pod.task, [])
        if number <= len(planned):
            return planned[number - 1], {}
        try:
            return "COMPLETE", self.execute(replace(pod, manifest=argo.filled_in(pod.manifest, number)))
        except PodEndedError as ended:
            return str(ended), {}

    def inputs(self, task: Values, group: Group) -> Values:
        """The parameters of a task. What is null, or missing though optional, is left out."""
        found = {}
        for port, source in task.get("inputs", {}).get("parameters", {}).items():
            if "taskFinalStatus" in source:
                of = source["taskFinalStatus"]["producerTask"]
                status = {"state": group.states[of], "pipelineTaskName": of, "error": {}}  # it fills in no error
                found[port] = {**status, "pipelineJobResourceName": self.name}
            elif (value := self.resolve(source, group)) is not None:
                found[port] = value
        for port, of in self.component(task).get("inputDefinitions", {}).get("parameters", {}).items():
            assert port in found or of.get("isOptional") or "defaultValue" in of, f"no {port} for {task}"
        return found

    def artifacts(self, task: Values, group: Group) -> Values:
        """The artifacts that a task reads; the name of each is its number in ML Metadata."""
        found = {}
        for port, source in task.get("inputs", {}).get("artifacts", {}).items():
            if made := source.get("taskOutputArtifact"):
                found[port] = group.outputs[made["producerTask"]]["artifacts"][made["outputArtifactKey"]]
            else:
                found[port] = group.artifacts[source["componentInputArtifact"]]
        return found

    def resolve(self, source: Values, group: Group) -> Any:
        """The value of a parameter: an input of the group, an output of one of its tasks, or a constant."""
        if "componentInputParameter" in source:
            return group.inputs[source["componentInputParameter"]]
        if made := source.get("taskOutputParameter"):
            return group.outputs[made["producerTask"]]["parameters"][made["outputParameterKey"]]
        constant = source["runtimeValue"]["constant"]
        return self.name if constant == "{{$.pipeline_job_uuid}}" else constant

    def outputs(self, name: str, defined: Values) -> Values:
        """Where the outputs of a task go: a folder of the store that no other task has."""
        root = f"{self.store}/{self.name}/{name}/{next(self.numbers)}"
        kinds = {port: of["artifactType"] for port, of in defined.get("artifacts", {}).items()}
        kinds["executor-logs"] = driver.LOGS
        made = {port: [{"name": port, "type": kind, "uri": f"{root}/{port}"}] for port, kind in kinds.items()}
        return {
            "artifacts": {port: {"artifacts": listed} for port, listed in made.items()},
            "parameters": {port: {"outputFile": f"/tmp/kfp/outputs/{port}"} for port in defined.get("parameters", {})},
            "outputFile": f"/{root.replace('://', '/')}/output_metadata.json",
        }

    def pod(
        self, name: str, task: Values, container: Values, settings: Values, executor_input: Values, made: Values,
        key: str | None, group: Group,
    ) -> Pod:  # fmt: skip
        """The pod as it is posted, but for what Argo's controller adds to it."""
        inputs = executor_input["inputs"]["parameterValues"]
        spec = driver.pod_spec(task, container, settings, inputs, lambda source: self.resolve(source, group))
        words = [driver.fill_in(word, inputs) for word in (*container.get("command", []), *container.get("args", []))]
        sent = json.dumps(executor_input)
        spec["containers"][0]["command"] = ["/kfp-launcher/launch", "--executor_input", sent, "--"]
        spec["containers"][0]["args"] = words
        given = settings.get("podMetadata", {})
        metadata = {"name": f"{self.name}-{name}", "labels": given.get("labels", {})}
        metadata["annotations"] = {**given.get("annotations", {}), "pipelines.kubeflow.org/runtime-role": "launcher"}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        run = [sent if word == "{{$}}" else word for word in words]
        return Pod(name, manifest, inputs, run, made, key, argo.retries(task))


@lru_cache
def _read(pipeline: str) -> tuple[Values, ...]:
    return tuple(yaml.load_all(pipeline, yaml.CSafeLoader))


def _holds(condition: str, inputs: Values) -> bool:
    found = CONDITION.fullmatch(condition)
    assert found, f"a condition that the model does not know: {condition}"
    return (inputs[found[2]] == found[3]) is not bool(found[1])
