"""x A^T, the update and the adapters' gradients: the kernels against float64; and the dropout mask they share."""

import pytest
import torch
from numerics import assert_no_worse, in_several_orders, opcheck

from fastfuse import tune
from fastfuse.ops.low_rank import LoRAGradArgs, drop, keep_mask, lora_down, lora_grad, lora_up

DOWN = tune.Tile({"BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 64, "SPLIT_K": 3})
UP = tune.Tile({"BLOCK_M": 16, "BLOCK_C": 64})
GRAD = tune.Tile({"BLOCK_M": 32, "BLOCK_C": 64, "BLOCK_R": 16, "PROGRAMS": 6})
KINDS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def test_philox_gives_the_published_words():
    """Random123's known answer for counter 0, key 0, and for all ones."""
    zero = _words(torch.zeros((), dtype=torch.int64), row=0, quad=0)
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def _words(seed, row, quad):
    """The four words behind keep_mask, found by bisection of its threshold: upper 31 bits, the last bit from the table above."""
    found = []
    for lane in range(4):
        low, high = 0, 2**31 - 1
        while low < high:
            middle = (low + high + 1) // 2
            kept = bool(keep_mask(seed, middle / 2**31, row + 1, quad * 4 + 4)[row, quad * 4 + lane])
            low, high = (middle, high) if kept else (low, middle - 1)
        found.append(low)
    return [w * 2 + (1 if lane in (0, 1) else 0) for lane, w in enumerate(found)]


def test_masks_differ_by_seed_row_and_column():
    seeds = torch.tensor([1, 2, 2**40 + 1])
    masks = [keep_mask(s, 0.5, 64, 102) for s in seeds]
    for m in masks:
        assert m.shape == (64, 102)
        assert abs(m.double().mean() - 0.5) < 5 * 0.5 / (64 * 102) ** 0.5  # five standard deviations of a fair coin
        assert len({tuple(row) for row in m.tolist()}) == 64
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[i] == masks[j]).double().mean() - 0.5) < 5 * 0.5 / (64 * 102) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 1.0])
def test_share_of_kept_elements(p):
    mask = keep_mask(torch.tensor(7), p, 300, 200).double()
    assert abs(mask.mean() - (1 - p)) <= 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert torch.equal(keep_mask(torch.tensor(7), p, 300, 200)[:50, :99].double(), mask[:50, :99])  # the place alone decides


@pytest.mark.parametrize("p", [None, 0.3])
@pytest.mark.parametrize("x_dtype, a_dtype", KINDS, ids=str)
@pytest.mark.parametrize("M, K, R", [(1, 64, 1), (17, 100, 16), (50, 321, 40)])
def test_down_and_up(M, K, R, x_dtype, a_dtype, p, device):
    x, a = torch.randn(M, 2, K, dtype=x_dtype, device=device)[:, 1], torch.randn(R, K, dtype=a_dtype, device=device)
    seed, p = (None, 0.0) if p is None else (torch.tensor(5, device=device), p)
    kept = drop(x, seed, p)
    low = torch.promote_types(x_dtype, a_dtype)
    with tune.pin("lora_down", DOWN), tune.pin("lora_up", UP):
        xa = lora_down(x, a, seed, p)
        up = lora_up(xa, a, 1.5, x_dtype, seed, p)
    assert_no_worse(xa, in_several_orders(lambda: kept.to(low) @ a.to(low).T), kept.double() @ a.double().T, "down")
    eager = in_several_orders(lambda: drop((xa @ a.to(low)) * 1.5, seed, p).to(x_dtype))
    assert_no_worse(up, eager, drop((xa.double() @ a.double()) * 1.5, seed, p), "up")


@pytest.mark.parametrize("p", [None, 0.3])
@pytest.mark.parametrize("t_dtype, low_dtype", KINDS, ids=str)
@pytest.mark.parametrize("M, C, R, outer, thin, factor", [(1, 64, 1, True, True, True), (50, 130, 16, True, True, False), (130, 65, 24, True, False, True), (33, 64, 8, False, True, False)])  # fmt: skip
def test_grad(M, C, R, outer, thin, factor, t_dtype, low_dtype, p, device):
    tall = torch.randn(M, C + 3, dtype=t_dtype, device=device)[:, :C]
    low = torch.randn(M, 2 * R, dtype=low_dtype, device=device)[:, R:]
    thin = torch.randn(C, R, dtype=low_dtype, device=device) if thin else None
    factor = torch.rand(C, device=device) + 0.5 if factor else None
    seed, p = (None, 0.0) if p is None else (torch.tensor(9, device=device), p)
    with tune.pin("lora_grad", GRAD):
        got = lora_grad(LoRAGradArgs(tall, low, thin, factor, seed, p, 0.7, outer, True))
    eager = in_several_orders(lambda *tensors: lora_grad(LoRAGradArgs(*tensors, p, 0.7, outer, False)), tall, low, thin, factor, seed)
    t = drop(tall.double() * (1 if factor is None else factor.double()), seed, p)
    exact = {"outer": t.T @ low.double() * 0.7 if outer else None, "through": None if thin is None else t @ (thin.double() * 0.7)}
    exact = {what: value for what, value in exact.items() if value is not None}
    for what, *values in zip(exact, got, zip(*eager, strict=True), exact.values(), strict=True):
        assert_no_worse(*values, what)


def test_grad_reads_rows_past_the_last_split_as_nothing(device):
    """M cut by the splits: NaN in what lies behind the rows must not reach the sums."""
    tall = torch.full((200, 64), torch.nan, device=device)
    tall[:130] = torch.randn(130, 64, device=device)
    low = torch.full((200, 8), torch.nan, device=device)
    low[:130] = torch.randn(130, 8, device=device)
    with tune.pin("lora_grad", GRAD):
        outer, through = lora_grad(LoRAGradArgs(tall[:130], low[:130], torch.randn(64, 8, device=device), None, None, 0.0, 1.0, True, True))
    assert outer.isfinite().all() and through.isfinite().all()


@pytest.mark.parametrize("interpret", [False, True])
def test_registered_op(interpret, device):
    tall = torch.randn(6, 64, device=device, requires_grad=True)
    low, thin = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(64, 8, device=device, requires_grad=True)
    factor, seed = torch.rand(64, device=device, requires_grad=True), torch.tensor(3, device=device)
    for args in ((thin, factor, None, 0.0, 2.0, True), (None, None, seed, 0.5, 1.0, True), (thin, None, None, 0.0, 1.0, False)):
        opcheck(lora_grad, LoRAGradArgs(tall, low, *args, interpret))
