"""Judge language models by a text: how well each predicts it, and how near each stays to its teacher.

L is the length of a block and P its judged positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffn2moe.judges.asked import beginning
from ffn2moe.judges.logits import MOST_DOUBLES, divergences, log_probabilities, logits_at
from ffn2moe.progress import Track, untracked

BLOCK = 1024  # tokens that are read together, as in most published perplexities of WikiText
FLOAT32, FLOAT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Reading:
    """One model on every block of a text, as sums over its judged positions, [N] float64."""

    positions_N: Tensor
    nats_N: Tensor
    divergence_N: Tensor  # of the teacher's distributions from the model's; 0 without a teacher
    agreed_N: Tensor  # positions where teacher and model find the same token most probable; 0 without a teacher


def blocks(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """Return a text as blocks of `length` tokens, the last one shorter; each is read without those before it.

    A block begins with the token that the tokenizer begins a text with; without such a token its first one is not
    judged. ValueError where no block has two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = beginning(tokenizer)
    own = max(1, length - len(begin))
    found = [begin + ids[start : start + own] for start in range(0, len(ids), own)]
    found = [block for block in found if len(block) > 1]
    if not found:
        raise ValueError("the text gives no block of two tokens or more: give more text, or longer blocks")
    return found


def logits_bytes(vocabulary: int, length: int, models: int) -> int:
    """Return the memory that the logits of one block take, in bytes, for a number of models that are compared."""
    held = min(models, 2)  # the teacher's and those of the model that is compared with it
    return FLOAT32 * held * length * vocabulary + 6 * FLOAT64 * MOST_DOUBLES


@torch.no_grad()
def read(
    models: Mapping[str, Any],
    found: Sequence[Sequence[int]],
    *,
    teacher: str | None = None,
    track: Track = untracked,
    what: str = "reading",
) -> dict[str, Reading]:
    """Return what each model makes of the blocks, by its name; `teacher` names the model that the others follow."""
    sums: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in models}
    order = sorted(models, key=lambda name: name != teacher)
    for block in track(found, len(found), what):
        ids_1L = torch.tensor([list(block)])
        judged_1L = torch.ones_like(ids_1L, dtype=torch.bool)
        judged_1L[:, -1] = False
        guide_PV: Tensor | None = None
        for name in order:
            device = models[name].device
            logits_PV, _ = logits_at(models[name], judged_1L.to(device), input_ids=ids_1L.to(device), use_cache=False)
            nats = -log_probabilities(logits_PV, ids_1L[0, 1:].to(device)).sum().item()
            if teacher is not None and guide_PV is None:
                guide_PV = logits_PV
            apart, agreed = 0.0, 0.0
            if guide_PV is not None:
                apart = divergences(guide_PV, logits_PV).sum().item()
                agreed = (guide_PV.argmax(-1) == logits_PV.argmax(-1)).sum().item()
            sums[name].append((len(block) - 1, nats, apart, agreed))
    return {name: Reading(*torch.tensor(rows, dtype=torch.float64).unbind(1)) for name, rows in sums.items()}
