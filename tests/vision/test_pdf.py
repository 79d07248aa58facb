"""Pages of a PDF as pictures."""

import io

import numpy as np
import pytest

from llmprep_jax.vision import count_pages, image_size, open_image
from llmprep_jax.vision import pdf as pdf_module
from tests.vision.samples import draw, encode, write_locked_pdf, write_pdf

PAGE = write_pdf()


def test_a_page_has_the_pixels_of_its_dpi():
    assert open_image(PAGE).shape == (75, 150, 3)  # 36 x 72 points at 150 dpi
    assert open_image(PAGE, dpi=72).shape == (36, 72, 3)
    assert image_size(PAGE, dpi=100.5) == open_image(PAGE, dpi=100.5).shape[1::-1] == (101, 51)


def test_a_page_is_upright_and_rgb():
    page = open_image(PAGE, dpi=72)
    assert page[-5, 5].tolist() == [255, 0, 0]  # the square, lower left
    assert page[5, 5].tolist() == page[-5, -5].tolist() == [255, 255, 255]


def test_pages_are_counted_from_0(tmp_path):
    path = tmp_path / "three.pdf"
    path.write_bytes(write_pdf(3))
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert count_pages(source) == 3
    assert open_image(path, page=2, dpi=72).shape == (36, 72, 3)
    for page in (3, -1):
        with pytest.raises(ValueError, match=rf"three.pdf: has no page {page}; give 0 to 2"):
            open_image(path, page=page)


def test_a_password_opens_a_locked_pdf():
    locked = write_locked_pdf(b"secret")
    with pytest.raises(ValueError, match="^a.pdf: is locked; give password=$"):
        open_image(locked, name="a.pdf")
    with pytest.raises(ValueError, match="is not opened by this password; correct password="):
        open_image(locked, password="other")
    assert open_image(locked, password="secret", dpi=72).shape == (36, 72, 3)
    assert count_pages(locked, password="secret") == 1


BAD = {
    "no pages": (write_pdf(0), {}, "is a PDF without pages; export it again"),
    "broken": (b"%PDF-1.4\nnothing", {}, "is a broken PDF"),
    "dpi": (PAGE, {"dpi": 0}, "dpi is 0; give more than 0"),
    "no dpi": (PAGE, {"dpi": float("nan")}, "dpi is nan"),
    "pixels": (PAGE, {"max_pixels": 100}, "page 0 at 150 dpi: 150 x 75 are 11,250 pixels"),
    "large": (write_pdf(size=(14_000, 14_000)), {"dpi": 1200}, "a side may have"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_with_a_pdf_is_named_in_one_line(kind):
    source, settings, words = BAD[kind]
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match="^b.pdf") as error:
            read(source, name="b.pdf", **settings)
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_pages_of_pictures_are_refused():
    with pytest.raises(ValueError, match="a.png: is no PDF"):
        count_pages(encode(draw(8, 8)), name="a.png")


def test_a_missing_pypdfium2_is_named(monkeypatch):
    monkeypatch.setattr(pdf_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install llmprep_jax\[pdf\]"):
        open_image(PAGE)


def test_pages_of_one_file_are_drawn_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        pages = list(pool.map(lambda page: open_image(write_pdf(3), page=page % 3), range(12)))
    assert all(np.array_equal(page, pages[0]) for page in pages)
