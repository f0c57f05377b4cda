"""Run GGUF files in llama.cpp: greedy tokens and logits, by its C functions, without the work of a wrapper.

llama-cpp-python is installed beside this package: `pip install llama-cpp-python` compiles it for this processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

REMEDY = "pip install llama-cpp-python"
AT_ONCE = 512  # tokens of a prompt


def is_installed() -> bool:
    """Return whether llama.cpp can be used."""
    return util.find_spec("llama_cpp") is not None


@cache
def llama_cpp() -> Any:
    """Return llama.cpp's functions, started and silent."""
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache  # llama.cpp may call it at any time
def _silence() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def version() -> str:
    """Return the version of llama-cpp-python and what llama.cpp says it uses of this processor."""
    used = llama_cpp().llama_print_system_info().decode()
    return f"llama-cpp-python {metadata.version('llama-cpp-python')} ({used.strip(' |')})"


@dataclass(frozen=True)
class Contents:
    """What a GGUF file says of itself."""

    mixture: bool
    ffn_bits: float  # of a weight of the FFNs
    ffn_read: float  # weights of the FFNs that a token uses


def contents_of(path: Path) -> Contents:
    """Read the header of a GGUF file. ValueError for a file that is none."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    number = {name.rpartition(".")[2]: field.contents() for name, field in reader.fields.items() if field.types}
    used = number.get("expert_used_count", 0) / max(1, number.get("expert_count", 0))
    bytes_held = weights_held = weights_read = 0.0
    for tensor in reader.tensors:
        if ".ffn_" in tensor.name and len(tensor.shape) > 1 and "gate_inp" not in tensor.name:
            weights = float(prod(map(int, tensor.shape)))
            bytes_held, weights_held = bytes_held + tensor.n_bytes, weights_held + weights
            weights_read += weights * (used if "_exps." in tensor.name else 1)
    if not weights_held:
        raise ValueError(f"{path} has no FFN: give a GGUF file of a language model")
    return Contents(used > 0, 8 * bytes_held / weights_held, weights_read)


class LlamaFile:
    """An open GGUF file on a number of threads."""

    def __init__(self, path: Path, *, threads: int, positions: int) -> None:
        api = llama_cpp()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot open {path}: run `llama-cli -m {path}` to see why")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = positions, AT_ONCE, AT_ONCE
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        self.vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield the likeliest next token after a prompt, then after that token, without end."""
        self._forget()
        for start in range(0, len(ids), AT_ONCE):
            self._read(ids[start : start + AT_ONCE])
        while True:
            token = int(self._logits(-1).argmax())
            yield token
            self._read([token])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return logits [L, V] after each of at most `AT_ONCE` tokens."""
        api = llama_cpp()
        self._forget()
        batch = api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            self._require(api.llama_decode(self._context, batch))
        finally:
            api.llama_batch_free(batch)
        return np.stack([self._logits(place) for place in range(len(ids))])

    def close(self) -> None:
        """Free its memory."""
        llama_cpp().llama_free(self._context)
        llama_cpp().llama_model_free(self._model)

    def _forget(self) -> None:
        api = llama_cpp()
        api.llama_memory_clear(api.llama_get_memory(self._context), True)

    def _read(self, ids: Sequence[int]) -> None:
        api = llama_cpp()
        tokens = (api.llama_token * len(ids))(*ids)
        self._require(api.llama_decode(self._context, api.llama_batch_get_one(tokens, len(ids))))

    def _logits(self, place: int) -> np.ndarray:
        found = llama_cpp().llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(found, shape=(self.vocabulary,))

    @staticmethod
    def _require(code: int) -> None:
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}: out of memory, or the prompt is too long")
