"""A small tokenizer with any chat template."""

import json

import pytest

from llmprep_jax.text import Tokenizer
from tests.text.samples import TOKENS, train_byte_level


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    """A function from a template to a small tokenizer that has it."""
    folder = tmp_path_factory.mktemp("chat")
    train_byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS))

    def build(template: str) -> Tokenizer:
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.from_folder(folder)

    return build
