"""Front ends of real ViTs: transformers' CLIP, SigLIP, DINOv2 and ViT families, timm's PatchEmbed, and photos for them."""

from types import SimpleNamespace

import pytest
import skimage.data
import torch
from torch import nn
from torch.nn import functional as F
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
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL)),
    "vit": lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False),
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


def photos(height=SIZE, width=SIZE, dtype=torch.float32):
    """Three of them, as an image processor scales them, rounded to what every dtype here holds."""
    made = []
    for photo in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()):
        t = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        made.append((F.interpolate(t, (height, width), mode="bilinear", antialias=True) - 0.45) / 0.27)
    return torch.cat(made).bfloat16().to(dtype)


def shaken(model):
    """No CLS token, position or register of zero by initialisation."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name and "lambda" not in name:
                p.copy_(torch.randn_like(p) * (0.5 if p.dim() < 2 or "token" in name or "position" in name else p[0].numel() ** -0.5))
    return model.eval()


def made(kind):
    return shaken(MODELS[kind]())


def front(family, **more):
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
