"""Make embeddings of hidden states: the modules that stand behind a transformer (`ffn2moe.sentence`).

They are a submodule of the transformers model, `model.sentence`, so that their weights are saved and loaded with it.
Letters as in `ffn2moe.spec`; masks are int or bool [B, L], with the padding on either side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.literals import Pooling
from ffn2moe.sentence import Dense, LayerNorm, Module, Normalize, SentenceModules

NAME = "sentence"  # of the submodule


def _mean(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    mask_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)


def _mean_sqrt_len(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    mask_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1).sqrt()


def _weighted_mean(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    weight_BL1 = (mask_BL * mask_BL.cumsum(1)).unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)


def _max(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return hidden_BLD.masked_fill(mask_BL.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _first(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return hidden_BLD[:, 0]


def _last(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    place_BL = torch.arange(mask_BL.shape[1], device=mask_BL.device) * (mask_BL != 0)
    place_B11 = place_BL.amax(1)[:, None, None]
    return hidden_BLD.gather(1, place_B11.expand(-1, 1, hidden_BLD.shape[2])).squeeze(1)


POOLINGS: dict[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
assert tuple(POOLINGS) == get_args(Pooling)


class _Dense(nn.Module):
    def __init__(self, described: Dense) -> None:
        super().__init__()
        self.linear = nn.Linear(described.in_features, described.out_features, bias=described.bias)
        self.activation = getattr(nn, described.activation)()
        self.use_residual = described.use_residual
        self.residual = (
            nn.Linear(described.in_features, described.out_features, bias=False)
            if described.use_residual and described.in_features != described.out_features
            else None
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        y_BD: Tensor = self.activation(self.linear(x_BD))
        if not self.use_residual:
            return y_BD
        return y_BD + (x_BD if self.residual is None else self.residual(x_BD))


class _Normalize(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return F.normalize(x_BD, dim=-1)


def _built(described: Module) -> nn.Module:
    if isinstance(described, Dense):
        return _Dense(described)
    if isinstance(described, LayerNorm):
        return nn.LayerNorm(described.dimension)
    assert isinstance(described, Normalize)
    return _Normalize()


class SentenceEmbedding(nn.Module):
    """Pool hidden states, and pass the pooled vector through the modules of a description."""

    def __init__(self, described: SentenceModules) -> None:
        super().__init__()
        self.described = described
        self.chain = nn.Sequential(*map(_built, described.modules))

    def forward(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return embeddings [B, D'] of hidden states [B, L, D] and their mask [B, L]."""
        pooled = [POOLINGS[mode](hidden_BLD, mask_BL) for mode in self.described.pooling]
        embedding_BD: Tensor = self.chain(pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1))
        cut = self.described.truncate_dim
        return embedding_BD if cut is None else embedding_BD[:, :cut]


def attach(model: Any, sentence: SentenceModules | SentenceEmbedding) -> Any:
    """Give a transformers model the modules that make its embeddings, with new weights for a description alone."""
    module = SentenceEmbedding(sentence) if isinstance(sentence, SentenceModules) else sentence
    setattr(model, NAME, module.train(model.training))
    return model


def modules_of(model: Any) -> SentenceModules | None:
    """Return the description of the modules attached to a model; None where there are none."""
    module = getattr(model, NAME, None)
    return None if module is None else module.described


def prompt_of(model: Any, prompt: str | None = None) -> str:
    """Return what is written before each text that a model encodes: `prompt`, or its default prompt, if it has one."""
    sentence = modules_of(model)
    return (prompt or "") if sentence is None else sentence.prompt(prompt)


def embed(model: Any, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Return embeddings [B, D'], float32, of the last hidden states of a model with `attach`ed modules."""
    with torch.autocast(hidden_BLD.device.type, enabled=False):
        embedding_BD: Tensor = getattr(model, NAME)(hidden_BLD.float(), mask_BL)
    return embedding_BD


def directions(model: Any, embedding_BD: Tensor) -> Tensor:
    """Return embeddings at unit length, which cosines need: as they are where the model gives no others."""
    return embedding_BD if getattr(model, NAME).described.unit else F.normalize(embedding_BD, dim=-1)
