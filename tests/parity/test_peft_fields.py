"""Every field of PEFT's configs is one that we read, one without effect, or one that we refuse."""

import dataclasses

import peft
import pytest

from llmprep_jax.peft.method import Method
from llmprep_jax.peft.peft_config import SELECTION, WITHOUT_EFFECT

pytestmark = pytest.mark.parity

CONFIGS = {
    "LORA": peft.LoraConfig,
    "LOHA": peft.LoHaConfig,
    "LOKR": peft.LoKrConfig,
    "IA3": peft.IA3Config,
    "VERA": peft.VeraConfig,
    "ADALORA": peft.AdaLoraConfig,
    "OFT": peft.OFTConfig,
    "HRA": peft.HRAConfig,
}

REFUSED = (  # when they are set, as all that is not known
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",  # of methods other than LoRA
    "target_parameters",  # of methods other than LoRA
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)


def test_every_field_of_peft_is_known():
    read = {kind: classes[0].peft_fields for kind, classes in Method.readers.items()}
    assert CONFIGS.keys() == read.keys()
    fields = {
        kind: {field.name for field in dataclasses.fields(config)}
        for kind, config in CONFIGS.items()
    }
    known = {"peft_type", *SELECTION, *WITHOUT_EFFECT, *REFUSED}
    for kind, names in fields.items():
        assert names <= {*known, *read[kind]}, kind
        assert set(read[kind]) <= names
    assert known <= set().union(*fields.values())


@pytest.mark.parametrize("field", REFUSED)
def test_no_refused_field_is_set_by_default(field):
    for config in CONFIGS.values():
        needed = {"total_step": 1} if config is peft.AdaLoraConfig else {}
        assert not getattr(config(**needed), field, None)
