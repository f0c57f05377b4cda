"""Ask of a case, one thing after the other, whether it can be done: the table of checks.

A check yields lines for the user, and raises ValueError or FileNotFoundError, with cause and remedy, for what cannot be
done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ffn2moe.preflight import machine, mixture, model
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.doubt import Doubt
from ffn2moe.preflight.duration import duration
from ffn2moe.preflight.gguf import gguf
from ffn2moe.progress import Say


@dataclass(frozen=True)
class Check:
    """A look at one thing. Without what is `vital` the later checks have nothing to look at.

    One that `needs_ffns` has nothing to look at where the FFNs are searched when the weights are read.
    """

    name: str
    look: Callable[[Case], Iterator[str]]
    vital: bool = False
    needs_ffns: bool = False


@dataclass(frozen=True)
class Finding:
    """What a check found: a line for the user, and the error where it refuses."""

    check: str
    text: str
    kind: Literal["ok", "warning", "refused"] = "ok"
    error: Exception | None = None

    def __str__(self) -> str:
        return f"{self.check}: {'warning: ' if self.kind == 'warning' else ''}{self.text}"


CHECKS = (
    Check("output", machine.output),
    Check("machine", machine.processor),
    Check("model", model.source, vital=True),
    Check("head", model.head),
    Check("tokenizer", model.reader),
    Check("corpus", mixture.corpus),
    Check("experts", mixture.experts, needs_ffns=True),
    Check("container", mixture.container),
    Check("gguf", gguf, needs_ffns=True),
    Check("plans", mixture.plans),
    Check("disk", machine.disk, needs_ffns=True),
    Check("memory", machine.memory, needs_ffns=True),
    Check("time", duration, needs_ffns=True),
)


def findings(case: Case) -> Iterator[Finding]:
    """Yield what every check finds; a refusal is a finding, too, each once."""
    refusals: set[str] = set()
    for check in CHECKS:
        if check.needs_ffns and case.dense.family is None:
            continue
        try:
            for line in check.look(case):
                yield Finding(check.name, line, "warning" if isinstance(line, Doubt) else "ok")
        except (ValueError, OSError) as error:
            if str(error) not in refusals:
                refusals.add(str(error))
                yield Finding(check.name, str(error), "refused", error)
            if check.vital:
                return


def preflight(case: Case, say: Say) -> None:
    """Say what will be done and what it takes. Raise the error of the first check that refuses."""
    for found in findings(case):
        if found.error is not None:
            raise found.error
        say(str(found))
