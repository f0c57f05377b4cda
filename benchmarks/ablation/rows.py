"""Turn cells into rows: one row for the cells that differ in their seed alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

# figure -> its heading and its format
FIGURES: dict[str, tuple[str, str]] = {
    "stsb": ("STS-B", "{:.2f}"),
    "retrieval": ("retrieval nDCG@10", "{:.4f}"),
    "ag_news": ("AG News", "{:.4f}"),
    "sst2": ("SST-2", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "divergence": ("KL, nats", "{:.4f}"),
    "agreement": ("same top token", "{:.4f}"),
}


def means(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each method, share and stage, with the values of every seed."""
    together: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in one["cells"]:
        together.setdefault((cell["method"], cell["share"], cell["stage"]), []).append(cell)
    rows = []
    for (method, share, stage), seeds in together.items():
        known = one["methods"].get(method)
        if known is None:  # an older version of the grid had it
            continue
        rows.append(
            {
                "method": method,
                **known,
                "share": share,
                "stage": stage,
                "seeds": len(seeds),
                "quality": [quality(cell) for cell in seeds],
                **{
                    part: {name: [cell[part][name] for cell in seeds] for name in seeds[0][part]}
                    for part in ("figures", "kept", "errors", "cost", "seconds")
                },
            }
        )
    return rows


def quality(cell: Mapping[str, Any]) -> float:
    """Return the share of the teacher that is kept: mean over the judges, or a language model's perplexity."""
    kept = cell["kept"]
    return kept["perplexity"] if "perplexity" in kept else statistics.mean(kept.values())
