"""The model registry: versions of one registered model, their tags, and the aliases that point to them.

MLflow's, in its own terms. An alias is moved in one write, so that a reader finds the old version or the new one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.record import PARENT_RUN
from tasks.store import StoreError, default_tracking_uri, experiment_id, mlflow_client, without_password

CHAMPION, CHALLENGER = "champion", "challenger"


class RegistryError(StoreError):
    """The registry cannot give what is asked; the message holds the cause and the remedy."""


class Registry:
    """Versions and aliases of one registered model. StoreError where there is no registry to be had."""

    def __init__(self, root: Path, model: str) -> None:
        self.uri = default_tracking_uri(root)
        self.model = model
        self._client = mlflow_client(self.uri)

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


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
