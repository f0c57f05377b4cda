"""Other weights that a router starts from."""

from __future__ import annotations

from benchmarks.ablation.method import Method, add

add(
    Method("centroid", "centroid", "router start", "MoEfication, arXiv 2110.01786", ("free",), start="centroid"),
    Method(
        "representative",
        "representative neurons",
        "router start",
        "CMoE, arXiv 2502.04416",
        ("free",),
        start="representative",
    ),
    Method("mean_row", "mean row", "router start", "EMoE, arXiv 2310.10908", ("free",), start="mean_row"),
    Method("zeros", "zeros", "router start", "a control", start="zeros"),
)
