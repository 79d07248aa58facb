"""The generate command, with a stand-in for the model: what is asked, and how it ends."""

import io
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import llmprep_jax as lp
from experiments import generate as command
from experiments.command import chat
from llmprep_jax import cli
from llmprep_jax.text import Reply
from llmprep_jax.text.image_text import ImageTextProcessor

TOKENIZER = SimpleNamespace(check_vocab=lambda size: None)


def stand_in(drafts=None, drawing=None):
    """What the command looks at of a model."""
    decoder = SimpleNamespace(cfg=SimpleNamespace(vocab_size=1), drafts=drafts)
    cfg = SimpleNamespace(model_type="llama")
    return SimpleNamespace(decoder=decoder, drawing=drawing, cfg=cfg)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that reach the model; it answers each with its number, in two pieces."""
    prompts = []

    def answer(model, processor, prompt, **settings):
        prompts.append(prompt)
        if prompt[-1]["content"] == "too long":
            raise ValueError("900 prompt tokens exceed the context")
        yield Reply("", "answer ")
        yield Reply("", str(len(prompts)))

    processor = SimpleNamespace(tokenizer=TOKENIZER, chat=None)
    model = stand_in()
    monkeypatch.setattr(lp, "load_processor", lambda path: processor)
    monkeypatch.setattr(lp, "load_model", lambda path, **settings: model)
    monkeypatch.setattr(lp, "generate", answer)
    return prompts


def run(monkeypatch, *arguments, typed=""):
    """The exit code of a command with `typed` as its input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as stop:
        cli.run(command.main, arguments)
    return stop.value.code


def said(prompt):
    return [(message["role"], message["content"]) for message in prompt]


def test_a_chat_remembers_its_turns_and_ends_with_the_input(monkeypatch, capsys, asked):
    assert run(monkeypatch, "model", typed="I am Ada\n\nWho am I?\n") == 0
    first = ("user", "I am Ada")
    assert [said(prompt) for prompt in asked] == [
        [first],
        [first, ("assistant", "answer 1"), ("user", "Who am I?")],
    ]
    out = capsys.readouterr().out
    assert "answer 1\n" in out
    assert out.endswith("\n")


def test_a_chat_is_begun_anew_by_reset_and_system(monkeypatch, capsys, asked):
    typed = "a\n/reset\nb\n/system Be kind.\nc\n/system\nd\n/what[/]\n/quit\nnever read\n"
    assert run(monkeypatch, "model", typed=typed) == 0
    assert [said(prompt) for prompt in asked] == [
        [("user", "a")],
        [("user", "b")],
        [("system", "Be kind."), ("user", "c")],
        [("user", "d")],
    ]
    assert "unknown command /what[/]" in capsys.readouterr().out


def test_a_question_that_cannot_be_read_does_not_end_the_chat(monkeypatch, capsys, asked):
    assert run(monkeypatch, "model", typed="a\ntoo long\nb\n") == 0
    assert said(asked[-1]) == [("user", "a"), ("assistant", "answer 1"), ("user", "b")]
    assert "error: 900 prompt tokens exceed the context, or" in capsys.readouterr().out


def test_one_prompt_is_answered_and_printed_as_it_is(monkeypatch, capsys, asked):
    pieces = [Reply("", "\t:smile: [/b]\x1b[0m"), Reply("", "x")]
    monkeypatch.setattr(lp, "generate", lambda *_, **__: iter(pieces))
    assert run(monkeypatch, "mo[/]del", "hi", "raw=true") == 0
    assert capsys.readouterr().out.endswith("\t:smile: [/b]\x1b[0mx\n")


THINKING = [Reply("[b]hm\n", ""), Reply("so", ""), Reply("", "4"), Reply("", "2")]
SHOWN = ["<think>\n[b]hm\n", "so", "\n</think>\n\n"]


@pytest.mark.parametrize("color_system", [None, "truecolor"])
def test_thoughts_are_shown_dim_and_not_remembered(monkeypatch, capsys, asked, color_system):
    def think(model, processor, prompt, **settings):
        assert (settings["stream"], settings["reasoning"]) == (True, True)
        asked.append(prompt)
        return iter(THINKING)

    monkeypatch.setattr(lp, "generate", think)
    monkeypatch.setattr(chat, "console", Console(color_system=color_system))
    assert run(monkeypatch, "model", typed="6 * 7?\nSure?\n") == 0
    first = [("user", "6 * 7?")]
    assert [said(prompt) for prompt in asked] == [
        first,
        [*first, ("assistant", "42"), ("user", "Sure?")],
    ]
    shown = [f"\x1b[2m{piece}\x1b[0m" if color_system else piece for piece in SHOWN]
    out, err = capsys.readouterr()
    assert out.count("".join(shown) + "42\n") == 2
    assert err == ""


def test_thoughts_without_an_answer_are_said_to_be_cut_off(monkeypatch, capsys, asked):
    monkeypatch.setattr(lp, "generate", lambda *_, **__: iter(THINKING[:1]))
    assert run(monkeypatch, "model", "6 * 7?") == 0
    out, err = capsys.readouterr()
    assert out.endswith("<think>\n[b]hm\n\n")
    assert err == "the thoughts did not end; a larger max_new_tokens gives them room\n"


def test_a_draft_is_asked_for_and_its_acceptance_said(monkeypatch, capsys, asked):
    def draft(model, processor, prompt, *, draft, report, **settings):
        yield Reply("", f"by {draft}")
        report("9% of 11 drafts accepted")

    monkeypatch.setattr(lp, "generate", draft)
    assert run(monkeypatch, "model", "hi", "draft=mtp") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "this one has none; leave draft out" in err
    model = stand_in(drafts=[None])
    monkeypatch.setattr(lp, "load_model", lambda path, **settings: model)
    assert run(monkeypatch, "model", "hi", "draft=mtp") == 0
    assert capsys.readouterr() == ("by mtp\n", "9% of 11 drafts accepted\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give a model"),
        (("model", "one", "two"), "give a model"),
        (("model", "--stream"), "unknown flag --stream"),
        (("model", "temprature=1"), "did you mean temperature"),
        (("model", "temperature=-1"), "temperature is -1.0; it must be"),
        (("model", "top_k=0"), "top_k is 0; it must be"),
        (("model", "top_k=2.5"), "top_k=2.5: wanted a whole number"),
        (("model", "top_p=2"), "top_p is 2.0; it must be"),
        (("model", "min_p=2"), "min_p is 2.0; it must be"),
        (("model", "repetition_penalty=0"), "repetition_penalty is 0.0; it must be"),
        (("model", "max_new_tokens=0"), "max_new_tokens is 0; it must be at least 1"),
        (("model", "seed=99999999999999999999"), "it must fit in 64 bits"),
        (("model", "stop=a,,b"), "stop holds an empty string"),
        (("model", "dtype=int3"), "dtype=int3: wanted float32"),
        (("model", "mesh=fsdpp"), "unknown mesh fsdpp; did you mean fsdp"),
        (("model", "mesh.fsdp=3"), "mesh: a mesh of {'fsdp': 3} does not fit 8 devices"),
        (("model", "raw=true"), "raw=true is for a prompt"),
        (("model", "draft=eagle"), "draft=eagle: wanted mtp"),
        (("model", "hi", "image=nowhere.png"), "image nowhere.png is no file"),
        (("model", "hi", "out=picture.txt"), "no kind of picture ends so; write out=picture.png"),
        (("model", "hi", f"image={__file__}", "out=a.png"), "give one of them"),
        (("model", "out=a.png"), "out is for a prompt"),
        (("model", "hi", "raw=true", "out=a.png"), "out is for a prompt"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line_before_anything_is_loaded(
    monkeypatch, capsys, arguments, problem
):
    assert run(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert problem in err
    assert (out, err.count("\n")) == ("", 1)


def test_what_the_model_is_loaded_with_is_told(monkeypatch, capsys, asked):
    given = []

    def load(path, **settings):
        given.append(settings)
        return stand_in()

    monkeypatch.setattr(lp, "load_model", load)
    assert run(monkeypatch, "model", "hi", "dtype=nf4", "mesh.fsdp=4", "mesh.tensor=2") == 0
    (settings,) = given
    assert dict(settings.pop("mesh").shape) == {"fsdp": 4, "tensor": 2}
    assert settings == {"dtype": "nf4", "ema": False}


def test_turns_of_a_chat_share_a_prompt_cache(monkeypatch, capsys, asked):
    caches = []

    def answer(model, processor, prompt, *, prompt_cache=None, **settings):
        caches.append(prompt_cache)
        yield Reply("", "yes")

    monkeypatch.setattr(lp, "generate", answer)
    assert run(monkeypatch, "model", typed="a\nb\n") == 0
    assert isinstance(caches[0], lp.PromptCache)
    assert caches[0] is caches[1]


def test_ctrl_c_ends_an_answer_and_not_the_chat(monkeypatch, capsys, asked):
    def answer(model, processor, prompt, **settings):
        asked.append(prompt)
        yield Reply("", "one ")
        if len(asked) < 3:
            signal.raise_signal(signal.SIGINT)
            yield Reply("", "two ") if len(asked) == 1 else Reply("", "")
            yield Reply("", "never")

    monkeypatch.setattr(lp, "generate", answer)
    assert run(monkeypatch, "model", typed="a\nb\nc\n") == 0
    assert said(asked[2])[1::2] == [("assistant", "one two "), ("assistant", "one ")]
    assert capsys.readouterr().out.endswith("you: one two \nyou: one \nyou: one \nyou: \n")


def test_a_model_without_a_chat_template_is_refused_before_it_is_loaded(monkeypatch, capsys):
    class Bare:
        @property
        def chat(self):
            raise ValueError("model: no chat template")

    monkeypatch.setattr(lp, "load_processor", lambda path: Bare())
    assert run(monkeypatch, "model", "hi") == 1
    assert capsys.readouterr().err == "error: model: no chat template\n"


class Seeing(ImageTextProcessor):
    """A stand-in for the processor of a model that sees."""

    def __init__(self):
        self.tokenizer = TOKENIZER

    chat = None


def test_images_go_with_the_prompt_and_with_the_first_turn_of_a_chat(
    monkeypatch, capsys, asked, tmp_path
):
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for name in names:
        Image.new("RGB", (4, 4)).save(name)
    parts = [{"type": "image", "image": name} for name in names]
    assert run(monkeypatch, "model", "hi", f"image={names[0]}") == 1  # it reads text
    assert "model reads text only; leave image out" in capsys.readouterr().err
    monkeypatch.setattr(lp, "load_processor", lambda path: Seeing())
    assert run(monkeypatch, "model", "What?", f"image={','.join(names)}") == 0
    assert asked[-1] == [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    typed = "What?\nSure?\n/reset\nAnd now?\n"
    assert run(monkeypatch, "model", f"image={','.join(names)}", typed=typed) == 0
    texts = [[message["content"] for message in prompt] for prompt in asked[-3:]]
    with_images = lambda text: [*parts, {"type": "text", "text": text}]  # noqa: E731
    assert texts == [
        [with_images("What?")],
        [with_images("What?"), "answer 2", "Sure?"],
        [with_images("And now?")],
    ]


def test_a_picture_is_drawn_to_the_file_that_is_named(monkeypatch, capsys, asked, tmp_path):
    given = []

    def draw(model, processor, prompt, *, report, **settings):
        report(3, 9)
        given.append((prompt, settings))
        return np.full((1, 4, 6, 3), 9, np.uint8)

    monkeypatch.setattr(lp, "generate_images", draw)
    path = tmp_path / "new" / "house.png"
    assert run(monkeypatch, "model", "a house", f"out={path}") == 1
    assert "does not draw; give a Janus model" in capsys.readouterr().err
    model = stand_in(drawing=object())
    monkeypatch.setattr(lp, "load_model", lambda path, **settings: model)
    assert run(monkeypatch, "model", "a house", f"out={path}", "guidance=3", "top_k=9") == 0
    settings = dict(temperature=1.0, guidance=3.0, seed=0, top_k=9, top_p=None, min_p=None)
    assert given == [("a house", settings)]
    assert np.asarray(Image.open(path)).tolist() == np.full((4, 6, 3), 9).tolist()
    assert str(path) in capsys.readouterr().out.replace("\n", "")
