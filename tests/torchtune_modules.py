"""Modules with the attributes and formulas of torchtune 0.6.1's, for tests that run without it; they say that they come from there."""

import copy
import functools
import types

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.weights import quantize, to_nf4


def _of(path: str):
    """Gives a class and its methods the __module__ they have in torchtune."""

    def mark(cls: type) -> type:
        for thing in (cls, *(f for f in vars(cls).values() if isinstance(f, types.FunctionType))):
            thing.__module__ = f"torchtune.{path}"
        return cls

    return mark


class _LinearNF4(torch.autograd.Function):
    """x W^T with W decoded in the forward and again in the backward; no gradient for W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if type(weight).__name__ != "NF4Tensor":
        return F.linear(x, weight, bias)
    y = _LinearNF4.apply(x, weight)
    return y if bias is None else y + bias


unbiased = functools.partial(nn.Linear, bias=False)


class _LowRank(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, rank: int, dropout: float = 0.0, use_bias: bool = False, quantize_base: bool = True):
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
    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, **options):
        super().__init__(in_dim, out_dim, rank, **options)
        self.rank, self.alpha, self.merged = rank, alpha, False

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        if self.disabled:
            return y
        return y + self.alpha / self.rank * self.lora_b(self.lora_a(self.dropout(x)))


@_of("modules.peft.dora")
class DoRALinear(_LowRank):
    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, **options):
        super().__init__(in_dim, out_dim, rank, **options)
        self.scaling = alpha / rank
        self.magnitude = nn.Parameter(torch.rand(out_dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
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
    def __init__(self, in_dim: int, out_dim: int, bias: bool = False, dtype: torch.dtype | None = None):
        super().__init__(in_dim, out_dim, bias=bias, dtype=dtype)
        self.requires_grad_(False)
        self.weight = nn.Parameter(to_nf4(self.weight.detach()), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@_of("modules.tanh_gate")
class TanhGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.tanh()


@_of("modules.rms_norm")
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.rand(dim) + 0.5), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.scale.shape, self.scale.to(wide.dtype), self.eps).to(x.dtype)


@_of("modules.layer_norm")
class Fp32LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        weight, bias = (None if t is None else t.to(wide) for t in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


@_of("modules.feed_forward")
class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False), nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@_of("modules.kv_cache")
class KVCache(nn.Module):
    def __init__(self, batch_size: int, max_seq_len: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch_size, num_kv_heads, max_seq_len, head_dim, dtype=dtype), persistent=False)
        self.register_buffer("cache_pos", torch.arange(max_seq_len), persistent=False)

    def reset(self) -> None:
        self.k_cache.zero_()
        self.v_cache.zero_()
        self.cache_pos -= self.size

    @property
    def size(self) -> int:
        return self.cache_pos[0].item()

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        places = self.cache_pos[: k.shape[2]]
        self.k_cache[:, :, places] = k
        self.v_cache[:, :, places] = v
        self.cache_pos.add_(k.shape[2])
        return self.k_cache, self.v_cache


def attention_call():
    """A function of each attention's own, as torchtune makes it."""

    def _attention_call(q, k, v, mask, dropout_p, is_causal):
        mask = None if mask is None else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)

    _attention_call.__module__ = "torchtune.modules.attention_utils"
    return _attention_call


@_of("modules.attention")
class MultiHeadAttention(nn.Module):
    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int, *, q_norm=None, k_norm=None, is_causal: bool = True, attn_dropout: float = 0.0, linear=unbiased
    ):  # fmt: skip
        super().__init__()
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, embed_dim // num_heads
        self.attn_dropout, self.is_causal, self.kv_cache, self.cache_enabled, self.pos_embeddings = attn_dropout, is_causal, None, False, None
        self.q_proj, self.output_proj = linear(embed_dim, embed_dim), linear(embed_dim, embed_dim)
        self.k_proj, self.v_proj = (linear(embed_dim, num_kv_heads * self.head_dim) for _ in range(2))
        self.q_norm, self.k_norm = q_norm, k_norm
        self._attention_call = attention_call()

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        self.kv_cache, self.cache_enabled = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype), True

    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        q = q if self.q_norm is None else self.q_norm(q)
        if y is None:
            if self.kv_cache is None or not self.cache_enabled:
                raise ValueError("neither y nor a cache")
            k, v = self.kv_cache.k_cache, self.kv_cache.v_cache
        else:
            k, v = (p(y).view(b, y.shape[1], -1, self.head_dim).transpose(1, 2) for p in (self.k_proj, self.v_proj))
            k = k if self.k_norm is None else self.k_norm(k)
            if self.kv_cache is not None and self.cache_enabled:
                k, v = self.kv_cache.update(k, v)
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
        causal = self.kv_cache is None and mask is None and self.is_causal
        out = self._attention_call(q, k, v, mask=mask, dropout_p=self.attn_dropout if self.training else 0.0, is_causal=causal)
        return self.output_proj(out.transpose(1, 2).reshape(b, s, -1))


@_of("modules.transformer")
class TransformerSelfAttentionLayer(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, *, sa_norm: nn.Module, mlp_norm: nn.Module):
        super().__init__()
        self.attn, self.mlp, self.sa_norm, self.mlp_norm = attn, mlp, sa_norm, mlp_norm

    def forward(self, x: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None, **kwargs) -> Tensor:
        n = self.sa_norm(x)
        h = x + self.attn(n, n, mask=mask, input_pos=input_pos)
        return h + self.mlp(self.mlp_norm(h))


@_of("modules.transformer")
class TransformerCrossAttentionLayer(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, *, ca_norm: nn.Module, mlp_norm: nn.Module, ca_scale: nn.Module, mlp_scale: nn.Module):
        super().__init__()
        self.attn, self.mlp, self.ca_norm, self.mlp_norm, self.ca_scale, self.mlp_scale = attn, mlp, ca_norm, mlp_norm, ca_scale, mlp_scale

    def caches_are_enabled(self) -> bool:
        return self.attn.cache_enabled

    def forward(self, x: Tensor, *, encoder_input: Tensor | None = None, encoder_mask: Tensor | None = None, **kwargs) -> Tensor:
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


@_of("modules.vision_transformer")
class CLSEmbedding(nn.Module):
    def __init__(self, dim: int, append_cls_token: bool = False):
        super().__init__()
        self.weight, self.append_cls_token = nn.Parameter(torch.randn(dim)), append_cls_token

    def forward(self, x: Tensor) -> Tensor:
        token = self.weight.broadcast_to(*x.shape[:2], 1, x.shape[3])
        return torch.cat([x, token] if self.append_cls_token else [token, x], 2)


@_of("modules.vision_transformer")
class CLSProjection(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, out) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, :, 0] @ self.weight)[:, :, :, None]


@_of("models.clip._position_embeddings")
class TokenPositionalEmbedding(nn.Module):
    def __init__(self, dim: int, tile_size: int, patch_size: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn((tile_size // patch_size) ** 2 + 1, dim))

    def forward(self, x: Tensor, *args) -> Tensor:
        return x + self.positional_embedding


def _place(x: Tensor, table: Tensor, gate: Tensor, aspect_ratio: Tensor) -> Tensor:
    """Adds each image's entries to it, in place, one image after another."""
    for image, (h, w) in enumerate(aspect_ratio):
        n = int(h * w)
        x[image, :n] += table[:h, :w].reshape(n, *table.shape[2:]) * gate.tanh()
    return x


@_of("models.clip._position_embeddings")
class TiledTokenPositionalEmbedding(nn.Module):
    def __init__(self, max_num_tiles: int, dim: int, tile_size: int, patch_size: int):
        super().__init__()
        n = (tile_size // patch_size) ** 2 + 1
        self.local_token_positional_embedding = nn.Parameter(torch.randn(n, dim))
        self.global_token_positional_embedding = nn.Parameter(torch.randn(max_num_tiles, max_num_tiles, n, dim))
        self.gate = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor, aspect_ratio: Tensor) -> Tensor:
        x = x + self.local_token_positional_embedding * (1 - self.gate.tanh())
        return _place(x, self.global_token_positional_embedding, self.gate, aspect_ratio)


@_of("models.clip._position_embeddings")
class TilePositionalEmbedding(nn.Module):
    def __init__(self, max_num_tiles: int, dim: int):
        super().__init__()
        self.embedding, self.gate = nn.Parameter(torch.randn(max_num_tiles, max_num_tiles, 1, dim)), nn.Parameter(torch.tensor([-0.5]))

    def forward(self, x: Tensor, aspect_ratio: Tensor) -> Tensor:
        return _place(x, self.embedding, self.gate, aspect_ratio)


@_of("modules.vision_transformer")
class VisionTransformer(nn.Module):
    def __init__(
        self, patch_size: int, tile_size: int, num_layers: int, embed_dim: int, layer: nn.Module, token_pos_embedding: nn.Module,
        pre_tile_pos_embed: nn.Module | None = None, post_tile_pos_embed: nn.Module | None = None, cls_projection: nn.Module | None = None,
        out_indices: list[int] | None = None, in_channels: int = 3, append_cls_token: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.patches_per_tile, self.out_indices = (tile_size // patch_size) ** 2, out_indices or []
        self.pre_tile_pos_embed, self.post_tile_pos_embed, self.token_pos_embedding = pre_tile_pos_embed, post_tile_pos_embed, token_pos_embedding
        self.cls_projection, self.layers = cls_projection, nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])
        self.conv = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size, bias=False)
        self.ln_post, self.ln_pre = Fp32LayerNorm(embed_dim), Fp32LayerNorm(embed_dim)
        self.cls_token_embedding = CLSEmbedding(embed_dim, append_cls_token)

    def forward(self, images: Tensor, aspect_ratio: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
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


def shaken(module: nn.Module) -> nn.Module:
    """Norms other than one and zero: nothing is the identity by accident."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight.copy_(torch.rand_like(m.weight) + 0.5)
                m.bias.copy_(torch.randn_like(m.bias) / 2)
    return module


def adapted(kind: str, in_dim: int = 128, out_dim: int = 256, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A LoRALinear, DoRALinear ("lora", "dora") or FrozenNF4Linear ("frozen") whose parts are all in dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if kind == "frozen":
            return FrozenNF4Linear(in_dim, out_dim, bias=options.get("use_bias", False))
        return {"lora": LoRALinear, "dora": DoRALinear}[kind](in_dim, out_dim, rank=8, alpha=16, **options)
    finally:
        torch.set_default_dtype(before)


def cross_layer(dim: int = 32, heads: int = 4, kv_heads: int = 2, linear=unbiased, **options) -> nn.Module:
    norms = {"q_norm": RMSNorm(dim // heads), "k_norm": RMSNorm(dim // heads)}
    attn = MultiHeadAttention(dim, heads, kv_heads, is_causal=options.pop("is_causal", False), linear=linear, **norms, **options)
    rest = {"ca_norm": RMSNorm(dim), "mlp_norm": RMSNorm(dim), "ca_scale": TanhGate(), "mlp_scale": TanhGate()}
    return TransformerCrossAttentionLayer(attn, FeedForward(dim, 2 * dim), **rest)


def vision(tiles: int = 4, dim: int = 16, patch: int = 4, tile_size: int = 12, layers: int = 3, cls_out: int | None = None, **options) -> nn.Module:
    attn = MultiHeadAttention(dim, 2, 2, is_causal=False)
    layer = TransformerSelfAttentionLayer(attn, FeedForward(dim, 2 * dim), sa_norm=Fp32LayerNorm(dim), mlp_norm=Fp32LayerNorm(dim))
    token = TokenPositionalEmbedding(dim, tile_size, patch) if tiles == 1 else TiledTokenPositionalEmbedding(tiles, dim, tile_size, patch)
    pre, post = (None if tiles == 1 else TilePositionalEmbedding(tiles, dim) for _ in range(2))
    projection = None if cls_out is None else CLSProjection(dim, cls_out)
    return shaken(VisionTransformer(patch, tile_size, layers, dim, layer, token, pre, post, projection, **options))
