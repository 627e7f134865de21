"""The pipeline: the steps of `vismem/steps.py` as Kubeflow tasks.

`python pipelines/vismem.py` compiles vismem.yaml, and vismem-shared.yaml for clusters with a shared volume. The same
function runs on a laptop, by `pipelines/run_local.py`.
"""

import sys
from importlib import import_module
from itertools import dropwhile
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from kfp import compiler, dsl, kubernetes

# First in the path: components/ lies there, and beside this file `vismem` would be this file instead of the library.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vismem.config import defaults, without_nulls
from vismem.launch import LaunchConfig

ROOT = Path(__file__).resolve().parents[1]
COMPILED = ROOT / "pipelines" / "vismem.yaml"
COMPILED_SHARED = ROOT / "pipelines" / "vismem-shared.yaml"
SHARED_CLAIM, SHARED_FOLDER = (
    LaunchConfig().claim,
    str(LaunchConfig().shared),
)  # the volume of deploy/kubernetes/overlays/multi-node
HEADING = "# Compiled by `python pipelines/vismem.py`; every parameter is described below, under root.\n"
IMAGE = "vismem-train:latest"
DEFAULTS = without_nulls(defaults())  # Kubeflow takes no null
S3 = {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3")}
MLFLOW = {key: key for key in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
HUGGING_FACE = {"HF_TOKEN": "HF_TOKEN"}


def load_components():
    """Every component of components/, by name."""
    names = sorted(file.parent.name for file in (ROOT / "components").glob("*/component.py"))
    return SimpleNamespace(**{name: getattr(import_module(f"components.{name}.component"), name) for name in names})


def make_pipeline(fixed_image: str | None = None, *, shared_volume: bool = False, work: str = ""):
    """The pipeline. With `fixed_image` all tasks run in that, for runners that cannot read it from the parameters.

    With `shared_volume` they all see the volume that several nodes train on: for the back end `trainer`, for own data,
    for one cache of hub models, and for checkpoints, from which a task that was killed goes on. `work`: another folder
    for these, that all tasks see.
    """

    local = fixed_image is not None
    work = f"{SHARED_FOLDER}/work" if shared_volume else work
    task_of = load_components()

    @dsl.pipeline(name="vismem")
    def vismem(
        profile: str = "",
        overrides: dict = {},  # noqa: B006 - KFP's way to say a default
        journal: str = "s3://vismem/journal",
        seed: int = DEFAULTS["seed"],
        prepare: dict = DEFAULTS["prepare"],
        validate: dict = DEFAULTS["validate"],
        base: dict = DEFAULTS["base"],
        memory: dict = DEFAULTS["memory"],
        invocation: dict = DEFAULTS["invocation"],
        stage1: dict = DEFAULTS["stage1"],
        stage2: dict = DEFAULTS["stage2"],
        baselines: dict = DEFAULTS["baselines"],
        evaluate: dict = DEFAULTS["evaluate"],
        export: dict = DEFAULTS["export"],
        gate: dict = DEFAULTS["gate"],
        registry: dict = DEFAULTS["registry"],
        deploy: dict = DEFAULTS["deploy"],
        study: dict = DEFAULTS["study"],
        preflight: dict = DEFAULTS["preflight"],
        image: str = IMAGE,
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
        tolerations: list = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],  # noqa: B006
        node_selector: dict = {},  # noqa: B006
        training_backend: str = "process",
        num_processes: int = 1,
        num_nodes: int = 1,
    ):
        """From visual questions to a gated, served model with latent vision memory.

        Parameters come in groups. What later ones say wins: profile, sections where they differ from their defaults,
        overrides. Numbers of the cluster group are texts, as Kubernetes writes quantities.

        Args:
            profile: Run: a profile of deploy/profiles, such as smoke or qwen2_5_vl_7b; empty for none.
            overrides: Run: single values by dotted key, such as {"stage1.steps": 30}; they win over everything else.
            journal: Run: folder or s3:// address where tasks leave word for the summary; empty for none.
            seed: Run: seed of every random choice.
            prepare: Section `prepare` of params.yaml: where the questions come from.
            validate: Section `validate` of params.yaml: what the data must satisfy.
            base: Section `base` of params.yaml: the model that goes in.
            memory: Section `memory` of params.yaml: the latent memories.
            invocation: Section `invocation` of params.yaml: when they may be invoked.
            stage1: Section `stage1` of params.yaml: training of their formation.
            stage2: Section `stage2` of params.yaml: training of their invocation.
            baselines: Section `baselines` of params.yaml: what the method is compared with; kept for the lineage.
            evaluate: Section `evaluate` of params.yaml: arms and statistics.
            export: Section `export` of params.yaml: ONNX and its parity with torch.
            gate: Section `gate` of params.yaml: what a challenger must show.
            registry: Section `registry` of params.yaml: MLflow.
            deploy: Section `deploy` of params.yaml: Triton.
            study: Section `study` of params.yaml: no part of this pipeline; kept for the lineage.
            preflight: Section `preflight` of params.yaml: what must be there before a run costs money.
            image: Cluster: image of all tasks; name it by digest or by a tag that does not move.
            s3_secret: Cluster: secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, but for AWS itself,
                AWS_ENDPOINT_URL_S3.
            mlflow_secret: Cluster: secret with MLFLOW_TRACKING_URI and, where the server asks for them,
                MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
            huggingface_secret: Cluster: secret with HF_TOKEN; it need not exist.
            task_cpu: Cluster: cores of each task that does not train.
            task_memory: Cluster: memory of each task that does not train.
            training_cpu: Cluster: cores of each task that trains or decodes.
            training_memory: Cluster: memory of each task that trains or decodes.
            gpu_type: Cluster: resource name of the GPUs.
            gpu_count: Cluster: GPUs of the pods of stage I and II. With training_backend `trainer` these only wait: 0.
            evaluation_gpu_count: Cluster: GPUs of the pods of base and evaluate, which use one at most.
            tolerations: Cluster: tolerations of the pods that train or decode, as Kubernetes writes them.
            node_selector: Cluster: labels of the nodes for them.
            training_backend: Training: `process`, `torchrun` (several GPUs of a pod) or `trainer` (Kubeflow Trainer).
            num_processes: Training: processes on a node, one a GPU.
            num_nodes: Training: nodes; more than one needs `trainer`, and that vismem-shared.yaml.
        """

        def place(task, *, cached=True, retried=False):
            """Image, caching, retries: what every task has."""
            task.set_caching_options(cached)
            if work:
                task.set_env_variable("VISMEM_WORK", work)
            if local:
                return task.set_container_image(fixed_image)
            if shared_volume:
                kubernetes.mount_pvc(task, SHARED_CLAIM, SHARED_FOLDER)
                task.set_env_variable("HF_HOME", f"{SHARED_FOLDER}/huggingface")
            if retried:
                task.set_retry(2, backoff_duration="30s", backoff_factor=2)
            for secret, keys in ((s3_secret, S3), (mlflow_secret, MLFLOW), (huggingface_secret, HUGGING_FACE)):
                kubernetes.use_secret_as_env(task, secret, keys, optional=True)  # preflight says better what is missing
            return task.set_container_image(image)

        def light(task, **options):
            """A task that neither trains nor decodes."""
            place(task, **options)
            return task if local else size(task, task_cpu, task_memory)

        def heavy(task, gpus, **options):
            """A task that trains or decodes, on the nodes that are for that."""
            place(task, **options)
            if local:
                return task
            size(task, training_cpu, training_memory)
            hand_down(task, gpu_type, gpus)
            task.set_accelerator_type(gpu_type).set_accelerator_limit(gpus)
            kubernetes.add_toleration_json(task, tolerations)
            kubernetes.add_node_selector_json(task, node_selector)
            return kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory")

        end = light(task_of.summary(journal=journal), cached=False).set_display_name("summary")
        with dsl.ExitHandler(end, name="run"):
            of = light(
                task_of.configure(
                    profile=profile,
                    overrides=overrides,
                    journal=journal,
                    environment=[] if local else ["MLFLOW_TRACKING_URI"],
                    training_backend=training_backend,
                    num_processes=num_processes,
                    num_nodes=num_nodes,
                    training_image="" if local else image,
                    gpu_type=gpu_type,
                    gpu_count=gpu_count,
                    training_cpu=training_cpu,
                    training_memory=training_memory,
                    tolerations=tolerations,
                    node_selector=node_selector,
                    seed=seed,
                    prepare=prepare,
                    validate=validate,
                    base=base,
                    memory=memory,
                    invocation=invocation,
                    stage1=stage1,
                    stage2=stage2,
                    baselines=baselines,
                    evaluate=evaluate,
                    export=export,
                    gate=gate,
                    registry=registry,
                    deploy=deploy,
                    study=study,
                    preflight=preflight,
                ),
                cached=False,
            ).outputs
            looked = heavy(task_of.preflight(parameters=of["preflight"], journal=journal), gpu_count, cached=False)
            prepared = light(task_of.prepare(parameters=of["prepare"], journal=journal), retried=True).after(looked)
            validated = light(
                task_of.validate(parameters=of["validate"], journal=journal, prepare=prepared.outputs["prepare"])
            )
            data = validated.outputs["validate"]
            base_made = heavy(
                task_of.base(parameters=of["base"], journal=journal, validate=data), evaluation_gpu_count, retried=True
            ).outputs["base"]
            formed = heavy(
                task_of.stage1(
                    parameters=of["stage1"], journal=journal, launch=of["launch"], base=base_made, validate=data
                ),
                gpu_count,
                retried=shared_volume,  # from the checkpoints there; without, a retry would train from the start
            ).outputs["stage1"]
            trained = heavy(
                task_of.stage2(
                    parameters=of["stage2"],
                    journal=journal,
                    launch=of["launch"],
                    base=base_made,
                    stage1=formed,
                    validate=data,
                ),
                gpu_count,
                retried=shared_volume,  # from the checkpoints there; without, a retry would train from the start
            ).outputs["stage2"]
            scores = heavy(
                task_of.evaluate(
                    parameters=of["evaluate"], journal=journal, base=base_made, stage2=trained, validate=data
                ),
                evaluation_gpu_count,
                retried=shared_volume,
            ).outputs["evaluate"]
            bundle = heavy(
                task_of.export(
                    parameters=of["export"],
                    journal=journal,
                    base=base_made,
                    stage2=trained,
                    validate=data,
                    evaluate=scores,
                ),
                "0",
            ).outputs["export"]
            version = light(
                task_of.register(
                    parameters=of["register"], journal=journal, export=bundle, evaluate=scores, validate=data
                ),
                cached=False,
                retried=True,
            ).outputs["register"]
            released = light(
                task_of.promote(parameters=of["promote"], journal=journal, register=version), cached=False, retried=True
            )
            with dsl.If(released.outputs["Output"] == "promoted", name="promoted"):
                heavy(
                    task_of.deploy(
                        parameters=of["deploy"],
                        journal=journal,
                        export=bundle,
                        promote=released.outputs["promote"],
                        validate=data,
                    ),
                    "0",
                    cached=False,
                )
            with dsl.Else(name="refused"):
                light(task_of.not_promoted(journal=journal, promote=released.outputs["promote"]), cached=False)

    return vismem


def size(task, cpu, memory):
    """The same request and limit, so that a task gets what it was promised and no more."""
    hand_down(task, cpu, memory)
    return task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)


def hand_down(task, *parameters):
    """Make the groups around a task pass these parameters to it; the compiler forgets it for those of resources."""
    task.register_pipeline_channels([item for item in parameters if not isinstance(item, str)])


def compiled(shared_volume: bool = False) -> str:
    """The pipeline as YAML. The compiler's own heading is left out: the order of its words changes from run to run."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "vismem.yaml"
        compiler.Compiler().compile(make_pipeline(shared_volume=shared_volume), str(file))
        lines = file.read_text().splitlines(keepends=True)
    return HEADING + "".join(dropwhile(lambda line: line.startswith("#"), lines))


if __name__ == "__main__":
    for file, shared_volume in ((COMPILED, False), (COMPILED_SHARED, True)):
        file.write_text(compiled(shared_volume))
        print(f"wrote {file.relative_to(ROOT)}")
