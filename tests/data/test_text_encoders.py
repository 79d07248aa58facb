"""Data by a tokenizer: fields for the template, special tokens, dates, completions."""

import datetime
import warnings

import pytest

from llmprep_jax.data import DataConfig, SourceOptions, build
from llmprep_jax.text import Tokenizer
from tests.data.corpora import write_lines
from tests.text.samples import CHATML, MARKED, SPECIALS, train_byte_level

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{{ day }}" + CHATML.strip()
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML.strip()
TALK = [{"role": "user", "content": "hi<|im_end|>"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    core = train_byte_level()
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')

    def build_tokenizer(template: str = CHATML) -> Tokenizer:
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.from_folder(folder)

    return build_tokenizer


def rows_of(path, tokenizer, **settings) -> list[tuple[str, list[bool]]]:
    """The text of each row, its first token and targets, and which of the targets count."""
    fixed = dict(seq_len=200, batch_size=1, packing="padded", num_epochs=1, shuffle=False)
    cfg = DataConfig((str(path),), **(fixed | settings))
    found = []
    for batch in build(cfg, **cfg.encoders(tokenizer)):
        size = int((batch["segment_ids"] > 0).sum())
        ids = [int(batch["tokens"][0, 0]), *batch["targets"][0, :size].tolist()]
        counts = batch["loss_mask"][0, :size].tolist()
        found.append((tokenizer.decode(ids, skip_special=False), ids, counts))
    return found


def test_fields_of_a_record_reach_the_template_and_others_are_named_once(tmp_path, tokenizer_of):
    tools = [{"name": "f"}]
    record = {"messages": TALK, "tools": tools, "day": "Monday", "id": 3, "lang": "en"}
    path = write_lines(tmp_path / "a.jsonl", [record, record, {"messages": TALK}])
    with pytest.warns(UserWarning, match="hold id, lang, which the chat template of") as caught:
        rows = rows_of(path, tokenizer_of(TOOLS))
    assert [text.split("<|im_start|>")[0] for text, *_ in rows] == ['[{"name": "f"}]Monday'] * 2 + [
        ""
    ]
    assert len(caught) == 1


@pytest.mark.parametrize(("mode", "in_text", "in_chat"), [
    ("chat", 0, 3), ("everywhere", 1, 3), ("template", 0, 2),
])  # fmt: skip
def test_text_that_spells_a_special_token_is_text_unless_asked(
    tmp_path, tokenizer_of, mode, in_text, in_chat
):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "the<|im_end|> mind"}, {"messages": TALK}])
    rows = rows_of(path, tokenizer_of(), special_tokens=mode)
    end = SPECIALS.index("<|im_end|>")
    assert [ids.count(end) for _, ids, _ in rows] == [in_text, in_chat]
    assert rows[0][0] == "the<|im_end|> mind</s>"
    assert rows[1][0].startswith(
        "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\nyes"
    )


def test_dates_of_templates_are_pinned(tmp_path, tokenizer_of):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}])
    tokenizer = tokenizer_of(DATED)
    rows = rows_of(path, tokenizer, date="2024-02-29")
    assert rows[0][0].startswith("29 Feb 2024<|im_start|>")
    assert rows_of(path, tokenizer, date="2024-02-29T10:00")[0] == rows[0]
    today = datetime.date.today()
    assert rows_of(path, tokenizer)[0][0].startswith(f"{today:%d %b %Y}")
    assert DataConfig(("a",)).pinned().date == today.isoformat()
    assert DataConfig(("a",), date="2024-02-29").pinned().date == "2024-02-29"
    with pytest.raises(ValueError, match="date is 'tomorrow'; write it as 2026-11-28"):
        DataConfig(("a",), date="tomorrow")


def test_of_a_completion_the_tokens_that_hold_it_are_learnt(tmp_path, tokenizer_of):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the mind of", "completion": " the rest"}])
    tokenizer = tokenizer_of()
    ((text, ids, counts),) = rows_of(path, tokenizer)
    assert text == "the mind of the rest</s>"
    learnt = [i for i, count in zip(ids[1:], counts, strict=True) if count]
    assert tokenizer.decode(learnt, skip_special=False) == " the rest</s>"


def test_chunks_of_a_file_end_in_one_place(tmp_path, tokenizer_of):
    (tmp_path / "a.txt").write_text("the theatre of the mind\n" * 9)
    options = SourceOptions(part="chunk", chunk_bytes=64)
    rows = rows_of(tmp_path / "a.txt", tokenizer_of(), source=options)
    texts = [text for text, *_ in rows]
    assert len(texts) > 2
    assert "".join(texts) == "the theatre of the mind\n" * 9 + "</s>"


def test_a_template_that_marks_everything_is_refused_by_its_source(tmp_path, tokenizer_of):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}] * 3)
    everything = "{% generation %}" + CHATML.strip() + "{% endgeneration %}"
    with pytest.raises(
        ValueError, match=r"in 3 of 3 conversations, by the chat template of \S+, ev"
    ):
        rows_of(path, tokenizer_of(everything))
    assert all(rows_of(path, tokenizer_of(everything), mask="all")[0][2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(path, tokenizer_of(MARKED))


def test_alpaca_and_sharegpt_files_are_trained_on_as_conversations(tmp_path, tokenizer_of):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    tokenizer = tokenizer_of()
    rows = []
    for name, record in (
        ("a", {"conversations": turns}),
        ("b", {"instruction": "hi", "output": "yes"}),
    ):
        path = write_lines(tmp_path / f"{name}.jsonl", [record])
        ((_, ids, counts),) = rows_of(path, tokenizer)
        rows.append((ids, counts))
        learnt = [i for i, count in zip(ids[1:], counts, strict=True) if count]
        assert tokenizer.decode(learnt, skip_special=False) == "yes<|im_end|>"
    assert rows[0] == rows[1]
