"""An NF4 + LoRA layer as each library holds it, and the ways each runs it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import dtype_name, installed
from fastfuse.kernels.nf4 import BITSANDBYTES, TORCHAO
from fastfuse.ops import nf4_dequantize_ref, nf4_linear_ref
from fastfuse.ops._op import nbytes
from fastfuse.quant.nf4 import NF4View

SCALING, BLOCK = 2.0, 64


@dataclass(frozen=True, eq=False)
class Layer:
    """W, A and B of one layer. What a peer needs of its own is built on first use, before anything is timed: see harness.warm_up."""

    weight: NF4View | Tensor  # Tensor: a dense base
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    scaling: float = SCALING
    torchao_weight: NF4View | None = None  # the same codes under torchao's scales, which cannot hold bitsandbytes' exactly

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + nbytes(self.lora_a, self.lora_b)

    def with_torchao(self) -> "Layer":
        return replace(self, weight=self.torchao_weight)

    def with_double_adapters(self) -> "Layer":
        return self if self.lora_a is None else replace(self, lora_a=double(self.lora_a), lora_b=double(self.lora_b))

    @functools.cached_property
    def bitsandbytes(self) -> tuple:
        return _as_bitsandbytes(self.weight)

    @functools.cached_property
    def torchao(self) -> Tensor:
        return _as_torchao(self.torchao_weight)

    @functools.cached_property
    def dense(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else nf4_dequantize_ref(self.weight, self.weight.dtype)

    @functools.cached_property
    def peft(self) -> nn.Module:
        """The layer get_peft_model makes, holding this A and B: they are its parameters, so gradients for them are gradients for ours."""
        import peft

        N, K = self.weight.shape
        if isinstance(self.weight, Tensor):
            base = nn.Linear(K, N, bias=False, device="meta")
            base.weight = nn.Parameter(self.weight, requires_grad=False)
        else:
            import bitsandbytes as bnb

            base = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=self.weight.dtype, quant_type="nf4", device="meta")
            # A state of its own: on some CPUs Linear4bit repacks what it holds.
            packed, state = _as_bitsandbytes(self.weight)
            base.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=base)
        model = nn.Sequential(base)
        model.is_loaded_in_4bit = not isinstance(self.weight, Tensor)  # as transformers sets it; PEFT chooses its class by it
        R = self.lora_a.shape[0]
        config = peft.LoraConfig(r=R, lora_alpha=int(self.scaling * R), target_modules=["0"])
        layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = self.lora_a, self.lora_b
        return layer.train(self.lora_a.requires_grad)


def double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def random_layer(
    N: int, K: int, rank: int, storage: str, dtype: torch.dtype, device: str, requires_grad: bool = False, lora_dtype: torch.dtype | None = None
) -> Layer:
    """storage: "bitsandbytes" (nested), "torchao" or "dense". rank 0: no adapter.

    Random bytes are a valid weight: scales lie in 0.03 .. 0.07, as those of weights with deviation 0.02 do.
    """
    if storage == "dense":
        weight, other = torch.randn(N, K, dtype=dtype, device=device) * 0.02, None
    else:
        packed = torch.randint(256, (N * K // 2,), dtype=torch.uint8, device=device)
        other = _torchao_view(packed, (N, K), dtype)
        weight = _bitsandbytes_view(packed, (N, K), dtype) if storage == "bitsandbytes" else other
    if not rank:
        return Layer(weight, None, None, torchao_weight=other)
    a = torch.randn(rank, K, dtype=dtype, device=device) * K**-0.5
    b = torch.randn(N, rank, dtype=dtype, device=device) * 0.1
    a, b = (nn.Parameter(t.to(lora_dtype or dtype), requires_grad) for t in (a, b))
    return Layer(weight, a, b, torchao_weight=other)


def _bitsandbytes_view(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> NF4View:
    device, blocks = packed.device, shape[0] * shape[1] // BLOCK
    index = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    absmax = 0.01 + 0.01 * torch.rand(-(-blocks // 256), device=device)
    scales = (index, torch.linspace(-1, 1, 256, device=device), absmax, torch.full((), 0.05, device=device))
    return NF4View(packed, torch.tensor(BITSANDBYTES, device=device), scales, BLOCK, shape, dtype)


def _torchao_view(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> NF4View:
    device, blocks = packed.device, shape[0] * shape[1] // BLOCK
    scaler = torch.randint(-128, 128, (blocks,), dtype=torch.int8, device=device)
    factor = (6400 + 6400 * torch.rand(-(-blocks // 256), device=device)).to(dtype)
    scales = (scaler, factor, torch.full((), 0.05, dtype=dtype, device=device))
    return NF4View(packed, torch.tensor(TORCHAO, dtype=dtype, device=device), scales, BLOCK, shape, dtype)


def _as_bitsandbytes(view: NF4View) -> tuple:
    from bitsandbytes.functional import QuantState

    index, code, absmax, offset = view.scales
    nested = QuantState(absmax=absmax, code=code, blocksize=256, dtype=torch.float32)
    return view.packed.view(-1, 1), QuantState(
        absmax=index, shape=torch.Size(view.shape), code=view.code, blocksize=BLOCK, quant_type="nf4", dtype=view.dtype, offset=offset, state2=nested
    )


def _as_torchao(view: NF4View):
    try:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    except ImportError:
        from torchao.dtypes import nf4tensor as nf4_tensor
    N, K = view.shape
    meta = nf4_tensor.SubclassTensorArgs(torch.Size((N, K)), (K, 1), 0, view.dtype, view.device, False)
    return nf4_tensor.NF4Tensor(meta, BLOCK, N * K // BLOCK, view.scale_block, *view.scales, view.packed, nf4=view.code)


# A linear takes (x, a peer's weight, A, B, scaling); A and B are None without an adapter.
Linear = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    weight: Callable[[Layer], object]  # what its linear takes
    linear: Linear
    needs: tuple[str, ...] = ()  # packages
    torchao: bool = False  # computes with the layer's torchao_weight
    compiled: bool = False


def eager(x: Tensor, weight: NF4View, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    return nf4_linear_ref(x, weight, a, b, scaling)


def dense_eager(x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """The adapter as PEFT and torchtune run it. weight may be an NF4Tensor, whose own F.linear this calls."""
    y = F.linear(x, weight)
    return y if a is None else y + F.linear(F.linear(x, a), b) * scaling


def wide_dense_eager(x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """dense_eager in x's dtype: the truth of a dense base, in float64."""
    return dense_eager(x, weight.to(x.dtype), a, b, scaling)


def _bitsandbytes(x: Tensor, weight: tuple, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    from bitsandbytes import matmul_4bit

    y = matmul_4bit(x, *weight)
    return y if a is None else y + F.linear(F.linear(x, a), b) * scaling


def _peft(x: Tensor, layer: nn.Module, *_adapter) -> Tensor:
    return layer(x)


class DequantizeAddmm(torch.autograd.Function):
    """W decoded whole into one buffer that every layer shares, the library's GEMM, the low-rank products added in place.

    Nothing decoded is kept for the backward, which decodes again. This is how Unsloth runs QLoRA.
    weight: bitsandbytes' packed bytes and state, or a dense weight.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.weight, ctx.scaling = weight, scaling
        y = x @ _decoded(weight).T
        return y.addmm_(x @ a.T, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        (x, a, b), scaling = ctx.saved_tensors, ctx.scaling
        dyb = dy @ b
        da = torch.empty_like(a).addmm_(dyb.T, x, beta=0, alpha=scaling)
        db = torch.empty_like(b).addmm_(dy.T, x @ a.T, beta=0, alpha=scaling)
        dx = dy @ _decoded(ctx.weight)
        return dx.addmm_(dyb, a, alpha=scaling), None, da, db, None


def _decoded(weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    packed, state = weight
    if packed.device.type != "cuda":  # bitsandbytes takes a buffer on a GPU alone
        return dequantize_4bit(packed, state)
    out = _buffer(state.shape.numel(), state.dtype, packed.device).view(state.shape)
    return dequantize_4bit(packed, state, out=out)


@functools.cache
def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


def nf4_peers(dtype: torch.dtype, storage: str, lora: bool, fp32_adapters: bool, compiled: bool) -> dict[str, Peer]:
    """The peers of a case in the order they are timed: what takes long to compile comes last."""
    found: dict[str, Peer] = {}
    if storage == "bitsandbytes":
        if lora:
            found["bitsandbytes + PEFT"] = Peer(attrgetter("peft"), _peft, ("bitsandbytes", "peft"))
        if not fp32_adapters:
            found["bitsandbytes"] = Peer(attrgetter("bitsandbytes"), _bitsandbytes, ("bitsandbytes",))
            if lora:
                found["dequantize + addmm"] = Peer(attrgetter("bitsandbytes"), DequantizeAddmm.apply, ("bitsandbytes",))
    if not fp32_adapters:
        torchao = Peer(attrgetter("torchao"), dense_eager, ("torchao",), torchao=True)
        found["torchao"] = torchao
        found[f"{short(dtype)} {'LoRA' if lora else 'linear'}"] = Peer(attrgetter("dense"), dense_eager)
        if compiled:
            found["torchao compiled"] = replace(torchao, compiled=True)
    if compiled:
        found["torch.compile"] = Peer(attrgetter("weight"), eager, compiled=True)
    return found


def dense_peers(compiled: bool) -> dict[str, Peer]:
    found = {"PEFT": Peer(attrgetter("peft"), _peft, ("peft",)), "addmm": Peer(attrgetter("weight"), DequantizeAddmm.apply)}
    return found | ({"torch.compile": Peer(attrgetter("weight"), dense_eager, compiled=True)} if compiled else {})


def short(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype_name(dtype)]


def available(peer: Peer) -> bool:
    return all(installed(package) for package in peer.needs)


def dequantize_bitsandbytes(layer: Layer) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*layer.bitsandbytes)


def dequantize_torchao(layer: Layer) -> Tensor:
    return layer.torchao.get_original_weight()
