"""Numbers of a config.json that no model has are refused before anything is computed with them."""

import dataclasses

import pytest

from llmprep_jax.models import gemma3_text, registry
from llmprep_jax.models.hf_config import check_numbers
from llmprep_jax.nn.moe import Routing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10_000, "mlp_dim": 2**24}, None),
        ({"num_layers": 10_001}, "gives num_layers as 10001, which no model has"),
        ({"mlp_dim": 2**24 + 1}, "gives mlp_dim as 16777217, which"),
        ({"max_seq_len": 0}, "gives max_seq_len as 0, which"),
        ({"routing": Routing(10_001, 2)}, "gives routing.num_experts as 10001, which"),
    ],
)
def test_numbers_that_no_model_has_are_named_with_the_part_that_they_are_of(changes, message):
    cfg = dataclasses.replace(registry.preset("deepseek-v2-tiny"), **changes)
    if message is None:
        return check_numbers(cfg)
    with pytest.raises(ValueError, match=message):
        check_numbers(cfg)


def test_a_query_scale_of_nought_is_refused_before_scores_are_divided_by_it():
    hf = registry.to_hf(registry.preset("gemma3-1b"))
    with pytest.raises(ValueError, match="gives query_scale as 0.0, which no model has"):
        check_numbers(gemma3_text.from_hf(hf | {"query_pre_attn_scalar": 0}))
    check_numbers(gemma3_text.from_hf(hf | {"query_pre_attn_scalar": 0.5}))
