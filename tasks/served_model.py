"""Serve an export as a registered model (MLflow's models-from-code): texts in; embeddings, labels or texts out.

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
    """Answer texts with embeddings, with labels or entities as transformers' pipelines give them, or with written text.

    A classifier answers pairs, too: `[first, second]` or `{"text": first, "text_pair": second}`. Text is continued or
    answered greedily; a chat model also answers `{"messages": [{"role": "user", "content": ...}]}`. The params
    {"prompt_name": "query"} write a prompt of a sentence encoder before each text; its default prompt needs no name. A
    request with the params {"info": true} returns one mapping instead: the model's name and version, its plans, the
    limits, and the number of requests, texts and seconds since it started.
    """

    def load_context(self, context: Any) -> None:
        from ffn2moe.runtime.export import open_export

        folder = Path(context.artifacts["export"])
        self.export = open_export(folder)
        self.head = self.export.manifest["spec"]["head"]
        self.limits = {key: int(value) for key, value in context.model_config.items() if key.startswith("max_")}
        self.identity = _identity(folder)
        self.answered = {"requests": 0, "texts": 0, "seconds": 0.0}
        self._started = time.time()
        self._lock = threading.Lock()

    def predict(self, model_input: list[Any], params: dict[str, Any] | None = None) -> list[Any]:
        """Return an answer for each text or pair.

        Refused: no text, too many, or one that is no text, empty, too long or not Unicode.
        """
        params = params or {}
        if params.get("info"):
            return [self._info()]
        inputs = self._checked(model_input)
        start = time.perf_counter()
        answers = self._answers(inputs, params.get("prompt_name") or None)
        with self._lock:
            self.answered["requests"] += 1
            self.answered["texts"] += len(model_input)
            self.answered["seconds"] += time.perf_counter() - start
        return answers

    def _checked(self, inputs: list[Any]) -> list[Any]:
        """Return the texts, and pairs as tuples."""
        if not inputs:
            raise Refused('there is no text; send a list of texts: {"inputs": ["A sentence."]}')
        most = self.limits["max_texts"]
        if len(inputs) > most:
            raise Refused(f"{len(inputs)} texts are too many for one request; send at most {most}")
        return [self._input(index, one) for index, one in enumerate(inputs)]

    def _input(self, index: int, given: Any) -> Any:
        """Return one input of a request: a text, or a pair of texts as a tuple."""
        if not isinstance(given, list | tuple | dict):
            return self._text(f"text {index}", given)
        if self.head == "causal" and isinstance(given, dict) and given.keys() == {"messages"}:
            return self._messages(index, given["messages"])
        if self.head != "classification":
            chats = ', or {"messages": [...]}' if self.head == "causal" else ""
            raise Refused(f"text {index} is {type(given).__name__}; this model reads single texts: send strings{chats}")
        if isinstance(given, dict):
            if not {"text"} <= given.keys() <= {"text", "text_pair"}:
                raise Refused(f"text {index} has the keys {', '.join(map(str, given))}; send text and text_pair")
            if "text_pair" not in given:
                return self._text(f"text {index}", given["text"])
            given = (given["text"], given["text_pair"])
        if len(given) != 2:
            raise Refused(f"pair {index} has {len(given)} texts; send two")
        return tuple(self._text(f"text {place} of pair {index}", text) for place, text in enumerate(given, 1))

    def _messages(self, index: int, messages: Any) -> list[dict[str, str]]:
        """Return the messages of a conversation."""
        from ffn2moe.runtime.chat import require_messages

        try:
            found = require_messages(messages)
        except ValueError as error:
            raise Refused(f"text {index}: {error}") from None
        self._require_short(f"the conversation {index}", sum(len(one["content"]) for one in found))
        return found

    def _require_short(self, name: str, characters: int) -> None:
        longest = self.limits["max_characters"]
        if characters > longest:
            raise Refused(f"{name} has {characters} characters; at most {longest} are accepted: shorten it")

    def _text(self, name: str, text: Any) -> str:
        if not isinstance(text, str):
            raise Refused(f"{name} is {type(text).__name__}, not a string; send text")
        if not text.strip():
            raise Refused(f"{name} is empty; leave it out")
        self._require_short(name, len(text))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(f"{name} is not Unicode: {error.reason}; remove the lone surrogate") from None
        return text

    def _answers(self, inputs: list[Any], prompt_name: str | None) -> list[Any]:
        if prompt_name is not None:
            self._require_prompt(prompt_name)
        if self.export.gives == "text":
            return [self._written(index, text) for index, text in enumerate(inputs)]
        if self.export.gives == "embedding":
            return self.export.encode(inputs, prompt_name=prompt_name).tolist()
        return self.export.answers(inputs)

    def _require_prompt(self, name: str) -> None:
        if self.export.gives != "embedding":
            raise Refused(f"prompt_name = {name}, but this model gives {self.export.gives}: leave it out")
        try:
            self.export.sentence.prompt(prompt_name=name)
        except ValueError as error:
            raise Refused(str(error)) from None

    def _written(self, index: int, given: str | list[dict[str, str]]) -> str:
        write = self.export.generate if isinstance(given, str) else self.export.chat
        try:
            return "".join(write(given))
        except ValueError as error:  # it is longer than the model's context, or the model has no chat template
            raise Refused(f"text {index}: {error}") from None

    def _info(self) -> dict[str, Any]:
        with self._lock:
            return {
                **self.identity,
                "plan": self.export.plan,
                "list_plan": getattr(self.export, "list_plan", self.export.plan),
                "head": self.head,
                **({"labels": list(self.export.labels)} if hasattr(self.export, "labels") else {}),
                "pairs": bool(self.export.manifest.get("model", {}).get("pairs", False)),
                "chats": getattr(self.export, "chat_template", None) is not None,
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
