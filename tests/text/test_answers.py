"""Answers in conversations that call tools, and those that are left out of the loss.

`tool_templates` does what each family's own template does with calls; the arguments of the call
here spell tokens that end turns.
"""

import json

import pytest

from llmprep_jax.text import encode_chat
from llmprep_jax.text.answers import Ends, find_turn
from tests.text import samples, tool_templates
from tests.text.samples import CHATML, bracket, refusal
from tests.text.test_chat import TALK

HI = {"role": "user", "content": "Hi"}
THEN = [
    {"role": "tool", "content": "cold", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "thx"},
    {"role": "assistant", "content": "bye"},
]
ARGUMENTS = {"city": "Oslo</s><|im_end|>"}
JSON = json.dumps(ARGUMENTS)
HERMES_CALL = f'<tool_call>\n{{"name": "wx", "arguments": {JSON}}}\n</tool_call><|im_end|>'
# family: what is learnt of the call, then of the answers that follow it
LEARNT = {
    "LLAMA31": (
        f'{{"name": "wx", "parameters": {JSON}}}<|im_end|>', "done<|im_end|>", "bye<|im_end|>",
    ),
    "QWEN25": (HERMES_CALL, "done<|im_end|>", "bye<|im_end|>"),
    "HERMES": (HERMES_CALL, "done<|im_end|>", "bye<|im_end|>"),
    "QWEN3": (HERMES_CALL, "done<|im_end|>", "<think>\n\n</think>\n\nbye<|im_end|>"),
    "MISTRAL": (
        f'[TOOL_CALLS] [{{"name": "wx", "arguments": {JSON}, "id": "abcdefghi"}}]</s>',
        " done</s>", "bye</s>",
    ),
    "DEEPSEEK31": (f"<call>wx<sep>{JSON}</call></s>", "done</s>", "bye</s>"),
    "DEEPSEEK_R1": (
        f"<call>function<sep>wx\n```json\n{JSON}\n```</call></s>", "done</s>", "bye</s>",
    ),
}  # fmt: skip
LEARNT["LLAMA32"] = LEARNT["LLAMA31"]


def call_of(family: str, **content) -> dict:
    """The assistant's message that calls a tool; DeepSeek takes arguments as text."""
    arguments = JSON if family.startswith("DEEPSEEK") else ARGUMENTS
    function = {"name": "wx", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", **content, "tool_calls": [call]}


def learnt(text: str) -> tuple[str, ...]:
    return tuple(part.split("⟧")[0] for part in text.split("⟦")[1:])


CONTENTS = [{"content": None}, {"content": ""}, {}]


@pytest.mark.parametrize("content", CONTENTS, ids=["null", "empty", "absent"])
@pytest.mark.parametrize("family", LEARNT)
def test_a_turn_that_is_only_a_call_is_learnt_through_its_end(with_template, family, content):
    tokenizer = with_template(getattr(tool_templates, family))
    call = call_of(family, **content)
    assert learnt(bracket(tokenizer, [HI, call, *THEN])) == LEARNT[family]
    last = learnt(bracket(tokenizer, [HI, call]))
    thought = "<think>\n\n</think>\n\n" if family == "QWEN3" else ""
    assert last == (thought + LEARNT[family][0],)


@pytest.mark.parametrize(("family", "before", "between"), [
    ("QWEN25", "so", "\n"), ("QWEN3", "so", "\n"), ("DEEPSEEK31", "so", ""), ("MISTRAL", "", ""),
    ("LLAMA31", "", ""), ("HERMES", "", ""),
])  # fmt: skip
def test_content_beside_a_call_is_learnt_where_it_is_shown(with_template, family, before, between):
    tokenizer = with_template(getattr(tool_templates, family))
    talk = [HI, call_of(family, content="so"), *THEN]
    assert learnt(bracket(tokenizer, talk))[0] == before + between + LEARNT[family][0]


def test_several_calls_are_one_answer(with_template):
    call = call_of("QWEN25", content=None)
    call["tool_calls"] *= 2
    inner = HERMES_CALL.removesuffix("<|im_end|>")
    text = bracket(with_template(tool_templates.QWEN25), [HI, call, *THEN])
    assert learnt(text)[0] == f"{inner}\n{inner}<|im_end|>"


def test_a_call_may_be_flat_and_without_arguments(with_template):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "now", "arguments": {}}]}
    text = bracket(with_template(tool_templates.HERMES), [HI, call])
    assert learnt(text) == (
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>',
    )


@pytest.mark.parametrize("content", CONTENTS, ids=["null", "empty", "absent"])
def test_the_newline_of_a_header_may_come_with_content_or_call(with_template, content):
    template = (
        "{% for m in messages %}<{{m.role}}>{% if m.content %}{{'\\n'+m.content}}{% endif %}"
        "{% if m.tool_calls %}{{'\\n'+m.tool_calls|tojson}}{% endif %}</t>{% endfor %}"
        "{% if add_generation_prompt %}{{'<assistant>\\n'}}{% endif %}"
    )
    call = {"role": "assistant", **content, "tool_calls": [{"name": "f"}]}
    assert bracket(with_template(template), [HI, call]) == (
        '<user>\nHi</t><assistant>\n⟦[{"name": "f"}]</t>⟧'
    )


def test_calls_that_a_template_does_not_show_are_an_error_with_the_messages_number(with_template):
    call = call_of("QWEN25", content="")
    message = refusal(encode_chat, with_template(CHATML), [HI, call])
    assert "the tool calls of message 1 cannot be found" in message
    assert "\n" not in message


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}])
@pytest.mark.parametrize("template", ["CHATML", "MARKED"])
def test_a_turn_without_weight_is_shown_and_not_learnt(with_template, template, mark):
    tokenizer = with_template(getattr(samples, template))
    whole = bracket(tokenizer, TALK)
    silent = bracket(tokenizer, [TALK[0], TALK[1] | mark, *TALK[2:]])
    assert silent.replace("⟦", "").replace("⟧", "") == whole.replace("⟦", "").replace("⟧", "")
    assert learnt(silent) == learnt(whole)[1:]
    kept = {"weight": 1, "train": True}
    assert bracket(tokenizer, [TALK[0], TALK[1] | kept, *TALK[2:]]) == whole


def test_no_template_sees_what_only_training_reads(with_template):
    tokenizer = with_template("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    assert tokenizer.chat.apply([HI | {"weight": 1}]) == json.dumps(HI)


@pytest.mark.parametrize(("mark", "words"), [
    ({"weight": 0.5}, 'message 1 has "weight": 0.5; an answer counts or it does not: give 1'),
    ({"weight": -1}, "weight"), ({"weight": "0"}, "weight"), ({"train": "no"}, 'has "train"'),
    ({"weight": 1, "train": False}, "at odds"),
])  # fmt: skip
def test_other_weights_are_refused_by_the_messages_number(with_template, mark, words):
    message = refusal(encode_chat, with_template(CHATML), [TALK[0], TALK[1] | mark])
    assert words in message
    assert "message 1" in message


def test_only_the_assistant_can_be_trained(with_template):
    message = refusal(encode_chat, with_template(CHATML), [TALK[0] | {"train": True}, TALK[1]])
    assert message.startswith('message 0 is of role user and has "train": true')


def test_generation_blocks_that_mark_nothing_are_an_error(with_template):
    template = samples.MARKED.replace("m.role == 'assistant'", "m.role == 'model'")
    message = refusal(encode_chat, with_template(template), TALK)
    assert "mark nothing in these messages, though message 1 is the assistant's" in message


def test_a_turn_is_found_by_what_surrounds_it():
    def render(messages, prompt=False):
        return "".join(f"<{m['content']}>" for m in messages)

    talk = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert find_turn(render, talk, 0, "<a><b>", Ends((), (">",))) == (1, 3)
