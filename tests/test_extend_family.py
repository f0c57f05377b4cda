"""The example of docs/extend/family.md works as it stands, and its row is used without another edit."""

from __future__ import annotations

import pytest
import torch
import transformers

from ffn2moe.dense import families
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import family_of
from tests.conftest import make_tiny_llama
from tests.pages import examples


@pytest.fixture
def helium(tmp_path, monkeypatch):
    """Put the page's file where the other families are, as far as Python can see; return a model of the family."""
    row, _ = examples("extend/family.md")
    (tmp_path / "added").mkdir()
    (tmp_path / "added/helium.py").write_text(row)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "added")])
    monkeypatch.setattr(families.FAMILIES, "_rows", dict(families.FAMILIES.items()))
    make_tiny_llama(tmp_path / "model")  # for its tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 200, "head_dim": 8}
    config = transformers.HeliumConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    transformers.HeliumForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_file_on_the_page_is_found_and_proven(helium):
    assert "helium" not in families.FAMILIES
    families.read_folder()
    _, proof = examples("extend/family.md")
    exec(proof.replace('"DENSE"', repr(str(helium))), {})
    model, _ = load_dense(str(helium))
    assert family_of(model) is families.FAMILIES["helium"] and not hasattr(model, "probed_family")


def test_a_wrong_row_on_a_page_like_this_is_refused(helium):
    from dataclasses import replace

    families.read_folder()
    row = families.FAMILIES["helium"]
    families.register_family(replace(row, stacks=(replace(row.stacks[0], w_in="mlp.gate_proj"),)))
    _, proof = examples("extend/family.md")
    with pytest.raises(ValueError, match="does not compute an FFN"):
        exec(proof.replace('"DENSE"', repr(str(helium))), {})
