"""Compare ways to leave out a part of a language model's FFNs without training: mixtures and baselines.

    python -m benchmarks.language_model ../shared/smollm2 --text ../shared/data/wikitext2/valid.txt

The text is split: every method is fitted to the same tokens of its first part and judged by the perplexity on its end.
Finished rows stay in --work, with what the FFNs read, so that a stopped run resumes and two processes with different
--methods share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.language_methods import METHODS, Case
from benchmarks.page import Grid, Page, about, parser_of, report, some, working
from ffn2moe import metrics
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import outputs
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.numerics import bf16_supported

HELD_OUT_TOKENS = 4096  # after the calibration tokens; the layers' errors are measured on them


@dataclass(frozen=True)
class Row:
    """Hold one row of the table."""

    method: str
    share: float  # of the FFNs that is active for a token
    size: float  # of the FFNs over that of the dense ones
    layer_error: float | None  # relative, mean over layers, on held-out tokens; None where layers are left out
    perplexity: float
    ratio: float  # to the dense model's perplexity
    error: float  # standard error of the logarithm of the ratio, over blocks
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    case: Case
    held_out: Sequence[Tensor]  # what each FFN reads, [T, D], on tokens that nothing is fitted to
    judged_NL: Tensor
    dense_N: Tensor  # nats a token of the dense model, by block

    def row(self, name: str, share: float) -> Row:
        """Make a model by one method and judge it."""
        title, make = METHODS[name]
        begun = time.monotonic()
        made = make(self.case, share)
        seconds = time.monotonic() - begun
        nats_N = judge(made.model, self.judged_NL)
        apart_N = nats_N - self.dense_N
        spread = (apart_N.std() / math.sqrt(len(apart_N))).item()
        ratio = math.exp(apart_N.mean().item())
        error = self._layer_error(made.ffns) if made.ffns else None
        return Row(title, share, made.size, error, math.exp(nats_N.mean().item()), ratio, spread, seconds)

    @torch.no_grad()
    def _layer_error(self, ffns: Sequence[Any]) -> float:
        dense, found = self.case.model(), []
        for layer, (ffn, x_TD) in enumerate(zip(ffns, self.held_out, strict=True)):
            wanted_TD = outputs(read_ffn(dense, layer), x_TD)
            found.append(((ffn(x_TD) - wanted_TD).norm() / wanted_TD.norm()).item())
        return sum(found) / len(found)


@torch.no_grad()
def judge(model: Any, ids_NL: Tensor) -> Tensor:
    """Return the nats a token of each block, [N] float64; products take bfloat16 where the machine computes it."""
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_supported()):
        for ids_L in ids_NL:
            logits_LV = model(input_ids=ids_L.unsqueeze(0)).logits[0, :-1].float()
            found.append(metrics.nats(logits_LV, ids_L[1:]).double().mean())
    return torch.stack(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.language_model", __doc__)
    parser.add_argument("model", help="a folder with a causal language model")
    parser.add_argument("--text", type=Path, required=True, help="a text file to calibrate and judge on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--judged", type=int, default=20480, help="tokens at the end of the text that judge")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(".cache/language_model"))
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Make every requested row that --work does not hold; return the page of all of them."""
    torch.set_num_threads(options.threads)
    counts = (options.text.stem, options.tokens, options.judged, options.length)
    work = options.work / "-".join(map(str, (Path(options.model).resolve().name, *counts)))
    work.mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    rows = []
    for share in options.shares:
        for name in options.methods:
            kept = work / f"{name}-{share}.json"
            if not kept.is_file():
                bench = bench or prepare(options, work, console)
                with working(console, f"{name}, {share}"):
                    row = bench.row(name, share)
                kept.write_text(json.dumps(asdict(row), indent=2))
                console.print(f"{name}, {share}: {row.ratio:.3f}x the dense perplexity")
            rows.append(Row(**json.loads(kept.read_text())))
    return page(options, rows)


def prepare(options: argparse.Namespace, work: Path, console: Console) -> Bench:
    """Split the text, record what the FFNs read, judge the dense model."""
    model, tokenizer = load_dense(options.model)
    ids_T = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    blocks_NL = ids_T[: len(ids_T) // options.length * options.length].view(-1, options.length)
    recorded = options.tokens + HELD_OUT_TOKENS
    wanted, judged = -(-recorded // options.length), options.judged // options.length
    before = blocks_NL[:-judged]
    if judged < 2 or len(before) < wanted:
        raise ValueError(
            f"{options.text} has {len(blocks_NL)} blocks of {options.length} tokens and this takes {wanted} to fit and "
            f"{max(judged, 2)} to judge: give more text, or lower --tokens or --judged"
        )
    spread = before[torch.linspace(0, len(before) - 1, wanted).long()]  # all over the part
    batches = [Batch({"input_ids": ids_1L}, None) for ids_1L in spread.split(1)]
    inputs = _inputs(model, batches, recorded, work, console)
    with working(console, "judging the dense model"):
        dense_N = judge(model, blocks_NL[-judged:])
    (work / "dense.json").write_text(json.dumps(math.exp(dense_N.mean().item())))
    fitted = batches[: -(-options.tokens // options.length)]
    case = Case(options.model, [x_TD[:-HELD_OUT_TOKENS] for x_TD in inputs], fitted, work)
    return Bench(case, [x_TD[-HELD_OUT_TOKENS:] for x_TD in inputs], blocks_NL[-judged:], dense_N)


def _inputs(model: Any, batches: Sequence[Batch], tokens: int, work: Path, console: Console) -> list[Tensor]:
    """Return what each FFN reads, [T, D]; it is kept in the working folder."""
    kept = work / "inputs.safetensors"
    if not kept.is_file():
        with working(console, "recording what the FFNs read"):
            found = layer_inputs(model, batches, max_tokens=tokens)
        save_file({str(layer): x_TD for layer, x_TD in enumerate(found)}, kept.with_suffix(".fresh"))
        kept.with_suffix(".fresh").rename(kept)
    tensors = load_file(kept)
    return [tensors[str(layer)] for layer in range(len(tensors))]


HEADER = ("FFN active", "method", "size of the FFNs", "layer error", "perplexity", "of dense")


def page(options: argparse.Namespace, rows: Sequence[Row]) -> Page:
    """Return the page: one table, the best ratio of each share in bold."""
    best = {share: min(row.ratio for row in rows if row.share == share) for share in {row.share for row in rows}}
    cells = []
    for row in rows:
        ratio = f"{row.ratio:.3f}x ± {row.error * row.ratio:.3f}"
        cells.append(
            [
                f"{100 * row.share:.0f} %",
                row.method,
                f"{row.size:.2f}x",
                "" if row.layer_error is None else f"{row.layer_error:.3f}",
                f"{row.perplexity:.2f}",
                f"**{ratio}**" if row.ratio == best[row.share] else ratio,
            ]
        )
    return Page(
        f"{Path(options.model).resolve().name}: a part of the FFNs, without training",
        [
            f"Fitted to {options.tokens} tokens of the first part of {options.text.name}, judged by the perplexity on "
            f"its last {options.judged} tokens in blocks of {options.length}. The layer error is relative, on "
            f"{HELD_OUT_TOKENS} held-out tokens of the first part, mean over layers. ± is one standard error over "
            f"blocks, paired with the dense model. {about()}, {some(options.threads, 'thread')}.",
        ],
        [Grid("a part of the FFNs, without training", HEADER, cells)],
    )


if __name__ == "__main__":
    sys.exit(main())
