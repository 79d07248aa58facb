"""Generated documents: what they say is consistent, what is drawn lies where it is said to lie."""

import dataclasses
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from llmprep_jax.data.synthetic_documents import KINDS, Settings, fonts, generate
from llmprep_jax.data.synthetic_documents.content import asks_of_side
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.fonts import find_families
from llmprep_jax.data.synthetic_documents.kinds import MODULES
from llmprep_jax.data.synthetic_documents.kinds.chart import nice_step
from llmprep_jax.data.synthetic_documents.lexicon import LANGUAGES, say
from llmprep_jax.data.synthetic_documents.page import Page
from tests.grids import cases

SHIPPED = ("Aileron",)  # in Pillow, so on every machine
WRITTEN = tuple(language for language in LANGUAGES if fonts.families_by_language(()).get(language))
ENCODINGS = {"zh-Hans": "gb2312", "zh-Hant": "big5"}
PLAIN = dict(noise=0.0, blur=0.0, color=False)


def contents(kind: str, language: str, level: str = "plain", count: int = 40):
    return [MODULES[kind].compose(Dice("test", kind, i), language, level) for i in range(count)]


def statement(document) -> str:
    questions = [(q.text, q.answers, q.boxes) for q in document.questions]
    words = [(word.text, word.box) for word in document.words]
    text = json.dumps([document.text, words, questions])
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@pytest.mark.parametrize(("level", "hashes"), [
    ("tiny", "2b6142d4594d a5ed78baaca2 271f708e2648 e62cb5c3b94f a7ac5497bc41 e53407df77bf"),
    ("plain", "a6cb3327eebe 8e2051bb2b10 0fcf5ac2cf80 cd5ec792f025 4aaa2d542f79 376702567921"),
], ids=["tiny", "plain"])  # fmt: skip
def test_a_seed_and_an_index_give_one_text_with_one_set_of_boxes(level, hashes):
    settings = Settings(language=("en",), level=level, fonts=SHIPPED)
    assert " ".join(statement(generate(settings, i)) for i in range(6)) == hashes


def test_other_seeds_give_other_documents():
    texts = {generate(Settings(seed=seed, fonts=SHIPPED), 0).text for seed in range(3)}
    assert len(texts) == 3


def test_the_look_does_not_change_what_a_document_says():
    plain, blurred = (Settings(fonts=SHIPPED, noise=n, blur=b) for n, b in ((0.0, 0.0), (9.0, 2.0)))
    assert statement(generate(plain, 3)) == statement(generate(blurred, 3))


def test_kinds_and_languages_come_in_turn():
    settings = Settings(kind=("menu", "sign"), language=("zh-Hant", "en"))
    turns = [(settings.kind_of(i), settings.language_of(i)) for i in range(5)]
    assert turns == [("menu", "zh-Hant"), ("sign", "zh-Hant"), ("menu", "en"), ("sign", "en"),
                     ("menu", "zh-Hant")]  # fmt: skip


def number(text: str) -> int:
    """A sum of money in its smallest unit."""
    return int(re.sub(r"[^\d]", "", text))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("level", ["tiny", "plain", "varied"])
def test_receipts_add_up(level, language):
    for content in contents("receipt", language, level):
        values = {name: fact.text for name, fact in content.values.items()}
        rows = content.more["rows"]
        amounts = [number(values[f"amount{i}"]) for i, _ in rows]
        prices = [number(values[f"price{i}"]) * count for i, count in rows]
        assert amounts == prices
        known = {name: number(text) for name, text in values.items() if name in (
            "subtotal", "discount", "tax", "total", "paid", "change")}  # fmt: skip
        assert known.get("subtotal", known["total"]) == sum(amounts)
        total = sum(amounts) - known.get("discount", 0) + known.get("tax", 0)
        assert known["total"] == total
        assert known.get("paid", total) - known.get("change", 0) == total


@pytest.mark.parametrize("language", LANGUAGES)
def test_totals_of_tables_and_shares_of_pies_add_up(language):
    seen = set()
    for content in contents("table", language, count=60):
        values = {name: fact.text for name, fact in content.values.items()}
        rows, width = range(content.more["rows"]), len(content.more["columns"])
        cells = [[values[f"r{r}c{c}"] for c in range(width)] for r in rows]
        if "sum" in values:
            seen.add("stock")
            assert number(values["sum"]) == sum(number(row[3]) for row in cells)
            assert all(number(row[1]) * number(row[2]) == number(row[3]) for row in cells)
        if width == 5:
            seen.add("marks")
            assert all(sum(map(int, row[1:4])) == int(row[4]) for row in cells)
    for content in contents("chart", language):
        if content.more["form"] == "pie":
            seen.add("pie")
            assert sum(content.more["numbers"]) == 100
    assert seen == {"stock", "marks", "pie"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_comparisons_name_what_is_largest_and_smallest(language):
    asked = 0
    for content in contents("chart", language):
        numbers = content.more["numbers"]
        for ask in content.asks:
            if ask.category == "compare":
                asked += 1
                at = int(ask.fields[0].removeprefix("name"))
                is_least = any(word in ask.text for word in ("lowest", "最小", "最低"))
                assert numbers[at] == (min if is_least else max)(numbers)
    assert asked == 80


def test_a_line_of_a_letter_states_days_after_its_own():
    for content in contents("letter", "zh-Hans"):
        values = {name: fact.text for name, fact in content.values.items()}
        days = {
            name: tuple(map(int, re.findall(r"\d+", text)))
            for name, text in values.items()
            if re.fullmatch(r"\d+年\d+月\d+日", text)
        }
        assert len(days) >= 2
        assert all(day > days["date"] for name, day in days.items() if name != "date")


@pytest.mark.parametrize("language", list(ENCODINGS))
@pytest.mark.parametrize("level", ["tiny", "plain", "varied"])
def test_chinese_is_written_in_one_script(language, level):
    for kind in KINDS:
        for content in contents(kind, language, level, 25):
            texts = [fact.text for fact in content.values.values()]
            texts += [text for ask in content.asks for text in (ask.text, *ask.answers)]
            chinese = "".join(re.findall(r"[\u2e80-\uffef]", "".join(texts)))
            assert chinese.encode(ENCODINGS[language]).decode(ENCODINGS[language]) == chinese


def test_simplified_and_traditional_readers_ask_for_the_same_things():
    for kind in KINDS:
        three = [contents(kind, language, "tiny", 1)[0] for language in LANGUAGES]
        assert len({tuple(content.values) for content in three}) == 1 or kind in ("menu", "sign")
        assert all(content.asks for content in three)


@pytest.fixture
def pages(monkeypatch):
    """The pages of the documents that are generated, which are not drawn."""
    pages = []
    blank = Image.new("RGB", (10, 10))
    monkeypatch.setattr(Page, "draw", lambda page, scale: pages.append(page) or blank)
    return pages


def sides(settings: Settings, count: int):
    """Questions with their answers, and pages, of both sides."""
    pairs, pages = ({"train": set(), "heldout": set()} for _ in range(2))
    for i in range(count):
        document = generate(settings, i)
        pages[document.split].add(document.text)
        pairs[document.split] |= {(q.text, q.answers[0]) for q in document.questions}
    return pairs, pages


@pytest.mark.parametrize(("kind", "level", "count"), cases(
    [*itertools.product(KINDS, ("tiny", "plain"), (150,)), ("receipt", "tiny", 80),
     ("sign", "tiny", 80)],
    fast=[("receipt", "tiny", 80), ("sign", "tiny", 80)],
))  # fmt: skip
@pytest.mark.usefixtures("pages")
def test_no_question_with_its_answer_and_no_page_is_on_both_sides(kind, level, count):
    first, second = (
        Settings(kind=(kind,), language=("en",), level=level, fonts=SHIPPED, seed=seed)
        for seed in (0, 1)
    )
    (pairs, texts), (others, other_texts) = sides(first, count), sides(second, count)
    assert len(pairs["heldout"]) >= count / 20
    for train, held in itertools.product((pairs, others), (pairs, others)):
        assert not train["train"] & held["heldout"]
    for train, held in itertools.product((texts, other_texts), (texts, other_texts)):
        assert not train["train"] & held["heldout"]


def test_a_page_and_its_questions_lie_on_one_side():
    shares = []
    for content in contents("table", "en", count=80):
        train, held = (asks_of_side(content, split, 0.25) for split in ("train", "heldout"))
        assert not (train and held)
        assert len(train) + len(held) < len(content.asks)
        shares.append(bool(held))
        assert asks_of_side(content, "train", 0.0) == list(content.asks)
    assert np.mean(shares) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(("holdout", "held"), [
    (0.1, [9, 19]), (0.25, [3, 7, 11, 15, 19]), (0.0, []), (0.3, [3, 6, 9, 13, 16, 19]),
])  # fmt: skip
def test_held_out_documents_lie_evenly_among_the_others(holdout, held):
    settings = Settings(holdout=holdout)
    assert [i for i in range(20) if settings.split_of(i) == "heldout"] == held


def test_no_more_is_asked_than_was_wanted():
    settings = Settings(questions=2, kind=("menu",), language=("en",), fonts=SHIPPED)
    assert len(generate(settings, 0).questions) == 2


@pytest.fixture
def texts_alone(monkeypatch):
    """Pages are drawn without their shapes and all text in black: all ink is text."""
    draw = Page.draw

    def draw_texts(page, scale):
        page.items = [dataclasses.replace(text, color=(0, 0, 0)) for text in page.texts()]
        page.paper = (255, 255, 255)
        return draw(page, scale)

    monkeypatch.setattr(Page, "draw", draw_texts)


def check_ink(document, slack: int = 1) -> None:
    """All ink lies in words' boxes, and every box holds ink up to its edges."""
    ink = np.asarray(document.image.convert("L")) < 150
    inside = np.zeros_like(ink)
    for word in document.words:
        left, top, right, bottom = word.box
        inside[max(top - slack, 0) : bottom + slack, max(left - slack, 0) : right + slack] = True
        there = np.argwhere(ink[top:bottom, left:right])
        assert len(there), word
        low, high = there.min(0), there.max(0) + 1
        height, width = bottom - top, right - left
        if min(height, width) >= 6:  # thin strokes are grey
            assert low.max() <= 2 + 0.1 * height, word
            assert high[0] >= height - 2 - 0.1 * height, word
            assert high[1] >= width - 2 - 0.1 * height, word
    assert not (ink & ~inside).any()


@pytest.mark.parametrize(("kind", "level"), cases(
    [*itertools.product(KINDS, ("tiny", "plain", "varied"))],
    fast=[("receipt", "tiny"), ("letter", "plain"), ("chart", "plain"), ("table", "varied")],
))  # fmt: skip
def test_ink_lies_in_the_boxes_of_words(texts_alone, kind, level):
    settings = Settings(kind=(kind,), language=("en",), level=level, fonts=SHIPPED, rotation=0.0,
                        **PLAIN)  # fmt: skip
    for i in range(3):
        check_ink(generate(settings, i))


@pytest.mark.parametrize("language", WRITTEN)
def test_boxes_of_every_font_that_is_found_hold_its_ink(texts_alone, language):
    for family in find_families(language):
        wanted = (family.name,)
        settings = Settings(kind=("sign",), language=(language,), fonts=wanted, **PLAIN)
        check_ink(generate(settings, 1), slack=2)


@pytest.mark.parametrize(("rotation", "kind"), [(12.0, "letter"), (None, "menu"), (30.0, "table")])
def test_boxes_turn_with_the_page(texts_alone, rotation, kind):
    settings = Settings(kind=(kind,), language=("en",), level="varied", fonts=SHIPPED,
                        rotation=rotation, **PLAIN)  # fmt: skip
    document = generate(settings, 1)
    ink = np.asarray(document.image.convert("L")) < 150
    inside = np.zeros_like(ink)
    for word in document.words:
        left, top, right, bottom = word.box
        inside[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
        assert ink[top:bottom, left:right].any(), word
    assert not (ink & ~inside).any()
    # the hulls of turned words are no cover of the whole page
    assert inside.mean() < 0.35


@pytest.mark.parametrize(("kind", "level"), cases(
    [*itertools.product(KINDS, ("tiny", "plain", "varied"))],
    fast=[(kind, "tiny") for kind in KINDS] + [("letter", "plain"), ("menu", "varied")],
))  # fmt: skip
def test_answers_are_what_stands_in_their_boxes(kind, level):
    width = None if level == "tiny" else 500
    settings = Settings(kind=(kind,), language=WRITTEN, level=level, rotation=0.0, width=width,
                        **PLAIN)  # fmt: skip
    answered = 0
    for i in range(6):
        document = generate(settings, i)
        for question in document.questions:
            if not question.boxes:
                assert question.category in ("count", "compute", "see")
                continue
            words = [word.text for word in document.words if any(
                meets(word.box, box) for box in question.boxes)]  # fmt: skip
            answered += 1
            assert plain(question.answers[0]) in plain("".join(words)), question
    assert answered >= 6


def meets(word, box) -> bool:
    """Whether the middle of a word lies in a box."""
    x, y = (word[0] + word[2]) / 2, (word[1] + word[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def plain(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(("kind", "level"), cases(
    [*itertools.product(KINDS, ("tiny", "plain", "varied"))],
    fast=[(kind, "plain") for kind in KINDS] + [("receipt", "tiny"), ("menu", "tiny")],
))  # fmt: skip
def test_words_of_two_lines_do_not_overlap_and_none_is_cut_off(kind, level, pages):
    settings = Settings(kind=(kind,), language=WRITTEN, level=level, seed=5)
    for i in range(6):
        generate(settings, i)
    assert len(pages) == 6
    for page in pages:
        texts = page.texts()
        boxes = np.array([text.box(0, len(text.text)) for text in texts])
        assert (boxes[:, :2] > 0).all()
        assert (boxes[:, 2:] < (page.width, page.height)).all()
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        overlap = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - low
        both = np.triu((overlap > 0.5).all(-1), 1)
        assert not both.any(), [(texts[a].text, texts[b].text) for a, b in np.argwhere(both)]


@pytest.mark.parametrize("language", WRITTEN)
def test_fonts_have_every_character(language):
    texts = {
        character
        for kind in KINDS
        for level in ("tiny", "varied")
        for content in contents(kind, language, level, 30)
        for fact in content.values.values()
        for character in fact.text
    }
    for family in find_families(language):
        for face in {family.regular, family.bold}:
            font = face.at(14.0)
            lacking = bytes(font.getmask("\U0010fffe"))
            missing = [c for c in texts if c.strip() and bytes(font.getmask(c)) == lacking]
            assert not missing, (family.name, missing)


@pytest.mark.parametrize("width", [64, 96, 128])
def test_tiny_pages_are_small_squares_of_few_words(width):
    settings = Settings(level="tiny", language=("en",), fonts=SHIPPED, width=width)
    for i in range(12):
        document = generate(settings, i)
        assert document.image.size == (width, width)
        assert 1 <= len(document.words) <= 12
        assert set(np.unique(np.asarray(document.image).std(-1))) == {0.0}  # no colours


def test_the_width_is_that_asked_for_though_the_paper_lies_slanted():
    settings = Settings(level="varied", width=500, language=("en",), fonts=SHIPPED)
    for i in range(6):
        assert generate(settings, i).image.width == 500


def test_noise_is_of_the_size_asked_for():
    settings = Settings(kind=("letter",), language=("en",), fonts=SHIPPED, color=False)
    clean, noisy = (
        np.asarray(generate(dataclasses.replace(settings, noise=n), 0).image, float)
        for n in (0.0, 10.0)
    )
    ink = clean == clean.min()  # white is cut at 255
    assert np.std((noisy - clean)[ink]) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(("parts", "width", "lines"), [
    ("one two three", 7.5, ["one two", "three"]),
    ("一二三四。五", 4.2, ["一二三", "四。五"]),  # no stop begins a line
    ("一二三「四」", 4.2, ["一二三", "「四」"]),  # nor does a bracket end one
    ([("to ", None), ("Anna Lee", "to")], 6.5, ["to", "Anna", "Lee"]),
])  # fmt: skip
def test_lines_break_where_readers_break_them(parts, width, lines):
    face = Letters("")
    page = Page(100, face, face, (0, 0, 0), (255, 255, 255))
    end = page.paragraph(0, 0, width, parts, 1.0)
    assert page.lines().split("\n") == lines
    assert end == pytest.approx(1.36 * len(lines))
    if not isinstance(parts, str):
        assert len(page.field_boxes()["to"]) == 2


class Letters(fonts.Face):
    """A face whose letters are all one wide."""

    def advance(self, text):
        return float(len(text))

    def ink(self, text):
        return 0.0, -0.7, float(len(text)), 0.0


def test_a_text_without_room_is_made_smaller():
    face = Letters("")
    page = Page(100, face, face, (0, 0, 0), (255, 255, 255))
    assert page.text(50, 0, "0123456789", 2.0, align="right", room=10) == 10
    (text,) = page.texts()
    assert (text.x, text.size) == (40, 1.0)


def test_columns_of_characters_are_one_text_with_one_box():
    face = Letters("")
    page = Page(100, face, face, (0, 0, 0), (255, 255, 255))
    page.vertical(50, 0, [("茶館", "shop")], 10)
    assert page.lines() == "茶館"
    ((left, top, right, bottom),) = page.field_boxes()["shop"]
    assert (left, right) == (45, 55)
    assert bottom - top == pytest.approx(7 + 11.2)


@pytest.mark.parametrize(("high", "step"), [(9, 2), (40, 10), (99, 20), (480, 100), (26, 10)])
def test_axes_count_in_round_steps(high, step):
    assert nice_step(high) == step


def test_grounded_answers_hold_the_boxes_of_the_question():
    settings = Settings(kind=("menu",), language=("en",), fonts=SHIPPED, grounding=True)
    document = generate(settings, 0)
    width, height = document.image.size
    grounded = [question for question in document.questions if question.boxes]
    for question in grounded:
        assert question.text.startswith("<|grounding|>")
        found = json.loads(re.search(r"<\|det\|>(.*)<\|/det\|>", question.response)[1])
        back = np.array(found) / 999 * [width, height, width, height]
        assert back == pytest.approx(np.array(question.boxes), abs=1)
        assert f"<|ref|>{question.answers[0]}<|/ref|>" in question.response
    assert grounded


def test_all_the_text_can_be_asked_for():
    settings = Settings(kind=("sign",), language=("en",), fonts=SHIPPED, transcribe=True)
    document = generate(settings, 0)
    assert document.questions[-1].answers == (document.text,)
    assert plain(document.text) == "".join(word.text for word in document.words)


def test_a_missing_font_is_one_line_with_the_package(monkeypatch):
    monkeypatch.setattr(fonts, "_files", dict)
    with pytest.raises(ValueError, match=r"^no font for language zh-Hant .*fonts-noto-cjk"):
        find_families("zh-Hant")
    assert [family.name for family in find_families("en")] == ["Aileron"]
    with pytest.raises(ValueError, match=r"^no font Lato is installed; apt-get install fonts-lato"):
        find_families("en", ("Lato",))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(kind=()), "kind is empty"),
    (dict(width=10), "width=10; give 48 to 8192"),
    (dict(questions=0), "questions=0; give 1"),
    (dict(holdout=0.8), "holdout=0.8; give a share from 0 to 0.5"),
    (dict(rotation=90.0), "rotation=90.0; give a number from 0 to 45"),
    (dict(noise=float("nan")), "Settings.noise: wanted a number or none, not nan"),
], ids=range(6))  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Settings(**changes)


@pytest.mark.parametrize("name", ["no.ttf", __file__])
def test_a_font_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}"):
        generate(Settings(language=("en",), fonts=(name,)), 0)


def test_documents_are_counted_from_0():
    with pytest.raises(ValueError, match="index=-1; documents are counted from 0"):
        generate(Settings(), -1)


def test_words_have_a_form_in_every_language():
    assert say(("a", "b", "c"), "zh-Hant") == "c"
    for module in MODULES.values():
        for name, trio in module.PHRASES.items():
            assert len({text.count("|") for text in trio}) == 1, name
            fields = [sorted(set(re.findall(r"\{(\w+)\}", text))) for text in trio]
            assert fields[0] == fields[1] == fields[2], name
