"""List the types that a GGUF file's matrices are written in. Imports neither torch nor gguf.

Two kinds of matrices keep 8 bits in files of fewer: embeddings and output matrix, and the values of the attention. With
4-bit values two students of SmolLM2 had 1.09 and 1.11 times the perplexity (docs/results/rounding.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from ffn2moe.table import Table


@dataclass(frozen=True)
class WeightType:
    """How the matrices of a file are stored: in blocks of a row's numbers that share a scale."""

    name: str
    matrices: str  # the type of the package gguf: of attention and experts
    sensitive: str  # the same: of the vocabulary, as llama.cpp's own quantisation has it, and of the attention's values
    block: int  # numbers of a row that are stored together: a row is a multiple of it
    file_type: str  # what llama.cpp calls such a file


GGUF_TYPES: Table[WeightType] = Table("type")
for _type in (
    WeightType("f32", "F32", "F32", 1, "ALL_F32"),
    WeightType("f16", "F16", "F16", 1, "MOSTLY_F16"),
    WeightType("bf16", "BF16", "BF16", 1, "MOSTLY_BF16"),
    WeightType("q8_0", "Q8_0", "Q8_0", 32, "MOSTLY_Q8_0"),
    WeightType("q5_1", "Q5_1", "Q8_0", 32, "MOSTLY_Q5_1"),
    WeightType("q5_0", "Q5_0", "Q8_0", 32, "MOSTLY_Q5_0"),
    WeightType("q4_1", "Q4_1", "Q8_0", 32, "MOSTLY_Q4_1"),
    WeightType("q4_0", "Q4_0", "Q8_0", 32, "MOSTLY_Q4_0"),
):
    GGUF_TYPES.register(_type.name, _type)

K_BLOCK = 256  # numbers of a block of llama.cpp's K types, which its own program `llama-quantize` makes


def require_type(name: str) -> WeightType:
    """Return a type. ValueError, with the remedy, for one that is not of the table."""
    if "_k" in name.lower() or name.lower().startswith("iq"):
        raise ValueError(
            f"the type {name} is made by llama.cpp alone: write a file with --type f16, then run `llama-quantize "
            f"FILE OUT {name}`. Its blocks are {K_BLOCK} numbers long: where the width of an expert is no multiple of "
            f"{K_BLOCK}, llama.cpp stores its output matrix in a larger type"
        )
    return GGUF_TYPES[name]


def width_in_words(width: int) -> str:
    """Return what a width of the experts means for the types."""
    blocks = {row.block for row in GGUF_TYPES.rows() if width % row.block}
    if blocks:
        padded = -(-width // max(blocks)) * max(blocks)
        return f"quantised GGUF types pad experts of {width} neurons to {padded} with zeros, which are computed too"
    if width % K_BLOCK:
        return (
            f"{width} neurons are whole blocks of every type that is written; not of llama.cpp's K types ({K_BLOCK}), "
            "which store such experts' output matrices in a larger type"
        )
    return f"{width} neurons are whole blocks of every type, llama.cpp's K types too"
