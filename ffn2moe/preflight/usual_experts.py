"""Choose how many experts and shared neurons a model gets where the user names none.

Four experts of a quarter of the FFN, one of them active, are fast in an encoder at little loss
(docs/decisions/0017-four-experts.md). A gated language model with one such expert a token has twice the perplexity of
the dense one after a short training, so it keeps a half: a quarter for every token and one of three experts of a
quarter (docs/results/smollm2.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ffn2moe.containers.fit import choose, obstacle
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.decompose.partition import AUTO
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.reduction import reduction
from ffn2moe.preflight.dense import Dense
from ffn2moe.preflight.request import Request

USUAL = 4, 0  # E and S
USUAL_WRITER = 3, 4  # of a gated language model: E, and the part of the FFN that the shared expert and each other has


def with_usual_experts(asked: Request, dense: Dense, model: Any) -> Request:
    """Return a request with numbers in place of `auto`; a number that the user names decides the other, too.

    `model` is the transformers model, with weights or without.
    """
    if AUTO not in (asked.num_experts, asked.shared_width):
        return asked
    E, S = USUAL
    if asked.num_experts == asked.shared_width == AUTO and dense.head == "causal" and _one_of_clusters(asked):
        ffn = read_ffn(model, 0)
        kept = reduction(model, asked.keep_layers, asked.ffn_width)
        shared = (kept.ffn_width if kept else ffn.ffn_width) // USUAL_WRITER[1]
        if ffn.gated and shared and _container_allows(asked, dense.config, shared):
            E, S = USUAL_WRITER[0], shared
    return replace(
        asked,
        num_experts=E if asked.num_experts == AUTO else asked.num_experts,
        shared_width=S if asked.shared_width == AUTO else asked.shared_width,
    )


def _one_of_clusters(asked: Request) -> bool:
    """Return whether a token uses one expert, of experts for clusters of tokens, and nothing names their width."""
    plain = not asked.elastic and not asked.active_per_layer and asked.expert_width == AUTO
    return asked.num_active == 1 and asked.partition in (AUTO, "token_clusters") and plain


def _container_allows(asked: Request, config: Any, shared: int) -> bool:
    """Return whether a shared expert costs the user no container."""
    if asked.container not in ("auto", "none"):
        return obstacle(CONTAINERS[asked.container], config, shared_width=shared) is None
    return asked.container == "none" or _fits(config, shared) or not _fits(config, 0)


def _fits(config: Any, shared: int) -> bool:
    try:
        choose(config, shared_width=shared)
    except ValueError:
        return False
    return True
