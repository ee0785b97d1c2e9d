"""Attention of text over encoder tokens where a mask lets it, forward and backward."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import DkDvStrides, DqStrides, ForwardStrides, Lengths, Mask, RowSums, Strides
from fastfuse.ops._attention_ref import (
    LOG2E,
    AttentionArgs,
    AttentionGradArgs,
    backward,
    backward_on_cpu,
    dense,
    empty_like,
    formula,
    forward,
    forward_on_cpu,
    group_of,
)
from fastfuse.ops._fused_op import fused_op, remember, signature
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, Cost, Plan, autocast_dtype, constant, differentiated_twice, kernel_dtype, nbytes, no_autocast, precision, route
from fastfuse.ops.encoder_mask import AttentionMask, Blocks, EncoderMask

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastfuse.kernels.cross_attention import (
        cross_attention_delta_kernel,
        cross_attention_dkdv_kernel,
        cross_attention_dq_kernel,
        cross_attention_fwd_kernel,
        cross_attention_merge_kernel,
    )

# Beyond 128 in fp32 every tile spills: three tf32 products of 256 columns unroll into 240 HMMA and their operands.
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
MAX_GROUP = 32  # rows of 64 heads and more need more shared memory than the smaller chips have
MAX_KEY_HEADS = 65535  # of a grid's second dimension
EVERYTHING = Lengths(None)
served: dict[tuple, Callable] = {}  # calls that have passed the checks: see signature()


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | EncoderMask | None = None,
    *,
    scale: float | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the encoder tokens that each text token may see (https://arxiv.org/abs/1706.03762).

    q: (b, hq, s, d), k, v: (b, hkv, s_e, d), hkv dividing hq: key head j serves query heads j * hq / hkv and on (https://arxiv.org/abs/2305.13245).
    Any strides of the first three dims.  ->  (b, hq, s, d) in q's layout, with return_lse also log(sum(exp(scores))), fp32 (b, hq, s).
    mask: bool (b or 1, s, s_e), True where attention is allowed, an EncoderMask of that shape, or None. A model prepares an
    EncoderMask once for all its layers. scale: 1 / sqrt(d) where None.
    empty_rows: what a token gets that may see nothing, "zero" (0, and no gradient to anything; its lse is inf) or "uniform", the softmax over every encoder token.

    Scores and sums are fp32, weights round to v's dtype before they meet it. Deterministic. k and v of hidden tokens must be finite.
    Gradients for q, k, v, of the lse too. Under autocast all three follow its dtype. Nothing waits for the device.
    Raises TypeError, ValueError or Unsupported before any launch.
    """
    op, key = "cross_attention", None
    if mask is None:
        key = signature((q, k, v), (op, scale, empty_rows, backend))
    elif type(mask) is EncoderMask:
        key = signature((q, k, v, mask.rows), (op, scale, empty_rows, backend, mask.kind, mask.s_e))
    uniform = empty_rows == "uniform"
    if key is not None and key in served and (mask is None or (q.shape[1] // k.shape[1], uniform) in mask.served):
        for_op = EVERYTHING if mask is None else mask.served[q.shape[1] // k.shape[1], uniform]
        o, lse = served[key](_new(AttentionArgs, (q, k, v, for_op, q.shape[3] ** -0.5 if scale is None else float(scale), False)))
    else:
        _check(op, q, k, v, mask, empty_rows)
        o, lse = attend(op, q, k, v, mask, scale, backend, uniform, key)
    return (o, _public_lse(lse, q)) if return_lse else o


def attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | Lengths | None, scale: float | None, backend: str | None,
    uniform: bool = False, key: tuple | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse [b, hkv, s, GP], base 2) of checked arguments; with Lengths each batch row sees the first columns. key: of the call's signature."""
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    chosen = route(op, q, backend)
    scale = constant(q.shape[-1] ** -0.5 if scale is None else scale)
    if chosen == "reference":
        visible = mask.to_dense() if isinstance(mask, EncoderMask) else dense(mask, q.shape[2], k.shape[2]) if isinstance(mask, Lengths) else mask
        if uniform and visible is not None:
            visible = visible | ~visible.any(-1, keepdim=True)
        with no_autocast(q.device):
            return formula(q, k, v, visible, scale)
    G, by_kernels = q.shape[1] // k.shape[1], chosen == "interpreter" or q.device.type == "cuda"
    if by_kernels and (reason := uncovered(q.dtype, q.shape[-1], G, q.shape[0] * k.shape[1])):
        raise Unsupported(f"{op}: {reason}")
    if mask is None or isinstance(mask, Lengths):
        for_op = mask or EVERYTHING
    else:
        mask = mask if isinstance(mask, EncoderMask) else EncoderMask.from_dense(mask)
        for_op = mask.for_op(listed_tokens(G) if by_kernels else None, uniform)
        if key is not None and mask.serves(for_op):
            mask.served[G, uniform] = for_op
    args = AttentionArgs(q, k, v, for_op, scale, chosen == "interpreter")
    o, lse = _attention(args)
    remember(served, key, _attention, args)
    return o, lse


def _check(op: str, q, k, v, mask, empty_rows: str) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t, "b, heads, tokens, head_dim")
    if k.shape != v.shape:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, v {tuple(v.shape)}")
    check_alike(op, "q", q, "k", k)
    check_alike(op, "q", q, "v", v)
    check_heads(op, q, "k", k)
    check_mask(op, mask, k, q.shape[2])
    if empty_rows not in ("zero", "uniform"):
        raise ValueError(f"{op}: empty_rows is {empty_rows!r}, expected 'zero' or 'uniform'")


def check_tensor(op: str, name: str, t, dims: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
    if t.dim() != 4:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected ({dims})")
    if not t.is_floating_point():
        raise ValueError(f"{op}: {name} is {t.dtype}, expected floating point")


def check_alike(op: str, name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Device, and dtype where autocast does not settle it."""
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device}, {other} on {like.device}")
    if t.dtype != like.dtype and autocast_dtype(t.device) is None:
        raise ValueError(f"{op}: {name} is {t.dtype}, {other} {like.dtype}")


def check_heads(op: str, q: Tensor, owner: str, k: Tensor) -> None:
    (b, hq, _, d), (b_k, hkv, _, d_k) = q.shape, k.shape
    if b != b_k:
        raise ValueError(f"{op}: q has a batch of {b}, {owner} of {b_k}")
    if d != d_k or d == 0:
        raise ValueError(f"{op}: q has head_dim {d}, {owner} {d_k}" if d else f"{op}: head_dim is 0")
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"{op}: q has {hq} heads, {owner} {hkv}, which does not divide them")


def check_mask(op: str, mask, k: Tensor, s: int | None = None) -> None:
    """s: how many rows it must have, those of q; one or more where None."""
    if mask is None:
        return
    if not isinstance(mask, (Tensor, EncoderMask)):
        raise TypeError(f"{op}: mask is a {type(mask).__name__}, expected a bool tensor or an EncoderMask")
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask is {mask.dtype}, expected torch.bool, True where attention is allowed")
    b, _, s_e, _ = k.shape
    # Compared one by one: torch.compile answers `n in (1, b)` with no for a b that is a symbol.
    fits = len(mask.shape) == 3 and (mask.shape[0] == 1 or mask.shape[0] == b) and mask.shape[2] == s_e
    if not fits or (mask.shape[1] == 0 if s is None else mask.shape[1] != s):
        needed = f"k needs ({b} or 1, 1 or more, {s_e})" if s is None else f"q and k need ({b} or 1, {s}, {s_e})"
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, {needed}")
    if mask.device != k.device:
        raise ValueError(f"{op}: {'k' if s is None else 'q'} is on {k.device}, mask on {mask.device}")


def uncovered(dtype: torch.dtype, head_dim: int, group: int, key_heads: int = 1) -> str | None:
    """Why no kernel takes queries like these, `group` of whose heads share a key head, `key_heads` of them in the batch; None where one does."""
    if dtype not in MAX_HEAD_DIM:
        return f"q is {dtype}, covered are bf16, fp16 and fp32"
    if head_dim > MAX_HEAD_DIM[dtype]:
        return f"head_dim is {head_dim}, covered are up to {MAX_HEAD_DIM[dtype]} in {dtype}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key head, covered are up to {MAX_GROUP}"
    return f"the batch has {key_heads} key heads in all, covered are up to {MAX_KEY_HEADS}" if key_heads > MAX_KEY_HEADS else None


def listed_tokens(G: int) -> int:
    """Tokens of a block in the mask's lists: 128 rows."""
    return max(1, 128 // (1 << (G - 1).bit_length()))


def _public_lse(lse: Tensor, q: Tensor) -> Tensor:
    G = q.shape[1] // lse.shape[1]
    return lse[..., :G].transpose(2, 3).reshape(q.shape[:3]) / LOG2E


def cross_attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | None = None, **options) -> Tensor | tuple[Tensor, Tensor]:
    """The formula, eager: cross_attention with backend="torch"."""
    return cross_attention(q, k, v, mask, **options, backend="torch")


def cross_attention_cost(q: Tensor, k: Tensor, v: Tensor, mask: object = None, *, visible: float = 1.0) -> Cost:
    """Forward: q, and of k and v the visible fraction, read once; o written once. Two products over what is visible."""
    return Cost(2 * nbytes(q) + round(visible * nbytes(k, v)), round(4 * q.numel() * k.shape[2] * visible))


def cross_attention_bwd_cost(q: Tensor, k: Tensor, v: Tensor, mask: object = None, *, visible: float = 1.0) -> Cost:
    """All three gradients: q, o, dO read and dQ written once, k and v as far as visible, dK and dV whole. Five products."""
    return Cost(4 * nbytes(q) + round((1 + visible) * nbytes(k, v)), round(10 * q.numel() * k.shape[2] * visible))


def merge_warps(head_dim: int) -> int:
    """Of cross_attention_merge_kernel: four spill 256 columns with Triton 3.9 on sm_100."""
    return 8 if head_dim > 128 else 4


class _Common:
    """What the launches for one kind of arguments have in common."""

    def __init__(self, args: AttentionArgs | AttentionGradArgs, *tensors: Tensor):
        """tensors: q, k, v and what else kernels read of the args, in their order."""
        (b, hkv, s_e, d), (G, GP), s = args.k.shape, group_of(args.q, args.k), args.q.shape[2]
        self.device, self.dtype, self.work = args.q.device, args.q.dtype, kernel_dtype(args.q.dtype)
        self.rows, self.heads = s * GP, b * hkv
        self.kind, masks = 0, 1
        if isinstance(args.mask, AttentionMask):
            self.kind, masks = 1 if args.mask.rows.shape[-1] == 2 else 2, args.mask.rows.shape[0]
        self.shape = s, s_e, hkv, masks
        self.G, self.GP, self.D, self.block_d = G, GP, d, max(16, 1 << (d - 1).bit_length())
        self.constants = {"G": G, "GP": GP, "D": d, "BLOCK_D": self.block_d}
        self.negative = args.scale < 0  # the largest score is the largest product only where it is not: q changes its sign too
        self.scale = (-args.scale if self.negative else args.scale) * LOG2E
        self.as_it_is = not self.negative and all(t.dtype == kernel_dtype(t.dtype) and t.stride(-1) == 1 for t in tensors)
        read = tensors if self.as_it_is else self.readable([_without_values(t) for t in tensors])
        self.has_descriptor, self.strides = [_has_descriptor(t) for t in read], [_strides(t) for t in read]
        self.columns_by_tma = self.has_descriptor[1] and self.has_descriptor[2] and (self.kind != 0 or args.mask.lengths is None)  # it reads past lengths
        self.read = [_without_values(t) for t in read]  # the plan is kept for long, and must not hold the tensors

    def readable(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In a kernel's dtype, with any strides but of the last dim."""
        q, *others = [_adjacent(t.to(kernel_dtype(t.dtype))) for t in tensors]
        return [_adjacent(-q) if self.negative else q, *others]

    def tile(self, op: str, by_tma: bool) -> tuple[dict, int]:
        """(the kernel's constants, BLOCK_M of them)"""
        kind = "fp32" if self.work == torch.float32 else "16-bit"
        tile = tune.pick(op, tune.arch_of(self.device), dtype=kind, D=self.D, M=self.rows, N=self.shape[1], tma=int(by_tma)).launch()
        BLOCK_M = max(tile["BLOCK_M"], self.GP)
        return tile | {"BLOCK_M": BLOCK_M, "KIND": self.kind, "TOKENS_PER_BLOCK": listed_tokens(self.G), "PRECISION": precision()} | self.constants, BLOCK_M

    def describe_columns(self, tile: dict) -> list[Callable] | None:
        """What makes the descriptors of k and v, where the tile reads them by TMA."""
        return [_descriptor(t, 1, 1, tile["BLOCK_N"], self.block_d) for t in self.read[1:3]] if tile["TMA"] else None

    def by_rows(self, rows: int, depth: int = 1) -> tuple[int, int, int]:
        """A grid of programs for so many rows each."""
        return -(-self.rows // rows), self.heads, depth

    def like(self, t: Tensor) -> tuple[Callable[[], Tensor], Strides]:
        """(what makes a result in t's layout, its strides)"""
        made = empty_like(t, self.work)  # here: on "meta" the strides of dims of one element are others
        return partial(torch.empty_strided, made.shape, made.stride(), dtype=self.work, device=self.device), _strides(made)


def _without_values(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _adjacent(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(t: Tensor) -> Strides:
    return Strides(*t.stride()[:3])


def _has_descriptor(t: Tensor) -> bool:
    """Whether TMA could read it, which asks for 16 bytes everywhere."""
    return not t.data_ptr() % 16 and all(stride * t.element_size() % 16 == 0 and stride > 0 for stride in t.stride()[:3])


def _descriptor(like: Tensor, *block: int) -> Callable[[Tensor], "TensorDescriptor"]:
    """Makes the descriptors of tensors like this one, for which Triton's constructor would check each time what is the same each time, in 16 Python calls."""
    fields = dict(vars(TensorDescriptor(like, list(like.shape), list(like.stride()), list(block))))
    del fields["base"]

    def describe(t):
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__ = {**fields, "base": t}
        return descriptor

    return describe


_new = tuple.__new__


def _splits(programs: int, columns: int, device: torch.device) -> int:
    """How many programs share the columns of a block: two for every multiprocessor, of 256 columns at least. Of shapes alone: a graph keeps it."""
    return max(1, min(2 * tune.processors_of(device, 8) // programs, columns // 256))


def _columns_of(mask: Lengths | AttentionMask) -> Lengths | Mask:
    """The mask as kernels take it that go over columns."""
    return mask if type(mask) is Lengths else _new(Mask, (mask.rows, mask.rows_empty, mask.blocks.column_blocks, mask.blocks.column_block_counts))


def _launch(args: AttentionArgs) -> Plan:
    """Where few programs would have all the columns, several share them, and a second kernel puts their parts together."""
    c = _Common(args, args.q, args.k, args.v)
    (b, hkv, s_e, d), s, GP, fp32 = args.k.shape, args.q.shape[2], c.GP, {"dtype": torch.float32, "device": c.device}
    empty_o, o_strides = c.like(args.q)
    if not (args.q.numel() and s_e):
        return lambda args: (empty_o().zero_().to(c.dtype), torch.full((b, hkv, s, GP), torch.inf, **fp32))
    tile, BLOCK_M = c.tile("cross_attention", c.columns_by_tma)
    splits = _splits(-(-c.rows // BLOCK_M) * c.heads, s_e, c.device)
    attend_part = Launch(cross_attention_fwd_kernel, SPLIT=splits > 1, **tile)
    merge = Launch(cross_attention_merge_kernel, BLOCK_M=max(GP, 16), num_warps=merge_warps(d), **c.constants, **tune.OPTIONS)
    grid, grid_of_merge = c.by_rows(BLOCK_M, splits), c.by_rows(max(GP, 16))
    strides, describe = ForwardStrides(*c.strides, o_strides), c.describe_columns(tile)

    def run(args):
        tensors = args.q, args.k, args.v
        q, k, v = tensors if c.as_it_is else c.readable(tensors)
        o, lse, mask = empty_o(), torch.empty((b, hkv, s, GP), **fp32), args.mask
        if c.kind:
            mask = _columns_of(mask)
        if describe is not None:
            k, v = describe[0](k), describe[1](v)
        if splits == 1:
            attend_part(grid, q, k, v, o, lse, mask, strides, *c.shape, c.scale, splits)
        else:
            parts, part_lse = torch.empty((splits, b * hkv, s * GP, d), **fp32), torch.empty((splits, b * hkv, s * GP), **fp32)
            attend_part(grid, q, k, v, parts, part_lse, mask, strides, *c.shape, c.scale, splits)
            merge(grid_of_merge, parts, part_lse, o, lse, o_strides, *c.shape, splits)
        return (o, lse) if c.work == c.dtype else (o.to(c.dtype), lse)

    return run


_attention = fused_op("cross_attention", AttentionArgs, AttentionMask, Blocks, reference=forward, launch=_launch, cpu=forward_on_cpu)
"""(args) -> o, lse [b, hkv, s, GP], base 2."""


def _grad_launch(args: AttentionGradArgs) -> Plan:
    """Without atomics: every sum has one owner and one order."""
    c = _Common(args, args.q, args.k, args.v, args.o, args.do)
    needs_q, needs_k, needs_v = args.needs_grad
    if not (args.q.numel() and args.k.numel()):
        empties = [c.like(t)[0] for t, needed in zip((args.q, args.k, args.v), args.needs_grad, strict=True) if needed]
        return lambda args: tuple([empty().zero_().to(c.dtype) for empty in empties])
    rows_each = max(c.GP, 32)
    subtract = Launch(cross_attention_delta_kernel, BLOCK_M=rows_each, **c.constants, **tune.OPTIONS)
    grid, (*_, o_strides, do_strides) = c.by_rows(rows_each), c.strides
    d_q = _dq_plan(args, c) if needs_q else None
    d_kv = _dkdv_plan(args, c) if needs_k or needs_v else None

    def run(args):
        tensors = args.q, args.k, args.v, args.o, args.do
        q, k, v, o, do = tensors if c.as_it_is else c.readable(tensors)
        delta, dlse = torch.empty_like(args.lse), args.dlse
        subtract(grid, o, do, dlse if dlse is None else dlse.contiguous(), delta, o_strides, do_strides, *c.shape)
        sums = _new(RowSums, (args.lse, delta))
        grads = [] if d_q is None else [d_q(args, q, k, v, do, sums)]
        if d_kv is not None:
            grads += d_kv(args, q, k, v, do, sums)
        return tuple(grads) if c.work == c.dtype else tuple([t.to(c.dtype) for t in grads])

    return run


def _dq_plan(args: AttentionGradArgs, c: _Common) -> Callable[..., Tensor]:
    q, k, v, _, do = c.strides
    tile, BLOCK_M = c.tile("cross_attention_dq", c.columns_by_tma)
    launch, grid, describe = Launch(cross_attention_dq_kernel, **tile), c.by_rows(BLOCK_M), c.describe_columns(tile)
    empty_dq, dq_strides = c.like(args.q)
    strides = DqStrides(q, k, v, do, dq_strides)

    def run(args, q, k, v, do, sums):
        if describe is not None:
            k, v = describe[0](k), describe[1](v)
        dq = empty_dq()
        launch(grid, q, k, v, do, sums, dq, _columns_of(args.mask), strides, *c.shape, c.scale)
        return dq.neg_() if c.negative else dq

    return run


def _dkdv_plan(args: AttentionGradArgs, c: _Common) -> Callable[..., list[Tensor]]:
    _, needs_k, needs_v = args.needs_grad
    q, k, v, _, do = c.strides
    tile, BLOCK_M = c.tile("cross_attention_dkdv", c.G == c.GP and c.has_descriptor[0] and c.has_descriptor[4])
    launch, grid = Launch(cross_attention_dkdv_kernel, DK=needs_k, DV=needs_v, **tile), (-(-args.k.shape[2] // tile["BLOCK_N"]), c.heads, 1)
    (empty_dk, dk_strides), (empty_dv, dv_strides) = c.like(args.k), c.like(args.v)
    strides = DkDvStrides(q, k, v, do, dk_strides if needs_k else k, dv_strides if needs_v else v)
    describe = [_descriptor(c.read[i].transpose(1, 2), 1, BLOCK_M // c.GP, c.G, c.block_d) for i in (0, 4)] if tile["TMA"] else None

    def run(args, q, k, v, do, sums):
        mask = args.mask
        if c.kind:
            mask = _new(Mask, (mask.rows, mask.rows_empty, mask.blocks.token_blocks, mask.blocks.token_block_counts))
        if describe is not None:
            q, do = describe[0](q.transpose(1, 2)), describe[1](do.transpose(1, 2))
        dk = empty_dk() if needs_k else k.new_empty(0)
        dv = empty_dv() if needs_v else v.new_empty(0)
        launch(grid, q, k, v, do, sums, dk, dv, mask, strides, *c.shape, c.scale)
        return [dk, dv] if needs_k and needs_v else [dk] if needs_k else [dv]

    return run


_attention_grad = fused_op("cross_attention_bwd", AttentionGradArgs, AttentionMask, Blocks, reference=backward, launch=_grad_launch, cpu=backward_on_cpu)
"""(args) -> of dq, dk and dv those that are needed."""


def _backward(args: AttentionArgs, outs: tuple[Tensor, Tensor], grads: tuple, needs: AttentionArgs) -> AttentionArgs:
    q, k, v, mask, scale, interpret = args
    (o, lse), (do, dlse), needs_grad = outs, grads, (needs.q, needs.k, needs.v)
    do = torch.zeros_like(o) if do is None else do
    made = iter(_attention_grad(AttentionGradArgs(do, q, k, v, o, lse, dlse, mask, scale, needs_grad, interpret)))
    dq, dk, dv = (next(made) if needed else None for needed in needs_grad)
    return AttentionArgs(dq, dk, dv, mask=None, scale=None, interpret=None)


def _grad_backward(args: AttentionGradArgs, outs: tuple, grads: tuple, needs: AttentionGradArgs) -> AttentionGradArgs:
    """What o and lse are to q, k and v is in the formula already."""

    def first(args):
        upstream = [args.do] if args.dlse is None else [args.do, args.dlse]
        inputs = zip((args.q, args.k, args.v), args.needs_grad, strict=True)
        return forward(args)[: len(upstream)], upstream, [t for t, needed in inputs if needed]

    return differentiated_twice(args, first, grads)


_attention.register_backward(_backward)
_attention_grad.register_backward(_grad_backward, lambda args, outs, needs: (args._replace(o=None, lse=None), ()))
