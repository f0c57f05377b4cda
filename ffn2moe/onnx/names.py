"""Name what the canonical graph and the rewritings of it agree on."""

from __future__ import annotations

DOMAIN, MIXTURE = "ffn2moe", "Mixture"
# The inputs of a mixture node after x [T, D], as attributes of `ffn2moe.onnx.mixture.Mixture`. A layer leaves out those
# that it lacks.
PARTS = ("router", "router_bias", "choice_bias", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
