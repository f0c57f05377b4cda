"""Language models with a plain FFN: GPT-2 and its relatives."""

from __future__ import annotations

from ffn2moe.dense.families import Family, Stack
from ffn2moe.dense.families._stacks import LANGUAGE_MODEL, inline, plain

_BLOOM = Stack(
    "h",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    "mlp.dense_h_to_4h",
    bypass=("mlp.gelu_impl", "mlp.dense_4h_to_h"),
    activation="gelu_tanh",
)

FAMILIES = (
    Family("phi", (plain("layers", "fc1", "fc2", inside="mlp"),), LANGUAGE_MODEL),
    Family("starcoder2", (plain("layers", "c_fc", "c_proj", inside="mlp"),), LANGUAGE_MODEL),
    *(
        Family(name, (plain("h", "c_fc", "c_proj", inside="mlp", activation="activation_function"),), LANGUAGE_MODEL)
        for name in ("gpt2", "gpt_neo", "gpt_bigcode")
    ),
    Family("gptj", (plain("h", "fc_in", "fc_out", inside="mlp", activation="activation_function"),), LANGUAGE_MODEL),
    Family("gpt_neox", (plain("layers", "dense_h_to_4h", "dense_4h_to_h", inside="mlp"),), LANGUAGE_MODEL),
    Family(
        "falcon",
        (plain("h", "dense_h_to_4h", "dense_4h_to_h", inside="mlp", activation="activation"),),
        LANGUAGE_MODEL,
    ),
    Family("bloom", (_BLOOM,), LANGUAGE_MODEL, positions=None),
    Family("opt", (inline("decoder.layers"),), LANGUAGE_MODEL),
)
