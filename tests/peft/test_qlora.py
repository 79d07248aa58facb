"""QLoRA is LoRA around packed layers, and its folder is LoRA's."""

import json

import jax
import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.peft import LoRA, QLoRA
from llmprep_jax.peft.adapter import methods
from llmprep_jax.quant import packed_layers, quantize_model
from tests.peft.test_methods import base, fresh, logits_of, trained

METHOD = QLoRA(4, 8, targets=("q_proj", "down_proj"))


def test_a_model_starts_as_its_packed_base_bit_for_bit():
    model = fresh(METHOD)
    packed = quantize_model(base(), "nf4")
    assert packed_layers(model).keys() == packed_layers(packed).keys()  # whatever is adapted
    assert set(methods(model).values()) == {LoRA(4, 8, targets=())}
    np.testing.assert_array_equal(logits_of(model), logits_of(packed))


def test_a_packed_base_stays_as_it_is():
    packed = quantize_model(base(), "int8")
    with pytest.warns(
        UserWarning, match=r"^the base is packed as int8 and stays so; kind='nf4' is"
    ):
        model = lp.peft.inject(packed, QLoRA(4, 8))
    assert {each.format.__name__ for each in packed_layers(model).values()} == {"Int8"}


def test_a_base_that_is_packed_as_asked_says_nothing(recwarn):
    for kind in ("fp4", "int8"):  # of one class of formats that has kinds, and of one
        model = jax.eval_shape(
            lambda kind=kind: lp.peft.inject(quantize_model(base(), kind), QLoRA(4, 8, kind=kind))
        )
        assert {layer.kind for layer in packed_layers(model).values()} == {kind}
    assert not recwarn.list


def test_its_folder_is_that_of_lora_and_opens_on_a_dense_base(tmp_path):
    model = trained(METHOD)
    folder = lp.peft.save(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    dense = lp.peft.load(base(), folder)
    assert not packed_layers(dense)
    for name in ("lora_a", "lora_b"):
        ours, theirs = (getattr(m.layers.attn.q, name)[...] for m in (model, dense))
        np.testing.assert_array_equal(ours, theirs)


def test_an_abstract_model_is_counted():
    model = jax.eval_shape(lambda: lp.peft.inject(base(), QLoRA(4, 8)))
    plain = jax.eval_shape(lambda: lp.peft.inject(base(), LoRA(4, 8)))
    found, expected = lp.peft.count(model), lp.peft.count(plain)
    assert (found.trainable, found.frozen) == (expected.trainable, expected.frozen)
    assert found.frozen_bytes < expected.frozen_bytes / 2


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'nf5' of packed weights; the kinds are nf4"):
        QLoRA(kind="nf5")
