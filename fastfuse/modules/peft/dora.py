"""A linear layer with a low-rank update of its weight's direction and a learned length per output feature."""

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastfuse.modules.low_precision.nf4_linear import base_linear, bias_fits
from fastfuse.modules.peft.lora import LowRankLinear, is_plain
from fastfuse.ops import _op, lora_row_norms, nf4_dequantize, nf4_lora_linear
from fastfuse.ops._linear_group import factor_of
from fastfuse.ops._op import autocast_dtype
from fastfuse.quant.nf4 import NF4View, is_torchao

# Elements of W + s B A in memory at a time where a factor must be called: 8 MiB in bf16, where all of it is 117 MB for 14336 x 4096.
_CHUNK = 1 << 22

# layer -> (what its norms were computed from, norms), inside norms_kept
_kept: contextvars.ContextVar[dict | None] = contextvars.ContextVar("fastfuse_dora_norms", default=None)


@contextlib.contextmanager
def norms_kept() -> Iterator[None]:
    """Inside the block DoRALinear over NF4 computes its norms once, not at every call, as long as W, A and B stand still. For generation.

    It holds for the thread that entered it, and for calls without gradients. A change that PyTorch counts (in place, a new tensor,
    load_state_dict) is seen; one through .data is not, which is why this is nothing a layer does by itself.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class DoRALinear(LowRankLinear):
    """y = m * (x W^T + bias + s * dropout(x) A^T B^T), m = magnitude / ||W + s B A|| per output feature, s = alpha / rank.

    DoRA (https://arxiv.org/abs/2402.09353; torchtune.modules.peft.DoRALinear). Arguments and errors as LoRALinear; the bias is scaled
    by m too, dropout reaches the low-rank term alone. No gradient flows through the norm. `magnitude` (N,) holds no values until
    initialize_dora_magnitude or a checkpoint sets them.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_bias: bool = False,
        quantize_base: bool = False,
        **quantization_kwargs,
    ):
        super().__init__(in_dim, out_dim, rank, dropout, use_bias, quantize_base, quantization_kwargs)
        self.scaling = alpha / rank
        self.magnitude = nn.Parameter(torch.full((out_dim,), torch.nan))  # forgotten, it shows in the first output

    def adapter_params(self) -> list[str]:
        """The names of the parameters that an adapter checkpoint holds, in a list of the caller's own."""
        return ["lora_a.weight", "lora_b.weight", "magnitude"]

    def to_empty(self, *, device: str | torch.device | int | None, recurse: bool = True):
        """Move the adapter's parameters to `device` without their values; the base stays where it is. Returns self."""
        super().to_empty(device=device, recurse=recurse)
        empty = nn.Parameter(torch.empty_like(self.magnitude, device=device), requires_grad=self.magnitude.requires_grad)
        torch.utils.swap_tensors(self.magnitude, empty)  # the parameter stays the object an optimizer may hold
        return self

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """Set magnitude to the norms of W + s B A, so that m = 1. Call it after W, A and B have their values.

        Raises RuntimeError while one of them is on the meta device.
        """
        if self.weight.is_meta or self.lora_a.weight.is_meta or self.lora_b.weight.is_meta:
            raise RuntimeError("Cannot initialize DoRA magnitude if base or LoRA parameters are still on meta device.")
        dtype = self.lora_a.weight.dtype
        self.magnitude.copy_(lora_row_norms(self._dense_weight(dtype), self.lora_a.weight, self.lora_b.weight, self.scaling))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K)  ->  (..., N). Raises fastfuse.Unsupported where W is in NF4 and no kernel covers x or W."""
        if not torch.compiler.is_dynamo_compiling() and self._prepared is not None and (y := self._prepared(x)) is not None:
            return y
        if not self.disabled and is_torchao(self.weight) and self._delta_is_its_weights():
            a, b = self.lora_a.weight, self.lora_b.weight
            norms = self._fused_norms(x)
            bias = None if self.bias is None else self.bias * (self.magnitude / norms).to(self.bias.dtype)
            fits = bias_fits(x, bias)
            y = nf4_lora_linear(x, self.weight, a, b, self.scaling, bias=bias if fits else None, magnitude=self.magnitude, norms=norms, **self._drops())
            if bias is None and not self._drops_now():
                self._prepare(x, self.scaling, lambda weight, x: factor_of(self.magnitude, self._fused_norms(x)), ("lora_a", "lora_b", "dropout"))
            return y if fits else y + bias
        base = base_linear(x, self.weight, self.bias)
        if self.disabled:
            return base
        delta = self.lora_b(self.lora_a(self.dropout(x)))
        m = self.magnitude / self._norms(x.dtype)
        return (m - 1) * base + m * delta * self.scaling + base

    def _fused_norms(self, x: Tensor) -> Tensor:
        """||W + s B A|| per output feature, in fp32."""
        a, b, view = self.lora_a.weight, self.lora_b.weight, NF4View.of(self.weight)
        dtype = autocast_dtype(x.device) or x.dtype
        used = (view.packed, *view.scales, a, b)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or (kept := _kept.get()) is None or not _comparable(used):
            return lora_row_norms(view, a, b, self.scaling, dtype)
        state = dtype, self.scaling, [(t.data_ptr(), t._version) for t in used]
        entry = kept.get(self)
        if entry is None or entry[0] != state:
            # The tensors are held along: their memory cannot be given to others while it is compared with.
            entry = kept[self] = state, lora_row_norms(view, a, b, self.scaling, dtype), [t.detach() for t in used]
        return entry[1]

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        """||W + s B A|| per output feature, (N,), in `dtype`."""
        w = self._dense_weight(dtype)
        if is_plain(self.lora_a) and is_plain(self.lora_b):
            return lora_row_norms(w, self.lora_a.weight, self.lora_b.weight, self.scaling).to(dtype)
        # FSDP gathers a factor's shards where it is called: calling them on columns of the identity gives columns of B A.
        N, K = w.shape
        squares = torch.zeros(N, dtype=torch.promote_types(dtype, torch.float32), device=w.device)
        for columns in torch.arange(K, device=w.device).split(max(_CHUNK // max(N, K), 1)):
            eye = (columns[:, None] == torch.arange(K, device=w.device)).to(dtype)
            merged = w[:, columns] + self.scaling * self.lora_b(self.lora_a(eye)).T
            squares += merged.to(squares.dtype).square().sum(1)
        return squares.sqrt().to(dtype)

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        return nf4_dequantize(self.weight, dtype) if is_torchao(self.weight) else self.weight.to(dtype)


def _comparable(tensors: tuple) -> bool:
    """Whether a change shows, and what is computed from them holds values now: not so while a CUDA graph is captured or a warm-up collects, or from fake tensors."""
    if _op.launch_interceptor is not None or any(t.is_inference() or type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
