"""What models that see must learn: the studies as they are, which fail where it is not learnt."""

import json

import pytest

from experiments import contrastive_study, document_study

pytestmark = [pytest.mark.slow, pytest.mark.behaviour]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_held_out_crops_and_captions_find_each_other(kind, tmp_path):
    contrastive_study.main([f"kinds={kind}", "seeds=1", f"out={tmp_path}"])
    (run,) = json.loads((tmp_path / "contrastive.json").read_text())["results"][kind]
    assert max(run["before"]["image_to_text"]["5"], run["before"]["text_to_image"]["5"]) < 0.1


def test_a_tiny_vl2_answers_questions_to_held_out_pages_and_not_to_blank_ones(tmp_path):
    outputs = document_study.main([f"out={tmp_path}"])
    assert outputs["pages"].is_file()
