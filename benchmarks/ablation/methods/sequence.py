"""The routing `sequence`: each text chooses its experts once, by its mean before the first mixture.

All layers know their experts before the first of them runs, so that a server can fetch the experts ahead of their use
(Read-ME, arXiv 2410.19123, which decouples the router from the layers). Read-ME reads the tokens so far; this reads the
whole text, so a causal model cannot use it. The mean is over the real tokens, so that padding changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.method import Method, add
from benchmarks.ablation.recipes import RECIPES, Recipe, train_ours
from ffn2moe.choices import ROUTINGS, Routing
from ffn2moe.decompose import oracle
from ffn2moe.decompose.evidence import Grams, RouterData
from ffn2moe.decompose.route import RouterSettings, fit_rows
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import chunk_of
from ffn2moe.spec import MoESpec


class Texts:
    """Give the routers of a model the mean of each token's text, in place of the layer's own input.

    The mixtures of a model share one object. While the model runs, it holds the texts of the batch. For the tokens of a
    fit, `collect` names their texts first.
    """

    def __init__(self) -> None:
        self._mask_BL: Tensor | None = None
        self._mean_BD: Tensor | None = None
        self._collected: list[tuple[Tensor, Tensor]] = []

    def watch(self, model: Any) -> None:
        """See every batch that goes through the model from now on."""
        base = model.base_model
        base.register_forward_pre_hook(self._begin, with_kwargs=True)
        base.register_forward_hook(self._end, always_call=True)

    def collect(self, x_TD: Tensor, read_TD: Tensor) -> None:
        """Read `read_TD` [T, D] for the tokens `x_TD` [T, D] and for slices of them, where no model runs."""
        self._collected.append((x_TD, read_TD))

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return what the router reads for these tokens, [T, D]; ValueError for tokens whose texts are unknown."""
        if self._mask_BL is not None:
            means_BD = self.means(x_TD)
            return means_BD.repeat_interleave(len(x_TD) // len(means_BD), 0)
        for seen_TD, read_TD in self._collected:
            if x_TD.untyped_storage().data_ptr() == seen_TD.untyped_storage().data_ptr():
                start = (x_TD.storage_offset() - seen_TD.storage_offset()) // seen_TD.stride(0)
                return read_TD[start : start + len(x_TD)]
        raise ValueError("routing 'sequence' reads whole texts: run the model, or first collect the tokens' texts")

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        mask, inputs = given.get("attention_mask"), given.get("input_ids", given.get("inputs_embeds"))
        if mask is None and inputs is not None:
            mask = torch.ones(inputs.shape[:2], device=inputs.device)
        if mask is None or mask.dim() != 2:
            raise ValueError(
                "routing 'sequence' needs the tokens of each text: call the model with input_ids and an attention_mask "
                "[B, L]"
            )
        self._mask_BL, self._mean_BD = mask, None

    def _end(self, *seen: Any) -> None:
        self._mask_BL = self._mean_BD = None

    def means(self, x_TD: Tensor) -> Tensor:
        """Return the mean of every text of the batch, [B, D], from a layer's input [B L, D].

        The first layer that asks is the first mixture; the others get the mean of that layer's input, too.
        """
        assert self._mask_BL is not None
        B, L = self._mask_BL.shape
        if len(x_TD) != B * L:
            raise ValueError(
                f"routing 'sequence' needs a layer's input for each of the {B} x {L} tokens, and this model's has the "
                f"shape {list(x_TD.shape)}: use routing 'token'"
            )
        if self._mean_BD is None:
            share_BL = self._mask_BL.to(torch.float32)
            share_BL = share_BL / share_BL.sum(1, keepdim=True).clamp(min=1.0)
            with torch.autocast(x_TD.device.type, enabled=False):
                self._mean_BD = torch.einsum("bl,bld->bd", share_BL, x_TD.float().reshape(B, L, -1))
        return self._mean_BD


def text_means(x_TD: Tensor, text_T: Tensor) -> Tensor:
    """Return the mean of the text that each token belongs to, [T, D].

    `x_TD` is the input of the first mixture, `text_T` the text of each token (`ffn2moe.decompose.inputs.texts_of`).
    """
    _, text_T = text_T.unique(return_inverse=True)
    count_B = torch.bincount(text_T).unsqueeze(1)
    sum_BD = x_TD.new_zeros(len(count_B), x_TD.shape[1]).index_add(0, text_T, x_TD)
    return (sum_BD / count_B)[text_T]


class Sequence(Routing):
    """Each text chooses for all its tokens in each layer."""

    name = "sequence"
    reference = "Read-ME, arXiv 2410.19123"
    unit = "text, ahead of all layers"
    own_input = False

    def check(self, spec: MoESpec) -> None:
        """Raise ValueError for models that do not see one whole text."""
        if spec.head == "causal":
            raise ValueError(
                "routing sequence chooses by the whole text, and a causal model has not seen the rest: use routing "
                "token"
            )
        if spec.head == "seq2seq" or len(spec.stacks) > 1:
            raise ValueError(
                "routing sequence has one text that all layers read, and this model has more than one stack of "
                "layers: use routing token"
            )

    def tokens_per_choice(self, length: int) -> int:
        """Return `length`: a router runs once for a text."""
        return length

    def reader(self) -> Texts:
        """Return the texts of a layer that stands alone."""
        return Texts()

    def connect(self, model: Any, layers: Items[MoEFFN]) -> None:
        """Let the layers see each text that their model gets; ValueError for a model that reads no text."""
        if model.main_input_name != "input_ids":
            raise ValueError(
                f"routing 'sequence' reads the tokens of a text, and {type(model).__name__} reads "
                f"{model.main_input_name}: use routing 'token'"
            )
        texts = Texts()
        texts.watch(model)
        for moe in layers:
            moe.reader = texts


ROUTINGS.register("sequence", Sequence())


# --- the fit and its judgement ----------------------------------------------------------------------------------------


def grams_of_texts(moe: MoEFFN, x_TD: Tensor, text_T: Tensor, chunk: int = 4096) -> Grams:
    """Return the Gram matrices of a layer on texts, the sums of their tokens' matrices; `text_T` counts from 0."""
    found = oracle.grams(moe, x_TD, chunk)
    tokens_B = torch.bincount(text_T)
    gram_BEE = found.gram_REE.new_zeros(len(tokens_B), *found.gram_REE.shape[1:])
    for start in range(0, len(x_TD), chunk):
        gram_BEE.index_add_(0, text_T[start : start + chunk], found.gram_REE[start : start + chunk])
    return replace(found, gram_REE=gram_BEE, tokens_R=tokens_B)


def rows_of_texts(read_TD: Tensor, text_T: Tensor) -> Tensor:
    """Return what the router reads for each text, [B, D], from what it reads for each token [T, D]."""
    read_BD = read_TD.new_zeros(int(text_T.max()) + 1, read_TD.shape[1])
    read_BD[text_T] = read_TD
    return read_BD


def fit_router_of_texts(
    moe: MoEFFN, x_TD: Tensor, text_T: Tensor, read_TD: Tensor, settings: RouterSettings
) -> list[float]:
    """Fit a layer's router in place to whole texts, as `fit_router` does to tokens; return each step's loss.

    The router reads `read_TD` (`text_means`), and its labels are sums over the tokens of each text.
    """
    moe.reader.collect(x_TD, read_TD)
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    survey = oracle.survey_of(moe, grams_of_texts(moe, x_TD, text_T, chunk))
    return fit_rows(RouterData(moe, x_TD, rows_of_texts(read_TD, text_T), survey, chunk), settings)


@torch.no_grad()
def diagnose_texts(moe: MoEFFN, x_TD: Tensor, text_T: Tensor, read_TD: Tensor, chunk: int = 4096) -> dict[str, float]:
    """Return `oracle.diagnose` of a layer, where the best choice is the best for each text."""
    found = grams_of_texts(moe, x_TD, text_T, chunk)
    parts = rows_of_texts(read_TD, text_T).split(chunk)
    return oracle.compare(moe, found, torch.cat([moe.router(part) for part in parts]))


def _texts(bench: Bench, kind: str) -> tuple[Tensor, Tensor]:
    text_T = bench.text_of_token(kind)
    return text_T, text_means(bench.inputs(kind, 0), text_T)


def fit_layer(bench: Bench, moe: MoEFFN, x_TD: Tensor, settings: RouterSettings) -> None:
    """Fit a router of the grid to the texts of its tokens."""
    fit_router_of_texts(moe, x_TD, *_texts(bench, "router"), settings)


def diagnose_layer(bench: Bench, moe: MoEFFN, layer: int) -> dict[str, float]:
    """Judge a router of the grid on the texts that were held out."""
    x_TD = bench.held_out(layer)
    return diagnose_texts(moe, x_TD, *(part[: len(x_TD)] for part in _texts(bench, "calibration")))


def diagnose_own(moe: MoEFFN, x_TD: Tensor, first_TD: Tensor, text_T: Tensor) -> dict[str, float]:
    """Judge a router on its model's own inputs: `first_TD` is the input of the first mixture."""
    return diagnose_texts(moe, x_TD, text_T, text_means(first_TD, text_T))


RECIPES.register("sequence", Recipe(train_ours, fit=fit_layer, diagnose=diagnose_layer, diagnose_own=diagnose_own))
add(
    Method(
        "sequence",
        "one choice per text, ahead",
        "selection",
        "Read-ME, arXiv 2410.19123",
        routing="sequence",
        recipe="sequence",
    )
)
