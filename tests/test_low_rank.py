"""x A^T and the update by kernel against float64, and the dropout mask that all kernels share. The adapters' gradients: tests/test_ops.py."""

from itertools import combinations

import pytest
import torch
from numerics import Orders, assert_no_worse, opcheck

from fastfuse import tune
from fastfuse.ops.low_rank import LoRAGradArgs, drop, keep_mask, lora_down, lora_grad, lora_up

DOWN = tune.Tile({"BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 64, "SPLIT_K": 3})
UP = tune.Tile({"BLOCK_M": 16, "BLOCK_C": 64})
GRAD = tune.Tile({"BLOCK_M": 32, "BLOCK_C": 64, "BLOCK_R": 16, "PROGRAMS": 6})
KINDS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def test_philox_gives_the_published_words():
    """Random123's known answer for counter 0 and key 0; of each word the upper 31 bits are what a threshold is compared with."""
    seed = torch.zeros((), dtype=torch.int64)
    for lane, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        assert [keep_mask(seed, limit / 2**31, 1, 4)[0, lane].item() for limit in (word >> 1, (word >> 1) + 1)] == [True, False]


def test_masks_differ_by_seed_row_and_column():
    masks = [keep_mask(seed, 0.5, 64, 102) for seed in torch.tensor([1, 2, 2**40 + 1])]
    assert all(m.shape == (64, 102) and len({*map(tuple, m.tolist())}) == 64 for m in masks)
    for fair in (*masks, *(a == b for a, b in combinations(masks, 2))):
        assert abs(fair.double().mean() - 0.5) < 5 * 0.5 / (64 * 102) ** 0.5  # five standard deviations of a fair coin


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 1.0])
def test_share_of_kept_elements(p):
    mask = keep_mask(torch.tensor(7), p, 300, 200).double()
    assert abs(mask.mean() - (1 - p)) <= 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert torch.equal(keep_mask(torch.tensor(7), p, 300, 200)[:50, :99].double(), mask[:50, :99])  # the place alone decides


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("M, K, R", [(1, 64, 1), (17, 100, 16), (33, 197, 20)])
def test_down_and_up(M, K, R, kind, device):
    x_dtype, a_dtype = kind
    dropout = (torch.tensor(5, device=device), 0.3) if (KINDS.index(kind) + M) % 2 else (None, 0.0)
    x, a = torch.randn(M, 2, K, dtype=x_dtype, device=device)[:, 1], torch.randn(R, K, dtype=a_dtype, device=device)
    kept, low = drop(x, *dropout), torch.promote_types(x_dtype, a_dtype)
    with tune.pin("lora_down", DOWN), tune.pin("lora_up", UP):
        xa = lora_down(x, a, *dropout)
        up = lora_up(xa, a, 1.5, x_dtype, *dropout)
    assert_no_worse(xa, Orders(lambda: kept.to(low) @ a.to(low).T), kept.double() @ a.double().T, "down")
    eager = Orders(lambda: drop((xa @ a.to(low)) * 1.5, *dropout).to(x_dtype))
    assert_no_worse(up, eager, drop((xa.double() @ a.double()) * 1.5, *dropout), "up")


def test_grad_reads_rows_past_the_last_split_as_nothing(device):
    """M cut by the splits: NaN in what lies behind the rows must not reach the sums."""
    tall, low = (torch.full((200, n), torch.nan, device=device) for n in (64, 8))
    for t in (tall, low):
        t[:130] = torch.randn(130, t.shape[1], device=device)
    with tune.pin("lora_grad", GRAD):
        outer, through = lora_grad(LoRAGradArgs(tall[:130], low[:130], torch.randn(64, 8, device=device), None, None, 0.0, 1.0, True, True))
    assert outer.isfinite().all() and through.isfinite().all()


def test_registered_op(device):
    """Its gradients, which only a gradient of a gradient takes; its launches are seen in tests/test_ops.py."""
    tall, low, thin = (torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 64), (6, 8), (64, 8)))
    factor, seed = torch.rand(64, device=device, requires_grad=True), torch.tensor(3, device=device)
    for args in ((thin, factor, None, 0.0, 2.0, True), (None, None, seed, 0.5, 1.0, True), (thin, None, None, 0.0, 1.0, False)):
        opcheck(lora_grad, LoRAGradArgs(tall, low, *args, False))
