"""Places in texts, and drawn on pictures."""

import numpy as np
import pytest

from llmprep_jax.vision.grounding import Place, draw_places, format_place, parse_places

TEXT = "<|ref|>a cat<|/ref|><|det|>[[0, 10, 500, 999], [7, 8, 9, 10]]<|/det|>"


def test_coordinates_are_thousandths_of_the_pictures_sides():
    (place,) = parse_places("<|ref|>x<|/ref|><|det|>[[0, 111, 333, 999]]<|/det|>", (1998, 999))
    assert place.text == "x"
    np.testing.assert_allclose(place.boxes, [(0, 111, 666, 999)])


@pytest.mark.parametrize("size", [(999, 999), (37, 2000), (640, 427), (3, 5)])
def test_a_text_of_places_survives_the_way_to_pixels_and_back(size):
    places = parse_places(f"see {TEXT}, and <|ref|>dogs<|/ref|><|det|>[[1,2,3,4]]<|/det|>", size)
    assert [place.text for place in places] == ["a cat", "dogs"]
    assert format_place(places[0], size) == TEXT
    assert format_place(places[1], size).endswith("<|det|>[[1, 2, 3, 4]]<|/det|>")


def test_what_is_no_box_is_left_out_and_what_is_outside_is_at_the_side():
    text = "<|ref|>x<|/ref|><|det|>[[1, 2, 3], [1, 2, 3, 4000], [5, 6, 7, 8]]<|/det|><|ref|>y"
    (place,) = parse_places(text, (999, 999))
    np.testing.assert_allclose(place.boxes, [(5, 6, 7, 8)])
    outside = Place("x", ((-5.0, 0.0, 2000.0, 50.0),))
    assert format_place(outside, (100, 100)) == "<|ref|>x<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>"


def test_boxes_are_drawn_on_a_copy():
    image = np.full((60, 80, 3), 255, np.uint8)
    places = [Place("猫", ((10, 10, 70, 50),)), Place("b", ((50, 5, 20, 20),))]
    drawn = np.asarray(draw_places(image, places, width=2))
    assert (image == 255).all()
    assert drawn.shape == image.shape
    assert drawn[10, 40].tolist() == drawn[50, 40].tolist() == [230, 25, 75]
    assert drawn[5, 21].tolist() == [60, 180, 75]
    assert drawn[58, 78].tolist() == [255] * 3
