"""patch(model) over the front ends of real ViTs: transformers' CLIP, SigLIP and DINOv2 families, and timm's PatchEmbed."""

import contextlib
import copy
import dataclasses
import functools
import io
import pickle
import warnings
from types import SimpleNamespace

import pytest
import skimage.data
import torch
from conftest import GPU
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from peft import LoraConfig, get_peft_model
from reference import assert_results_no_worse
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

import fastfuse
from fastfuse.patching import hosts
from fastfuse.patching.hosts import vision

try:
    from timm.layers import PatchEmbed
except ImportError:

    class PatchEmbed(nn.Module):
        """What timm's module of this name does, where timm is not installed."""

        __module__ = "timm.layers.patch_embed"

        def __init__(
            self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, norm_layer=None, flatten=True,
            output_fmt=None, bias=True, strict_img_size=True, dynamic_img_pad=False,
        ):  # fmt: skip
            super().__init__()
            self.patch_size, self.img_size = (patch_size, patch_size), (img_size, img_size) if isinstance(img_size, int) else img_size
            self.flatten, self.output_fmt = flatten and output_fmt is None, output_fmt or "NCHW"
            self.strict_img_size, self.dynamic_img_pad = strict_img_size, dynamic_img_pad
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)
            self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

        def forward(self, x):
            _, _, H, W = x.shape
            ph, pw = self.patch_size
            if self.img_size is not None and self.strict_img_size:
                torch._assert((H, W) == tuple(self.img_size), f"Input height ({H}) doesn't match model ({self.img_size[0]}).")
            elif self.img_size is not None and not self.dynamic_img_pad:
                torch._assert(H % ph == 0 and W % pw == 0, f"Input height ({H}) should be divisible by patch size ({ph}).")
            if self.dynamic_img_pad:
                x = F.pad(x, (0, -W % pw, 0, -H % ph))
            x = self.proj(x)
            if self.flatten or self.output_fmt == "NLC":
                x = x.flatten(2).transpose(1, 2)
            elif self.output_fmt == "NHWC":
                x = x.permute(0, 2, 3, 1)
            return self.norm(x)

        forward.__module__, forward.__qualname__ = __module__, "PatchEmbed.forward"


SIZE, PATCH, D, K = 32, 8, 32, 3 * 8 * 8
SMALL = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH}
MODELS = {
    "clip": lambda **more: CLIPVisionModel(CLIPVisionConfig(**SMALL | more)),
    "siglip": lambda **more: SiglipVisionModel(SiglipVisionConfig(**SMALL | more)),
    "dinov2": lambda **more: Dinov2Model(Dinov2Config(**SMALL | more)),
    "registers": lambda **more: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL | more)),
    "vit": lambda **more: ViTModel(ViTConfig(**SMALL | more), add_pooling_layer=False),
}
FILES = {
    "CLIPSegVision": "clipseg",
    "BridgeTowerVision": "bridgetower",
    "MetaClip2Vision": "metaclip_2",
    "XCLIPVision": "x_clip",
    "ChineseCLIPVision": "chinese_clip",
}
FILES |= {"GraniteDoclingVision": "granite_docling", "ViTMSN": "vit_msn", "Dinov2WithRegisters": "dinov2_with_registers", "QianfanOCRVision": "qianfan_ocr"}
FAMILIES = [key.removesuffix("Embeddings.forward") for key in vision._KINDS if not key.startswith("PatchEmbed")]


@pytest.fixture(autouse=True)
def vision_hosts(monkeypatch):
    if vision.HOSTS[0] not in hosts.BUILT_IN:
        monkeypatch.setattr(hosts, "BUILT_IN", (*hosts.BUILT_IN, *vision.HOSTS))


def photos(height: int = SIZE, width: int = SIZE, dtype=torch.bfloat16) -> torch.Tensor:
    """Three of them, as an image processor scales them, rounded to what every dtype here holds."""
    made = []
    for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()):
        t = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        made.append((F.interpolate(t, (height, width), mode="bilinear", antialias=True) - 0.45) / 0.27)
    return torch.cat(made).bfloat16().to(dtype)


def shaken(model: nn.Module) -> nn.Module:
    """No CLS token, position or register of zero by initialisation."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name and "lambda" not in name:
                p.copy_(torch.randn_like(p) * (0.5 if p.dim() < 2 or "token" in name or "position" in name else p[0].numel() ** -0.5))
    return model.eval()


def made(kind: str, **more) -> nn.Module:
    return shaken(MODELS[kind](**more))


def front(family: str, **more) -> nn.Module:
    """One front end by itself, as its model builds it."""
    in_pair = family in ("InternVLVision", "QianfanOCRVision", "Tipsv2Vision")
    config = {
        "hidden_size": D,
        "image_size": [SIZE] * 2 if in_pair else SIZE,
        "patch_size": [PATCH] * 2 if in_pair else PATCH,
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
    }
    config |= {"use_mask_token": True, "use_absolute_position_embeddings": True, "num_register_tokens": 2}
    name = FILES.get(family, family.removesuffix("Vision").lower())
    file = f"transformers.models.{name}.modeling_{name}"
    cls = getattr(pytest.importorskip(file, reason=f"this transformers has no {name}"), f"{family}Embeddings")
    return shaken(cls(SimpleNamespace(**config | more)))


def derived(model: nn.Module, run, *args, **kwargs) -> tuple[torch.Tensor, dict[str, tuple]]:
    """The result, and the gradients of every parameter for a few upstream gradients."""
    y = run(*args, **kwargs)
    y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
    # A bias of keys shifts all scores of a query alike: its gradient is rounding and nothing else.
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(("k_proj.bias", "key.bias"))}
    ups = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(y) for k in range(3)]
    draws = [torch.autograd.grad(y, leaves.values(), up, retain_graph=True, allow_unused=True) for up in ups]
    return y.detach(), dict(zip(leaves, zip(*draws, strict=True), strict=True))


def embeddings(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if type(m).__name__.endswith("Embeddings"))


def same(module: nn.Module, *args, codes: dict[str, int], match: str = "", **kwargs):
    """Patched, the module gives what it gave, to the bit where all of its calls ran its own forward."""
    state = torch.get_rng_state()
    want = module(*args, **kwargs)
    torch.set_rng_state(state)
    with fastfuse.patched(module), pytest.warns(UserWarning, match=match) if codes else contextlib.nullcontext():
        got = module(*args, **kwargs)
        assert fastfuse.status(module).fallbacks == codes
    if codes:
        assert torch.equal(got, want)
    else:
        assert_rounding_apart(got, want, K, products=2)
    return got


@pytest.mark.parametrize("backend", ["auto", "torch", *([] if GPU else ["triton"])])  # the interpreter is for machines without a GPU
@pytest.mark.parametrize("kind", MODELS)
def test_models_answer_and_learn_the_same(kind, backend):
    model, pixels = made(kind), photos(dtype=torch.float32)
    eager, exact = in_several_orders(derived, model, model, pixels), copy.deepcopy(model).double()
    exact = derived(exact, exact, pixels.double())
    before = [m.__dict__.copy() for m in model.modules()]
    report = fastfuse.patch(model, ops="patch_embed", backend=backend)
    assert [(e.op, e.status, e.code) for e in report.entries] == [("patch_embed", "patched", "")]
    assert_results_no_worse(derived(model, model, pixels), eager, exact)
    assert fastfuse.status(model).fallbacks == {}
    assert fastfuse.unpatch(model).counts == {"restored": 1}
    assert [m.__dict__ for m in model.modules()] == before
    assert torch.equal(derived(model, model, pixels)[0], eager[0][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """The forwards that share their structure with these, whatever file transformers keeps them in."""
    module, pixels = front(family), photos(dtype=torch.float32)
    eager, exact = in_several_orders(derived, module, module, pixels), copy.deepcopy(module).double()
    exact = derived(exact, exact, pixels.double())
    report = fastfuse.patch(module, verify=True)
    assert [(e.status, e.code) for e in report.entries] == [("patched", "")]
    got = derived(module, module, pixels)
    assert_results_no_worse(got, eager, exact)
    assert_rounding_apart(got[0], eager[0][0], K, products=2)
    assert fastfuse.status(module).fallbacks == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2", "Dinov2WithRegisters", "ViT", "OwlViTVision"])
def test_half_precision(family, dtype):
    """As close to float64 as the module's own forward, pixels cast where that casts them."""
    module = front(family).to(dtype)
    pixels = photos(dtype=dtype if family in ("ViT", "OwlViTVision") else torch.float32)
    eager, exact = in_several_orders(derived, module, module, pixels), copy.deepcopy(module).double()
    exact = derived(exact, exact, pixels.double())
    with fastfuse.patched(module, verify=True) as report:
        assert report.counts == {"patched": 1}
        assert_results_no_worse(derived(module, module, pixels), eager, exact)
        assert fastfuse.status(module).fallbacks == {}


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2"])
@pytest.mark.parametrize("given", [torch.uint8, torch.float16, torch.float64, torch.int64], ids=str)
def test_pixels_are_cast_as_the_module_casts_them(family, given):
    module = front(family).bfloat16()
    pixels = (photos(dtype=torch.float32) * 40 + 120).clamp(0, 255).to(given)
    eager, exact = in_several_orders(module, pixels), copy.deepcopy(module).double()(pixels.bfloat16().double())
    fastfuse.patch(module)
    assert_no_worse(module(pixels), eager, exact)
    assert fastfuse.status(module).fallbacks == {}


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2", "ViT"])
def test_pixels_get_their_gradient(family):
    module, pixels = front(family), photos(dtype=torch.float32).transpose(2, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    want = torch.autograd.grad(module(pixels).square().sum(), pixels)[0]
    fastfuse.patch(module)
    assert_rounding_apart(torch.autograd.grad(module(pixels).square().sum(), pixels)[0], want, K, products=4)
    assert [module(pixels[:n]).shape[0] for n in (0, 1, 2)] == [0, 1, 2]
    assert fastfuse.status(module).fallbacks == {}


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2"])
@pytest.mark.parametrize("parameters", ["fp32", "bf16", "mixed"])
def test_autocast_keeps_the_hosts_dtype(family, parameters):
    module, pixels = front(family), photos(dtype=torch.float32)
    if parameters == "bf16":
        module = module.bfloat16()
    elif parameters == "mixed":
        next(m for m in module.modules() if isinstance(m, nn.Conv2d)).bfloat16()
    exact = copy.deepcopy(module).double()(pixels.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = in_several_orders(module, pixels)
        with fastfuse.patched(module):
            got = module(pixels)
            assert fastfuse.status(module).fallbacks == {}
    assert got.dtype == eager[0].dtype == (torch.bfloat16 if parameters == "bf16" else torch.float32)
    assert_no_worse(got, eager, exact)


def test_a_wider_cls_token_widens_the_result():
    module = front("CLIPVision").bfloat16()
    module.class_embedding = nn.Parameter(module.class_embedding.float())
    assert same(module, photos(), codes={"DTYPE": 1}, match="DTYPE").dtype == torch.float32
    module.position_embedding.float()
    assert same(module, photos(), codes={}).dtype == torch.float32


@pytest.mark.parametrize(
    "family, config, size, given",
    [
        ("CLIPVision", {}, (32, 32), {"interpolate_pos_encoding": True}),
        ("CLIPVision", {"image_size": 36}, (36, 36), {}),
        ("OwlViTVision", {}, (16, 64), {}),
        ("SiglipVision", {}, (16, 64), {}),
        ("SiglipVision", {"image_size": 36}, (36, 36), {}),  # 384 pixels in patches of 14 are like that
        ("SiglipVision", {}, (39, 35), {}),
        ("SiglipVision", {}, (35, 35), {"interpolate_pos_encoding": True}),
        ("ViT", {"image_size": (16, 48)}, (16, 48), {}),
        ("ViT", {}, (32, 32), {"interpolate_pos_encoding": True}),
        ("Dinov2", {}, (39, 39), {}),
        ("Beit", {"use_absolute_position_embeddings": False}, (24, 40), {}),
    ],
)
def test_sizes_that_the_positions_are_for(family, config, size, given):
    same(front(family, **config), photos(*size, torch.float32), codes={}, **given)


@pytest.mark.parametrize(
    "family, config, size, given",
    [
        ("CLIPVision", {}, (48, 40), {"interpolate_pos_encoding": True}),
        ("CLIPVision", {}, (16, 64), {"interpolate_pos_encoding": True}),
        ("CLIPSegVision", {}, (40, 40), {}),
        ("SiglipVision", {}, (48, 48), {"interpolate_pos_encoding": True}),
        ("SiglipVision", {}, (16, 64), {"interpolate_pos_encoding": True}),
        ("ViT", {}, (40, 40), {"interpolate_pos_encoding": True}),
        ("Dinov2", {}, (40, 48), {}),
        ("Dinov2", {}, (16, 64), {}),
        ("Dinov2", {}, (32, 39), {}),
        ("Dinov2WithRegisters", {}, (48, 48), {}),
        ("Beit", {}, (24, 40), {}),
    ],
)
def test_interpolated_positions_are_the_modules_own(family, config, size, given):
    same(front(family, **config), photos(*size, torch.float32), codes={"INTERPOLATE": 1}, match="INTERPOLATE", **given)


@pytest.mark.parametrize(
    "family, pixels, message",
    [
        ("CLIPVision", (2, 3, 40, 40), r"Input image size \(40\*40\) doesn't match model \(32\*32\)"),
        ("CLIPVision", (2, 3, 32, 40), "Input image size"),
        ("ViT", (2, 3, 36, 32), r"Input image size \(36\*32\) doesn't match model"),
        ("SiglipVision", (2, 3, 40, 40), "must match the size"),
        ("SiglipVision", (3, 32, 32), "not enough values to unpack"),
        ("CLIPVision", (2, 4, 32, 32), "expected input.* to have 3 channels"),
        ("Dinov2", (2, 4, 32, 32), "Expected 3 but got 4"),
        ("Dinov2", (2, 3, 4, 4), "Kernel size can't be greater"),
    ],
)
def test_the_modules_own_errors(family, pixels, message):
    module, pixels = front(family), torch.randn(pixels)
    with pytest.raises((ValueError, RuntimeError), match=message) as own:
        module(pixels)
    with fastfuse.patched(module), pytest.warns(UserWarning, match="INTERPOLATE|SHAPE"), pytest.raises(type(own.value)) as patched:
        module(pixels)
    assert str(patched.value) == str(own.value)


@pytest.mark.parametrize("family", ["ViT", "OwlViTVision", "Beit"])
def test_pixels_in_a_dtype_that_the_module_does_not_cast(family):
    module = front(family).bfloat16()
    for pixels in (photos(dtype=torch.float32), photos(dtype=torch.float32).byte()):
        with fastfuse.patched(module), pytest.warns(UserWarning, match="DTYPE"), pytest.raises(RuntimeError, match="type"):
            module(pixels)


def test_a_configuration_that_its_weights_do_not_follow():
    """A convolution with a bias of another dtype runs on some CPUs and raises on others, the channels are checked by the module."""
    module = front("SiglipVision").bfloat16()
    module.patch_embedding.bias.data = module.patch_embedding.bias.data.float()
    try:
        module(photos())
    except RuntimeError:
        with fastfuse.patched(module), pytest.warns(UserWarning, match="DTYPE"), pytest.raises(RuntimeError, match="should be the same"):
            module(photos())
    else:
        same(module, photos(), codes={"DTYPE": 1}, match="DTYPE")
    module = front("Dinov2")
    module.patch_embeddings.num_channels = 4
    with fastfuse.patched(module), pytest.warns(UserWarning, match="SHAPE"), pytest.raises(ValueError, match="Expected 4 but got 3"):
        module(photos())


def test_masked_patches_are_the_modules_own():
    for family in ("Dinov2", "InternVLVision", "Dinov2WithRegisters"):
        mask = torch.rand(3, 16) < 0.5
        same(front(family), photos(dtype=torch.float32), bool_masked_pos=mask, codes={"ARGUMENTS": 1}, match="called with bool_masked_pos")


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_dropout_draws_the_modules_mask(family):
    """It comes last: it is called after the op."""
    module = front(family, hidden_dropout_prob=0.5).train()
    got = same(module, photos(dtype=torch.float32), codes={})
    assert 0.3 < (got == 0).float().mean() < 0.7


class Dressed(nn.Parameter):
    """A weight that may be anything inside."""


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def changed(what: str) -> tuple[nn.Module, str]:
    """A CLIP front end whose patches are another product, and the code for it."""
    module = front("CLIPVision")
    conv, shape = module.patch_embedding, {"in_channels": 3, "out_channels": D, "kernel_size": PATCH, "stride": PATCH, "bias": False}
    if what == "overlapping":
        module.patch_embedding = nn.Conv2d(**shape | {"kernel_size": 11, "stride": 7})
    elif what == "dilated":
        module.patch_embedding = nn.Conv2d(**shape | {"kernel_size": 6, "stride": 6, "dilation": 2})
    elif what == "grouped":
        module.patch_embedding = nn.Conv2d(**shape | {"in_channels": 6, "groups": 2})
    elif what == "padded":
        module.patch_embedding = nn.Conv2d(**shape | {"padding": 1})
    elif what == "subclass":
        conv.__class__ = Doubled
    elif what == "rebound":
        conv.forward = lambda x: 3 * nn.Conv2d.forward(conv, x)
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(conv)
    elif what == "tensor type":
        conv.weight = Dressed(conv.weight.detach())
    code = "CHILD_TYPE" if what in ("subclass", "rebound", "parametrized") else "TENSOR_TYPE" if what == "tensor type" else "GEOMETRY"
    return module, code


@pytest.mark.parametrize("what", ["overlapping", "dilated", "grouped", "padded", "subclass", "rebound", "parametrized", "tensor type"])
def test_another_convolution_is_called(what):
    module, code = changed(what)
    pixels = photos(dtype=torch.float32).repeat(1, 2 if what == "grouped" else 1, 1, 1)
    report = fastfuse.patch(module)
    assert [(e.status, e.code) for e in report.entries] == [("patched", code)]
    fastfuse.unpatch(module)
    same(module, pixels, codes={"SHAPE" if what == "grouped" and code != "GEOMETRY" else code: 1}, match=code)


def test_sharded_weights_are_left_alone():
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    module = front("SiglipVision")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        conv = module.patch_embedding
        conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), mesh, [Replicate()]))
        assert [e.code for e in fastfuse.patch(module).entries] == ["DTENSOR"]
    finally:
        dist.destroy_process_group()


HOOKS = {
    "forward": lambda m, run: m.register_forward_hook(lambda *_: run()),
    "pre": lambda m, run: m.register_forward_pre_hook(lambda *_: run()),
    "backward": lambda m, run: m.register_full_backward_hook(lambda *_: run()),
    "global": lambda m, run: register_module_forward_hook(lambda *_: run()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("family, child", [("CLIPVision", "patch_embedding"), ("Dinov2", "patch_embeddings"), ("Dinov2", "patch_embeddings.projection")])
def test_hooks_on_what_the_op_swallows_run(family, child, kind):
    module, ran = front(family), []
    handle = HOOKS[kind](module.get_submodule(child), lambda: ran.append(1))
    try:
        module(photos(dtype=torch.float32)).sum().backward()
        count = len(ran)
        with fastfuse.patched(module), pytest.warns(UserWarning, match="HOOKED"):
            module(photos(dtype=torch.float32)).sum().backward()
            assert fastfuse.status(module).fallbacks == {"HOOKED": 1}
        assert len(ran) == 2 * count > 0
    finally:
        handle.remove()


@pytest.mark.parametrize("family, child", [("CLIPVision", "position_embedding"), ("Dinov2", "dropout"), ("SiglipVision", "")])
def test_hooks_on_what_is_called_run_too(family, child):
    module = front(family)
    module.get_submodule(child).register_forward_hook(lambda m, args, out: out * 3)
    same(module, photos(dtype=torch.float32), codes={})


@pytest.mark.parametrize("order", ["patch, parametrize", "parametrize, patch"])
@pytest.mark.parametrize("family, name", [("CLIPVision", "class_embedding"), ("Dinov2", "cls_token"), ("Dinov2", "position_embeddings")])
def test_parametrized_embeddings_are_read_once_and_fused(family, name, order):
    """And not to make a report: a parametrization may draw random numbers, or count."""
    module, x, calls = front(family), photos(dtype=torch.float32), []

    class Twice(nn.Module):
        def forward(self, t):
            calls.append(1)
            return 2 * t

    own = copy.deepcopy(module)
    with torch.no_grad():
        getattr(own, name).mul_(2)
    for act in order.split(", "):
        if act == "patch":
            assert len(fastfuse.patch(module).patched) == 1
        else:
            nn.utils.parametrize.register_parametrization(module, name, Twice())
            calls.clear()
    assert [(e.status, e.code) for e in fastfuse.status(module).entries] == [("patched", "")] and calls == []
    assert_no_worse(module(x), own(x), copy.deepcopy(own).double()(x.double()))
    assert fastfuse.status(module).fallbacks == {} and len(calls) == 1


def test_positions_are_taken_by_their_ids():
    module, pixels = front("CLIPVision"), photos(dtype=torch.float32)
    in_order = module(pixels)
    module.position_ids = module.position_ids.flip(1)
    assert not torch.allclose(same(module, pixels, codes={}), in_order)


def make_inputs_require_grads(module, args, output):
    output.requires_grad_(True)


def test_only_asks_for_grad():
    conv = nn.Conv2d(1, 1, 1)
    assert not vision.only_asks_for_grad(conv)
    handles = [conv.register_forward_hook(make_inputs_require_grads)]
    assert vision.only_asks_for_grad(conv)
    handles.append(conv.register_forward_hook(make_inputs_require_grads))
    assert vision.only_asks_for_grad(conv)
    for other in (
        lambda: conv.register_forward_hook(lambda *_: None),
        lambda: conv.register_forward_hook(contextlib.ExitStack()),  # any object may be one, with a name or not
        lambda: conv.register_forward_pre_hook(make_inputs_require_grads),
        lambda: conv.register_full_backward_hook(make_inputs_require_grads),
        lambda: conv.register_full_backward_pre_hook(make_inputs_require_grads),
        lambda: register_module_forward_hook(make_inputs_require_grads),
        lambda: register_module_forward_pre_hook(make_inputs_require_grads),
    ):
        handle = other()
        assert not vision.only_asks_for_grad(conv)
        handle.remove()
        assert vision.only_asks_for_grad(conv)
    for handle in handles:
        handle.remove()
    assert not vision.only_asks_for_grad(conv)


@pytest.mark.parametrize("kind", MODELS)
def test_frozen_models_that_are_asked_for_input_gradients(kind):
    """The usual flow of QLoRA: transformers registers a hook on what the op swallows, which is honoured, not called."""
    model, pixels = made(kind).requires_grad_(False), photos(dtype=torch.float32)
    module = embeddings(model)
    model.enable_input_require_grads()
    assert module(pixels).requires_grad
    with fastfuse.patched(model, verify=True) as report:
        assert report.counts == {"patched": 1}
        assert module(pixels).requires_grad
        with torch.no_grad():
            assert not module(pixels).requires_grad
        with torch.inference_mode():
            module(pixels)
        model.disable_input_require_grads()
        assert not module(pixels).requires_grad
        assert fastfuse.status(model).fallbacks == {}
        model.requires_grad_(True)
        model.enable_input_require_grads()
        leaf = module(pixels)
        assert not leaf.is_leaf
        leaf.sum().backward()
        assert fastfuse.status(model).fallbacks == {}


def test_gradient_checkpointing_of_a_frozen_model_reaches_its_adapters():
    grads = []
    for patched in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(made("clip"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model.train()
        if patched:
            assert fastfuse.patch(model).counts == {"patched": 1}
        model(photos(dtype=torch.float32)).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert fastfuse.status(model).fallbacks == {}
    for got, want in zip(*grads, strict=True):
        assert_rounding_apart(got, want, K, products=16)


@pytest.mark.parametrize("kind, target", [("clip", "patch_embedding"), ("siglip", "patch_embedding"), ("dinov2", "projection")])
def test_adapters_on_the_projection(kind, target):
    pixels = photos(dtype=torch.float32)
    model = get_peft_model(made(kind), LoraConfig(r=4, target_modules=[target], init_lora_weights=False)).eval()
    want = model(pixels).last_hidden_state
    assert [e.code for e in fastfuse.patch(model).entries] == ["CHILD_TYPE"]
    with pytest.warns(UserWarning, match="CHILD_TYPE: Conv2d in place of a plain Conv2d"):
        assert torch.equal(model(pixels).last_hidden_state, want)
    base = model.merge_and_unload()
    got = base(pixels).last_hidden_state
    assert fastfuse.status(base).fallbacks == {"CHILD_TYPE": 1} and [e.code for e in fastfuse.status(base).entries] == [""]
    fastfuse.unpatch(base)
    assert_rounding_apart(got, base(pixels).last_hidden_state, K, products=9)


def test_adapters_on_the_positions():
    model = get_peft_model(made("clip"), LoraConfig(r=4, target_modules=["position_embedding"], init_lora_weights=False)).eval()
    same(embeddings(model), photos(dtype=torch.float32), codes={})


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2", "Dinov2WithRegisters", "ViT", "model"])
def test_compile_fullgraph(family):
    module, pixels = made("siglip") if family == "model" else front(family), photos(dtype=torch.float32)
    eager, exact = in_several_orders(derived, module, module, pixels), copy.deepcopy(module).double()
    exact = derived(exact, exact, pixels.double())
    fastfuse.patch(module)
    torch.compiler.reset()  # all models share transformers' wrappers, and their number of recompilations
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_results_no_worse(derived(module, compiled, pixels), eager, exact)
    assert fastfuse.status(module).fallbacks == {}
    fastfuse.unpatch(module)
    if family == "CLIPVision":
        assert torch.equal(compiled(pixels), eager[0][0])


def test_compile_runs_the_modules_own_forward_where_that_is_needed():
    module = front("SiglipVision")
    want = module(photos(40, 48, torch.float32), interpolate_pos_encoding=True)
    fastfuse.patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_rounding_apart(compiled(photos(40, 48, torch.float32), interpolate_pos_encoding=True), want, K, products=2)


def test_func_transforms_run_the_modules_own_forward():
    module, pixels = front("SiglipVision"), photos(dtype=torch.float32)
    want = torch.func.vmap(lambda x: module(x[None]))(pixels)
    fastfuse.patch(module)
    with pytest.warns(UserWarning, match="FUNCTORCH"):
        assert torch.equal(torch.func.vmap(lambda x: module(x[None]))(pixels), want)


def test_tracing_runs_the_modules_own_forward():
    module, pixels = front("CLIPVision"), photos(dtype=torch.float32)
    with fastfuse.patched(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, pixels)
    assert fastfuse.status(module).fallbacks == {} and torch.equal(traced(pixels), module(pixels))
    assert "fastfuse" not in str(traced.inlined_graph)


def test_deepcopy_and_pickle():
    model, pixels = made("dinov2"), photos(dtype=torch.float32)
    want = model(pixels).last_hidden_state
    fastfuse.patch(model)
    twin, file = copy.deepcopy(model), io.BytesIO()
    patched = model(pixels).last_hidden_state
    with torch.no_grad():
        model.embeddings.cls_token.add_(1)
    assert fastfuse.status(twin).counts == {"patched": 1} and torch.equal(twin(pixels).last_hidden_state, patched)
    assert not torch.equal(model(pixels).last_hidden_state, patched)
    torch.save(twin, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(twin)), torch.load(file, weights_only=False)):
        assert fastfuse.status(loaded).counts == {"unpatched": 1}
        assert torch.equal(loaded(pixels).last_hidden_state, want)


def test_weights_are_read_at_every_call():
    module, pixels = front("SiglipVision"), photos(dtype=torch.float32)
    fastfuse.patch(module)
    before = module(pixels)
    module.patch_embedding.weight = nn.Parameter(torch.randn(D, 3, PATCH, PATCH))
    module.position_embedding = nn.Embedding(16, D)
    after = module(pixels)
    fastfuse.unpatch(module)
    assert_rounding_apart(after, module(pixels), K, products=2)
    assert not torch.allclose(after, before)


def in_transformers(forward):
    forward.__module__ = "transformers.models.clip.modeling_clip"
    return forward


class RenamedPart(CLIPVisionEmbeddings):
    """A version with another name for the table."""

    def __init__(self, config):
        super().__init__(config)
        self.positions = self.position_embedding
        del self.position_embedding


class AnotherPart(CLIPVisionEmbeddings):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(D)


class NoClass(CLIPVisionEmbeddings):
    def __init__(self, config):
        super().__init__(config)
        del self.class_embedding


class RenamedArgument(CLIPVisionEmbeddings):
    @in_transformers
    def forward(self, images, interpolate_pos_encoding=False):
        return super().forward(images, interpolate_pos_encoding)


class AnotherFormula(CLIPVisionEmbeddings):
    @in_transformers
    def forward(self, pixel_values, interpolate_pos_encoding=False):
        return 2 * super().forward(pixel_values, interpolate_pos_encoding)


class Mine(CLIPVisionEmbeddings):
    def forward(self, pixel_values, interpolate_pos_encoding=False):
        return 2 * super().forward(pixel_values, interpolate_pos_encoding)


class WithClass(SiglipVisionEmbeddings):
    """CLIP's parts, and SigLIP's forward, which leaves the CLS token out."""

    def __init__(self, config):
        super().__init__(config)
        self.class_embedding = nn.Parameter(torch.randn(D))


@pytest.mark.parametrize(
    "cls, code, words",
    [
        (RenamedPart, "STRUCTURE", "RenamedPart has no position_embedding.weight"),
        (AnotherPart, "STRUCTURE", "not built as"),
        (NoClass, "STRUCTURE", "has no class_embedding"),
        (RenamedArgument, "SIGNATURE", "takes no pixel_values"),
        (AnotherFormula, "UNKNOWN_FORWARD", "another forward"),
        (WithClass, "UNKNOWN_FORWARD", "another forward"),
        (Mine, "FOREIGN_FORWARD", __name__),
    ],
)
def test_versions_that_nobody_knows_are_skipped(cls, code, words):
    module = cls((SiglipVisionConfig if cls is WithClass else CLIPVisionConfig)(**SMALL))
    before = dict(module.__dict__)
    report = fastfuse.patch(module)
    assert [(e.status, e.code) for e in report.entries] == [("skipped", code)] and words in report.entries[0].reason
    assert module.__dict__ == before
    with pytest.raises(fastfuse.Unsupported, match=code):
        fastfuse.patch(module, on_unsupported="raise")


class OwnInterpolation(Dinov2Embeddings):
    def interpolate_pos_encoding(self, embeddings, height, width):
        return 2 * self.position_embeddings


def test_an_interpolation_of_ones_own_is_called():
    module = shaken(OwnInterpolation(Dinov2Config(**SMALL)))
    same(module, photos(dtype=torch.float32), codes={"INTERPOLATE": 1}, match="INTERPOLATE")


def test_another_child_is_called():
    module = front("Dinov2")
    child = module.patch_embeddings
    child.__class__ = type("Louder", (type(child),), {"forward": lambda self, x: 2 * type(child).__mro__[1].forward(self, x)})
    same(module, photos(dtype=torch.float32), codes={"CHILD_TYPE": 1}, match="Louder in place of transformers' own")
    module = front("ViT")
    module.patch_embeddings.forward = lambda x, m=module.patch_embeddings: 2 * type(m).forward(m, x)
    same(module, photos(dtype=torch.float32), codes={"CHILD_TYPE": 1}, match="CHILD_TYPE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*MODELS, "timm"])
def test_verify(kind, dtype, monkeypatch):
    module = (shaken(PatchEmbed(SIZE, PATCH, embed_dim=D)) if kind == "timm" else made(kind)).to(dtype)
    assert fastfuse.patch(module, verify=True).counts == {"patched": 1}
    fastfuse.unpatch(module)
    wrong = [dataclasses.replace(h, fused=lambda *args, right=h: right.fused(*args) * 1.03) if h in vision.HOSTS else h for h in hosts.BUILT_IN]
    monkeypatch.setattr(hosts, "BUILT_IN", tuple(wrong))
    report = fastfuse.patch(module, verify=True)
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "MISMATCH")] and "differs from its own forward by 3" in report.entries[0].reason


@pytest.mark.parametrize("family, config", [("Dinov2", {"image_size": (16, 48)}), ("SiglipVision", {})])
def test_verify_has_nothing_to_compare_where_positions_do_not_fit(family, config):
    module = front(family, **config)
    if family == "SiglipVision":
        module.position_ids = torch.arange(9)[None]
    assert fastfuse.patch(module, verify=True).counts == {"patched": 1}


@pytest.mark.parametrize("kind", [*MODELS, "timm"])
def test_meta_device(kind):
    with torch.device("meta"):
        model = PatchEmbed(SIZE, PATCH, embed_dim=D) if kind == "timm" else MODELS[kind]()
    pixels = torch.empty(2, 3, SIZE, SIZE, device="meta")
    module = model if kind == "timm" else embeddings(model)
    want = module(pixels)
    assert fastfuse.patch(model, verify=True).counts == {"patched": 1}
    got = module(pixels)
    assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype and fastfuse.status(model).fallbacks == {}


def test_by_name_of_the_op():
    model = get_peft_model(made("clip"), LoraConfig(r=4, target_modules=["q_proj"]))
    report = fastfuse.patch(model, ops="patch_embed")
    assert [(e.name.rsplit(".", 1)[-1], e.module_type, e.host, e.op, e.backend) for e in report.patched] == [
        ("embeddings", "CLIPVisionEmbeddings", "transformers CLIP", "patch_embed", "torch")
    ]
    fastfuse.unpatch(model)
    assert not fastfuse.patch(model, ops="nf4_linear")


def test_strict(monkeypatch):
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    module = front("Dinov2")
    fastfuse.patch(module)
    module(photos(dtype=torch.float32))
    with pytest.raises(fastfuse.Unsupported, match="INTERPOLATE"):
        module(photos(40, 48, torch.float32))


def test_nothing_else_in_transformers_is_taken_for_one():
    """Text embeddings, and front ends with a formula of their own."""
    from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
    from transformers.models.deit.modeling_deit import DeiTEmbeddings
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = SimpleNamespace(**SMALL, vocab_size=9, max_position_embeddings=8, num_channels=3, hidden_dropout_prob=0.0)
    others = nn.ModuleList([CLIPTextEmbeddings(config), DeiTEmbeddings(config), Idefics2VisionEmbeddings(config)])
    with pytest.warns(UserWarning, match="found nothing"):
        assert fastfuse.patch(others).entries == ()


LAYOUTS = [{}, {"output_fmt": "NLC"}, {"bias": False}, {"img_size": None}, {"strict_img_size": False}, {"strict_img_size": False, "dynamic_img_pad": True}]
NORMS = [nn.LayerNorm, functools.partial(nn.LayerNorm, eps=1e-3, elementwise_affine=False), functools.partial(nn.LayerNorm, bias=False), nn.RMSNorm]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_timm(options, dtype):
    module = shaken(PatchEmbed(**{"img_size": SIZE, "patch_size": PATCH, "embed_dim": D} | options)).to(dtype)
    pixels = photos(dtype=dtype)
    eager, exact = in_several_orders(derived, module, module, pixels), copy.deepcopy(module).double()
    exact = derived(exact, exact, pixels.double())
    with fastfuse.patched(module, verify=True) as report:
        assert [(e.host, e.op, e.status, e.code) for e in report.entries] == [("timm", "patch_embed", "patched", "")]
        assert_results_no_worse(derived(module, module, pixels), eager, exact)
        assert fastfuse.status(module).fallbacks == {}
    assert torch.equal(module(pixels), eager[0][0])


@pytest.mark.parametrize("norm", range(len(NORMS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_timm_with_a_norm(norm, dtype, autocast):
    module = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D, norm_layer=NORMS[norm])).to(dtype)
    with torch.no_grad():
        for p in module.norm.parameters():
            p.add_(torch.randn_like(p))
    pixels = photos(dtype=dtype)
    exact = copy.deepcopy(module).double()
    exact = derived(exact, exact, pixels.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = in_several_orders(derived, module, module, pixels)
        fastfuse.patch(module)
        got = derived(module, module, pixels)
    assert_results_no_worse(got, eager, exact)
    assert fastfuse.status(module).fallbacks == {}


def test_timm_norms_that_are_called():
    module, pixels, seen = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D, norm_layer=nn.LayerNorm)), photos(dtype=torch.float32), []
    module.norm.register_forward_hook(lambda m, args, out: seen.append(out.shape) or out + 1)
    same(module, pixels, codes={})
    assert seen == [(3, 16, D)] * 2


@pytest.mark.parametrize("autocast", [False, True])
def test_timm_norms_under_autocast_are_called(autocast, monkeypatch):
    """They give fp32 on a GPU then, which the op does not."""
    module, calls, own = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D, norm_layer=nn.LayerNorm)), [], nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda m, x: calls.append(m) or own(m, x))
    fastfuse.patch(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(photos(dtype=torch.float32))
    assert calls == [module.norm] * autocast


DYNAMIC = {"strict_img_size": False, "output_fmt": "NHWC"}  # how timm builds it for a model with dynamic_img_size


@pytest.mark.parametrize("options", [{"flatten": False}, {"output_fmt": "NHWC"}, DYNAMIC], ids=str)
def test_timm_layouts_that_no_call_could_be_fused_in_are_skipped(options):
    module, pixels = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D, **options)), photos(dtype=torch.float32)
    want, before = module(pixels), dict(module.__dict__)
    report = fastfuse.patch(module)
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "LAYOUT")] and "its patches stay N" in report.entries[0].reason
    assert not report and report.entries[0].reason in str(fastfuse.status(module)) and module.__dict__ == before
    assert torch.equal(module(pixels), want)
    with pytest.raises(fastfuse.Unsupported, match="LAYOUT"):
        fastfuse.patch(module, on_unsupported="raise")


def test_timm_images_that_are_padded_run_its_own_forward():
    """And those that need no padding are fused."""
    module = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D, strict_img_size=False, dynamic_img_pad=True))
    same(module, photos(35, 37, torch.float32), codes={"SIZE": 1}, match="SIZE")
    same(module, photos(40, 48, torch.float32), codes={})


def test_timm_layout_that_changes_after_the_patch():
    module, pixels = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D)), photos(dtype=torch.float32)
    fastfuse.patch(module)
    module.flatten = False
    with pytest.warns(UserWarning, match="LAYOUT"):
        assert module(pixels).shape == (3, D, 4, 4)
    assert [(e.status, e.code) for e in fastfuse.status(module).entries] == [("patched", "LAYOUT")]


@pytest.mark.parametrize("img_size, given", [(36, (36, 36)), (None, (37, 45))])
def test_timm_leaves_the_rest_of_an_image_out(img_size, given):
    same(shaken(PatchEmbed(img_size, PATCH, embed_dim=D)), photos(*given, torch.float32), codes={})


def test_timm_raises_its_own_errors():
    for options, size, message in (({}, 40, r"Input height \(40\) doesn't match"), ({"strict_img_size": False}, 35, "should be divisible")):
        module = PatchEmbed(SIZE, PATCH, embed_dim=D, **options)
        with fastfuse.patched(module), pytest.warns(UserWarning, match="SIZE"), pytest.raises(AssertionError, match=message):
            module(torch.randn(1, 3, size, size))


def test_timm_compile_hook_and_adapter():
    module, pixels = shaken(PatchEmbed(SIZE, PATCH, embed_dim=D, norm_layer=nn.LayerNorm, output_fmt="NLC")), photos(dtype=torch.float32)
    want = module(pixels)
    fastfuse.patch(module)
    assert_rounding_apart(torch.compile(module, fullgraph=True, backend="aot_eager")(pixels), want, K, products=3)
    assert fastfuse.status(module).fallbacks == {}
    fastfuse.unpatch(module)
    module.proj.register_forward_hook(lambda m, args, out: out * 2)
    same(module, pixels, codes={"HOOKED": 1}, match="HOOKED")
    wrapped = get_peft_model(nn.Sequential(PatchEmbed(SIZE, PATCH, embed_dim=D)), LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False))
    same(wrapped, pixels, codes={"CHILD_TYPE": 1}, match="CHILD_TYPE")


class WithSize(PatchEmbed):
    """As timm's PatchEmbedWithSize: the same parts, another result."""

    def forward(self, x):
        return super().forward(x), x.shape[-2:]

    forward.__module__ = "timm.layers.patch_embed"


def test_timm_relatives_are_skipped():
    report = fastfuse.patch(WithSize(SIZE, PATCH, embed_dim=D))
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "UNKNOWN_FORWARD")]
