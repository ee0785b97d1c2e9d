"""fastfuse's own modules: they run the fused ops as they are, and the report says so."""

from torch import nn

from fastfuse.modules import TransformerCrossAttentionLayer, VisionTransformer
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear
from fastfuse.patching.hosts._host import Host, device_of, parameter
from fastfuse.quant.nf4 import is_torchao


def _host(op: str, *classes: type[nn.Module], over_nf4: bool = False) -> Host:
    def matches(module: nn.Module) -> bool:
        return isinstance(module, classes) and (not over_nf4 or is_torchao(parameter(module, "weight")))

    return Host(
        name="fastfuse", op=op, matches=matches, fused=lambda module, given, options: None, device=device_of, native=True,
        modules=", ".join(f"`{c.__name__}`" for c in classes), covers="fused as they are",
    )  # fmt: skip


HOSTS = (
    _host("nf4_lora_linear", LoRALinear, DoRALinear, over_nf4=True),
    _host("nf4_linear", FrozenNF4Linear, over_nf4=True),
    _host("patch_embed", VisionTransformer),
    _host("cross_attention", TransformerCrossAttentionLayer),
)
