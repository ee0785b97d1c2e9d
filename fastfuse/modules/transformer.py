"""Transformer layers and the decoder they form."""

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn

from fastfuse.errors import InvalidArgument
from fastfuse.modules.attention import MultiHeadAttention
from fastfuse.modules.attention_utils import list_blocks, sdpa_or_flex_attention, serves_cross_attention
from fastfuse.modules.kv_cache import KVCache
from fastfuse.modules.model_fusion import FusionLayer
from fastfuse.ops import EncoderMask

log = logging.getLogger(__name__)


class _AttentionLayer(nn.Module):
    """A layer whose cache is that of its one attention module, `attn`."""

    def caches_are_setup(self) -> bool:
        return self.attn.kv_cache is not None

    def caches_are_enabled(self) -> bool:
        return self.attn.cache_enabled

    def reset_cache(self) -> None:
        self.attn.reset_cache()


class TransformerSelfAttentionLayer(_AttentionLayer):
    """h = x + sa_scale(attn(sa_norm(x)));  out = h + mlp_scale(mlp(mlp_norm(h))).

    A norm or scale left out is the identity. mask_mod, if given, is called as mask_mod(mask=, bsz=, seq_len=) and
    returns the mask to use.
    """

    def __init__(
        self,
        attn: MultiHeadAttention,
        mlp: nn.Module,
        *,
        sa_norm: nn.Module | None = None,
        mlp_norm: nn.Module | None = None,
        sa_scale: nn.Module | None = None,
        mlp_scale: nn.Module | None = None,
        mask_mod: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.sa_norm = sa_norm or nn.Identity()
        self.mlp_norm = mlp_norm or nn.Identity()
        self.sa_scale = sa_scale or nn.Identity()
        self.mlp_scale = mlp_scale or nn.Identity()
        self.mask_mod = mask_mod

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int, decoder_max_seq_len: int) -> None:
        """A cache of decoder_max_seq_len tokens."""
        self.attn.setup_cache(batch_size, dtype, max_seq_len=decoder_max_seq_len)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None, **kwargs: object) -> Tensor:
        """x: [b, s, d]  ->  [b, s, d]; mask and input_pos as MultiHeadAttention.forward, other keywords are ignored."""
        normed = self.sa_norm(x)
        if self.mask_mod is not None:
            mask = self.mask_mod(mask=mask, bsz=x.shape[0], seq_len=x.shape[1])
        h = x + self.sa_scale(self.attn(normed, normed, mask=mask, input_pos=input_pos))
        return h + self.mlp_scale(self.mlp(self.mlp_norm(h)))


class TransformerCrossAttentionLayer(_AttentionLayer):
    """h = x + ca_scale(attn(ca_norm(x), encoder_input));  out = h + mlp_scale(mlp(mlp_norm(h))).

    Tokens that may see no encoder token: with empty_rows="zero" (torchtune, Meta) they pass through unchanged, with
    empty_rows="uniform" (transformers) they attend to every encoder token and only their MLP is left out.
    Raises ValueError where attn has positional embeddings or empty_rows is neither.
    """

    def __init__(
        self,
        attn: MultiHeadAttention,
        mlp: nn.Module,
        *,
        ca_norm: nn.Module | None = None,
        mlp_norm: nn.Module | None = None,
        ca_scale: nn.Module | None = None,
        mlp_scale: nn.Module | None = None,
        empty_rows: Literal["zero", "uniform"] = "zero",
    ):
        super().__init__()
        if attn.pos_embeddings is not None:
            kind = type(attn.pos_embeddings).__name__
            raise InvalidArgument(f"Doesn't support positional embeddings for cross attention, because q and k are different sequences: attn has {kind}")
        if empty_rows not in ("zero", "uniform"):
            raise ValueError(f"empty_rows is {empty_rows!r}, expected 'zero' or 'uniform'")
        self.attn = attn
        self.mlp = mlp
        self.ca_norm = ca_norm or nn.Identity()
        self.mlp_norm = mlp_norm or nn.Identity()
        self.ca_scale = ca_scale or nn.Identity()
        self.mlp_scale = mlp_scale or nn.Identity()
        self.empty_rows = empty_rows

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int, decoder_max_seq_len: int) -> None:
        """A cache of encoder_max_seq_len tokens."""
        self.attn.setup_cache(batch_size, dtype, max_seq_len=encoder_max_seq_len)

    def _takes_encoder_mask(self, x: Tensor) -> bool:
        """Whether attention goes by an EncoderMask. Where anything else is called, looks at the mask, drops weights or transforms, a tensor it is."""
        attn = self.attn
        if type(attn) is not MultiHeadAttention or attn._attention_call is not sdpa_or_flex_attention or _keywords_are_seen(attn):
            return False
        return not (attn.training and attn.attn_dropout > 0) and serves_cross_attention(x, attn.head_dim, attn.num_heads // attn.num_kv_heads)

    def _packs(self, x: Tensor, encoder_input: Tensor | None, mask: Tensor | EncoderMask | None) -> bool:
        """Whether forward makes an EncoderMask of the mask: a bool tensor shaped as the scores (PyTorch's attention would broadcast another)."""
        if not isinstance(mask, Tensor):
            return False
        if self.attn.cache_enabled:
            cache = self.attn.kv_cache
            if encoder_input is None and cache.is_empty:
                return False
            b, width = cache.k_cache.shape[0], cache.k_cache.shape[2]
        elif encoder_input is None:
            return False
        else:
            b, width = encoder_input.shape[:2]
        return b == x.shape[0] and masks_scores(mask, x, width) and self._takes_encoder_mask(x)

    def _filled(self, mask: EncoderMask, encoder_input: Tensor | None, cache: KVCache | None) -> EncoderMask:
        """The mask, where rows that may see nothing see every token, of a cache those it holds."""
        s_e = mask.shape[2]
        held = s_e if cache is None else 0 if encoder_input is None else encoder_input.shape[1]
        if cache is not None and not cache.is_empty:
            return mask.filled((cache.cache_pos[0] + held).clamp(max=s_e))
        return mask.filled(held) if held < s_e else mask.filled()

    def _skip_mask(self, mask: Tensor | EncoderMask | None) -> Tensor | None:
        """bool [b, s, 1]: the tokens that may see nothing; None without a mask."""
        if mask is None:
            return None
        if isinstance(mask, EncoderMask):
            return mask.rows_empty[..., None]
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        return hidden.all(-1, keepdim=True)

    def _everything(self, mask: Tensor, encoder_input: Tensor | None, cache: KVCache | None) -> Tensor:
        """What a row that may see nothing attends to, [s_e] in the mask's dtype: every token, of a cache those it holds."""
        if self.empty_rows == "zero" or cache is None:
            return mask.new_ones(mask.shape[-1])
        held = cache.cache_pos[0] + (0 if encoder_input is None else encoder_input.shape[1])
        visible = torch.arange(mask.shape[-1], device=mask.device) < held
        return visible if mask.dtype == torch.bool else torch.where(visible, 0.0, -torch.inf).to(mask.dtype)

    def forward(self, x: Tensor, *, encoder_input: Tensor | None = None, encoder_mask: Tensor | EncoderMask | None = None, **kwargs: object) -> Tensor:
        """x: [b, s, d], encoder_input: [b, s_e, d]  ->  [b, s, d]; other keywords are ignored.

        encoder_mask: [b or 1, s, s_e], bool (True may attend), float (added to the scores) or an EncoderMask, which a model
        prepares once for all its layers; s_e is the cache's length where one is enabled. With an enabled cache encoder_input
        is appended to it, and None attends to what it holds; without anything to attend to x is returned as it is.
        """
        cache = self.attn.kv_cache if self.attn.cache_enabled else None
        if encoder_input is None and (cache is None or cache.is_empty):
            return x
        if isinstance(encoder_mask, EncoderMask):
            encoder_mask = encoder_mask if self._takes_encoder_mask(x) else encoder_mask.to_dense()
        elif self._packs(x, encoder_input, encoder_mask):
            encoder_mask = EncoderMask.from_dense(encoder_mask)
        skip = self._skip_mask(encoder_mask)
        if isinstance(encoder_mask, EncoderMask):
            encoder_mask = self._filled(encoder_mask, encoder_input, cache) if self.empty_rows == "uniform" else encoder_mask
        elif skip is not None:
            # Left alone, an empty softmax is NaN in some attention kernels.
            encoder_mask = torch.where(skip, self._everything(encoder_mask, encoder_input, cache), encoder_mask)
        attended = self.attn(self.ca_norm(x), encoder_input, mask=encoder_mask)
        return add_attended(self, x, attended, skip, self.empty_rows == "uniform")


def masks_scores(mask: object, x: Tensor, width: int) -> bool:
    """Whether it is a bool tensor beside x, with a row for each token of x and a column for each of `width` image tokens, as an EncoderMask is made of."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3 or mask.device != x.device or hasattr(mask, "device_mesh"):
        return False
    # No `in (1, b)`: under torch.compile a number is not found among symbols.
    return (mask.shape[0] == 1 or mask.shape[0] == x.shape[0]) and mask.shape[1] == x.shape[1] and mask.shape[2] == width


def add_attended(layer: nn.Module, x: Tensor, attended: Tensor, skip: Tensor | None, uniform: bool) -> Tensor:
    """The rest of a TransformerCrossAttentionLayer, or torchtune's. skip: bool [b, s, 1], the tokens that may see nothing.  uniform: they attend all the same."""
    if skip is not None and not uniform:
        attended = attended.masked_fill(skip, 0)
    h = x + layer.ca_scale(attended)
    mlp = layer.mlp(layer.mlp_norm(h))
    if skip is not None:
        mlp = mlp.masked_fill(skip, 0)
    return h + layer.mlp_scale(mlp)


class TransformerDecoder(nn.Module):
    """Token embeddings, layers, a norm and an output projection; layers may be self-attention, cross-attention or fusion layers.

    layers: a ModuleList, a list of modules, or one module that is copied num_layers times. output_hidden_states: the
    indices of layers whose input is returned too, num_layers standing for the last layer's output.
    Raises ValueError where layers and num_layers do not fit together.
    """

    def __init__(
        self,
        *,
        tok_embeddings: nn.Module,
        layers: nn.Module | list[nn.Module] | nn.ModuleList,
        max_seq_len: int,
        num_heads: int,
        head_dim: int,
        norm: nn.Module,
        output: nn.Module | Callable[[Tensor], Tensor],
        num_layers: int | None = None,
        output_hidden_states: list[int] | None = None,
    ):
        super().__init__()
        if isinstance(layers, list):
            layers = nn.ModuleList(layers)
        elif not isinstance(layers, nn.Module):
            raise InvalidArgument(f"num_layers is defined, layers must be a module: layers is a {type(layers).__name__}, num_layers={num_layers}")
        elif not isinstance(layers, nn.ModuleList):
            if num_layers is None:
                raise InvalidArgument(f"num_layers is not defined, layers must be a list: layers is a {type(layers).__name__}")
            layers = nn.ModuleList([copy.deepcopy(layers) for _ in range(num_layers)])
        self.tok_embeddings = tok_embeddings
        self.layers = layers
        self.norm = norm
        self.output = output
        self.output_hidden_states = output_hidden_states or []
        self.max_seq_len = max_seq_len
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.causal_mask = None
        self.num_output_chunks = 0
        self.skip_output_layer = False
        self.encoder_max_cache_seq_len = None
        self.decoder_max_cache_seq_len = None

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Deprecated: with n > 0 the output is a list of n chunks along the tokens. LinearCrossEntropyLoss needs less memory."""
        _warn_once("set_num_output_chunks", "set_num_output_chunks is deprecated: use LinearCrossEntropyLoss, which projects chunk by chunk itself")
        self.num_output_chunks = num_output_chunks

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int | None = None, decoder_max_seq_len: int | None = None) -> None:
        """Give every attention layer an enabled key-value cache, cross-attention of encoder_max_seq_len tokens, self-attention of
        decoder_max_seq_len; max_seq_len where left out."""
        if self.caches_are_setup():
            log.warning("Key value caches are already setup. You cannot call ``setup_caches()`` twice. Skipping.")
            return
        kinds = {type_ for m in self.modules() for type_ in (TransformerCrossAttentionLayer, TransformerSelfAttentionLayer) if isinstance(m, type_)}
        if TransformerCrossAttentionLayer in kinds:
            self.encoder_max_cache_seq_len = encoder_max_seq_len if encoder_max_seq_len is not None else self.max_seq_len
        if TransformerSelfAttentionLayer in kinds:
            self.decoder_max_cache_seq_len = decoder_max_seq_len if decoder_max_seq_len is not None else self.max_seq_len
        try:
            for layer in self.layers:
                layer.setup_caches(batch_size, dtype, encoder_max_seq_len=self.encoder_max_cache_seq_len, decoder_max_seq_len=self.decoder_max_cache_seq_len)
        except BaseException:  # out of memory, say: a model with some caches would be neither set up nor not
            self._forget_caches()
            raise

    def _forget_caches(self) -> None:
        self.encoder_max_cache_seq_len = self.decoder_max_cache_seq_len = None
        for module in self.modules():
            if isinstance(module, MultiHeadAttention):
                module.kv_cache, module.cache_enabled = None, False

    def caches_are_setup(self) -> bool:
        """Whether the layers have caches, enabled or not."""
        return self.layers[0].caches_are_setup()

    def caches_are_enabled(self) -> bool:
        """Whether forward reads and writes the caches."""
        return self.layers[0].caches_are_enabled()

    def reset_caches(self) -> None:
        """Forget all cached tokens, in place. Raises RuntimeError without enabled caches."""
        if not self.caches_are_enabled():
            raise RuntimeError("Key value caches are not setup. Call model.setup_caches first.")
        for layer in self.layers:
            layer.reset_cache()

    def chunked_output(self, last_hidden_state: Tensor) -> list[Tensor]:
        """Deprecated: the projection of num_output_chunks chunks along the tokens, in the model's dtype."""
        _warn_once("chunked_output", "chunked_output is deprecated: use LinearCrossEntropyLoss, which projects chunk by chunk itself")
        return self._chunked(last_hidden_state)

    def _chunked(self, h: Tensor) -> list[Tensor]:
        return [self.output(chunk) for chunk in h.tensor_split(self.num_output_chunks, dim=1)]

    def _validate_inputs(
        self, tokens: Tensor | None, mask: Tensor | None, encoder_input: Tensor | None, encoder_mask: Tensor | EncoderMask | None,
        input_pos: Tensor | None, input_embeds: Tensor | None,
    ) -> None:  # fmt: skip
        sequence = tokens if tokens is not None else input_embeds
        if sequence is None:
            raise ValueError("Either tokens or input_embeds must be provided to the decoder.")
        if sequence.dim() != (2 if tokens is not None else 3):
            name, expected = ("tokens", "(b, s)") if tokens is not None else ("input_embeds", "(b, s, d)")
            raise ValueError(f"{name} has shape {tuple(sequence.shape)}, expected {expected}")
        if sequence.shape[1] > self.max_seq_len:
            raise ValueError(f"seq_len ({sequence.shape[1]}) of input tensor should be smaller than max_seq_len ({self.max_seq_len})")
        if self.caches_are_enabled():
            setup = "KV-caches for self-attention layers are setup for inference mode"
            if mask is None:
                raise ValueError(f"{setup}, causal masks must be provided! Use the `mask` arg to provide a causal mask.")
            if encoder_input is not None and encoder_mask is None:
                cross = "KV-caches for cross-attention/fusion layers are setup for inference mode and you seem to be using encoder_input"
                raise ValueError(f"{cross}, causal masks must be provided! Use the `encoder_mask` arg to provide a causal mask.")
            if input_pos is None:
                raise ValueError("KV-caches are setup for inference mode, input positions must be provided! Use the `input_pos` arg.")
        # Attention would broadcast these and answer about another row's image.
        b, s = sequence.shape[:2]
        if encoder_input is not None and encoder_input.shape[0] != b:
            raise ValueError(f"encoder_input has {encoder_input.shape[0]} rows, the batch has {b}")
        for name, m in (("mask", mask), ("encoder_mask", encoder_mask)):
            if isinstance(m, (Tensor, EncoderMask)) and len(m.shape) == 3 and (m.shape[0] not in (1, b) or m.shape[1] != s):
                raise ValueError(f"{name} has shape {tuple(m.shape)}, expected ({b} or 1, {s}, keys)")

    def forward(
        self,
        tokens: Tensor | None,
        *,
        mask: Tensor | None = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | EncoderMask | None = None,
        input_pos: Tensor | None = None,
        input_embeds: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """tokens: int [b, s], or input_embeds: [b, s, d] in their place  ->  logits [b, s, v] in fp32.

        mask: [b or 1, s, s_k] as MultiHeadAttention.forward; causal where None. encoder_input: [b, s_e, d] and
        encoder_mask: [b or 1, s, s_e] for cross-attention, a tensor or an EncoderMask; of a bool tensor one EncoderMask is made for all
        layers, layers of other classes get what was passed. input_pos: [b, s], [s], or [b] for one token each. With enabled
        caches mask, input_pos and, beside encoder_input, encoder_mask are needed, masks as wide as the caches.
        Returns [*hidden states, logits] with output_hidden_states, a list of chunks with num_output_chunks, the normed
        hidden states with skip_output_layer.
        Raises ValueError for more tokens than max_seq_len, neither tokens nor input_embeds, or what caches need and is missing.
        """
        self._validate_inputs(tokens, mask, encoder_input, encoder_mask, input_pos, input_embeds)
        h = self.tok_embeddings(tokens) if input_embeds is None else input_embeds
        encoder_masks = self._encoder_masks(h, encoder_input, encoder_mask)
        hidden = []
        for i, layer in enumerate(self.layers):
            if i in self.output_hidden_states:
                hidden.append(h)
            h = layer(h, mask=mask, encoder_input=encoder_input, encoder_mask=encoder_masks[i], input_pos=input_pos)
        if len(self.layers) in self.output_hidden_states:
            hidden.append(h)
        output = self.unembed(h)
        return [*hidden, output] if hidden else output

    def _encoder_masks(self, h: Tensor, encoder_input: Tensor | None, mask: Tensor | EncoderMask | None) -> list[Tensor | EncoderMask | None]:
        """The mask that each layer gets: the same EncoderMask where it would make one itself, what was passed elsewhere."""
        if not isinstance(mask, Tensor):
            return [mask] * len(self.layers)
        cross_layers = [cross_attention_of(layer) for layer in self.layers]
        packs = [layer is not None and layer._packs(h, encoder_input, mask) for layer in cross_layers]
        packed = EncoderMask.from_dense(mask) if any(packs) else None
        return [packed if p else mask for p in packs]

    def unembed(self, h: Tensor) -> Tensor | list[Tensor]:
        """The norm and the output projection: logits in fp32 (fp64 for fp64)."""
        h = self.norm(h)
        if self.skip_output_layer:
            return h
        if self.num_output_chunks > 0:
            return self._chunked(h)
        logits = self.output(h)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_attention_of(layer: nn.Module) -> TransformerCrossAttentionLayer | None:
    """The cross-attention in a decoder's layer, where all that its keywords pass on their way is of our own classes, with nothing else looking at them."""
    outer, layer = layer, getattr(layer, "_checkpoint_wrapped_module", layer)  # torch's checkpoint_wrapper hands keywords on
    parts = {type(part): part for part in ((layer.layer, layer.fusion_layer) if type(layer) is FusionLayer else (layer,))}
    if not parts.keys() <= {TransformerSelfAttentionLayer, TransformerCrossAttentionLayer} or any(map(_keywords_are_seen, (outer, layer, *parts.values()))):
        return None
    return parts.get(TransformerCrossAttentionLayer)


def ready_for_steps(decoder: nn.Module, mask: Tensor | EncoderMask, x: Tensor) -> Tensor | EncoderMask:
    """The mask [b, 1, s_e] of cached steps with everything in it that the decoder would make of it at each of them.

    x: a tensor of the decoder's device and dtype. Comes back as it is where a layer, or the decoder, is not known to take an EncoderMask.
    """
    if type(decoder) is not TransformerDecoder or _keywords_are_seen(decoder) or mask.device != x.device:
        return mask
    layers = [cross_attention_of(layer) for layer in decoder.layers if type(layer) is not TransformerSelfAttentionLayer]
    if not layers or any(layer is None or not layer._takes_encoder_mask(x) for layer in layers):
        return mask
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            return mask
        mask = EncoderMask.from_dense(mask)
    for layer in layers:
        if layer.empty_rows == "zero":  # the others add rows of their own to it, which the cache's length decides
            # Made inside of a compiled step they would change the mask that its graph is guarded by.
            list_blocks(mask, x, layer.attn.num_heads // layer.attn.num_kv_heads)
    return mask


def _keywords_are_seen(module: nn.Module) -> bool:
    """Whether a forward of the module's own or a hook gets the keywords that it is called with."""
    own = module._forward_pre_hooks_with_kwargs or module._forward_hooks_with_kwargs
    # PyTorch leaves the latter set when it removes the hook.
    return "forward" in module.__dict__ or bool(own or (_nn._global_forward_hooks and _nn._global_forward_hooks_with_kwargs))


_warned = set()


def _warn_once(key: str, message: str) -> None:
    if key not in _warned and not torch.compiler.is_compiling():
        _warned.add(key)
        warnings.warn(message, FutureWarning, stacklevel=3)
