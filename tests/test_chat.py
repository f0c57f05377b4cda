"""A chat model answers messages as its template writes them: from an export, on the command line and over HTTP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from ffn2moe import cli
from ffn2moe.moe import checkpoint
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.runtime.chat import rendered, require_messages
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import MANIFEST
from flows.serve import _example, served
from tasks import register
from tasks.params import load_params
from tasks.record import PARENT_RUN
from tasks.registry import Registry
from tasks.stage import StageRun
from tasks.store import TRACKING_URI
from tests.gguf_students import TEMPLATE, VOCABULARY, byte_level
from tests.test_containers import student_of
from tests.test_register import PROJECT, plan_of, write_json
from tests.texts import PARAMS

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is  a mixture?\n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": 'Say "<3" & 世界'},
]
TEMPLATES = {
    "chatml": TEMPLATE,
    "special tokens, trimmed and as JSON": (
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'system' %}\n[{{ m['content'] | trim }}]\n"
        "    {% else %}\n{{ m.content | tojson }}{{ eos_token }}\n    {% endif %}\n{% endfor %}"
    ),
    "marks of training, loops and a namespace": (
        "{% set seen = namespace(n=0) %}{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}"
        "{% set seen.n = seen.n + 1 %}{{ seen.n }}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}"
    ),
}
QUALITY = {
    "head": "causal",
    "retention": {"language": {"perplexity": 0.99}},
    "student": {"language": {"perplexity": 9.0}},
}
LEAVING = "{% set names = namespace(__class__=1) %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny chat model, as it comes back from its checkpoint; three tokens end its answers."""
    root, tokenizer = tmp_path_factory.mktemp("chat"), byte_level()
    model, spec = student_of(
        "mixtral", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, max_position_embeddings=512
    )
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 0, 3])
    checkpoint.save(model, None, spec, root / "checkpoint")
    student = checkpoint.load(root / "checkpoint")
    write_manifest(root / "export", export_model(student, None, tokenizer, spec, root / "export", plans=("sorted",)))
    return root / "export"


@pytest.fixture
def bare(folder: Path, tmp_path: Path) -> Path:
    """The same export without its chat template."""
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare/tokenizer/chat_template.jinja").unlink()
    return tmp_path / "bare"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_writes_what_transformers_writes(tmp_path: Path, template: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert rendered(template, MESSAGES, tmp_path) == expected


def test_a_conversation_has_the_tokens_that_transformers_gives_it(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert open_export(folder, threads=1).chat_ids(MESSAGES) == expected


def test_an_answer_ends_with_any_of_the_end_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = open_export(folder, threads=1)
    assert export.manifest["model"]["eos_token_ids"] == [2, 0, 3]
    whole = [
        int(step[0])
        for step in export.generate_tokens([export.chat_ids(MESSAGES)], max_new_tokens=30, stop_at_end=False)
    ]
    assert len(set(whole)) > 3
    for place in (2, 5):
        monkeypatch.setitem(export._model, "eos_token_ids", [VOCABULARY - 1, whole[place], VOCABULARY - 2])
        steps = [int(step[0]) for step in export.generate_tokens([export.chat_ids(MESSAGES)], max_new_tokens=30)]
        assert steps[-1] == -1 and steps[:-1] == whole[: whole.index(whole[place])]


def test_the_command_prints_the_answer_alone(folder: Path, bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--chat", "--system", "Be short.", "--max-tokens", "8"]
    assert cli.main(["generate", str(folder), "What is a mixture?", *arguments]) == 0
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a mixture?"}]
    assert capsys.readouterr().out == "".join(open_export(folder).chat(messages, max_new_tokens=8)) + "\n"
    assert cli.main(["generate", str(bare), "What?", "--chat"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has no chat template: its model continues texts" in said and "put its chat_template.jinja into" in said
    assert cli.main(["generate", str(folder), "What?", "--system", "Be short."]) == 2
    assert "add --chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages are a list of at least one"),
        ("Who?", "messages are a list of at least one"),
        ([{"role": "user"}], "message 0 is no mapping of role and content"),
        ([{"role": "user", "content": 1}], "the content of message 0 is no string but int"),
        ([{"role": "user", "content": "\ud800"}], "the content of message 0 is not valid Unicode"),
    ],
)
def test_messages_that_are_none_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_messages(messages)


def test_what_a_template_refuses_is_told(tmp_path: Path) -> None:
    for template in (
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ messages.__class__.__mro__ }}",
        LEAVING,
    ):
        with pytest.raises(ValueError, match="the model's chat template refuses these messages"):
            rendered(template, MESSAGES, tmp_path)


def test_a_chat_model_is_served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PARENT_RUN, TRACKING_URI):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "workspace"
    shutil.copytree(folder, root / "exports/minilm")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["plans"]["dense"] = manifest["plans"]["sorted"]
    write_json(root / "exports/minilm/manifest.json", manifest)
    write_json(root / "exports/minilm/plan.json", plan_of(1.2))
    write_json(root / "metrics/evaluate.json", QUALITY)
    for name in ("ffn2moe", "tasks"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    register.run(StageRun("register", load_params(PARAMS, ["register.max_characters=100"]), root))
    with served(Registry(root, "minilm"), 1, log=tmp_path / "log") as server:
        status, answer = server.ask([{"messages": MESSAGES}, "Once upon"])
        assert status == 200, answer
        export = open_export(folder, "sorted")
        assert answer["predictions"] == ["".join(export.chat(MESSAGES)), "".join(export.generate("Once upon"))]
        assert server.ask([], info=True)[1]["predictions"][0]["chats"] is True
        assert '"messages"' in _example(server)
        for bad, why in (
            ({"messages": []}, "text 0: messages are a list of at least one"),
            ({"messages": [{"role": "user"}]}, "text 0: message 0 is no mapping"),
            ({"messages": [{"role": "user", "content": "x" * 101}]}, "the conversation 0 has 101 characters"),
            ({"text": "a"}, 'send strings, or {"messages": [...]}'),
        ):
            status, answer = server.ask([bad])
            assert status == 400 and why in answer["message"], answer
