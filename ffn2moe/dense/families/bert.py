"""Encoders of text: BERT and its relatives."""

from __future__ import annotations

from ffn2moe.dense.families import Family, Stack
from ffn2moe.dense.families._stacks import NO_POOLER, TEXT_ENCODER, plain

_STACK = Stack("encoder.layer", "intermediate.dense", "output.dense", "intermediate", bypass=("output.dense",))
_WITH_POOLER = ("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "ernie", "mpnet")
_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet")

FAMILIES = (
    *(
        Family(
            name,
            (_STACK,),
            TEXT_ENCODER,
            options=NO_POOLER if name in _WITH_POOLER else (),
            positions_after_padding=name in _AFTER_PADDING,
        )
        for name in (*_WITH_POOLER, "electra", "deberta", "deberta-v2")
    ),
    Family(
        "distilbert",
        (plain("transformer.layer", "lin1", "lin2", inside="ffn", activation="activation"),),
        TEXT_ENCODER,
    ),
    Family(
        "modernbert",
        (plain("layers", "Wi", "Wo", inside="mlp", fused=True, activation="hidden_activation"),),
        TEXT_ENCODER,
    ),
)
