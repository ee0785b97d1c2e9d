"""fastfuse's own modules: they run the fused ops as they are, and the report says so."""

from collections.abc import Callable

import torch
from torch import nn

from fastfuse.modules import TransformerCrossAttentionLayer, VisionTransformer
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear
from fastfuse.patching.hosts._attention import Heads, rehearse_attention
from fastfuse.patching.hosts._host import Host, Options, Reason, Rehearsed, Sizes, parameter
from fastfuse.patching.hosts.torchtune import image_of, zero_images
from fastfuse.quant.nf4 import holds_torchao


def _host(op: str, *classes: type[nn.Module], over_nf4: bool = False, **how: Callable) -> Host:
    def matches(module: nn.Module) -> bool:
        return isinstance(module, classes) and (not over_nf4 or holds_torchao(parameter(module, "weight")))

    return Host(
        name="fastfuse", op=op, matches=matches, fused=lambda module, arguments, options: None, native=True,
        modules=", ".join(f"`{c.__name__}`" for c in classes), covers="fused as they are", **how,
    )  # fmt: skip


def _linear(module: nn.Module, sizes: Sizes, options: Options) -> Rehearsed:
    weight = module.weight
    adapter = next((p for p in module.parameters() if p is not weight and p.dim() == 2), weight)
    shape = (sizes.batch, sizes.tokens, weight.shape[1])
    x = torch.zeros(shape, dtype=adapter.dtype, device=weight.device, requires_grad=torch.is_grad_enabled())
    return module.forward(x), [x]  # nobody's hooks


def _front(module: VisionTransformer, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    if not module._is_plain():
        return Reason("CHILD_TYPE", "a part in front of the layers was hooked or replaced: it runs one by one")
    images, ratio = zero_images(module, sizes)
    return module._fused_embedding(images, ratio), []


def _attention(module: TransformerCrossAttentionLayer, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    attn = module.attn
    return rehearse_attention(module, Heads(next(module.parameters()).dtype, attn.num_heads, attn.num_kv_heads, attn.head_dim), sizes, options)


HOSTS = (
    _host("nf4_lora_linear", LoRALinear, DoRALinear, rehearse=_linear, over_nf4=True),
    _host("nf4_linear", FrozenNF4Linear, rehearse=_linear, over_nf4=True),
    _host("patch_embed", VisionTransformer, rehearse=_front, image=image_of),
    _host("cross_attention", TransformerCrossAttentionLayer, rehearse=_attention),
)
