"""Strings, small tokenizers and short chat templates that the tests of text share."""

import io
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmprep_jax.text import Tokenizer, encode_chat

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TRICKY = (
    *("", " ", "  ", "\n", "\t\tx\r\n", "Hello world", " Hello", "Hello  world ", "   leading"),
    *(
        "x =  5",
        "2024 12345 1,000.5",
        "a\n\n\nb\n",
        "don't DON'T I'LL",
        "aaaaaaaaaaaaaaa",
        "thethe",
    ),
    *(
        "你好\uff0c世界 2024",
        "日本語テキスト",
        "한국어",
        "e\u0301 é Å ﬁ",
        "\u00a0wide\u3000\ufeff",
        "\x00\x01",
    ),
    *("😀👨‍👩‍👧 🇺🇸", "ǅ ß İ", "▁▁x a▁b", "<s>a</s> b", "<unk> <0x41>", "<|im_start|>x<|im_end|>\n"),
    *("<start_of_turn>user\nhi<end_of_turn>", "    def f(x):\n        return x**2\n", "\"\"\"'''"),
)

CORPUS = (
    "The theatre of the mind is the other theatre; the rest is 2024 numbers, 1999 more.",
    "def f(x):\n    return x**2 + 1  # squares\n\n\nclass A:\n    pass\n",
    "You are a helpful assistant. You answer the user, and the user answers you.",
    "Der Straße nach, don't stop: I'll be there at 10:45, won't I? Yes, you'll be.",
    "system user assistant model think answer question hello there general hi how are you",
)

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIALS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|header|>", "<think>")

CHATML = """
{%- for m in messages -%}
<|im_start|>{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
# Each of the following does, in few words, what is peculiar to the family's own template.
QWEN25 = (
    """
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif -%}
""".strip()
    + CHATML.strip()
)
LLAMA3 = """
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|header|>' + m.role + '<|header|>\n\n' + m.content | trim + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|header|>\n\n' }}{% endif -%}
"""
GEMMA3 = """
{{- bos_token -}}
{%- set first = '' -%}
{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate') }}
{%- endif -%}
<|im_start|>{{ ('model' if m.role == 'assistant' else m.role) + '\n' }}{{ first if loop.first }}
{%- if m.content is string %}{{ m.content | trim }}
{%- else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif -%}
"""
DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif -%}
{%- if m.role == 'assistant' -%}
{%- set said = m.content -%}
{%- if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif -%}
<|header|>{{ said }}</s>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|header|><think>\n' }}{% endif -%}
"""
QWEN3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set said, thought = m.content, '' -%}
{%- if '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
<|im_start|>{{ m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{ '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif -%}
{{ said + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
# No generation prompt, and the system message goes before the last question.
MISTRAL = """
{{- bos_token -}}
{%- set system = messages[0].content + '\n' if messages[0].role == 'system' else '' -%}
{%- for m in messages if m.role != 'system' -%}
{%- if m.role == 'user' -%}
[INST] {{ system if loop.index >= loop.length - 1 }}{{ m.content }} [/INST]
{%- else %}{{ ' ' + m.content + ' </s>' }}{% endif -%}
{%- endfor -%}
"""
# No special token at all.
PLAIN = """
{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif -%}
"""
MARKED = """
{%- for m in messages -%}
<|im_start|>{{ m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>{% endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
# DeepSeek-R1's own tokens, and its template as first released and as it is since February 2025.
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
_R1 = """
{{- bos_token -}}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{{ 'USER' + m.content }}{% endif -%}
{%- if m.role == 'assistant' -%}
{{ 'ASSISTANT' + m.content.split('</think>')[-1] + 'EOS' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT' + opening }}{% endif -%}
"""
_R1 = _R1.replace("USER", USER).replace("ASSISTANT", ASSISTANT).replace("EOS", EOS)
R1 = {
    "first": _R1.replace("opening", "''"),
    "later": _R1.replace("opening", "'<think>\\n'"),
}


def train_byte_level(specials: tuple[str, ...] = SPECIALS, cut=None) -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 tokens and `specials`, cut by `cut` (GPT-2's pattern if None)."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(specials), special_tokens=list(specials), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(CORPUS, trainer)
    return core


def write_r1(folder: Path, template: str, tags_are_special: bool = False) -> Path:
    """Writes a small tokenizer with R1's tokens into `folder`; its tags are plain added tokens."""
    core = train_byte_level(specials=())
    core.add_special_tokens([BOS, EOS])
    for text in (USER, ASSISTANT, "<think>", "</think>"):
        is_special = tags_are_special and "think" in text
        token = tokenizers.AddedToken(text, normalized=False, special=is_special)
        core.add_special_tokens([token]) if is_special else core.add_tokens([token])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sentencepiece(folder: Path, **options) -> Path:
    """Writes a small tokenizer.model into `folder` and returns its path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS).split("\n")),
        model_writer=model, hard_vocab_limit=False, minloglevel=2, **{"vocab_size": 450} | options,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


LLAMA_SPM = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True,
}  # fmt: skip
GEMMA_SPM = LLAMA_SPM | {
    "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
    "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁"],
}  # fmt: skip


def write_gguf(path: Path, architecture: str, model: str, tokens, kinds, **fields) -> Path:
    """Writes a GGUF that holds only a tokenizer; `fields` go under tokenizer.ggml."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    for name, value in fields.items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, core: tokenizers.Tokenizer, pre: str, **fields) -> Path:
    vocab, model = core.get_vocab(), json.loads(core.to_str())["model"]
    tokens = sorted(vocab, key=vocab.get)
    kinds = [CONTROL if token in SPECIALS[:-1] else NORMAL for token in tokens]
    kinds[vocab[SPECIALS[-1]]] = USER_DEFINED
    return write_gguf(
        path, "llama", "gpt2", tokens, kinds, pre=pre,
        merges=[" ".join(pair) for pair in model["merges"]], **fields,
    )  # fmt: skip


def write_spm(path: Path, model: Path, architecture: str, **fields) -> Path:
    pieces = sentencepiece.SentencePieceProcessor(str(model))
    ids = range(pieces.get_piece_size())
    symbols = GEMMA_SPM["user_defined_symbols"] if architecture == "gemma3" else ()
    kinds = [
        UNKNOWN if pieces.is_unknown(i) else CONTROL if pieces.is_control(i)
        else BYTE if pieces.is_byte(i)
        else USER_DEFINED if pieces.id_to_piece(i) in symbols else NORMAL
        for i in ids
    ]  # fmt: skip
    tokens = [
        text.replace("▁", " ") if kind == USER_DEFINED else text  # as llama.cpp's converter does
        for text, kind in zip(map(pieces.id_to_piece, ids), kinds, strict=True)
    ]
    scores = [float(pieces.get_score(i)) for i in ids]
    return write_gguf(path, architecture, "llama", tokens, kinds, scores=scores, **fields)


def refusal(call: Callable, *args) -> str | None:
    """The message of the ValueError that a call raises; None when it raises none."""
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return None


def bracket(tokenizer: Tokenizer, messages: list[dict], **variables) -> str:
    """The conversation as tokens give it back, answers in ⟦⟧."""
    ids, mask = encode_chat(tokenizer, messages, **variables)
    assert ids == tokenizer.encode(tokenizer.chat.apply(messages, **variables), add_special=False)
    text = ""
    for is_answer, run in groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([i for _, i in run], skip_special=False)
        text += f"⟦{piece}⟧" if is_answer else piece
    return text


def make_inputs(folder: Path, config: str) -> None:
    """Fills a folder with config.py, a tokenizer and text."""
    (folder / "config.py").write_text(config)
    (folder / "tokenizer").mkdir()
    train_byte_level().save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "text").mkdir()
    lines = [f"{i}: {line}" for i in range(20) for line in CORPUS]
    (folder / "text" / "a.txt").write_text("\n\n".join(lines))
