"""Read and check params.yaml: typed, frozen and total.

Total means that the file holds every key, so that the file alone says what a run does. An unknown key, a missing key, a
value of the wrong type and a contradiction raise ParamsError with the key, the cause and the remedy.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from ruamel.yaml import YAML  # the parser DVC reads params.yaml with: `1e-3` is a number, `on` a string
from ruamel.yaml.error import YAMLError

from tasks.choices import (
    DIVERGENCES,
    ENGINES,
    GGUF_TYPES,
    OBJECTIVES,
    PLANS,
    REMOVED_KEYS,
    STARTS,
    OneOf,
    UnknownName,
)
from tasks.decompose_params import Decompose
from tasks.measures import HEADLINES
from tasks.section import Count, NonNegative, Positive, Section
from tasks.target import Target


class ParamsError(ValueError):
    """The parameters cannot be used; the message names the key, the cause and the remedy."""


class Compute(Section):
    device: Literal["auto", "cpu", "cuda"]
    threads: int = Field(ge=0)
    bf16: Literal["auto", "on", "off"]


class Teacher(Section):
    source: str = Field(min_length=1)
    revision: str | None
    head: Annotated[str, OneOf(HEADLINES, ("auto",))]
    max_length: Annotated[int, Field(ge=8)] | Literal["auto"]


class Data(Section):
    corpus: str = Field(min_length=1)
    text_column: str = Field(min_length=1)
    max_texts: Count
    evaluation: str | None
    folder: str | None
    learn_from_folder: bool
    calibration_texts: Count
    evaluation_pairs: Count

    @model_validator(mode="after")
    def _splits_leave_something_to_train_on(self) -> Data:
        held_out = self.calibration_texts + self.evaluation_pairs
        if held_out >= self.max_texts:
            raise ValueError(
                f"data.calibration_texts + data.evaluation_pairs = {held_out} leaves nothing to train on of "
                f"data.max_texts = {self.max_texts}; raise max_texts or lower the other two"
            )
        return self


class TrainRouter(Section):
    tokens: Count
    steps: int = Field(ge=0)
    batch_tokens: Count
    learning_rate: Positive
    start: Annotated[str, OneOf(STARTS)]
    ridge: Positive
    objective: Annotated[str, OneOf(OBJECTIVES)]
    refit: NonNegative


class Distill(Section):
    layerwise_steps: int = Field(ge=0)
    steps: Annotated[int, Field(ge=0)] | Literal["auto"]
    batch_tokens: Count | Literal["auto"]
    learning_rate: Positive | Literal["auto"]
    hidden_weight: NonNegative
    embedding_weight: NonNegative
    relational_weight: NonNegative
    logits_weight: NonNegative
    divergence: Annotated[str, OneOf(DIVERGENCES)]
    elastic: tuple[Count, ...]
    scope: Literal["experts", "all"]
    balance_step: NonNegative
    checkpoint_every: Count
    processes: Count


class Evaluate(Section):
    batch_texts: Count
    continuation: Count
    most_questions: Count


class Export(Section):
    engines: tuple[Annotated[str, OneOf(ENGINES)], ...] = Field(min_length=1)
    more_plans: tuple[Annotated[str, OneOf(PLANS)], ...]
    gguf: tuple[Annotated[str, OneOf(GGUF_TYPES)], ...]
    parity_texts: Count
    float_tolerance: Positive
    tanh_tolerance: Positive

    @model_validator(mode="after")
    def _other_engines_are_measured_beside_onnx_runtime(self) -> Export:
        if "onnxruntime" not in self.engines:
            raise ValueError(
                "export.engines lacks onnxruntime, whose plan `dense` is the reference of all plans: add it"
            )
        return self

    @model_validator(mode="after")
    def _more_plans_are_not_made_anyway(self) -> Export:
        able = [plan.name for plan in PLANS.rows() if plan.on_request]
        for name in self.more_plans:
            if name not in able:
                raise ValueError(
                    f"export.more_plans names {name}, which every model gets by default: remove it; these can be asked "
                    f"for: {', '.join(able)}"
                )
        return self


def _shape(shape: tuple[int | float, ...]) -> tuple[int | float, ...]:
    if not (all(isinstance(count, int) and count >= 1 for count in shape[:2]) and all(one > 0 for one in shape[2:])):
        raise ValueError(
            f"benchmark.shapes has {list(shape)}: write [batch, sequence], or [batch, sequence, weight] with a weight "
            "above 0; a batch holds a text, and a text a token"
        )
    return shape


# [batch, sequence], or [batch, sequence, weight]; the weight is the share among all shapes, 1 by default.
Shape = Annotated[tuple[int | float, ...], Field(min_length=2, max_length=3), AfterValidator(_shape)]


class Benchmark(Section):
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1)] | Literal["auto"]
    threads: tuple[Count, ...] = Field(min_length=1)
    decode_tokens: Count
    rounds: Count


class Gate(Section):
    min_retention: NonNegative
    min_tasks_kept: NonNegative
    min_general: NonNegative
    min_speedup: NonNegative
    max_quality_loss: float = Field(ge=0, lt=1)
    max_slowdown: Positive
    max_growth: Positive


class Register(Section):
    model_name: str | None = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    max_texts: Count
    max_characters: Count


class Params(Section):
    # A folder name, a part of DVC paths and a model name at once.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    seed: int = Field(ge=0, lt=2**32)
    target: Target
    compute: Compute
    teacher: Teacher
    data: Data
    decompose: Decompose
    train_router: TrainRouter
    distill: Distill
    evaluate: Evaluate
    export: Export
    benchmark: Benchmark
    gate: Gate
    register_: Register = Field(alias="register")

    @model_validator(mode="after")
    def _a_batch_holds_a_text(self) -> Params:
        if self.teacher.max_length != "auto":
            self.require_batches_of(self.teacher.max_length)
        return self

    def require_batches_of(self, length: int) -> None:
        """Raise ValueError where a batch has fewer tokens than a text."""
        for key, tokens in (
            ("train_router.batch_tokens", self.train_router.batch_tokens),
            ("distill.batch_tokens", self.distill.batch_tokens),
        ):
            if tokens != "auto" and tokens < length:
                raise ValueError(
                    f"{key} = {tokens} is less than teacher.max_length = {length}: "
                    "a batch could not hold one text; raise the first or lower the second"
                )

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> Params:
        weights, head = self.distill.model_dump(), self.teacher.head
        rows = HEADLINES.rows() if head == "auto" else (HEADLINES[head],)
        useful = tuple(dict.fromkeys(key for row in rows for key in row.weights))
        if not any(weights[key] for key in useful):
            named = " and ".join(f"distill.{key}" for key in useful)
            of = "" if head == "auto" else f" of a teacher with the head {head}"
            raise ValueError(f"{named} are all 0: there is no loss{of}; make one positive, or set distill.steps=0")
        return self

    @model_validator(mode="after")
    def _only_language_models_speak_and_fill_containers(self) -> Params:
        head = self.teacher.head
        if head in ("auto", "causal"):
            return self
        if self.data.corpus == "generated":
            raise ValueError(
                f"data.corpus = generated asks the teacher to write the texts, and a teacher with the head {head} "
                "writes no text: name a corpus, or set teacher.head=causal"
            )
        if self.decompose.container not in ("none", "auto"):
            raise ValueError(
                f"decompose.container = {self.decompose.container}, but containers hold causal language models and "
                f"teacher.head = {head}: set decompose.container=none"
            )
        return self

    @model_validator(mode="after")
    def _gguf_holds_language_models_in_containers(self) -> Params:
        named, head, settings = f"export.gguf = {list(self.export.gguf)}", self.teacher.head, self.decompose
        if not self.export.gguf:
            return self
        if head not in ("auto", "causal"):
            raise ValueError(
                f"{named}, but GGUF is written of causal language models and teacher.head = {head}: set export.gguf=[]"
            )
        if settings.num_experts != 1 and settings.container == "none":
            raise ValueError(
                f"{named}, but llama.cpp reads experts of a native container alone: set decompose.container=auto, or "
                "export.gguf=[]"
            )
        return self

    @model_validator(mode="after")
    def _elastic_budgets_are_other_numbers_of_experts(self) -> Params:
        others, settings = self.distill.elastic, self.decompose
        if not others:
            return self
        named = f"distill.elastic = {list(others)}"
        if max(others) > settings.most_experts:
            raise ValueError(
                f"{named} has more than decompose.num_experts = {settings.most_experts}: a token can run at most every "
                "expert"
            )
        if len({*others, settings.num_active}) <= len(others):
            raise ValueError(
                f"{named} must name each other budget once; decompose.num_active = {settings.num_active} is always one"
            )
        for key, value, only in (
            ("active_per_layer", settings.active_per_layer, settings.active_per_layer == "same"),
            ("container", settings.container, settings.container in ("none", "auto")),
        ):
            if not only:
                raise ValueError(
                    f"{named} switches all layers between fixed numbers of experts, and decompose.{key} = {value} has "
                    "no such numbers: set distill.elastic=[], or another decompose." + key
                )
        return self

    @model_validator(mode="after")
    def _a_student_without_experts_has_no_layers_to_train_alone(self) -> Params:
        if self.decompose.num_experts == 1 and self.distill.layerwise_steps:
            raise ValueError(
                f"distill.layerwise_steps = {self.distill.layerwise_steps} trains mixtures layer by layer, and "
                "decompose.num_experts = 1 is a student without: set distill.layerwise_steps=0"
            )
        return self

    @property
    def model_name(self) -> str:
        """Return the name of the registered model."""
        return self.register_.model_name or self.name

    def flat(self) -> dict[str, Any]:
        """Return dotted key -> value, in the order of params.yaml."""
        return dict(_flatten(self.model_dump(by_alias=True)))


def _optional(model: type[BaseModel]) -> type[BaseModel]:
    """Return a section with the same keys, bounds and legal values, all of them optional."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = _optional(kind)
        for check in field.metadata:
            kind = Annotated[kind, check]
        fields[name] = (kind | None, Field(default=None, alias=field.alias))
    settings = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    return create_model(f"{model.__name__}Settings", __config__=settings, **fields)


class Settings(_optional(Params)):  # type: ignore[misc]
    """Some of the parameters, for one run. An API reads bounds and names from its schema and refuses others."""

    def assignments(self) -> list[str]:
        """Return the given ones as KEY=VALUE, in the order of params.yaml."""
        given = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return [f"{key}={json.dumps(value)}" for key, value in _flatten(given)]


def load_params(path: str | os.PathLike[str] = "params.yaml", overrides: Sequence[str] = ()) -> Params:
    """Return the validated parameters of a file, with KEY=VALUE overrides.

    FileNotFoundError where there is no such file, ParamsError where its content is wrong.
    """
    return validate(override(read(path), overrides), source=str(path))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the raw mapping of a YAML file; it keeps the comments for `write`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; run from the folder that holds params.yaml, or restore it: "
            "git checkout -- params.yaml"
        ) from None
    try:
        raw = _yaml().load(text)
    except YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ParamsError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} holds no keys; restore it: git checkout -- params.yaml")
    return raw


def write(raw: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a mapping from `read`, with its comments."""
    with open(path, "w", encoding="utf-8") as stream:
        _yaml().dump(raw, stream)


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set each dotted KEY=VALUE (VALUE in YAML) in `raw` and return it; ParamsError for an unknown key."""
    legal = legal_keys()
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ParamsError(
                f"cannot read the setting {item!r}: write KEY=VALUE, for example decompose.num_experts=16"
            )
        if key not in legal:
            raise ParamsError(_unknown(key, legal))
        try:
            value = YAML(typ="safe").load(text) if text.strip() else None
        except YAMLError as error:
            raise ParamsError(f"the value of {item!r} is not valid YAML: {getattr(error, 'problem', error)}") from None
        *parents, last = key.split(".")
        section: Any = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return raw


def validate(raw: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Return the typed parameters of a raw mapping; one ParamsError names every problem."""
    try:
        return Params.model_validate(_plain(raw))
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_explain(item) for item in _one_each(error.errors())))
        raise ParamsError(f"{source}: {problems}") from None


def with_absolute_paths(raw: dict[str, Any], base: Path, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Make values that name existing local files absolute; relative ones start at `base`.

    Only keys that can hold a path, and are in `keys` if given, are read; a hub name or a package stays as it is.
    """
    for section, key in (("teacher", "source"), ("data", "corpus"), ("data", "evaluation"), ("data", "folder")):
        value = (raw.get(section) or {}).get(key)
        if (keys is not None and f"{section}.{key}" not in keys) or not isinstance(value, str):
            continue
        path = base / Path(value).expanduser()
        # These two can only be paths; a misspelled one is then reported with its full name.
        if path.exists() or key in ("folder", "evaluation"):
            raw[section][key] = str(path.resolve())
    return raw


def legal_keys() -> list[str]:
    """Return every dotted key that params.yaml holds."""
    return list(_keys(Params))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, key + ".")
        else:
            yield key


def _unknown(key: str, legal: Sequence[str]) -> str:
    if key in REMOVED_KEYS:
        return f"the key {key!r} left with a method that lost in docs/results.md; remove it (version 0.1.0 wrote it)"
    near = difflib.get_close_matches(key, legal, n=1, cutoff=0.5)
    if not near:  # find the right name in another section
        near = [name for name in legal if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(legal)}")


def _one_each(errors: Sequence[Any]) -> Iterator[Any]:
    """Yield the errors; of a key that may also be a word (`auto`), and is none, the first about what it is."""
    for key in dict.fromkeys(map(_key, errors)):
        own = [error for error in errors if _key(error) == key]
        if any(error["type"] == "literal_error" and not isinstance(error["input"], str) for error in own):
            yield min(own, key=lambda error: error["type"] == "literal_error")
        else:
            yield from own


def _key(error: Any) -> str:
    """Return the key that an error is about; pydantic adds the kind of value that it tried."""
    parts = [str(part) for part in error["loc"]]
    whole = ".".join(parts)
    return next((name for name in legal_keys() if whole.startswith(f"{name}.")), whole)


def _explain(error: Any) -> str:
    key = _key(error)
    kind = error["type"]
    if kind == "extra_forbidden":
        return _unknown(key, legal_keys())
    if kind == "missing":
        return f"the key {key!r} is missing; every key must be there (git diff params.yaml shows what changed)"
    if kind == "value_error":
        cause = error["ctx"]["error"]
        # The message of a contradiction names its keys itself.
        return f"{key} = {error['input']!r}: {cause}" if isinstance(cause, UnknownName) else str(cause)
    if kind == "model_type":
        return f"{key!r} is a section with keys of its own, not {error['input']!r}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if kind == "string_pattern_mismatch":
        message = "should be letters, digits, '.', '_' or '-', and start with a letter or a digit"
    return f"{key} = {error['input']!r}: {message}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(node: Any) -> Any:
    """Return round-trip YAML nodes as built-in types, which strict validation needs; lists as tuples."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return tuple(_plain(value) for value in node)
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml
