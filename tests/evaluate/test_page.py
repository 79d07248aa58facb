"""The page of worst cases: read back by a parser, as a browser would."""

import base64
import html.parser
import io

import pytest
from PIL import Image

from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate.page import Example, render, thumbnail, write_page
from llmprep_jax.evaluate.tasks import score

EVIL = '<script>alert("x")</script> & \'quote\' "><img src=http://x.example/y.png>'
VOID = {"meta", "img", "br", "link"}


class Reader(html.parser.HTMLParser):
    """Collects elements with their attributes, and text by the class or name of what holds it."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, "elements are left open"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class", tag)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1][1], data))

    def of(self, holder: str) -> list[str]:
        return [text for name, text in self.texts if name == holder]

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for element, attrs in self.elements if element == tag]


def example(score, **fields):
    defaults = {"question": "What?", "answers": ["a"], "prediction": "b"}
    return Example(**defaults | fields, score=score)


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_picture_is_shown_from_where_a_document_has_it(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    images = [Ref(str(tmp_path), name) for name in ("a.png", "b.png")]
    page = Reader(render([example(0.0, images=images)], title="t"))
    assert page.attributes("img", "alt") == ["a.png"]
    assert decoded(*page.attributes("img", "src")).size == (30, 20)
    (fault,) = [text for text in page.of("none") if "not shown" in text]
    assert "b.png" in fault


def test_the_worst_come_first_and_the_rest_are_left_out():
    scores = [0.5, 0.0, 1.0, 0.25, 0.0]
    examples = [example(s, prediction=f"said {i}") for i, s in enumerate(scores)]
    page = Reader(render(examples, title="t", count=3))
    assert page.of("prediction") == ["said 1", "said 4", "said 3"]
    assert page.of("h2") == ["question 1", "question 4", "question 3"]
    assert page.of("score wrong") == ["0.000", "0.000"]
    assert page.of("score partly") == ["0.250"]
    assert Reader(render(examples[2:3], title="t")).of("score right") == ["1.000"]
    assert "3 of 5 questions, lowest score first." in page.of("p")


def test_text_of_others_stays_text(tmp_path):
    name = "a<b>.png"
    fields = {"question": EVIL, "answers": [EVIL], "prediction": EVIL, "category": EVIL}
    bad = example(0.0, **fields, name=EVIL, images=[tmp_path / name])
    report = score("exact", ["x"], [EVIL], [EVIL])
    page = Reader(render([bad], title=EVIL, report=report, facts={EVIL: EVIL}))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "iframe", "link"})
    for holder in ("title", "h1", "h2", "span", "dd", "answer", "prediction", "th"):
        assert EVIL in page.of(holder), holder
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    assert any(name in text for text in page.of("none"))


def test_the_page_needs_nothing_else(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    images = [tmp_path / "red.png", str(tmp_path / "red.png"), Image.new("L", (5, 5))]
    write_page(tmp_path / "new" / "page.html", [example(0.0, images=images)], title="worst")
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert page.attributes("img", "alt") == ["red.png", "red.png", "picture"]
    uris = page.attributes("img", "src")
    assert [decoded(uri).size for uri in uris] == [(30, 20), (30, 20), (5, 5)]
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in "".join(
        attrs.get("content", "") for tag, attrs in page.elements if tag == "meta"
    )


def test_scores_by_split_stand_above():
    report = score("exact", ["a", "b", "c"], ["a", "x", "x"], ["form", "form", "table"])
    page = Reader(render([example(0.0)], title="t", report=report, facts={"model": "m"}))
    assert page.of("number") == ["2", "0.5000", "1", "0.0000", "3", "0.3333"]
    assert page.of("td")[:3] == ["m", "form", "table"]


def test_what_can_be_seen_through_lies_on_white():
    clear = thumbnail(Image.new("RGBA", (40, 40), (255, 0, 0, 0)))
    assert decoded(clear).getpixel((20, 20)) == pytest.approx((255,) * 3, abs=2)


def test_pictures_are_shrunk_and_turned_upright(tmp_path):
    image = Image.new("RGB", (1600, 400), "white")
    image.paste("black", (0, 0, 800, 400))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image.save(tmp_path / "turned.jpg", exif=exif)
    small = decoded(thumbnail(tmp_path / "turned.jpg"))
    assert small.size == (160, 640)
    assert small.getpixel((80, 100)) == pytest.approx((0,) * 3, abs=4)
    assert small.getpixel((80, 540)) == pytest.approx((255,) * 3, abs=4)
    assert decoded(thumbnail(image)).size == (160, 640)  # it has the tag too


def test_a_picture_that_was_given_is_left_as_it_was():
    image = Image.new("RGB", (1600, 400))
    assert decoded(thumbnail(image)).size == (640, 160)
    assert image.size == (1600, 400)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"text")
    images = [tmp_path / "bad.png", tmp_path / "none.png", Image.new("RGB", (5, 5))]
    page = Reader(render([example(0.0, images=images)], title="t"))
    assert [text.split("/")[0] for text in page.of("none")] == ["not shown: "] * 2
    assert ["bad.png" in page.of("none")[0], "none.png" in page.of("none")[1]] == [True, True]
    assert len(page.attributes("img", "src")) == 1


def test_long_and_empty_predictions_can_be_read():
    page = Reader(
        render([example(0.0, prediction="ab" * 5000), example(0.0, prediction="")], title="t")
    )
    assert page.of("prediction") == ["ab" * 500 + " … (10,000 characters)"]
    assert page.of("prediction none") == ["(nothing)"]


def test_half_a_character_can_be_written(tmp_path):
    write_page(tmp_path / "page.html", [example(0.0, prediction="half \ud83d")], title="t")
    assert "half ?" in (tmp_path / "page.html").read_text(encoding="utf-8")
