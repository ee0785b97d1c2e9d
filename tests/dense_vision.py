"""Llama 3.2 Vision written out over a state dict, in the dtype of its tensors: loops over images, tiles, heads and features.

It shares no code with fastfuse, so that agreement with it in float64 says something about both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from numerics import Orders, assert_no_worse
from torch import Tensor
from torch.nn import functional as F


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def place_tiles(x: Tensor, table: Tensor, gate: Tensor, ratios: list) -> Tensor:
    """Add tanh(gate) * table[r, c] to tile r * w + c of each image of h x w tiles; x: [images, tiles, n, d]."""
    images = []
    for image, (h, w) in zip(x, ratios, strict=True):
        tiles = list(image)
        for r in range(h):
            for c in range(w):
                tiles[r * w + c] = tiles[r * w + c] + table[r, c] * torch.tanh(gate)
        images.append(torch.stack(tiles))
    return torch.stack(images)


def place_rows(x: Tensor, table: Tensor, gate: Tensor, ratios: list, supported: list) -> Tensor:
    """Add tanh(gate) * table[row, tile] to every tile, row 0 for (0, 0), else 1 + the ratio's place in `supported`."""
    rows = [0 if (h, w) == (0, 0) else 1 + supported.index((h, w)) for h, w in ratios]
    return torch.stack([torch.stack([tile + table[row, t] * torch.tanh(gate) for t, tile in enumerate(image)]) for row, image in zip(rows, x, strict=True)])


def patches(images: Tensor, weight: Tensor) -> Tensor:
    """[tiles, c, side, side] -> [tiles, patches, d], patch by patch in rows; what a whole patch does not fit into is left out."""
    p = weight.shape[-1]
    grid = images.shape[-1] // p
    cut = [images[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p].flatten(1) for r in range(grid) for c in range(grid)]
    return torch.stack(cut, 1) @ weight.flatten(1).T


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    v = x.to(wide(x.dtype))
    v = v - v.mean(-1, keepdim=True)
    v = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)
    return (v * weight + bias).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    v = x.to(wide(x.dtype))
    return (v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * scale


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q: [heads, s, d], k, v: [kv heads, s_k, d], mask: bool [s, s_k]  ->  [s, heads * d]; rows that see nothing get 0."""
    group, out = q.shape[0] // k.shape[0], []
    for h in range(q.shape[0]):
        scores = (q[h] @ k[h // group].T).to(wide(q.dtype)) / math.sqrt(q.shape[-1])
        if mask is None:
            p = scores.softmax(-1)
        else:
            empty = ~mask.any(-1, keepdim=True)
            p = scores.masked_fill(~mask & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0)
        out.append(p.to(q.dtype) @ v[h // group])
    return torch.cat(out, -1)


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


def rotate(x: Tensor, frequencies: list[float]) -> Tensor:
    """x: [heads, s, d]; the pair (2k, 2k + 1) of token s turns by s * frequencies[k]."""
    v = x.to(wide(x.dtype))
    angle = torch.outer(torch.arange(x.shape[1], dtype=v.dtype), torch.tensor(frequencies, dtype=v.dtype))
    turned = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


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
    turn_vision: Callable[[Tensor], Tensor] | None = None  # of queries and keys [heads, tokens, head width]

    def count(self, prefix: str) -> int:
        return 1 + max(int(k.removeprefix(prefix + ".").split(".")[0]) for k in self.params if k.startswith(prefix + "."))

    def linear(self, name: str, x: Tensor) -> Tensor:
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

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        if name + ".scale" in self.params:
            return rms_norm(x, self.params[name + ".scale"], eps)
        return layer_norm(x, self.params[name + ".weight"], self.params[name + ".bias"], eps)

    def gated(self, name: str, x: Tensor) -> Tensor:
        return x * torch.tanh(self.params[name + ".scale"]) if name + ".scale" in self.params else x

    def attention(
        self, name: str, x: Tensor, y: Tensor, heads: int, kv_heads: int, mask: Tensor | None, turn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x: [s, d] attends to y: [s_k, d]."""
        q, k, v = (
            self.linear(f"{name}.{part}", source).unflatten(-1, (n, -1)).transpose(0, 1)
            for part, source, n in (("q_proj", x, heads), ("k_proj", y, kv_heads), ("v_proj", y, kv_heads))
        )
        if turn is not None:
            q, k = turn(q), turn(k)
        if f"{name}.q_norm.scale" in self.params:
            q, k = self.norm(f"{name}.q_norm", q, self.eps), self.norm(f"{name}.k_norm", k, self.eps)
        return self.linear(f"{name}.output_proj", attend(q, k, v, mask))

    def vision_layer(self, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
        n = self.norm(f"{name}.sa_norm", x, self.clip_eps)
        h = x + self.gated(f"{name}.sa_scale", self.attention(f"{name}.attn", n, n, self.clip_heads, self.clip_heads, mask, self.turn_vision))
        mlp = self.linear(f"{name}.mlp.w2", self.activation(self.linear(f"{name}.mlp.w1", self.norm(f"{name}.mlp_norm", h, self.clip_eps))))
        return h + self.gated(f"{name}.mlp_scale", mlp)

    def place(self, x: Tensor, table: Tensor, gate: Tensor, ratios: list) -> Tensor:
        return place_tiles(x, table, gate, ratios) if self.supported is None else place_rows(x, table, gate, ratios, self.supported)

    def encode(self, prefix: str, images: Tensor, ratio: Tensor | None):
        """The vision transformer: (x, hidden states without padding tokens, a mask per image or None per image)."""
        get = lambda name: self.params[prefix + name]  # noqa: E731
        b, i, t = images.shape[:3]
        ratios = [(1, 1)] * (b * i) if ratio is None else ratio.reshape(-1, 2).tolist()
        ratios = [tuple(r) for r in ratios]
        x = patches(images.flatten(0, 2), get("conv.weight")).unflatten(0, (b * i, t))
        if prefix + "pre_tile_pos_embed.gate" in self.params:
            x = self.place(x, get("pre_tile_pos_embed.embedding"), get("pre_tile_pos_embed.gate"), ratios)
        cls = get("cls_token_embedding.weight").expand(b * i, t, 1, -1)
        x = torch.cat([x, cls] if self.append_cls else [cls, x], 2)
        if prefix + "token_pos_embedding.gate" in self.params:
            gate = get("token_pos_embedding.gate")
            x = x + get("token_pos_embedding.local_token_positional_embedding") * (1 - torch.tanh(gate))
            x = self.place(x, get("token_pos_embedding.global_token_positional_embedding"), gate, ratios)
        else:
            x = x + get("token_pos_embedding.positional_embedding")
        x = layer_norm(x, get("ln_pre.weight"), get("ln_pre.bias"), 1e-5)
        n, extra = x.shape[2], -x.shape[2] % self.pad_to
        x = torch.cat([x, x.new_zeros(b * i, t, extra, x.shape[-1])], 2)
        per_tile = n + extra
        masks = [self.vision_mask(h * w, t, n, per_tile) for h, w in ratios]
        images_out, states = [], [[] for _ in range(self.count(prefix + "layers") + 1)]
        for image, mask in zip(x.flatten(1, 2), masks, strict=True):
            states[0].append(image)
            for k in range(len(states) - 1):
                image = self.vision_layer(f"{prefix}layers.{k}", image, mask)
                states[k + 1].append(image)
            images_out.append(image)
        x = layer_norm(torch.stack(images_out), get("ln_post.weight"), get("ln_post.bias"), 1e-5).unflatten(1, (t, per_tile))
        if prefix + "post_tile_pos_embed.gate" in self.params:
            x = self.place(x, get("post_tile_pos_embed.embedding"), get("post_tile_pos_embed.gate"), ratios)
        kept = sorted(set(self.out_indices))
        if self.states_after:
            kept = [min(k + 1, len(states) - 1) for k in kept]
        hidden = [torch.stack(states[k]).unflatten(1, (t, per_tile))[:, :, :n].unflatten(0, (b, i)) for k in kept]
        return x.unflatten(0, (b, i)), hidden, masks

    def vision_mask(self, tiles: int, t: int, n: int, per_tile: int) -> Tensor | None:
        """bool [tokens, tokens]: token a may see token b."""
        tokens = t * per_tile
        if self.causal_vision:
            return torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if self.pad_to == 1:
            return None
        real = [token // per_tile < max(tiles, 1) and token % per_tile < n for token in range(tokens)]
        return torch.tensor([[real[a] or real[b] for b in range(tokens)] for a in range(tokens)])

    def clip(self, images: Tensor, ratio: Tensor | None, prefix: str = "") -> tuple[Tensor, list[Tensor]]:
        x, hidden, _ = self.encode(prefix, images, ratio)
        x = x[:, :, :, : self.tokens(images, prefix)]
        if prefix + "cls_projection.weight" in self.params:
            x = x[:, :, :, :1] @ self.params[prefix + "cls_projection.weight"]
        return x, hidden

    def tokens(self, images: Tensor, prefix: str) -> int:
        return (images.shape[-1] // self.params[prefix + "conv.weight"].shape[-1]) ** 2 + 1

    def projection(self, prefix: str, x: Tensor, hidden: list[Tensor], masks: list, n: int) -> Tensor:
        """x: [b, i, t, tokens of a tile with padding, d]  ->  [b, i * t * n, d_out]."""
        b, i, t, per_tile = x.shape[:4]
        out = []
        for image, mask in zip(x.flatten(0, 1).flatten(1, 2), masks, strict=True):
            for k in range(self.count(prefix + "layers")):
                image = self.vision_layer(f"{prefix}layers.{k}", image, mask)
            out.append(image)
        x = torch.stack(out).unflatten(1, (t, per_tile))[:, :, :n].unflatten(0, (b, i))
        features = [x[..., j] for j in range(x.shape[-1])] + [h[..., j] for j in range(x.shape[-1]) for h in hidden]
        return self.linear(prefix + "output", torch.stack(features, -1)).flatten(1, 3)

    def encoder(self, images: Tensor, ratio: Tensor | None, prefix: str = "") -> Tensor:
        x, hidden, masks = self.encode(prefix + "clip.", images, ratio)
        return self.projection(prefix + "projection.", x, hidden, masks, self.tokens(images, prefix + "clip."))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.w2", F.silu(self.linear(f"{name}.w1", x)) * self.linear(f"{name}.w3", x))

    def cross(self, name: str, x: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
        empty = ~mask.any(-1, keepdim=True)
        mask = mask | empty if self.uniform_rows else mask
        n = self.norm(f"{name}.ca_norm", x, self.cross_eps)
        h = x + self.gated(f"{name}.ca_scale", self.attention(f"{name}.attn", n, encoded, self.heads, self.kv_heads, mask))
        if not self.uniform_rows:
            h = torch.where(empty, x, h)
        mlp = self.gated(f"{name}.mlp_scale", self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", h, self.cross_eps)))
        return torch.where(empty, h, h + mlp)

    def decoder(self, tokens: Tensor, encoded: Tensor | None, encoder_mask: Tensor | None, prefix: str = "") -> Tensor:
        """fp32 logits [b, s, vocab], fp64 where the weights are."""
        table = torch.cat([self.params[prefix + "tok_embeddings.weight"], self.params[prefix + "tok_embeddings.fusion_embedding.weight"]])
        out = []
        for row, ids in enumerate(tokens.tolist()):
            x = torch.stack([table[id_] for id_ in ids])
            causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            for k in range(self.count(prefix + "layers")):
                name = f"{prefix}layers.{k}"
                if f"{name}.fusion_layer.ca_norm.scale" in self.params and encoded is not None:
                    x = self.cross(f"{name}.fusion_layer", x, encoded[row], encoder_mask[row])
                head_dim = self.params[f"{name}.attn.q_proj.weight"].shape[0] // self.heads
                n = self.norm(f"{name}.sa_norm", x, self.eps)
                frequencies = rope_frequencies(head_dim, **self.rope)
                x = x + self.attention(f"{name}.attn", n, n, self.heads, self.kv_heads, causal, lambda t, f=frequencies: rotate(t, f))
                x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x, self.eps))
            out.append(self.linear(prefix + "output", self.norm(prefix + "norm", x, self.eps)))
        logits = torch.stack(out)
        return logits.to(wide(logits.dtype))

    def logits(self, tokens: Tensor, images: Tensor, ratio: Tensor | None, encoder_mask: Tensor) -> Tensor:
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
