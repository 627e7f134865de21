"""The pipeline: the steps of `vismem/steps.py` as Kubeflow tasks.

`kfp dsl compile --py pipelines/pipeline.py --output pipelines/vismem.yaml` compiles it, the same with
pipeline_shared.py vismem-shared.yaml, for clusters with a shared volume. `pipelines/run_local.py` runs it on a laptop.
"""

import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kfp import dsl, kubernetes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # components/ lies there

from vismem.kubeflow.task import WORK
from vismem.launch import LaunchConfig
from vismem.steps import STEPS

SHARED = LaunchConfig()  # its volume: that of deploy/kubernetes/overlays/multi-node
ROOT = Path(__file__).resolve().parents[1]
SECRETS = {  # the parameter that names the secret: its keys, variables of the same name in the pod
    "s3_secret": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"),
    "mlflow_secret": ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "huggingface_secret": ("HF_TOKEN",),
}


def load_components() -> SimpleNamespace:
    """Every component of components/, by name."""
    names = sorted(file.parent.name for file in (ROOT / "components").glob("*/component.py"))
    return SimpleNamespace(**{name: getattr(import_module(f"components.{name}.component"), name) for name in names})


def make_pipeline(fixed_image: str | None = None, *, shared_volume: bool = False, work: str = ""):
    """The pipeline. With `fixed_image` all tasks run in that, for runners that cannot read it from the parameters.

    With `shared_volume` all tasks mount the volume that several nodes train on: for the back end `trainer`, own data,
    one cache of hub models, and checkpoints, from which a task that was killed resumes. `work`: another folder for
    checkpoints, which all tasks see.
    """
    components = load_components()

    @dsl.pipeline(name="vismem")
    def vismem(
        profile: str = "",
        overrides: dict = {},  # noqa: B006 - KFP's way to say a default
        image: str = "vismem-train:latest",
        s3_secret: str = "vismem-s3",
        mlflow_secret: str = "vismem-mlflow",
        huggingface_secret: str = "vismem-huggingface",
        task_cpu: str = "2",
        task_memory: str = "8Gi",
        training_cpu: str = "4",
        training_memory: str = "16Gi",
        gpu_type: str = "nvidia.com/gpu",
        gpu_count: str = "0",
        evaluation_gpu_count: str = "0",
        tolerations: list = [],  # noqa: B006
        node_selector: dict = {},  # noqa: B006
        training_backend: str = "process",
        num_processes: int = 1,
        num_nodes: int = 1,
    ):
        """From visual questions to a gated, served model with latent vision memory.

        Later ones win: the defaults of params.yaml, profile, overrides. Quantities of the cluster are texts, as
        Kubernetes writes them.

        Args:
            profile: Run: a profile of deploy/profiles, such as smoke or qwen2_5_vl_7b; empty for none.
            overrides: Run: anything that params.yaml may hold, as sections or dotted keys, such as
                {"seed": 3, "stage1.steps": 30}.
            image: Cluster: image of all tasks; name it by digest or by a tag that does not move.
            s3_secret: Cluster: secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, except for AWS itself,
                AWS_ENDPOINT_URL_S3; needed for preflight.buckets, an s3:// registry.artifact_location and data that
                DVC keeps in S3 only.
            mlflow_secret: Cluster: secret with MLFLOW_TRACKING_URI and, where the server asks for them,
                MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
            huggingface_secret: Cluster: secret with HF_TOKEN; it need not exist.
            task_cpu: Cluster: cores of each task that does not train.
            task_memory: Cluster: memory of each task that does not train.
            training_cpu: Cluster: cores of each task that trains or decodes.
            training_memory: Cluster: memory of each task that trains or decodes.
            gpu_type: Cluster: resource name of the GPUs.
            gpu_count: Cluster: GPUs of the pods of stage I and II. With training_backend `trainer` these only wait: 0.
            evaluation_gpu_count: Cluster: GPUs of the pods of base and evaluate, which use at most one.
            tolerations: Cluster: tolerations of the pods that train or decode, besides one for NVIDIA's taint.
            node_selector: Cluster: labels of the nodes for them.
            training_backend: Training: `process`, `torchrun` (several GPUs of a pod) or `trainer` (Kubeflow Trainer).
            num_processes: Training: processes per node, one per GPU.
            num_nodes: Training: nodes; more than one needs `trainer`, and that vismem-shared.yaml.
        """
        place = Placement(SimpleNamespace(**locals()), fixed_image, shared_volume, work)
        end = place(components.summary(), cached=False).set_display_name("summary")
        with dsl.ExitHandler(end, name="run"):
            add_steps(components, place)

    return vismem


class Placement:
    """Gives each task image, secrets, resources and nodes from the pipeline's parameters; locally only the image."""

    def __init__(self, parameters: SimpleNamespace, fixed_image: str | None, shared_volume: bool, work: str) -> None:
        self.parameters, self.fixed_image, self.shared_volume = parameters, fixed_image, shared_volume
        self.work = f"{SHARED.shared}/work" if shared_volume else work

    def __call__(
        self, task: Any, gpus: Any = None, *, cached: bool = True, retried: bool = False, secrets: tuple[str, ...] = ()
    ) -> Any:
        """Place a task and return it; one with `gpus` trains or decodes, on the nodes that are for that."""
        given = self.parameters
        task.set_caching_options(cached).set_container_image(self.fixed_image or given.image)
        if self.work:
            task.set_env_variable(WORK, self.work)
        if self.fixed_image:
            return task
        if self.shared_volume:
            kubernetes.mount_pvc(task, SHARED.claim, str(SHARED.shared))
            task.set_env_variable("HF_HOME", f"{SHARED.shared}/huggingface")
        if retried:
            task.set_retry(2, backoff_duration="30s", backoff_factor=2)
        for name in secrets:  # optional: preflight explains better which is missing
            keys = {key: key for key in SECRETS[name]}
            kubernetes.use_secret_as_env(task, getattr(given, name), keys, optional=True)
        if gpus is None:
            return self._size(task, given.task_cpu, given.task_memory)
        self._size(task, given.training_cpu, given.training_memory, given.gpu_type, gpus)
        task.set_accelerator_type(given.gpu_type).set_accelerator_limit(gpus)
        kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
        kubernetes.add_toleration_json(task, given.tolerations)
        kubernetes.add_node_selector_json(task, given.node_selector)
        return kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory")

    @staticmethod
    def _size(task: Any, cpu: Any, memory: Any, *others: Any) -> Any:
        """Equal request and limit. KFP hands these parameters to the groups around a task only once registered."""
        task.register_pipeline_channels([item for item in (cpu, memory, *others) if not isinstance(item, str)])
        return task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)


def add_steps(components: SimpleNamespace, place: Placement) -> None:
    """Add `configure`, `preflight` and the steps, each with the outputs that it reads, to the pipeline being built."""
    given = place.parameters
    train, evaluate = given.gpu_count, given.evaluation_gpu_count
    resumes = place.shared_volume  # from its checkpoints there; without, a retry would train from the start
    placed: dict[str, dict[str, Any]] = {
        "prepare": {"retried": True, "secrets": ("s3_secret",)},
        "validate": {"retried": True, "secrets": ("huggingface_secret",)},
        "base": {"gpus": evaluate, "retried": True, "secrets": ("huggingface_secret",)},
        "stage1": {"gpus": train, "retried": resumes},
        "stage2": {"gpus": train, "retried": resumes},
        "evaluate": {"gpus": evaluate, "retried": resumes},
        "export": {"gpus": "0"},
        "register": {"cached": False, "retried": True, "secrets": ("s3_secret", "mlflow_secret")},
        "promote": {"cached": False, "retried": True, "secrets": ("s3_secret", "mlflow_secret")},
        "deploy": {"gpus": "0", "cached": False},
    }
    known = {**vars(given), "training_image": "" if place.fixed_image else given.image}
    configured = components.configure(**{name: known[name] for name in components.configure.component_spec.inputs})
    parameters = place(configured, cached=False, secrets=("s3_secret",)).outputs  # it looks up the data's md5
    looked = components.preflight(parameters=parameters["preflight"])
    place(looked, train, cached=False, secrets=tuple(SECRETS))
    made: dict[str, Any] = {}
    for step in STEPS:
        component = getattr(components, step.name)
        inputs = {"parameters": parameters[step.name]} | {name: made[name][name] for name in step.inputs}
        if "launch" in component.component_spec.inputs:
            inputs["launch"] = parameters["launch"]
        last = step.name == "deploy"
        with dsl.If(made["promote"]["Output"] == "promoted", name="promoted") if last else nullcontext():
            task = place(component(**inputs), **placed[step.name])
        made[step.name] = task.outputs if step.inputs else task.after(looked).outputs


pipeline = make_pipeline()
