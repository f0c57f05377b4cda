"""Hold one conversion: what is decided about it, where it works, and whom it tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffn2moe.containers.container import Container
from ffn2moe.conversion.settings import OPTIONS, Settings
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.checks import preflight
from ffn2moe.preflight.dense import Dense
from ffn2moe.preflight.request import Request
from ffn2moe.progress import Say, Track
from ffn2moe.spec import MoESpec


@dataclass(frozen=True)
class Task:
    """One conversion: the decisions about it, where it works, and whom it tells."""

    case: Case
    settings: Settings
    out: Path
    work: Path  # the unfinished folder, which a stopped conversion resumes from
    say: Say
    track: Track

    @property
    def dense(self) -> Dense:
        """The dense model."""
        return self.case.dense

    @property
    def container(self) -> Container | None:
        """The native architecture that the mixture is also written in, if any."""
        return self.case.container

    @property
    def max_length(self) -> int:
        """The tokens of a text."""
        return self.case.max_length

    @property
    def corpus(self) -> str:
        """Where texts come from: generated, docstrings, a file, a folder of images, or datasets:NAME."""
        return self.case.corpus

    @property
    def device(self) -> str:
        """The device to compute on."""
        return self.case.device

    @property
    def routed(self) -> Path:
        """The folder of the checkpoint whose routers alone are trained."""
        return self.work / "routed"

    def spec(self, model: Any) -> MoESpec:
        """Return the spec of the mixture that `model` becomes; its weights are not read."""
        return self.case.spec_of(model)


def decide(source: str, out: Path, settings: Settings, say: Say, track: Track) -> Task:
    """Check the conversion, say what it will do, and return it; ValueError, with cause and remedy, if it cannot be."""
    case = Case(request_of(source, out, settings), say)
    preflight(case, say)
    return Task(case, settings, out, out.with_name(f"{out.name}.partial"), say, track)


def request_of(source: str, out: Path | None, settings: Settings) -> Request:
    """Return what the user asks for; without `out` the folder to make is not looked at."""
    named = {name: getattr(settings, name) for name in Request.__dataclass_fields__ if name in OPTIONS}
    called = {name: option.flag for name, option in OPTIONS.items()}
    called |= {"steps": OPTIONS["distill_steps"].flag, "minutes": OPTIONS["distill_minutes"].flag}
    return Request(
        source=source,
        out=out,
        disk=out or Path("."),
        called=called,
        steps=settings.steps,
        minutes=settings.distill_minutes,
        **named,
    )
