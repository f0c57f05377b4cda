"""Other FFN compressors at the FLOPs of the default."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method(
        "pruned",
        "pruned neurons",
        "baselines",
        "structured, by output energy",
        ("free", "distilled"),
        compressor="pruned",
    ),
    Method(
        "low_rank", "low rank", "baselines", "SVD weighted by activations", ("free", "distilled"), compressor="low_rank"
    ),
    Method(
        "block_diagonal",
        "block diagonal",
        "baselines",
        "StructuredFFN, arXiv 2406.16450",
        ("free", "distilled"),
        compressor="block_diagonal",
    ),
    Method(
        "sparse_factors",
        "dense x sparse factors",
        "baselines",
        "DSFormer, arXiv 2312.13211",
        ("free", "distilled"),
        compressor="sparse_factors",
    ),
    Method(
        "idle_linear",
        "idle channels as a linear map",
        "baselines",
        "RePaViT, arXiv 2505.21847",
        ("free", "distilled"),
        compressor="idle_linear",
    ),
)
