"""Hold what a user asks for, on the command line or in params.yaml. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ffn2moe.literals import Widths


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wanted conversion, with the settings that decide whether it can be done and what it takes.

    `called` says how the user writes a setting, such as `--max-length` or `teacher.max_length`: messages use it.
    """

    source: str
    called: Mapping[str, str]
    num_experts: int | str  # auto: what fits the model
    num_active: int
    out: Path | None = None  # the folder to make; None: not named
    disk: Path = Path(".")  # where files are written, or a folder that does not exist yet
    revision: str | None = None
    head: str | None = None  # None: what the config says
    max_length: int | None = None  # None: what fits the model
    corpus: str = "auto"
    text_column: str = "text"
    pairs: str = "auto"  # whether a classifier reads pairs of texts: yes, no, or auto
    texts: int | None = None  # the most that are used
    fewest_texts: int = 2
    text_only: bool = False  # whether models of images and speech are refused, and those that give hidden states
    keep_layers: str | int | tuple[int, ...] = "all"  # all, a number of layers, or their indices
    ffn_width: str | int | float = "full"  # full, a number of neurons, or a share
    partition: str = "auto"
    expert_width: str | int | float = "auto"
    shared_width: int | str = 0  # auto: what fits the model
    width_per_layer: Widths = "auto"
    container: str = "auto"  # auto, none, or a name in CONTAINERS
    gguf: tuple[str, ...] = ()  # types of the GGUF files that are written
    gate: str = "auto"
    active_per_layer: tuple[int, ...] = ()
    elastic: tuple[int, ...] = ()
    several_budgets: bool = False  # whether K differs from layer to layer, or from use to use
    calibration_tokens: int | None = None  # None: what is usual
    calibration_batch: int = 16  # texts
    router_tokens: int = 0  # whose activations in every layer the routers are fitted to, all at once
    judged_texts: int = 200  # at most
    timed: tuple[tuple[int, int], ...] | None = ()  # batch and sequence at which plans are raced; None: what is usual
    decode_tokens: int = 0  # that a language model writes after each prompt of a race
    rounds: int = 0  # of a race, at most
    steps: int | str | None = None  # of the distillation; auto: what is usual; None: as many as fill the minutes
    minutes: float = 0.0
    scope: str = "experts"  # what is trained: experts, or all
    batch_tokens: int | None = None  # of a step; None: what fits the model
    engines: tuple[str, ...] | None = None  # to make plans for; None: those that are installed
    more_plans: tuple[str, ...] = ()
    every_plan: bool = True  # or the one that is good without a measurement
    onnx: bool = True
    checkpoints: int = 2  # of the whole model that are written
    stored: int = 1  # times that each file is stored
    device: str = "auto"
    question_tokens: int = 0  # of questions and a text beside the corpus, by which a language model is judged, about

    def call(self, setting: str, value: object | None = None) -> str:
        """Return a setting as the user writes it, with a value where one is given."""
        name = self.called[setting]
        if value is None:
            return name
        return f"{name} {value}" if name.startswith("--") else f"{name}={value}"
