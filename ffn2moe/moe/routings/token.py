"""Let each layer's router read that layer's own input, token by token."""

from __future__ import annotations

from ffn2moe.choices import Routing


class Token(Routing):
    """Each token chooses for itself in each layer."""

    name = "token"
    reference = "arXiv 1701.06538"
    unit = "token"
    own_input = True


ROW = Token()
