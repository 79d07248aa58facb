"""What is written around images, and where places of the text are then."""

import pytest

from llmprep_jax.text.image_text import replace_markers


def test_markers_are_replaced_and_places_move_by_what_was_written_before_them():
    text, moved = replace_markers("a<i>b<i>c", "<i>", ["<<i>>", "-"])
    assert text == "a<<i>>b-c"
    # before the first, at its start, behind it, at the second's start, behind it, the end
    assert [moved(place) for place in (0, 1, 4, 5, 8, 9)] == [0, 1, 6, 7, 8, 9]


def test_what_looks_like_a_marker_and_is_none_stays():
    text, moved = replace_markers("<i><i>", "<i>", ["image"], literals=[0])
    assert text == "<i>image"
    assert moved(0) == 0


def test_other_markers_than_pieces_are_told_in_numbers():
    with pytest.raises(ValueError, match="there are 1 <i> markers and 2 images"):
        replace_markers("a<i>", "<i>", ["x", "y"])
