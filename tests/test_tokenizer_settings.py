"""The tokenizer of an export answers as transformers' tokenizer with all its settings does."""

from __future__ import annotations

import json

import pytest
import transformers

from ffn2moe.dense.load import load_dense
from ffn2moe.runtime.files import load_tokenizer
from tests.conftest import make_tiny_bert

LONG = " ".join(["sort the LIST of values and return <new> matrix rows"] * 8)
SETTINGS = {
    "nothing else": {},
    "cut on the left": {"truncation_side": "left"},
    "cased": {"do_lower_case": False},
    "a token that tokenizer.json lacks": {
        "added_tokens_decoder": {
            "4": {"content": "[MASK]", "special": True},
            "300": {"content": "<new>", "special": True},
        }
    },
}


@pytest.mark.parametrize("change", SETTINGS)
def test_settings_of_tokenizer_config_reach_the_export(tmp_path, change):
    folder = make_tiny_bert(tmp_path / "teacher", vocab_size=400)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SETTINGS[change]))
    wanted = transformers.AutoTokenizer.from_pretrained(folder)
    _, reader = load_dense(str(folder))
    reader.save_pretrained(tmp_path / "export")
    found = load_tokenizer(tmp_path / "export", 12)
    for text in ("Return the sum.", LONG):
        assert found.encode(text).ids == wanted(text, truncation=True, max_length=12)["input_ids"]
    if "left" in change:
        assert wanted(LONG, truncation=True, max_length=12)["input_ids"] != [*wanted(LONG)["input_ids"][:11], 3]
