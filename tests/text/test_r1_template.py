"""DeepSeek-R1's chat template, as first released and later: what is rendered, what is learnt."""

import pytest

from llmprep_jax.text import Processor, encode_chat
from llmprep_jax.text.thinking import opens_thought
from tests.text.samples import ASSISTANT, BOS, EOS, R1, USER, write_r1

TALK = [
    {"role": "user", "content": "6 * 7?"},
    {"role": "assistant", "content": "<think>\nhm </think>\n\nIt is 42.\n"},
    {"role": "user", "content": "Sure?"},
]
TURNS = f"{BOS}{USER}6 * 7?{ASSISTANT}\n\nIt is 42.\n{EOS}{USER}Sure?"
OPENING = {"first": "", "later": "<think>\n"}


@pytest.fixture(scope="module", params=R1)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def processor(name, tmp_path_factory):
    return Processor.from_path(write_r1(tmp_path_factory.mktemp("r1"), R1[name]))


def learnt(processor, messages) -> list[str]:
    """The runs of tokens that the model must learn to say."""
    ids, mask = encode_chat(processor.tokenizer, messages)
    text = "".join(
        processor.tokenizer.token_of(i) if is_answer else "|"
        for i, is_answer in zip(ids, mask, strict=True)
    )
    return [run.replace("Ċ", "\n").replace("Ġ", " ") for run in text.split("|") if run]


def test_thoughts_of_earlier_turns_are_cut(processor, name):
    assert processor.chat.apply(TALK) == TURNS
    prompt = processor.chat.apply(TALK, add_generation_prompt=True)
    assert prompt == TURNS + ASSISTANT + OPENING[name]


def test_the_later_template_opens_the_thoughts(processor, name):
    prompt = processor.chat.apply(TALK, add_generation_prompt=True)
    assert opens_thought(prompt) is (name == "later")
    assert processor.decode(processor(TALK)["tokens"][0], skip_special=False) == prompt


def test_a_system_message_stands_before_the_first_turn(processor):
    text = processor.chat.apply([{"role": "system", "content": "Be brief."}, *TALK])
    assert text == TURNS.replace(BOS, f"{BOS}Be brief.")


def test_the_answer_and_the_token_that_ends_it_are_learnt_without_thoughts(processor):
    assert learnt(processor, TALK) == [f"\n\nIt is 42.\n{EOS}"]
    again = [*TALK, {"role": "assistant", "content": "<think>\n</think> Yes, </think> 42."}]
    assert learnt(processor, again) == [f"\n\nIt is 42.\n{EOS}", f" 42.{EOS}"]


def test_of_thoughts_alone_the_end_is_learnt(processor):
    messages = [TALK[0], {"role": "assistant", "content": "<think>\nhm</think>"}]
    assert learnt(processor, messages) == [EOS]


def test_replies_end_with_the_end_of_sentence(processor):
    assert processor.tokenizer.stop_ids == (processor.tokenizer.id_of(EOS),)
