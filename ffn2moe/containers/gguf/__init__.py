"""Write a language model as a GGUF file, which llama.cpp and the programs made of it open.

docs/containers.md says which model becomes which architecture of llama.cpp. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {"GGUF_TYPES": "types", "Written": "write", "folder_of": "source", "write_gguf": "write"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
