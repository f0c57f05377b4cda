"""Time `ffn2moe check` on a checkpoint of 1.1 B weights that takes no disk: `python -m benchmarks.check`.

The weights are holes in a sparse file, in bfloat16 and in the shape of TinyLlama. Their headers are real, so the check
reads what it would read of the real one; the memory of the process shows that it reads no weight.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import make_tokenizer

RUNS = 3
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def make_sparse(folder: Path, model: Any) -> int:
    """Write a model of the meta device as a checkpoint in bfloat16 whose weights are holes; return its bytes."""
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    model.config.save_pretrained(folder)
    return end


def main() -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, dtype="bfloat16"))
        size = make_sparse(folder, model)
        weights = sum(parameter.numel() for parameter in model.parameters())
        on_disk = _on_disk(folder) / 2**20
        print(f"{weights / 1e9:.2f} B weights, {size / 2**30:.1f} GiB, of which {on_disk:.1f} MiB on disk")
        for _ in range(RUNS):
            start = time.perf_counter()
            command = [sys.executable, "-m", "ffn2moe.cli", "check", name]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            shown = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            processor = used.ru_utime + used.ru_stime
            print(
                f"exit code {os.waitstatus_to_exitcode(status)}, {seconds:.1f} s ({processor:.1f} s of a processor), "
                f"{used.ru_maxrss / 2**20:.2f} GiB of memory at most"
            )
        print(shown)


def _on_disk(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


if __name__ == "__main__":
    main()
