"""The rows of `benchmarks.language_model`: ways to leave out a part of a language model's FFNs, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import cmoe, flap
from benchmarks.ablation import methods as _methods  # noqa: F401 - registers partitions and objectives
from benchmarks.ablation.compressors import build
from benchmarks.ablation.methods.factorllm import set_router
from ffn2moe.data.batches import Batch
from ffn2moe.decompose.gradients import fisher
from ffn2moe.decompose.layer import decompose_layer
from ffn2moe.decompose.narrow import with_narrow_ffns
from ffn2moe.decompose.route import RouterSettings, fit_router, route_layer
from ffn2moe.decompose.width_costs import costs, moments_of
from ffn2moe.decompose.widths import experts_are_chosen, widths_for, with_widths
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import ffn_layers, install, read_ffn
from ffn2moe.dense.reduction import kept_layers, reduction, with_layers
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.progress import Track, untracked
from ffn2moe.spec import MoESpec

EIGHTHS, QUARTERS = 8, 4  # experts of the disjoint partitions
ROUTER = RouterSettings(steps=200, batch_tokens=1024, seed=0)


@dataclass(frozen=True)
class Made:
    """Hold a smaller model, the size of its FFNs relative to the dense ones, and what stands in for each FFN."""

    model: Any
    size: float
    ffns: Sequence[Callable[[Tensor], Tensor]] = ()  # one a layer; none where layers are left out


@dataclass
class Case:
    """What every method is given: the dense model, and what its FFNs read on calibration tokens."""

    source: str
    inputs: Sequence[Tensor]  # of each layer, [T, D]
    batches: Sequence[Batch]  # the calibration tokens
    work: Path
    track: Track = field(default=untracked)

    def model(self) -> Any:
        """Return the dense model."""
        return load_dense(self.source)[0]

    @property
    def costs(self) -> list[Tensor]:
        """What each width of each layer costs (`ffn2moe.decompose.width_costs`)."""
        return self._weighed[0]

    @property
    def fishers(self) -> list[Tensor]:
        """The Fisher information of each FFN's output, [D, D]."""
        return self._weighed[1]

    @cached_property
    def _weighed(self) -> tuple[list[Tensor], list[Tensor]]:
        kept = self.work / "costs.safetensors"
        if not kept.is_file():
            model = self.model()
            weights = fisher(model, self.batches, head="causal", seed=0)
            found = {}
            for layer, x_TD in self.track(enumerate(self.inputs), len(self.inputs), "weighing neurons"):
                ffn = read_ffn(model, layer)
                found[f"fisher.{layer}"] = weights[layer]
                found[f"costs.{layer}"] = costs(ffn, moments_of(ffn, x_TD), weights[layer]) / len(x_TD)
            save_file(found, kept)
        found, layers = load_file(kept), range(len(self.inputs))
        return [found[f"costs.{layer}"] for layer in layers], [found[f"fisher.{layer}"] for layer in layers]


Method = Callable[[Case, float], Made]  # of an active share


def replaced(model: Any, modules: Sequence[nn.Module], size: float) -> Made:
    """Return the model with a module in the place of each FFN."""
    for layer, module in enumerate(modules):
        install(model, layer, module)
    return Made(model, size, modules)


# --- without experts --------------------------------------------------------------------------------------------------


def fewer_layers(case: Case, share: float) -> Made:
    """Keep layers that are spread evenly."""
    model = case.model()
    return _of_layers(model, kept_layers(round(share * len(case.inputs)), len(case.inputs)))


@torch.no_grad()
def fewer_changing_layers(case: Case, share: float) -> Made:
    """Leave out the layers that change the stream least: by the mean cosine before and after (ShortGPT, 2403.03853)."""
    model, changes = case.model(), []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        changes.append(1 - torch.cosine_similarity(inputs[0], after, dim=-1).mean())

    hooks = [layer.register_forward_hook(see) for layer in ffn_layers(model)]
    for batch in case.batches[:8]:
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    change_L = torch.stack(changes).view(-1, len(hooks)).mean(0)
    kept = change_L.topk(round(share * len(hooks))).indices.sort().values
    return _of_layers(model, kept.tolist())


def _of_layers(model: Any, kept: Sequence[int]) -> Made:
    return Made(with_layers(model, kept, "causal"), len(kept) / len(ffn_layers(model)))


def compressed(name: str) -> Method:
    """Return the method of a compressor of the ablation."""

    def make(case: Case, share: float) -> Made:
        model = case.model()
        modules = [
            build(name, read_ffn(model, layer), x_TD, share, num_experts=1)
            for layer, x_TD in case.track(enumerate(case.inputs), len(case.inputs), name)
        ]
        return replaced(model, modules, share)

    return make


def fluctuating(same: bool) -> Method:
    """Return FLAP, with the same width in all layers or with its own budgets."""

    def make(case: Case, share: float) -> Made:
        model = case.model()
        ffns = [read_ffn(model, layer) for layer in range(len(case.inputs))]
        scores = [flap.fluctuation(ffn, x_TD) for ffn, x_TD in zip(ffns, case.inputs, strict=True)]
        kept = flap.masks(scores, share, same=same)
        modules = [flap.pruned(*each) for each in zip(ffns, case.inputs, kept, strict=True)]
        return replaced(model, modules, torch.cat(kept).float().mean().item())

    return make


def narrower(by_need: bool) -> Method:
    """Return the product's narrower FFNs (`decompose.ffn_width`), with one width or with one for each layer."""

    def make(case: Case, share: float) -> Made:
        model = case.model()
        kept = reduction(model, "all", share)
        spec = spec_of(model, num_experts=1, num_active=1, reduction=kept, **_facts("none", case))
        spec = with_widths(spec, case.costs) if by_need else spec
        widths = [spec.shape_of(layer).ffn_width for layer in range(spec.num_layers)]
        smaller, _ = with_narrow_ffns(model, case.inputs, widths, "causal", case.track, case.fishers)
        ffns: list[DenseFFN] = [read_ffn(smaller, layer) for layer in range(spec.num_layers)]
        return Made(smaller, spec.active_share, ffns)

    return make


# --- with experts -----------------------------------------------------------------------------------------------------


def _facts(partition: str, case: Case) -> dict[str, Any]:
    return {
        "head": "causal",
        "partition": partition,
        "teacher": case.source,
        "max_length": 1024,
        "sentence": None,
        "router_bias": False,
    }


def mixture(
    partition: str,
    sizes: Callable[[int, float], tuple[int, int, int, int]],
    fit: Callable[[MoEFFN, Tensor, MoESpec, int, Tensor | None], None],
    *,
    by_need: bool = False,
) -> Method:
    """Return the method of a partition; `sizes` gives E, K, S and M for an FFN width and an active share."""

    def make(case: Case, share: float) -> Made:
        model = case.model()
        E, K, S, M = sizes(read_ffn(model, 0).ffn_width, share)
        widths = {"shared_width": S, "expert_width": M}
        spec = spec_of(model, num_experts=E, num_active=K, **widths, **_facts(partition, case))
        filled = with_widths(spec, case.costs) if by_need else spec
        fishers = case.fishers if experts_are_chosen(spec) else None
        modules = []
        for layer, x_TD in case.track(enumerate(case.inputs), len(case.inputs), partition):
            moe = decompose_layer(read_ffn(model, layer), x_TD, spec, layer, seed=0)
            fit(moe, x_TD, filled, layer, fishers[layer] if fishers else None)
            modules.append(moe)
        shapes = [filled.shape_of(layer) for layer in range(filled.num_layers)]
        held = sum(shape.shared_width + E * shape.expert_width for shape in shapes)
        return replaced(model, modules, held / sum(shape.ffn_width for shape in shapes))

    return make


def ours(moe: MoEFFN, x_TD: Tensor, spec: MoESpec, layer: int, fisher_DD: Tensor | None) -> None:
    """Fit router and outputs as the product does."""
    settings = ROUTER.for_layer(layer)
    how: dict[str, Any] = {"partition": spec.partition, "widths": widths_for(spec, layer), "fisher_DD": fisher_DD}
    route_layer(moe, x_TD, settings, held_out_TD=x_TD[:1], **how)


def released(moe: MoEFFN, x_TD: Tensor, spec: MoESpec, layer: int, fisher_DD: Tensor | None) -> None:
    """Leave the router random, as FactorLLM's code does: it gets no gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer)
        set_router(moe)


def published(moe: MoEFFN, x_TD: Tensor, spec: MoESpec, layer: int, fisher_DD: Tensor | None) -> None:
    """Train the router, and nothing else, by FactorLLM's Prior-Approximate loss."""
    settings = RouterSettings(
        steps=ROUTER.steps, batch_tokens=ROUTER.batch_tokens, seed=layer, start="zeros", objective="factorllm"
    )
    fit_router(moe, x_TD, settings)
    moe.set_scale(moe.num_experts / moe.num_active)


def carved(case: Case, share: float) -> Made:
    """Make CMoE's experts."""
    model = case.model()
    modules = [
        cmoe.carved(read_ffn(model, layer), x_TD, share)
        for layer, x_TD in case.track(enumerate(case.inputs), len(case.inputs), "CMoE")
    ]
    return replaced(model, modules, 1.0)


def even(num_experts: int) -> Callable[[int, float], tuple[int, int, int, int]]:
    """Return the sizes of disjoint experts."""
    return lambda F, share: (num_experts, round(num_experts * share), 0, -(-F // num_experts))


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
    "fewer_layers": ("fewer layers, spread evenly", fewer_layers),
    "fewer_changing_layers": ("fewer layers, without those that change the stream least", fewer_changing_layers),
    "flap": ("static pruning, FLAP's criterion and bias", fluctuating(same=True)),
    "flap_budgets": ("the same, FLAP's budgets over layers", fluctuating(same=False)),
    "pruned": ("static pruning by energy, refit", compressed("pruned")),
    "needed": ("static pruning by elimination, refit", narrower(by_need=False)),
    "needed_widths": ("the same, a width for each layer", narrower(by_need=True)),
    "factorllm_released": ("FactorLLM as released, 4 experts", mixture("contiguous", even(QUARTERS), released)),
    "factorllm_published": ("FactorLLM as published, 4 experts", mixture("contiguous", even(QUARTERS), published)),
    "cmoe": ("CMoE, 8 experts", carved),
    "coactivation": ("8 disjoint experts, coactivation", mixture("coactivation", even(EIGHTHS), ours)),
    "clusters": ("experts for clusters of tokens", mixture("token_clusters", same_size, ours)),
    "clusters_widths": ("the same, a width for each layer", mixture("token_clusters", same_size, ours, by_need=True)),
    "clusters_half_more": ("experts for clusters, larger by half", mixture("token_clusters", half_more, ours)),
    "clusters_half_more_widths": (
        "the same, a width for each layer",
        mixture("token_clusters", half_more, ours, by_need=True),
    ),
    "clusters_double": ("experts for clusters, doubled", mixture("token_clusters", double, ours)),
    "clusters_double_widths": (
        "the same, a width for each layer",
        mixture("token_clusters", double, ours, by_need=True),
    ),
}
