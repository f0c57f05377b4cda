"""The mixture-of-experts layer that takes the place of a dense FFN.

    y = shared(x)  +  output_scale * sum over the chosen experts i of gate_i E_i(x)  +  b_out

`reference` is the definition; `grouped`, which `forward` uses, computes only what is routed; equal by test.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.dense.ffn import ACTIVATIONS
from ffn2moe.dense.locate import install
from ffn2moe.moe.experts import ExpertWeights
from ffn2moe.moe.grouped import Layout, most_padding, tile_of
from ffn2moe.moe.router import Choice, Router, gates, neutral_scale
from ffn2moe.moe.texts import Texts
from ffn2moe.spec import MoESpec


class MoEFFN(nn.Module):
    """E experts of M neurons, of which each token uses those that its router chooses: K, or K on average.

    `num_active` is K: the number of the spec for this layer, or another of its budgets (`set_active`).
    """

    neurons: Tensor
    shared_neurons: Tensor

    def __init__(
        self,
        spec: MoESpec,
        layer: int = 0,
        *,
        b_in: bool,
        b_out: bool,
        b_gate: bool = False,
    ) -> None:
        """`layer` counts over all stacks; it need not be told where all layers are alike."""
        super().__init__()
        shape = spec.shape_of(layer)
        E, M, D, S = spec.num_experts, shape.expert_width, shape.width, shape.shared_width

        def empty(wanted: bool, *sizes: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(*sizes)) if wanted else None

        self.num_active = self._own_active = spec.active_of(layer)
        self.gate = spec.gate
        self.routing = spec.routing
        self.activation = shape.activation
        self.w_in = nn.Parameter(torch.zeros(E, M, D))
        self.w_out = nn.Parameter(torch.zeros(E, D, M))
        self.b_in = empty(b_in, E, M)
        self.b_out = empty(b_out, D)
        self.w_gate = empty(shape.gated, E, M, D)
        self.b_gate = empty(shape.gated and b_gate, E, M)
        self.shared_in = empty(S > 0, S, D)
        self.shared_out = empty(S > 0, D, S)
        self.shared_gate = empty(S > 0 and shape.gated, S, D)
        self.shared_b_in = empty(S > 0 and b_in, S)
        self.shared_b_gate = empty(S > 0 and shape.gated and b_gate, S)
        # The best scale of the chosen experts, folded into the output matrix at export (methods: identity 3).
        self.output_scale = nn.Parameter(torch.tensor(neutral_scale(spec.gate, E, self.num_active)))
        # The same for the other budgets, by their K.
        self.elastic_scale = nn.ParameterDict(
            {str(K): nn.Parameter(torch.tensor(neutral_scale(spec.gate, E, K))) for K in spec.elastic}
        )
        self.router = Router(D, E, spec.gate, spec.router_bias, spec.selection, spec.max_active)
        # Which neuron of the dense FFN stands at each place, -1 for padding.
        self.register_buffer("neurons", torch.full((E, M), -1, dtype=torch.int64))
        self.register_buffer("shared_neurons", torch.full((S,), -1, dtype=torch.int64))
        # Set by whoever wants to watch the routing: called with scores [T, E] and the choice.
        self.observer: RoutingObserver | None = None
        # Of the model that the layer is in, where the routers read whole texts (`install_moe`).
        self.texts: Texts | None = None

    @property
    def num_experts(self) -> int:
        return self.w_in.shape[0]

    @classmethod
    def from_experts(
        cls,
        spec: MoESpec,
        weights: ExpertWeights,
        neurons_EM: Tensor,
        layer: int = 0,
        shared_S: Tensor | None = None,
    ) -> MoEFFN:
        """A layer with these experts, a router that scores all alike, and the scale that is neutral then."""
        moe = cls(
            spec,
            layer,
            b_in=weights.b_in_EM is not None,
            b_out=weights.b_out_D is not None,
            b_gate=weights.b_gate_EM is not None,
        )
        shared = weights.shared
        with torch.no_grad():
            for parameter, value in (
                (moe.w_in, weights.w_in_EMD),
                (moe.w_out, weights.w_out_EDM),
                (moe.b_in, weights.b_in_EM),
                (moe.b_out, weights.b_out_D),
                (moe.w_gate, weights.w_gate_EMD),
                (moe.b_gate, weights.b_gate_EM),
                (moe.shared_in, shared and shared.w_in_FD),
                (moe.shared_out, shared and shared.w_out_DF),
                (moe.shared_gate, shared and shared.w_gate_FD),
                (moe.shared_b_in, shared and shared.b_in_F),
                (moe.shared_b_gate, shared and shared.b_gate_F),
            ):
                if parameter is not None and value is not None:
                    parameter.copy_(value)
            moe.neurons.copy_(neurons_EM)
            if shared_S is not None:
                moe.shared_neurons.copy_(shared_S)
        return moe

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

    def use_all_experts(self) -> None:
        """Make the layer the dense FFN again: K = E and a router that scores all alike. A test of everything else."""
        self.num_active = self.num_experts
        with torch.no_grad():
            self.router.set(torch.zeros_like(self.router.weight), torch.zeros_like(self.router.bias))
            self.router.balance_bias.zero_()
        self.set_scale(neutral_scale(self.gate, self.num_experts, self.num_experts))

    def _expert(
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
        """Output of one expert, [T, D], without scale or output bias."""
        stacks = (self.w_in, self.w_out, self.b_in, self.w_gate, self.b_gate)
        w_in, w_out, b_in, w_gate, b_gate = (None if stack is None else stack[index] for stack in stacks)
        assert w_in is not None and w_out is not None
        return self._expert(x_TD, w_in, w_out, b_in, w_gate, b_gate)

    def shared(self, x_TD: Tensor) -> Tensor | None:
        """Output of the shared expert, [T, D]; None where there is none."""
        if self.shared_in is None or self.shared_out is None:
            return None
        return self._expert(
            x_TD, self.shared_in, self.shared_out, self.shared_b_in, self.shared_gate, self.shared_b_gate
        )

    def scores(self, x_TD: Tensor, route_TD: Tensor | None = None) -> Tensor:
        """The router's scores for tokens, [T, E]; with routing `sequence` of `route_TD`, their texts' means."""
        if self.routing == "token":
            return self.router(x_TD)
        if route_TD is None:
            raise ValueError("routing 'sequence' reads whole texts: give route_TD [T, D], as texts.text_means makes it")
        return self.router(route_TD)

    def forward(self, x: Tensor, route_TD: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D]. `route_TD` is for a layer with routing `sequence` outside its model."""
        x_TD = x.reshape(-1, x.shape[-1])
        if route_TD is None and self.texts is not None:
            route_TD = self.texts.route(x)
        scores_TE = self.scores(x_TD, route_TD)
        choice = self.router.choose(scores_TE, self.num_active)
        if self.observer is not None:
            self.observer(scores_TE, choice)
        return self._beside(x_TD, self.grouped(x_TD, scores_TE, choice, self.scale)).reshape(x.shape)

    def finish(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Scale, shared expert and output bias around the routed sum, [T, D]."""
        return self._beside(x_TD, self.scale * y_TD)

    def _beside(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """With shared expert and output bias, [T, D]."""
        shared_TD = self.shared(x_TD)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the scale of the budget in use."""
        self.scale.fill_(scale)

    @torch.no_grad()
    def all_experts(self, x_TD: Tensor) -> Tensor:
        """The sum over all E experts, each once, with shared expert and output bias: the dense FFN. [T, D]."""
        y_TD = torch.stack([self.expert(index, x_TD) for index in range(self.num_experts)]).sum(0)
        shared_TD = self.shared(x_TD)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD if self.b_out is None else y_TD + self.b_out

    @torch.no_grad()
    def calibrate(self, x_TD: Tensor, route_TD: Tensor | None = None) -> None:
        """Make the router choose K experts on average on tokens [T, D], where their number is not fixed."""
        self.router.calibrate(self.scores(x_TD, route_TD), self.num_active)

    @torch.no_grad()
    def fit_router_scale(self, x_TD: Tensor, route_TD: Tensor | None = None) -> None:
        """Set how far the gates are apart, so that the routed sum fits the dense one; the choice stays.

        On tokens [T, D]; tried are powers of two from 2^-8 to 2^4, which no dtype rounds. A small scale gives gates
        that are nearly equal, so that this is never worse than unit gates. Nothing to do where gates are constant.
        """
        if self.gate == "unit" or self.router.balance_bias.any():
            return
        outputs_TED = torch.stack([self.expert(index, x_TD) for index in range(self.num_experts)], dim=1)
        y_TD = outputs_TED.sum(1)
        self.router.rescale(1.0)
        scores_TE = self.scores(x_TD, route_TD)
        choice = self.router.choose(scores_TE, self.num_active)
        chosen_TKD = outputs_TED.gather(1, choice.experts_TK.unsqueeze(-1).expand(-1, -1, y_TD.shape[-1]))
        best_left, best_scale = float("inf"), 1.0
        for exponent in range(-8, 5):
            gate_TK = gates(self.gate, scores_TE * 2.0**exponent, choice)
            y_S_TD = torch.einsum("tk,tkd->td", gate_TK, chosen_TKD)
            left = -(y_TD * y_S_TD).sum().square() / y_S_TD.square().sum()  # of ||y - a y_S||^2 at the best a
            if left.item() < best_left:
                best_left, best_scale = left.item(), 2.0**exponent
        self.router.rescale(best_scale)

    @torch.no_grad()
    def fit_scale_and_mean(self, x_TD: Tensor, chunk: int = 4096, route_TD: Tensor | None = None) -> None:
        """Set the scale and shift the output bias in closed form, so that the routed output fits the dense one.

        On tokens [T, D]: the scale a minimises ``||y - a y_S||^2`` about the means, and the bias takes
        ``mean(y - a y_S)`` (methods: identity 3). A layer without output bias is fitted by the scale alone, and so is
        each other budget: the bias is the same for all.
        """
        dense = []
        for x in x_TD.split(chunk):
            shared = self.shared(x)
            dense.append(self.all_experts(x) if shared is None else self.all_experts(x) - shared)
        y_TD, y_S_TD = torch.cat(dense), self._routed(x_TD, chunk, route_TD)
        if self.b_out is not None:
            y_TD = y_TD - self.b_out
            y_mean, y_S_mean = y_TD.mean(0), y_S_TD.mean(0)
            y_TD, y_S_TD = y_TD - y_mean, y_S_TD - y_S_mean
        scale = (y_S_TD * y_TD).sum(dtype=torch.float64) / y_S_TD.square().sum(dtype=torch.float64)
        self.set_scale(scale.item())
        if self.b_out is not None:
            shift_D = y_mean - self.scale * y_S_mean
            self.b_out += shift_D
            y_TD = y_TD + y_mean - shift_D  # what is left for the scales of the other budgets
        in_use = self.num_active
        for other in set(self.budgets) - {in_use}:
            self.num_active = other
            y_S_TD = self._routed(x_TD, chunk, route_TD)
            scale = (y_S_TD * y_TD).sum(dtype=torch.float64) / y_S_TD.square().sum(dtype=torch.float64)
            self.set_scale(scale.item())
        self.num_active = in_use

    def _routed(self, x_TD: Tensor, chunk: int, route_TD: Tensor | None) -> Tensor:
        """The sum of the used experts, without scale, shared expert and output bias, [T, D]."""
        found = []
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            scores_TE = self.scores(x_TD[rows], None if route_TD is None else route_TD[rows])
            found.append(self.grouped(x_TD[rows], scores_TE, self.router.choose(scores_TE, self.num_active)))
        return torch.cat(found)

    def reference(self, x_TD: Tensor, route_TD: Tensor | None = None) -> Tensor:
        """The layer as it is defined: every expert in turn, on the tokens that use it. [T, D] -> [T, D]."""
        scores_TE = self.scores(x_TD, route_TD)
        choice = self.router.choose(scores_TE, self.num_active)
        gate_TK = self.router.weigh(scores_TE, choice)
        used_TK = torch.ones_like(gate_TK, dtype=torch.bool) if choice.used_TK is None else choice.used_TK
        y_TD = torch.zeros_like(x_TD)
        for index in range(self.num_experts):
            tokens, place = ((choice.experts_TK == index) & used_TK).nonzero(as_tuple=True)
            y_TD[tokens] += gate_TK[tokens, place].unsqueeze(-1) * self.expert(index, x_TD[tokens])
        return self.finish(x_TD, y_TD)

    def grouped(self, x_TD: Tensor, scores_TE: Tensor, choice: Choice, scale: Tensor | None = None) -> Tensor:
        """Weighted sum of the used experts' outputs, [T, D]: tokens sorted by expert, one product per expert.

        Gates, and with them the `scale` of the sum, weigh the neurons, of which a slot has fewer than outputs.
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
        weighed = self.gate != "unit" or self.training
        if weighed:
            gate_TK = self.router.weigh(scores_TE, choice, self.training)
            gate_TK = (gate_TK if scale is None else scale * gate_TK).to(h_SM.dtype)
            gate_P = gate_TK.flatten() if choice.used_TK is None else gate_TK[choice.used_TK]
            h_SM = h_SM * layout.spread(gate_P).unsqueeze(1)
        y_TD = layout.add_up(layout.linear(h_SM, self.w_out))
        return y_TD if weighed or scale is None else scale * y_TD


class RoutingObserver(Protocol):
    def __call__(self, scores_TE: Tensor, choice: Choice) -> None: ...


def moe_layers(model: nn.Module) -> list[MoEFFN]:
    """The mixture layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoEFFN)]


def install_moe(model: nn.Module, layers: list[MoEFFN]) -> None:
    """Put one mixture in the place of every FFN of a dense model."""
    for index, moe in enumerate(layers):
        install(model, index, moe)
    connect(model)


def connect(model: Any) -> None:
    """Let routers that read whole texts (routing `sequence`) see those that their model is given.

    ValueError for a model whose input is not text.
    """
    layers = moe_layers(model)
    if all(moe.routing == "token" for moe in layers):
        return
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"routing 'sequence' reads the tokens of a text, and {type(model).__name__} reads {model.main_input_name}: "
            "use routing 'token'"
        )
    texts = Texts()
    texts.watch(model)
    for moe in layers:
        moe.texts = texts


def set_active(model: nn.Module, num_active: int) -> None:
    """Use another budget of an elastic model in all its layers. ValueError for a K that is none of its budgets."""
    for moe in moe_layers(model):
        moe.set_active(num_active)
