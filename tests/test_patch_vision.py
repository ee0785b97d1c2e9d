"""patch(model) over the front ends of transformers' ViTs, beyond what test_hosts.py asks of them."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from fronts import FAMILIES, MODELS, PATCH, SMALL, D, K, front, made, photos, shaken
from hosts import exchanged, is_skipped, runs_its_own
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from peft import LoraConfig, get_peft_model
from qlora import said
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings, CLIPVisionEmbeddings
from transformers.models.deit.modeling_deit import DeiTEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

import fastfuse
from cases.linear import BF16, F16, F32
from fastfuse import patch, status
from fastfuse.patching.hosts import vision


def call(*size, dtype=F32, **more):
    return {"pixel_values": photos(*size, dtype=dtype)} | more


def embeddings(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Embeddings"))


# What the modules are called with


@pytest.mark.parametrize("family, dtype", [*((family, F32) for family in FAMILIES), ("OwlViTVision", BF16), ("Owlv2Vision", F16), ("Beit", BF16)])
def test_every_family(family, dtype):
    """The forwards that share their structure with these, whatever file transformers keeps them in."""
    assert said(exchanged(front(family).to(dtype), call(dtype=dtype), dtype, verify=True)) == [("patched", "")]


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2"])
@pytest.mark.parametrize("given", [F32, F16, torch.float64, torch.uint8, torch.int64], ids=str)
def test_pixels_are_cast_as_the_module_casts_them(family, given):
    module = front(family).bfloat16()
    images = (photos() * 40 + 120).clamp(0, 255).to(given)
    eager, exact = in_several_orders(module, images), copy.deepcopy(module).double()(images.bfloat16().double())
    patch(module)
    assert_no_worse(module(images), eager, exact)
    assert status(module).fallbacks == {}


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2", "ViT"])
def test_pixels_of_any_layout_and_number(family):
    module, images = front(family), photos().transpose(2, 3).contiguous(memory_format=torch.channels_last)
    exchanged(module, {"pixel_values": images})
    patch(module)
    assert [module(images[:n]).shape[0] for n in (0, 1, 2)] == [0, 1, 2]
    assert status(module).fallbacks == {}


@pytest.mark.parametrize("family", ["CLIPVision", "SiglipVision", "Dinov2"])
def test_autocast_of_a_module_in_two_dtypes(family):
    module = front(family)
    next(m for m in module.modules() if isinstance(m, nn.Conv2d)).bfloat16()
    exact = copy.deepcopy(module).double()(photos().double())
    with torch.autocast("cpu", BF16):
        eager = in_several_orders(module, photos())
        patch(module)
        assert_no_worse(module(photos()), eager, exact)
    assert eager[0].dtype == F32 and status(module).fallbacks == {}


def test_a_wider_cls_token_widens_the_result():
    module = front("CLIPVision").bfloat16()
    module.class_embedding = nn.Parameter(module.class_embedding.float())
    runs_its_own(module, call(dtype=BF16), "DTYPE")
    assert module(photos(dtype=BF16)).dtype == F32
    fastfuse.unpatch(module)
    module.position_embedding.float()
    exchanged(module, call(dtype=BF16), BF16)
    assert module(photos(dtype=BF16)).dtype == F32


INTERPOLATE = {"interpolate_pos_encoding": True}


@pytest.mark.parametrize(
    "family, config, size, given",
    [
        ("CLIPVision", {}, (32, 32), INTERPOLATE),
        ("CLIPVision", {"image_size": 36}, (36, 36), {}),  # 384 pixels in patches of 14 are like that
        ("OwlViTVision", {}, (16, 64), {}),
        ("SiglipVision", {}, (39, 35), {}),
        ("SiglipVision", {}, (35, 35), INTERPOLATE),
        ("ViT", {"image_size": (16, 48)}, (16, 48), {}),
        ("ViT", {}, (32, 32), INTERPOLATE),
        ("Dinov2", {}, (39, 39), {}),
        ("Beit", {"use_absolute_position_embeddings": False}, (24, 40), {}),
    ],
)
def test_sizes_that_the_positions_are_for(family, config, size, given):
    exchanged(front(family, **config), call(*size, **given))


@pytest.mark.parametrize(
    "family, size, given",
    [
        ("CLIPVision", (16, 64), INTERPOLATE),
        ("CLIPSegVision", (40, 40), {}),
        ("SiglipVision", (16, 64), INTERPOLATE),
        ("ViT", (40, 40), INTERPOLATE),
        ("Dinov2", (16, 64), {}),
        ("Dinov2", (32, 39), {}),
        ("Dinov2WithRegisters", (48, 48), {}),
        ("Beit", (24, 40), {}),
    ],
)
def test_interpolated_positions_are_the_modules_own(family, size, given):
    runs_its_own(front(family), call(*size, **given), "INTERPOLATE")


@pytest.mark.parametrize(
    "family, shape, message",
    [
        ("CLIPVision", (2, 3, 40, 40), r"Input image size \(40\*40\) doesn't match model \(32\*32\)"),
        ("ViT", (2, 3, 36, 32), r"Input image size \(36\*32\) doesn't match model"),
        ("SiglipVision", (2, 3, 40, 40), "must match the size"),
        ("SiglipVision", (3, 32, 32), "not enough values to unpack"),
        ("CLIPVision", (2, 4, 32, 32), "expected input.* to have 3 channels"),
        ("Dinov2", (2, 4, 32, 32), "Expected 3 but got 4"),
        ("Dinov2", (2, 3, 4, 4), "Kernel size can't be greater"),
    ],
)
def test_the_modules_own_errors(family, shape, message):
    module, images = front(family), torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError), match=message) as own:
        module(images)
    patch(module)
    with pytest.warns(UserWarning, match="INTERPOLATE|SHAPE"), pytest.raises(type(own.value)) as patched:
        module(images)
    assert str(patched.value) == str(own.value)


@pytest.mark.parametrize("family", ["ViT", "OwlViTVision", "Beit"])
@pytest.mark.parametrize("dtype", [F32, torch.uint8], ids=str)
def test_pixels_in_a_dtype_that_the_module_does_not_cast(family, dtype):
    module = front(family).bfloat16()
    patch(module)
    with pytest.warns(UserWarning, match="DTYPE"), pytest.raises(RuntimeError, match="type"):
        module(photos().to(dtype))


def test_a_configuration_that_its_weights_do_not_follow():
    """A convolution with a bias of another dtype runs on some CPUs and raises on others, the channels are checked by the module."""
    module = front("SiglipVision").bfloat16()
    module.patch_embedding.bias.data = module.patch_embedding.bias.data.float()
    try:
        module(photos())
    except RuntimeError:
        patch(module)
        with pytest.warns(UserWarning, match="DTYPE"), pytest.raises(RuntimeError, match="should be the same"):
            module(photos())
    else:
        runs_its_own(module, call(), "DTYPE")
    module = front("Dinov2")
    module.patch_embeddings.num_channels = 4
    patch(module)
    with pytest.warns(UserWarning, match="SHAPE"), pytest.raises(ValueError, match="Expected 4 but got 3"):
        module(photos())


@pytest.mark.parametrize("family", ["Dinov2", "InternVLVision", "Dinov2WithRegisters"])
def test_masked_patches_are_the_modules_own(family):
    runs_its_own(front(family), call(bool_masked_pos=torch.rand(3, 16) < 0.5), "ARGUMENTS", "called with bool_masked_pos")


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_dropout_draws_the_modules_mask(family):
    """It comes last: it is called after the op."""
    module = front(family, hidden_dropout_prob=0.5).train()
    torch.manual_seed(1)
    want = module(photos())
    patch(module)
    torch.manual_seed(1)
    got = module(photos())
    assert_rounding_apart(got, want, K, products=2)
    assert 0.3 < (got == 0).float().mean() < 0.7 and torch.equal(got == 0, want == 0)


# Modules that are not as their library makes them


class Dressed(nn.Parameter):
    """A weight that may be anything inside."""


def another(**shape):
    return lambda conv: nn.Conv2d(**{"in_channels": 3, "out_channels": D, "kernel_size": PATCH, "stride": PATCH, "bias": False} | shape)


CONVOLUTIONS = {
    "overlapping": ("GEOMETRY", another(kernel_size=11, stride=7)),
    "dilated": ("GEOMETRY", another(kernel_size=6, stride=6, dilation=2)),
    "grouped": ("GEOMETRY", another(in_channels=6, groups=2)),
    "padded": ("GEOMETRY", another(padding=1)),
    "tensor type": ("TENSOR_TYPE", lambda conv: setattr(conv, "weight", Dressed(conv.weight.detach()))),
}


@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_another_convolution_is_called(what):
    module, (code, change) = front("CLIPVision"), CONVOLUTIONS[what]
    module.patch_embedding = change(module.patch_embedding) or module.patch_embedding
    given = {"pixel_values": photos().repeat(1, 2 if what == "grouped" else 1, 1, 1)}
    assert said(runs_its_own(module, given, code)) == [("patched", code)]


@pytest.mark.parametrize("order", ["patch, parametrize", "parametrize, patch"])
@pytest.mark.parametrize("family, name", [("CLIPVision", "class_embedding"), ("Dinov2", "cls_token"), ("Dinov2", "position_embeddings")])
def test_parametrized_embeddings_are_read_once_and_fused(family, name, order):
    """And not to make a report: a parametrization may draw random numbers, or count."""
    module, x, calls = front(family), photos(), []

    class Twice(nn.Module):
        def forward(self, t):
            calls.append(1)
            return 2 * t

    own = copy.deepcopy(module)
    with torch.no_grad():
        getattr(own, name).mul_(2)
    for act in order.split(", "):
        if act == "patch":
            assert len(patch(module).patched) == 1
        else:
            nn.utils.parametrize.register_parametrization(module, name, Twice())
            calls.clear()
    assert said(status(module)) == [("patched", "")] and calls == []
    assert_no_worse(module(x), own(x), copy.deepcopy(own).double()(x.double()))
    assert status(module).fallbacks == {} and len(calls) == 1


def test_positions_are_taken_by_their_ids():
    module = front("CLIPVision")
    in_order = module(photos())
    module.position_ids = module.position_ids.flip(1)
    exchanged(module, call())
    assert not torch.allclose(module(photos()), in_order)


class AnotherPart(CLIPVisionEmbeddings):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(D)


class AnotherFormula(CLIPVisionEmbeddings):
    def forward(self, pixel_values, interpolate_pos_encoding=False):
        return 2 * super().forward(pixel_values, interpolate_pos_encoding)

    forward.__module__ = CLIPVisionEmbeddings.__module__


class WithClass(SiglipVisionEmbeddings):
    """CLIP's parts, and SigLIP's forward, which leaves the CLS token out."""

    def __init__(self, config):
        super().__init__(config)
        self.class_embedding = nn.Parameter(torch.randn(D))


@pytest.mark.parametrize(
    "make, code, words",
    [
        (lambda: AnotherPart(CLIPVisionConfig(**SMALL)), "STRUCTURE", "not built as"),
        (lambda: AnotherFormula(CLIPVisionConfig(**SMALL)), "UNKNOWN_FORWARD", "another forward"),
        (lambda: WithClass(SiglipVisionConfig(**SMALL)), "UNKNOWN_FORWARD", "another forward"),
    ],
)
def test_versions_that_nobody_knows_are_skipped(make, code, words):
    is_skipped(make(), code, words)


class OwnInterpolation(Dinov2Embeddings):
    def interpolate_pos_encoding(self, embeddings, height, width):
        return 2 * self.position_embeddings


def test_an_interpolation_of_ones_own_is_called():
    runs_its_own(shaken(OwnInterpolation(Dinov2Config(**SMALL))), call(), "INTERPOLATE")


@pytest.mark.parametrize("family, config", [("Dinov2", {"image_size": (16, 48)}), ("SiglipVision", {})])
def test_verify_has_nothing_to_compare_where_positions_do_not_fit(family, config):
    module = front(family, **config)
    if family == "SiglipVision":
        module.position_ids = torch.arange(9)[None]
    assert patch(module, verify=True).counts == {"patched": 1}


def test_nothing_else_in_transformers_is_taken_for_one():
    """Text embeddings, and front ends with a formula of their own."""
    config = SimpleNamespace(**SMALL, vocab_size=9, max_position_embeddings=8, num_channels=3, hidden_dropout_prob=0.0)
    others = nn.ModuleList([CLIPTextEmbeddings(config), DeiTEmbeddings(config), Idefics2VisionEmbeddings(config)])
    with pytest.warns(UserWarning, match="found nothing"):
        assert patch(others).entries == ()


# What asks for gradients, adapters, graphs


def make_inputs_require_grads(module, args, output):
    output.requires_grad_(True)


def test_only_asks_for_grad():
    conv = nn.Conv2d(1, 1, 1)
    assert not vision.only_asks_for_grad(conv)
    handles = []
    for _ in range(2):
        handles.append(conv.register_forward_hook(make_inputs_require_grads))
        assert vision.only_asks_for_grad(conv)
    for register, hook in (
        (conv.register_forward_hook, lambda *_: None),
        (conv.register_forward_hook, contextlib.ExitStack()),  # any object may be one, with a name or not
        (conv.register_forward_pre_hook, make_inputs_require_grads),
        (conv.register_full_backward_hook, make_inputs_require_grads),
        (conv.register_full_backward_pre_hook, make_inputs_require_grads),
        (register_module_forward_hook, make_inputs_require_grads),
        (register_module_forward_pre_hook, make_inputs_require_grads),
    ):
        handle = register(hook)
        assert not vision.only_asks_for_grad(conv)
        handle.remove()
        assert vision.only_asks_for_grad(conv)
    for handle in handles:
        handle.remove()
    assert not vision.only_asks_for_grad(conv)


@pytest.mark.parametrize("kind", MODELS)
def test_frozen_models_that_are_asked_for_input_gradients(kind):
    """The usual flow of QLoRA: transformers registers a hook on what the op swallows, which is honoured, not called."""
    model = made(kind).requires_grad_(False)
    module, x = embeddings(model), photos()
    model.enable_input_require_grads()
    assert module(x).requires_grad and patch(model, verify=True).counts == {"patched": 1}
    assert module(x).requires_grad
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        module(x)
    model.disable_input_require_grads()
    assert not module(x).requires_grad
    model.requires_grad_(True)
    model.enable_input_require_grads()
    leaf = module(x)
    assert not leaf.is_leaf
    leaf.sum().backward()
    assert status(model).fallbacks == {}


@pytest.mark.parametrize("kind, target", [("clip", "patch_embedding"), ("siglip", "patch_embedding"), ("dinov2", "projection")])
def test_adapters_on_the_projection(kind, target):
    model = get_peft_model(made(kind), LoraConfig(r=4, target_modules=[target], init_lora_weights=False)).eval()
    assert [e.code for e in runs_its_own(model, call(), "CHILD_TYPE", "Conv2d in place of a plain Conv2d").entries] == ["CHILD_TYPE"]
    base = model.merge_and_unload()
    before = status(base).fallbacks
    got = base(photos()).last_hidden_state
    assert status(base).fallbacks == before and [e.code for e in status(base).entries] == [""]
    fastfuse.unpatch(base)
    assert_rounding_apart(got, base(photos()).last_hidden_state, K, products=9)


def test_adapters_on_the_positions():
    model = get_peft_model(made("clip"), LoraConfig(r=4, target_modules=["position_embedding"], init_lora_weights=False)).eval()
    exchanged(embeddings(model), call())


def test_compile_runs_the_modules_own_forward_where_that_is_needed():
    module, given = front("SiglipVision"), call(40, 48, **INTERPOLATE)
    want = module(**given)
    patch(module)
    assert_rounding_apart(torch.compile(module, fullgraph=True, backend="aot_eager")(**given), want, K, products=2)
