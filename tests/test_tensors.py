"""No tensor of a teacher's files is dropped without a word, and none that the model needs is missing."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ffn2moe.decompose.source import Source, skeleton
from ffn2moe.dense.load import load_dense
from tests.conftest import make_tiny_bert, make_tiny_classifier, make_tiny_llama


def change(folder, **tensors):
    """Add tensors to a folder's weights, or remove those that are None."""
    file = folder / "model.safetensors"
    found = load_file(file) | tensors
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file, {"format": "pt"})


def loaded(folder, head=None):
    """Return the model, and the lines about what is left out; the streamed source must agree."""
    said: list[str] = []
    model, _ = load_dense(str(folder), head=head, say=said.append)
    Source(folder, skeleton(folder, head))
    return model, said


def test_nothing_is_said_where_every_tensor_is_read(tmp_path):
    assert loaded(make_tiny_llama(tmp_path))[1] == []


def test_a_tensor_of_nobody_is_an_error_that_names_three(tmp_path):
    folder = make_tiny_llama(tmp_path)
    change(folder, **{f"model.layers.0.mlp.strange_{index}": torch.ones(2) for index in range(5)})
    for read in (lambda: load_dense(str(folder)), lambda: Source(folder, skeleton(folder))):
        with pytest.raises(ValueError, match=r"strange_0.*strange_1.*strange_2, and 2 more, which LlamaForCausalLM"):
            read()


def test_layers_that_config_json_does_not_count_are_an_error(tmp_path):
    folder = make_tiny_bert(tmp_path)
    config = transformers.BertConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\..*which BertModel does not read"):
        load_dense(str(folder))


def test_heads_and_poolers_that_the_head_does_not_read_are_said(tmp_path):
    folder = make_tiny_bert(tmp_path)
    config = transformers.BertConfig.from_pretrained(folder)
    pretraining = transformers.BertForPreTraining(config)
    pretraining.save_pretrained(folder)
    model, said = loaded(folder, "embedding")
    assert said == ["leaving out cls (7 tensors), pooler (2 tensors): BertModel does not read them"]
    torch.testing.assert_close(
        model.encoder.layer[0].output.dense.weight, pretraining.bert.encoder.layer[0].output.dense.weight
    )


def test_a_classifier_as_an_embedding_model_says_that_its_classes_are_left_out(tmp_path):
    folder = make_tiny_classifier(tmp_path)
    _, said = loaded(folder, "embedding")
    assert said == ["leaving out classifier (2 tensors), pooler (2 tensors): BertModel does not read them"]


def test_buffers_of_older_releases_are_left_out(tmp_path):
    folder = make_tiny_bert(tmp_path)
    change(folder, **{"embeddings.position_ids": torch.arange(64).unsqueeze(0)})
    _, said = loaded(folder)
    assert said == ["leaving out position_ids (1 tensor): BertModel does not read them"]


def test_missing_tensors_and_other_shapes_are_errors(tmp_path):
    folder = make_tiny_llama(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    change(folder, **{name: weight[:-1].clone()})
    with pytest.raises(ValueError, match=rf"{name} in .* is \[47, 32\], and by config.json \[48, 32\]"):
        load_dense(str(folder))
    change(folder, **{name: None})
    with pytest.raises(ValueError, match=f"lacks weights.*{name}"):
        load_dense(str(folder))
