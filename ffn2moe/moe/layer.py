"""The mixture-of-experts layer that takes the place of a dense FFN.

    y = shared(x)  +  output_scale * sum over the chosen experts i of gate_i E_i(x)  +  b_out

`reference` is the definition; `grouped`, which `forward` uses, computes only the used pairs; a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.choices import GATES, ROUTINGS
from ffn2moe.dense.ffn import ACTIVATIONS
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.experts import ExpertWeights
from ffn2moe.moe.grouped import Layout, most_padding, tile_of
from ffn2moe.moe.router import Router
from ffn2moe.spec import FFNShape, MoESpec


class _Experts(nn.Module):
    """The weights of E experts of M neurons and of a shared one, and what each gives alone."""

    neurons: Tensor
    shared_neurons: Tensor

    def __init__(self, shape: FFNShape, num_experts: int, *, b_in: bool, b_out: bool, b_gate: bool) -> None:
        super().__init__()
        E, M, D, S = num_experts, shape.expert_width, shape.width, shape.shared_width

        def zeros(wanted: bool, *sizes: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(*sizes)) if wanted else None

        self.activation = shape.activation
        self.w_in = nn.Parameter(torch.zeros(E, M, D))
        self.w_out = nn.Parameter(torch.zeros(E, D, M))
        self.b_in = zeros(b_in, E, M)
        self.b_out = zeros(b_out, D)
        self.w_gate = zeros(shape.gated, E, M, D)
        self.b_gate = zeros(shape.gated and b_gate, E, M)
        self.shared_in = zeros(S > 0, S, D)
        self.shared_out = zeros(S > 0, D, S)
        self.shared_gate = zeros(S > 0 and shape.gated, S, D)
        self.shared_b_in = zeros(S > 0 and b_in, S)
        self.shared_b_gate = zeros(S > 0 and shape.gated and b_gate, S)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.w_in.shape[0]

    @torch.no_grad()
    def take(self, weights: ExpertWeights) -> None:
        """Copy these weights."""
        for name, value in _named(weights).items():
            parameter = getattr(self, name)
            if parameter is not None and value is not None:
                parameter.copy_(value)

    def _run(
        self,
        x_TD: Tensor,
        w_in_MD: Tensor,
        w_out_DM: Tensor,
        b_in_M: Tensor | None,
        w_gate_MD: Tensor | None,
        b_gate_M: Tensor | None,
    ) -> Tensor:
        act = ACTIVATIONS[self.activation]
        h_TM = F.linear(x_TD, w_in_MD, b_in_M)
        h_TM = act(h_TM) if w_gate_MD is None else act(F.linear(x_TD, w_gate_MD, b_gate_M)) * h_TM
        return F.linear(h_TM, w_out_DM)

    def expert(self, index: int, x_TD: Tensor) -> Tensor:
        """Return the output of one expert, [T, D], without scale or output bias."""
        stacks = (self.w_in, self.w_out, self.b_in, self.w_gate, self.b_gate)
        w_in, w_out, b_in, w_gate, b_gate = (None if stack is None else stack[index] for stack in stacks)
        assert w_in is not None and w_out is not None
        return self._run(x_TD, w_in, w_out, b_in, w_gate, b_gate)

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """Return the output of the shared expert, [T, D]; None where there is none."""
        if self.shared_in is None or self.shared_out is None:
            return None
        return self._run(x_TD, self.shared_in, self.shared_out, self.shared_b_in, self.shared_gate, self.shared_b_gate)

    def _with_shared(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Add shared expert and output bias to the routed output, [T, D]."""
        shared_TD = self.shared(x_TD)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)

    @torch.no_grad()
    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return the sum over all E experts, each once, with shared expert and output bias: the dense FFN. [T, D]."""
        return self._with_shared(x_TD, torch.stack([self.expert(i, x_TD) for i in range(self.num_experts)]).sum(0))


def _named(weights: ExpertWeights) -> dict[str, Tensor | None]:
    """Return the weights by the names of the parameters that hold them."""
    shared = weights.shared
    return {
        "w_in": weights.w_in_EMD,
        "w_out": weights.w_out_EDM,
        "b_in": weights.b_in_EM,
        "b_out": weights.b_out_D,
        "w_gate": weights.w_gate_EMD,
        "b_gate": weights.b_gate_EM,
        "shared_in": shared and shared.w_in_FD,
        "shared_out": shared and shared.w_out_DF,
        "shared_gate": shared and shared.w_gate_FD,
        "shared_b_in": shared and shared.b_in_F,
        "shared_b_gate": shared and shared.b_gate_F,
    }


class MoEFFN(_Experts):
    """E experts of M neurons; each token uses those that its router chooses: K, or K on average.

    `num_active` is K: the number of the spec for this layer, or another of its budgets (`set_active`).
    """

    def __init__(self, spec: MoESpec, layer: int = 0, *, b_in: bool, b_out: bool, b_gate: bool = False) -> None:
        """Make a layer of zeros. `layer` counts over all stacks; it may stay 0 where all layers are alike."""
        shape = spec.shape_of(layer)
        E, M, D, S = spec.num_experts, shape.expert_width, shape.width, shape.shared_width
        super().__init__(shape, E, b_in=b_in, b_out=b_out, b_gate=b_gate)
        self.num_active = self._own_active = spec.active_of(layer)
        self.gate = spec.gate
        self.routing = spec.routing
        neutral_scale = GATES[spec.gate].neutral_scale
        # The best scale of the chosen experts, folded into the output matrix at export (methods: identity 3).
        self.output_scale = nn.Parameter(torch.tensor(neutral_scale(E, self.num_active)))
        # The scales of the other budgets, by their K.
        self.elastic_scale = nn.ParameterDict(
            {str(K): nn.Parameter(torch.tensor(neutral_scale(E, K))) for K in spec.elastic}
        )
        self.router = Router(D, E, spec.gate, spec.router_bias, spec.selection, spec.max_active)
        # Which neuron of the dense FFN stands at each place, -1 for padding.
        self.register_buffer("neurons", torch.full((E, M), -1, dtype=torch.int64))
        self.register_buffer("shared_neurons", torch.full((S,), -1, dtype=torch.int64))
        # A callback that watches the routing: it gets scores [T, E] and the choice.
        self.observer: RoutingObserver | None = None
        # Gives the router its input for tokens [T, D], where the routing reads something else than the layer's input.
        self.reader: Callable[[Tensor], Tensor] | None = ROUTINGS[spec.routing].reader()

    @classmethod
    def from_experts(
        cls,
        spec: MoESpec,
        weights: ExpertWeights,
        neurons_EM: Tensor,
        layer: int = 0,
        shared_S: Tensor | None = None,
    ) -> MoEFFN:
        """Return a layer with these experts, a router that scores all alike, and the scale that is neutral then."""
        moe = cls(
            spec,
            layer,
            b_in=weights.b_in_EM is not None,
            b_out=weights.b_out_D is not None,
            b_gate=weights.b_gate_EM is not None,
        )
        moe.take(weights)
        moe.neurons.copy_(neurons_EM)
        if shared_S is not None:
            moe.shared_neurons.copy_(shared_S)
        return moe

    def refill(self, weights: ExpertWeights, neurons_EM: Tensor, shared_S: Tensor) -> None:
        """Take other experts of the same dense FFN, of any width: `neurons_EM` of it, and `shared_S` in the shared one.

        The router stays.
        """
        for name, value in _named(weights).items():
            setattr(self, name, None if value is None else nn.Parameter(value))
        self.neurons, self.shared_neurons = neurons_EM, shared_S

    @property
    def budgets(self) -> tuple[int, ...]:
        """Every K that the layer has a scale for, its own first."""
        return (self._own_active, *map(int, self.elastic_scale)) if self.elastic_scale else (self.num_active,)

    def set_active(self, num_active: int) -> None:
        """Use another of the layer's budgets, with its own scale. ValueError for a K that is none of them."""
        if num_active not in self.budgets:
            raise ValueError(
                f"num_active = {num_active} is none of the budgets {sorted(self.budgets)} that this model has scales "
                "for: choose one of them, or make the model with it in elastic"
            )
        self.num_active = num_active

    @property
    def scale(self) -> Tensor:
        """The scale of the budget in use."""
        return self.elastic_scale.get(str(self.num_active), self.output_scale)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the scale of the budget in use."""
        self.scale.fill_(scale)

    @torch.no_grad()
    def use_all_experts(self) -> None:
        """Make the layer the dense FFN again, K = E with equal scores: a test of everything except the router."""
        self.num_active = self.num_experts
        self.router.set(torch.zeros_like(self.router.weight), torch.zeros_like(self.router.bias))
        self.router.balance_bias.zero_()
        self.set_scale(GATES[self.gate].neutral_scale(self.num_experts, self.num_experts))

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return the router's scores for tokens [T, D], [T, E]."""
        return self.router(x_TD if self.reader is None else self.reader(x_TD))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] for [..., D]."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE = self.scores(x_TD)
        choice = self.router.choose(scores_TE, self.num_active)
        if self.observer is not None:
            self.observer(scores_TE, choice)
        return self._with_shared(x_TD, self.grouped(x_TD, scores_TE, choice, self.scale)).reshape(x.shape)

    def finish(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Scale the routed sum and add shared expert and output bias, [T, D]."""
        return self._with_shared(x_TD, self.scale * y_TD)

    def reference(self, x_TD: Tensor) -> Tensor:
        """Return the layer's output by its definition: every expert in turn, on the tokens that use it. [T, D]."""
        scores_TE = self.scores(x_TD)
        choice = self.router.choose(scores_TE, self.num_active)
        gate_TK = self.router.weigh(scores_TE, choice)
        used_TK = torch.ones_like(gate_TK, dtype=torch.bool) if choice.used_TK is None else choice.used_TK
        y_TD = torch.zeros_like(x_TD)
        for index in range(self.num_experts):
            tokens, place = ((choice.experts_TK == index) & used_TK).nonzero(as_tuple=True)
            y_TD[tokens] += gate_TK[tokens, place].unsqueeze(-1) * self.expert(index, x_TD[tokens])
        return self.finish(x_TD, y_TD)

    def grouped(self, x_TD: Tensor, scores_TE: Tensor, choice: Choice, scale: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the used experts' outputs, [T, D]: tokens sorted by expert, a product per expert.

        The gates and the `scale` of the sum multiply the neurons: a slot has fewer neurons than outputs.
        """
        autocast = torch.is_autocast_enabled(x_TD.device.type)
        if autocast:
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))  # once, before K copies are gathered
        tiled = self.training or autocast or x_TD.device.type != "cpu"
        tile = tile_of(choice.experts_TK.numel(), self.num_experts) if tiled else 1
        layout = Layout.of(choice, self.num_experts, tile, most_padding(x_TD, self.w_in) if tiled else 0)
        x_SD = layout.gather(x_TD)
        act = ACTIVATIONS[self.activation]
        h_SM = layout.linear(x_SD, self.w_in, self.b_in)
        h_SM = act(h_SM) if self.w_gate is None else act(layout.linear(x_SD, self.w_gate, self.b_gate)) * h_SM
        weighed = GATES[self.gate].constant != "always" or self.training
        if weighed:
            gate_TK = self.router.weigh(scores_TE, choice, self.training)
            gate_TK = (gate_TK if scale is None else scale * gate_TK).to(h_SM.dtype)
            gate_P = gate_TK.flatten() if choice.used_TK is None else gate_TK[choice.used_TK]
            h_SM = h_SM * layout.spread(gate_P).unsqueeze(1)
        y_TD = layout.add_up(layout.linear(h_SM, self.w_out))
        return y_TD if weighed or scale is None else scale * y_TD


class RoutingObserver(Protocol):
    """A callback that watches the routing of a layer."""

    def __call__(self, scores_TE: Tensor, choice: Choice) -> None:
        """Take the scores [T, E] and the choice of one forward pass."""


def moe_layers(model: nn.Module) -> list[MoEFFN]:
    """Return the mixture layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoEFFN)]


def connect(model: Any) -> None:
    """Prepare a model for what its routers read. ValueError for a model that the routing does not fit."""
    layers = moe_layers(model)
    for name in dict.fromkeys(moe.routing for moe in layers):
        ROUTINGS[name].connect(model, [moe for moe in layers if moe.routing == name])


def set_active(model: nn.Module, num_active: int) -> None:
    """Use another budget of an elastic model in all its layers. ValueError for a K that is none of its budgets."""
    for moe in moe_layers(model):
        moe.set_active(num_active)
