"""From dense FFNs to routed mixtures, a layer at a time: what the stages, `convert` and `stream` are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe import oracle
from ffn2moe.activations import NeuronStatistics, low_precision
from ffn2moe.dense import DenseFFN, ffn_modules, stacks_of
from ffn2moe.experts import neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.metrics import pool
from ffn2moe.moe import MoEFFN
from ffn2moe.partition import PartitionMethod, partition_with_shared, token_groups
from ffn2moe.routing import Objective, Start, phases, start_weights, train_router
from ffn2moe.spec import Head, MoESpec, Pooling
from ffn2moe.train import Batch

CHUNK = 4096  # tokens at once, where that makes no more numbers than ...
MOST_NUMBERS = 2**25  # ... this: the activations, or the outputs of all experts, of a chunk


@torch.no_grad()
def layer_inputs(
    model: Any, batches: Iterable[Batch], *, max_tokens: int, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """What the FFN of each layer gets to see: its inputs [T, D] on the CPU, float32, for every layer in order.

    Positions that are padding are left out. A layer sees at most the first `max_tokens` tokens of the batches, the
    same ones as the other layers of its stack. The model is moved to `device` and left in eval mode.
    """
    seen: list[list[Tensor]] = []
    now: list[Batch] = []

    def keep(index: int, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if sum(map(len, seen[index])) < max_tokens:
                seen[index].append(real_tokens(inputs[0], now[-1], path).float().cpu())

        return hook

    paths = [stack.layers for stack, layers in stacks_of(model) for _ in layers]
    hooks = []
    for index, (module, path) in enumerate(zip(ffn_modules(model), paths, strict=True)):
        seen.append([])
        hooks.append(module.register_forward_pre_hook(keep(index, path)))
    model.to(device).eval()
    try:
        for batch in batches:
            now.append(batch.to(torch.device(device)))
            model(**now[-1].inputs)
            if all(sum(map(len, parts)) >= max_tokens for parts in seen):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts)[:max_tokens] for parts in seen]


def real_tokens(x: Tensor, batch: Batch, layers: str) -> Tensor:
    """The rows [T, D] of a layer's input, [B, L, D] or [B * L, D], that are no padding.

    `layers` is the path of the layer's stack. The batch's mask is that of the output; the encoder before a decoder
    has its own, `attention_mask`. Input that no mask fits, such as image patches, is real throughout.
    """
    masks = [batch.mask, batch.inputs.get("attention_mask")]
    if layers.startswith("encoder") and "decoder_input_ids" in batch.inputs:
        masks.reverse()
    for mask in masks:
        if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
            return x[mask.bool().reshape(x.shape[:-1])]
    return x.reshape(-1, x.shape[-1])


def texts_of(batches: Iterable[Batch], max_tokens: int) -> Tensor:
    """Which text each token of `layer_inputs` belongs to, [T], counted from 0; for models of one stack."""
    parts: list[Tensor] = []
    texts = 0
    for batch in batches:
        mask = batch.inputs["attention_mask"] if batch.mask is None else batch.mask
        parts.append(mask.nonzero()[:, 0].cpu() + texts)
        texts += len(mask)
        if sum(map(len, parts)) >= max_tokens:
            break
    return torch.cat(parts)[:max_tokens]


def chunk_of(numbers: int) -> int:
    """How many tokens to work on at once, where each makes so many numbers."""
    return max(256, min(CHUNK, MOST_NUMBERS // numbers))


def output_gradients(
    model: Any,
    batches: Iterable[Batch],
    *,
    head: Head,
    pooling: Pooling | None,
    max_tokens: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """The gradient of the model's loss at the output of each layer's FFN, [T, D] for the tokens of `layer_inputs`.

    The loss of a model that writes text is the cross-entropy of the next token. Any other is judged by what it gives,
    a sentence embedding, logits or hidden states, which has no loss without labels: there it is the output's part in a
    random direction (one of signs, for each text), whose gradient is, squared and on average, how far the output moves.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = [layer.get_submodule(stack.w_out) for stack, layers in stacks_of(model) for layer in layers]
    paths = [stack.layers for stack, layers in stacks_of(model) for _ in layers]
    found: list[list[Tensor]] = [[] for _ in outputs]
    probes: list[Tensor] = []

    def add_probe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [module.register_forward_hook(add_probe) for module in outputs]
    model.to(device).eval().requires_grad_(False)
    try:
        for batch in batches:
            batch = batch.to(torch.device(device))
            probes.clear()
            gradients = torch.autograd.grad(_loss(model, batch, head, pooling, generator), probes)
            for parts, gradient, path in zip(found, gradients, paths, strict=True):
                parts.append(real_tokens(gradient, batch, path).float().cpu())
            if all(sum(map(len, parts)) >= max_tokens for parts in found):
                break
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return [torch.cat(parts)[:max_tokens] for parts in found]


def _loss(model: Any, batch: Batch, head: Head, pooling: Pooling | None, generator: torch.Generator) -> Tensor:
    """What `output_gradients` differentiates: a sum over texts and tokens."""
    if head == "causal" or head == "seq2seq":
        logits_BLV = model(**batch.inputs).logits[:, :-1]
        ids_BL = batch.inputs["input_ids" if head == "causal" else "decoder_input_ids"][:, 1:]
        if batch.mask is not None:
            ids_BL = ids_BL.masked_fill(batch.mask[:, 1:] == 0, -100)  # which cross_entropy leaves out
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), ids_BL.flatten(), reduction="sum")
    if head == "embedding":
        assert batch.mask is not None and pooling is not None
        output = pool(model(**batch.inputs)[0], batch.mask, pooling)
    else:
        found = model(**batch.inputs)
        output = found.logits if getattr(found, "logits", None) is not None else found[0]
    direction = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * direction).sum()


@torch.no_grad()
def carve(
    ffn: DenseFFN,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    seed: int,
    gradient_TD: Tensor | None = None,
    guarded: Tensor | None = None,
) -> MoEFFN:
    """The mixture of one layer: the FFN's neurons divided by what they do on tokens [T, D], and nothing trained.

    `spec` says how many experts, how wide, and by which partition; the router scores all alike. `gradient_TD` is that
    of the loss at the FFN's output (`output_gradients`), which the partition `gradient` needs. The neurons `guarded`
    always belong to the shared expert.
    """
    shape = spec.shape_of(layer)
    method: PartitionMethod = spec.partition  # type: ignore[assignment]
    statistics = neuron_statistics(ffn, x_TD, method, spec.num_experts, shape.shared_width, seed, gradient_TD)
    expert_of_neuron_F = partition_with_shared(
        method, ffn, statistics, spec.num_experts, seed, shape.shared_width, guarded
    )
    neurons_EM = neurons_by_expert(expert_of_neuron_F, spec.num_experts, shape.expert_width)
    return mixture(ffn, neurons_EM, shared_neurons(expert_of_neuron_F), spec, layer)


def mixture(ffn: DenseFFN, neurons_EM: Tensor, shared_S: Tensor, spec: MoESpec, layer: int) -> MoEFFN:
    """The mixture of one layer under a partition that is known."""
    return MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM, shared_S), neurons_EM, layer, shared_S).eval()


@torch.no_grad()
def largest_contributions(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """The most that each neuron adds to the FFN's output on tokens [T, D], [F]: what `super_neurons` are told by."""
    return neuron_statistics(ffn, x_TD, "nested", 1, 0, 0).largest_contribution(ffn)


@torch.no_grad()
def outputs(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Output of a dense FFN, [T, D], a part of the tokens at a time, as something to fit to (`low_precision`)."""
    found_TD = torch.empty_like(x_TD)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk := chunk_of(ffn.ffn_width)):
            found_TD[start : start + chunk] = ffn(x_TD[start : start + chunk])
    return found_TD


def neuron_statistics(
    ffn: DenseFFN,
    x_TD: Tensor,
    method: PartitionMethod,
    num_experts: int,
    shared_width: int,
    seed: int,
    gradient_TD: Tensor | None = None,
) -> NeuronStatistics:
    """What a partition into experts, and into S shared neurons, asks of the neurons on tokens [T, D]."""
    weighed = method == "gradient" and gradient_TD is not None
    statistics = NeuronStatistics(ffn.ffn_width, num_experts if weighed else 0, profiles=method == "coactivation")
    if method not in ("coactivation", "gradient", "nested") and shared_width == 0:
        return statistics
    group_T = token_groups(x_TD, num_experts, seed) if weighed else None
    chunk = chunk_of(ffn.ffn_width)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            h_TF = ffn.neurons(x_TD[rows])
            statistics.update(h_TF)
            if gradient_TD is not None and group_T is not None:
                statistics.update_importance(h_TF, gradient_TD[rows] @ ffn.w_out_DF, group_T[rows])
    return statistics


def fit_router(
    moe: MoEFFN,
    x_TD: Tensor,
    *,
    ridge: float,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    start: Start = "ridge",
    objective: Objective = "oracle",
    temperature: float = 1.0,
    text_T: Tensor | None = None,
    route_TD: Tensor | None = None,
) -> list[float]:
    """Fit a layer's router to the oracle's choices on tokens [T, D], and its scale and mean to the router.

    From `start` (with the penalty `ridge`) by `steps` of AdamW on `objective`, the scores divided by `temperature` at
    first and by 1 at last (ffn2moe.routing); returns the loss of each step. No expert changes. How many experts a token
    uses on average is calibrated where the selection leaves it open.

    With routing `sequence` the router reads `route_TD`, the means of the tokens' texts (ffn2moe.texts.text_means), and
    its labels are sums over the tokens of each text, `text_T` [T] (`texts_of`). ValueError without them, and for starts
    and objectives about single experts where the selection is `prefix`.
    """
    read_RD = x_TD
    if moe.routing == "sequence":
        if text_T is None or route_TD is None:
            raise ValueError("routing 'sequence' fits routers to whole texts: give text_T and route_TD of the tokens")
        read_RD = x_TD.new_zeros(int(text_T.max()) + 1, x_TD.shape[1])
        read_RD[text_T] = route_TD
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    survey = oracle.survey(moe, x_TD, chunk, text_T if moe.routing == "sequence" else None)
    moe.router.set(*start_weights(start, moe, read_RD, survey, x_TD, penalty=ridge, chunk=chunk))
    losses = list(
        train_router(
            moe.router,
            read_RD,
            phases(objective, moe, x_TD, survey, text_T=text_T if moe.routing == "sequence" else None, chunk=chunk),
            steps=steps,
            batch_rows=max(1, batch_tokens * len(read_RD) // len(x_TD)),
            learning_rate=learning_rate,
            seed=seed,
            temperature=temperature,
        )
    )
    moe.calibrate(x_TD, route_TD)
    part = slice(chunk)  # one number, so a part of the tokens will do
    moe.fit_router_scale(x_TD[part], None if route_TD is None else route_TD[part])
    if moe.b_out is None:
        oracle.fit_scales(moe, survey.grams, read_RD)
    else:
        moe.fit_scale_and_mean(x_TD, chunk, route_TD)
    return losses


@contextmanager
def every_expert(layers: Sequence[MoEFFN]) -> Iterator[None]:
    """For a while, each layer is the dense FFN that it was carved from: K = E and equal scores."""
    changed = ("router.", "output_scale", "elastic_scale.")
    kept = [
        (moe.num_active, {k: v.clone() for k, v in moe.state_dict().items() if k.startswith(changed)}) for moe in layers
    ]
    for moe in layers:
        moe.use_all_experts()
    try:
        yield
    finally:
        for moe, (num_active, tensors) in zip(layers, kept, strict=True):
            moe.num_active = num_active
            moe.load_state_dict(tensors, strict=False)


@torch.no_grad()
def output_of(model: Any, batch: Batch) -> Tensor:
    """What a model gives for a batch, its logits or else its last hidden state, where that is no padding. [N, ...]"""
    found = model(**batch.inputs)
    output = found.logits if getattr(found, "logits", None) is not None else found[0]
    if batch.mask is not None and output.shape[:2] == batch.mask.shape:
        return output[batch.mask.bool()]
    return output
