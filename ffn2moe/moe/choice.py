"""Hold which experts each token uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The experts that T tokens use: the first K columns, or those of them that `used_TK` marks."""

    experts_TK: Tensor  # int64; in the order that the selection gives, e.g. highest score first
    used_TK: Tensor | None  # bool; None = all, K of them for every token

    def count_T(self) -> Tensor:
        """Return how many experts each token uses, int64."""
        T, K = self.experts_TK.shape
        return self.experts_TK.new_full((T,), K) if self.used_TK is None else self.used_TK.sum(1)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return token and expert of every used pair, [P] each, in the order of tokens and then of columns."""
        T, K = self.experts_TK.shape
        token_TK = torch.arange(T, device=self.experts_TK.device).unsqueeze(1).expand(T, K)
        if self.used_TK is None:
            return token_TK.flatten(), self.experts_TK.flatten()
        return token_TK[self.used_TK], self.experts_TK[self.used_TK]

    def indicator_TE(self, num_experts: int) -> Tensor:
        """Return 1 where a token uses an expert and 0 elsewhere, float32 [T, E]."""
        used_TK = torch.ones_like(self.experts_TK) if self.used_TK is None else self.used_TK
        empty_TE = torch.zeros(len(self.experts_TK), num_experts, device=self.experts_TK.device)
        return empty_TE.scatter(1, self.experts_TK, used_TK.to(empty_TE.dtype))

    def load_E(self, num_experts: int) -> Tensor:
        """Return how many tokens use each expert, int64 [E]."""
        return torch.bincount(self.pairs()[1], minlength=num_experts)
