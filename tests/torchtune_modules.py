"""Modules with the attributes and formulas of torchtune 0.6.1's, for tests that run without it; they say that they come from there."""

import copy
import functools
import types

import torch
from torch import nn
from torch.nn import functional as F

from cases.weights import quantize, to_nf4
from fastfuse import modules


def _of(path):
    """Gives a class and its methods the __module__ they have in torchtune."""

    def mark(cls):
        for thing in (cls, *(f for f in vars(cls).values() if isinstance(f, types.FunctionType))):
            thing.__module__ = f"torchtune.{path}"
        return cls

    return mark


class _LinearNF4(torch.autograd.Function):
    """x W^T with W decoded in the forward and again in the backward; no gradient for W."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype), None


def linear(x, weight, bias):
    if type(weight).__name__ != "NF4Tensor":
        return F.linear(x, weight, bias)
    y = _LinearNF4.apply(x, weight)
    return y if bias is None else y + bias


unbiased = functools.partial(nn.Linear, bias=False)
POSITIONS, VISION = "models.clip._position_embeddings", "modules.vision_transformer"
# What fastfuse computes as torchtune does, one PyTorch operator after another.
TanhGate, Fp32LayerNorm, FeedForward, TransformerSelfAttentionLayer, CLSProjection, TokenPositionalEmbedding = (
    type(cls.__name__, (cls,), {"__module__": f"torchtune.{path}"})
    for cls, path in (
        (modules.TanhGate, "modules.tanh_gate"),
        (modules.Fp32LayerNorm, "modules.layer_norm"),
        (modules.FeedForward, "modules.feed_forward"),
        (modules.TransformerSelfAttentionLayer, "modules.transformer"),
        (modules.CLSProjection, VISION),
        (modules.TokenPositionalEmbedding, POSITIONS),
    )
)


class _LowRank(nn.Module):
    def __init__(self, in_dim, out_dim, rank, dropout=0.0, use_bias=False, quantize_base=True):
        super().__init__()
        base = nn.Linear(in_dim, out_dim, bias=use_bias)
        self.in_dim, self.out_dim, self.use_bias, self._quantize_base, self.disabled = in_dim, out_dim, use_bias, quantize_base, False
        self.weight = nn.Parameter(quantize(base.weight.detach(), "torchao"), requires_grad=False) if quantize_base else base.weight
        self.register_parameter("bias", base.bias)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)


@_of("modules.peft.lora")
class LoRALinear(_LowRank):
    def __init__(self, in_dim, out_dim, rank, alpha, **options):
        super().__init__(in_dim, out_dim, rank, **options)
        self.rank, self.alpha, self.merged = rank, alpha, False

    def forward(self, x):
        y = linear(x, self.weight, self.bias)
        if self.disabled:
            return y
        return y + self.alpha / self.rank * self.lora_b(self.lora_a(self.dropout(x)))


@_of("modules.peft.dora")
class DoRALinear(_LowRank):
    def __init__(self, in_dim, out_dim, rank, alpha, **options):
        super().__init__(in_dim, out_dim, rank, **options)
        self.scaling = alpha / rank
        self.magnitude = nn.Parameter(torch.rand(out_dim) + 0.5)

    def forward(self, x):
        y = linear(x, self.weight, self.bias)
        if self.disabled:
            return y
        low = self.lora_b(self.lora_a(self.dropout(x)))
        eye = torch.eye(self.in_dim, dtype=x.dtype, device=x.device)
        merged = self.weight.to(x.dtype) + self.scaling * self.lora_b(self.lora_a(eye)).T.detach()
        m = self.magnitude / torch.linalg.norm(merged, dim=1).to(x.dtype).detach()
        return (m - 1) * y + m * low * self.scaling + y


@_of("modules.low_precision.nf4_linear")
class FrozenNF4Linear(nn.Linear):
    def __init__(self, in_dim, out_dim, bias=False, dtype=None):
        super().__init__(in_dim, out_dim, bias=bias, dtype=dtype)
        self.requires_grad_(False)
        self.weight = nn.Parameter(to_nf4(self.weight.detach()), requires_grad=False)

    def forward(self, input):
        return linear(input, self.weight, self.bias)


@_of("modules.rms_norm")
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.rand(dim) + 0.5), eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.scale.shape, self.scale.to(wide.dtype), self.eps).to(x.dtype)


@_of("modules.kv_cache")
class KVCache(nn.Module):
    def __init__(self, batch_size, max_seq_len, num_kv_heads, head_dim, dtype):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch_size, num_kv_heads, max_seq_len, head_dim, dtype=dtype), persistent=False)
        self.register_buffer("cache_pos", torch.arange(max_seq_len), persistent=False)

    def reset(self):
        self.k_cache.zero_()
        self.v_cache.zero_()
        self.cache_pos -= self.size

    @property
    def size(self):
        return self.cache_pos[0].item()

    def update(self, k, v):
        places = self.cache_pos[: k.shape[2]]
        self.k_cache[:, :, places] = k
        self.v_cache[:, :, places] = v
        self.cache_pos.add_(k.shape[2])
        return self.k_cache, self.v_cache


def attention_call():
    """A function of each attention's own, as torchtune makes it."""

    def _attention_call(q, k, v, mask, dropout_p, is_causal):
        mask, (k, v) = None if mask is None else mask[:, None], (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)

    _attention_call.__module__ = "torchtune.modules.attention_utils"
    return _attention_call


@_of("modules.attention")
class MultiHeadAttention(modules.MultiHeadAttention):
    def __init__(self, embed_dim, num_heads, num_kv_heads, *, linear=unbiased, **options):
        head_dim = embed_dim // num_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        dims = {"q_proj": embed_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim, "output_proj": embed_dim}
        super().__init__(**sizes, **{name: linear(embed_dim, dim) for name, dim in dims.items()}, **options)
        self._attention_call = attention_call()

    def setup_cache(self, batch_size, dtype, max_seq_len):
        self.kv_cache, self.cache_enabled = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype), True


@_of("modules.transformer")
class TransformerCrossAttentionLayer(nn.Module):
    def __init__(self, attn, mlp, *, ca_norm, mlp_norm, ca_scale, mlp_scale):
        super().__init__()
        self.attn, self.mlp, self.ca_norm, self.mlp_norm, self.ca_scale, self.mlp_scale = attn, mlp, ca_norm, mlp_norm, ca_scale, mlp_scale

    def caches_are_enabled(self):
        return self.attn.cache_enabled

    def forward(self, x, *, encoder_input=None, encoder_mask=None, **kwargs):
        if encoder_input is None and (not self.caches_are_enabled() or self.attn.kv_cache.size == 0):
            return x
        skip = None
        if encoder_mask is not None:
            hidden = ~encoder_mask if encoder_mask.dtype == torch.bool else torch.isneginf(encoder_mask)
            skip = hidden.all(-1, keepdim=True)
            encoder_mask = encoder_mask.masked_fill(skip, True)
        attended = self.attn(self.ca_norm(x), encoder_input, mask=encoder_mask)
        attended = attended if skip is None else attended.masked_fill(skip, 0)
        h = self.ca_scale(attended) + x
        mlp = self.mlp(self.mlp_norm(h))
        mlp = mlp if skip is None else mlp.masked_fill(skip, 0)
        return h + self.mlp_scale(mlp)


@_of(VISION)
class CLSEmbedding(nn.Module):
    def __init__(self, dim, append_cls_token=False):
        super().__init__()
        self.weight, self.append_cls_token = nn.Parameter(torch.randn(dim)), append_cls_token

    def forward(self, x):
        token = self.weight.expand(*x.shape[:2], 1, -1)
        return torch.cat([x, token] if self.append_cls_token else [token, x], 2)


def _place(x, table, gate, aspect_ratio):
    """Adds each image's entries to it, in place, one image after another."""
    for image, (h, w) in enumerate(aspect_ratio):
        n = int(h * w)
        x[image, :n] += table[:h, :w].reshape(n, *table.shape[2:]) * gate.tanh()
    return x


@_of(POSITIONS)
class TiledTokenPositionalEmbedding(nn.Module):
    def __init__(self, max_num_tiles, dim, tile_size, patch_size):
        super().__init__()
        n = (tile_size // patch_size) ** 2 + 1
        self.local_token_positional_embedding = nn.Parameter(torch.randn(n, dim))
        self.global_token_positional_embedding = nn.Parameter(torch.randn(max_num_tiles, max_num_tiles, n, dim))
        self.gate = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x, aspect_ratio):
        x = x + self.local_token_positional_embedding * (1 - self.gate.tanh())
        return _place(x, self.global_token_positional_embedding, self.gate, aspect_ratio)


@_of(POSITIONS)
class TilePositionalEmbedding(nn.Module):
    def __init__(self, max_num_tiles, dim):
        super().__init__()
        self.embedding, self.gate = nn.Parameter(torch.randn(max_num_tiles, max_num_tiles, 1, dim)), nn.Parameter(torch.tensor([-0.5]))

    def forward(self, x, aspect_ratio):
        return _place(x, self.embedding, self.gate, aspect_ratio)


@_of(VISION)
class VisionTransformer(nn.Module):
    def __init__(
        self, patch_size, tile_size, num_layers, embed_dim, layer, token_pos_embedding,
        pre_tile_pos_embed=None, post_tile_pos_embed=None, cls_projection=None,
        out_indices=None, in_channels=3, append_cls_token=False,
    ):  # fmt: skip
        super().__init__()
        self.patches_per_tile, self.out_indices = (tile_size // patch_size) ** 2, out_indices or []
        self.pre_tile_pos_embed, self.post_tile_pos_embed, self.token_pos_embedding = pre_tile_pos_embed, post_tile_pos_embed, token_pos_embedding
        self.cls_projection, self.layers = cls_projection, nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])
        self.conv = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size, bias=False)
        self.ln_post, self.ln_pre = Fp32LayerNorm(embed_dim), Fp32LayerNorm(embed_dim)
        self.cls_token_embedding = CLSEmbedding(embed_dim, append_cls_token)

    def forward(self, images, aspect_ratio=None):
        b, n_imgs, n_tiles = images.shape[:3]
        if aspect_ratio is None:
            aspect_ratio = torch.ones(b * n_imgs, 2, dtype=torch.int)
            if n_tiles > 1:
                raise ValueError("several tiles and no aspect_ratio")
        aspect_ratio = aspect_ratio.reshape(b * n_imgs, 2)
        x = self.conv(images.reshape(-1, *images.shape[3:]))
        x = x.reshape(b * n_imgs, n_tiles, -1, self.patches_per_tile).permute(0, 1, 3, 2)
        if self.pre_tile_pos_embed is not None:
            x = self.pre_tile_pos_embed(x, aspect_ratio)
        x = self.ln_pre(self.token_pos_embedding(self.cls_token_embedding(x), aspect_ratio))
        n, dim, hidden = x.shape[2], x.shape[3], []
        x = x.reshape(b * n_imgs, n_tiles * n, dim)
        for i, layer in enumerate(self.layers):
            if i in self.out_indices:
                hidden.append(x.reshape(b, n_imgs, n_tiles, n, dim))
            x = layer(x)
        x = self.ln_post(x)
        if self.post_tile_pos_embed is not None:
            x = self.post_tile_pos_embed(x.reshape(b * n_imgs, n_tiles, n, dim), aspect_ratio)
        x = x.reshape(b, n_imgs, n_tiles, n, dim)
        return (x if self.cls_projection is None else self.cls_projection(x)), hidden


def shaken(module):
    """Gates open, norms other than one and zero: nothing is the identity by accident."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight.copy_(torch.rand_like(m.weight) + 0.5)
                m.bias.copy_(torch.randn_like(m.bias) / 2)
            elif isinstance(m, TanhGate):
                m.scale.fill_(0.4)
    return module


def adapted(kind, in_dim=128, out_dim=256, dtype=torch.float32, **options):
    """A LoRALinear, DoRALinear ("lora", "dora") or FrozenNF4Linear ("frozen") whose parts are all in dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if kind == "frozen":
            return FrozenNF4Linear(in_dim, out_dim, bias=options.get("use_bias", False))
        return {"lora": LoRALinear, "dora": DoRALinear}[kind](in_dim, out_dim, rank=8, alpha=16, **options)
    finally:
        torch.set_default_dtype(before)


def feed_forward(dim):
    return FeedForward(gate_proj=unbiased(dim, 2 * dim), down_proj=unbiased(2 * dim, dim), up_proj=unbiased(dim, 2 * dim))


def cross_layer(dim=32, heads=4, kv_heads=2, linear=unbiased, **options):
    norms = {"q_norm": RMSNorm(dim // heads), "k_norm": RMSNorm(dim // heads)}
    attn = MultiHeadAttention(dim, heads, kv_heads, is_causal=options.pop("is_causal", False), linear=linear, **norms, **options)
    rest = {"ca_norm": RMSNorm(dim), "mlp_norm": RMSNorm(dim), "ca_scale": TanhGate(), "mlp_scale": TanhGate()}
    return shaken(TransformerCrossAttentionLayer(attn, feed_forward(dim), **rest))


def vision(tiles=4, dim=16, patch=4, tile_size=12, layers=3, cls_out=None, **options):
    attn = MultiHeadAttention(dim, 2, 2, is_causal=False)
    layer = TransformerSelfAttentionLayer(attn, feed_forward(dim), sa_norm=Fp32LayerNorm(dim), mlp_norm=Fp32LayerNorm(dim))
    token = TokenPositionalEmbedding(dim, tile_size, patch) if tiles == 1 else TiledTokenPositionalEmbedding(tiles, dim, tile_size, patch)
    pre, post = (None if tiles == 1 else TilePositionalEmbedding(tiles, dim) for _ in range(2))
    projection = None if cls_out is None else CLSProjection(dim, cls_out)
    return shaken(VisionTransformer(patch, tile_size, layers, dim, layer, token, pre, post, projection, **options))
