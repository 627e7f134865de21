"""The pipeline: the steps of `vismem/steps.py` as Kubeflow tasks.

`kfp dsl compile --py pipelines/pipeline.py --output pipelines/vismem.yaml` compiles it, the same with
pipeline_shared.py vismem-shared.yaml, for clusters with a shared volume. `pipelines/run_local.py` runs it on a laptop.
"""

import json
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kfp import dsl, kubernetes
from kubernetes.utils.quantity import parse_quantity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # components/ lies there

from vismem import __version__
from vismem.kubeflow.cluster import HOUR, Cluster, load_cluster
from vismem.kubeflow.parameters import S3_PREFIX
from vismem.kubeflow.task import LAUNCH, WORK
from vismem.launch import QUEUE, LaunchConfig
from vismem.steps import STEPS

SHARED = LaunchConfig()  # its volume: that of deploy/kubernetes/components/multi-node
ROOT = Path(__file__).resolve().parents[1]
IMAGE = f"vismem-train:{__version__}"  # as `make images` names it; for clusters whose nodes were given it
RETRIES = 2
WAITING_HOURS = 24  # that a job of Kubeflow Trainer may wait for its nodes
MLFLOW = (
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)  # fmt: skip
S3 = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
)  # fmt: skip
SECRETS = {  # the parameter that names the secret: its keys, and the variables that they become in the pod
    "s3_secret": {key: f"{S3_PREFIX}{key}" for key in S3},  # by the plain names Kubeflow's launcher would take them too
    "mlflow_secret": {key: key for key in MLFLOW},
    "huggingface_secret": {"HF_TOKEN": "HF_TOKEN"},
}
STAYS = {  # of a pod that is not evicted to save nodes, by the cluster autoscaler and by Karpenter
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
SIGNING = ("vismem-signing", "/etc/vismem/signing")  # the secret with the key that signs, and where its files lie


def load_components() -> SimpleNamespace:
    """Every component of components/, by name."""
    names = sorted(file.parent.name for file in (ROOT / "components").glob("*/component.py"))
    return SimpleNamespace(**{name: getattr(import_module(f"components.{name}.component"), name) for name in names})


def make_pipeline(
    fixed_image: str | None = None, *, shared_volume: bool = False, work: str = "", cluster: Cluster | None = None
):
    """The pipeline. With `fixed_image` all tasks run in that, for runners that cannot read it from the parameters.

    With `shared_volume` all tasks mount the volume that several nodes train on: for the back end `trainer`, own data,
    one cache of hub models, and checkpoints, from which a task that was killed resumes. `work`: another folder for
    checkpoints, which all tasks see. `cluster`: settings of the pods (default: those of VISMEM_CLUSTER).
    """
    components, settings = load_components(), cluster or load_cluster()

    @dsl.pipeline(name="vismem")
    def vismem(
        profile: str = "",
        overrides: dict = {},  # noqa: B006 - KFP's way to say a default
        image: str = IMAGE,
        image_pull_secret: str = "vismem-registry",
        s3_secret: str = "vismem-s3",
        mlflow_secret: str = "vismem-mlflow",
        huggingface_secret: str = "vismem-huggingface",
    ):
        """From visual questions to a gated, served model with latent vision memory.

        Later ones win: the defaults of params.yaml, profile, overrides. What pods ask of the cluster is compiled in,
        see vismem/kubeflow/cluster.py.

        Args:
            profile: Run: a profile of deploy/profiles, such as smoke or qwen2_5_vl_7b; empty for none.
            overrides: Run: anything that params.yaml may hold, as sections or dotted keys, such as
                {"seed": 3, "stage1.steps": 30}.
            image: Cluster: image of all tasks, by digest or by a tag that does not move.
            image_pull_secret: Cluster: secret for the image's registry; it need not exist.
            s3_secret: Cluster: secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, except for AWS itself,
                AWS_ENDPOINT_URL_S3; AWS_SESSION_TOKEN, AWS_DEFAULT_REGION and AWS_CA_BUNDLE where used; needed for
                preflight.buckets, an s3:// registry.artifact_location and data that DVC keeps in S3 only.
            mlflow_secret: Cluster: secret with MLFLOW_TRACKING_URI and, where the server asks for them,
                MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; and
                MLFLOW_TRACKING_SERVER_CERT_PATH, a file of the image, for a certificate of your own.
            huggingface_secret: Cluster: secret with HF_TOKEN; it need not exist.
        """
        place = Placement(SimpleNamespace(**locals()), settings, fixed_image, shared_volume, work)
        end = place(components.summary(), cached=False).set_display_name("summary")
        with dsl.ExitHandler(end, name="run"):
            add_steps(components, place)

    return vismem


class Placement:
    """Gives each task image, secrets, resources and nodes; locally only the image and how training is launched."""

    def __init__(
        self, parameters: SimpleNamespace, cluster: Cluster, fixed_image: str | None, shared_volume: bool, work: str
    ) -> None:
        self.parameters, self.cluster, self.fixed_image = parameters, cluster, fixed_image
        self.shared_volume, self.work = shared_volume, f"{SHARED.shared}/work" if shared_volume else work

    def __call__(
        self,
        task: Any,
        gpus: int | None = None,
        *,
        cached: bool = True,
        retried: bool = False,
        launches: bool = False,
        evaluates: bool = False,
        secrets: tuple[str, ...] = (),
        signs: bool = False,
    ) -> Any:
        """Place a task and return it; one with `gpus` trains or decodes, on the nodes that are for that.

        One that `launches` takes as many processes as the cluster's settings say; one that `evaluates` holds the base
        once, in a pod of that size.
        """
        given, cluster = self.parameters, self.cluster
        task.set_caching_options(cached).set_container_image(self.fixed_image or given.image)
        if self.work:
            task.set_env_variable(WORK, self.work)
        if launches and (launch := cluster.launch()):
            task.set_env_variable(LAUNCH, json.dumps(launch))
        if self.fixed_image:
            return task
        kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
        kubernetes.set_image_pull_secrets(task, [given.image_pull_secret])
        if self.shared_volume:
            kubernetes.mount_pvc(task, SHARED.claim, str(SHARED.shared))
            task.set_env_variable("HF_HOME", f"{SHARED.shared}/huggingface")
        for name in secrets:  # optional: preflight explains better which is missing
            kubernetes.use_secret_as_env(task, getattr(given, name), SECRETS[name], optional=True)
        if signs:
            kubernetes.use_secret_as_volume(task, *SIGNING, optional=True)
        hours = cluster.task_hours if gpus is None else cluster.training_hours
        if gpus is not None or launches:
            for name, value in STAYS.items():
                kubernetes.add_pod_annotation(task, name, value)
        if launches and cluster.launches:  # it only waits, also for the nodes
            gpus, hours = None, hours + WAITING_HOURS
        kubernetes.set_timeout(task, hours * HOUR)
        if retried:  # Argo counts the maximum from the start of the first try, not of the waiting
            longest = (RETRIES + 1) * hours * HOUR
            task.set_retry(RETRIES, backoff_duration="30s", backoff_factor=2, backoff_max_duration=f"{longest}s")
        if gpus is None:
            return self._size(task, cluster.task_cpu, cluster.task_memory)
        training = cluster.training_cpu, cluster.training_memory
        self._size(task, *((cluster.evaluation_cpu, cluster.evaluation_memory) if evaluates else training))
        if gpus or not (evaluates and cluster.has_gpus):
            self._choose_nodes(task, gpus)
        return kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory")

    def _choose_nodes(self, task: Any, gpus: int) -> None:
        """GPUs, nodes and queue of a task that trains or decodes."""
        cluster = self.cluster
        if gpus:
            task.set_accelerator_type(cluster.gpu_type).set_accelerator_limit(gpus)
        kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
        if cluster.tolerations:
            kubernetes.add_toleration_json(task, list(cluster.tolerations))
        for label, value in cluster.node_selector.items():
            kubernetes.add_node_selector(task, label, value)
        if cluster.queue:
            kubernetes.add_pod_label(task, QUEUE, cluster.queue)

    @staticmethod
    def _size(task: Any, cpu: str, memory: str) -> Any:
        """Equal request and limit, and a thread for each of its CPUs: by itself torch counts the node's."""
        if LAUNCH not in (task.container_spec.env or {}):  # each of several processes takes one
            task.set_env_variable("OMP_NUM_THREADS", str(max(1, int(parse_quantity(cpu)))))
        return task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)


def add_steps(components: SimpleNamespace, place: Placement) -> None:
    """Add `configure`, `preflight` and the steps, each with the outputs that it reads, to the pipeline being built."""
    given, evaluate = place.parameters, place.cluster.evaluation_gpu_count
    train = 0 if place.cluster.launches else place.cluster.gpu_count
    image, run = ("", "") if place.fixed_image else (given.image, dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    origin = {"image": image, "run": run}
    resumes = place.shared_volume  # from its checkpoints there; without, a retry would train from the start
    placed: dict[str, dict[str, Any]] = {
        "prepare": {"retried": True, "secrets": ("s3_secret",)},
        "validate": {"retried": True, "secrets": ("huggingface_secret",)},
        "base": {"gpus": evaluate, "evaluates": True, "retried": True, "secrets": ("huggingface_secret",)},
        "stage1": {"gpus": train, "retried": resumes, "launches": True},
        "stage2": {"gpus": train, "retried": resumes, "launches": True},
        "evaluate": {"gpus": evaluate, "evaluates": True, "retried": resumes},
        "export": {"gpus": 0, "evaluates": True, "retried": True},
        "register": {"cached": False, "retried": True, "secrets": ("s3_secret", "mlflow_secret"), "signs": True},
        "promote": {"cached": False, "retried": True, "secrets": ("s3_secret", "mlflow_secret")},
        "deploy": {
            "gpus": 0,
            "evaluates": True,
            "cached": False,
            "retried": True,
            "secrets": ("huggingface_secret",),
        },
    }
    configured = components.configure(
        profile=given.profile, overrides=given.overrides, image=image, gpus=train, launches=place.cluster.launches
    )
    parameters = place(configured, cached=False, secrets=("s3_secret",)).outputs  # it looks up the data's md5
    looked = components.preflight(parameters=parameters["preflight"])
    place(looked, train, cached=False, secrets=tuple(SECRETS))
    made: dict[str, Any] = {}
    for step in STEPS:
        component = getattr(components, step.name)
        inputs = {"parameters": parameters[step.name]} | {name: made[name][name] for name in step.inputs}
        inputs |= {name: value for name, value in origin.items() if name in component.component_spec.inputs}
        last = step.name == "deploy"
        with dsl.If(made["promote"]["Output"] == "promoted", name="promoted") if last else nullcontext():
            task = place(component(**inputs), **placed[step.name])
        made[step.name] = task.outputs if step.inputs else task.after(looked).outputs
    with dsl.Else(name="refused"):  # without a task here Kubeflow would never call the run complete
        place(components.keep(), cached=False)


pipeline = make_pipeline()
