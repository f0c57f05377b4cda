"""Read a sentence-transformers folder by the library itself: everything except the weights of its transformer.

`modules.json` lists the modules of a sentence encoder; the first is a transformers model, in the folder itself or in a
subfolder of it. This file finds that model, and turns the modules behind it into a description and weights of ours.
What cannot be carried is refused by its name, before any weights of the transformer are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import load_file, save_file
from torch import nn

from ffn2moe.dense.sentence import SentenceEmbedding
from ffn2moe.literals import Similarity
from ffn2moe.sentence import Dense, LayerNorm, Module, Normalize, SentenceModules

MODULES_FILE, CONFIG_FILE = "modules.json", "config_sentence_transformers.json"
READING_FILE, READING_WEIGHTS = "ffn2moe_reading.json", "ffn2moe_reading.safetensors"  # `keep_reading` writes them
_NAMESPACE = "sentence_transformers."
_EMBEDDING = "sentence_embedding"  # the feature that our modules read and write
# Settings of the transformer that change no result here: we choose the precision and the attention ourselves.
_WITHOUT_EFFECT = ("torch_dtype", "dtype", "attn_implementation", "add_pooling_layer", "file_name", "provider")
# Settings that our graphs do not carry; the library leaves them out where they are not used.
_NOT_CARRIED = (
    *("model_args", "model_kwargs", "config_args", "config_kwargs", "processing_kwargs", "tokenizer_name_or_path"),
    *("query_length", "document_length", "query_expansion"),
)


@dataclass(frozen=True)
class SentenceFolder:
    """The sentence encoder in a folder: its description and weights, and how its tokenizer is used."""

    module: SentenceEmbedding
    max_length: int | None  # tokens, as its authors set it
    tokenizer_options: dict[str, Any]

    @property
    def described(self) -> SentenceModules:
        return self.module.described

    def prepare(self, tokenizer: Any) -> Any:
        """Make a tokenizer of transformers cut and lower texts as the library does; return it."""
        from tokenizers import normalizers

        if self.max_length is not None:
            tokenizer.model_max_length = self.max_length
        if self.described.do_lower_case:
            backend = tokenizer.backend_tokenizer
            found = [backend.normalizer] if backend.normalizer is not None else []
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *found])
        return tokenizer


# --- which folder is which --------------------------------------------------------------------------------------------


def modules_folder(folder: str | Path) -> Path | None:
    """Return the folder with modules.json of a sentence encoder; None where there is none.

    `folder` is that folder, or the subfolder of it that holds the transformer.
    """
    folder = Path(folder)
    if (folder / MODULES_FILE).is_file():
        return folder
    parent = folder.absolute().parent
    if (parent / MODULES_FILE).is_file() and _first_path(parent) == folder.absolute().name:
        return parent
    return None


def transformer_folder(folder: str | Path) -> Path:
    """Return the folder of the transformers model of a sentence encoder; any other folder as it is."""
    folder = Path(folder)
    if (folder / "config.json").is_file() or not (folder / MODULES_FILE).is_file():
        return folder
    return folder / _first_path(folder)


def is_sentence_encoder(folder: str | Path) -> bool:
    """Return whether a folder holds a sentence encoder. ValueError, by its name, for a relative of it.

    False for a CrossEncoder, which is a classifier of pairs.
    """
    root = modules_folder(folder)
    if root is None:
        return False
    kind = _read(root / CONFIG_FILE).get("model_type", "SentenceTransformer")
    if kind == "CrossEncoder":
        return False
    if kind != "SentenceTransformer":
        raise ValueError(
            f"{root} is a {kind} of sentence-transformers, which gives no embedding of a text of the kind that this "
            "package makes: name a folder of a SentenceTransformer"
        )
    return True


def copy_modules(folder: str | Path, out: str | Path) -> None:
    """Copy the modules of a sentence encoder beside a copy of its transformer's files; nothing for another folder.

    `out` is a sentence-transformers folder then, whose transformer is in the folder itself; `keep_reading` is done.
    """
    root, out = modules_folder(folder), Path(out)
    if root is None:
        return
    entries: list[dict[str, Any]] = json.loads((root / MODULES_FILE).read_text(encoding="utf-8"))
    files = [root / CONFIG_FILE] if (root / CONFIG_FILE).is_file() else []
    for entry in entries[1:]:
        files += [file for pattern in ("config.json", "*.safetensors") for file in (root / entry["path"]).glob(pattern)]
    for file in files:
        target = out / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    entries[0]["path"] = ""
    (out / MODULES_FILE).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    keep_reading(out)


def _first_path(root: Path) -> str:
    entries = _entries(root)
    return str(entries[0]["path"]).strip("/") if entries else ""


def _entries(root: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads((root / MODULES_FILE).read_text(encoding="utf-8"))
        return [{"path": str(entry["path"]), "type": str(entry["type"])} for entry in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / MODULES_FILE} cannot be read ({error}): fetch the folder again") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the folder again") from error


def default_modules(config: Any) -> SentenceModules:
    """Return how a bare transformers model makes embeddings, at unit length.

    As the library does: by the last token of a language model, and by the mean over tokens of any other.
    """
    named = (config.architectures or [""])[0]
    last = named.endswith("ForCausalLM") and getattr(config, "is_causal", True)
    return SentenceModules(pooling=("lasttoken",) if last else ("mean",))


# --- the modules ------------------------------------------------------------------------------------------------------


def read_sentence_folder(folder: str | Path) -> SentenceFolder | None:
    """Return the modules of the sentence encoder that `folder` belongs to; None for a bare transformers folder.

    ValueError, with the name, for a module or a setting that cannot be carried, and where the library is missing.
    """
    root = modules_folder(folder)
    if root is None:
        _require_no_part(Path(folder))
        return None
    if not is_sentence_encoder(root):
        return None
    kept = _kept_reading(root)
    if kept is not None:
        return kept
    entries = _entries(root)
    with _quiet():
        first, *others = [_class_of(root, entry["type"]) for entry in entries]
        if first.__name__ != "Transformer":
            raise ValueError(_refusal(root, first.__name__, "it is not a transformers model"))
        transformer = first.load_config(str(root), subfolder=entries[0]["path"], local_files_only=True)
        _require_plain(root, transformer)
        behind = [
            (kind.__name__, _loaded(root, kind, entry["path"])) for kind, entry in zip(others, entries[1:], strict=True)
        ]
    described, weights = _described(root, behind)
    described = replace(described, do_lower_case=bool(transformer.get("do_lower_case")), **_settings(root))
    module = SentenceEmbedding(described)
    for ours, theirs in zip(module.chain, weights, strict=True):
        ours.load_state_dict(theirs)
    longest = transformer.get("max_seq_length")
    options = dict(transformer.get("tokenizer_args") or transformer.get("processor_kwargs") or {})
    return SentenceFolder(module.eval(), longest, options)


def keep_reading(folder: str | Path) -> None:
    """Write what `read_sentence_folder` finds beside it, which is read instead while the files stay as they are.

    Later processes then do without the library, whose import takes some seconds.
    """
    found, root = read_sentence_folder(folder), modules_folder(folder)
    if found is None or root is None:
        return
    save_file(found.module.state_dict(), root / READING_WEIGHTS)
    reading = {
        "files": _fingerprint(root),
        "described": found.described.to_dict(),
        "max_length": found.max_length,
        "tokenizer_options": found.tokenizer_options,
    }
    (root / READING_FILE).write_text(json.dumps(reading, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _kept_reading(root: Path) -> SentenceFolder | None:
    """Return what `keep_reading` wrote; None where nothing is kept, or for other files."""
    reading = _read(root / READING_FILE)
    if not reading or reading["files"] != _fingerprint(root):
        return None
    module = SentenceEmbedding(SentenceModules.from_dict(reading["described"]))
    module.load_state_dict(load_file(root / READING_WEIGHTS))
    return SentenceFolder(module.eval(), reading["max_length"], reading["tokenizer_options"])


def _fingerprint(root: Path) -> str:
    """Return a checksum of everything that the modules of a folder are read from."""
    of_modules = [root / entry["path"] for entry in _entries(root)[1:]]
    files = {*root.glob("*.json"), *(file for folder in of_modules for file in folder.glob("*") if file.is_file())}
    digest = hashlib.sha256()
    for file in sorted(files - {root / READING_FILE}):
        digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _require_no_part(folder: Path) -> None:
    """ValueError for a folder that says how texts are pooled, but not what else its encoder does."""
    part = next((path for path in (folder / "1_Pooling", folder.parent / "1_Pooling") if path.is_dir()), None)
    if part is not None and (part.parent == folder or folder.name.startswith("0_")):
        raise ValueError(
            f"{part} is there and {part.parent / MODULES_FILE} is not: the folder is a part of a sentence encoder; "
            "fetch all of it, or remove 1_Pooling for a mean over tokens at unit length"
        )


def _class_of(root: Path, reference: str) -> Any:
    """Return the class of a module. ValueError, by its name, for one that is not the library's."""
    try:
        from sentence_transformers import __version__
        from sentence_transformers.util import import_from_string
    except ImportError as error:
        raise ValueError(
            f"{root} is a sentence-transformers folder, and that library cannot be imported ({error}): "
            "pip install sentence-transformers"
        ) from error
    if not reference.startswith(_NAMESPACE):
        raise ValueError(_refusal(root, reference, "code that comes with a model is never run"))
    try:
        return import_from_string(reference)
    except (ImportError, AttributeError):
        raise ValueError(_refusal(root, reference, f"sentence-transformers {__version__} does not know it")) from None


def _refusal(root: Path, name: str, why: str) -> str:
    return (
        f"{root} has the module {name}, which cannot be carried into a mixture: {why}. Carried are a Transformer, then "
        f"a Pooling, then any of {', '.join(_READERS)}"
    )


def _require_plain(root: Path, transformer: dict[str, Any]) -> None:
    """ValueError, by its name, for a setting of the transformer that changes the embeddings and is not carried."""
    for name in _NOT_CARRIED:
        value = transformer.get(name)
        if isinstance(value, dict):
            value = {key: one for key, one in value.items() if key not in _WITHOUT_EFFECT}
        if value:
            raise ValueError(_refusal(root, "Transformer", f"its setting {name} = {value} would be lost"))
    task = transformer.get("transformer_task", "feature-extraction")
    inputs = transformer.get("modality_config", {"text": {}})
    output = inputs.get("text", {}).get("method_output_name", "last_hidden_state")
    if task != "feature-extraction" or set(inputs) != {"text"} or output != "last_hidden_state":
        raise ValueError(
            _refusal(
                root,
                "Transformer",
                f"it gives {output} of {' and '.join(map(str, inputs))} ({task}), not hidden states of text",
            )
        )


def _loaded(root: Path, kind: Any, path: str) -> nn.Module:
    """Return a module as the library loads it. ValueError for weights that are no safetensors."""
    name = kind.__name__
    if name != "Pooling" and name not in _READERS:
        raise ValueError(_refusal(root, name, "it has no counterpart here"))
    folder = root / path
    if (folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").is_file():
        code = f"SentenceTransformer('{root}', device='cpu').save('{root}-safetensors')"
        raise ValueError(
            f"{folder} has its weights as .bin, which can hold code; only safetensors are read here. Convert them "
            f'once: python -c "from sentence_transformers import SentenceTransformer; {code}"'
        )
    activation = str(_read(folder / "config.json").get("activation_function", "torch."))
    if not activation.startswith("torch."):
        raise ValueError(_refusal(root, name, f"its activation {activation} is code that comes with the model"))
    found: nn.Module = kind.load(str(root), subfolder=path, local_files_only=True)
    return found


def _described(root: Path, behind: list[tuple[str, Any]]) -> tuple[SentenceModules, list[dict[str, Any]]]:
    """Return the description of the modules behind the transformer, and the weights of those after the pooling."""
    if not behind or behind[0][0] != "Pooling":
        name = behind[0][0] if behind else "Transformer"
        raise ValueError(_refusal(root, name, "hidden states are not pooled right behind the transformer"))
    pooling = behind[0][1]
    if not pooling.include_prompt:
        raise ValueError(_refusal(root, "Pooling", "it leaves out the prompt (include_prompt = false)"))
    modules, weights = [], []
    for name, module in behind[1:]:
        if name == "Pooling":
            raise ValueError(_refusal(root, name, "it is there twice"))
        reads = getattr(module, "module_input_name", _EMBEDDING), getattr(module, "module_output_name", _EMBEDDING)
        if reads != (_EMBEDDING, _EMBEDDING):
            raise ValueError(_refusal(root, name, f"it reads {reads[0]} and writes {reads[1]}"))
        found = _READERS[name](root, module)
        if found is not None:
            modules.append(found[0])
            weights.append(found[1])
    return SentenceModules(pooling=_modes(pooling), modules=tuple(modules)), weights


def _modes(pooling: Any) -> tuple[Any, ...]:
    """Return the pooling modes of a module of the library, in the order of their vectors."""
    found = getattr(pooling, "pooling_mode", None)  # since 6.0; before, one flag a mode
    if found is None:
        found = pooling.get_pooling_mode_str().split("+")
    return (found,) if isinstance(found, str) else tuple(found)


Read = tuple[Module, dict[str, Any]] | None  # the description and its weights; None for a module that does nothing


def _read_dense(root: Path, module: Any) -> Read:
    activation = type(module.activation_function)
    if getattr(nn, activation.__name__, None) is not activation or any(module.activation_function.parameters()):
        raise ValueError(
            _refusal(root, "Dense", f"its activation {activation.__name__} has weights, or is not torch's")
        )
    described = Dense(
        in_features=module.in_features,
        out_features=module.out_features,
        bias=module.linear.bias is not None,
        activation=activation.__name__,
        use_residual=getattr(module, "use_residual", False),
    )
    return described, module.state_dict()


def _read_layer_norm(root: Path, module: Any) -> Read:
    return LayerNorm(module.dimension), module.norm.state_dict()


def _read_normalize(root: Path, module: Any) -> Read:
    return Normalize(), {}


def _read_dropout(root: Path, module: Any) -> Read:
    return None


# The modules that may stand behind the pooling, by the names of their classes.
_READERS: dict[str, Callable[[Path, Any], Read]] = {
    "Dense": _read_dense,
    "LayerNorm": _read_layer_norm,
    "Normalize": _read_normalize,
    "Dropout": _read_dropout,
}


def _settings(root: Path) -> dict[str, Any]:
    """Return prompts, similarity and width, as config_sentence_transformers.json has them."""
    written = _read(root / CONFIG_FILE)
    prompts = {"query": "", "document": ""} | {
        name: text or "" for name, text in (written.get("prompts") or {}).items()
    }
    similarity = written.get("similarity_fn_name")
    return {
        "prompts": tuple(prompts.items()),
        "default_prompt_name": written.get("default_prompt_name"),
        "similarity": similarity if similarity in get_args(Similarity) else None,
        "truncate_dim": written.get("truncate_dim"),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's notes on moved classes and default prompts: no user of this package can act on them."""
    loggers = [logging.getLogger(name) for name in ("sentence_transformers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
