"""VisMem: latent vision memory for vision-language models (arXiv 2511.11007)."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vismem.inference import VisMem
    from vismem.serving.client import AsyncClient, Client
    from vismem.serving.exchange import Answer

MODULES = {
    "AsyncClient": "serving.client",
    "Client": "serving.client",
    "Answer": "serving.exchange",
    "VisMem": "inference",
}

__all__ = ["Answer", "AsyncClient", "Client", "VisMem", "__version__"]


def __getattr__(name: str) -> Any:
    """Late, so that the command line does not wait for torch; a client never does."""
    if name == "__version__":
        return metadata.version("vismem")
    if name in MODULES:
        return getattr(import_module(f"vismem.{MODULES[name]}"), name)
    raise AttributeError(f"module 'vismem' has no attribute '{name}'")
