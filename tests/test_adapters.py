"""An adapter is merged into its model, beside it or named by it; it is never ignored."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from ffn2moe.dense import adapters
from ffn2moe.dense.load import load_dense
from tests.conftest import make_tiny_bert, make_tiny_llama

peft = pytest.importorskip("peft")
IDS = torch.arange(5, 40).unsqueeze(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def adapt(model, folder, kind="LORA", **more):
    """Save a random adapter of a model in a folder; return the model's output with it."""
    torch.manual_seed(1)
    if kind == "LORA":
        settings = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **more)
    else:
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(input_ids=IDS)[0]


def test_an_adapter_of_a_classifier_brings_its_head(tmp_path):
    folder = make_tiny_bert(tmp_path / "bert")
    transformers.BertModel(transformers.BertConfig.from_pretrained(folder)).save_pretrained(folder)  # with its pooler
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    wanted = adapt(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query", "value"])
    found, _ = load_dense(str(tmp_path / "adapter"), head="classification")
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted, rtol=0, atol=1e-5)


@pytest.fixture
def base(tmp_path):
    return make_tiny_llama(tmp_path / "base")


def test_an_adapter_alone_is_merged_into_the_model_that_it_names(base, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    before = model(input_ids=IDS)[0].detach()
    wanted = adapt(model, tmp_path / "adapter", task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    said: list[str] = []
    found, tokenizer = load_dense(str(tmp_path / "adapter"), say=said.append)
    assert said == [f"merging the adapter in adapter into the model {base}"]
    assert len(tokenizer) > 100
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted, rtol=0, atol=1e-5)
    assert (wanted - before).abs().max() > 0.1


def test_an_adapter_beside_a_model_is_merged_into_it(base, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    wanted = adapt(model, tmp_path / "adapter", task_type="CAUSAL_LM", target_modules=["up_proj"])
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copyfile(file, base / file.name)
    settings = json.loads((base / "adapter_config.json").read_text())
    (base / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "gone/elsewhere"}))
    said: list[str] = []
    found, _ = load_dense(str(base), say=said.append)
    assert said == ["merging the adapter in base into the model beside it"]
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted, rtol=0, atol=1e-5)


def test_an_adapter_of_an_encoder_is_merged(tmp_path):
    folder = make_tiny_bert(tmp_path / "bert")
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    wanted = adapt(model, tmp_path / "adapter", task_type="FEATURE_EXTRACTION", target_modules=["query", "dense"])
    found, _ = load_dense(str(tmp_path / "adapter"), head="embedding")
    with torch.no_grad():
        torch.testing.assert_close(found(IDS)[0], wanted, rtol=0, atol=1e-5)


def test_a_model_that_is_missing_is_named(base, tmp_path):
    adapt(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", target_modules=["q_proj"])
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match=r"the adapter in .* changes a model that is missing: .*base"):
        load_dense(str(tmp_path / "adapter"))


def test_what_cannot_be_merged_is_refused(base, tmp_path, monkeypatch):
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    adapt(model, tmp_path / "prompt", "PROMPT")
    with pytest.raises(ValueError, match="adapter of the kind PROMPT_TUNING, which is no change of weights"):
        load_dense(str(tmp_path / "prompt"))
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    adapt(model, tmp_path / "lora", target_modules=["q_proj"])
    make_tiny_llama(base, ffn_width=64)
    settings = transformers.LlamaConfig.from_pretrained(base, num_hidden_layers=1)
    transformers.LlamaForCausalLM(settings).save_pretrained(base)
    with pytest.raises(ValueError, match="does not fit the model in"):
        load_dense(str(tmp_path / "lora"))
    monkeypatch.setattr(adapters.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install peft"):
        load_dense(str(tmp_path / "lora"))
