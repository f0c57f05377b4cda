"""Measure what few bits cost a language model, matrix by matrix: perplexity with some of them rounded.

    python -m benchmarks.rounding ./my-llama half half-pruned --text held-out.txt

The sources are dense models, folders that `ffn2moe convert` wrote, or checkpoints. Weights are rounded as GGUF stores
them, in blocks of a row, and multiplied in float32: the rounding of activations by an engine is not in it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.page import Grid, Page, about, parser_of, report
from ffn2moe import metrics
from ffn2moe.judge import Subject
from ffn2moe.judges.reading import blocks, read
from ffn2moe.moe import checkpoint
from ffn2moe.progress import Screen

# The matrices of a layer, by the end of a parameter's name: of transformers, and of our mixtures.
PARTS = {
    "queries": r"q_proj\.weight",
    "keys": r"k_proj\.weight",
    "values": r"v_proj\.weight",
    "attention's output": r"o_proj\.weight",
    "gate and up": r"(gate_proj\.weight|up_proj\.weight|w_gate|w_in|shared_gate|shared_in)",
    "down": r"(down_proj\.weight|w_out|shared_out)",
}
KEPT = "Q8_0"  # what is not rounded to the type has this one, where all of a layer is rounded
ROWS: dict[str, tuple[str, ...]] = {
    **{f"{name} alone": (name,) for name in PARTS},
    "all": tuple(PARTS),
    "all but the values": tuple(name for name in PARTS if name != "values"),
    "all but keys and values": tuple(name for name in PARTS if name not in ("keys", "values")),
    "the FFNs": ("gate and up", "down"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.rounding", __doc__)
    parser.add_argument("sources", nargs="+", help="dense models, folders that `ffn2moe convert` wrote, or checkpoints")
    parser.add_argument("--text", type=Path, required=True, help="a text that nothing was fitted to")
    parser.add_argument("--type", default="Q4_0", help="the type of GGUF that matrices are rounded to (Q4_0)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text that judge (2048)")
    parser.add_argument("--block", type=int, default=512, help="tokens that are read together (512)")
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Round the matrices of each model in turn; return the page. ValueError for a type that is not known."""
    if options.type not in gguf.GGMLQuantizationType.__members__:
        raise ValueError(f"there is no type {options.type} in GGUF: name one such as Q4_0 or Q5_1")
    if not options.text.is_file():
        raise FileNotFoundError(f"there is no file {options.text}: name a text in UTF-8 with --text")
    text = options.text.read_text(encoding="utf-8")
    found = {}
    with Screen(console) as screen:
        for source in options.sources:
            folder = Path(source) / "checkpoint"
            subject = Subject.of(str(folder) if (folder / checkpoint.SPEC_FILE).is_file() else source, screen.say)
            name = Path(source).name
            found[name] = _perplexities(subject, name, text, options, screen)
    rows = [["none", *(f"{one['none']:.2f}" for one in found.values())]]
    rows += [[name, *(f"{one[name] / one['none']:.3f}x" for one in found.values())] for name in ROWS]
    told = f"{options.tokens} tokens of {options.text.name} in blocks of {options.block}"
    return Page(
        f"What {options.type} costs, matrix by matrix",
        [
            f"{about()}. Perplexity on {told}, over that of the same model in float32. A matrix outside the ones that "
            f"are named is in float32; where all of a layer is rounded, the ones that are left out have {KEPT}. "
            "Embeddings and the output matrix are never rounded."
        ],
        [Grid("Perplexity", ["rounded", *found], rows)],
        result={"perplexity": found},
    )


def _perplexities(
    subject: Subject, label: str, text: str, options: argparse.Namespace, screen: Screen
) -> dict[str, float]:
    model, tokenizer = subject.open()
    model.eval()
    judged = blocks(tokenizer, text, options.block)[: max(1, options.tokens // options.block)]
    whole = {name: one.detach().clone() for name, one in model.named_parameters()}
    found = {}
    for name, parts in screen.track([("none", ()), *ROWS.items()], 1 + len(ROWS), label):
        rounded(model, whole, parts, options.type, others=KEPT if name.startswith("all") else None)
        reading = read({name: model}, judged)[name]
        found[name] = metrics.perplexity(reading.nats_N, reading.positions_N)
    return found


@torch.no_grad()
def rounded(
    model: Any, whole: dict[str, Tensor], parts: Collection[str], kind: str, *, others: str | None = None
) -> None:
    """Give a model its weights, with those of `parts` rounded to a type of GGUF, and the `others` to another one."""
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in PARTS.items() if re.search(rf"(^|\.){pattern}$", name)), None)
        stored = None if part is None else kind if part in parts else others
        parameter.copy_(whole[name] if stored is None else _stored(whole[name], stored))


def _stored(weight: Tensor, kind: str) -> Tensor:
    """Return the numbers of a matrix after they were stored in a type of GGUF."""
    number, width = gguf.GGMLQuantizationType[kind], weight.shape[-1]
    block = gguf.GGML_QUANT_SIZES[number][0]
    rows = torch.nn.functional.pad(weight.float(), (0, -width % block)).numpy()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, number), number)[..., :width].copy())


if __name__ == "__main__":
    sys.exit(main())
