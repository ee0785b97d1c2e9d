"""The one tolerance: a fused result may be at most twice as far from float64 as eager PyTorch in the same dtype, plus one ulp."""

import torch
from torch import Tensor


def worse_than_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """Why `fused` breaks the rule against the float64 result `exact`, or None where it keeps it.

    err(fused) <= 2 * err(eager) + 1 ulp of the largest exact value, in the maximum norm. NaN and inf never pass.
    """
    if fused.dtype != eager.dtype or fused.shape != eager.shape:
        return f"{fused.dtype} {tuple(fused.shape)}, eager gives {eager.dtype} {tuple(eager.shape)}"
    if exact.numel() == 0:
        return None
    exact = exact.double()
    err, eager_err = (fused.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item()
    largest = exact.abs().max()
    ulp = torch.finfo(eager.dtype).eps * 2.0 ** torch.floor(torch.log2(largest)).item() if largest > 0 else 0.0
    return None if err <= 2 * eager_err + ulp else f"error {err:.3e} > 2 x eager's {eager_err:.3e} + ulp {ulp:.3e}"


def assert_no_worse(fused: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    reason = worse_than_eager(fused, eager, exact)
    assert reason is None, f"{what}: {reason}"
