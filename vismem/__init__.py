"""VisMem: latent vision memory for vision-language models (arXiv 2511.11007)."""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vismem.inference import Answer, VisMem

__all__ = ["Answer", "VisMem", "__version__"]


def __getattr__(name: str) -> Any:
    """Late, so that the command line does not wait for torch."""
    if name == "__version__":
        return metadata.version("vismem")
    if name in __all__:
        from vismem import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'vismem' has no attribute '{name}'")
