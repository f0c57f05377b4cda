"""Choose the K experts that score highest, for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffn2moe.choices import GATES, Selection

if TYPE_CHECKING:
    from torch import Tensor


class TopK(Selection):
    """The K best. Where the gate ranks (sigmoid), the balance bias is added to the gates, as DeepSeek-V3 does."""

    name = "topk"
    reference = "arXiv 1701.06538"

    def ranked(self, router: Any, scores_TE: Tensor) -> Tensor:
        """Return the scores, or the gates where the gate ranks, plus the balance bias, [T, E]."""
        return super().ranked(router, scores_TE.sigmoid() if GATES[router.gate].ranks else scores_TE)

    def choose(self, router: Any, ranked_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor | None]:
        """Return the K best experts, int64 [T, K], highest first; all are used."""
        return ranked_TE.topk(num_active, dim=-1).indices, None


ROW = TopK()
