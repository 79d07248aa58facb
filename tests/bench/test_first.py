"""The first answer after a load, without a compile cache and from one."""

import json
import os

import jax
import pytest
from flax import nnx

import llmprep_jax as lp
from experiments.bench import first
from llmprep_jax.models import registry
from tests.models.tiny import CONFIGS


@pytest.mark.slow
def test_a_second_process_compiles_nothing_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(first, "DTYPES", ("float32",))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cfg = CONFIGS["llama-tied-9-3-heads"]
    model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
    lp.save_model(model, tmp_path / "model")
    first.compare(str(tmp_path / "model"), tmp_path / "out.json")
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    fresh, cached = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (fresh["programs"], cached["programs"]) == ("compiled", "from the cache")
    assert fresh["num_programs"] == cached["num_programs"] > 2
    assert cached["compile_seconds"] < fresh["compile_seconds"] / 2
    assert fresh["second_cpu_seconds"] < fresh["cpu_seconds"] / 2
