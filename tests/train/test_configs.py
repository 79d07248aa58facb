"""Every file of configs/ that is a run, at a small size: it trains, and says what it ends with."""

import itertools
import json
import pathlib

import jax
import jaxtyping
import numpy as np
import pytest
import tokenizers
from flax import nnx

import llmprep_jax as lp
from configs.data.shipped import find_smollm2
from experiments import train
from llmprep_jax.models import gemma3, gemma3_text, registry, siglip
from llmprep_jax.train.checkpoint import read_meta
from tests.data.pictured import CHARS, TEMPLATE, asked, write
from tests.random_modules import fill
from tests.train.runs import losses
from tests.train.test_freezing import STAGES, moved
from tests.train.test_seeing_command import make_files

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
LITTLE = ["steps=2", "optim.warmup_steps=1", "checkpoint.every=none", "eval_batches=1"]
TEXT = ["data.batch_size=2", "data.seq_len=64"]
STAGE = ["data.batch_size=2", "data.prefetch=0", "data.max_images=2"]
OF_TEXT = {
    "tiny_pretrain": ["architecture.num_layers=1"],
    "deepseek_v3_tiny": ["architecture.num_layers=2"],
    "smollm2_lora": [],
    # on weights that may be installed without asking whether their terms are accepted
    "gemma3_270m_lora": [f"model={find_smollm2()}"],
}
# and by tests of their own, here and in test_pairs_command
OTHERS = {"clip_pretrain", "siglip_pretrain", "gemma3_vision_lora", "deepseek_vl2_lora"}
OTHERS |= {f"deepseek_vl_stage{n}" for n in STAGES}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(name, *settings)`, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    # fields of a config are functions until they are looked up
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    return lambda name, *settings: train.main([str(CONFIGS / f"{name}.py"), *LITTLE, *settings])


def test_no_config_is_forgotten():
    files = {path.stem for path in CONFIGS.glob("*.py") if "def get_config" in path.read_text()}
    assert files == OTHERS | OF_TEXT.keys()


@pytest.mark.slow  # a model each, of up to 135 M parameters
@pytest.mark.parametrize("name", OF_TEXT)
def test_configs_of_text_train(run, tmp_path, name):
    run(name, *TEXT, *OF_TEXT[name], "out=run")
    assert sorted(losses(tmp_path / "run")) == [1, 2]


@pytest.mark.slow  # three runs
def test_the_stages_of_deepseek_vl_follow_on_each_other(run, tmp_path):
    """Each begins from the folder of the one before, and moves what it trains."""
    sizes = ["architecture.language.num_layers=1", "architecture.language.dim=32"]
    models = []
    for stage in STAGES:
        run(f"deepseek_vl_stage{stage}", *STAGE, *(sizes if stage == 1 else ()))
        models.append(lp.load_model(tmp_path / f"runs/deepseek_vl_stage{stage}"))
    for stage, (before, after) in enumerate(itertools.pairwise(models), 2):
        assert {name.split(".")[0] for name in moved(before, after)} == STAGES[stage]
    meta = read_meta(tmp_path / "runs/deepseek_vl_stage3")
    assert (meta["base"], meta["run"]["freeze"]) == ("runs/deepseek_vl_stage2", ["high"])
    out = lp.generate(
        models[-1],
        lp.load_processor(tmp_path / "runs/deepseek_vl_stage3"),
        [{"role": "user", "content": [{"type": "image"}]}],
        images=[str(tmp_path / "runs/data/shapes/images/000.png")],
        max_new_tokens=4,
    )
    assert isinstance(out, str)


def of_pictures(folder):
    path = write(folder, [asked(10 * i, "what is it") for i in range(20)])
    return [f"data.paths={path}", "eval_data=none", "data.holdout=0.2", "accumulate=2"]


@pytest.mark.slow  # a model and an adapter
def test_gemma3_learns_by_an_adapter_on_its_language_model(run, tmp_path):
    folder = tmp_path / "model"
    cfg = gemma3.Config(
        gemma3_text.Config(64, 32, 48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16),
        siglip.VisionConfig(16, 24, 1, 2, image_size=28, patch_size=7, has_pool=False),
        tokens_per_image=4,
        image_id=4,
        begin_id=5,
        end_id=6,
    )
    lp.save_model(fill(registry.abstract(cfg)), folder)
    special = ["<pad>", "<eos>", "U", "A", "<image_soft_token>", "<start_of_image>"]
    special += ["<end_of_image>"]
    vocab = {text: i for i, text in enumerate([*special, *CHARS])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<pad>"))
    core.add_special_tokens([text for text in special if text.startswith("<")])
    core.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace("<image>", "<start_of_image>")
    config = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    fields = {"size": {"height": 28, "width": 28}, "image_seq_length": 4}
    fields["image_processor_type"] = "Gemma3ImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    small = ["data.seq_len=64", "data.batch_size=4", "data.decoders=0", "adapter.rank=2"]
    run("gemma3_vision_lora", f"model={folder}", *small, *of_pictures(tmp_path))
    meta = read_meta(tmp_path / "runs/gemma3_vision_lora")
    assert {target.split(".")[0] for target in meta["adapter"]["targets"]} == {"language"}
    tuned = lp.peft.load(lp.load_model(folder), tmp_path / "runs/gemma3_vision_lora/adapter")
    assert lp.peft.count(tuned).trainable == 1856  # none of the tower's


@pytest.mark.slow  # a model and an adapter
def test_deepseek_vl2_learns_by_an_adapter_with_its_projector_whole(run, tmp_path):
    make_files(tmp_path)
    small = ["data.seq_len=96", "data.batch_size=4", "data.decoders=0", "adapter.rank=2"]
    settings = [*small, "data.max_images=6", *of_pictures(tmp_path), "optim.lr=0.01"]
    run("deepseek_vl2_lora", f"model={tmp_path / 'model'}", *settings)
    out = tmp_path / "runs/deepseek_vl2_lora"
    targets = read_meta(out)["adapter"]["targets"]
    assert {target.split(".")[0] for target in targets} == {"language"}
    assert any("experts" in target for target in targets)
    base, tuned = lp.load_model(tmp_path / "model", "bfloat16"), lp.load_model(out)
    merged = nnx.to_flat_state(nnx.state(lp.peft.merge(tuned)))
    before = dict(nnx.to_flat_state(nnx.state(base)))
    tops = {
        path[0]
        for path, now in merged
        if not np.array_equal(jax.device_get(now.get_value()), before[path].get_value())
    }
    assert tops == {"language", "projector"}
