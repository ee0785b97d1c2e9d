"""The one tolerance: a fused result may be at most twice as far from float64 as eager PyTorch in the same dtype, plus one ulp.

Eager PyTorch has no one error: which order it sums in depends on the CPU, on the number of threads and on a tensor's layout. In a tensor
of few numbers two correct orders may lie more than a factor of two apart (a 3 x 192 by 192 x 65 product in fp32 is off by 5e-6 or by 2e-5,
by the layout of the weight). So eager counts with its worst error over several orders, which in_several_orders runs;
test_numerics.py shows what the rule still catches.
"""

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse.ops._fused_op import encoded

aten = torch.ops.aten
T = TypeVar("T")
STEPS = 1024  # of one sum: larger K goes in slices, for time's sake


def opcheck(op, args: tuple, checks: Sequence[str] = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")) -> None:
    """PyTorch's own checks of a registered op."""
    torch.library.opcheck(op.overload, encoded(args), test_utils=checks)


def allowed_error(eager: Tensor | Sequence[Tensor], exact: Tensor) -> float:
    """2 * err(eager) + 1 ulp of the largest exact value, in the maximum norm; `exact` is the float64 result, `eager` one result or several."""
    orders, exact = [eager] if isinstance(eager, Tensor) else eager, exact.double()
    largest = exact.abs().max()
    ulp = torch.finfo(orders[0].dtype).eps * 2.0 ** torch.floor(torch.log2(largest)).item() if largest > 0 else 0.0
    return 2 * max(max_error(e, exact) for e in orders) + ulp


def max_error(result: Tensor, exact: Tensor) -> float:
    return (result.detach().double() - exact.double()).abs().max().item()


def worse_than_eager(fused: Tensor, eager: Tensor | Iterable[Tensor], exact: Tensor) -> str | None:
    """Why `fused` breaks the rule, or None where it keeps it. NaN and inf never pass. Once an order allows the error the others are not asked for."""
    allowed = 0.0
    for order in [eager] if isinstance(eager, Tensor) else eager:
        if fused.dtype != order.dtype or fused.shape != order.shape:
            return f"{fused.dtype} {tuple(fused.shape)}, eager gives {order.dtype} {tuple(order.shape)}"
        if exact.numel() == 0:
            return None
        err, allowed = max_error(fused, exact), max(allowed, allowed_error(order, exact))
        if err <= allowed:
            return None
    return f"error {err:.3e} > {allowed:.3e} = 2 x eager's worst + 1 ulp"


def assert_no_worse(fused: Tensor, eager: Tensor | Iterable[Tensor], exact: Tensor, what: str = "result") -> None:
    """eager: one result, or those of in_several_orders."""
    reason = worse_than_eager(fused, eager, exact)
    assert reason is None, f"{what}: {reason}"


def assert_same(got: nn.Module | Mapping[str, Tensor], want: nn.Module | Mapping[str, Tensor]) -> None:
    """Two models or state dicts hold the same tensors to the bit."""
    got, want = (dict(m.state_dict()) if isinstance(m, nn.Module) else m for m in (got, want))
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name


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


class Orders(Generic[T]):
    """What run(*args) gives as PyTorch sums, with matrix products summed one term at a time, and eight times with the terms of every sum shuffled.

    Each is computed when it is asked for first, and the first mostly says that a result is right: run(*args) must give the same as long as this is used.
    Left in their order: causal attention, matrix times vector, a GPU's attention kernels, and whatever a library calls that is none of the operators here.
    """

    def __init__(self, run: Callable[..., T], *args, **kwargs):
        self._run = partial(run, *args, **kwargs)
        self._found = [self._run()]
        self._left = [_OneByOne(), *(_Shuffled(seed) for seed in range(8))]

    def __iter__(self) -> Iterator[T]:
        for i in count():
            if i == len(self._found):
                if not self._left:
                    return
                with self._left.pop(0):
                    self._found.append(self._run())
            yield self._found[i]


def in_several_orders(run: Callable[..., T], *args, **kwargs) -> list[T]:
    """All Orders of what may change afterwards."""
    return list(Orders(run, *args, **kwargs))


class _Order(TorchDispatchMode):
    """Operators on ordinary tensors for which a subclass has another way of summing; everything else runs as it is."""

    ways: dict

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and PyTorch's guard against it takes as long as an operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        way = self.ways.get(func.overloadpacket)
        ordinary = all(type(t) in (Tensor, nn.Parameter) for t in args if isinstance(t, Tensor))
        return (way if way and ordinary else func)(*args, **(kwargs or {}))


class _OneByOne(_Order):
    """Products as the fp32 units of a GPU sum them: one term after the other onto one fp32 sum, rounded to the dtype once."""

    def __init__(self):
        super().__init__()
        one, added = _one_by_one, _added(_one_by_one)
        self.ways = {aten.mm: one, aten.bmm: one, aten.addmm: added, aten.baddbmm: added, aten.linear: _linear(one)}


def _one_by_one(a: Tensor, b: Tensor) -> Tensor:
    wide, size = torch.promote_types(a.dtype, torch.float32), -(-a.shape[-1] // STEPS)
    out = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=wide, device=a.device)
    add = out.addmm_ if a.dim() == 2 else out.baddbmm_
    for x, w in zip(a.to(wide).split(size, -1), b.to(wide).split(size, -2), strict=True):
        add(x, w)
    return out.to(a.dtype)


def _added(product: Callable) -> Callable:
    def run(added: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        return (beta * added.to(wide) + alpha * product(a.to(wide), b.to(wide))).to(a.dtype)

    return run


def _linear(product: Callable) -> Callable:
    def run(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        out = product(x.flatten(0, -2) if x.dim() > 1 else x[None], w.T)
        return (out if bias is None else out + bias).view(*x.shape[:-1], w.shape[0])

    return run


class _Shuffled(_Order):
    """The terms of every sum in a random order."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.ways = {
            aten.mm: self.mm,
            aten.bmm: self.mm,
            aten.addmm: self.addmm(aten.addmm),
            aten.baddbmm: self.addmm(aten.baddbmm),
            aten.linear: self.linear,
            aten.convolution: self.convolution,
            aten.convolution_backward: self.convolution_backward,
            aten.sum: self.reduce(aten.sum),
            aten.mean: self.reduce(aten.mean),
            aten.linalg_vector_norm: self.norm,
            aten._softmax: self.softmax,
            aten._softmax_backward_data: self.softmax_backward,
            aten.native_layer_norm: self.layer_norm,
            aten.native_layer_norm_backward: self.layer_norm_backward,
            aten._scaled_dot_product_flash_attention_for_cpu: self.attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: self.attention_backward,
        }

    def order(self, n: int, like: Tensor) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(like.device)

    def mm(self, a, b):
        order = self.order(a.shape[-1], a)
        return (aten.mm if a.dim() == 2 else aten.bmm)(a[..., order], b[..., order, :])

    def addmm(self, op):
        def run(added, a, b, **scales):
            order = self.order(a.shape[-1], a)
            return op(added, a[..., order], b[..., order, :], **scales)

        return run

    def linear(self, x, w, bias=None):
        order = self.order(w.shape[1], x)
        return aten.linear(x[..., order], w[:, order], bias)

    def convolution(self, x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
        if groups == 1 and not transposed:
            order = self.order(w.shape[1], x)
            x, w = x[:, order], w[:, order]
            if w.dim() == 4 and list(w.shape[2:]) == list(stride) and not any(padding) and set(dilation) == {1}:  # patches: a patch's pixels in reverse too
                x = x[..., : x.shape[2] // stride[0] * stride[0], : x.shape[3] // stride[1] * stride[1]]
                return aten.convolution(x.flip(2, 3), w.flip(2, 3), bias, stride, padding, dilation, transposed, output_padding, groups).flip(2, 3)
        return aten.convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)

    def convolution_backward(self, dy, x, w, *rest):
        images = self.order(x.shape[0], x)
        dx, dw, db = aten.convolution_backward(dy[images], x[images], w, *rest)
        return None if dx is None else dx[images.argsort()], dw, db

    def reduce(self, op):
        def run(x, dims=None, *args, **kwargs):
            whole = dims is None or len(dims) == 0
            for dim in range(x.dim()) if whole else dims:
                x = x.index_select(dim, self.order(x.shape[dim], x))
            return op(x, **kwargs) if dims is None and not args else op(x, dims, *args, **kwargs)

        return run

    def norm(self, x, ord=2, dim=None, *args, **kwargs):
        for d in range(x.dim()) if dim is None else dim:
            x = x.index_select(d, self.order(x.shape[d], x))
        return aten.linalg_vector_norm(x, ord, dim, *args, **kwargs)

    def softmax(self, x, dim, *args):
        order = self.order(x.shape[dim], x)
        return aten._softmax(x.index_select(dim, order), dim, *args).index_select(dim, order.argsort())

    def softmax_backward(self, dy, y, dim, *args):
        order = self.order(y.shape[dim], y)
        return aten._softmax_backward_data(dy.index_select(dim, order), y.index_select(dim, order), dim, *args).index_select(dim, order.argsort())

    def layer_norm(self, x, shape, w, b, eps):
        if len(shape) > 1:
            return aten.native_layer_norm(x, shape, w, b, eps)
        order = self.order(x.shape[-1], x)
        moved = (None if t is None else t[..., order] for t in (w, b))
        out, *rest = aten.native_layer_norm(x[..., order], shape, *moved, eps)
        return out[..., order.argsort()], *rest

    def layer_norm_backward(self, dy, x, shape, mean, rstd, w, b, mask):
        if len(shape) > 1 or x.dim() < 2:
            return aten.native_layer_norm_backward(dy, x, shape, mean, rstd, w, b, mask)
        order, rows = self.order(x.shape[-1], x), self.order(x.flatten(0, -2).shape[0], x)

        def moved(t):
            return t.reshape(-1, t.shape[-1])[rows] if t.shape[-1] == 1 else t.reshape(-1, t.shape[-1])[rows][:, order]

        scales = (None if t is None else t[order] for t in (w, b))
        dx, dw, db = aten.native_layer_norm_backward(moved(dy), moved(x), shape, moved(mean), moved(rstd), *scales, mask)
        back = order.argsort()
        dx = None if dx is None else dx[rows.argsort()][:, back].view(x.shape)
        return dx, *(None if t is None else t[back] for t in (dw, db))

    def attention(self, q, k, v, dropout=0.0, causal=False, *, attn_mask=None, scale=None):
        keys = slice(None) if causal else self.order(k.shape[2], k)
        mask = attn_mask if attn_mask is None or attn_mask.shape[-1] == 1 else attn_mask[..., keys]
        op = aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k[:, :, keys], v[:, :, keys], dropout, causal, attn_mask=mask, scale=scale)

    def attention_backward(self, dy, q, k, v, out, lse, dropout, causal, *, attn_mask=None, scale=None):
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        if causal:
            return op(dy, q, k, v, out, lse, dropout, causal, attn_mask=attn_mask, scale=scale)
        keys, rows = self.order(k.shape[2], k), self.order(q.shape[2], q)
        mask = attn_mask if attn_mask is None or attn_mask.shape[-1] == 1 else attn_mask[..., keys]
        mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
        turned = (t[:, :, rows] for t in (dy, q))
        dq, dk, dv = op(*turned, k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows], dropout, causal, attn_mask=mask, scale=scale)
        back = keys.argsort()
        return dq[:, :, rows.argsort()], dk[:, :, back], dv[:, :, back]
