"""A pretrained encoder fused into the layers of a pretrained decoder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.modules.model_fusion._fusion_utils import get_fusion_params
from fastfuse.modules.peft import set_trainable_params
from fastfuse.ops import EncoderMask


class DeepFusionModel(nn.Module):
    """decoder(tokens, encoder_input=encoder(**encoder_input)), with the interface of TransformerDecoder.

    How the two are fused is the decoder's matter: FusionLayer and FusionEmbedding in it, register_fusion_module on the
    encoder's projection. The three flags set requires_grad of every parameter; fusion_trainable rules the fusion parameters,
    whichever part they are in. With LoRA, base weights are marked too: call set_trainable_params(model,
    get_adapter_params(model)) afterwards.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        *,
        decoder_trainable: bool = False,
        encoder_trainable: bool = False,
        fusion_trainable: bool = True,
    ):
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        trainable = set()
        for part, is_trainable in (("encoder", encoder_trainable), ("decoder", decoder_trainable)):
            if is_trainable:
                trainable |= {f"{part}.{name}" for name, _ in getattr(self, part).named_parameters()}
        fusion = set(get_fusion_params(self))
        set_trainable_params(self, trainable | fusion if fusion_trainable else trainable - fusion)

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """As TransformerDecoder.set_num_output_chunks: deprecated."""
        self.decoder.set_num_output_chunks(num_output_chunks)

    def setup_caches(self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int | None = None, decoder_max_seq_len: int | None = None) -> None:
        """As TransformerDecoder.setup_caches."""
        self.decoder.setup_caches(batch_size, dtype, encoder_max_seq_len=encoder_max_seq_len, decoder_max_seq_len=decoder_max_seq_len)

    def caches_are_setup(self) -> bool:
        """As TransformerDecoder.caches_are_setup."""
        return self.decoder.caches_are_setup()

    def caches_are_enabled(self) -> bool:
        """As TransformerDecoder.caches_are_enabled."""
        return self.decoder.caches_are_enabled()

    def reset_caches(self) -> None:
        """As TransformerDecoder.reset_caches."""
        self.decoder.reset_caches()

    @property
    def output(self):
        """The decoder's output projection."""
        return self.decoder.output

    @property
    def skip_output_layer(self) -> bool:
        """Whether forward returns normed hidden states in place of logits."""
        return self.decoder.skip_output_layer

    @skip_output_layer.setter
    def skip_output_layer(self, skip: bool) -> None:
        self.decoder.skip_output_layer = skip

    @property
    def max_seq_len(self) -> int:
        return self.decoder.max_seq_len

    @property
    def encoder_max_cache_seq_len(self) -> int | None:
        return self.decoder.encoder_max_cache_seq_len

    @property
    def decoder_max_cache_seq_len(self) -> int | None:
        return self.decoder.decoder_max_cache_seq_len

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        encoder_input: dict[str, Any] | None = None,
        encoder_mask: Tensor | EncoderMask | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """tokens: int [b, s], encoder_input: a dict of the encoder's keyword arguments  ->  as TransformerDecoder.forward.

        mask: [b or 1, s, s_k], encoder_mask: [b, s, s_e] over the encoder's tokens, a tensor or an EncoderMask, input_pos: [b, s].
        """
        if encoder_input is not None and not isinstance(encoder_input, Mapping):
            raise TypeError(f"encoder_input is a {type(encoder_input).__name__}, expected a dict of the encoder's keyword arguments")
        encoded = None if encoder_input is None else self.encoder(**encoder_input)
        return self.decoder(tokens=tokens, mask=mask, encoder_input=encoded, encoder_mask=encoder_mask, input_pos=input_pos)
