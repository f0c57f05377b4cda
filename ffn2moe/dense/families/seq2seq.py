"""Encoders with a decoder: T5, BART, Whisper and their relatives."""

from __future__ import annotations

from typing import Any

from ffn2moe.dense.families import Family, Stack
from ffn2moe.dense.families._stacks import inline, plain

_BOTH_SIDES = (inline("encoder.layers"), inline("decoder.layers"))


def _t5(side: str, layer: int, *, gated: bool) -> Stack:
    inside = f"layer.{layer}.DenseReluDense"
    more: dict[str, Any] = {"inside": inside, "activation": "dense_act_fn", "where": ("is_gated_act", gated)}
    if gated:
        return plain(f"{side}.block", "wi_1", "wo", w_gate=f"{inside}.wi_0", **more)
    return plain(f"{side}.block", "wi", "wo", **more)


_T5_STACKS = tuple(
    _t5(side, layer, gated=gated) for gated in (False, True) for side, layer in (("encoder", 1), ("decoder", 2))
)

FAMILIES = (
    *(
        Family(name, _T5_STACKS, ("seq2seq", "embedding", "classification", "token_classification"), positions=None)
        for name in ("t5", "mt5", "umt5")
    ),
    *(Family(name, _BOTH_SIDES, ("seq2seq", "classification")) for name in ("bart", "mbart")),
    *(Family(name, _BOTH_SIDES, ("seq2seq",)) for name in ("marian", "pegasus", "m2m_100")),
    Family(
        "whisper",
        _BOTH_SIDES,
        ("seq2seq", "classification"),
        reads="speech",
        positions="max_target_positions",
    ),
)
