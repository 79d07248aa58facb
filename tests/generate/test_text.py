"""From text to text: a model that says one known line, for stop strings to cut."""

import json

import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.models.llama.config import Config
from llmprep_jax.text import Processor
from tests.generate.scripted import scripted
from tests.text.samples import CHATML, train_byte_level

TEXT = "9876543210 ZYXWVUTSéQPONMLKJ"  # no token twice


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    train_byte_level().save(str(folder / "tokenizer.json"))
    config = {"pad_token": "<pad>", "eos_token": "</s>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Processor.from_path(folder)


@pytest.fixture(scope="module")
def model(processor):
    """A model that goes on with TEXT: after each of its tokens, in order, it says the next."""
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 16
    sizes = dict(mlp_dim=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    cfg = Config(vocab_size=tokenizer.vocab_size, dim=128, max_seq_len=128, **sizes)
    return scripted(cfg, [*ids, tokenizer.eos_id])


@pytest.fixture(scope="module")
def said(model, processor):
    return lp.generate(model, processor, "9", max_new_tokens=24)


def test_one_text_gives_a_string_and_a_list_gives_a_list(model, processor, said):
    assert isinstance(said, str)
    assert len(said) > 20
    several = lp.generate(model, processor, ["9", "the 3"], max_new_tokens=24)
    assert several[0] == said
    assert len(several) == 2


def test_a_conversation_is_answered_through_the_template(model, processor):
    question = [{"role": "user", "content": "9"}]
    inputs = processor(question)
    ids = np.asarray(lp.generate_tokens(model, **inputs, max_new_tokens=5))[0]
    ends = np.flatnonzero(np.isin(ids, processor.tokenizer.stop_ids))
    expected = processor.decode(ids[: ends[0]] if len(ends) else ids)
    assert lp.generate(model, processor, question, max_new_tokens=5) == expected
    both = lp.generate(model, processor, [question, question], max_new_tokens=5)
    assert both == [expected, expected]


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("start", [4, 7])
def test_a_stop_string_is_cut_off_wherever_tokens_end(model, processor, said, start, length):
    stop = said[start : start + length]
    expected = said[: said.index(stop)]
    found = lp.generate(model, processor, "9", max_new_tokens=24, stop=[stop, "not there"])
    assert found == expected
    pieces = lp.generate(model, processor, "9", max_new_tokens=24, stop=[stop], stream=True)
    assert "".join(pieces) == expected


def test_pieces_of_a_stream_are_the_text(model, processor, said):
    pieces = list(lp.generate(model, processor, "9", max_new_tokens=24, stream=True))
    assert len(pieces) > 1
    assert "".join(pieces) == said


@pytest.mark.parametrize("new", [18, 19])
def test_an_answer_may_end_within_a_character(model, processor, said, new):
    found = lp.generate(model, processor, "9", max_new_tokens=new)
    assert "".join(lp.generate(model, processor, "9", max_new_tokens=new, stream=True)) == found
    assert found == said[:18] + "\ufffd" * (new - 18)


def test_text_that_might_begin_a_stop_string_comes_in_the_end(model, processor, said):
    stop = said[-2:] + "and more that never comes"
    pieces = lp.generate(model, processor, "9", max_new_tokens=24, stop=[stop], stream=True)
    assert "".join(pieces) == said


def test_of_two_stop_strings_the_one_that_is_complete_first_ends_the_text(model, processor, said):
    stop = [said[2:12], said[4:6]]
    assert lp.generate(model, processor, "9", max_new_tokens=24, stop=stop) == said[:4]
    pieces = lp.generate(model, processor, "9", max_new_tokens=24, stop=stop, stream=True)
    assert "".join(pieces) == said[:4]


def test_one_stop_string_needs_no_list_and_an_empty_one_is_refused(model, processor, said):
    assert lp.generate(model, processor, "9", max_new_tokens=24, stop=said[3:5]) == said[:3]
    with pytest.raises(ValueError, match="^stop holds an empty string"):
        lp.generate(model, processor, "9", stop=["a", ""])


def test_a_stop_id_ends_the_text_before_it(model, processor, said):
    ids = np.asarray(lp.generate_tokens(model, **processor("9"), max_new_tokens=24))[0]
    found = lp.generate(model, processor, "9", max_new_tokens=24, stop_ids=[int(ids[3])])
    at = list(ids).index(ids[3])
    assert found == processor.decode(ids[:at])


def test_a_stream_of_several_prompts_and_images_are_refused(model, processor):
    with pytest.raises(ValueError, match="a stream is of one prompt; got 2"):
        lp.generate(model, processor, ["9", "3"], stream=True)
    with pytest.raises(ValueError, match="reads text only"):
        lp.generate(model, processor, "9", images=[object()])
