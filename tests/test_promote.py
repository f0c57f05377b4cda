"""What becomes champion, what is noted of it, and that a registry is consistent whatever stops a promotion."""

from __future__ import annotations

import json
import socket
import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest

from flows import promote
from flows.promote import Check, Decision, complete, consider, judge, noted, roll_back
from flows.serve import require_free
from flows.workspace import FlowError
from tasks.params import load_params
from tasks.registry import Registry, RegistryError
from tasks.store import TRACKING_URI, StoreError, mlflow_client
from tests.texts import PARAMS

GATE = load_params(PARAMS).gate
FIGURES = {
    "head": "embedding",
    "retention.retrieval.ndcg_at_10": "0.99",
    "student.retrieval.ndcg_at_10": "0.70",
    "speedup_vs_best_dense": "1.2",
    "bytes": "1000",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder with MLflow's database; each test has a model of its own in it."""
    folder = tmp_path_factory.mktemp("store")
    mlflow_client(f"sqlite:///{folder / 'mlflow.db'}")
    return folder


@pytest.fixture
def registry(store, request, monkeypatch) -> Registry:
    monkeypatch.delenv(TRACKING_URI, raising=False)
    found = Registry(store, request.node.name[:80].replace("[", "-").replace("]", ""))
    found._client.create_registered_model(found.model)
    return found


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The versions that were served and asked; all pass."""
    versions: list[int] = []

    def passes(registry: Registry, gate: object, version: int, champion: int | None, head: str) -> list[Check]:
        versions.append(version)
        return [Check(True, "answers")]

    monkeypatch.setattr(promote, "_asked", passes)
    return versions


def add(registry: Registry, **figures: str) -> int:
    """A new challenger with these tags in place of the good ones."""
    source = f"file:///nowhere/{len(registry.versions())}"
    version = int(registry._client.create_model_version(registry.model, source).version)
    registry.tag(version, FIGURES | {key.replace("__", "."): value for key, value in figures.items()})
    registry.point("challenger", version)
    return version


def decide(registry: Registry, which: str = "challenger", **options: object) -> Decision:
    return consider(registry, GATE, which, **{"publish": lambda decision: None, "say": lambda line: None, **options})


def go_back(registry: Registry) -> Decision:
    return roll_back(registry, "it was slow", publish=lambda decision: None)


@pytest.fixture(autouse=True)
def whole_exports(monkeypatch):
    """These versions have no files; that a rollback opens them is tested where there are some."""
    monkeypatch.setattr(Registry, "export", lambda self, version: Path("nowhere"))
    monkeypatch.setattr(promote, "open_export", lambda path: None)


def test_without_a_champion_the_gate_alone_decides(registry, asked):
    version = add(registry)
    told = []
    decision = decide(registry, publish=told.append)
    assert (decision.state, decision.against, registry.version_of("champion")) == ("promoted", None, version)
    assert noted(registry, version) == told[0] == decision
    assert asked == [version]
    assert decide(registry).state == "unchanged"


def test_a_version_below_the_gate_is_refused_with_its_reasons_and_is_not_served(registry, asked):
    version = add(registry, **{"retention.retrieval.ndcg_at_10": "0.9", "speedup_vs_best_dense": "1.0"})
    decision = decide(registry)
    assert decision.state == "refused"
    assert "keeps 0.9000 of the teacher's nDCG@10; gate.min_retention = 0.97" in decision.refused
    assert "runs at 1.00x the best dense plan; must be above gate.min_speedup = 1.0" in decision.refused
    assert registry.version_of("champion") is None
    assert noted(registry, version) == decision
    assert asked == []


@pytest.mark.parametrize(
    ("mine", "its", "reason"),
    [
        ({"student.retrieval.ndcg_at_10": "0.69"}, {}, "the two were judged on different data"),
        ({"evaluated_on": "a", "student.retrieval.ndcg_at_10": "0.69"}, {"evaluated_on": "a"}, "on the same data"),
        ({"bytes": "1600"}, {}, "1.60 times the champion's bytes"),
        (
            {"head": "classification", "problem": "multi_label", "retention.to_teacher.concordance": "1"},
            {},
            "the head of the champion is embedding, of this version classification multi_label",
        ),
    ],
)
def test_a_challenger_is_compared_with_the_champion(mine, its, reason):
    checks = judge(GATE, 2, FIGURES | mine, 1, FIGURES | its)
    check = next(check for check in checks if reason in check.message)
    assert check.passed == ("different data" in reason)  # its student is worse, but on data of its own


@pytest.mark.parametrize(("measured", "passes"), [("0.99", True), ("0.5", False), ("0.0", False), (None, True)])
def test_an_encoder_must_order_general_sentences_as_its_teacher_does(measured, passes):
    figures = FIGURES | ({} if measured is None else {"student.general.rank_correlation": measured})
    checks = judge(GATE, 2, figures, None, {})
    assert all(check.passed for check in checks) == passes
    assert any(f"gate.min_general = {GATE.min_general}" in check.message for check in checks) == (measured is not None)


def test_a_lower_perplexity_is_the_better_one():
    figures = FIGURES | {"head": "causal", "retention.language.perplexity": "0.99", "evaluated_on": "a"}
    mine, its = ({**figures, "student.language.perplexity": value} for value in ("10.0", "9.0"))
    assert not all(check.passed for check in judge(GATE, 2, mine, 1, its))
    assert all(check.passed for check in judge(GATE, 2, its, 1, mine))


@pytest.mark.parametrize(("kept", "passes"), [("0.85", False), ("0.95", True), (None, True)])
def test_a_language_model_keeps_its_tasks_where_they_were_asked(kept, passes):
    figures = FIGURES | {"head": "causal", "retention.language.perplexity": "0.99"}
    checks = judge(GATE, 2, figures | ({} if kept is None else {"retention.tasks.kept": kept}), None, {})
    assert all(check.passed for check in checks) == passes
    assert any("accuracy above chance" in check.message for check in checks) == (kept is not None)


def test_classifiers_of_another_problem_or_from_before_concordance_are_not_taken_for_comparable():
    figures = {"head": "classification", "speedup_vs_best_dense": "1.2", "bytes": "1000"}
    mine = figures | {key: "1" for key in ("retention.to_teacher.concordance", "student.to_teacher.concordance")}
    single, multi = (mine | {"problem": problem} for problem in ("single_label", "multi_label"))
    assert all(check.passed for check in judge(GATE, 2, single, 1, single))
    assert not all(check.passed for check in judge(GATE, 2, single, 1, multi))
    before = figures | {"retention.to_teacher.agreement": "1", "student.to_teacher.agreement": "1"}
    assert all(check.passed for check in judge(GATE, 2, single, 1, before)), "nothing to compare with"
    assert "was not judged by its scores (concordance)" in judge(GATE, 1, before, 2, single)[0].message


def test_a_version_without_figures_is_refused_and_a_champion_without_them_is_no_obstacle():
    assert "has no figures" in judge(GATE, 2, {}, 1, FIGURES)[0].message
    assert all(check.passed for check in judge(GATE, 2, FIGURES, 1, {"default_plan": "sorted"}))


def test_a_served_challenger_that_fails_is_refused_and_the_champion_stays(registry, asked, monkeypatch):
    first = add(registry)
    decide(registry)
    add(registry)
    monkeypatch.setattr(promote, "_asked", lambda *arguments: [Check(False, "served it does not answer")])
    assert decide(registry).refused == ("served it does not answer",)
    assert registry.version_of("champion") == first


def test_what_was_refused_is_not_asked_again_until_something_changes(registry, asked, monkeypatch):
    add(registry)
    monkeypatch.setattr(promote, "_asked", lambda *arguments: [Check(False, "too slow")])
    refused = decide(registry)
    monkeypatch.setattr(promote, "_asked", lambda *arguments: [Check(True, "fast")])
    assert decide(registry, again=False) == refused
    assert decide(registry).state == "promoted"


@pytest.mark.parametrize("error", [OSError("Prefect is gone"), KeyboardInterrupt()])
def test_when_something_fails_after_the_alias_has_moved_it_moves_back(registry, asked, error):
    first = add(registry)
    decide(registry)
    second = add(registry)

    def fails(decision: Decision) -> None:
        assert registry.version_of("champion") == second
        raise error

    with pytest.raises(type(error)):
        decide(registry, publish=fails)
    assert registry.version_of("champion") == first
    assert noted(registry, second).state == "failed"
    assert decide(registry).state == "promoted"


def test_a_first_promotion_that_fails_leaves_no_champion(registry, asked):
    add(registry)
    with pytest.raises(ZeroDivisionError):
        decide(registry, publish=lambda decision: 1 / 0)
    assert registry.version_of("champion") is None


class Killed(BaseException):
    """A SIGKILL: nothing runs after it."""


@pytest.mark.parametrize("writes", range(1, 6))
def test_a_promotion_that_is_killed_after_any_write_is_gone_on_from(registry, asked, monkeypatch, writes):
    """Each write to the registry is the last one in turn; the champion always is one of the two, and the next run ends
    with the challenger as champion and noted so."""
    first = add(registry)
    decide(registry)
    second = add(registry)
    left = [writes]

    def counted(method):
        def write(self, *arguments):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return method(self, *arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("tag", "point"):
            patch.setattr(Registry, name, counted(getattr(Registry, name)))
        with suppress(Killed):
            decide(registry, publish=lambda decision: left.__setitem__(0, 0))
    assert registry.version_of("champion") in (first, second)
    assert decide(registry).state in ("promoted", "unchanged")
    assert registry.version_of("champion") == second
    assert noted(registry, second).state == "promoted"
    assert go_back(registry).against == first


def test_a_note_of_an_earlier_version_is_read(registry, asked):
    version = add(registry)
    decision = decide(registry)
    old = registry.tags(version)[promote.TAG].replace('"message":', '"told":')
    assert '"told":' in old
    registry.tag(version, {promote.TAG: old})
    assert noted(registry, version) == decision


def test_a_rollback_goes_back_and_the_next_run_does_not_undo_it(registry, asked):
    first = add(registry)
    decide(registry)
    second = add(registry)
    decide(registry)
    decision = go_back(registry)
    assert (decision.state, registry.version_of("champion")) == ("rolled back", first)
    assert noted(registry, second).refused[-1] == "it was slow"
    again = decide(registry, again=False)
    assert again.state == "refused"
    assert f"make promote VERSION={second}" in again.refused[0]
    assert decide(registry, str(second)).state == "promoted"


def test_a_rollback_that_was_killed_before_the_alias_moved_is_completed_once(registry, asked):
    versions = []
    for _ in range(3):
        versions.append(add(registry))
        decide(registry)
    promote._note(registry, noted(registry, versions[2]).becomes("rolled back"))
    assert go_back(registry).state == "rolled back"
    assert registry.version_of("champion") == versions[1]
    assert complete(registry, lambda decision: None) is None


def test_a_rollback_that_fails_leaves_the_champion_and_its_note(registry, asked):
    add(registry)
    decide(registry)
    second = add(registry)
    before = decide(registry)
    with pytest.raises(ZeroDivisionError):
        roll_back(registry, "slow", publish=lambda decision: 1 / 0)
    assert registry.version_of("champion") == second
    assert noted(registry, second) == before


def test_a_rollback_with_nothing_before_says_so(registry, asked):
    with pytest.raises(RegistryError, match="has no champion, so a rollback is impossible"):
        go_back(registry)
    first = add(registry)
    decide(registry)
    with pytest.raises(RegistryError, match=r"no champion before version 1 .* other versions: none"):
        go_back(registry)
    add(registry)
    decide(registry)
    registry._client.delete_model_version(registry.model, str(first))
    with pytest.raises(RegistryError, match=r"version 1 .* was deleted"):
        go_back(registry)


def test_a_champion_that_somebody_else_changed_meanwhile_is_not_overwritten(registry, monkeypatch):
    add(registry)
    other = add(registry)
    monkeypatch.setattr(promote, "_asked", lambda *arguments: registry.point("champion", 1) or [Check(True, "fine")])
    with pytest.raises(FlowError, match="changed by another process"):
        decide(registry)
    assert registry.version_of("champion") == 1 != other


@pytest.mark.parametrize(
    ("which", "message"),
    [("7", "has no version 7; it has 1"), ("best", "has no best; it has challenger"), ("champion", "make promote")],
)
def test_a_version_that_is_not_there_is_told_with_what_is(registry, which, message):
    add(registry)
    with pytest.raises(RegistryError, match=message):
        registry.resolve(which)


def test_an_unknown_model_is_told_with_those_there_are(store, registry):
    with pytest.raises(RegistryError, match=rf"no version of a model 'nobody'.*{registry.model}.*make run"):
        Registry(store, "nobody").resolve("champion")


def test_a_server_that_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv(TRACKING_URI, f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(StoreError, match=r"cannot be reached .*refused.*make up"):
            Registry(tmp_path, "minilm")


def test_a_database_of_another_version_is_told_with_the_remedy(tmp_path, store, monkeypatch):
    monkeypatch.delenv(TRACKING_URI, raising=False)
    with sqlite3.connect(store / "mlflow.db") as source, sqlite3.connect(tmp_path / "mlflow.db") as target:
        source.backup(target)
        target.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        target.commit()
    with pytest.raises(StoreError, match=r"another version of MLflow.*mlflow db upgrade"):
        Registry(tmp_path, "minilm")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mlflow.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError, match="not an SQLite database"):
        Registry(tmp_path / "other", "minilm")


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FlowError, match=r"cannot be used .* make serve PORT="):
            require_free("127.0.0.1", taken.getsockname()[1])


def test_a_note_reads_as_it_was_written(registry):
    version = add(registry)
    note = Decision("refused", registry.model, version, None, (Check(False, "why"), Check(True, "so")), {"a": 1.0})
    promote._note(registry, note)
    assert noted(registry, version) == note
    assert json.loads(registry.tags(version)["promotion"])["state"] == "refused"
