"""Write a decomposed language model as a native mixture architecture, which engines open without this package.

docs/containers.md describes the containers. Names are imported on first use; `CONTAINERS` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CONTAINERS": "table",
    "choose": "fit",
    "engine_notes": "fit",
    "obstacle": "fit",
    "require_fit": "fit",
    "Shards": "shards",
    "preflight": "trial",
    "save": "write",
    "save_checkpoint": "write",
    "audit": "checks",
    "open_native": "checks",
    "same_logits": "checks",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
