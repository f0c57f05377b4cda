"""Turn the feed-forward layers of a trained dense transformer into a mixture of experts.

The idea is in four places: `ffn2moe.spec` describes a mixture, `ffn2moe.decompose` assigns neurons to experts,
`ffn2moe.moe.experts` slices the weights, and `ffn2moe.moe.layer` routes tokens to experts.

The names below are imported on first use, so `import ffn2moe` loads neither torch nor an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "MoESpec": "ffn2moe.spec",
    "MoEFFN": "ffn2moe.moe.layer",
    "load": "ffn2moe.moe.checkpoint",
    "load_dense": "ffn2moe.dense.load",
    "open_export": "ffn2moe.runtime.export",
}
__all__ = ["MoEFFN", "MoESpec", "__version__", "load", "load_dense", "open_export"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        try:
            return getattr(import_module(_EXPORTS[name]), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            message = f'ffn2moe.{name} needs PyTorch, which is not installed: pip install "ffn2moe[convert]"'
            raise ModuleNotFoundError(message, name="torch") from None
    raise AttributeError(f"module 'ffn2moe' has no attribute {name!r}")
