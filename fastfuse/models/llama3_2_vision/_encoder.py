"""The vision encoder of Llama 3.2: CLIP and a projection into the decoder's width."""

import torch
from torch import Tensor, nn

from fastfuse.modules.model_fusion import register_fusion_module
from fastfuse.modules.vision_transformer import VisionTransformer


class Llama3VisionProjectionHead(nn.Module):
    """Layers over the vision tokens, then one linear layer over [tokens | hidden states interleaved].

    The k-th of num_hidden_inputs states contributes feature j at position j * num_hidden_inputs + k.
    """

    def __init__(self, layers: nn.Module, output: nn.Module, num_hidden_inputs: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.output = output
        self.num_hidden = num_hidden_inputs

    def forward(self, x: Tensor, hidden_states: list[Tensor] | None = None, *, mask: Tensor | None = None, n_tokens: int | None = None) -> Tensor:
        """x: [b, n_imgs, n_tiles, n, d], hidden_states: num_hidden_inputs tensors of that shape  ->  [b, n_imgs * n_tiles * n, d_out].

        mask: [b * n_imgs, n_tiles * n, n_tiles * n] for the layers, bool or float. n_tokens: tokens of each tile that go on, the rest
        of x being padding; hidden_states have none.
        Raises TypeError where hidden states are expected and None are given, ValueError for another number of them.
        """
        if self.num_hidden and hidden_states is None:
            raise TypeError(f"hidden_states is None, the projection head takes num_hidden_inputs={self.num_hidden}")
        if self.num_hidden and len(hidden_states) != self.num_hidden:
            raise ValueError(f"hidden_states has {len(hidden_states)} tensors, the projection head takes num_hidden_inputs={self.num_hidden}")
        b, n_imgs, n_tiles, n, d = x.shape
        x = x.reshape(b * n_imgs, n_tiles * n, d)
        for layer in self.layers:
            x = layer(x) if mask is None else layer(x, mask=mask)
        x = x.view(b, n_imgs, n_tiles, n, d)[:, :, :, :n_tokens]
        if self.num_hidden:
            x = torch.cat([x, torch.stack(hidden_states, -1).flatten(-2)], -1)
        return self.output(x).flatten(1, 3)


class Llama3VisionEncoder(nn.Module):
    """projection(clip(images)): image tokens in the decoder's width. The projection's parameters are fusion parameters."""

    def __init__(self, clip: nn.Module, projection_head: nn.Module):
        super().__init__()
        self.clip = clip
        self.projection = projection_head
        register_fusion_module(self.projection)

    def forward(self, images: Tensor, aspect_ratio: Tensor | None = None) -> Tensor:
        """images: [b, n_imgs, n_tiles, c, tile_size, tile_size], aspect_ratio: int [b, n_imgs, 2]  ->  [b, n_imgs * n_tiles * n_tokens, d].

        Raises ValueError as VisionTransformer.forward.
        """
        if isinstance(self.clip, VisionTransformer) and self.clip.pad_tokens_to > 1:  # the padding goes through the head's layers as well
            x, hidden_states, mask = self.clip.encode(images, aspect_ratio)
            return self.projection(x, hidden_states, mask=mask, n_tokens=self.clip.get_image_tokens_per_tile())
        x, hidden_states = self.clip(images, aspect_ratio)
        return self.projection(x, hidden_states)
