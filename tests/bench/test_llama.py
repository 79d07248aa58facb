"""What steps and decoding of a Llama-3-8B are said to take, by the published sizes."""

import pytest

from experiments.bench import generation, llama

# of a layer: q, k, v, o, and three matrices of the MLP; and the head
LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
HEAD = 4096 * 128256
NORMS = 2 * 4096


def test_a_step_is_counted_by_weights_in_products_and_half_of_the_scores():
    cfg = llama.config("full", 32)
    weights = 32 * (LAYER + NORMS) + HEAD + 4096
    scores = 12 * 32 * 32 * 128 * 2048
    assert llama.step_flops(cfg, "full", 4096) == (6 * weights + scores) * 4096
    assert llama.step_flops(cfg, "lora", 4096) == (4 * weights + scores) * 4096


def test_a_decode_step_reads_weights_once_and_the_keys_of_every_row():
    cfg = llama.config("full", 4)
    weights = 4 * (LAYER + NORMS) + HEAD + 4096
    assert generation.step_bytes(cfg, 16, 1000) == 2 * (weights + 16 * 1000 * 2 * 4 * 8 * 128)


@pytest.mark.parametrize(
    ("seconds", "row"),
    [
        ({2: 0.5, 4: 0.75}, {"32 layers, ms": 4250.0, "tokens/s": 64 / 4.25}),
        ({2: 0.5, 4: 0.5}, {"note": "more layers took no longer: noise, and no line"}),
    ],
    ids=["line", "noise"],
)
def test_two_depths_make_a_line(monkeypatch, seconds, row):
    class Call:
        call = staticmethod(lambda: None)
        wait = staticmethod(lambda _: None)

    depths = []
    monkeypatch.setattr(llama, "_step", lambda who, cfg, *_: depths.append(cfg.num_layers) or Call)
    monkeypatch.setattr(llama, "in_turn", lambda *_: {"": seconds[depths[-1]]})
    (found,) = llama.time_steps("lora", "ours", "tiny")
    assert {name: found[name] for name in row} == row
    assert (found["section"], depths) == ("step, lora", [2, 4])
