import pytest

from fastfuse import Unsupported, tune
from fastfuse.tune import Tile, pick, pin

OPS = ["nf4_linear"]


@pytest.mark.parametrize("op", OPS)
def test_last_row_of_each_architecture_is_unconditional(op):
    rows = tune.table(op)
    for arch in {r["arch"] for r in rows}:
        assert [r for r in rows if r["arch"] == arch][-1]["when"] == {}, arch


def test_first_match_wins_and_bounds_hold():
    def m(M, K=4096, decode="prmt", arch="sm_90"):
        return pick("nf4_linear", arch, dtype="16-bit", decode=decode, M=M, N=4096, K=K)

    assert m(1)["BLOCK_M"] == 16 and m(16) == m(1) and m(17) != m(16)
    assert m(1)["BLOCK_K"] == 128 and m(1, K=576)["BLOCK_K"] == 64  # 576 is no multiple of 128
    assert m(701) is None and m(700)["TRANSPOSED"]
    assert m(1, K=100) is None  # rows cut inside a step: decode once, then the library's GEMM
    assert m(1, decode="gather") is None  # the table look-up spills there


@pytest.mark.parametrize(
    "arch, rows_of", [("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942"), ("sm_90", "sm_90")]
)
def test_an_architecture_without_rows_uses_the_one_below(arch, rows_of):
    assert tune.covering_arch("nf4_linear", arch) == rows_of


@pytest.mark.parametrize("arch", ["sm_75", "gfx906", "gfx1100", "xpu"])
def test_an_uncovered_architecture_is_refused(arch):
    with pytest.raises(Unsupported, match=f"nf4_linear: no kernel covers {arch}, only gfx942, "):
        pick("nf4_linear", arch, dtype="16-bit", decode="prmt", M=1, N=64, K=64)


def test_pin_is_undone():
    tile = Tile({"BLOCK_M": 16})
    before = pick("nf4_linear", "sm_90", dtype="16-bit", decode="prmt", M=1, N=64, K=64)
    with pin("nf4_linear", tile):
        assert pick("nf4_linear", "sm_90", M=1) is tile
        with pin("nf4_linear", None):
            assert pick("nf4_linear", "sm_90", M=1) is None
    assert pick("nf4_linear", "sm_90", dtype="16-bit", decode="prmt", M=1, N=64, K=64) == before
