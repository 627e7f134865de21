"""The compiled pipelines, as they are committed."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMITTED, SHARED = ((ROOT / "pipelines" / name).read_text() for name in ("vismem.yaml", "vismem-shared.yaml"))
REGISTRY_IMAGE = "registry.example.com/vismem-train:0.2.0"
