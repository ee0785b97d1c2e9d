"""The formulas of the architecture written out again, plainly, in the dtype of the parameters and inputs they are given.

A module passed in only holds parameters here; its forward is never called. In float64 the result is the exact one of
assert_no_worse, in another dtype the eager one: norms, rotation and softmax in fp32, everything else rounded to the dtype.
"""

import copy
import functools
import math

import torch
from numerics import Orders, assert_no_worse
from torch import nn
from torch.nn import functional as F

from fastfuse.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TanhGate,
    TransformerCrossAttentionLayer,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from fastfuse.modules.model_fusion import DeepFusionModel, FusionEmbedding, FusionLayer, register_fusion_module

D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, FUSED = 16, 4, 2, 4, 24, 11, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
unbiased = functools.partial(nn.Linear, bias=False)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms(x, scale, eps):
    w = wide(x)
    return (w / torch.sqrt((w * w).sum(-1, keepdim=True) / x.shape[-1] + eps)).to(x.dtype) * scale


def normed(m, x):
    return rms(x, m.scale, m.eps)


def rotate(x, positions, thetas):
    """x: [b, s, heads, dim], positions: [b, s]. Pair k is one complex number and turns by position * thetas[k]."""
    w = wide(x)
    theta = torch.tensor(thetas, dtype=w.dtype)
    angle = positions.to(w.dtype)[:, :, None, None] * theta
    turned = torch.view_as_complex(w.reshape(*x.shape[:-1], -1, 2).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).reshape(x.shape).to(x.dtype)


def plain_thetas(dim, base):
    return [base ** (-2 * k / dim) for k in range(dim // 2)]


def softmax_attention(q, k, v, mask=None, causal=False):
    """q: [b, s, hq, d], k, v: [b, s_k, hkv, d]  ->  [b, s, hq, d]; a row that sees nothing gives zero."""
    q, k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).transpose(1, 2) for t in (q, k, v))
    scores = wide(q) @ wide(k).mT / math.sqrt(q.shape[3])
    if mask is not None:
        scores = scores + (mask.to(scores.dtype) if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf))[:, None]
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def linear(m, x):
    return F.linear(x, m.weight, m.bias)


def attention(m, x, y, mask=None, positions=None):
    q, k, v = (linear(p, t).unflatten(-1, (-1, m.head_dim)) for p, t in ((m.q_proj, x), (m.k_proj, y), (m.v_proj, y)))
    if m.pos_embeddings is not None:
        positions = torch.arange(x.shape[1])[None] if positions is None else positions
        q, k = (rotate(t, positions, plain_thetas(m.head_dim, m.pos_embeddings.base)) for t in (q, k))
    if m.q_norm is not None:
        q, k = normed(m.q_norm, q), normed(m.k_norm, k)
    return linear(m.output_proj, softmax_attention(q, k, v, mask, causal=mask is None and m.is_causal).flatten(2))


def mlp(m, x):
    return linear(m.w2, F.silu(linear(m.w1, x)) * linear(m.w3, x))


def gated(m, x):
    return x * torch.tanh(m.scale) if isinstance(m, TanhGate) else x


def self_layer(m, x, mask=None, positions=None):
    n = normed(m.sa_norm, x)
    h = x + gated(m.sa_scale, attention(m.attn, n, n, mask, positions))
    return h + gated(m.mlp_scale, mlp(m.mlp, normed(m.mlp_norm, h)))


def cross_layer(m, x, encoded=None, mask=None):
    """A row that sees nothing leaves as it came or, by transformers' rule, attends to everything and leaves out the MLP alone (for bool masks)."""
    if encoded is None:
        return x
    uniform, sees = m.empty_rows == "uniform", torch.ones(1, 1, 1, dtype=torch.bool)
    if mask is not None:
        sees = (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1, keepdim=True)
        mask = mask | ~sees if uniform else mask
    h = x + gated(m.ca_scale, attention(m.attn, normed(m.ca_norm, x), encoded, mask))
    out = h + gated(m.mlp_scale, mlp(m.mlp, normed(m.mlp_norm, h)))
    return torch.where(sees, out, h if uniform else x)


def embed(m, tokens):
    table = torch.cat([m.embedding.weight, m.fusion_embedding.weight])
    return torch.stack([torch.stack([table[i] for i in row]) for row in tokens.tolist()])


def fusion_layer(m, x, encoded=None, encoder_mask=None, mask=None, positions=None):
    """Or a layer that is no FusionLayer, alone."""
    parts = (m.fusion_layer, m.layer)[:: 1 if m.fusion_first else -1] if isinstance(m, FusionLayer) else (m,)
    for part in parts:
        x = cross_layer(part, x, encoded, encoder_mask) if isinstance(part, TransformerCrossAttentionLayer) else self_layer(part, x, mask, positions)
    return x


def decoder_states(m, tokens, mask=None, encoded=None, encoder_mask=None, positions=None):
    """The input of every layer, and the last layer's output."""
    states = [embed(m.tok_embeddings, tokens)]
    for layer in m.layers:
        states.append(fusion_layer(layer, states[-1], encoded, encoder_mask, mask, positions))
    return states


def decoder(m, *args, **kwargs):
    return wide(linear(m.output, normed(m.norm, decoder_states(m, *args, **kwargs)[-1])))


def model(m, tokens, images, encoder_mask=None, scale=1.0):
    encoded = linear(m.encoder.projection, torch.tanh(linear(m.encoder.backbone, images))) * scale
    return decoder(m.decoder, tokens, None, encoded, encoder_mask)


def make_attention(*, cross=False, rope=None, norms=None, num_kv_heads=KV_HEADS, **kwargs):
    norms = cross if norms is None else norms
    return MultiHeadAttention(
        embed_dim=D,
        num_heads=HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        q_proj=unbiased(D, HEADS * HEAD_DIM),
        k_proj=unbiased(D, num_kv_heads * HEAD_DIM),
        v_proj=unbiased(D, num_kv_heads * HEAD_DIM),
        output_proj=unbiased(HEADS * HEAD_DIM, D),
        pos_embeddings=rope,
        q_norm=RMSNorm(HEAD_DIM, eps=1e-5) if norms else None,
        k_norm=RMSNorm(HEAD_DIM, eps=1e-5) if norms else None,
        is_causal=not cross,
        **kwargs,
    )


def make_mlp():
    return FeedForward(gate_proj=unbiased(D, HIDDEN), down_proj=unbiased(HIDDEN, D), up_proj=unbiased(D, HIDDEN))


def make_self_layer(rope=None, **scales):
    rope = RotaryPositionalEmbeddings(HEAD_DIM, max_seq_len=64) if rope is None else rope
    return shaken(TransformerSelfAttentionLayer(make_attention(rope=rope), make_mlp(), sa_norm=RMSNorm(D, 1e-5), mlp_norm=RMSNorm(D, 1e-5), **scales))


def make_cross_layer(**kwargs):
    gates = {"ca_scale": TanhGate(), "mlp_scale": TanhGate()}
    return shaken(TransformerCrossAttentionLayer(make_attention(cross=True), make_mlp(), ca_norm=RMSNorm(D), mlp_norm=RMSNorm(D), **gates, **kwargs))


def make_decoder(*kinds, empty_rows="zero", **kwargs):
    """Layers of these kinds, the cross-attention of "fusion" before its layer, and a fusion embedding."""
    rope = RotaryPositionalEmbeddings(HEAD_DIM, max_seq_len=64)

    def layer(kind):
        if kind in ("self", "cross"):
            return make_self_layer(rope) if kind == "self" else make_cross_layer(empty_rows=empty_rows)
        return FusionLayer(make_self_layer(rope), make_cross_layer(empty_rows=empty_rows), fusion_first=kind == "fusion")

    layers = [layer(kind) for kind in kinds or ("self", "fusion", "self")]
    rest = {"tok_embeddings": FusionEmbedding(VOCAB, FUSED, D), "norm": shaken(RMSNorm(D, 1e-5)), "output": unbiased(D, VOCAB)}
    return TransformerDecoder(layers=layers, max_seq_len=64, num_heads=HEADS, head_dim=HEAD_DIM, **rest, **kwargs)


class Encoder(nn.Module):
    """images [b, s_e, 5] -> [b, s_e, D], through a backbone and a projection, the fusion part."""

    def __init__(self):
        super().__init__()
        self.backbone, self.projection = nn.Linear(5, 8), nn.Linear(8, D)
        register_fusion_module(self.projection)

    def forward(self, images, scale=1.0):
        return self.projection(torch.tanh(self.backbone(images))) * scale


def make_model(*kinds, empty_rows="zero", **trainable):
    return DeepFusionModel(make_decoder(*kinds, empty_rows=empty_rows), Encoder(), **trainable)


def shaken(module):
    """Gates open, norms other than one, small weights larger: nothing is the identity by accident."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.copy_(torch.rand_like(p) + 0.4)
            elif p.dim() == 2:
                p.copy_(torch.randn_like(p) / p.shape[1] ** 0.5)
    return module


def assert_matches(module, run, formula, inputs, dtype, draws=4):
    """run(module, **inputs) in `dtype`, its value and the gradients of every parameter and float input, of `draws` upstream ones, no worse than formula.

    `module` and `inputs` are rounded to dtype first; exact is the formula in float64 on those rounded values.
    """
    module = copy.deepcopy(module).to(dtype)
    inputs = {n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in inputs.items()}
    upstreams = []

    def results(call, mod, to):
        given = {n: t.to(to).requires_grad_() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}
        out = call(mod, **given)
        upstreams.extend(torch.randn(out.shape, dtype=torch.float64).to(dtype) for _ in range(draws - len(upstreams)))
        leaves = {n: p for n, p in [*mod.named_parameters(), *given.items()] if p is not None and p.requires_grad}
        grads = [torch.autograd.grad(out, leaves.values(), u.to(out.dtype), retain_graph=True, allow_unused=True) for u in upstreams]
        return out.detach(), dict(zip(leaves, zip(*grads, strict=True), strict=True))

    got = results(run, module, dtype)
    eager = Orders(lambda: results(formula, module, dtype))
    assert_results_no_worse(got, eager, results(formula, copy.deepcopy(module).double(), torch.float64))


def assert_results_no_worse(got, eager, exact):
    """assert_no_worse for a value and assert_gradients_no_worse for its gradients; eager: Orders of both."""
    assert_no_worse(got[0], (value for value, _ in eager), exact[0], "value")
    assert_gradients_no_worse(got[1], (grads for _, grads in eager), exact[1])


def assert_gradients_no_worse(got, eager, exact):
    """assert_no_worse for {name: gradients of several upstream gradients}, relative in 2-norm over all of them: of a few
    numbers alone, two correct ways of rounding may well be more than a factor of two apart. eager: one such, or Orders of them."""
    compared = {}
    for what, want in exact.items():
        if want[0] is None:
            assert all(g is None or not g.any() for g in got[what]), what
            continue
        compared[what] = _relative(got[what], want)
    eps = max(torch.finfo(g.dtype).eps for grads in got.values() for g in grads if g is not None)
    allowed = 0.0
    for order in [eager] if isinstance(eager, dict) else eager:
        for what in compared:
            assert all(g.dtype == e.dtype and g.shape == e.shape for g, e in zip(got[what], order[what], strict=True)), what
        allowed = max(allowed, 2 * max(_relative(order[what], exact[what]) for what in compared) + eps)
        assert allowed < 1, "a gradient that is zero but for rounding: nothing is compared"
        bad = {what: f"{e:.2e}" for what, e in compared.items() if not e <= allowed}
        if not bad:
            return
    raise AssertionError(f"allowed {allowed:.2e}: {bad}")


def _relative(results, exact):
    results, exact = torch.stack(results).double(), torch.stack(exact)
    assert exact.norm() > 0, "a zero gradient: nothing is compared"
    return ((results - exact).norm() / exact.norm()).item()
