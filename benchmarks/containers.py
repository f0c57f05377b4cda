"""Compare the logits of every native container of one dense model, in plain transformers, with those of its source.

    python -m benchmarks.containers ../shared/data/stories260k --out containers

With K = E and a router of zeros the source is the dense model, in float32 and bfloat16. With K < E it is the student,
with the container's own gates and with unit gates; nothing is trained, and random routers keep the scores apart. The
folders stay in --out, so that other engines can be tried on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.page import Grid, complain, console_of
from ffn2moe.containers.checks import Agreement, compare, open_native, same_logits
from ffn2moe.containers.container import Container
from ffn2moe.containers.fit import obstacle
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.containers.write import save
from ffn2moe.decompose.layer import mixture
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, shared_neurons
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import moe_layers
from ffn2moe.spec import Gate, MoESpec


def decomposed(source: str, container: Container, E: int, K: int, shared_width: int, gate: Gate) -> tuple[Any, MoESpec]:
    """Return the dense model with its neurons dealt to experts in order and a router of zeros, and its spec."""
    model, _ = load_dense(source, head="causal")
    spec = spec_of(
        model,
        head="causal",
        num_experts=E,
        num_active=K,
        partition="contiguous",
        teacher=source,
        max_length=512,
        shared_width=shared_width,
        gate=gate,
        router_bias=False,
        container=container.name,
        width_multiple=container.width_multiple,
    )
    expert_of_neuron_F = torch.full((spec.ffn_width,), -1)
    routed = spec.ffn_width - shared_width
    expert_of_neuron_F[shared_width:] = torch.arange(routed) * E // routed
    neurons_EM = neurons_by_expert(expert_of_neuron_F, E, container.width_multiple)
    shared_S = shared_neurons(expert_of_neuron_F)
    ffns = (read_ffn(model, layer) for layer in range(spec.num_layers))
    install_moe(model, [mixture(ffn, neurons_EM, shared_S, spec, layer) for layer, ffn in enumerate(ffns)])
    return model.eval(), spec


def route_at_random(model: Any, container: Container, seed: int = 0) -> None:
    """Draw router weights that give unit scores on unit tokens, and a choice bias where the container has one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for moe in moe_layers(model):
            E, D = moe.router.weight.shape
            moe.router.weight.copy_(torch.randn(E, D, generator=generator) / D**0.5)
            if container.choice_bias:
                moe.router.balance_bias.copy_(torch.randn(E, generator=generator) / 10)


@torch.no_grad()
def rows(source: str, container: Container, shared_width: int, ids_BL: Tensor, out: Path) -> dict[str, Agreement]:
    """Write one container in several ways; return the agreement of each with its source."""
    E, K = 4, 2
    dense, tokenizer = load_dense(source, head="causal")
    reference_BLV = dense(ids_BL).logits
    name = f"{container.name}-shared{shared_width}"
    found = {}
    model, spec = decomposed(source, container, E, E, shared_width, container.gate)
    for dtype, label in ((torch.float32, "K = E"), (torch.bfloat16, "K = E, bfloat16")):
        folder = out / f"{name}-full-{str(dtype).removeprefix('torch.')}"
        save(model, spec, folder, dtype=dtype, assets=source)
        found[label] = compare(open_native(folder, dtype)(ids_BL).logits.float(), reference_BLV)
    gates: tuple[tuple[Gate, str], ...] = ((container.gate, "K = 2"), ("unit", "K = 2, unit gates"))
    for gate, label in gates:
        model, spec = decomposed(source, container, E, K, shared_width, gate)
        route_at_random(model, container)
        folder = save(model, replace(spec, num_active=K), out / f"{name}-k{K}-{gate}", tokenizer=tokenizer)
        found[label] = same_logits(model, folder, ids_BL)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    purpose = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks.containers", description=purpose)
    parser.add_argument("source", help="a dense causal model: a Hugging Face folder")
    parser.add_argument("--text", type=Path, help="text to compare on (default: SOURCE/sample.txt)")
    parser.add_argument("--out", type=Path, required=True, help="where the containers are written; must not exist")
    parser.add_argument("--shared", type=int, default=44, help="neurons of the shared expert, where there is one")
    options = parser.parse_args(arguments)
    try:
        console_of().print(measure(options).table())
    except (ValueError, OSError) as error:
        return complain(error)
    return 0


def measure(options: argparse.Namespace) -> Grid:
    """Write every container and return the table of their agreements."""
    dense, tokenizer = load_dense(options.source, head="causal")
    text = (options.text or Path(options.source) / "sample.txt").read_text()
    ids_BL = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        rounded = compare(dense.bfloat16()(ids_BL).logits.float(), dense.float()(ids_BL).logits)
    cells = []
    for container in CONTAINERS.rows():
        for shared_width in (0,) if container.shared_expert is None else (0, options.shared):
            reason = obstacle(container, dense.config, shared_width=shared_width)
            if reason is not None:
                cells.append([container.name, "", f"not held: {reason}", "", "", ""])
                continue
            found = rows(options.source, container, shared_width, ids_BL, options.out)
            cells += [[container.name, str(shared_width), *_cells(*one)] for one in found.items()]
    cells.append(["dense", "", *_cells("bfloat16", rounded)])
    title = f"{options.source}: {ids_BL.shape[1]} tokens; relative difference of logits (largest / mean)"
    return Grid(title, ("container", "shared", "compared", "largest", "mean", "top-1"), cells)


def _cells(label: str, found: Agreement) -> tuple[str, ...]:
    return label, f"{found.largest:.1e}", f"{found.mean:.1e}", f"{found.top1:.3f}"


if __name__ == "__main__":
    sys.exit(main())
