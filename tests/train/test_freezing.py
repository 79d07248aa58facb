"""Freezing by name: what a name means, that what is frozen does not move at all and costs nothing,
and that adapters keep away from it."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from configs.deepseek_vl_stages import FREEZE, MODEL
from experiments import train
from llmprep_jax.models import llama, registry, sam
from llmprep_jax.models.model_config import ComposedConfig
from llmprep_jax.nn.param import TRAINED
from llmprep_jax.peft import LoRA, inject
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.checkpoint import read_meta
from llmprep_jax.train.freezing import frozen_weights, leave_out, trained_weights
from llmprep_jax.train.losses import LossSum
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.state import count, path_name
from llmprep_jax.train.trainer import FitConfig, Trainer, make_loss
from llmprep_jax.vision.normalize import Normalization
from tests.models import composed
from tests.models.towers import make_towers
from tests.quick_compile import quick_compile
from tests.random_modules import fill
from tests.train.runs import command, exit_of, losses
from tests.train.test_run_folder import claim

# the shapes of the configs of the three stages, in a layer of each kind
TINY = dataclasses.replace(
    MODEL,
    language=llama.Config(384, 32, 48, 1, 2, 2, 16, max_seq_len=64),
    vision=dataclasses.replace(MODEL.vision, dim=16, mlp_dim=24, num_layers=1, num_heads=2),
    high=sam.Config(
        16, 24, 2, 2, image_size=64, patch_size=8, out_dim=8, window=4, global_layers=(1,)
    ),
)


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory):
    with quick_compile(tmp_path_factory.mktemp("programs")):
        yield


PIXELS = dict.fromkeys(("images", "images_high"), Normalization((0.5,) * 3, (0.5,) * 3))


def weights_of(model) -> list[str]:
    return [".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model, TRAINED))]


def tops(names) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_a_name_is_a_part_or_a_path_or_a_regex_for_whole_names():
    model = registry.abstract(TINY)
    meant = {
        name: frozen_weights(model, (name,))
        for name in ("vision", "high", "projector", "head", "language", "language.layers.mlp")
    }
    assert tops(meant["vision"]) == {"vision", "high"}
    assert tops(meant["high"]) == {"high"}
    ends = [f"aligner.{layer}.{end}" for layer in ("down", "high", "low") for end in ("b", "w")]
    assert sorted(meant["projector"]) == ends
    assert meant["head"] == {"language.head.w"}
    assert len(meant["language.layers.mlp"]) == 3
    own = [name for name in weights_of(model) if name.startswith("language.")]
    assert meant["language"] == set(own)
    norms = frozen_weights(model, (r"vision\..*norm.*", "embed"))
    assert norms == {
        "language.embed.w",
        *(f"vision.layers.{n}.{e}" for n in ("attn_norm", "mlp_norm") for e in ("scale", "bias")),
        *(f"vision.norm.{e}" for e in ("scale", "bias")),
    }


FAMILIES = [f for f in registry.FAMILIES if issubclass(f.Config, ComposedConfig) and f.PRESETS]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.split(".")[-1])
def test_the_parts_of_a_composed_model_are_all_of_it(family):
    """A parameter beside the modules (a newline, an alpha) is of one of them too."""
    model = registry.abstract(list(family.PRESETS.values())[-1])
    names = [part for part in model.parts if part not in ("embed", "head")]
    assert {"language", "vision", "projector"} <= set(names)
    parts = [frozen_weights(model, (part,)) for part in names]
    assert sorted(weights_of(model)) == sorted(name for part in parts for name in part)


@pytest.mark.parametrize(("name", "words"), [
    ("visoin", "visoin: no part, path or weight of the model is called that; near names: vision"),
    ("language.layer.attn", "near names: language.layers.attn"),
    ("head", "near names: language, vision, projector, embed"),  # which is the embedding here
    ("(", "it is no regex"),
])  # fmt: skip
def test_a_name_that_means_nothing_is_refused_with_near_ones(name, words):
    with pytest.raises(ValueError, match=r"^freeze=[^\n]*$") as error:
        frozen_weights(composed.make(tied=True), (name,))
    assert words in str(error.value)


def batch(rows: int = 2) -> dict:
    """A picture, what it is called, and what follows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (rows, 24)).astype(np.int32)
    tokens[:, 2:18] = TINY.image_id
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    sizes = {"images": TINY.vision.image_size, "images_high": TINY.high.image_size}
    pictures = {
        name: rng.integers(0, 256, (rows, 1, size, size, 3), dtype=np.uint8)
        for name, size in sizes.items()
    }
    mask = (targets != TINY.image_id).astype(np.float32)
    ones = np.ones((rows, 1), bool)
    return {"tokens": tokens, "targets": targets, "loss_mask": mask, "image_mask": ones, **pictures}


def moved(before, after) -> set[str]:
    """The weights that are other ones."""
    pairs = zip(*(nnx.to_flat_state(nnx.state(model)) for model in (before, after)), strict=True)
    return {
        ".".join(map(str, path))
        for (path, was), (_, now) in pairs
        if not np.array_equal(was.get_value(), now.get_value())
    }


STAGES = {1: {"aligner"}, 2: {"aligner", "language"}, 3: {"aligner", "language", "vision"}}


def flops(trainer: Trainer, arrays: dict) -> float:
    """Of a step."""
    state = jax.eval_shape(trainer.start, trainer.split.params)
    return trainer.step.lower(state, trainer.split.frozen, arrays).cost_analysis()["flops"]


@pytest.mark.slow
def test_each_stage_of_deepseek_vl_moves_what_it_trains_and_goes_back_through_no_more():
    abstract = registry.abstract(TINY)
    before, spent = fill(abstract), {}
    optim = OptimConfig(lr=0.01, schedule="constant", weight_decay=0.5)
    for stage, parts in STAGES.items():
        model = fill(abstract)
        trainable = trained_weights(model, FREEZE[stage])
        cfg = FitConfig(steps=1, optim=optim)
        trainer = Trainer(model, trainable, cfg, make_loss(pixels=PIXELS))
        # two moments of 4 bytes each, and two counts of steps
        assert trainer.optimizer_bytes == 8 * count(trainer.split.params) + 8
        spent[stage] = flops(trainer, place_batch(batch()))
        steps = trainer.steps([batch()])
        next(steps)
        wanted = {name for name in weights_of(before) if name.split(".")[0] in parts}
        assert moved(before, trainer.model(steps.state)) == wanted
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    tower = jax.jit(lambda model, x: model.vision.features(x)).lower(abstract, images)
    forward = tower.cost_analysis()["flops"]
    # backwards a tower takes twice what it takes forwards, but for its first layer
    assert 1.5 * forward < spent[3] - spent[2] < 3 * forward
    assert spent[1] < spent[2]


def test_an_adapter_keeps_away_from_what_is_frozen():
    model = composed.make()
    method = leave_out(model, LoRA(rank=2, modules_to_save="projector"), ("vision",))
    assert tops(method.targets) == {"language"}
    assert len(method.targets) == 7
    adapted = inject(model, method)
    loss_fn = make_loss()
    trainer = Trainer(adapted, None, FitConfig(steps=1), loss_fn)
    names = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(trainer.split.params)}
    assert tops(names) == {"language", "projector"}
    assert [name for name in names if name.startswith("projector")] == ["projector.trained.w"]


@pytest.mark.parametrize(("targets", "save", "freeze", "words"), [
    ("all-linear", "projector", ("projector",), "freezes projector, which adapter.modules_to_save"),
    ("vision.blocks.q", (), ("vision",), "leaves no layer for the adapter"),
])  # fmt: skip
def test_an_adapter_of_what_is_frozen_is_refused(targets, save, freeze, words):
    with pytest.raises(ValueError, match=words):
        leave_out(composed.make(), LoRA(rank=2, targets=targets, modules_to_save=save), freeze)


def test_a_locked_tower_is_one_of_its_weights_and_its_projection():
    """LiT: only the texts' tower, the scale and the bias learn."""
    meant = frozen_weights(make_towers("clip"), ("vision",))
    assert tops(meant) == {"vision", "vision_projection"}
    model = make_towers("siglip")
    loss = lambda model, batch, key: LossSum(0.0, 1.0)  # noqa: E731
    trainer = Trainer(model, trained_weights(model, ("vision",)), FitConfig(steps=1), loss)
    assert set(trainer.split.params) == {"text", "logit_scale", "logit_bias"}


def test_a_run_that_froze_goes_on_is_a_model_and_keeps_what_it_froze(files, tmp_path, capsys):
    settings = ["architecture=none", f"model={files / 'model'}", "tokenizer=none"]
    settings += ["freeze=embed,layers.attn", "data.holdout=0", "schedule_steps=4"]
    for steps in (2, 4):
        train.main(command(files, tmp_path / "run", *settings, f"steps={steps}"))
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    base, trained = lp.load_model(files / "model"), lp.load_model(tmp_path / "run")
    chex.assert_trees_all_equal(*(jax.device_get(m.layers.attn) for m in (base, trained)))
    assert tops(moved(base, trained)) == {"layers", "norm"}
    assert read_meta(tmp_path / "run")["base"] == str(files / "model")
    code, error = exit_of(
        capsys, train.main, command(files, tmp_path / "run", *settings, "freeze=embed")
    )
    assert (code, "freeze was ['embed', 'layers.attn'], is ['embed']" in error) == (2, True), error
    assert claim(files, tmp_path / "new", "freeze=embed")[0].freeze == ("embed",)


@pytest.mark.slow  # the way of the test above, from a seed
def test_random_weights_that_were_frozen_are_made_again(files, tmp_path):
    train.main(command(files, tmp_path / "run", "freeze=layers", "steps=2", "data.holdout=0"))
    trained = lp.load_model(tmp_path / "run")
    fresh = registry.build(trained.cfg, rngs=nnx.Rngs(0))
    assert moved(fresh, trained) == {"embed.w", "norm.scale"}
