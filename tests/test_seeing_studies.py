"""The parts of the studies of models that see: scenes, pages, guesses, and pictures of results."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import llmprep_jax as lp
from experiments import contrastive_study, demo_vision, document_study
from experiments.seeing import documents, photographs, pictures, reader, report
from experiments.seeing.photographs import Photograph, Scene, crop, scenes_of
from experiments.seeing.towers import END, Album, Meeting, Words
from llmprep_jax.data import synthetic_documents
from llmprep_jax.evaluate.retrieval import recall
from llmprep_jax.models import registry
from llmprep_jax.peft.adapter import adapters


def slope(width=200, height=120, grey=False):
    """Red grows to the right and green downwards, from 0 to 200."""
    across, down = np.linspace(0, 200, width), np.linspace(0, 200, height)
    red, green = np.meshgrid(across, down)
    pixels = np.stack([red, green, 0 * red], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert("L" if grey else "RGB")


SLOPES = {
    "a slope": Photograph(slope(), "a slope", True),
    "a grey slope": Photograph(slope(grey=True), "a grey slope", True),
    "sand": Photograph(slope(), "sand", False),
}


def shown(place="the middle of", mirrored=False, tone="in colour", size="from afar", seed=0):
    scene = Scene("a slope", place, mirrored, tone, size)
    return crop(SLOPES["a slope"], scene, np.random.default_rng(seed)).astype(int)


def test_a_caption_says_what_is_shown_and_nothing_else():
    whole = Scene("a cat", "the top left of", True, "in blue", "close up")
    assert whole.caption == "the top left of a cat mirrored in blue close up"
    assert Scene("grass", "", False, "in red", "from afar").caption == "grass in red from afar"


def test_scenes_differ_and_grey_photographs_have_no_colour():
    scenes = scenes_of(SLOPES)
    captions = [scene.caption for scene in scenes]
    # places x mirrors x tones x sizes; where parts cannot be told apart, tones x sizes
    assert len(scenes) == len(set(captions)) == 5 * 2 * 4 * 2 + 5 * 2 * 3 * 2 + 4 * 2
    assert not any(s.tone == "in colour" for s in scenes if s.what == "a grey slope")
    held_out = sum(scene.is_held_out for scene in scenes)
    assert 0.1 < held_out / len(scenes) < 0.3


@pytest.mark.parametrize(
    ("place", "red", "green"),
    [
        ("the top left of", 56, 56),
        ("the top right of", 144, 56),
        ("the middle of", 100, 100),
        ("the bottom left of", 56, 144),
        ("the bottom right of", 144, 144),
    ],
    ids=str,
)
def test_a_crop_is_of_the_part_that_its_caption_names(place, red, green):
    means = shown(place).mean((0, 1))
    np.testing.assert_allclose(means[:2], [red, green], atol=8)


def test_a_crop_from_afar_shows_more_than_one_close_up():
    far, near = (shown(size=size)[:, :, 1] for size in ("from afar", "close up"))
    # of the height, whose 120 pixels are the shorter side
    assert np.ptp(far) == pytest.approx(0.54 * 200, abs=10)
    assert np.ptp(near) == pytest.approx(0.34 * 200, abs=8)


def test_a_mirrored_crop_is_the_same_one_from_right_to_left():
    np.testing.assert_array_equal(shown(mirrored=True), shown()[:, ::-1])
    assert not np.array_equal(shown(seed=1), shown())  # another crop of the same scene


def test_tones_are_what_they_are_called():
    grey, red = shown(tone="in black and white"), shown(tone="in red")
    assert np.ptp(grey, axis=-1).max() == 0
    assert (red[..., 0] > red[..., 1]).all()


def make_album():
    scenes = scenes_of(SLOPES)
    return Album(SLOPES, scenes, Words([scene.caption for scene in scenes]))


def test_captions_become_words_an_end_and_padding():
    words = Words(["red grass", "grass close up"])
    assert words(["grass red", "up"])[:, :4].tolist() == [[3, 4, 1, 0], [5, 1, 0, 0]]
    assert words.size == 6


def test_the_longest_caption_has_room():
    names = [what for files in photographs.FILES.values() for what, _ in files.values()]
    longest = [
        max(choices, key=lambda text: len(text.split()))
        for choices in (photographs.PLACES, names, photographs.TONES, photographs.SIZES)
    ]
    caption = Scene(longest[1], longest[0], True, *longest[2:]).caption
    assert Words([caption])([caption])[0].tolist().count(END) == 1
    assert len(caption.split()) == 16


def test_no_held_out_scene_is_in_a_batch_and_none_is_there_twice():
    album = make_album()
    held_out = {tuple(row) for row in album.words([s.caption for s in album.held_out]).tolist()}
    batches = album.batches(32, seed=0)
    for _ in range(8):
        rows = [tuple(row) for row in next(batches)["tokens"].tolist()]
        assert len(set(rows)) == 32
        assert not held_out & set(rows)


def met(order):
    """Eight scenes whose caption i is most like crop order[i]."""
    scenes = make_album().scenes[:8]
    vectors = np.eye(8)
    images = np.zeros((8, 48, 48, 3), np.uint8)
    return Meeting(scenes, images, vectors, vectors[order], recall(vectors, vectors[order]))


def test_what_is_most_alike_comes_first():
    others = np.array([[1, 0], [0, 1], [0.6, 0.8]])
    assert pictures.ranking(np.array([0.0, 1.0]), others) == [1, 2, 0]


def test_green_frames_are_where_the_right_crop_is_found():
    right, wrong = met(np.arange(8)), met(np.roll(np.arange(8), 4))
    sheet = pictures.retrieval_sheet(wrong, right, title="T", captions=3, crops=2, best=1)
    frames = [item for item in sheet.items if getattr(item, "outline", None) == pictures.RIGHT]
    middle = pictures.MARGIN + pictures.COLUMN + pictures.CROP + pictures.GAP
    assert len(frames) == 3  # once a caption, all on the side of after
    assert all(frame.points[0] > middle for frame in frames)
    bold = [text for text in sheet.texts() if text.color == pictures.RIGHT]
    assert [text.text for text in bold] == [
        right.scenes[i].caption for i in pictures.choose(right, 5)[3:]
    ]


def assert_inside(sheet):
    """Nothing lies over an edge, and no picture over another."""
    for text in sheet.texts():
        assert text.x + text.face.advance(text.text) * text.size <= sheet.width - pictures.GAP
        assert text.baseline < sheet.height
    boxes = [(x, y, x + image.width, y + image.height) for image, x, y in sheet.pictures]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= sheet.width - pictures.GAP
        assert 0 <= top < bottom <= sheet.height
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_crops_and_captions_lie_within_their_columns():
    right = met(np.arange(8))
    sheet = pictures.retrieval_sheet(right, right, title="T" * 300)
    assert_inside(sheet)
    assert sheet.drawn().size == (sheet.width, round(sheet.height))


def test_one_scene_of_each_photograph_asks_first_in_colour_where_it_can():
    album = make_album()
    each = Meeting(album.scenes, None, None, None, None)
    chosen = [album.scenes[i] for i in pictures.choose(each, 3)]
    assert sorted(scene.what for scene in chosen) == ["a grey slope", "a slope", "sand"]
    assert {s.tone for s in chosen if s.what != "a grey slope"} == {"in colour"}


def answered(text="$3", right=True):
    said = {"base": ("a b\nc", False), "LoRA": (text, right)}
    return pictures.Answered(
        "How much is the salt of the earth?" * 3, "$3", said, [(10, 20, 30, 40)]
    )


def test_pages_stand_beside_their_questions_and_right_answers_are_green():
    pages = [(Image.new("RGB", (96, 96), "white"), [answered(), answered("$" * 90, False)])] * 2
    sheet = pictures.answer_sheet(pages, title="Pages", side=192)
    assert_inside(sheet)
    colors = {t.text: t.color for t in sheet.texts()}
    assert colors["a b / c"] == pictures.WRONG
    assert [t.color for t in sheet.texts() if t.text == "$3"] == [
        *[pictures.INK, pictures.RIGHT, pictures.INK] * 2
    ]
    page = sheet.pictures[0][0]
    assert page.size == (192, 192)
    # a frame around the answer, twice as large as on the page
    assert page.getpixel((19, 60)) == pytest.approx(pictures.WRONG, abs=3)


def asked(question, answer, kind="sign", language="en", number=0):
    content = [{"type": "image", "image": "p.png"}, {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    return dict(messages=[message], answers=[answer], kind=kind, language=language, id=number)


def test_the_best_guess_is_the_most_frequent_answer_to_the_question_or_of_the_kind():
    train = [asked("speed?", "50"), asked("speed?", "30"), asked("speed?", "30")]
    train += [asked("room?", "7")] * 3 + [asked("wie?", "9", language="de")]
    guesses = documents.guess_blindly(train, [asked("speed?", "x"), asked("height?", "x")])
    assert guesses == ["30", "7"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing") / "pages"
    pages = synthetic_documents.Settings(
        kind=("receipt",), language=("en",), level="tiny", width=96, transcribe=True, holdout=0.2
    )
    return documents.write_library(folder, 20, pages)


def test_reading_and_asking_are_files_of_their_own_without_held_out_pages(library):
    lines = [
        json.loads(line)
        for name in ("read", "ask")
        for line in (library.folder / f"train_{name}.jsonl").read_text("utf-8").splitlines()
    ]
    assert {tuple(line) for line in lines} == {("messages",)}
    images = {line["messages"][0]["content"][0]["image"] for line in lines}
    held_out = library.records("heldout", documents.READ)
    assert len(held_out) == 4
    assert len(images) == 16
    assert not images & {record["messages"][0]["content"][0]["image"] for record in held_out}
    asks = library.records("heldout", documents.ASK)
    assert {record["category"] for record in asks}.isdisjoint({"text"})
    assert library.page(asks[0]).size == (96, 96)


def test_numbers_are_spelled_and_words_are_wholes(library):
    tokenizer = library.processor.tokenizer
    ids = tokenizer.encode("Total $19", add_special=False)
    assert [tokenizer.token_of(i) for i in ids] == ["Total", " ", "$", "1", "9"]
    assert tokenizer.decode(ids) == "Total $19"
    assert library.processor.images.count(96, 96) == 41


def test_the_reader_is_a_model_that_a_folder_of_vl2_can_hold(library):
    model = jax.eval_shape(lambda: reader.make_reader(library.processor, 0))
    hf = registry.to_hf(model.cfg)
    assert (hf["model_type"], hf["language_config"]["use_mla"]) == ("deepseek_vl_v2", False)
    again = registry.family_of_type(hf["model_type"]).from_hf(hf)
    assert again.with_compute(reader.COMPUTE) == model.cfg


def test_lora_of_the_study_is_on_the_language_model_alone(library):
    method = lp.peft.LoRA(rank=2, alpha=4, targets=document_study.LANGUAGE)

    def adapted():
        return lp.peft.inject(reader.make_reader(library.processor, 0, dim=16), method, seed=0)

    paths = set(adapters(jax.eval_shape(adapted)))
    assert paths
    assert all(path.startswith("language.") for path in paths)
    assert {path.split(".")[-1] for path in paths} >= {"q", "down"}


def test_a_report_shows_pages_with_all_that_was_asked_of_them(library):
    records = library.records("heldout", documents.ASK)
    answers = {"base": ["?"] * len(records), "LoRA": [x["answers"][0] for x in records]}
    scores = {way: documents.score(records, said) for way, said in answers.items()}
    assert set(scores["LoRA"]) == {1.0}
    assert set(scores["base"]) == {0.0}
    pages = report.pages_of(library, records, answers, scores, count=3)
    assert len(pages) == 3
    assert len(pages[0][1]) > 1
    asks = [ask for _, asked in pages for ask in asked]
    assert all(ask.said["LoRA"] == (ask.answer, True) for ask in asks)
    assert all(ask.said["base"] == ("?", False) for ask in asks)


def test_what_is_not_learnt_is_an_error():
    right, blind = [1.0, 1.0, 0.8], [0.5, 0.4, 0.6]
    scores = {document_study.TUNED: right, document_study.BLANK: blind}
    document_study.check(document_study.Settings(least=0.9, margin=0.4), scores)
    for settings in (dict(least=0.95, margin=0.4), dict(least=0.9, margin=0.45)):
        with pytest.raises(RuntimeError, match="must be .* and exceed"):
            document_study.check(document_study.Settings(**settings), scores)


@pytest.mark.slow
def test_the_demo_trains_both_models_and_shows_what_they_find_and_read(
    tmp_path, monkeypatch, capsys
):
    more = Photograph(slope(), "another slope", True)  # a batch is of 128 scenes
    monkeypatch.setattr(contrastive_study, "find_photographs", lambda: SLOPES | {more.what: more})
    sizes = ["steps=0.005", "pages=60", "questions=8"]
    outputs = demo_vision.main([*sizes, f"out={tmp_path}"])
    for name in ("what CLIP finds", "pages with answers"):
        with Image.open(outputs[name]) as image:
            assert image.width > 1000
    assert "<h1>What LoRA answered worst</h1>" in outputs["the worst answers"].read_text("utf-8")
    command = capsys.readouterr().out.split("python -m ")[-1].split()
    assert command[:2] == ["experiments.evaluate", "deepseek-ai/deepseek-vl2-tiny"]
    assert len(pathlib.Path(command[2]).read_text("utf-8").splitlines()) > 8
    numbers = json.loads((tmp_path / "documents/documents.json").read_text())["results"]
    assert set(numbers["anls"]) == {"base", "LoRA", "LoRA, blank page", "best guess"}
    assert [len(losses) for losses in numbers["losses"].values()] == [3, 2]
    # the folders are those of a model that is loaded like any other
    model = lp.peft.load(lp.load_model(outputs["the base, a folder"]), outputs["its adapter"])
    assert lp.peft.is_adapted(model)
    assert lp.load_processor(outputs["the base, a folder"]).images.count(96, 96) == 41
