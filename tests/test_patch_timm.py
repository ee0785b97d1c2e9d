"""patch(model) over timm's PatchEmbed, beyond what test_hosts.py asks of it."""

import functools

import pytest
import torch
from fronts import PATCH, SIZE, D, PatchEmbed, photos, shaken
from hosts import assert_true, exchanged, is_skipped, results, runs_its_own, truth_of
from qlora import said
from torch import nn

from cases.linear import BF16, F32
from fastfuse import patch, status


def timm(img_size=SIZE, dtype: torch.dtype = F32, **options) -> nn.Module:
    return shaken(PatchEmbed(img_size, PATCH, embed_dim=D, **options)).to(dtype)


LAYOUTS = [{}, {"output_fmt": "NLC"}, {"bias": False}, {"img_size": None}, {"strict_img_size": False}, {"strict_img_size": False, "dynamic_img_pad": True}]
NORMS = [nn.LayerNorm, functools.partial(nn.LayerNorm, eps=1e-3, elementwise_affine=False), functools.partial(nn.LayerNorm, bias=False), nn.RMSNorm]


@pytest.mark.parametrize(
    "options, size, dtype",
    [
        *((options, (SIZE, SIZE), dtype) for options, dtype in zip(LAYOUTS, [F32, BF16] * 3, strict=True)),
        ({"img_size": 36}, (36, 36), F32),  # the rest of an image is left out
        ({"img_size": None}, (37, 45), BF16),
        ({"strict_img_size": False, "dynamic_img_pad": True}, (40, 48), F32),
    ],
)
def test_layouts(options, size, dtype):
    module = timm(dtype=dtype, **options)
    (entry,) = exchanged(module, {"x": photos(*size, dtype=dtype)}, dtype, verify=True).entries
    assert (entry.host, entry.op, entry.status, entry.code) == ("timm", "patch_embed", "patched", "")


@pytest.mark.parametrize("norm, dtype, autocast", [(norm, dtype, (norm + i) % 2 == 1) for norm in range(len(NORMS)) for i, dtype in enumerate((F32, BF16))])
def test_with_a_norm(norm, dtype, autocast):
    module, given = timm(dtype=dtype, norm_layer=NORMS[norm]), {"x": photos(dtype=dtype)}
    with torch.no_grad():
        for p in module.norm.parameters():
            p.add_(torch.randn_like(p))
    true = truth_of(module, given, dtype, autocast)
    patch(module)
    with torch.autocast("cpu", BF16, enabled=autocast):
        got = results(module, given)
    assert_true(got, true)
    assert status(module).fallbacks == {}


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_under_autocast_are_called(autocast, monkeypatch):
    """They give fp32 on a GPU then, which the op does not."""
    module, calls, own = timm(norm_layer=nn.LayerNorm), [], nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda m, x: calls.append(m) or own(m, x))
    patch(module)
    with torch.autocast("cpu", BF16, enabled=autocast):
        module(photos())
    assert calls == [module.norm] * autocast and status(module).fallbacks == {}


def test_images_that_are_padded_run_its_own_forward():
    runs_its_own(timm(strict_img_size=False, dynamic_img_pad=True), {"x": photos(35, 37)}, "SIZE")


def test_layout_that_changes_after_the_patch():
    module = timm()
    patch(module)
    module.flatten = False
    with pytest.warns(UserWarning, match="LAYOUT"):
        assert module(photos()).shape == (3, D, 4, 4)
    assert said(status(module)) == [("patched", "LAYOUT")]


@pytest.mark.parametrize("options, size, message", [({}, 40, r"Input height \(40\) doesn't match"), ({"strict_img_size": False}, 35, "should be divisible")])
def test_raises_its_own_errors(options, size, message):
    module = timm(**options)
    patch(module)
    with pytest.warns(UserWarning, match="SIZE"), pytest.raises(AssertionError, match=message):
        module(torch.randn(1, 3, size, size))


class WithSize(PatchEmbed):
    """As timm's PatchEmbedWithSize: the same parts, another result."""

    def forward(self, x):
        return super().forward(x), x.shape[-2:]

    forward.__module__ = "timm.layers.patch_embed"


@pytest.mark.parametrize(
    "make, code, words",
    [
        (lambda: WithSize(SIZE, PATCH, embed_dim=D), "UNKNOWN_FORWARD", "another forward"),
        (lambda: timm(flatten=False), "LAYOUT", "its patches stay NCHW"),
        (lambda: timm(output_fmt="NHWC"), "LAYOUT", "its patches stay NHWC"),
        (lambda: timm(strict_img_size=False, output_fmt="NHWC"), "LAYOUT", "its patches stay NHWC"),  # how timm builds it for dynamic_img_size
    ],
)
def test_what_no_call_could_be_fused_of_is_skipped(make, code, words):
    is_skipped(make(), code, words)
