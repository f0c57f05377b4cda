"""Decide what a conversion does: replace every `auto` by what fits the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffn2moe.containers.container import Container
from ffn2moe.containers.fit import choose, require_fit
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.conversion.dense import Dense
from ffn2moe.conversion.settings import Settings
from ffn2moe.dense.families import positions
from ffn2moe.dense.load import pooling_of
from ffn2moe.moe.describe import spec_of
from ffn2moe.numerics import choose_device
from ffn2moe.progress import Say, Track
from ffn2moe.spec import Gate, MoESpec

LONGEST_CAUSAL, LONGEST = 256, 128  # tokens of a text, where the user names no length


@dataclass(frozen=True)
class Task:
    """One conversion: the model, the decisions about it, where it works, and whom it tells."""

    dense: Dense
    settings: Settings
    container: Container | None
    gate: Gate
    max_length: int  # tokens of a text
    corpus: str  # generated, docstrings, a file, a folder of images, or datasets:NAME
    device: str
    out: Path
    work: Path  # the unfinished folder, which a stopped conversion resumes from
    say: Say
    track: Track

    @property
    def routed(self) -> Path:
        """The folder of the checkpoint whose routers alone are trained."""
        return self.work / "routed"

    def spec(self, model: Any) -> MoESpec:
        """Return the spec of the mixture that `model` becomes; its weights are not read."""
        settings, container = self.settings, self.container
        return spec_of(
            model,
            head=self.dense.head,
            num_experts=settings.num_experts,
            num_active=settings.num_active,
            partition=settings.partition,
            teacher=self.dense.source,
            max_length=self.max_length,
            shared_width=settings.shared_width,
            gate=self.gate,
            router_bias=container is None,
            container=container.name if container else None,
            width_multiple=container.width_multiple if container else 1,
            pooling=pooling_of(self.dense.folder) if self.dense.head == "embedding" else None,
        )


def decide(source: str, out: Path, settings: Settings, say: Say, track: Track) -> Task:
    """Return the task; ValueError, with cause and remedy, for settings that do not fit the model."""
    device = choose_device(settings.device)
    dense = Dense(source, revision=settings.revision, head=settings.head)
    container = _container(dense, settings, say)
    return Task(
        dense=dense,
        settings=settings,
        container=container,
        gate=_gate(settings, container),
        max_length=_max_length(dense, settings),
        corpus=_corpus(dense, settings),
        device=device,
        out=out,
        work=out.with_name(f"{out.name}.partial"),
        say=say,
        track=track,
    )


def _container(dense: Dense, settings: Settings, say: Say) -> Container | None:
    if settings.container == "none":
        return None
    if settings.container != "auto":
        found = CONTAINERS[settings.container]
        require_fit(found, dense.config, shared_width=settings.shared_width)
        if settings.gate not in ("auto", found.gate):
            raise ValueError(
                f"{found.name} weighs experts by {found.gate}, not by {settings.gate}: leave --gate out, or set "
                "--container none"
            )
        return found
    if dense.head != "causal":
        return None
    try:
        found, why = choose(dense.config, shared_width=settings.shared_width)
    except ValueError as error:
        say(f"container: none: {error}")
        return None
    if settings.gate not in ("auto", found.gate):
        say(f"container: none, because {found.name} weighs experts by {found.gate}, not by {settings.gate}")
        return None
    say(f"container: {why}")
    return found


def _gate(settings: Settings, container: Container | None) -> Gate:
    if settings.gate != "auto":
        return settings.gate
    return container.gate if container else "unit"


def _max_length(dense: Dense, settings: Settings) -> int:
    longest = positions(dense.config)
    usual = LONGEST_CAUSAL if dense.head == "causal" else LONGEST
    wanted = settings.max_length or min(usual, longest or LONGEST_CAUSAL)
    if longest is not None and wanted > longest:
        raise ValueError(
            f"--max-length {wanted} is longer than the context of {dense.source}, {longest} tokens: lower it"
        )
    return wanted


def _corpus(dense: Dense, settings: Settings) -> str:
    wanted = settings.corpus
    if dense.reads == "speech":
        raise ValueError(
            f"{dense.source} reads speech, and this command reads no recordings: call the functions of "
            "ffn2moe.decompose and ffn2moe.distill.distiller, which take batches of any kind"
        )
    if "images" in dense.reads:
        if not Path(wanted).is_dir():
            raise ValueError(f"{dense.source} reads images: name a folder of them with --corpus")
        return wanted
    if wanted == "auto":
        return "generated" if dense.head == "causal" else "docstrings"
    if wanted == "generated" and dense.head != "causal":
        raise ValueError(f"{dense.source} is a {dense.head} model, which writes no texts: name a corpus")
    return wanted
