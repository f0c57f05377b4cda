"""The model registry: versions of one registered model, their tags, and the aliases that point to them.

MLflow's, in its own terms. An alias is moved in one write, so that a reader finds the old version or the new one.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.stage import PARENT_RUN, default_tracking_uri, experiment_id, mlflow_client

CHAMPION, CHALLENGER = "champion", "challenger"
SECONDS_TO_ANSWER = 10.0


class RegistryError(ValueError):
    """The registry cannot give what is asked; the message holds the cause and the remedy."""


class Registry:
    """Versions and aliases of one registered model. RegistryError where there is no registry to be had."""

    def __init__(self, root: Path, model: str) -> None:
        self.uri = default_tracking_uri(root)
        self.model = model
        self._client = _open(self.uri)

    def holds(self, version: int) -> bool:
        """Whether a version is there; not so when the database is another one than it was registered in."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_model_version(self.model, str(version))
        except MlflowException:
            return False
        return True

    @contextmanager
    def added(
        self,
        *,
        code: Path,
        export: Path,
        packages: Sequence[Path],
        requirements: Sequence[str],
        example: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Iterator[int]:
        """A new version: a file of code that opens `export`; it is deleted if the block does not end well.

        `settings` are the model's config, which who serves it may override; `options` what a request may ask for
        beside its texts, with their defaults.
        """
        import mlflow

        experiment = experiment_id(self._client)
        parent = os.environ.get(PARENT_RUN)
        tags = {"mlflow.parentRunId": parent} if parent else {}
        with (
            warnings.catch_warnings(),
            mlflow.start_run(experiment_id=experiment, run_name=f"{self.model} model", tags=tags),
        ):
            warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(code),
                artifacts={"export": str(export)},
                code_paths=[str(path) for path in packages],
                pip_requirements=list(requirements),
                input_example=(list(example), dict(options)) if options else list(example),
                model_config=dict(settings) if settings else None,
                registered_model_name=self.model,
            )
        version = int(logged.registered_model_version)
        try:
            yield version
        except BaseException:
            self._client.delete_model_version(self.model, str(version))
            raise

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(self.model, str(version), key, value)

    def tags(self, version: int) -> dict[str, str]:
        """What is written on a version."""
        return dict(self._client.get_model_version(self.model, str(version)).tags)

    def predict(self, version: int, texts: Sequence[str]) -> Any:
        """What the registered version itself answers."""
        return self.load(version).predict(list(texts))

    def load(self, version: int) -> Any:
        """The version in this process, as MLflow's PyFuncModel."""
        import mlflow

        return mlflow.pyfunc.load_model(f"models:/{self.model}/{version}")

    def export(self, version: int) -> Path:
        """The export that a version serves, in a folder of this machine."""
        import mlflow

        source = self._client.get_model_version_download_uri(self.model, str(version))
        try:
            folder = Path(mlflow.artifacts.download_artifacts(f"{source}/artifacts/export"))
        except Exception as error:  # as many kinds as there are stores
            raise RegistryError(
                f"the files of {self.model} version {version} cannot be had from {source} ({_line(error)}); put the "
                "folder back, or register the model again: dvc repro -f -s register"
            ) from error
        return folder

    def version_of(self, alias: str) -> int | None:
        """The version an alias points to; None if there is no such alias."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self._client.get_model_version_by_alias(self.model, alias).version)
        except MlflowException:
            return None

    def resolve(self, which: str) -> int:
        """The version that a number or an alias means; RegistryError, with what there is, where it means none."""
        versions, aliases = self.versions(), self.aliases()
        if not versions:
            others = sorted(model.name for model in self._client.search_registered_models())
            raise RegistryError(
                f"the registry {self.uri} has no version of a model {self.model!r}"
                + (f"; it has {', '.join(others)}" if others else "")
                + "; make one with `make run`, name another with MODEL=NAME (--model NAME), or set "
                "FFN2MOE_TRACKING_URI to the registry that has it"
            )
        if which.isdigit():
            if int(which) in versions:
                return int(which)
            raise RegistryError(f"{self.model} has no version {which}; it has {', '.join(map(str, versions))}")
        if which in aliases:
            return aliases[which]
        known = ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "no alias"
        remedy = (
            "; promote the newest version (make promote says why if it may not), or name a version by its number"
            if which == CHAMPION
            else ""
        )
        raise RegistryError(f"{self.model} has no {which}; it has {known}{remedy}")

    def versions(self) -> list[int]:
        """Every version there is, oldest first."""
        found = self._client.search_model_versions(f"name = '{self.model}'")
        return sorted(int(version.version) for version in found)

    def aliases(self) -> dict[str, int]:
        """Alias -> version."""
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(self.model)
        except MlflowException:
            return {}
        return {alias: int(version) for alias, version in model.aliases.items()}

    def point(self, alias: str, version: int | None) -> None:
        """Moves an alias to a version, at once; None removes it."""
        if version is None:
            self._client.delete_registered_model_alias(self.model, alias)
        else:
            self._client.set_registered_model_alias(self.model, alias, str(version))

    @contextmanager
    def moved(self, alias: str, version: int) -> Iterator[None]:
        """Points an alias to a version; back to where it was if the block does not end well."""
        before = self.version_of(alias)
        try:
            self.point(alias, version)
            yield
        except BaseException:
            self.point(alias, before)
            raise


def _open(uri: str) -> Any:
    if uri.startswith(("http://", "https://")):
        _require_answer(uri)
    try:
        return mlflow_client(uri)
    except Exception as error:  # as many kinds as there are databases
        raise RegistryError(f"{uri} cannot be used as the registry: {_cause(uri, error)}") from error


def _require_answer(uri: str) -> None:
    """Asks a server once: MLflow's own client would try for minutes."""
    remedy = "start it (make up, or mlflow server), or set FFN2MOE_TRACKING_URI to the right address"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER):
            return
    except urllib.error.HTTPError as error:
        raise RegistryError(f"{uri} answers with {error.code} and not as an MLflow server does; {remedy}") from None
    except OSError as error:
        cause = getattr(error, "reason", error)
        raise RegistryError(f"the MLflow server at {uri} cannot be reached ({cause}); {remedy}") from None


def _cause(uri: str, error: Exception) -> str:
    text = f"{error} {error.__cause__ or ''}"
    if "out-of-date database schema" in text:
        return (
            "the database was made by another version of MLflow than this one; make a copy of it, then bring it up to "
            f"date with `mlflow db upgrade {uri}`, or use the version of MLflow that it was made by"
        )
    if "Can't locate revision" in text:
        return "the database was made by a newer MLflow than this one; install that one, or name another database"
    if "not a database" in text:
        return "the file is not an SQLite database; put a copy of it back, or remove it (make run makes a new one)"
    if "unable to open database" in text:
        return "the file cannot be opened; check that its folder exists and may be written to"
    if "database is locked" in text:
        return "another process is writing to it, and has been for long; wait, or stop that process"
    return _line(error)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
