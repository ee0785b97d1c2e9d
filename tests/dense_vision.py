"""Llama 3.2 Vision written out over a state dict, in the dtype of its tensors: the arithmetic of reference.py, the front of cases/patch_embed.py.

It shares no code with fastfuse, so that agreement with it in float64 says something about both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from numerics import Orders, assert_no_worse
from reference import rms, rotate, softmax_attention, wide
from torch import Tensor
from torch.nn import functional as F

from cases.patch_embed import loop, place_ids, place_images


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    v = wide(x) - wide(x).mean(-1, keepdim=True)
    v = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)
    return (v * (1 if weight is None else weight) + (0 if bias is None else bias)).to(x.dtype)


def rope_frequencies(dim: int, base: float, scale: float = 8, low: float = 1, high: float = 4, old: int = 8192) -> list[float]:
    frequencies = []
    for k in range(dim // 2):
        f = base ** (-2 * k / dim)
        length = 2 * math.pi / f
        if length > old / low:
            f = f / scale
        elif length >= old / high:
            m = (old / length - low) / (high - low)
            f = (1 - m) * f / scale + m * f
        frequencies.append(f)
    return frequencies


@dataclass
class Dense:
    """The model over params, a state dict; the other fields are what the state dict does not tell."""

    params: dict[str, Tensor]
    clip_heads: int = 4
    heads: int = 4
    kv_heads: int = 2
    activation: Callable[[Tensor], Tensor] = F.gelu
    out_indices: tuple[int, ...] = ()
    append_cls: bool = False
    causal_vision: bool = False
    pad_to: int = 1
    states_after: bool = False
    supported: list | None = None  # aspect ratios with rows in the tile tables; None: the tables are grids
    scaling: float = 0.0  # alpha / rank
    clip_eps: float = 1e-5
    eps: float = 1e-5
    cross_eps: float = 1e-6
    uniform_rows: bool = False
    rope: dict = field(default_factory=lambda: {"base": 500_000.0})

    def count(self, prefix):
        return 1 + max(int(k.removeprefix(prefix + ".").split(".")[0]) for k in self.params if k.startswith(prefix + "."))

    def linear(self, name, x):
        w, bias = self.params[name + ".weight"], self.params.get(name + ".bias")
        y = F.linear(x, w, bias)
        if name + ".lora_a.weight" not in self.params:
            return y
        a, b = self.params[name + ".lora_a.weight"], self.params[name + ".lora_b.weight"]
        delta = self.scaling * ((x @ a.T) @ b.T)
        if name + ".magnitude" not in self.params:
            return y + delta
        norm = (w + self.scaling * b @ a).norm(dim=1).detach()
        return (y + delta) * (self.params[name + ".magnitude"] / norm)

    def norm(self, name, x, eps):
        if name + ".scale" in self.params:
            return rms(x, self.params[name + ".scale"], eps)
        return layer_norm(x, self.params[name + ".weight"], self.params[name + ".bias"], eps)

    def gated(self, name, x):
        return x * torch.tanh(self.params[name + ".scale"]) if name + ".scale" in self.params else x

    def attention(self, name, x, y, heads, kv_heads, mask=None, thetas=None):
        """x: [b, s, d] attends to y: [b, s_k, d]; with thetas queries and keys turn, and see what is before them alone."""
        q, k, v = (
            self.linear(f"{name}.{part}", source).unflatten(-1, (n, -1))
            for part, source, n in (("q_proj", x, heads), ("k_proj", y, kv_heads), ("v_proj", y, kv_heads))
        )
        if thetas is not None:
            q, k = (rotate(t, torch.arange(x.shape[1])[None], thetas) for t in (q, k))
        if f"{name}.q_norm.scale" in self.params:
            q, k = self.norm(f"{name}.q_norm", q, self.eps), self.norm(f"{name}.k_norm", k, self.eps)
        return self.linear(f"{name}.output_proj", softmax_attention(q, k, v, mask, causal=thetas is not None).flatten(2))

    def vision_layer(self, name, x, mask):
        n = self.norm(f"{name}.sa_norm", x, self.clip_eps)
        h = x + self.gated(f"{name}.sa_scale", self.attention(f"{name}.attn", n, n, self.clip_heads, self.clip_heads, mask))
        mlp = self.linear(f"{name}.mlp.w2", self.activation(self.linear(f"{name}.mlp.w1", self.norm(f"{name}.mlp_norm", h, self.clip_eps))))
        return h + self.gated(f"{name}.mlp_scale", mlp)

    def encode(self, prefix, images, ratio):
        """The vision transformer: (x, hidden states without padding tokens, a mask for each image or None)."""
        get = lambda name: self.params.get(prefix + name)  # noqa: E731
        b, i, t = images.shape[:3]
        ratios = torch.ones(b * i, 2, dtype=torch.int64) if ratio is None else ratio.flatten(0, 1)
        places, place = ratios, place_images
        if self.supported is not None:  # the row of padding images first
            places, place = torch.tensor([[(0, 0), *self.supported].index((h, w)) for h, w in ratios.tolist()]), place_ids
        gate, table = get("token_pos_embedding.gate"), get("token_pos_embedding.global_token_positional_embedding")
        local = get("token_pos_embedding." + ("" if table is None else "local_token_") + "positional_embedding")
        pre, post = ((get(f"{at}_tile_pos_embed.embedding"), get(f"{at}_tile_pos_embed.gate")) for at in ("pre", "post"))
        norm = get("ln_pre.weight"), get("ln_pre.bias"), 1e-5
        given = images.flatten(0, 1), get("conv.weight"), get("cls_token_embedding.weight"), places, local, table, gate, *pre
        x = loop(*given, norm=norm, append_cls=self.append_cls, pad_tokens_to=self.pad_to)
        n, per_tile = self.tokens(images, prefix), x.shape[2]
        mask, states = self.vision_mask(ratios.prod(1).tolist(), t, n, per_tile), [x.flatten(1, 2)]
        for k in range(self.count(prefix + "layers")):
            states.append(self.vision_layer(f"{prefix}layers.{k}", states[-1], mask))
        x = layer_norm(states[-1], get("ln_post.weight"), get("ln_post.bias"), 1e-5).unflatten(1, (t, per_tile))
        if post[0] is not None:
            x = place(x.clone(), *post, places)
        kept = sorted(set(self.out_indices))
        if self.states_after:
            kept = [min(k + 1, len(states) - 1) for k in kept]
        hidden = [states[k].unflatten(1, (t, per_tile))[:, :, :n].unflatten(0, (b, i)) for k in kept]
        return x.unflatten(0, (b, i)), hidden, mask

    def vision_mask(self, tiles, t, n, per_tile):
        """bool [images, tokens, tokens]: token a may see token b. tiles: of each image."""
        tokens = range(t * per_tile)
        if self.causal_vision:
            return torch.ones(1, len(tokens), len(tokens), dtype=torch.bool).tril()
        if self.pad_to == 1:
            return None
        real = torch.tensor([[token // per_tile < max(count, 1) and token % per_tile < n for token in tokens] for count in tiles])
        return real[:, :, None] | real[:, None, :]

    def clip(self, images, ratio, prefix=""):
        x, hidden, _ = self.encode(prefix, images, ratio)
        x = x[:, :, :, : self.tokens(images, prefix)]
        if prefix + "cls_projection.weight" in self.params:
            x = x[:, :, :, :1] @ self.params[prefix + "cls_projection.weight"]
        return x, hidden

    def tokens(self, images, prefix):
        return (images.shape[-1] // self.params[prefix + "conv.weight"].shape[-1]) ** 2 + 1

    def projection(self, prefix, x, hidden, mask, n):
        """x: [b, i, t, tokens of a tile with padding, d]  ->  [b, i * t * n, d_out]."""
        shape, x = x.shape, x.flatten(0, 1).flatten(1, 2)
        for k in range(self.count(prefix + "layers")):
            x = self.vision_layer(f"{prefix}layers.{k}", x, mask)
        x = x.reshape(shape)[:, :, :, :n]
        x = torch.cat([x, *(h[..., j : j + 1] for j in range(shape[-1]) for h in hidden)], -1)
        return self.linear(prefix + "output", x).flatten(1, 3)

    def encoder(self, images, ratio, prefix=""):
        x, hidden, mask = self.encode(prefix + "clip.", images, ratio)
        return self.projection(prefix + "projection.", x, hidden, mask, self.tokens(images, prefix + "clip."))

    def mlp(self, name, x):
        return self.linear(f"{name}.w2", F.silu(self.linear(f"{name}.w1", x)) * self.linear(f"{name}.w3", x))

    def cross(self, name, x, encoded, mask):
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty if self.uniform_rows else mask
        n = self.norm(f"{name}.ca_norm", x, self.cross_eps)
        h = x + self.gated(f"{name}.ca_scale", self.attention(f"{name}.attn", n, encoded, self.heads, self.kv_heads, mask))
        if not self.uniform_rows:
            h = torch.where(empty, x, h)
        mlp = self.gated(f"{name}.mlp_scale", self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", h, self.cross_eps)))
        return torch.where(empty, h, h + mlp)

    def decoder(self, tokens, encoded, encoder_mask, prefix=""):
        """fp32 logits [b, s, vocab], fp64 where the weights are."""
        table = torch.cat([self.params[prefix + "tok_embeddings.weight"], self.params[prefix + "tok_embeddings.fusion_embedding.weight"]])
        x = table[tokens]
        for k in range(self.count(prefix + "layers")):
            name = f"{prefix}layers.{k}"
            if f"{name}.fusion_layer.ca_norm.scale" in self.params and encoded is not None:
                x = self.cross(f"{name}.fusion_layer", x, encoded, encoder_mask)
            n, head_dim = self.norm(f"{name}.sa_norm", x, self.eps), self.params[f"{name}.attn.q_proj.weight"].shape[0] // self.heads
            x = x + self.attention(f"{name}.attn", n, n, self.heads, self.kv_heads, thetas=rope_frequencies(head_dim, **self.rope))
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x, self.eps))
        return wide(self.linear(prefix + "output", self.norm(prefix + "norm", x, self.eps)))

    def logits(self, tokens, images, ratio, encoder_mask):
        return self.decoder(tokens, self.encoder(images, ratio, "encoder."), encoder_mask, "decoder.")


def leaves(params: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in another dtype that require a gradient."""
    return {name: p.detach().to(dtype, copy=True).requires_grad_() for name, p in params.items()}


def parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by their state-dict keys, NF4 weights as the numbers they stand for."""
    nf4 = {name: p.get_original_weight() for name, p in module.named_parameters() if hasattr(p, "get_original_weight")}
    return dict(module.state_dict(keep_vars=True)) | nf4


def randomize(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Move every parameter away from where construction leaves it: gates open, norms off one, copied layers apart, DoRA's magnitudes off the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if not hasattr(p, "get_original_weight"):  # NF4 weights stay
                p += (0.5 if p.numel() == 1 else 0.1) * torch.randn(p.shape, generator=generator).to(p.dtype)
        for m in module.modules():
            if hasattr(m, "initialize_dora_magnitude"):
                m.initialize_dora_magnitude()
                m.magnitude *= 1 + 0.2 * torch.rand(m.magnitude.shape, generator=generator)
    return module


@torch.no_grad()
def assert_formula(got, module: torch.nn.Module, method: str, *args, **known) -> None:
    """A float32 tensor, or tensors, as near to the formula in float64 as the formula in float32 is; known: Dense's fields."""
    exact, eager = (getattr(Dense(leaves(parameters(module), dtype), **known), method) for dtype in (torch.float64, torch.float32))
    want = _flat(exact(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)))
    orders = Orders(lambda: _flat(eager(*args)))
    for i, (a, c) in enumerate(zip(_flat(got), want, strict=True)):
        assert_no_worse(a, (found[i] for found in orders), c)


def _flat(results) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [results[0], *results[1]]
