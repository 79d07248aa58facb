"""From text to text: a model that says one known line, for stop strings to cut."""

import json
import re

import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.generate.engine import Engine
from llmprep_jax.models.llama.config import Config
from llmprep_jax.text import ChatTemplate, Processor
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
def sizes(processor):
    """A model of one small layer."""
    sizes = dict(mlp_dim=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    vocab_size = processor.tokenizer.vocab_size
    return Config(vocab_size=vocab_size, dim=128, max_seq_len=512, **sizes)


@pytest.fixture(scope="module")
def model(processor, sizes):
    """A model that goes on with TEXT: after each of its tokens, in order, it says the next."""
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 16
    return scripted(sizes, [*ids, tokenizer.eos_id])


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


@pytest.fixture
def steps(monkeypatch):
    """Up to how many tokens each call of the device may draw."""
    drawn, advance = [], Engine.advance

    def note(self, state, until, *rest):
        drawn.append(until)
        return advance(self, state, until, *rest)

    monkeypatch.setattr(Engine, "advance", note)
    return drawn


def test_stop_strings_end_decoding_row_by_row(model, processor, said, steps):
    stop = said[2:5]
    texts = lp.generate(model, processor, ["9", "ZY"], max_new_tokens=24, stop=[stop])
    assert texts[0] == said[:2]
    assert stop not in texts[1]
    assert steps == [8, 16, 24]  # the second goes on
    steps.clear()
    lp.generate(model, processor, ["9", "9"], max_new_tokens=24, stop=[stop])
    assert steps == [8]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "876543210"),
        ("<|header|>", "8765"),
        ("65<|header|>", "87"),
        ("<|header|>43", "8765"),
        ("<|header|>9", "876543210"),  # which never comes
    ],
)
def test_a_special_token_stops_though_no_text_shows_it(processor, sizes, stop, expected):
    tokenizer = processor.tokenizer
    ids = [*tokenizer.encode("98765"), tokenizer.id_of("<|header|>"), *tokenizer.encode("43210")]
    model = scripted(sizes, [*ids, tokenizer.eos_id])
    settings = dict(max_new_tokens=24, stop=stop)
    assert lp.generate(model, processor, "9", **settings) == expected
    assert "".join(lp.generate(model, processor, "9", stream=True, **settings)) == expected


def test_a_stream_of_several_prompts_tells_whose_each_piece_is(model, processor, said):
    prompts, settings = ["9", "ZY", "é"], dict(max_new_tokens=24, stop=said[3:5])
    expected = lp.generate(model, processor, prompts, **settings)
    pieces = list(lp.generate(model, processor, prompts, stream=True, **settings))
    assert ["".join(piece for i, piece in pieces if i == row) for row in range(3)] == expected
    assert [row for row, _ in pieces[:3]] == [0, 1, 2]  # in turns, not one after the other
    one = lp.generate(model, processor, ["9"], max_new_tokens=4, stream=True)
    assert {row for row, _ in one} == {0}


def test_log_probabilities_come_with_the_text_and_its_tokens(model, processor, said):
    settings = dict(max_new_tokens=40, return_logprobs=True)
    ids, logprobs = lp.generate_tokens(model, **processor("9"), **settings)
    end = ids[0].tolist().index(processor.tokenizer.eos_id) + 1
    text, tokens, found = lp.generate(model, processor, "9", **settings)
    assert text.startswith(said)
    assert tokens.tolist() == ids[0, :end].tolist()
    np.testing.assert_allclose(found, logprobs[0, :end])
    # through the token that completes a stop string, in a list of answers
    (scored,) = lp.generate(model, processor, ["9"], stop=said[2:4], **settings)
    assert scored.text == said[:2]
    assert processor.decode(scored.tokens) == said[:4]
    with pytest.raises(ValueError, match="^a stream has no log-probabilities"):
        lp.generate(model, processor, "9", stream=True, return_logprobs=True)


def test_several_samples_are_a_list_of_answers_for_each_prompt(model, processor):
    settings = dict(max_new_tokens=6, temperature=50.0, seed=1)
    samples = lp.generate(model, processor, ["9", "ZY"], num_samples=3, **settings)
    assert [len(answers) for answers in samples] == [3, 3]
    assert len({*samples[0]}) > 1
    flat = lp.generate(model, processor, ["9"] * 3 + ["ZY"] * 3, **settings)
    assert [*samples[0], *samples[1]] == flat
    assert lp.generate(model, processor, "9", num_samples=3, **settings) == samples[0]
    pieces = list(lp.generate(model, processor, "9", num_samples=3, stream=True, **settings))
    assert ["".join(x for i, x in pieces if i == row) for row in range(3)] == samples[0]
    with pytest.raises(ValueError, match="^num_samples is 2 at temperature 0"):
        lp.generate(model, processor, "9", num_samples=2)


def test_fields_of_the_template_reach_it(model, processor, monkeypatch):
    talk = [{"role": "user", "content": "9"}, {"role": "assistant", "content": "876"}]
    settings = dict(max_new_tokens=4)
    assert lp.generate(model, processor, talk, continue_final_message=True, **settings) == "5432"
    assert lp.generate(model, processor, talk, **settings) == "5432"  # what else could be meant
    with pytest.raises(ValueError, match="the chat template does not read tools"):
        lp.generate(model, processor, talk, tools=[{"name": "f"}])
    chat = ChatTemplate(CHATML + "{{ tools and 'Z' }}")
    monkeypatch.setattr(processor.tokenizer, "chat", chat)
    assert lp.generate(model, processor, talk[:1], tools=[{"name": "f"}], **settings) == "YXWV"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"do_sample": True}, "unknown setting do_sample; here it is temperature (0 takes"),
        ({"max_length": 9}, "unknown setting max_length; here it is max_new_tokens"),
        ({"temprature": 1.0}, "unknown setting temprature; did you mean temperature"),
        ({"nonsense": 1}, "nonsense is for a chat template"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"seed": 1e30, "max_new_tokens": 9}, "it must fit in 64 bits"),
        ({"stop_ids": [1, 2.5]}, "stop_ids is 2.5; it must be a whole number"),
        ({"stop": ["a", 3]}, "stop holds 3, which is no string; give ids as stop_ids"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_reads_or_will_not_do_is_one_line(model, processor, settings, problem, stream):
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        lp.generate(model, processor, "9", stream=stream, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"stop": None, "stop_ids": 258, "max_new_tokens": np.int64(24)}, {"stop_ids": [258]}),
        ({"stop_ids": np.array([30])}, {"stop_ids": [30]}),
        ({"temperature": 1, "top_k": 1.0}, {}),
        ({"temperature": None, "top_p": None, "repetition_penalty": None}, {}),
        ({"temperature": np.float32(2), "seed": np.int32(3)}, {"temperature": 2.0, "seed": 3}),
        ({"temperature": 1e-20, "seed": None, "top_k": 50.0}, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_settings_are_taken_in_their_obvious_meaning(model, processor, settings, same, stream):
    expected = lp.generate(model, processor, "9", **{"max_new_tokens": 24, **same})
    settings = {"max_new_tokens": 24, **settings}
    found = lp.generate(model, processor, "9", stream=stream, **settings)
    assert "".join(found) == expected


def test_another_seed_is_drawn_where_none_is_given(model, processor):
    settings = dict(max_new_tokens=16, temperature=50.0, seed=None)
    texts = [lp.generate(model, processor, "9", **settings) for _ in range(2)]
    assert texts[0] != texts[1]


def test_images_are_refused(model, processor):
    with pytest.raises(ValueError, match="reads text only"):
        lp.generate(model, processor, "9", images=[object()])
