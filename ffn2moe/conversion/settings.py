"""Declare what a user can set about a conversion: once, for Python and for the command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ffn2moe.choices import GATES, HEADS
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.decompose.objectives import OBJECTIVES
from ffn2moe.decompose.partition import AUTO, PARTITIONS
from ffn2moe.literals import Widths
from ffn2moe.table import UnknownName, unknown

Scope = Literal["experts", "all"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Option:
    """A setting as a user sees it."""

    help: str
    flag: str  # on the command line
    metavar: str | None = None
    kind: Callable[[str], Any] = str  # reads the value from the command line; int: a whole number
    minimum: int = 1  # of a whole number
    names: Callable[[], tuple[str, ...]] | None = None  # known values; None: any
    fingerprint: bool = True  # whether a conversion that was stopped resumes with the same value only

    def require(self, name: str, value: Any) -> None:
        """Raise ValueError for a value that this setting cannot have; `name` is what the message calls it."""
        if value is None:
            return
        if self.names is not None and value not in self.names():
            raise UnknownName(unknown(name, value, self.names()))
        if self.kind is count_or_auto and isinstance(value, str) and value != AUTO:
            raise ValueError(f"{name} = {value!r} must be auto, or a whole number from {self.minimum}")
        if self.kind in (int, count_or_auto) and not isinstance(value, str) and value < self.minimum:
            raise ValueError(f"{name} = {value} is too low: give a whole number from {self.minimum}")


def _option(flag: str, help: str, **more: Any) -> dict[str, Option]:
    return {"option": Option(help, flag, **more)}


def layers(text: str) -> str | int | tuple[int, ...]:
    """Read which layers to keep: all, a number of them, or their indices with commas between."""
    if text == "all":
        return text
    numbers = tuple(int(part) for part in text.split(","))
    return numbers if "," in text else numbers[0]


def count_or_auto(text: str) -> str | int:
    """Read a whole number, or auto."""
    return text if text == AUTO else int(text)


def width(text: str) -> str | int | float:
    """Read a width: full or auto, a number of neurons, or a share of an FFN."""
    return text if text in ("full", "auto") else int(text) if text.isdigit() else float(text)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a conversion. `auto` and None are replaced by what fits the model.

    ValueError for an unknown name, which suggests the nearest, and for a number that is too low.
    """

    num_experts: int | str = field(
        default=AUTO,
        metadata=_option(
            "--experts",
            "experts of each FFN; 1: none (auto: 4; of a gated language model, where --shared is auto, too, 3)",
            metavar="E",
            kind=count_or_auto,
        ),
    )
    num_active: int = field(
        default=1, metadata=_option("--active", "experts that a token uses (1)", metavar="K", kind=int)
    )
    keep_layers: str | int | tuple[int, ...] = field(
        default="all",
        metadata=_option(
            "--keep-layers",
            "layers of the dense model that the student has: all, a number spread evenly, or indices such as 0,2,3,5",
            metavar="N",
            kind=layers,
        ),
    )
    ffn_width: str | int | float = field(
        default="full",
        metadata=_option(
            "--ffn-width", "what each FFN keeps: full, a number of neurons, or a share", metavar="N", kind=width
        ),
    )
    expert_width: str | int | float = field(
        default="auto",
        metadata=_option(
            "--expert-width",
            "width of experts for clusters of tokens, which have neurons in common: a number or a share of the FFN "
            "(auto: as wide as without)",
            metavar="M",
            kind=width,
        ),
    )
    shared_width: int | str = field(
        default=AUTO,
        metadata=_option(
            "--shared",
            "neurons of each FFN that every token uses (auto: 0; of a gated language model, where --experts is auto, "
            "too, a quarter, so that a half is active)",
            metavar="N",
            kind=count_or_auto,
            minimum=0,
        ),
    )
    width_per_layer: Widths = field(
        default="auto",
        metadata=_option(
            "--width-per-layer",
            "same in all layers, or a budget: each gets what it needs (auto: budget for experts for clusters of tokens "
            "without a native container, else same)",
            names=lambda: get_args(Widths),
        ),
    )
    container: str = field(
        default="auto",
        metadata=_option(
            "--container",
            "native architecture of a language model: auto (one that can hold it), none, or a name such as mixtral",
            metavar="NAME",
            names=lambda: ("auto", "none", *CONTAINERS.names()),
        ),
    )
    gate: str = field(
        default="auto",
        metadata=_option(
            "--gate",
            "how the chosen experts are weighted (auto: as the container does, else unit)",
            names=lambda: ("auto", *GATES.names()),
        ),
    )
    partition: str = field(
        default=AUTO,
        metadata=_option(
            "--partition",
            "how the neurons of an FFN are assigned to experts (auto: token_clusters for a gated language model with "
            "one active expert, coactivation for others)",
            names=lambda: (AUTO, *PARTITIONS.names()),
        ),
    )
    router_objective: str = field(
        default="oracle",
        metadata=_option("--router-objective", "the loss that routers are trained by (oracle)", names=OBJECTIVES.names),
    )
    head: str | None = field(
        default=None,
        metadata=_option("--head", "what the model computes (default: what its config says)", names=HEADS.names),
    )
    corpus: str = field(
        default="auto",
        metadata=_option(
            "--corpus",
            "texts to learn from: general, docstrings, a .txt, .jsonl, .csv or .tsv file, datasets:NAME, a folder of "
            "images, or generated, which a language model writes itself (auto: general for models that write no text, "
            "generated for those that do, docstrings for large ones)",
            metavar="SOURCE",
        ),
    )
    text_column: str = field(
        default="text",
        metadata=_option(
            "--text-column", "the column of a table that holds the text (text); FIRST,SECOND for pairs", metavar="NAME"
        ),
    )
    pairs: str = field(
        default="auto",
        metadata=_option(
            "--pairs",
            "whether a classifier reads pairs of texts (auto: with two columns, rerankers and labels of entailment)",
            names=lambda: ("auto", "yes", "no"),
        ),
    )
    texts: int | None = field(
        default=None,
        metadata=_option(
            "--texts",
            "use at most N texts or images (40000; generated: what the model writes in a fifth of the minutes)",
            metavar="N",
            kind=int,
        ),
    )
    max_length: int | None = field(
        default=None,
        metadata=_option(
            "--max-length",
            "truncate texts to L tokens (128; language models: 256; sentence encoders, classifiers: as made)",
            metavar="L",
            kind=int,
        ),
    )
    distill_minutes: float = field(
        default=10.0,
        metadata=_option(
            "--distill-minutes",
            "time to train the experts, and for the model to write where it writes the corpus (10; 0: no training)",
            metavar="T",
            kind=float,
            fingerprint=False,
        ),
    )
    distill_steps: int | None = field(
        default=None,
        metadata=_option(
            "--distill-steps",
            "steps instead of minutes: the same result on every machine",
            metavar="N",
            kind=int,
            minimum=0,
            fingerprint=False,
        ),
    )
    learning_rate: float | None = field(
        default=None,
        metadata=_option(
            "--learning-rate",
            "the highest learning rate (1e-3, with --train all 3e-4, language models 3e-3; lower for wide models)",
            metavar="R",
            kind=float,
        ),
    )
    batch_tokens: int | None = field(
        default=None,
        metadata=_option(
            "--batch-tokens",
            "tokens of a step (4096; language models: twice the width, 512 to 2048)",
            metavar="N",
            kind=int,
        ),
    )
    scope: Scope = field(
        default="experts",
        metadata=_option(
            "--train", "train experts and routers, or every weight (experts)", names=lambda: get_args(Scope)
        ),
    )
    calibration_tokens: int | None = field(
        default=None,
        metadata=_option(
            "--calibration-tokens",
            "tokens whose activations are recorded (16384; language models 32768)",
            metavar="N",
            kind=int,
        ),
    )
    dtype: Dtype = field(
        default="auto",
        metadata=_option(
            "--dtype", "dtype of the native container (auto: that of the model)", names=lambda: get_args(Dtype)
        ),
    )
    device: str = field(
        default="auto", metadata=_option("--device", "auto, cpu or cuda", metavar="NAME", fingerprint=False)
    )
    revision: str | None = field(
        default=None, metadata=_option("--revision", "tag or commit of a hub name", metavar="NAME")
    )
    seed: int = field(
        default=0, metadata=_option("--seed", "seed of every random choice (0)", metavar="S", kind=int, minimum=0)
    )
    onnx: bool = field(
        default=True, metadata=_option("--no-onnx", "write checkpoint and container only, without ONNX graphs")
    )

    every_plan: bool = field(
        default=False,
        metadata=_option(
            "--every-plan",
            "write every ONNX plan, the dense ones too, for `ffn2moe plan` to choose from (default: one that any ONNX "
            "runtime opens)",
        ),
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            option.require(name, getattr(self, name))

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the result: with the same ones and the same source, it is the same."""
        return {name: value for name, value in asdict(self).items() if OPTIONS[name].fingerprint}

    @property
    def steps(self) -> int | None:
        """Return how many steps to distill, or None where minutes decide it."""
        return 0 if self.distill_steps is None and self.distill_minutes <= 0 else self.distill_steps


OPTIONS: dict[str, Option] = {one.name: one.metadata["option"] for one in fields(Settings)}
