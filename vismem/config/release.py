"""Preflight, evaluation, export, gate, registry and serving."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from vismem.config.section import Section, rare


class PreflightConfig(Section):
    """What `vismem preflight` looks for besides the registry and the base model; Kubeflow runs it first."""

    environment: tuple[str, ...] = Field((), description="variables that must be set, like HF_TOKEN; values not shown")
    buckets: tuple[str, ...] = Field((), description="S3 BUCKET[/PREFIX] to read and write at AWS_ENDPOINT_URL_S3")
    gpus: int = Field(0, ge=0, description="CUDA devices that must be there")
    free_disk_gb: float = Field(1.0, ge=0, description="free space that the outputs' disk must have, GB; 0: any")
    shared_memory_gb: float = rare(0.0, ge=0, description="min size of /dev/shm, GB; NCCL and data loaders use it")


class EvaluateConfig(Section):
    """Which arms answer the test split, and how their scores are compared."""

    arms: tuple[str, ...] = Field(
        ("vanilla", "vismem"),
        description="what answers: vanilla, vismem, relook, ...; all: vismem/evaluation/arms.py",
    )
    limit: int | None = Field(None, ge=1, description="max test items; null: all")
    batch_size: int = Field(64, ge=1, description="rows decoded together")
    max_new_tokens: int = Field(120, ge=1, description="max tokens of an answer")
    bootstrap: int = Field(2000, ge=100, description="bootstrap resamples of the items")


class SuiteConfig(Section):
    """`vismem evaluate --suite paper`: a trained memory on the paper's benchmarks; batches are as in `evaluate`."""

    arms: tuple[str, ...] = Field(
        ("vanilla", "vismem"),
        description="what answers: vanilla, vismem, relook, ...; all: vismem/evaluation/arms.py",
    )
    data: Path | None = Field(None, description="the folder of .tsv files; null: the environment's LMUData")
    limit: int | None = Field(None, ge=1, description="max questions of each benchmark; null: all")
    judge_url: str = Field("", description="OpenAI-compatible endpoint, as https://host/v1; its key: VISMEM_JUDGE_KEY")
    judge_model: str = Field("", description="the judge's name there, with its version")


class ExportConfig(Section):
    """The ONNX graphs and their parity with torch."""

    opset: int = Field(18, description="ONNX opset")
    graphs: bool = Field(
        True, description="ONNX graphs for Triton, a float32 copy of all weights; false: only what VisMem adds"
    )
    parity_items: int = Field(16, ge=1, description="test items decoded by both engines; greedy tokens must be equal")
    parity_tokens: int = Field(120, ge=1, description="max tokens of each of these answers")
    tolerance: float = Field(1e-4, gt=0, description="max absolute difference of a memory vector")


class GateConfig(Section):
    """What a challenger must show to become champion. Scores are in percentage points."""

    min_items: int = Field(200, ge=1, description="min number of test items behind the scores")
    min_clusters: int = Field(40, ge=1, description="min number of their clusters: items that share an image")
    min_gain: float = Field(1.0, description="min overall gain over vanilla, points")
    min_gain_low: float = Field(0.0, description="what the gain's 95 % interval must exceed; from 0 on, also p < 0.05")
    max_capability_drop: float = Field(2.0, ge=0, description="max loss of any one capability, points")
    max_time_overhead: float = Field(3.0, ge=0, description="max extra time per answer; 0.5 is +50 % [paper: 0.44]")
    champion_margin: float = Field(0.0, description="points by which the present champion must be exceeded")
    other_data: Literal["pass", "refuse"] = Field(
        "refuse", description="what follows where the champion was scored on other test data, so that no scores compare"
    )


class RegistryConfig(Section):
    """MLflow. The environment's MLFLOW_TRACKING_URI wins over `tracking_uri`."""

    tracking_uri: str = Field("sqlite:///mlflow.db", description="tracking and registry store")
    experiment: str = Field("vismem", description="experiment name")
    model_name: str = Field("vismem", description="registered model name")
    artifact_location: str | None = Field(
        None, description="new experiments' files; null: mlartifacts/ beside a SQLite store, else the server's"
    )
    signing_key: Path | None = Field(None, description="elliptic private key (PEM) that signs what is registered")
    public_key: Path | None = Field(
        None, description="its public key: a version that it did not sign is neither promoted nor fetched"
    )
    ui_port: int = Field(5000, ge=0, le=65535, description="port of `vismem ui`; 0: any free one")


class DeployConfig(Section):
    """Triton."""

    model_name: str = Field("vismem", description="the served model's name; a refused one is NAME_challenger")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC port of `vismem serve`; 0: any free one")
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP port")
    metrics_port: int = Field(8002, ge=0, le=65535, description="Prometheus port")
