"""Which transformers layers make up each layer of the decoder."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastfuse.errors import InvalidArgument


@dataclass(frozen=True)
class LayerEntry:
    """One entry of the decoder's `layers`, with the positions of its parts among all layers of transformers' model.

    ("self", hf_self): a TransformerSelfAttentionLayer.  ("fusion", hf_cross, hf_self): a FusionLayer that runs the
    cross-attention layer first.  ("cross", hf_cross): a TransformerCrossAttentionLayer that no self-attention layer follows.
    """

    hf_cross: int | None = None
    hf_self: int | None = None

    @property
    def kind(self) -> str:
        if self.hf_cross is None:
            return "self"
        return "cross" if self.hf_self is None else "fusion"


def layer_plan(num_hidden_layers: int, cross_attention_layers: Iterable[int]) -> list[LayerEntry]:
    """The decoder's layers for a transformers config that counts cross-attention layers among all its layers.

    A cross-attention layer and the self-attention layer right after it become one FusionLayer; without one after it
    (last, or before another cross-attention layer) it stands alone. For 11B, 40 and [3, 8, ..., 38], that is torchtune's
    layout: 32 layers of which 3, 7, ..., 31 are fusion layers.  Raises InvalidArgument for a position that is no layer.
    """
    cross = set(cross_attention_layers)
    if bad := sorted(i for i in cross if not 0 <= i < num_hidden_layers):
        raise InvalidArgument(f"layer_plan: cross_attention_layers has {bad}, the layers are 0 to {num_hidden_layers - 1}")
    plan, i = [], 0
    while i < num_hidden_layers:
        if i not in cross:
            plan.append(LayerEntry(hf_self=i))
        elif i + 1 < num_hidden_layers and i + 1 not in cross:
            plan.append(LayerEntry(hf_cross=i, hf_self=i + 1))
            i += 1
        else:
            plan.append(LayerEntry(hf_cross=i))
        i += 1
    return plan
