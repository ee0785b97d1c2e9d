"""A linear layer with a low-rank update."""

import math
from enum import Enum

import torch
from torch import Tensor, nn

from fastfuse.errors import InvalidArgument
from fastfuse.modules._hooks import is_hooked
from fastfuse.modules.low_precision.nf4_linear import KeepsNF4, base_linear, bias_fits
from fastfuse.ops import nf4_lora_linear
from fastfuse.quant.nf4 import is_torchao


class TrainableParams(Enum):
    """How a part of the model is trained."""

    FULL = "full"
    LORA = "lora"
    FROZEN = "frozen"


class LowRankLinear(KeepsNF4):
    """What LoRALinear and DoRALinear share: a base weight, dense or in NF4, and two factors lora_a (R, K) and lora_b (N, R).

    Base and factors are drawn in torchtune's order (W, bias, A, B, then A once more), so that a seed gives the same layer.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, dropout: float, use_bias: bool, quantize_base: bool, quantization_kwargs: dict):
        super().__init__()
        if rank < 1:
            raise InvalidArgument(f"{type(self).__name__}: rank is {rank}, expected at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{type(self).__name__}: dropout is {dropout}, expected 0 to 1")
        if not quantize_base and any(quantization_kwargs.values()):
            raise ValueError(f"``quantize_base`` is False, but received the following quantization arguments: {quantization_kwargs}")
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.use_bias = use_bias
        self._quantize_base = quantize_base
        self.disabled = False
        base = nn.Linear(in_dim, out_dim, bias=use_bias)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        if quantize_base:
            from fastfuse.quant.torchao import to_nf4

            self.weight = nn.Parameter(to_nf4(base.weight, **quantization_kwargs))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Draw A, clear B: the layer then equals its base."""
        _lora_a_init_params(self.lora_a)
        _lora_b_init_params(self.lora_b)

    def _delta_is_its_weights(self) -> bool:
        """Whether the update is no more than dropout(x) A^T B^T, so that a kernel may read A and B instead of calling three modules."""
        plain_dropout = type(self.dropout) in (nn.Dropout, nn.Identity) and "forward" not in self.dropout.__dict__ and not is_hooked(self.dropout)
        return plain_dropout and is_plain(self.lora_a) and is_plain(self.lora_b)

    def _drops(self) -> dict:
        """The arguments that make nf4_lora_linear drop what self.dropout would."""
        return {"dropout_p": self.dropout.p, "training": self.dropout.training} if type(self.dropout) is nn.Dropout else {}

    def _drops_now(self) -> bool:
        return type(self.dropout) is nn.Dropout and self.dropout.training and self.dropout.p > 0

    def adapter_params(self) -> list[str]:
        """The names of the parameters that an adapter checkpoint holds, in a list of the caller's own."""
        return ["lora_a.weight", "lora_b.weight"]

    def to_empty(self, *, device: str | torch.device | int | None, recurse: bool = True):
        """Move the adapter's parameters to `device` without their values; the base stays where it is. Returns self."""
        self.lora_a.to_empty(device=device, recurse=recurse)
        self.lora_b.to_empty(device=device, recurse=recurse)
        return self


class LoRALinear(LowRankLinear):
    """y = x W^T + bias + alpha / rank * dropout(x) A^T B^T (LoRA, https://arxiv.org/abs/2106.09685; torchtune.modules.peft.LoRALinear).

    in_dim, out_dim, rank: K, N, R. alpha: numerator of the update's scale. dropout: probability of zeroing an element of x on its way
    into A, in training. use_bias: of the base. quantize_base: keep W in NF4 (QLoRA): forward, backward and dropout then are fused, with
    one rounding of the result. quantization_kwargs: block_size (64) and scaler_block_size (256), the default where None.
    No parameter is frozen: see set_trainable_params. An NF4 weight gets no gradient in any case.
    Raises ValueError where quantization arguments come without quantize_base, rank is below 1, or the block sizes do not divide
    the weight.
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
        self.rank = rank
        self.alpha = alpha
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K)  ->  (..., N). Raises fastfuse.Unsupported where W is in NF4 and no kernel covers x or W."""
        if not torch.compiler.is_dynamo_compiling() and self._prepared is not None and (y := self._prepared(x)) is not None:
            return y
        scaling = self.alpha / self.rank
        if not self.disabled and is_torchao(self.weight) and self._delta_is_its_weights():
            fits = bias_fits(x, self.bias)
            y = nf4_lora_linear(x, self.weight, self.lora_a.weight, self.lora_b.weight, scaling, bias=self.bias if fits else None, **self._drops())
            if fits and not self._drops_now():
                self._prepare(x, scaling, children=("lora_a", "lora_b", "dropout"))
            return y if fits else y + self.bias
        y = base_linear(x, self.weight, self.bias)
        if self.disabled:
            return y
        return y + scaling * self.lora_b(self.lora_a(self.dropout(x)))


def is_plain(linear: nn.Module) -> bool:
    """Whether calling `linear` is x W^T and nothing else: no hook, no class of FSDP's, no forward of its own, no sharded weight."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and "forward" not in linear.__dict__
        and type(linear.weight) in (Tensor, nn.Parameter)
        and not is_hooked(linear)
    )


def _lora_a_init_params(x: nn.Linear) -> None:
    """Kaiming-uniform with a = sqrt(5), which for [R, K] is uniform in +-1 / sqrt(K)."""
    nn.init.kaiming_uniform_(x.weight, a=math.sqrt(5))


def _lora_b_init_params(x: nn.Linear) -> None:
    nn.init.zeros_(x.weight)
