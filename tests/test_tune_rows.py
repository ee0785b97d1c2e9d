"""The rows of fastfuse/tune: which one serves a call."""

import json

import pytest

from fastfuse import Unsupported, tune
from fastfuse.tune import pick

SHAPE = {"dtype": "16-bit", "decode": "prmt", "N": 4096, "K": 4096}


def test_first_match_wins_and_bounds_hold():
    def m(M, **other):
        return pick("nf4_linear", "sm_90", **SHAPE | {"M": M} | other)

    assert m(1)["BLOCK_M"] == 16 and m(16) == m(1) and m(17) != m(16)
    assert m(1)["BLOCK_K"] == 128 and m(1, K=576)["BLOCK_K"] == 64  # 576 is no multiple of 128
    assert m(701) is None and m(700)["TRANSPOSED"]
    assert m(1, K=100) is None  # rows cut inside a step: decode once, then the library's GEMM
    assert m(1, decode="gather") is None  # the table look-up spills there


def test_an_architecture_without_rows_uses_the_one_below_or_is_refused():
    below = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120", "gfx950": "gfx942", "sm_90": "sm_90"}
    assert {arch: tune.covering_arch("nf4_linear", arch) for arch in below} == below
    for arch in ("sm_75", "gfx906", "gfx1100", "xpu"):
        with pytest.raises(Unsupported, match=f"nf4_linear: no kernel covers {arch}, only gfx942, "):
            pick("nf4_linear", arch, **SHAPE, M=1)


OLD, NEW, NEWER = ({"constants": {"BLOCK_M": 16}, "num_warps": 4, "num_stages": stages} for stages in (2, 3, 4))
SINCE = {"arch": "sm_90", "when": {"M_max": 8}, "tile": OLD, "us": [1.0], "since": {"3.10": {"tile": NEWER}, "3.9": {"tile": NEW, "us": [2.0]}}}


def test_a_row_holds_another_tile_since_a_triton(tmp_path, monkeypatch):
    for triton, tile, us in (("3.8.1", OLD, [1.0]), ("3.9.0", NEW, [2.0]), ("3.10.0+git1", NEWER, None), ("4.0", NEWER, None), ("0.0", OLD, [1.0])):
        row = tune.served(SINCE, triton)
        assert (row["arch"], row["when"], row["tile"], row.get("us")) == ("sm_90", {"M_max": 8}, tile, us)
    monkeypatch.setattr(tune, "__file__", str(tmp_path / "__init__.py"))  # tables are as the installed Triton takes them
    for release, tile in (("3.0", NEW), ("99.0", OLD)):
        (tmp_path / "lora_up.json").write_text(json.dumps([{"arch": "sm_90", "when": {}, "tile": OLD, "since": {release: {"tile": NEW}}}]))
        assert [row["tile"] for row in tune.table.__wrapped__("lora_up")] == [tile]
