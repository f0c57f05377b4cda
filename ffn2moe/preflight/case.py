"""Decide what a conversion does: replace every `auto` by what fits the model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ffn2moe.choices import HEADS
from ffn2moe.containers.container import Container
from ffn2moe.containers.fit import require_fit
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.containers.usual import Wanted, usual_container, usual_experts
from ffn2moe.decompose.partition import PARTITIONS, settled
from ffn2moe.decompose.source import NotStreamable, Source, only_stack, skeleton
from ffn2moe.decompose.widths import chosen_by_need, neurons_are_chosen
from ffn2moe.dense.cross_encoder import reads_pairs
from ffn2moe.dense.families import positions
from ffn2moe.dense.length import usual_length
from ffn2moe.dense.reduction import Reduction, reduction
from ffn2moe.dense.tensors import explain, match
from ffn2moe.dense.weights import weight_headers
from ffn2moe.distill.usual import usual_batch_tokens, usual_steps
from ffn2moe.moe.describe import spec_of
from ffn2moe.numerics import choose_device
from ffn2moe.preflight.dense import Dense
from ffn2moe.preflight.request import Request
from ffn2moe.preflight.texts import Sample, missing_packages, sample
from ffn2moe.progress import Say, silent
from ffn2moe.runtime.engines import installed_engines
from ffn2moe.runtime.plans import PLANS, UNMEASURED_PLANS, graph_of, obstacle, plan_of, plans_of
from ffn2moe.spec import Gate, MoESpec

# Where the user names no number:
GENERATED_TEXTS, MOST_TEXTS = 4000, 40000  # most texts that the model writes, that are taken from a corpus
LARGEST_WRITER = 2**28  # weights that a token is multiplied by; with more a model writes a calibration for too long
WRITING_SHARE = 0.2  # of the minutes: the model writes, where it writes the corpus, and learns in the rest
# Tokens whose activations are recorded. With 8,192 of them experts for clusters of tokens lose more than static
# pruning does, with 32,768 less (docs/results/smollm2.md).
USUAL_CALIBRATION, USUAL_CALIBRATION_CAUSAL = 16384, 32768
WRITTEN_MORE = 1.1  # times the tokens that are learnt from: some are held out to judge by
USUAL_TEXT = 400  # characters


class Case:
    """A request and the decisions about it; each is made when it is first asked for.

    ValueError or FileNotFoundError, with cause and remedy, for what cannot be done.
    """

    def __init__(self, request: Request, say: Say = silent, *, weights: bool = True) -> None:
        self._asked = request
        self.say = say  # told of a model that is rewritten before it can be read
        self._weights = weights  # whether they are read later: if not, those of a GGUF file are not dequantised

    @cached_property
    def request(self) -> Request:
        """What is asked for, with numbers of experts and shared neurons that fit the model."""
        asked = self._asked
        if isinstance(asked.num_experts, int) and isinstance(asked.shared_width, int):
            return asked
        kept = reduction(self.model, asked.keep_layers, asked.ffn_width)
        E, S = usual_experts(_wanted(asked), self.model, self.dense.head, kept.ffn_width if kept else None)
        return replace(asked, num_experts=E, shared_width=S)

    @cached_property
    def dense(self) -> Dense:
        """The dense model. ValueError for one that the request has no use for."""
        asked = self._asked
        dense = Dense(asked.source, revision=asked.revision, head=asked.head, say=self.say, weights=self._weights)
        heads = dense.family.heads if dense.family else (dense.head,)
        if dense.head not in heads:
            raise ValueError(
                f"{asked.call('head', dense.head)}, but {asked.source} is a {dense.config.model_type} model, from "
                f"which this package makes {' or '.join(heads)}: leave {asked.call('head')} out, or name one of these"
            )
        if asked.text_only and (dense.reads != "text" or heads == ("features",)):
            raise ValueError(
                f"{asked.source} is a {dense.config.model_type} model, which reads {dense.reads} and gives "
                f"{' or '.join(heads)}; the pipeline distils and judges on text: convert this model "
                "with `ffn2moe convert`"
            )
        if dense.reads == "speech":
            raise ValueError(
                f"{asked.source} reads speech, and no command reads recordings: call the functions of "
                "ffn2moe.decompose and ffn2moe.distill.distiller, which take batches of any kind"
            )
        return dense

    @property
    def num_experts(self) -> int:
        """E: that is asked for, or fits the model."""
        return int(self.request.num_experts)

    @property
    def shared_width(self) -> int:
        """S: that is asked for, or fits the model."""
        return int(self.request.shared_width)

    @cached_property
    def model(self) -> Any:
        """The transformers model without weights."""
        return skeleton(self.dense.folder, self.dense.head)

    @cached_property
    def device(self) -> str:
        """The device to compute on."""
        return choose_device(self.request.device)

    @property
    def container(self) -> Container | None:
        """The native architecture that the mixture is also written in, if any."""
        return self._container[0]

    @property
    def container_reason(self) -> str:
        """The reason for the container, or for none."""
        return self._container[1]

    @cached_property
    def _container(self) -> tuple[Container | None, str]:
        asked, dense = self.request, self.dense
        if asked.num_experts == 1:
            if asked.container not in ("auto", "none"):
                raise ValueError(
                    f"{asked.call('container', asked.container)} holds experts, and {asked.call('num_experts', 1)} is "
                    f"a student without, an ordinary {dense.config.model_type} folder: set "
                    f"{asked.call('container', 'none')}"
                )
            return None, "none: a student without experts is an ordinary folder of its own architecture"
        if asked.width_per_layer == "budget" and asked.container not in ("auto", "none"):
            raise ValueError(
                f"{asked.call('width_per_layer', 'budget')} gives each layer a width of its own, and the container "
                f"{asked.container} has one width for all layers: set {asked.call('container', 'none')}, or "
                f"{asked.call('width_per_layer', 'same')}"
            )
        if asked.container == "none":
            return None, "none"
        if asked.container == "auto":
            return usual_container(_wanted(asked), dense.config, dense.head, self.shared_width)
        found = CONTAINERS[asked.container]
        require_fit(found, dense.config, shared_width=self.shared_width)
        self._require_gate_of(found)
        return found, found.name

    def _require_gate_of(self, container: Container) -> None:
        asked = self.request
        if asked.gate not in ("auto", container.gate):
            raise ValueError(
                f"{container.name} weighs experts by {container.gate}, not by {asked.gate}: set "
                f"{asked.call('gate', 'auto')}, or {asked.call('container', 'none')}"
            )

    @property
    def gate(self) -> Gate:
        """How the chosen experts are weighted."""
        if self.request.gate != "auto":
            return self.request.gate
        return self.container.gate if self.container else "unit"

    @cached_property
    def max_length(self) -> int:
        """The tokens that texts are truncated to."""
        asked, longest = self.request, positions(self.dense.config)
        needed = self.dense.reads == "text" and (self.dense.head == "embedding" or HEADS[self.dense.head].classifies)
        reader = self.dense.reader if needed else None
        wanted = asked.max_length or usual_length(self.dense.folder, self.dense.config, self.dense.head, reader)
        if longest is not None and wanted > longest:
            raise ValueError(
                f"{asked.call('max_length', wanted)} is more than the {longest} positions of {asked.source}: lower it"
            )
        return wanted

    @cached_property
    def pairs(self) -> bool:
        """Whether the model reads pairs of texts. ValueError for pairs that it does not read."""
        asked, dense, columns = self.request, self.dense, "," in self.request.text_column
        if dense.head != "classification" or dense.reads != "text":
            if columns or asked.pairs == "yes":
                said = asked.call("text_column" if columns else "pairs", asked.text_column if columns else "yes")
                raise ValueError(
                    f"{said} asks for pairs of texts, and {asked.source} gives {HEADS[dense.head].gives}: only "
                    "classifiers of texts read pairs; leave it out"
                )
            return False
        if columns and asked.pairs == "no":
            named = asked.call("text_column", asked.text_column)
            raise ValueError(f"{named} names two columns, and {asked.call('pairs', 'no')} wants single texts: name one")
        return asked.pairs == "yes" or columns or (asked.pairs == "auto" and reads_pairs(dense.config))

    @cached_property
    def corpus(self) -> str:
        """Where the texts or images come from."""
        asked, dense = self.request, self.dense
        if "images" in dense.reads:
            if not Path(asked.corpus).is_dir():
                raise ValueError(f"{asked.source} reads images: name a folder of them with {asked.call('corpus')}")
            return asked.corpus
        if asked.corpus == "auto":
            if dense.head == "causal" and (self.multiplied <= LARGEST_WRITER or bool(missing_packages())):
                return "generated"
            return "docstrings" if HEADS[dense.head].generates else "general"
        if asked.corpus == "generated" and dense.head != "causal":
            raise ValueError(
                f"{asked.call('corpus', 'generated')} asks the model to write the texts, and {asked.source} is "
                f"a model with the head {dense.head}, which writes no texts: name a corpus"
            )
        return asked.corpus

    @cached_property
    def sample(self) -> Sample:
        """The first texts of the corpus."""
        return sample(self.corpus, self.request)

    @cached_property
    def reduction(self) -> Reduction | None:
        """What the student keeps of layers and neurons; None for all. ValueError for more than the model has."""
        asked = self.request
        found = reduction(self.model, asked.keep_layers, asked.ffn_width)
        if found is None and asked.num_experts == 1:
            raise ValueError(
                f"{asked.call('num_experts', 1)} is a student without experts, and with all layers and the full FFN "
                f"width it is the model itself: set {asked.call('keep_layers')} or {asked.call('ffn_width')}, or more "
                "experts"
            )
        return found

    @cached_property
    def spec(self) -> MoESpec:
        """The spec of the mixture."""
        return self.spec_of(self.model)

    # --- sizes -------------------------------------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def multiplied(self) -> int:
        """The number of weights that a token is multiplied by: all matrices except tables that are looked up."""
        matrices = (module for module in self.model.modules() if not isinstance(module, nn.Embedding))
        return sum(own.numel() for module in matrices for own in module.parameters(recurse=False) if own.dim() == 2)

    @property
    def ffn_weights(self) -> int:
        """The number of weights of all FFNs."""
        return sum(one.num_layers * (3 if one.gated else 2) * one.width * one.ffn_width for one in self.spec.stacks)

    @property
    def multiplied_by_student(self) -> int:
        """The number of weights that a token is multiplied by in the student."""
        shapes = self.spec.stacks
        ffns = sum(one.dense_layers * (3 if one.gated else 2) * one.width * one.dense_ffn_width for one in shapes)
        kept = sum(one.num_layers for one in shapes) / sum(one.dense_layers for one in shapes)
        return round(kept * (self.multiplied - ffns) + self.spec.active_share * ffns)

    @property
    def model_makes_texts(self) -> bool:
        """Whether the model writes the texts, or answers to them."""
        return self.corpus == "generated" or (self.dense.head == "seq2seq" and self.dense.reads == "text")

    @cached_property
    def left_out(self) -> str | None:
        """The tensors of the files that the model does not read, in words. ValueError for others than a head's."""
        headers = weight_headers(self.dense.folder)
        return explain(self.dense.folder, self.model, match(self.dense.folder, headers, self.model).left)

    @cached_property
    def whole_only(self) -> str | None:
        """Why the model is not decomposed layer by layer; None where it is. ValueError for weights that do not fit."""
        if self.reduction is not None:
            return "a smaller student is made of the whole model"
        asked = self.request
        refilled = asked.partition in PARTITIONS and PARTITIONS[asked.partition].refilled
        if refilled and self.dense.head == "embedding":
            return "experts take the neurons that the embeddings of the whole model need most"
        try:
            only_stack(self.model)
            Source(self.dense.folder, self.model)
        except NotStreamable as reason:
            return str(reason)
        return None

    @cached_property
    def plans(self) -> dict[str, str | None]:
        """The plans that are wanted, each with what forbids it here, if anything."""
        asked, dense = self.request, self.dense
        if not asked.onnx:
            return {}
        engines, alone = asked.engines or installed_engines(), asked.num_experts == 1
        every = plans_of(dense.head, engines, without_experts=alone)
        wanted = (*(every if asked.every_plan else (UNMEASURED_PLANS[alone],)), *asked.more_plans)
        return {name: obstacle(PLANS[name], dense.head, dense.config) for name in dict.fromkeys(wanted)}

    @property
    def graph_bytes(self) -> dict[str, int]:
        """The bytes of each graph that is made."""
        made = [name for name, reason in self.plans.items() if reason is None]
        return {graph_of(name): self.parameters * plan_of(graph_of(name)).bits // 8 for name in made}

    @property
    def calibration_tokens(self) -> int:
        """The tokens whose activations are recorded."""
        usual = USUAL_CALIBRATION_CAUSAL if self.dense.head == "causal" else USUAL_CALIBRATION
        return self.request.calibration_tokens or usual

    @property
    def batch_tokens(self) -> int:
        """The tokens of a training step."""
        width = self.dense.config.get_text_config().hidden_size if self.dense.head == "causal" else 0
        return self.request.batch_tokens or usual_batch_tokens(self.dense.head, width, self.max_length)

    @cached_property
    def steps(self) -> int | None:
        """The steps of the distillation; None for as many as fill the minutes."""
        steps = self.request.steps
        return steps if not isinstance(steps, str) else usual_steps(self.spec, self.dense.config, self.batch_tokens)

    @property
    def characters(self) -> int:
        """The characters of the texts that are tokenised, about."""
        texts = min(self.most_texts, self.sample.count or self.most_texts)
        each = sum(map(len, self.sample.texts)) / len(self.sample.texts) if self.sample.texts else USUAL_TEXT
        return round(texts * each)

    @property
    def most_texts(self) -> int:
        """The largest number of texts that are used."""
        asked = self.request
        if asked.texts or self.corpus != "generated":
            return asked.texts or MOST_TEXTS
        if self.steps is None:
            return GENERATED_TEXTS
        return min(GENERATED_TEXTS, self._texts_of(self.calibration_tokens + self.steps * self.batch_tokens))

    @property
    def fewest_texts(self) -> int:
        """The number of texts that the model writes even where its time is over."""
        return min(self.most_texts, self._texts_of(self.calibration_tokens))

    def _texts_of(self, tokens: int) -> int:
        return math.ceil(WRITTEN_MORE * tokens / self.max_length)

    @property
    def writing_seconds(self) -> float | None:
        """The time in which the model writes its corpus; None where the number of texts is known before."""
        timed = self.corpus == "generated" and self.request.texts is None and self.steps is None
        return 60 * WRITING_SHARE * self.request.minutes if timed else None

    @property
    def training_minutes(self) -> float:
        """The time in which the student learns, where no number of steps is asked for."""
        return self.request.minutes * (1 if self.writing_seconds is None else 1 - WRITING_SHARE)

    # --- the mixture -------------------------------------------------------------------------------------------------

    def spec_of(self, model: Any) -> MoESpec:
        """Return the spec of the mixture that `model` becomes; its weights are not read."""
        asked, container = self.request, self.container
        spec = spec_of(
            model,
            head=self.dense.head,
            num_experts=self.num_experts,
            num_active=1 if self.num_experts == 1 else asked.num_active,  # the only number there is
            partition=asked.partition,
            teacher=asked.source,
            max_length=self.max_length,
            shared_width=self.shared_width,
            gate=self.gate,
            router_bias=container is None,
            container=container.name if container else None,
            width_multiple=container.width_multiple if container else 1,
            sentence=self.dense.sentence,
            active_per_layer=asked.active_per_layer,
            elastic=asked.elastic,
            reduction=self.reduction,
        )
        spec = settled(spec, asked.expert_width, container.width_multiple if container else 1)
        if container:
            require_fit(container, self.dense.config, spec=spec)
        return spec

    @cached_property
    def widths_by_need(self) -> bool:
        """Whether each layer gets a width of its own."""
        return self.chooses_widths(self.spec)

    @cached_property
    def weighs_neurons(self) -> bool:
        """Whether neurons are chosen under the weights that gradients of the whole model give."""
        return neurons_are_chosen(self.spec)

    def chooses_widths(self, spec: MoESpec) -> bool:
        """Return whether each layer gets a width of its own. ValueError where such a student cannot have one."""
        asked = self.request
        try:
            return chosen_by_need(asked.width_per_layer, spec)
        except ValueError as error:
            raise ValueError(f"{asked.call('width_per_layer', asked.width_per_layer)}: {error}") from None


def _wanted(asked: Request) -> Wanted:
    return Wanted.of(asked, several_budgets=asked.several_budgets)
