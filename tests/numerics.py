"""The one tolerance: a fused result may be at most twice as far from float64 as eager PyTorch in the same dtype, plus one ulp."""

import copy
import types

import torch
from torch import Tensor, nn


def allowed_error(eager: Tensor, exact: Tensor) -> float:
    """2 * err(eager) + 1 ulp of the largest exact value, in the maximum norm; `exact` is the float64 result."""
    exact = exact.double()
    largest = exact.abs().max()
    ulp = torch.finfo(eager.dtype).eps * 2.0 ** torch.floor(torch.log2(largest)).item() if largest > 0 else 0.0
    return 2 * max_error(eager, exact) + ulp


def max_error(result: Tensor, exact: Tensor) -> float:
    return (result.detach().double() - exact.double()).abs().max().item()


def worse_than_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """Why `fused` breaks the rule, or None where it keeps it. NaN and inf never pass."""
    if fused.dtype != eager.dtype or fused.shape != eager.shape:
        return f"{fused.dtype} {tuple(fused.shape)}, eager gives {eager.dtype} {tuple(eager.shape)}"
    if exact.numel() == 0:
        return None
    err, allowed = max_error(fused, exact), allowed_error(eager, exact)
    return None if err <= allowed else f"error {err:.3e} > {allowed:.3e} = 2 x eager's {max_error(eager, exact):.3e} + 1 ulp"


def assert_no_worse(fused: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    reason = worse_than_eager(fused, eager, exact)
    assert reason is None, f"{what}: {reason}"


def assert_rounding_apart(got: Tensor, want: Tensor, K: int, products: int = 1) -> None:
    """Two correct results of a chain of `products` matrix products over K may differ by rounding alone.

    Relative in 2-norm, each product adds at most the larger of eps of the dtype (weights and outputs round to it) and
    eps(fp32) * sqrt(K) (fp32 sums in another order).
    """
    assert got.dtype == want.dtype and got.shape == want.shape
    allowed = products * max(torch.finfo(want.dtype).eps, torch.finfo(torch.float32).eps * K**0.5)
    apart = (got.double() - want.double()).norm() / want.double().norm()
    assert apart <= allowed, f"{apart:.2e} apart relative, rounding explains {allowed:.2e}"


def exactly(model: nn.Module) -> nn.Module:
    """A copy in float64; transformers would still normalise in fp32."""
    made = copy.deepcopy(model).double()

    def normalise(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for m in made.modules():
        if type(m).__name__ == "MllamaTextRMSNorm":
            m.forward = types.MethodType(normalise, m)
    made.set_attn_implementation("sdpa")
    return made
