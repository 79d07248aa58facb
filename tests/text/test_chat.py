"""Chat templates: rendering, refusals, and the answers that a model learns from."""

import datetime
import functools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.text import ChatTemplate, Tokenizer, encode_chat
from tests.text import samples
from tests.text.samples import CHATML, TOKENS, bracket, refusal, train_byte_level

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>hm</think>\n\nhello"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "<think>\nso</think>\nyes "},
]


FIRST, SECOND = "<think>hm</think>\n\nhello", "<think>\nso</think>\nyes "
EXPECTED = {
    "CHATML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
        f"⟦{FIRST}<|im_end|>⟧\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
        f"⟦{SECOND}<|im_end|>⟧\n"
    ),
    "LLAMA3": (  # trims
        "<s><|header|>system<|header|>\n\nBe brief.<|im_end|><|header|>user<|header|>\n\nHi"
        f"<|im_end|><|header|>assistant<|header|>\n\n⟦{FIRST}<|im_end|>⟧<|header|>user<|header|>\n\nmore"
        "<|im_end|><|header|>assistant<|header|>\n\n⟦<think>\nso</think>\nyes<|im_end|>⟧"
    ),
    "GEMMA3": (
        f"<s><|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>model\n⟦{FIRST}<|im_end|>⟧\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>model\n⟦<think>\nso</think>\nyes<|im_end|>⟧\n"
    ),
    # Thoughts are dropped, and the <think> that ends the generation prompt is not there.
    "DEEPSEEK_R1": (
        "<s><|im_start|>Hi<|header|>⟦\n\nhello</s>⟧<|im_start|>more<|header|>⟦\nyes </s>⟧"
    ),
    "QWEN3": (  # thoughts are kept after the last question, where the model writes <think> itself
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
        "⟦hello<|im_end|>⟧\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nso\n</think>\n\nyes <|im_end|>⟧\n"
    ),
    "MISTRAL": (
        f"<s>[INST] Hi [/INST] ⟦{FIRST} </s>⟧[INST] Be brief.\nmore [/INST] ⟦{SECOND} </s>⟧"
    ),
    "PLAIN": (
        f"system: Be brief.\nuser: Hi\nassistant: ⟦{FIRST}⟧\nuser: more\nassistant: ⟦{SECOND}⟧\n"
    ),
}
EXPECTED["MARKED"] = EXPECTED["CHATML"]
EXPECTED["QWEN25"] = EXPECTED["CHATML"]


@pytest.mark.parametrize("family", EXPECTED)
def test_answers_of_each_family_are_found(with_template, family):
    tokenizer = with_template(getattr(samples, family))
    assert bracket(tokenizer, [SYSTEM, *TALK]) == EXPECTED[family]


@pytest.mark.parametrize(("family", "answer"), [
    ("CHATML", "⟦<|im_end|>⟧"), ("LLAMA3", "⟦<|im_end|>⟧"), ("DEEPSEEK_R1", "⟦</s>⟧"),
    ("QWEN3", "⟦<think>\n\n</think>\n\n<|im_end|>⟧"),
])  # fmt: skip
def test_an_empty_answer_is_the_token_that_ends_it(with_template, family, answer):
    messages = [TALK[0], {"role": "assistant", "content": ""}]
    assert answer in bracket(with_template(getattr(samples, family)), messages)


def test_a_default_system_prompt_is_no_answer(with_template):
    text = bracket(with_template(samples.QWEN25), TALK[:2])
    assert text.startswith("<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHi")
    assert text.endswith(f"assistant\n⟦{FIRST}<|im_end|>⟧\n")


def test_special_text_within_messages_does_not_end_an_answer(with_template):
    messages = [
        {"role": "user", "content": "a<|im_end|>b"},
        {"role": "assistant", "content": "a<|im_end|>b"},
        {"role": "user", "content": "<|im_start|>assistant\nno"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    assert bracket(with_template(CHATML), messages) == (
        "<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>b<|im_end|>⟧\n"
        "<|im_start|>user\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>assistant\n⟦<|im_end|><|im_end|>⟧\n"
    )


def test_a_token_over_the_start_of_an_answer_belongs_to_it(with_template):
    messages = [TALK[0], {"role": "assistant", "content": "the user"}]
    assert bracket(with_template(samples.PLAIN), messages) == "user: Hi\nassistant:⟦ the user⟧\n"


def test_a_conversation_may_open_with_the_assistant(with_template):
    messages = [{"role": "assistant", "content": "hello"}, TALK[0]]
    expected = "<|im_start|>assistant\n⟦hello<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n"
    assert bracket(with_template(CHATML), messages) == expected


def test_a_call_of_tools_is_an_answer(with_template):
    template = CHATML.replace(
        "m['content'] +", "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '') +"
    )
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    text = bracket(with_template(template), messages)
    assert text.endswith('<|im_start|>assistant\n⟦[{"name": "f"}]<|im_end|>⟧\n')


def test_a_template_may_change_case(with_template):
    capitals = with_template(samples.PLAIN.replace("m.content", "m.content | upper"))
    assert bracket(capitals, TALK[:2]) == "user: HI\nassistant: ⟦<THINK>HM</THINK>\n\nHELLO⟧\n"


def test_an_answer_that_the_template_does_not_show_is_an_error_with_its_number(with_template):
    questions = with_template(
        samples.PLAIN.replace("in messages", "in messages if m.role == 'user'")
    )
    with pytest.raises(ValueError, match="the answer of message 1 cannot be found") as error:
        encode_chat(questions, TALK)
    assert "\n" not in str(error.value)
    silent = [{**message, "train": False} for message in TALK if message["role"] == "assistant"]
    talk = [TALK[0], silent[0], TALK[2], silent[1]]
    assert bracket(questions, talk) == "user: Hi\nuser: more\n"


@pytest.mark.parametrize("expression", ["m.content | reverse", "m.content + m.content"])
def test_an_answer_that_cannot_be_told_apart_is_refused(with_template, expression):
    tokenizer = with_template(samples.PLAIN.replace("m.content", expression))
    with pytest.raises(ValueError, match="message 1") as error:
        encode_chat(tokenizer, TALK)
    assert "generation" in str(error.value)
    assert "\n" not in str(error.value)


def test_marks_of_the_template_win(with_template):
    template = samples.MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgen", "{{ m.content }}{% endgen"
    )
    assert bracket(with_template(template), TALK[:2]).endswith(f"assistant\n⟦{FIRST}⟧\n")


def test_marks_that_the_template_rewrites_are_refused(with_template):
    template = "{% set s %}{% generation %}x{% endgeneration %}{% endset %}{{ s | length }}"
    with pytest.raises(ValueError, match="generation blocks"):
        encode_chat(with_template(template), TALK)


WORDS = [*"ab \n{}%", "</think>", "<|im_end|>", "assistant", "é"]
CONTENT = st.lists(st.sampled_from(WORDS), max_size=9).map("".join)


@functools.cache  # compiling one takes longer than applying it
def template_of(family: str) -> ChatTemplate:
    return ChatTemplate(getattr(samples, family), TOKENS)


@pytest.mark.parametrize("family", ["CHATML", "LLAMA3", "GEMMA3", "DEEPSEEK_R1", "MARKED"])
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_answers_of_any_content_are_exact(family, contents):
    contents = contents[: len(contents) // 2 * 2]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    template = template_of(family)
    text, spans = template.find_answers(messages, ["<|im_end|>", "</s>"])
    seen = {
        "LLAMA3": lambda said: said.strip() + "<|im_end|>",
        "GEMMA3": lambda said: said.strip() + "<|im_end|>",
        "DEEPSEEK_R1": lambda said: said.split("</think>")[-1] + "</s>",
    }.get(family, lambda said: said + "<|im_end|>")
    assert [text[start:end] for start, end in spans] == [seen(said) for said in contents[1::2]]
    prompts = [template.apply(messages[:i], True) for i in range(1, len(messages), 2)]
    if family != "DEEPSEEK_R1":  # whose prompt ends with a <think> that it then drops
        assert [text[:start] for start, _ in spans] == prompts


def test_the_answer_ends_with_the_first_stop_token_else_the_last_special_one():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}<a>.<b>\n{% endfor %}")
    messages = [TALK[0], {"role": "assistant", "content": "x"}]

    def answer(*ends):
        text, [(start, end)] = template.find_answers(messages, *ends)
        return text[start:end]

    assert answer(["<b>", "<a>"], []) == "x<a>"
    assert answer([], ["<a>", "<b>"]) == "x<a>.<b>"
    assert answer([], []) == "x<a>.<b>"  # plain text that ends a turn, less the space after it


def test_templates_have_what_transformers_gives_them():
    loop = "{% if m.content == 'more' %}{% break %}{% endif %}{{ m.content }}|\n"
    given = "{{ tools is none }} {{ documents is none }} {{ {'a': '<é>'} | tojson }}"
    now = " {{ strftime_now('%Y') }} {{ date }}"
    text = f"{{% for m in messages %}}{loop}{{% endfor %}}{given}{now}"
    year = datetime.datetime.now().year
    assert ChatTemplate(text).apply(TALK[:1] + TALK[2:], date="today") == (
        f'Hi|\nTrue True {{"a": "<é>"}} {year} today'
    )


def test_content_in_parts_is_joined_unless_the_template_reads_parts():
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert ChatTemplate(CHATML).apply(messages) == "<|im_start|>user\n a b<|im_end|>\n"
    assert ChatTemplate(samples.GEMMA3).apply(messages) == "<|im_start|>user\nab<|im_end|>\n"


@pytest.mark.parametrize(("template", "words"), [
    ("{% for %}", "does not compile, line 1"),
    ("{% generation %}", "does not compile"),
    ("{{ messages[7].content + 'x' }}", "refuses"),
    ("{{ 'x' + messages }}", "refuses"),
    ("{{ 1 / 0 }}", "refuses"),
    ("{{ raise_exception('two\nlines') }}", "two lines"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "too big"),
])  # fmt: skip
def test_a_bad_template_is_one_line(template, words):
    with pytest.raises(ValueError, match=words) as error:
        ChatTemplate(template, source="some/folder").apply(TALK)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("some/folder: ")


def test_roles_out_of_order_are_refused_with_the_templates_words():
    with pytest.raises(ValueError, match="roles must alternate; check the order") as error:
        ChatTemplate(samples.GEMMA3, TOKENS).apply([TALK[0], TALK[0]])
    assert "\n" not in str(error.value)


def test_no_template_is_an_error_with_the_remedy(tmp_path):
    train_byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no chat template; .*chat_template\.jinja") as error:
        encode_chat(Tokenizer.from_folder(tmp_path), TALK)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("messages", "words"), [
    ([], "needs a message"),
    ("Hi", "list of messages, got str"),
    ({"role": "user", "content": "Hi"}, "list of messages, got dict"),
    (["Hi"], "message 0 is str"),
    ([TALK[0], {"role": "assistant"}], "message 1 lacks content"),
    ([{}], "lacks role and content"),
    ([{"role": "asistant", "content": ""}], "did you mean assistant"),
    ([{"role": "model", "content": ""}], "did you mean assistant"),
    ([{"role": None, "content": ""}], "role None"),
    ([{"role": ["user"], "content": ""}], "did you mean"),
    ([{"role": "user", "content": 5}], "content 5; give a string"),
    ([{"role": "user", "content": None}], "content None"),
    ([{"role": "user", "content": []}], "give a string"),
    ([{"role": "user", "content": ["Hi"]}], "part 'Hi'"),
    ([{"role": "user", "content": [{"type": "image"}]}], "part 'image'; this model reads"),
    ([{"role": "user", "content": [{"type": "text"}]}], "text part without text"),
    ([{"role": "user", "content": "Hi", "image": open}], "plain JSON values"),
], ids=lambda value: ascii(value)[:40])  # fmt: skip
def test_malformed_messages_are_named_in_one_line(messages, words):
    with pytest.raises(ValueError, match=words) as error:
        ChatTemplate(CHATML).apply(messages)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "bot"]) | JSON,
        "content": JSON,
        "x": JSON,
    },
)


@settings(max_examples=100, deadline=None)
@given(messages=st.lists(MESSAGE | JSON, max_size=3) | JSON)
def test_no_messages_escape_as_another_error(messages):
    for family in ("CHATML", "GEMMA3"):
        message = refusal(template_of(family).find_answers, messages)
        assert message is None or "\n" not in message


def test_a_variable_named_generation_marks_nothing(with_template):
    template = CHATML + "{% set generation = 1 %}"
    assert bracket(with_template(template), TALK[:2]).endswith(f"assistant\n⟦{FIRST}<|im_end|>⟧\n")


def test_variables_must_be_plain_values():
    with pytest.raises(ValueError, match="there is a builtin_function_or_method"):
        ChatTemplate(CHATML).apply(TALK, tools=[print])


def test_a_tokenizer_with_its_template_goes_to_other_processes(with_template):
    tokenizer = with_template(CHATML)
    expected = encode_chat(tokenizer, TALK)
    assert encode_chat(pickle.loads(pickle.dumps(tokenizer)), TALK) == expected
