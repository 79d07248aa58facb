"""experiments.evaluate with a task, on tiny models and real files."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from experiments import evaluate
from llmprep_jax.cli import run
from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate import answers
from llmprep_jax.evaluate.questions import Question
from llmprep_jax.models import registry, siglip
from llmprep_jax.peft import LoRA
from tests.data.pictured import draw
from tests.peft.test_methods import scattered
from tests.quick_compile import quick_compile
from tests.random_modules import fill
from tests.text.samples import train_sentencepiece
from tests.train.test_seeing_command import make_files

PAGE = Ref("folder", "x.png")
PATH = pathlib.Path("folder/x.png")
SIDES = {"height": 9, "width": 9}


@pytest.fixture(scope="module", autouse=True)
def compilation(tmp_path_factory):
    with quick_compile(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A folder with a tiny DeepSeek-VL2 and questions of unlike lengths about unlike pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    make_files(folder)
    shapes = [(56, 56), (112, 56), (56, 112)]
    for number, shape in enumerate(shapes):
        draw(folder / f"pages/{number}.png", 80 * number, shape)
    pages = [["pages/0.png"], [], ["pages/1.png", "pages/2.png"], ["pages/2.png"], ["pages/1.png"]]
    lines = [
        {
            "question": "what is written" + " here" * number,
            "answers": ["zzzz", "zz"],
            "images": names,
            "question_types": ["form"] if number < 2 else ["form", "table"],
        }
        for number, names in enumerate(pages)
    ]
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A folder with a tiny SigLIP, pictures by class, and a file of captions."""
    folder = tmp_path_factory.mktemp("towers")
    train_sentencepiece(
        folder, model_type="unigram", vocab_size=200, eos_id=1, unk_id=2, pad_id=0, bos_id=-1
    ).rename(folder / "spiece.model")
    for name, fields in (
        ("tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"}),
        ("preprocessor_config.json", {"size": SIDES}),
        ("config.json", {"model_type": "siglip", "text_config": {"vocab_size": 200}}),
    ):
        (folder / name).write_text(json.dumps(fields))
    small = dict(dim=8, mlp_dim=8, num_layers=1, num_heads=2)
    cfg = siglip.Config(
        siglip.TextConfig(vocab_size=200, max_seq_len=64, **small),
        siglip.VisionConfig(image_size=9, patch_size=4, **small),
    )
    model = fill(registry.abstract(cfg))
    lp.save_model(model, folder / "model", processor=lp.load_processor(folder))
    lines = []
    for number in range(7):
        name = f"{['cat', 'dog', 'old_fox'][number % 3]}/{number}.png"
        draw(folder / "classes" / name, 30 * number, (9 + number, 9))
        lines.append({"image": name, "captions": [f"number {number}", f"page {number} of it"]})
    (folder / "classes/captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def measure(folder, data, *settings):
    """The result and the page of a command."""
    arguments = [str(folder / "model"), str(folder / data), *settings]
    outputs = evaluate.main(arguments)
    assert outputs["worst cases"] == outputs["result"].with_suffix(".html")
    return json.loads(outputs["result"].read_text()), outputs["worst cases"].read_text()


def said(result):
    return [example["prediction"] for example in result["examples"]]


@pytest.mark.slow
def test_questions_are_asked_in_batches_scored_and_shown(seeing, capsys):
    settings = ["task=docvqa", "task.max_new_tokens=4"]
    result, page = measure(seeing, "pages.jsonl", *settings, "task.batch_size=3", "task.worst=2")
    assert (seeing / "model/docvqa-pages.json").is_file()
    assert result["questions"] == 5
    assert result["score"] == np.mean([example["score"] for example in result["examples"]])
    assert {name: split["count"] for name, split in result["by_split"].items()} == {
        "form": 5,
        "table": 3,
    }
    assert result["settings"]["task"]["name"] == "docvqa"
    first = result["examples"][0]
    assert first["name"] == f"{seeing / 'pages.jsonl'}:1"
    assert (first["question"], first["answers"]) == ("what is written", ["zzzz", "zz"])
    assert any(said(result))
    assert page.count("<article>") == 2
    assert "2 of 5 questions" in page
    assert page.count("data:image/jpeg;base64,") >= 1
    shown = capsys.readouterr().out
    assert "table" in shown
    assert f"{result['score']:.4f}" in shown
    alone, _ = measure(seeing, "pages.jsonl", *settings, "task.batch_size=1")
    assert said(alone) == said(result)
    assert (seeing / "model/docvqa-pages-2.json").is_file()


@pytest.mark.slow
def test_a_blind_model_a_mesh_and_an_adapter_are_measured(seeing, tmp_path):
    settings = ["task=exact", "task.max_new_tokens=4", "task.batch_size=4"]
    plain, _ = measure(seeing, "pages.jsonl", *settings)
    blind, page = measure(seeing, "pages.jsonl", *settings, "task.blind=true")
    assert said(blind)[1] == said(plain)[1]  # it had no picture
    assert said(blind) != said(plain)
    assert "data:image/jpeg" in page  # what it did not see is shown
    spread, _ = measure(seeing, "pages.jsonl", *settings, "mesh.fsdp=4", "mesh.tensor=2")
    assert said(spread) == said(plain)
    model = lp.load_model(seeing / "model")
    model = scattered(
        lp.peft.inject(model, LoRA(rank=2, alpha=64, targets=("q_proj", "down_proj")))
    )
    lp.peft.save(model, tmp_path / "adapter", base_model="org/base", tolerance=1e-4)
    adapted, _ = measure(seeing, "pages.jsonl", *settings, f"adapter={tmp_path / 'adapter'}")
    assert said(adapted) != said(plain)
    prompted, _ = measure(seeing, "pages.jsonl", *settings, "task.prompt=now: {}", "task.limit=2")
    assert prompted["questions"] == 2
    assert said(prompted) != said(plain)[:2]


def test_towers_classify_and_retrieve(towers):
    result, page = measure(towers, "classes", "task=zero_shot")
    assert result["classes"] == 3
    assert result["top_1"] == np.mean([example["score"] for example in result["examples"]])
    assert {name: split["count"] for name, split in result["by_split"].items()} == {
        "cat": 3,
        "dog": 2,
        "old fox": 2,
    }
    assert set(said(result)) <= {"cat", "dog", "old fox"}
    assert "old_fox/2.png" in page
    # by hand, with the seven prompts of each class
    model, processor = lp.load_model(towers / "model"), lp.load_processor(towers / "model")
    one = measure(towers, "classes", "task=zero_shot", "task.templates=my {}")[0]
    texts = model.encode_text(
        processor([f"my {name}" for name in ("cat", "dog", "old fox")])["tokens"]
    )
    files = [towers / "classes" / example["name"] for example in one["examples"]]
    images = model.encode_image(processor(images=files)["images"])
    nearest = np.argmax(np.asarray(images) @ np.asarray(texts).T, axis=1)
    assert said(one) == [["cat", "dog", "old fox"][i] for i in nearest]
    found, _ = measure(towers, "classes/captions.jsonl", "task=retrieval")
    assert (found["images"], found["captions"]) == (7, 14)
    assert found["image_to_text_r10"] >= found["image_to_text_r5"] >= found["image_to_text_r1"]
    assert found["text_to_image_r10"] == 1.0


@pytest.mark.slow
def test_towers_are_measured_on_a_mesh_and_in_another_dtype(towers):
    alone, _ = measure(towers, "classes", "task=zero_shot")
    spread, _ = measure(towers, "classes", "task=zero_shot", "mesh.fsdp=8")
    assert said(spread) == said(alone)
    captions = "classes/captions.jsonl", "task=retrieval"
    found, _ = measure(towers, *captions, "dtype=bfloat16", "mesh.data=2", "mesh.tensor=4")
    assert found["image_to_text_r10"] == pytest.approx(
        measure(towers, *captions)[0]["image_to_text_r10"], abs=0.2
    )


def test_batches_are_filled_up_and_pictures_go_with_their_questions(monkeypatch):
    calls = []

    def generate(model, processor, messages, images, max_new_tokens):
        calls.append((messages, images))
        assert max_new_tokens == 9
        return [f"{m[0]['content'][-1]['text']} {i}" for i, m in enumerate(messages)]

    monkeypatch.setattr(answers, "generate", generate)
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    pictured = Question("1", [{"role": "user", "content": parts}], (PAGE,), "a", ("b",))
    plain = Question("2", [{"role": "user", "content": parts[1:]}], (), "a", ("b",))
    texts = answers.answer(
        nnx.Module(), None, [pictured, plain, pictured], max_new_tokens=9, batch_size=2
    )
    assert texts == ["a 0", "a 1", "a 0"]
    assert [images for _, images in calls] == [[[PATH], None], [[PATH], [PATH]]]
    assert calls[0][0] == [pictured.messages, plain.messages]
    texts = answers.answer(nnx.Module(), None, [pictured, plain], max_new_tokens=9, blind=True)
    assert calls[2] == ([plain.messages, plain.messages], None)
    answers.answer(nnx.Module(), None, [plain], max_new_tokens=9)
    assert calls[3] == ([plain.messages], None)


def test_what_a_model_refuses_is_named_by_its_questions(monkeypatch):
    def generate(*args, **kwargs):
        raise ValueError("too long")

    monkeypatch.setattr(answers, "generate", generate)
    one, two = [Question(name, [{"content": "a"}], (), "a", ("b",)) for name in ("1", "2")]
    with pytest.raises(ValueError, match="^1 to 2: too long"):
        answers.answer(nnx.Module(), None, [one, two], max_new_tokens=9)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(evaluate.main, list(map(str, arguments)))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return stop.value.code, error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task=docvqq"], "task.name: no task 'docvqq'; did you mean docvqa?"),
        (["task=mmlu"], "task.name: no task 'mmlu'; there are perplexity, docvqa, "),
        (["task=docvqa", "task.limits=3"], "unknown key task.limits; did you mean task.limit?"),
        (["task=docvqa", "task.limit=0"], "limit is 0; it must be at least 1"),
        (["task=docvqa", "task.prompt=now"], "'now' has not one {}, where"),
        (
            ["task=zero_shot", "task.blind=true"],
            "zero_shot does not read blind; it reads templates",
        ),
        (["task.limit=3"], "perplexity does not read limit; it reads none of these"),
        (["task=docvqa", "data.seq_len=64"], "task=docvqa does not read data.seq_len; its own are"),
        (["task=docvqa", "max_batches=2"], "task=docvqa does not read max_batches"),
    ],
    ids=["near", "far", "key", "limit", "prompt", "other", "text", "data", "batches"],
)
def test_settings_that_do_not_fit_are_one_line(seeing, capsys, settings, message):
    code, error = error_of(capsys, seeing / "model", seeing / "pages.jsonl", *settings)
    assert code == 2
    assert message in error


def test_models_and_data_that_do_not_fit_are_one_line(seeing, towers, tmp_path, capsys):
    code, error = error_of(capsys, towers / "model", seeing / "pages.jsonl", "task=docvqa")
    assert code == 1
    assert "is two towers, which say nothing; take task=zero_shot or retrieval" in error
    _, error = error_of(capsys, towers / "model", seeing / "pages.jsonl")
    assert "task=perplexity: " in error
    _, error = error_of(capsys, seeing / "model", towers / "classes", "task=zero_shot")
    assert "is no model of two towers; take task=perplexity or docvqa or" in error
    (tmp_path / "q.jsonl").write_text('{"question": "who?", "answer": "x", "image": "no.png"}\n')
    _, error = error_of(capsys, seeing / "model", tmp_path / "q.jsonl", "task=exact")
    assert f"q.jsonl:1: no picture {tmp_path / 'no.png'}" in error
    text = shutil.copytree(seeing / "model", tmp_path / "text")
    config = json.loads((text / "config.json").read_text()) | {"model_type": "llama"}
    (text / "config.json").write_text(json.dumps(config))
    _, error = error_of(capsys, text, seeing / "pages.jsonl", "task=exact")
    assert f"pages.jsonl:1: asks about a picture, and {text} reads text alone" in error
