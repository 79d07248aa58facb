"""The page of attention shows what the code does."""

from experiments.command.attention_page import (
    PAGE,
    PROBES,
    Probe,
    _cell,
    _picture,
    count_tiles,
    refreshed,
)
from llmprep_jax.kernels.flash_attention import chunked
from llmprep_jax.kernels.flash_attention.masks import Places, Rule


def test_pictures_counts_and_capabilities_are_up_to_date():
    saved = PAGE.read_text(encoding="utf-8")
    assert saved == refreshed(saved), "python -m experiments.command.attention_page"
    assert saved.count("<!-- made: ") == saved.count("<!-- end -->") == 3


def test_a_picture_is_a_row_a_query():
    rows = _picture(Rule(window=2))
    assert rows[0] == "#........."
    assert rows[9] == "........##"


def test_tiles_are_those_that_hold_a_pair():
    # of 16 blocks of 256 queries and 32 of 128 keys: 2 4 6 ... 32
    assert count_tiles(4096, Rule(), Places()) == (272, 512, 4096 * 4097 // 2)
    # no block of queries reaches back over more than four further blocks of keys: 2 4 6 6 ... 6
    visited, total, pairs = count_tiles(4096, Rule(window=512), Places())
    assert (visited, total) == (90, 512)
    assert pairs == 512 * 513 // 2 + 3584 * 512


def test_a_local_layer_of_gemma_3_costs_less_than_an_eighth_of_a_global_one_at_32k():
    local, whole = [count_tiles(32768, Rule(window=window), Places()) for window in (1024, None)]
    assert local[0] < whole[0] / 8


def test_a_cell_says_what_is_refused_and_why(monkeypatch):
    def refusal(q, k, v, rule, backward):
        if rule.window is not None:
            return "knows no window"
        return "has no backward" if backward else None

    reasons = []
    assert _cell("chunked", PROBES["a window"], reasons) == "both"
    monkeypatch.setattr(chunked, "refusal", refusal)
    cells = [_cell("chunked", probe, reasons) for probe in (PROBES["a window"], Probe(), Probe())]
    assert cells == ["no (1)", "forward (2)", "forward (2)"]
    assert reasons == ["`chunked`: knows no window", "`chunked`: has no backward"]
