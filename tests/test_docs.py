"""README and docs say what is so: their Python runs, and their commands are read."""

import importlib
import json
import pathlib
import re
import shlex

import jaxtyping
import pytest
from flax import nnx
from PIL import Image

import llmprep_jax as lp
from llmprep_jax.config import load_config, override, split_arguments
from llmprep_jax.data import DataConfig
from llmprep_jax.models.deepseek_vl2.processor import Processor
from llmprep_jax.models.janus.processor import Processor as JanusProcessor
from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.model import Model
from tests.models import drawing
from tests.models.test_deepseek_vl2 import load as load_vl2
from tests.models.test_deepseek_vl2_processor import write_processor
from tests.random_modules import random_module
from tests.text.samples import train_byte_level

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted((ROOT / "experiments").glob("*.py"))
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def snippets(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(page: pathlib.Path) -> list[str]:
    """Every `python -m experiments.NAME ...` in words that a user would type."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```\w*\n.*?^```", text, re.DOTALL | re.MULTILINE)
    prose = text
    for block in blocks:
        prose = prose.replace(block, "")
    lines = re.findall(r"`[^`]*?(python -m experiments\.[^`]+)`", prose)
    line = re.compile(r"^\s*(?:\w+=\S+ )*(python -m experiments\.[^\n#]*)", re.MULTILINE)
    lines += [
        x for block in (blocks if page.suffix == ".md" else [text]) for x in line.findall(block)
    ]
    lines = [" ".join(line.replace("...", "").split()) for line in lines]
    return [line for line in lines if "[" not in line and "COMMAND" not in line]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model with a chat template, and the model."""
    folder = tmp_path_factory.mktemp("docs")
    train_byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    cfg = Config(416, 64, 128, 1, 4, 2, 16, max_seq_len=8192, tie_embeddings=True)
    model = random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)))
    return lp.save_model(model, folder / "model", processor=lp.load_processor(folder)), model


def adapted(model: nnx.Module) -> nnx.Module:
    return lp.peft.inject(model, lp.peft.LoRA(rank=2, targets="layers.mlp.up"))


def adapters_page(folder: pathlib.Path, model: nnx.Module) -> None:
    for name in ("law", "path/to/verse"):
        lp.peft.save(adapted(model), folder / name, base_model="org/base")


def quantisation_page(folder: pathlib.Path, model: nnx.Module) -> None:
    lp.save_model(lp.quant.quantize_model(model, "nf4"), folder / "folder")


def training_page(folder: pathlib.Path, model: nnx.Module) -> None:
    lines = [json.dumps({"text": f"{n} is a number and {n + 1} the next " * 40}) for n in range(4)]
    (folder / "my_text.jsonl").write_text("\n".join(lines) + "\n")


def deepseek_vl2_page(folder: pathlib.Path, model: nnx.Module) -> None:
    (folder / "files").mkdir()
    write_processor(folder / "files")
    processor = Processor.from_path(folder / "files")
    lp.save_model(load_vl2(), folder / "deepseek-vl2-tiny", processor=processor)
    Image.new("RGB", (120, 60), "red").save(folder / "page.png")


def janus_page(folder: pathlib.Path, model: nnx.Module) -> None:
    (folder / "files").mkdir()
    drawing.write_processor(folder / "files")
    processor = JanusProcessor.from_path(folder / "files")
    lp.save_model(drawing.model(), folder / "janus-pro-1b", processor=processor)
    Image.new("RGB", (120, 60), "red").save(folder / "page.png")


# where a page's names lead to: folders of the tiny model, and other files
MODELS = {
    "README.md": ["path/to/folder"],
    "adapters.md": ["path/to/base"],
    "quantisation.md": ["dense folder"],
    "deepseek.md": ["DeepSeek-V2-Lite"],
    "generation.md": ["path/to/folder"],
    "reasoning.md": ["DeepSeek-R1-Distill-Qwen-1.5B"],
    "training.md": ["path/to/folder"],
}
GIVEN = {
    "adapters.md": adapters_page,
    "deepseek_vl2.md": deepseek_vl2_page,
    "janus.md": janus_page,
    "quantisation.md": quantisation_page,
    "training.md": training_page,
}


@pytest.mark.slow  # each page compiles what a newcomer's first hour does
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda x: x.name)
def test_every_snippet_runs_as_it_is_written(page, base, tmp_path, monkeypatch):
    source, model = base
    for name in MODELS.get(page.name, []):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(source)
    if page.name in GIVEN:
        GIVEN[page.name](tmp_path, model)
    monkeypatch.chdir(tmp_path)
    names = {}  # a page says all that it needs
    for number, snippet in enumerate(snippets(page)):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)


@pytest.fixture
def as_users_run_it():
    """Without the tests' own check of types, which knows no defaults that are looked up later."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LINES = [(page.name, line) for page in [*PAGES, *COMMANDS] for line in command_lines(page)]


def test_commands_are_found_in_the_docs():
    assert len(LINES) > 20
    assert ("README.md", "python -m experiments.evaluate MODEL my_text.jsonl") in LINES


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_every_command_line_is_read(as_users_run_it, page, line):
    _, _, module, *arguments = shlex.split(line)
    positional, overrides = split_arguments(arguments)
    command = importlib.import_module(module)
    if module == "experiments.train":
        config = ROOT / (positional[0] if positional else "configs/tiny_pretrain.py")
        load_config(config, overrides)
    elif module == "experiments.evaluate":
        settings = command.EvaluateConfig(model="MODEL", data=DataConfig(paths=("DATA",)))
        override(settings, overrides)
    elif module == "experiments.demo":
        override(command.get_config(), overrides)
    elif module == "experiments.synthesize":
        override(command.Synthesis(), overrides)
    elif hasattr(command, "Settings"):
        override(command.Settings(), overrides)
    else:
        assert not arguments
