"""Give the routers of a model with routing `sequence` each text as a whole, before the first mixture.

One choice of experts for a text and layer, known before the first of these layers runs, lets whoever serves the model
fetch the experts ahead of their use (Read-ME, arXiv 2410.19123, which decouples the router from the layers; it reads
the tokens so far, this the whole text, which is why a causal model has none of it). The routers read the mean over the
real tokens of a text of what the first mixture is given, so that padding changes nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class Texts:
    """The texts of the batch that a model is at: shared by its mixtures, filled while it runs, empty otherwise."""

    def __init__(self) -> None:
        self._mask_BL: Tensor | None = None
        self._mean_BD: Tensor | None = None

    def watch(self, model: Any) -> None:
        """See every batch that goes through the model, from now on."""
        base = model.base_model
        base.register_forward_pre_hook(self._begin, with_kwargs=True)
        base.register_forward_hook(self._end, always_call=True)

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

    def route(self, x: Tensor) -> Tensor:
        """The mean of the text that each token of a layer's input belongs to, [..., D] -> [T, D]."""
        means_BD = self.means(x)
        return means_BD.repeat_interleave(x[..., 0].numel() // len(means_BD), 0)

    def means(self, x: Tensor) -> Tensor:
        """The mean of every text, [B, D], asked for by a layer with its input [..., D].

        The first layer that asks is the first mixture, and its input is what the others get to read, too.
        """
        if self._mask_BL is None:
            raise ValueError("routing 'sequence' reads whole texts: run the model, or give the layer route_TD, too")
        B, L = self._mask_BL.shape
        if x.shape[:-1] not in ((B, L), (B * L,)):
            raise ValueError(
                f"routing 'sequence' needs a layer's input for each of the {B} x {L} tokens, and this model's has the "
                f"shape {list(x.shape)}: use routing 'token'"
            )
        if self._mean_BD is None:
            share_BL = self._mask_BL.to(torch.float32)
            share_BL = share_BL / share_BL.sum(1, keepdim=True).clamp(min=1.0)
            with torch.autocast(x.device.type, enabled=False):
                self._mean_BD = torch.einsum("bl,bld->bd", share_BL, x.float().reshape(B, L, -1))
        return self._mean_BD


def text_means(x_TD: Tensor, text_T: Tensor) -> Tensor:
    """The mean of the text that each token belongs to, [T, D]: what routers read, for fits on collected tokens.

    `x_TD` is the input of the first mixture, `text_T` the text of each token (`ffn2moe.decompose.inputs.texts_of`).
    """
    _, text_T = text_T.unique(return_inverse=True)
    count_B = torch.bincount(text_T).unsqueeze(1)
    sum_BD = x_TD.new_zeros(len(count_B), x_TD.shape[1]).index_add(0, text_T, x_TD)
    return (sum_BD / count_B)[text_T]
