"""Compare the next tokens of two language models without the logits of a whole batch in memory.

The logits [T, V] of a batch and their gradient are by far its largest tensors: 4,096 tokens of a vocabulary of 49,152
are 0.8 GB in float32, and a loss makes several copies. Here both models give what their output matrix reads, the last
hidden states [T, D]. The logits of some tokens at a time are made, compared, turned into the gradient of the hidden
states, and dropped (as in Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_LOGITS = 2**22  # numbers at once; fewer read the output matrix more often, more leave the cache
FEWEST_TOKENS = 16
PROBED_TOKENS = 8

Compare = Callable[[Tensor, Tensor], Tensor]  # logits [T, V] of student and teacher -> the divergence of each token [T]


@dataclass(frozen=True)
class OutputMatrix:
    """The map from the last hidden states [T, D] to the logits [T, V]: linear, and scaled or bounded by some models."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    bound: float | None = None

    def product(self, states_TD: Tensor) -> Tensor:
        """Return the linear part in float32."""
        return F.linear(states_TD.to(self.weight_VD.dtype), self.weight_VD, self.bias_V).float()

    def finish(self, product_TV: Tensor) -> Tensor:
        """Return the logits of the linear part."""
        logits_TV = product_TV if self.scale == 1.0 else self.scale * product_TV
        return logits_TV if self.bound is None else self.bound * torch.tanh(logits_TV / self.bound)

    def logits(self, states_TD: Tensor) -> Tensor:
        """Return the logits in float32."""
        return self.finish(self.product(states_TD))


def output_matrix(model: Any) -> OutputMatrix:
    """Return the output matrix of a language model; under autocast in the dtype that it would be multiplied in."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    weight_VD, bias_V, kind = layer.weight, layer.bias, layer.weight.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        weight_VD, bias_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    # As Cohere, Granite and Gemma 2 name them.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return OutputMatrix(weight_VD, bias_V, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def ends_in_matrix(model: Any) -> bool:
    """Return whether a language model's logits are what its `output_matrix` makes of its last hidden states.

    The model is run on a few tokens, because it may do something else to them, too.
    """
    if not isinstance(model.get_output_embeddings(), nn.Linear) or model.base_model is model:
        return False
    ids_1L = torch.arange(PROBED_TOKENS, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    states = getattr(model.base_model(input_ids=ids_1L, use_cache=False), "last_hidden_state", None)
    if states is None or states.shape[-1] != model.get_output_embeddings().in_features:
        return False
    wanted_1LV = model(input_ids=ids_1L, use_cache=False).logits.float()
    return torch.allclose(output_matrix(model).logits(states), wanted_1LV, rtol=1e-4, atol=1e-4)


def tokens_at_once(vocabulary: int) -> int:
    """Return the number of tokens whose logits are in memory together."""
    return max(FEWEST_TOKENS, MOST_LOGITS // vocabulary)


def divergence_sum(
    student_TD: Tensor, student: OutputMatrix, teacher_TD: Tensor, teacher: OutputMatrix, compare: Compare
) -> Tensor:
    """Return the sum of the divergences of all tokens, with the gradient of what the student's logits are made of."""
    total: Tensor = _Divided.apply(student_TD, student.weight_VD, student.bias_V, student, teacher_TD, teacher, compare)
    return total


class _Divided(torch.autograd.Function):
    """Sum divergences over tokens; the gradient is computed with the sum, while the logits are there."""

    @staticmethod
    def forward(
        context: Any,
        states_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        student: OutputMatrix,
        teacher_TD: Tensor,
        teacher: OutputMatrix,
        compare: Compare,
    ) -> Tensor:
        of_states, of_weight, of_bias = context.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=states_TD.device)
        states_grad = torch.empty_like(states_TD) if of_states else None
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if of_weight else None
        bias_grad = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and of_bias else None
        size = tokens_at_once(len(weight_VD))
        for some_TD, other_TD, place in zip(
            states_TD.split(size), teacher_TD.split(size), range(0, len(states_TD), size), strict=True
        ):
            product_TV = student.product(some_TD).requires_grad_(any(context.needs_input_grad[:3]))
            with torch.enable_grad():
                found = compare(student.finish(product_TV), teacher.logits(other_TD)).sum()
            total += found.detach()
            if not product_TV.requires_grad:
                continue
            (gradient_TV,) = torch.autograd.grad(found, product_TV)
            rounded_TV = gradient_TV.to(weight_VD.dtype)
            if states_grad is not None:
                states_grad[place : place + size] = rounded_TV @ weight_VD
            if weight_grad is not None:
                weight_grad += rounded_TV.T @ some_TD.to(weight_VD.dtype)
            if bias_grad is not None:
                bias_grad += gradient_TV.sum(0)
        context.save_for_backward(states_grad, weight_grad, bias_grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if one is None else upstream * one for one in context.saved_tensors)
        return (*gradients, None, None, None, None)
