"""Keep the cells of a sweep and their states in an Optuna study in SQLite, so that a stopped sweep can resume.

A cell is a combination of settings. It waits, runs, and then has figures, or has failed with a reason, or was left out
because its settings contradict each other.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.axes import Axis, combinations, distributions
from flows.recipes import RECIPE
from flows.workspace import FlowError, plan
from tasks import params as parameters
from tasks.params import Params, ParamsError

PROPOSALS = 50  # a search is exhausted after so many illegal or known proposals in a row
_STATES = {
    "WAITING": "waits",
    "RUNNING": "runs",
    "COMPLETE": "finished",
    "FAIL": "failed",
    "PRUNED": "left out",
}
_RAN = re.compile(r"^(?!inputs )(\w+) Completed$", re.MULTILINE)  # flows/cell.py prints it; inputs always runs


@dataclass(frozen=True)
class Cell:
    """Hold a combination of settings; its number is its place in the sweep."""

    number: int
    name: str  # name of its workspace, its export and its runs
    settings: tuple[str, ...]  # KEY=VALUE
    recipe: str | None = None  # the name of its recipe, in a front

    @property
    def label(self) -> str:
        if self.recipe is not None:
            return " ".join([self.recipe, *(setting for setting in self.settings if setting.startswith("seed="))])
        return " ".join(setting for setting in self.settings if not setting.startswith("name=")) or "as committed"


class Ledger:
    """Keep what happens to the cells of a study."""

    name: str
    _study: Any  # of Optuna

    def note(self, cell: Cell, **attributes: Any) -> None:
        """Keep attributes of a running cell."""
        import optuna

        trial = optuna.trial.Trial(self._study, self._study.trials[cell.number]._trial_id)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)

    def noted(self, cell: Cell, key: str) -> Any:
        return self._study.trials[cell.number].user_attrs.get(key)

    def begin(self, cell: Cell, step: str) -> None:
        """Keep that a step of a cell begins now; it begins again after each interruption."""
        attempts = self.noted(cell, "attempts") or {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.note(cell, attempts={**attempts, step: [*attempts.get(step, []), now]})

    def finish(self, cell: Cell, kept: float, speed: float) -> None:
        """Keep the result of a cell: its share of the teacher's quality, and its speed over the best dense plan."""
        self._study.tell(cell.number, [kept, speed])

    def fail(self, cell: Cell, reason: str) -> None:
        """Keep the reason why a cell failed; the others continue."""
        from optuna.trial import TrialState

        self.note(cell, reason=reason)
        self._study.tell(cell.number, state=TrialState.FAIL)

    def finished(self) -> list[Cell]:
        return [self._of(trial) for trial in self._trials("COMPLETE")]

    def failed(self) -> list[tuple[Cell, str]]:
        """Return the failed cells with their reasons."""
        return [(self._of(trial), trial.user_attrs["reason"]) for trial in self._trials("FAIL")]

    def left_out(self) -> list[tuple[Cell, str]]:
        """Return the cells whose settings contradict each other, with the reasons; without repeated proposals."""
        no_cell = ("the same as", "stopped before")
        trials = [trial for trial in self._trials("PRUNED") if not trial.user_attrs["reason"].startswith(no_cell)]
        return [(self._of(trial), trial.user_attrs["reason"]) for trial in trials]

    def _trials(self, state: str) -> list[Any]:
        from optuna.trial import TrialState

        return self._study.get_trials(deepcopy=False, states=(TrialState[state],))

    def _of(self, trial: Any) -> Cell:
        known = trial.user_attrs
        name = f"{self.name}-{trial.number:03}"
        return Cell(trial.number, name, tuple(known["settings"]), known.get(RECIPE))


class Study(Ledger):
    """Hand out the cells that have not run."""

    def __init__(
        self,
        source: Path,
        name: str,
        axes: Mapping[str, Axis],
        search: int | None,
        called_from: Path,
        recipes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Begin or resume a study in sweeps/NAME.

        `search` is the number of cells that a search may try, None for a grid. `recipes` are the settings behind the
        names on the axis `recipe`; a study of recipes may get more of them, and more seeds. FlowError (also
        ParamsError) for an unknown key, an empty grid, only illegal cells, an illegal recipe, or a study of that name
        with other values.
        """
        self.folder = source / "sweeps" / name
        self.name = name
        self.search = search
        self._source = source
        self._axes = dict(axes)
        self._recipes = {name: list(settings) for name, settings in (recipes or {}).items()}
        self._params: dict[tuple[str, ...], Params] = {}
        raw = parameters.read(source / "params.yaml")
        committed = parameters.validate(raw)
        # An unknown key is an error at once, not once for every cell.
        firsts = {key: str(axis[0] if isinstance(axis, tuple) else axis.low) for key, axis in axes.items()}
        parameters.override(raw, self._cell(0, firsts).settings)
        waiting = combinations(axes) if search is None else []
        if search is not None and all(isinstance(axis, tuple) and len(axis) < 2 for axis in axes.values()):
            raise FlowError("a search needs a choice: give at least one key several values, or a range LOW..HIGH")
        self._called_from = called_from
        for recipe in self._recipes:
            if reason := self._illegal(self._cell(0, firsts | {RECIPE: recipe})):
                raise FlowError(f"the recipe {recipe}: {reason}")
        if waiting and not (self.folder / "study.db").is_file():
            self._require_a_legal_cell(waiting)
        self._study = open_study(self.folder, committed.seed, search)
        self._begin_or_resume(
            {
                "keys": {key: list(axis) if isinstance(axis, tuple) else vars(axis) for key, axis in axes.items()},
                "kind": "grid" if search is None else "search",
                "params.yaml": {key: str(value) for key, value in committed.flat().items()},
                **({"recipes": self._recipes} if self._recipes else {}),
            },
            waiting,
        )

    def _require_a_legal_cell(self, waiting: Sequence[dict[str, str]]) -> None:
        reasons = [self._illegal(self._cell(number, values)) for number, values in enumerate(waiting)]
        if all(reasons):
            raise FlowError(f"none of the {len(reasons)} cells is legal; the first one: {reasons[0]}")

    def _begin_or_resume(self, definition: dict[str, Any], waiting: Sequence[dict[str, str]]) -> None:
        """Enqueue the cells of a new study, or of one that grows. FlowError for a study with other values."""
        before = self._study.user_attrs.get("definition")
        if before is None:
            self._study.set_user_attr("called_from", str(self._called_from))
        if before is None or _grows(before, definition):
            # The definition comes last: a study that is cut short here gets the rest when it is opened again.
            known_values = [trial.system_attrs.get("fixed_params") for trial in self._study.trials]
            for values in waiting:
                if values not in known_values:
                    self._study.enqueue_trial(values)
            self._study.set_user_attr("definition", definition)
        elif before != definition:
            raise FlowError(
                f"the sweep {self.name} is there already with {_difference(before, definition)}; take another name "
                f"(--name), or remove its results: rm -r {self.folder.relative_to(self._source)}"
            )
        self._called_from = Path(self._study.user_attrs["called_from"])

    @property
    def called_from(self) -> Path:
        """Return the folder of relative paths in the settings: the one in which the sweep began."""
        return self._called_from

    def unfinished(self) -> list[Cell]:
        """Return the cells that ran when the sweep was stopped, even if it was about to hand them out."""
        found = []
        for trial in self._trials("RUNNING"):
            # A grid knows all values from the start; a search may have been stopped while it chose them.
            values = trial.system_attrs.get("fixed_params") or trial.params
            cell = self._admit(trial.number, {key: values[key] for key in self._axes if key in values})
            found += [cell] if cell else []
        return found

    def take(self) -> Cell | None:
        """Return the next legal cell, which runs from now on; None if there is none left."""
        for _ in range(PROPOSALS if self.search else len(self._study.trials) + 1):
            if self.search is None and not self._trials("WAITING"):
                return None
            if self.search is not None and (self._tried() >= self.search or self._exhausted()):
                return None
            # Optuna keeps the values of an axis for good, and those of a front may grow.
            number = self._study.ask({} if self._recipes else distributions(self._axes)).number
            chosen = self._study.trials[number]
            if cell := self._admit(number, chosen.system_attrs["fixed_params"] if self._recipes else chosen.params):
                return cell
        return None

    def _admit(self, number: int, values: Mapping[str, Any]) -> Cell | None:
        """Return the cell of a running trial; None if it must not run: the trial is then left out."""
        from optuna.trial import TrialState

        cell = self._cell(number, {key: _text(value) for key, value in values.items()})
        reason = "stopped before it was chosen" if len(values) < len(self._axes) else None
        reason = reason or self._illegal(cell) or self._known(cell)
        noted = {"reason": reason, RECIPE: cell.recipe}
        self.note(cell, settings=list(cell.settings), **{key: value for key, value in noted.items() if value})
        if reason is None:
            return cell
        self._study.tell(number, state=TrialState.PRUNED)
        return None

    def remaining(self) -> int:
        """Return how many cells are left, with those that run; some cells of a grid may still turn out illegal."""
        running = len(self._trials("RUNNING"))
        if self.search is None:
            return running + len(self._trials("WAITING"))
        return max(running, self.search - self._tried() + running)

    def waiting(self) -> int:
        """Return how many cells are made and not measured yet."""
        return sum(bool(trial.user_attrs.get("made")) for trial in self._trials("RUNNING"))

    def _exhausted(self) -> bool:
        """Return whether a search has seen every combination."""
        values = [len(axis) for axis in self._axes.values() if isinstance(axis, tuple)]
        seen = {tuple(trial.user_attrs.get("settings", [])[1:]) for trial in self._study.get_trials(deepcopy=False)}
        return len(values) == len(self._axes) and len(seen) >= math.prod(values)

    def _tried(self) -> int:
        return len(self._trials("RUNNING")) + len(self._trials("COMPLETE")) + len(self._trials("FAIL"))

    def _cell(self, number: int, values: Mapping[str, str]) -> Cell:
        name = f"{self.name}-{number:03}"
        settings = [f"{key}={value}" for key, value in values.items() if key != RECIPE]
        recipe = values.get(RECIPE)
        own = self._recipes[recipe] if recipe is not None else ()
        return Cell(number, name, (f"name={name}", *settings, *own), recipe)

    @property
    def recipes(self) -> list[str]:
        """Return the names of the recipes; none in a sweep without."""
        return list(self._recipes)

    def recipe(self, name: str) -> list[str]:
        """Return the settings of a recipe."""
        return self._recipes[name]

    def params(self, cell: Cell) -> Params:
        """Return the validated parameters of a cell; ParamsError if they contradict each other."""
        if cell.settings not in self._params:
            raw = plan(self._source, cell.settings, self._called_from)[0]
            self._params[cell.settings] = parameters.validate(raw, source="the settings")
        return self._params[cell.settings]

    def _illegal(self, cell: Cell) -> str | None:
        try:
            self.params(cell)
        except ParamsError as error:
            return str(error).removeprefix("the settings: ")
        return None

    def _known(self, cell: Cell) -> str | None:
        """Return why a proposal is not new: the cell with the same settings; None if it is new."""
        for trial in self._study.get_trials(deepcopy=False):
            same = trial.user_attrs.get("settings", [])[1:] == list(cell.settings[1:])
            if same and trial.number < cell.number and trial.state.name != "PRUNED":
                return f"the same as cell {trial.number}"
        return None


def _grows(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a study of recipes has all that it had before, and more recipes or seeds."""
    if "recipes" not in before or "recipes" not in now or before == now:
        return False
    old, new = ({**one, "recipes": None, "keys": {**one["keys"], RECIPE: None, "seed": None}} for one in (before, now))
    kept = all(now["recipes"].get(name) == settings for name, settings in before["recipes"].items())
    return old == new and kept and all(set(before["keys"][key]) <= set(now["keys"][key]) for key in (RECIPE, "seed"))


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the history of every cell of a study: state, settings, begin and end.

    `made` and `measured` count how often that step began: once, and again after each interruption. `stages` are those
    that ran to their end, in order; stages from the cache of DVC are not among them.
    """
    rows = []
    for trial in open_study(folder).get_trials(deepcopy=False):
        settings = trial.user_attrs.get("settings") or [
            f"{k}={v}" for k, v in trial.system_attrs.get("fixed_params", {}).items()
        ]
        attempts = trial.user_attrs.get("attempts", {})
        ended = trial.datetime_complete.astimezone(UTC).isoformat(timespec="seconds") if trial.datetime_complete else ""
        log = folder / f"{trial.number:03}" / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        rows.append(
            {
                "cell": trial.number,
                "settings": " ".join(setting for setting in settings if not setting.startswith("name=")),
                "state": _STATES[trial.state.name],
                "made": len(attempts.get("make", [])),
                "measured": len(attempts.get("measure", [])),
                "began": next(iter(attempts.get("make", [])), ""),
                "ended": ended if attempts else "",
                "stages": " ".join(_RAN.findall(text)),
            }
        )
    return rows


def open_study(folder: Path, seed: int = 0, search: int | None = None) -> Any:
    """Open or create the Optuna study of a folder; FlowError if its file is not a study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.db"
    remedy = f"remove it to begin again (rm {path}); the results of finished cells stay in DVC's cache"
    try:
        if path.is_file():
            with sqlite3.connect(path) as database:
                database.execute("pragma schema_version").fetchone()
        # Wait for the lock while another program, such as a viewer, reads the file.
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        study = optuna.create_study(
            storage=storage, study_name="sweep", directions=["maximize", "maximize"], load_if_exists=True
        )
    except sqlite3.DatabaseError as error:
        raise FlowError(f"{path} is not a study ({error}); {remedy}") from None
    except RuntimeError as error:  # made by another version of Optuna
        raise FlowError(f"{path} cannot be used ({error}); use the Optuna of constraints.txt, or {remedy}") from None
    study.set_metric_names(["kept", "speed"])
    study.sampler = optuna.samplers.TPESampler(
        # A resumed search needs another seed: the same one would propose the same cells again.
        seed=seed + len(study.trials),
        n_startup_trials=max(4, (search or 0) // 3),
        constant_liar=True,  # running cells count as bad, so that two parallel cells differ
    )
    return study


def _text(value: Any) -> str:
    """Write a value as in a setting; numbers of a search have four digits."""
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["kind"] != now["kind"]:
        return f"a {before['kind']}, and this is a {now['kind']}"
    if before.get("recipes", {}) != now.get("recipes", {}):
        return "other recipes, or other settings of them"
    if before["keys"] != now["keys"]:
        return f"other values ({json.dumps(before['keys'])})"
    changed = [key for key, value in now["params.yaml"].items() if before["params.yaml"].get(key) != value]
    return f"another params.yaml (changed since: {', '.join(changed) or 'its keys'})"
