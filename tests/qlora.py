"""Small models as people have them: PEFT LoRA over bitsandbytes or torchao NF4, and the layers by themselves."""

import bitsandbytes as bnb
import torch
from accelerate.hooks import ModelHook
from numerics import assert_rounding_apart
from peft import LoraConfig, get_peft_model
from torch import nn

from cases.weights import quantize

HOSTS = ("bitsandbytes", "torchao")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128, bias=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(x))))


def in_nf4(linear: nn.Linear, storage: str = "nested") -> nn.Module:
    """bitsandbytes' layer in the place of a linear one."""
    dtype, bias = linear.weight.dtype, linear.bias
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
    made.weight, made.bias = quantize(linear.weight.detach(), storage), bias
    made.support_avx512bf16_for_cpu = False  # else the unpatched layer repacks its weight for good in eval mode
    return made


def quantized(host, dtype=torch.float32, storage="nested"):
    model = Block().to(dtype)
    for name in ("up", "down"):
        linear = getattr(model, name)
        if host == "torchao":
            linear.weight = nn.Parameter(quantize(linear.weight.detach(), "torchao"), requires_grad=False)
        else:
            setattr(model, name, in_nf4(linear, storage))
    return model


# what is done to a Linear4bit, so that no kernel reads its weight: the code, and (layer, its quant_state) -> done. Of one with flat scales, 256 by 128.
UNREAD = {
    "FP4": ("QUANT_TYPE", lambda layer, state: setattr(state, "quant_type", "fp4")),
    "packed for AVX512": ("CPU_PACKED_BNB", lambda layer, state: setattr(state, "packing_format_for_cpu", True)),
    "packed and unpacked": ("CPU_UNPACKED_BNB", lambda layer, state: setattr(state, "absmax", state.absmax.view(256, 2).T.bfloat16().contiguous())),
    "half of the codes": ("NOT_NF4", lambda layer, state: setattr(state, "shape", torch.Size([256, 256]))),
    "16 bits": ("NOT_NF4", lambda layer, state: setattr(state, "code", state.code.bfloat16())),
    "plain": ("NOT_NF4", lambda layer, state: layer.__dict__.update(quant_state=None) or setattr(layer, "weight", nn.Parameter(torch.randn(256, 128)))),
}


def lora(host, dtype=torch.float32, **config):
    model = quantized(host, dtype)
    model.is_loaded_in_4bit = host == "bitsandbytes"
    return get_peft_model(model, LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False, **config))


def gradients(model, x):
    out = model(x)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return out, torch.autograd.grad(out.square().sum(), leaves)


def assert_same(got, want, K=256, products=2):
    """Of gradients(): a result of so many products over K, and its gradients, which take twice as many."""
    assert_rounding_apart(got[0], want[0], K, products)
    for g, w in zip(got[1], want[1], strict=True):
        assert_rounding_apart(g, w, K, 2 * products)


def in_order(order, **acts):
    """ "one, other": the acts of these names, one after the other."""
    for name in order.split(", "):
        acts[name]()


def said(report):
    return [(e.status, e.code) for e in report.entries]


class Doubling(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs

    def post_forward(self, module, output):
        return output * 2
