"""Read and write the MLflow model registry: versions of a registered model, their tags and their aliases.

An alias moves in one write, so that a reader finds the old version or the new one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.record import PARENT_RUN
from tasks.store import StoreError, choose_store, default_tracking_uri, experiment_id, mlflow_client, without_password

CHAMPION, CHALLENGER = "champion", "challenger"


class RegistryError(StoreError):
    """The registry does not have what was asked for; the message gives the cause and the remedy."""


class Registry:
    """The versions and aliases of one registered model. StoreError where the registry cannot be used."""

    def __init__(self, root: Path, model: str) -> None:
        self.uri = default_tracking_uri(root)
        self.model = model
        self._client = mlflow_client(self.uri)

    def holds(self, version: int) -> bool:
        """Return whether this registry has a version."""
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
        example: Sequence[Any],
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Iterator[int]:
        """Register a version, a file of code that opens `export`; delete it if the block fails.

        `settings` are the model's config, which can be overridden where it is served. `options` are the params of a
        request, with their defaults.
        """
        choose_store(self.uri)
        version = _log_model(
            self.model,
            experiment_id(self._client),
            python_model=str(code),
            artifacts={"export": str(export)},
            code_paths=[str(path) for path in packages],
            pip_requirements=list(requirements),
            input_example=(list(example), dict(options)) if options else list(example),
            model_config=dict(settings) if settings else None,
        )
        try:
            yield version
        except BaseException:
            self._client.delete_model_version(self.model, str(version))
            raise

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        """Write tags on a version."""
        for key, value in tags.items():
            self._client.set_model_version_tag(self.model, str(version), key, value)

    def tags(self, version: int) -> dict[str, str]:
        """Return the tags of a version."""
        return dict(self._client.get_model_version(self.model, str(version)).tags)

    def predict(self, version: int, texts: Sequence[Any]) -> Any:
        """Return the answers of the registered version itself."""
        return self.load(version).predict(list(texts))

    def load(self, version: int) -> Any:
        """Load a version into this process, as MLflow's PyFuncModel."""
        import mlflow

        choose_store(self.uri)  # another registry may have been opened since
        return mlflow.pyfunc.load_model(f"models:/{self.model}/{version}")

    def export(self, version: int) -> Path:
        """Return the folder, on this machine, of the export that a version serves; RegistryError if it is gone."""
        import mlflow

        source = self._client.get_model_version_download_uri(self.model, str(version))
        try:
            folder = Path(
                mlflow.artifacts.download_artifacts(
                    f"{source}/artifacts/export", tracking_uri=self.uri, registry_uri=self.uri
                )
            )
        except Exception as error:  # every store raises its own errors
            raise RegistryError(
                f"the files of {self.model} version {version} cannot be read from {source} ({_line(error)}); restore "
                "the folder, or register the model again: dvc repro -f -s register"
            ) from error
        return folder

    def version_of(self, alias: str) -> int | None:
        """Return the version that an alias points to; None if there is no such alias."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self._client.get_model_version_by_alias(self.model, alias).version)
        except MlflowException:
            return None

    def resolve(self, which: str) -> int:
        """Return the version with a number or an alias; RegistryError, with the known ones, where there is none."""
        versions, aliases = self.versions(), self.aliases()
        if not versions:
            others = sorted(model.name for model in self._client.search_registered_models())
            raise RegistryError(
                f"the registry {without_password(self.uri)} has no version of a model {self.model!r}"
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
            "; promote the newest version (make promote gives the reason if it cannot), or name a version by its number"
            if which == CHAMPION
            else ""
        )
        raise RegistryError(f"{self.model} has no {which}; it has {known}{remedy}")

    def versions(self) -> list[int]:
        """Return all versions, oldest first."""
        found = self._client.search_model_versions(f"name = '{self.model}'")
        return sorted(int(version.version) for version in found)

    def aliases(self) -> dict[str, int]:
        """Return alias -> version."""
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(self.model)
        except MlflowException:
            return {}
        return {alias: int(version) for alias, version in model.aliases.items()}

    def point(self, alias: str, version: int | None) -> None:
        """Move an alias to a version in one write; None removes it."""
        if version is None:
            self._client.delete_registered_model_alias(self.model, alias)
        else:
            self._client.set_registered_model_alias(self.model, alias, str(version))

    @contextmanager
    def moved(self, alias: str, version: int) -> Iterator[None]:
        """Move an alias to a version; move it back if the block fails."""
        before = self.version_of(alias)
        try:
            self.point(alias, version)
            yield
        except BaseException:
            self.point(alias, before)
            raise


def _log_model(model: str, experiment: str, **options: Any) -> int:
    """Log a model to MLflow in a run of its own and register it; return its version."""
    import mlflow

    parent = os.environ.get(PARENT_RUN)
    tags = {"mlflow.parentRunId": parent} if parent else {}
    with (
        warnings.catch_warnings(),
        mlflow.start_run(experiment_id=experiment, run_name=f"{model} model", tags=tags),
    ):
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred", category=UserWarning)
        logged = mlflow.pyfunc.log_model(name="model", registered_model_name=model, **options)
    return int(logged.registered_model_version)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
