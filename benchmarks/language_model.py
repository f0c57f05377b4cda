"""Compare ways to leave out a part of a language model's FFNs without training: mixtures and static pruning.

    python -m benchmarks.language_model ../shared/smollm2 --text ../shared/data/wikitext2/valid.txt

The text is split: every method is fitted to the same tokens of its first part and judged by the perplexity on its end.
Finished rows stay in --work, so that a stopped run resumes and two processes with different --methods share the work.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.ablation import methods as _methods  # noqa: F401 - registers the compressors
from benchmarks.ablation.compressors import build
from benchmarks.page import Grid, Page, about, parser_of, report, some, working
from ffn2moe import metrics
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer, outputs
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import install, read_ffn
from ffn2moe.moe.describe import spec_of
from ffn2moe.numerics import bf16_supported

HELD_OUT_TOKENS = 4096  # after the calibration tokens; the layers' errors are measured on them
EIGHTHS = 8  # experts of the disjoint partition


@dataclass(frozen=True)
class Row:
    """Hold one row of the table."""

    method: str
    share: float  # of the FFNs that is active for a token
    size: float  # of the FFNs over that of the dense ones
    layer_error: float  # relative, mean over layers, on held-out tokens
    perplexity: float
    ratio: float  # to the dense model's perplexity
    error: float  # standard error of the logarithm of the ratio, over blocks
    seconds: float


@dataclass(frozen=True)
class Made:
    """Hold an FFN's replacement and its size relative to the dense FFN."""

    module: nn.Module
    size: float


Method = Callable[[Any, int, DenseFFN, Tensor, float], Made]  # (model, layer, FFN, its inputs [T, D], active share)


def compressed(name: str) -> Method:
    """Return the method of a compressor of the ablation."""

    def make(model: Any, layer: int, ffn: DenseFFN, x_TD: Tensor, share: float) -> Made:
        return Made(build(name, ffn, x_TD, share, num_experts=1), share)

    return make


def mixture(partition: str, sizes: Callable[[int, float], tuple[int, int, int, int]]) -> Method:
    """Return the method of a partition; `sizes` gives E, K, S and M for an FFN width and an active share."""

    def make(model: Any, layer: int, ffn: DenseFFN, x_TD: Tensor, share: float) -> Made:
        E, K, S, M = sizes(ffn.ffn_width, share)
        spec = spec_of(
            model,
            head="causal",
            num_experts=E,
            num_active=K,
            shared_width=S,
            partition=partition,
            teacher="benchmark",
            max_length=x_TD.shape[0],
            sentence=None,
            router_bias=False,
            expert_width=M,
        )
        moe = decompose_layer(ffn, x_TD, spec, layer, seed=0)
        settings = RouterSettings(steps=200, batch_tokens=1024, seed=layer)
        route_layer(moe, x_TD, settings, partition=partition, held_out_TD=x_TD[:1])
        return Made(moe, (S + E * M) / ffn.ffn_width)

    return make


def eighths(F: int, share: float) -> tuple[int, int, int, int]:
    """Return eight experts."""
    return EIGHTHS, round(EIGHTHS * share), 0, -(-F // EIGHTHS)


def same_size(F: int, share: float) -> tuple[int, int, int, int]:
    """Return as many experts as make the size of the dense FFN; above one half, two and a shared expert."""
    active = round(share * F)
    if share > 0.5:
        return 2, 1, 2 * active - F, F - active
    return F // active, 1, 0, active


def half_more(F: int, share: float) -> tuple[int, int, int, int]:
    """Return the same with half a dense FFN of experts more."""
    E, K, S, M = same_size(F, share)
    return E + F // (2 * M), K, S, M


def double(F: int, share: float) -> tuple[int, int, int, int]:
    """Return the same with a dense FFN of experts more."""
    E, K, S, M = same_size(F, share)
    return E + F // M, K, S, M


METHODS: dict[str, tuple[str, Method]] = {
    "pruned": ("static pruning by energy, refit", compressed("pruned")),
    "needed": ("static pruning by need, refit", compressed("needed")),
    "coactivation": ("8 disjoint experts, coactivation", mixture("coactivation", eighths)),
    "clusters": ("experts for clusters of tokens", mixture("token_clusters", same_size)),
    "clusters_half_more": ("the same, larger by half", mixture("token_clusters", half_more)),
    "clusters_double": ("the same, doubled", mixture("token_clusters", double)),
}


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: str
    inputs: Sequence[Tensor]  # of each layer, [T, D]: calibration tokens, then held-out ones
    judged_NL: Tensor
    dense_N: Tensor  # nats a token of the dense model, by block

    def row(self, name: str, share: float) -> Row:
        """Make a model by one method and judge it."""
        title, make = METHODS[name]
        model, _ = load_dense(self.model)
        begun, error, size = time.monotonic(), 0.0, 0.0
        modules: list[nn.Module] = []
        for layer, x_TD in enumerate(self.inputs):
            ffn, fitted_TD, held_out_TD = read_ffn(model, layer), x_TD[:-HELD_OUT_TOKENS], x_TD[-HELD_OUT_TOKENS:]
            made = make(model, layer, ffn, fitted_TD, share)
            wanted_TD = outputs(ffn, held_out_TD)
            with torch.no_grad():
                error += ((made.module(held_out_TD) - wanted_TD).norm() / wanted_TD.norm()).item()
            size += made.size
            modules.append(made.module)
        for layer, module in enumerate(modules):
            install(model, layer, module)
        seconds = time.monotonic() - begun
        nats_N = judge(model, self.judged_NL)
        apart_N, L = nats_N - self.dense_N, len(self.inputs)
        spread = (apart_N.std() / math.sqrt(len(apart_N))).item()
        ratio = math.exp(apart_N.mean().item())
        return Row(title, share, size / L, error / L, math.exp(nats_N.mean().item()), ratio, spread, seconds)


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
    with working(console, "recording what the FFNs read"):
        inputs = layer_inputs(model, batches, max_tokens=recorded)
    with working(console, "judging the dense model"):
        dense_N = judge(model, blocks_NL[-judged:])
    (work / "dense.json").write_text(json.dumps(math.exp(dense_N.mean().item())))
    return Bench(options.model, inputs, blocks_NL[-judged:], dense_N)


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
                f"{row.layer_error:.3f}",
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
