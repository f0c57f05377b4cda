"""Serve an export as a registered model (MLflow's models-from-code): texts in; embeddings, probabilities or texts out.

MLflow runs this file where the model is loaded, with the export and the package ffn2moe beside it. It needs numpy, the
engine of the export's plan and the tokenizer's library, but no torch.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import yaml
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel


class Refused(MlflowException):
    """Refuse a request with status 400, without repeating it in the answer as MLflow does."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)
        self._reason = message

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self._reason})


class Served(PythonModel):
    """Answer texts with embeddings of unit length, probabilities of the classes, or written text.

    Classes are in the order of the teacher's config; text is continued or answered greedily. A request with the params
    {"info": true} returns one mapping instead: the model's name and version, its plan, the limits, and the number of
    requests, texts and seconds since it started.
    """

    def load_context(self, context: Any) -> None:
        from ffn2moe.runtime.export import open_export

        folder = Path(context.artifacts["export"])
        self.export = open_export(folder)
        self.limits = {key: int(value) for key, value in context.model_config.items() if key.startswith("max_")}
        self.identity = _identity(folder)
        self.answered = {"requests": 0, "texts": 0, "seconds": 0.0}
        self._started = time.time()
        self._lock = threading.Lock()

    def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[Any]:
        """Return an answer for each text. Refused: no text, too many, or one that is empty, too long or not Unicode."""
        if (params or {}).get("info"):
            return [self._info()]
        self._check(model_input)
        start = time.perf_counter()
        answers = self._answers(model_input)
        with self._lock:
            self.answered["requests"] += 1
            self.answered["texts"] += len(model_input)
            self.answered["seconds"] += time.perf_counter() - start
        return answers

    def _check(self, texts: list[str]) -> None:
        if not texts:
            raise Refused('there is no text; send a list of texts: {"inputs": ["A sentence."]}')
        most, longest = self.limits["max_texts"], self.limits["max_characters"]
        if len(texts) > most:
            raise Refused(f"{len(texts)} texts are too many for one request; send at most {most}")
        for index, text in enumerate(texts):
            if not text.strip():
                raise Refused(f"text {index} is empty; leave it out")
            if len(text) > longest:
                raise Refused(f"text {index} has {len(text)} characters; at most {longest} are accepted: shorten it")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise Refused(f"text {index} is not Unicode: {error.reason}; remove the lone surrogate") from None

    def _answers(self, texts: list[str]) -> list[Any]:
        if hasattr(self.export, "generate"):
            return [self._written(index, text) for index, text in enumerate(texts)]
        if hasattr(self.export, "encode"):
            return self.export.encode(texts).tolist()
        logits_NC = self.export.classify(texts).astype(np.float64)
        share_NC = np.exp(logits_NC - logits_NC.max(-1, keepdims=True))
        return (share_NC / share_NC.sum(-1, keepdims=True)).tolist()

    def _written(self, index: int, text: str) -> str:
        try:
            return "".join(self.export.generate(text))
        except ValueError as error:  # it is longer than the model's context
            raise Refused(f"text {index}: {error}") from None

    def _info(self) -> dict[str, Any]:
        with self._lock:
            return {
                **self.identity,
                "plan": self.export.plan,
                "head": self.export.manifest["spec"]["head"],
                "limits": self.limits,
                "answered": {**self.answered, "seconds": round(self.answered["seconds"], 3)},
                "up_seconds": round(time.time() - self._started, 1),
            }


def _identity(export: Path) -> dict[str, Any]:
    """Return name and version, which MLflow writes beside a model from the registry; None without them."""
    note = export.parents[1] / "registered_model_meta"
    metadata = yaml.safe_load(note.read_text(encoding="utf-8")) if note.is_file() else {}
    version = metadata.get("model_version")
    return {"model": metadata.get("model_name"), "version": None if version is None else int(version)}


mlflow.models.set_model(Served())
