"""Decide whether the challenger becomes champion, or go back to the previous champion.

    python -m flows.promote [--model NAME] [--version N]
    python -m flows.promote --rollback [--reason TEXT]

The decision is written to the version (the tag `promotion`) before the alias `champion` moves, which is one write. A
process that is killed in between leaves a registry that works, and a note from which the next process resumes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from flows.environment import settle

ROOT = Path(__file__).resolve().parent.parent
settle(ROOT)

from prefect import flow  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from rich.console import Console  # noqa: E402

from ffn2moe.choices import HEADS  # noqa: E402
from ffn2moe.planning.timing import median_interval  # noqa: E402
from ffn2moe.runtime.export import open_export  # noqa: E402
from flows.errors import report, stop_on_terminate  # noqa: E402
from flows.serve import Server, served  # noqa: E402
from flows.workspace import FlowError  # noqa: E402
from tasks.measures import GENERAL, HEADLINES, TASKS_KEPT  # noqa: E402
from tasks.params import Gate, load_params  # noqa: E402
from tasks.register import answers, example_of, same  # noqa: E402
from tasks.registry import CHALLENGER, CHAMPION, Registry, RegistryError  # noqa: E402

TAG = "promotion"
ROUNDS = 11  # requests to each server, in turn
TEXTS = 32  # texts in each request
# Inputs that every model must refuse.
BAD: tuple[Any, ...] = ([], ["a text", " "], [1, 2], {"text": "a"}, None)

# promoting: noted before the alias moves. failed: an error came after that. unchanged is never noted.
State = Literal["promoting", "promoted", "refused", "failed", "rolled back", "unchanged"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """Hold the result of one check."""

    passed: bool
    message: str


@dataclass(frozen=True)
class Decision:
    """Hold a decision about a version, and its reasons. `against` was champion then; a rollback goes back to it."""

    state: State
    model: str
    version: int
    against: int | None
    checks: tuple[Check, ...]
    gate: Mapping[str, float] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def refused(self) -> tuple[str, ...]:
        """Return the reasons why the version is not champion."""
        return tuple(check.message for check in self.checks if not check.passed)

    def message(self) -> str:
        """Return the decision as one line."""
        beside = f"version {self.against}" if self.against else "no champion"
        return {
            "promoting": f"{self.model} version {self.version} becomes champion, after {beside}",
            "promoted": f"{self.model} version {self.version} is champion now, after {beside}",
            "refused": f"{self.model} version {self.version} does not become champion; {beside} stays",
            "failed": f"{self.model} version {self.version} was not made champion; {beside} stays",
            "rolled back": f"{self.model} is back at version {self.against}; version {self.version} is not champion",
            "unchanged": f"{self.model} version {self.version} is champion already",
        }[self.state]

    def becomes(self, state: State, *checks: Check) -> Decision:
        """Return the decision in another state, with more checks."""
        return Decision(state, self.model, self.version, self.against, (*self.checks, *checks), self.gate)


# --- judge a challenger -----------------------------------------------------------------------------------


def judge(
    gate: Gate, version: int, mine: Mapping[str, str], champion: int | None, its: Mapping[str, str]
) -> list[Check]:
    """Compare the tags of two versions: quality, speed-up and size. `its` is empty if there is no champion."""
    head = mine.get("head", "")
    if head not in HEADLINES:
        return [Check(False, f"version {version} has no figures to judge it by; register it: make run")]
    headline = HEADLINES[head]
    key = ".".join(headline.path)
    if f"retention.{key}" not in mine:  # an earlier version
        reason = f"version {version} was not judged by its {headline.label}"
        return [Check(False, f"{reason}; make and register it again: make run")]
    retention, speedup = float(mine[f"retention.{key}"]), float(mine["speedup_vs_best_dense"])
    checks = [
        Check(
            retention >= gate.min_retention,
            f"keeps {retention:.4f} of the teacher's {headline.label}; gate.min_retention = {gate.min_retention}",
        ),
        Check(
            speedup > gate.min_speedup,
            f"runs at {speedup:.2f}x the best dense plan; must be above gate.min_speedup = {gate.min_speedup}",
        ),
    ]
    tasks = ".".join(("retention", *TASKS_KEPT))
    if tasks in mine:
        reason = f"keeps {float(mine[tasks]):.4f} of the teacher's accuracy above chance"
        checks.append(
            Check(float(mine[tasks]) >= gate.min_tasks_kept, f"{reason}; gate.min_tasks_kept = {gate.min_tasks_kept}")
        )
    general = ".".join(("student", *GENERAL))
    if general in mine:
        reason = f"orders pairs of general sentences as its teacher does by {float(mine[general]):.4f}"
        checks.append(
            Check(float(mine[general]) >= gate.min_general, f"{reason}; gate.min_general = {gate.min_general}")
        )
    if champion is None:
        return checks
    if f"retention.{key}" not in its and its.get("head", head) == head:  # an earlier version judged by another figure
        return [*checks, Check(True, f"version {champion}, champion, has no figures to compare with")]
    if (theirs := _form(its)) != (own := _form(mine)):
        reason = f"the head of the champion is {theirs}, of this version {own}: its clients would break"
        return [*checks, Check(False, f"{reason}; register it under another name, register.model_name")]
    if mine.get("evaluated_on") and mine.get("evaluated_on") == its.get("evaluated_on"):
        kept = headline.retention(float(mine[f"student.{key}"]), float(its[f"student.{key}"]))
        measure = f"{headline.label} on the same data"
    else:
        kept = retention / float(its[f"retention.{key}"])
        measure = "share of its teacher's quality (the two were judged on different data)"
    growth = float(mine["bytes"]) / float(its["bytes"])
    return [
        *checks,
        Check(
            kept >= 1 - gate.max_quality_loss,
            f"has {kept:.4f} of the champion's {measure}; gate.max_quality_loss = {gate.max_quality_loss}",
        ),
        Check(
            growth <= gate.max_growth,
            f"has {growth:.2f} times the champion's bytes; gate.max_growth = {gate.max_growth}",
        ),
    ]


def _form(tags: Mapping[str, str]) -> str:
    """Return the form of a version's answers: its head, and the problem of a classifier."""
    return " ".join(tags[key] for key in ("head", "problem") if key in tags)


def smoke(server: Server, version: int, export: Path) -> list[Check]:
    """Ask a served version: it must answer as its export, know its number, refuse bad input, and still answer."""
    example = example_of(export)
    status, given = server.ask(example)
    agrees = status == 200 and same(given.get("predictions"), answers(export, example))
    status, info = server.ask(example, info=True)
    known = status == 200 and info["predictions"][0]["version"] == version
    statuses = [server.ask(bad)[0] for bad in BAD]
    refuses = all(400 <= status < 500 for status in statuses)
    status, after = server.ask(example)
    return [
        Check(agrees, f"over HTTP it {'answers' if agrees else 'does not answer'} as its export does"),
        Check(known, f"over HTTP it {'knows' if known else 'does not know'} its version"),
        Check(refuses, f"bad requests get {', '.join(map(str, statuses))}; all must get 4xx"),
        Check(after == given, f"after them it {'answers' if after == given else 'does not answer'} as before"),
    ]


def slowdown(challenger: Server, champion: Server, texts: Sequence[Any]) -> list[float]:
    """Return the time of the challenger over that of the champion, round by round, asked in turn."""
    ratios = []
    for index in range(ROUNDS + 1):
        order = [challenger, champion] if index % 2 else [champion, challenger]
        seconds = {}
        for server in order:
            start = time.perf_counter()
            status, answer = server.ask(list(texts))
            seconds[server.url] = time.perf_counter() - start
            if status != 200:
                raise FlowError(f"{server.url} answers a plain request with {status}: {answer.get('message')}")
        ratios.append(seconds[challenger.url] / seconds[champion.url])
    return ratios[1:]  # the first round also allocates


def request_texts(head: str, example: Sequence[Any]) -> list[Any]:
    """Return the texts or pairs of a request, of many lengths; a single text for a model that generates: it is slow."""
    pairs = isinstance(example[0], tuple)
    words = " ".join(" ".join(one) if pairs else one for one in example).split()
    if HEADS[head].generates:
        return [" ".join(words)]
    texts = [
        " ".join(words[index % len(words)] for index in range(start, start + 3 + 2 * start)) for start in range(TEXTS)
    ]
    return [(texts[0], text) for text in texts] if pairs else texts


# --- decisions --------------------------------------------------------------------------------------------------------


def consider(
    registry: Registry,
    gate: Gate,
    which: str = CHALLENGER,
    *,
    publish: Callable[[Decision], None],
    say: Say,
    again: bool = True,
) -> Decision:
    """Judge a version (an alias or a number), and make it champion if it passes.

    Without `again`, an earlier refusal stands while champion and gate are the same. A challenger that was rolled back
    becomes champion again only by its number.
    """
    complete(registry, publish)
    version, champion = registry.resolve(which), registry.version_of(CHAMPION)
    if version == champion:
        return Decision("unchanged", registry.model, version, champion, ())
    mine = registry.tags(version)
    its = registry.tags(champion) if champion is not None else {}
    before = noted(registry, version)
    if before and before.state == "rolled back" and not which.isdigit():
        reason = f"it was rolled back at {before.at}; to make it champion again: make promote VERSION={version}"
        return Decision("refused", registry.model, version, champion, (Check(False, reason),))
    thresholds = gate.model_dump()
    same_question = before is not None and (before.against, dict(before.gate)) == (champion, thresholds)
    if before and before.state == "refused" and same_question and not again:
        return before
    checks = judge(gate, version, mine, champion, its)
    if all(check.passed for check in checks):
        say(f"{registry.model} version {version} passes by its figures; now serving and asking it")
        checks += _asked(registry, gate, version, champion, mine["head"])
    decision = Decision("refused", registry.model, version, champion, tuple(checks), thresholds)
    if decision.refused:
        _note(registry, decision)
        publish(decision)
        return decision
    return _move(registry, decision, publish)


def _asked(registry: Registry, gate: Gate, version: int, champion: int | None, head: str) -> list[Check]:
    export = registry.export(version)
    with TemporaryDirectory() as folder:
        log = Path(folder)
        try:
            with served(registry, version, log=log / "challenger") as server:
                checks = smoke(server, version, export)
                if champion is None or not all(check.passed for check in checks):
                    return checks
                with served(registry, champion, log=log / "champion") as its:
                    ratios = slowdown(server, its, request_texts(head, example_of(export)))
        except FlowError as error:
            return [Check(False, f"it could not be served: {error}")]
    low, high = median_interval(ratios)
    measured = f"takes {median(ratios):.2f} ({low:.2f} to {high:.2f}) times as long as the champion for a request"
    # Refuse only if it is surely slower: other work on the machine must not decide.
    return [*checks, Check(low <= gate.max_slowdown, f"{measured}; gate.max_slowdown = {gate.max_slowdown}")]


def _move(registry: Registry, decision: Decision, publish: Callable[[Decision], None]) -> Decision:
    """Make the version champion. An error after the alias moved moves it back."""
    _note(registry, decision.becomes("promoting"))
    if registry.version_of(CHAMPION) != decision.against:
        raise FlowError(f"the champion of {registry.model} was changed by another process; run again: make promote")
    promoted = decision.becomes("promoted")
    with registry.moved(CHAMPION, decision.version):
        try:
            if registry.version_of(CHAMPION) != decision.version:
                raise FlowError(
                    f"the alias {CHAMPION} of {registry.model} does not point to version {decision.version}"
                )
            _note(registry, promoted)
            publish(promoted)
        except BaseException as error:  # Ctrl-C too: note it first, so that a kill now can be resumed
            _note(registry, decision.becomes("failed", Check(False, f"{type(error).__name__}: {error}")))
            raise
    return promoted


def roll_back(registry: Registry, reason: str, *, publish: Callable[[Decision], None]) -> Decision:
    """Make the previous champion champion again. RegistryError if there is none."""
    completed = complete(registry, publish)
    if completed and completed.state == "rolled back":
        return completed
    champion = registry.version_of(CHAMPION)
    if champion is None:
        raise RegistryError(f"{registry.model} has no champion, so a rollback is impossible; make one: make promote")
    note = noted(registry, champion)
    if note is None or note.against is None:
        others = ", ".join(str(version) for version in registry.versions() if version != champion) or "none"
        raise RegistryError(
            f"no champion before version {champion} of {registry.model} is known; other versions: {others}; to promote "
            "one of them: make promote VERSION=N"
        )
    back = note.against
    if not registry.holds(back):
        raise RegistryError(
            f"version {back} of {registry.model}, the previous champion, was deleted; promote another one: "
            "make promote VERSION=N"
        )
    open_export(registry.export(back))  # raises if it is damaged or of another runtime
    decision = Decision("rolled back", registry.model, champion, back, (Check(False, reason),), note.gate)
    _note(registry, decision)
    try:
        with registry.moved(CHAMPION, back):
            publish(decision)
    except BaseException:
        _note(registry, note)
        raise
    return decision


def complete(registry: Registry, publish: Callable[[Decision], None]) -> Decision | None:
    """Finish the work of a killed process, by the note on the champion; None if there is nothing to finish."""
    champion = registry.version_of(CHAMPION)
    note = noted(registry, champion) if champion is not None else None
    if note is None or note.state not in ("promoting", "failed", "rolled back"):
        return None
    if note.state == "promoting":  # the alias has moved, which is the last step
        note = note.becomes("promoted")
        _note(registry, note)
    else:
        registry.point(CHAMPION, note.against)
    publish(note)
    return note


def noted(registry: Registry, version: int) -> Decision | None:
    """Return the last decision about a version."""
    text = registry.tags(version).get(TAG)
    if text is None:
        return None
    content = json.loads(text)
    # Older notes name the message `told`.
    checks = tuple(Check(check["passed"], check.get("message", check.get("told", ""))) for check in content["checks"])
    return Decision(**{**content, "checks": checks})


def _note(registry: Registry, decision: Decision) -> None:
    registry.tag(decision.version, {TAG: json.dumps(asdict(decision))})


# --- the flows --------------------------------------------------------------------------------------------------------

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=True, markup=False)


@flow(name="promote", persist_result=False)
def promote(model: str, gate: Gate, which: str = CHALLENGER, again: bool = True) -> Decision:
    """Judge a version of a registered model, and make it champion if it passes. FlowError, RegistryError."""
    with _alone(model):
        return consider(Registry(ROOT, model), gate, which, publish=_publish, say=console.print, again=again)


@flow(name="rollback", persist_result=False)
def rollback(model: str, reason: str) -> Decision:
    """Go back to the previous champion."""
    with _alone(model):
        return roll_back(Registry(ROOT, model), reason, publish=_publish)


@contextmanager
def _alone(model: str) -> Iterator[None]:
    """Allow one decision about a model at a time on this machine."""
    path = ROOT / ".cache" / f"promotion-{model}.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlowError(f"a promotion of {model} runs already; wait for it, then run again") from None
        yield


def _publish(decision: Decision) -> None:
    """Publish the decision as an artifact of the run."""
    rows = "\n".join(f"| {'yes' if check.passed else 'no'} | {check.message} |" for check in decision.checks)
    create_markdown_artifact(
        key="promotion",
        description=decision.message(),
        markdown=f"**{decision.message()}**\n\n| | |\n|---|---|\n{rows}\n",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 champion, 1 refused, 2 an error."""
    parser = argparse.ArgumentParser(prog="python -m flows.promote", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name of the registered model; default: that of params.yaml")
    parser.add_argument("--version", default=CHALLENGER, help="a version by its number; default: the challenger")
    parser.add_argument("--rollback", action="store_true", help="go back to the previous champion")
    parser.add_argument("--reason", default="asked for", help="reason of a rollback, for the record")
    options = parser.parse_args(arguments)
    stop_on_terminate()
    try:
        params = load_params(ROOT / "params.yaml")
        model = options.model or params.model_name
        Registry(ROOT, model).resolve(
            CHAMPION if options.rollback else options.version
        )  # raises before anything starts
        decision = rollback(model, options.reason) if options.rollback else promote(model, params.gate, options.version)
    except KeyboardInterrupt:
        console.print("Stopped. The champion has not changed, or the next promotion finishes this one.")
        return 130
    except Exception as error:
        return report(error)
    console.print(decision.message())
    for check in decision.checks:
        console.print(f"  {'+' if check.passed else '-'} {check.message}")
    return 1 if decision.state == "refused" else 0


if __name__ == "__main__":
    sys.exit(main())
