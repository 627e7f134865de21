"""What must be there before a run costs money."""

from pydantic import Field

from vismem.config.section import Section, rare


class PreflightConfig(Section):
    """What `vismem preflight` looks for besides the registry and the base model; Kubeflow runs it first."""

    environment: tuple[str, ...] = Field(
        (), description="environment variables that must be set, such as HF_TOKEN; values are not shown"
    )
    buckets: tuple[str, ...] = Field(
        (),
        description="S3 buckets, or BUCKET/PREFIX, that must be read- and writable; AWS_ENDPOINT_URL_S3 says where",
    )
    gpus: int = Field(0, ge=0, description="CUDA devices that must be there")
    free_disk_gb: float = Field(1.0, ge=0, description="free space that the outputs' disk must have, GB")
    shared_memory_gb: float = rare(
        0.0, ge=0, description="size that /dev/shm must have, GB; NCCL and data loaders of several processes share it"
    )
