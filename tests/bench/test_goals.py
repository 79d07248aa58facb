"""Goals are read from rows, and what is missed is said with what was found."""

from experiments.bench.goals import missed

H100, CPU = "NVIDIA H100 80GB HBM3", "CPU of some kind, 2 cores"


def attention(work, contender, **values):
    return {"section": work, "shape": "d128", "contender": contender} | values


REACHED = [
    attention("forward", "mosaic_gpu", **{"TFLOP/s": 601.0}),
    attention("forward", "pallas_gpu", **{"TFLOP/s": 410.0}),
    attention("forward", "cudnn", **{"TFLOP/s": 500.0}),
    attention("forward", "torch sdpa cudnn", **{"TFLOP/s": 512.0}),
    attention("backward", "pallas_gpu", **{"TFLOP/s": 451.0}),
    attention("backward", "torch sdpa cudnn", **{"TFLOP/s": 500.0}),
    *[
        {"section": "decode", "shape": shape, "contender": "mosaic_gpu", "GB/s": 2100.0}
        for shape in ("deepseek-v3-decode", "deepseek-v3-decode-tp8")
    ],
    {"section": "step, lora", "contender": "ours", "tokens/s": 13000.0},
    {"section": "step, lora", "contender": "torch sdpa", "tokens/s": 9000.0},
    {"section": "step, full", "contender": "ours", "tokens/s": 5.0},
    {"section": "step, full", "contender": "torch compiled", "tokens/s": 4.0},
    *[
        {
            "section": "generation",
            "contender": name,
            "rows": 1,
            "decode, tokens/s": speed,
            "prefill, tokens/s": speed,
        }
        for name, speed in (("ours", 3.0), ("torch sdpa", 2.0))
    ],
    {"section": "parity", "op": "x", "impl": "chunked", "limit": 1e-5, "error of o": 9e-6},
]


def test_nothing_is_short_where_all_goals_are_reached():
    assert missed(REACHED, H100) == []


def test_what_is_short_is_said_with_what_was_found():
    rows = [dict(row) for row in REACHED]
    rows[0]["TFLOP/s"], rows[1]["TFLOP/s"] = 599.0, 400.0
    rows[9]["tokens/s"], rows[-1]["error of o"] = 13001.0, float("nan")
    found = missed(rows, H100)
    assert [row["what"] for row in found] == [
        "parity x chunked",
        "d128 forward, best of ours, TFLOP/s",
        "d128 forward, pallas_gpu over cuDNN",
        "LoRA step at 32 layers over transformers + PEFT's best",
    ]
    assert [row["found"] for row in found[1:]] == [599.0, 400 / 512, 13000 / 13001]
    assert [row["goal"] for row in found] == ["<= 1e-05", ">= 600", ">= 0.8", ">= 1"]


def test_torchs_speed_is_none_of_ours():
    rows = [attention("forward", "torch sdpa cudnn", **{"TFLOP/s": 9999.0})]
    found = {row["what"]: row["found"] for row in missed(rows, H100)}
    assert found["d128 forward, best of ours, TFLOP/s"] == "not measured"


def test_goals_of_one_device_are_not_those_of_another():
    assert [row for row in missed(REACHED, CPU) if "TFLOP/s" in row["what"]] == []
    left = [row["what"] for row in missed([], CPU)]
    assert left == [
        "LoRA step at 32 layers over transformers + PEFT's best",
        "full step at 32 layers over transformers' best",
        "decode of one row over transformers",
        "prefill of one row over transformers",
    ]
