"""Measure how far a graph is from PyTorch, on batches whose routing is not decided by rounding.

A *sample* is one batch of a model's inputs, by name: `input_ids` and `attention_mask` [B, L], with the padding on
the left for a language model; `decoder_input_ids` [B, L] beside the source of a seq2seq model; `pixel_values` or
`input_features`. Letters as in `ffn2moe.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ffn2moe.choices import HEADS
from ffn2moe.dense.config import takes_token_types
from ffn2moe.dense.families import positions
from ffn2moe.dense.sentence import embed
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.runtime.at_once import TOKEN_TYPES
from ffn2moe.runtime.batching import pad
from ffn2moe.spec import Head, MoESpec

Sample = Mapping[str, np.ndarray]
# A graph as a function: a sample in, outputs by name.
Run = Callable[[Sample], Mapping[str, np.ndarray]]
# Two experts closer than this share of the layer's typical score may swap by rounding alone.
NEAR_TIE = 1e-5
# Rounding moves a number by some 1e-7 of itself. Where a change of the embedded tokens by NUDGE, a share of each
# number, moves an output by more than MOST_MOVED of its largest number, rounding alone decides what comes out.
NUDGE, MOST_MOVED = 1e-6, 1e-5
LARGEST_BATCH = 8
LONGEST_ANSWER = 16  # tokens of a seq2seq model's decoder


@dataclass(frozen=True)
class Reference:
    """PyTorch's outputs for one sample, and how sure its routing is of each row."""

    sample: Sample
    outputs: Mapping[str, np.ndarray]
    # Least change of a score that changes a choice, as a share of the layer's typical score; 0 for a row whose output
    # rounding alone moves.
    margin_B: np.ndarray
    choices: tuple[np.ndarray, ...]  # of each layer, as indicators [B, L, E], false at padding

    def counts(self, output: str) -> np.ndarray:
        """Return which rows [B], or tokens [B, L], of an output are not padding."""
        mask_BL = self.sample.get("attention_mask")
        shape = self.outputs[output].shape
        if len(shape) == 3 and mask_BL is not None and "decoder_input_ids" not in self.sample:
            found: np.ndarray = mask_BL != 0
            return found
        return np.ones(shape[: max(1, len(shape) - 1)], dtype=bool)


def torch_outputs(model: Any, head: Head, sample: Sample) -> dict[str, Tensor]:
    """Return the outputs of a transformers model with this head, under the names that its graph uses."""
    inputs = {name: torch.from_numpy(array) for name, array in sample.items()}
    if head == "causal":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return {"logits": model(**inputs, use_cache=False).logits}
    if head == "seq2seq":
        return {"logits": model(**inputs, use_cache=False).logits}
    if HEADS[head].classifies:
        return {"logits": model(**inputs).logits}
    hidden_BLD = model(**inputs).last_hidden_state
    if head == "features":
        return {"last_hidden_state": hidden_BLD}
    embedding_BD = embed(model, hidden_BLD, inputs["attention_mask"])
    return {"last_hidden_state": hidden_BLD, "sentence_embedding": embedding_BD}


@torch.no_grad()
def reference(
    model: nn.Module,
    samples: Sequence[Sample],
    head: Head,
    *,
    tanh: bool = False,
) -> list[Reference]:
    """Return PyTorch's outputs for samples; with `tanh`, plain experts use GELU's tanh form."""
    model.eval()
    in_decoder = {
        id(module): head == "seq2seq" and "decoder." in name
        for name, module in model.named_modules()
        if isinstance(module, MoEFFN)
    }
    mixtures = moe_layers(model)
    before = [(moe.observer, moe.activation) for moe in mixtures]
    seen: list[tuple[MoEFFN, Tensor, Choice]] = []
    for moe in mixtures:
        moe.observer = lambda scores_TE, choice, moe=moe: seen.append((moe, scores_TE, choice))
        if tanh and moe.activation == "gelu" and moe.w_gate is None:
            moe.activation = "gelu_tanh"
    try:
        found = []
        for sample in samples:
            seen.clear()
            outputs = torch_outputs(model, head, sample)
            B = len(next(iter(sample.values())))
            margin_B = torch.full((B,), torch.inf)
            choices = []
            for moe, scores_TE, choice in seen:
                mask = None if in_decoder[id(moe)] else sample.get("attention_mask")
                read_BL = (
                    torch.ones(B, len(scores_TE) // B, dtype=torch.bool)
                    if mask is None
                    else torch.from_numpy(mask) != 0
                )
                used_TE = choice.indicator_TE(moe.num_experts).bool()
                choices.append((used_TE.reshape(*read_BL.shape, -1) & read_BL.unsqueeze(-1)).numpy())
                lead_BL = _lead(moe, scores_TE, used_TE).reshape(read_BL.shape)
                margin_B = margin_B.minimum(lead_BL.masked_fill(~read_BL, torch.inf).amin(1))
            arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
            one = Reference(sample, arrays, margin_B.numpy(), tuple(choices))
            found.append(replace(one, margin_B=np.where(_moved(model, head, one) > MOST_MOVED, 0.0, one.margin_B)))
        return found
    finally:
        for moe, (observer, activation) in zip(mixtures, before, strict=True):
            moe.observer, moe.activation = observer, activation


def _moved(model: nn.Module, head: Head, known: Reference) -> np.ndarray:
    """Return by how much the outputs of each row move, [B], where the embedded tokens change by NUDGE.

    It is a share of the largest number of the vector that moves most. Zeros for a model that embeds no tokens.
    """
    B = len(known.margin_B)
    if "input_ids" not in known.sample:
        return np.zeros(B)
    generator = torch.Generator().manual_seed(0)

    def nudged(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * (1 + NUDGE * (2 * torch.rand(output.shape, generator=generator) - 1))

    hook = model.get_input_embeddings().register_forward_hook(nudged)
    try:
        outputs = torch_outputs(model, head, known.sample)
    finally:
        hook.remove()
    moved_B = np.zeros(B)
    for name, before in known.outputs.items():
        scale = np.maximum(1.0, np.abs(before).max(-1))
        share = np.where(known.counts(name), np.abs(outputs[name].numpy() - before).max(-1) / scale, 0.0)
        moved_B = np.maximum(moved_B, share.reshape(B, -1).max(1))
    return moved_B


def _lead(moe: MoEFFN, scores_TE: Tensor, used_TE: Tensor) -> Tensor:
    """Return by how much scores may change before a token's choice does, [T], as a share of the typical score."""
    if moe.num_experts == moe.num_active:
        return scores_TE.new_full((len(scores_TE),), torch.inf)
    ranked_TE = moe.router.ranked(scores_TE)
    used_least_T = ranked_TE.masked_fill(~used_TE, torch.inf).amin(-1)
    unused_best_T = ranked_TE.masked_fill(used_TE, -torch.inf).amax(-1)
    return (used_least_T - unused_best_T) / ranked_TE.abs().mean().clamp(min=1e-30)


@dataclass(frozen=True)
class Gap:
    """How far one vector of an output, of a token or a text, is from PyTorch's."""

    difference: float  # the largest of its numbers
    scale: float  # the largest of its numbers in PyTorch; 1 where they are smaller

    @property
    def share(self) -> float:
        """The difference as a share of the scale: float32 rounds large numbers by more."""
        return self.difference / self.scale


@dataclass(frozen=True)
class Parity:
    """How far a graph is from PyTorch, over the rows compared."""

    by_output: Mapping[str, float]  # largest absolute difference of each output
    gaps: Mapping[str, Gap]  # the vector of each output with the largest share
    rows: int
    near_ties: int  # rows left out, as their routing is decided by less than rounding, or not among `only`

    @property
    def max_abs(self) -> float:
        return float(np.max(list(self.by_output.values())))  # NaN stays NaN

    @property
    def widest(self) -> str:
        """The output with the largest share; one that is NaN comes first."""
        return max(self.gaps, key=lambda name: np.nan_to_num(self.gaps[name].share, nan=np.inf))


def parity(run: Run, references: Sequence[Reference], only: Sequence[np.ndarray] | None = None) -> Parity:
    """Compare a graph with PyTorch on every row whose routing is not a near tie, without the padding.

    `only` names the rows [B] of each sample to compare, where others are known to differ.

    A near tie is a true discontinuity of the mixture: the last bit of a score sends a token to another expert. A row
    whose output rounding alone moves is left out with them: some texts of few tokens make a model multiply the last bit
    a thousandfold.
    ValueError if the routing of every row is one: then nothing can be compared.
    """
    largest: dict[str, float] = {}
    gaps: dict[str, Gap] = {}
    rows = near_ties = 0
    for index, known in enumerate(references):
        found = run(known.sample)
        sure_B = known.margin_B > NEAR_TIE
        if only is not None:
            sure_B &= only[index]
        rows += int(sure_B.sum())
        near_ties += int((~sure_B).sum())
        for name, expected in known.outputs.items():
            counts = known.counts(name)
            compared = counts & sure_B.reshape(-1, *(1,) * (counts.ndim - 1))
            differences = np.abs(found[name] - expected)[compared]
            before = largest.setdefault(name, 0.0)
            gaps.setdefault(name, Gap(0.0, 1.0))
            if differences.size:
                largest[name] = float(np.maximum(before, differences.max()))  # NaN, once seen, stays
                gaps[name] = _wider(gaps[name], _widest(differences, expected[compared]))
    if rows == 0 and only is None:
        raise ValueError(
            "rounding alone decides what comes out for every text, so no graph can be compared with PyTorch. Where the "
            "router scores the experts alike, its choice is arbitrary: train the router first. Else the model is "
            "damaged: it multiplies a change in the last digit of its inputs a hundredfold"
        )
    return Parity(largest, gaps, rows, near_ties)


def _widest(differences_Nn: np.ndarray, expected_Nn: np.ndarray) -> Gap:
    """Return the gap of the vector, on the last axis, whose difference is the largest share of its own numbers."""
    largest_N = differences_Nn.max(axis=-1).ravel()
    scale_N = np.maximum(1, np.abs(expected_Nn).max(axis=-1)).ravel()
    place = int(np.argmax(largest_N / scale_N))  # the first NaN, if there is one
    return Gap(float(largest_N[place]), float(scale_N[place]))


def _wider(one: Gap, other: Gap) -> Gap:
    return one if np.isnan(one.share) or one.share >= other.share else other


def same_choices(first: Sequence[Reference], second: Sequence[Reference]) -> list[np.ndarray]:
    """Return for each sample the rows [B] whose tokens all go to the same experts in both."""
    return [
        np.all([(a == b).all(axis=(1, 2)) for a, b in zip(one.choices, other.choices, strict=True)], axis=0)
        if one.choices
        else np.ones(len(one.margin_B), dtype=bool)
        for one, other in zip(first, second, strict=True)
    ]


def agreement(run: Run, references: Sequence[Reference], output: str) -> float:
    """Return how well an output points in PyTorch's direction, at most 1: for graphs that are not meant to be equal.

    It is the mean cosine of sentence embeddings, and for any other output one correlation over all its numbers.
    ValueError for an output that is NaN or infinite.
    """
    pairs = []
    for known in references:
        counts = known.counts(output)
        found = run(known.sample)[output]
        if not np.isfinite(found).all():
            raise ValueError("an output is NaN or infinite")
        pairs.append((found[counts], known.outputs[output][counts]))
    found_Nn, expected_Nn = (np.concatenate(part) for part in zip(*pairs, strict=True))
    if output == "sentence_embedding":
        lengths_N = np.linalg.norm(found_Nn, axis=1) * np.linalg.norm(expected_Nn, axis=1)
        return float(((found_Nn * expected_Nn).sum(1) / lengths_N.clip(1e-30)).mean())
    return float(np.corrcoef(found_Nn.ravel(), expected_Nn.ravel())[0, 1])


# --- samples --------------------------------------------------------------------------------------------------------


def text_samples(ids: Sequence[Sequence[int]], head: Head, seed: int) -> Iterator[Sample]:
    """Yield texts, as token ids, in batches of random sizes, each truncated to a random length from one token up.

    Texts of a language model are padded on the left; a seq2seq model takes the next texts as answers.
    """
    random = np.random.default_rng(seed)
    start = 0
    while start < len(ids):
        size = int(random.integers(1, LARGEST_BATCH + 1))
        longest = int(random.integers(1, max(map(len, ids)) + 1))
        rows = [tokens[:longest] for tokens in ids[start : start + size]]
        ids_BL, mask_BL = pad(rows, 0, left=head == "causal")
        sample = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if head == "seq2seq":
            length = int(random.integers(1, LONGEST_ANSWER + 1))
            others = [list(ids[(start + size + row) % len(ids)]) for row in range(len(rows))]
            sample["decoder_input_ids"] = np.array([(tokens * length)[:length] for tokens in others])
        yield sample
        start += size


def with_token_types(samples: Iterable[Sample], model: Any, head: Head, seed: int) -> list[Sample]:
    """Return samples with a second text at the end of each, where the model is a classifier that tells texts apart."""
    if not (HEADS[head].classifies and takes_token_types(model)):
        return list(samples)
    random = np.random.default_rng(seed)
    return [{**sample, TOKEN_TYPES: _second_texts(sample["attention_mask"], random)} for sample in samples]


def random_samples(model: Any, spec: MoESpec, count: int, seed: int = 0) -> list[Sample]:
    """Return samples of `count` rows in all, of random token ids, pixels or sounds, whatever the model reads."""
    random = np.random.default_rng(seed)
    name = model.main_input_name
    if name == "input_ids":
        longest = min(spec.max_length, positions(model.config) or spec.max_length)
        vocabulary = model.config.get_text_config().vocab_size
        ids = [random.integers(0, vocabulary, int(random.integers(1, longest + 1))).tolist() for _ in range(count)]
        return with_token_types(text_samples(ids, spec.head, seed), model, spec.head, seed)
    shape = input_shape(model)
    found: list[Sample] = []
    left = count
    while left > 0:
        size = min(left, int(random.integers(1, 4)))
        sample: dict[str, np.ndarray] = {name: random.standard_normal((size, *shape)).astype(np.float32)}
        if spec.head == "seq2seq":
            length = int(random.integers(1, LONGEST_ANSWER + 1))
            sample["decoder_input_ids"] = random.integers(0, model.config.vocab_size, (size, length))
        found.append(sample)
        left -= size
    return found


def _second_texts(mask_BL: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return token types [B, L]: a second text of random length at the end of each, sometimes none."""
    length_B1 = mask_BL.sum(1, keepdims=True)
    start_B1 = random.integers(1, length_B1 + 1)
    place_L = np.arange(mask_BL.shape[1])
    return ((place_L >= start_B1) & (place_L < length_B1)).astype(np.int64)


def input_shape(model: Any) -> tuple[int, ...]:
    """Return the shape of one image or sound that the model reads: [channels, H, W] or [mel bins, frames]."""
    config = model.config
    if model.main_input_name == "input_features":  # Whisper takes 30 seconds, always: two frames a position
        return config.num_mel_bins, 2 * config.max_source_positions
    config = getattr(config, "vision_config", config)
    size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
    return config.num_channels, *size
