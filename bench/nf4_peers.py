"""An NF4 + LoRA layer as each library holds it, and the ways each runs it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import BF16, FP16, FP32, DType, double, installed
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

    def double_copy(self) -> "Layer":
        return self if self.lora_a is None else replace(self, lora_a=double(self.lora_a), lora_b=double(self.lora_b))

    @cached_property
    def bitsandbytes(self) -> tuple:
        return _as_bitsandbytes(self.weight)

    @cached_property
    def torchao(self) -> Tensor:
        return _as_torchao(self.torchao_weight)

    @cached_property
    def dense(self) -> Tensor:
        return self.weight if isinstance(self.weight, Tensor) else nf4_dequantize_ref(self.weight, self.weight.dtype)

    @cached_property
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


def random_layer(N: int, K: int, rank: int, storage: str, dtype: DType, device: str, requires_grad: bool = False, lora_dtype: DType | None = None) -> Layer:
    """storage: "bitsandbytes" (nested), "torchao" or "dense". rank 0: no adapter.

    Random bytes are a valid weight: scales lie in 0.03 .. 0.07, as those of weights with deviation 0.02 do.
    """
    with torch.device(device):
        if storage == "dense":
            weight, other = torch.randn(N, K, dtype=dtype) * 0.02, None
        else:
            packed = torch.randint(256, (N * K // 2,), dtype=torch.uint8)
            other = _random_view(packed, (N, K), dtype, "torchao")
            weight = other if storage == "torchao" else _random_view(packed, (N, K), dtype, storage)
        if not rank:
            return Layer(weight, None, None, torchao_weight=other)
        a = torch.randn(rank, K, dtype=dtype) * K**-0.5
        b = torch.randn(N, rank, dtype=dtype) * 0.1
    a, b = (nn.Parameter(t.to(lora_dtype or dtype), requires_grad) for t in (a, b))
    return Layer(weight, a, b, torchao_weight=other)


def _random_view(packed: Tensor, shape: tuple[int, int], dtype: DType, storage: str) -> NF4View:
    blocks = 2 * len(packed) // BLOCK
    groups = torch.rand(-(-blocks // 256))
    if storage == "torchao":
        scales = (torch.randint(-128, 128, (blocks,), dtype=torch.int8), (6400 + 6400 * groups).to(dtype), torch.full((), 0.05, dtype=dtype))
        return NF4View(packed, torch.tensor(TORCHAO, dtype=dtype), scales, BLOCK, shape, dtype)
    index = torch.randint(256, (blocks,), dtype=torch.uint8)
    return NF4View(packed, torch.tensor(BITSANDBYTES), (index, torch.linspace(-1, 1, 256), 0.01 + 0.01 * groups, torch.full((), 0.05)), BLOCK, shape, dtype)


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
    weight: str  # the attribute of a Layer that its linear takes
    linear: Linear
    needs: tuple[str, ...] = ()  # packages
    compiled: bool = False

    @property
    def available(self) -> bool:
        return all(map(installed, self.needs))


def eager(x, weight, *adapter) -> Tensor:
    return nf4_linear_ref(x, weight, *adapter)


def dense_eager(x, weight, *adapter) -> Tensor:
    """weight may be an NF4Tensor, whose own F.linear this calls."""
    return _adapted(F.linear(x, weight), x, *adapter)


def _adapted(y, x, a, b, scaling) -> Tensor:
    """As PEFT and torchtune run an adapter."""
    return y if a is None else y + F.linear(F.linear(x, a), b) * scaling


def wide_dense_eager(x, weight, *adapter) -> Tensor:
    """dense_eager in x's dtype: the truth of a dense base, in float64."""
    return dense_eager(x, weight.to(x.dtype), *adapter)


def _bitsandbytes(x, weight, *adapter) -> Tensor:
    from bitsandbytes import matmul_4bit

    return _adapted(matmul_4bit(x, *weight), x, *adapter)


def _peft(x, layer, *_adapter) -> Tensor:
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


@cache
def _buffer(numel: int, dtype: DType, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


def nf4_peers(dtype: DType, storage: str, lora: bool, fp32_adapters: bool, compiled: bool) -> dict[str, Peer]:
    """The peers of a case in the order they are timed: what takes long to compile comes last."""
    bitsandbytes, one_dtype = storage == "bitsandbytes", not fp32_adapters
    found = {
        "bitsandbytes + PEFT": bitsandbytes and lora and Peer("peft", _peft, ("bitsandbytes", "peft")),
        "bitsandbytes": bitsandbytes and one_dtype and Peer("bitsandbytes", _bitsandbytes, ("bitsandbytes",)),
        "dequantize + addmm": bitsandbytes and one_dtype and lora and Peer("bitsandbytes", DequantizeAddmm.apply, ("bitsandbytes",)),
        "torchao": one_dtype and Peer("torchao", dense_eager, ("torchao",)),
        f"{short(dtype)} {'LoRA' if lora else 'linear'}": one_dtype and Peer("dense", dense_eager),
        "torchao compiled": one_dtype and compiled and Peer("torchao", dense_eager, ("torchao",), compiled=True),
        "torch.compile": compiled and Peer("weight", eager, compiled=True),
    }
    return {name: peer for name, peer in found.items() if peer}


def dense_peers(compiled: bool) -> dict[str, Peer]:
    found = {"PEFT": Peer("peft", _peft, ("peft",)), "addmm": Peer("weight", DequantizeAddmm.apply)}
    return found | ({"torch.compile": Peer("weight", dense_eager, compiled=True)} if compiled else {})


def short(dtype: DType) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.uint8: "uint8"}[dtype]


def dequantize(layer: Layer, storage: str) -> Tensor:
    """As the library of that name does."""
    if storage == "torchao":
        return layer.torchao.get_original_weight()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*layer.bitsandbytes)
