"""Layers that carry a fusion part beside a pretrained part, whose checkpoint keys do not change."""

import torch
from torch import Tensor, nn


class FusionLayer(nn.Module):
    """A decoder layer with a fusion layer, mostly cross-attention, before it (or after it).

    In the state dict the keys of `layer` are those it has alone, so that a text decoder's checkpoint loads, and those
    of `fusion_layer` start with "fusion_layer.".
    """

    def __init__(self, layer: nn.Module, fusion_layer: nn.Module, fusion_first: bool = True):
        super().__init__()
        self.layer = layer
        self.fusion_layer = fusion_layer
        self.fusion_first = fusion_first
        self._register_state_dict_hook(FusionLayer._state_dict_hook)
        self._register_load_state_dict_pre_hook(FusionLayer._load_state_dict_hook, with_module=True)

    def _state_dict_hook(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        """Takes "layer." off the keys, which go behind those of fusion_layer."""
        for key in [k for k in state_dict if k.startswith(prefix + "layer.")]:
            state_dict[prefix + key[len(prefix + "layer.") :]] = state_dict.pop(key)

    def _load_state_dict_hook(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + "fusion_layer")]:
            state_dict[f"{prefix}layer.{key[len(prefix) :]}"] = state_dict.pop(key)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: the names that state-dict keys have without "layer."."""
        return dict.fromkeys((*self.layer._modules, *self.layer._parameters), "layer")

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int, decoder_max_seq_len: int) -> None:
        for part in (self.layer, self.fusion_layer):
            part.setup_caches(batch_size, dtype, encoder_max_seq_len=encoder_max_seq_len, decoder_max_seq_len=decoder_max_seq_len)

    def caches_are_setup(self) -> bool:
        return self.layer.caches_are_setup()

    def caches_are_enabled(self) -> bool:
        return self.layer.caches_are_enabled()

    def reset_cache(self) -> None:
        self.layer.reset_cache()
        self.fusion_layer.reset_cache()

    def fusion_params(self) -> list[str]:
        return [f"fusion_layer.{name}" for name, _ in self.fusion_layer.named_parameters()]

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        """x: [b, s, d]  ->  [b, s, d]; both parts get all keywords."""
        first, second = (self.fusion_layer, self.layer) if self.fusion_first else (self.layer, self.fusion_layer)
        return second(first(x, **kwargs), **kwargs)


class FusionEmbedding(nn.Module):
    """A pretrained token embedding and a second one for the tokens that fusion adds, ids from vocab_size on.

    In the state dict: `weight` [vocab_size, embed_dim], as of nn.Embedding, and `fusion_embedding.weight`.
    """

    def __init__(self, vocab_size: int, fusion_vocab_size: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.fusion_embedding = nn.Embedding(fusion_vocab_size, embed_dim)
        self.dim = embed_dim
        self.num_embeddings = vocab_size + fusion_vocab_size
        self._register_state_dict_hook(FusionEmbedding._state_dict_hook)
        self._register_load_state_dict_pre_hook(FusionEmbedding._load_state_dict_hook, with_module=True)

    def _state_dict_hook(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "embedding.weight")

    def _load_state_dict_hook(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        if prefix + "weight" in state_dict:
            state_dict[prefix + "embedding.weight"] = state_dict.pop(prefix + "weight")

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: `weight` is that of `embedding`."""
        return {"weight": "embedding"}

    def fusion_params(self) -> list[str]:
        return ["fusion_embedding.weight"]

    def forward(self, input: Tensor) -> Tensor:
        """input: int [b, s], ids below vocab_size + fusion_vocab_size  ->  [b, s, embed_dim].

        Raises ValueError for another number of dims; an id out of range raises IndexError on a CPU.
        """
        if input.dim() != 2:
            raise ValueError(f"input has shape {tuple(input.shape)}, expected (b, s)")
        vocab_size = self.embedding.num_embeddings
        base = input < vocab_size
        # Both tables are read at every id, one of them at row 0: no boolean indexing, which would wait for the device.
        # Ids out of range are left as they are, for the embedding to refuse.
        tokens = self.embedding(torch.where(base, input, 0))
        fusion = self.fusion_embedding(torch.where(base, 0, input - vocab_size))
        return torch.where(base[..., None], tokens, fusion.to(tokens.dtype))
