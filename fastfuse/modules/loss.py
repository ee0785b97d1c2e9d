"""Cross-entropy over a large vocabulary, chunk by chunk."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


class CEWithChunkedOutputLoss(nn.Module):
    """Deprecated: mean cross-entropy of a list of logits chunks, each widened to fp32 by itself.

    The model must return chunks: set_model_output, or model.set_num_output_chunks(num_output_chunks). NaN where every
    label is ignore_index.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100):
        super().__init__()
        warnings.warn("CEWithChunkedOutputLoss is deprecated: use LinearCrossEntropyLoss", FutureWarning, stacklevel=2)
        self.num_output_chunks = num_output_chunks
        self.ignore_index = ignore_index

    def set_model_output(self, model: nn.Module) -> None:
        model.set_num_output_chunks(self.num_output_chunks)

    def compute_cross_entropy(self, logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """logits: [n, v], labels: int [n]  ->  the sum, in fp32 (fp64 for fp64)."""
        return F.cross_entropy(_wide(logits), labels, ignore_index=self.ignore_index, reduction="sum")

    def apply_compile_strategy(self, *args, **kwargs) -> nn.Module:
        """Compile the part that sees one chunk; the whole would hold all of them. Returns self."""
        self.compute_cross_entropy = torch.compile(self.compute_cross_entropy, *args, **kwargs)
        return self

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """logits: chunks [b, s_i, v] of any lengths, labels: int [b, s]  ->  mean over the valid labels."""
        total = sum(
            self.compute_cross_entropy(chunk.flatten(0, 1), part.flatten())
            for chunk, part in zip(logits, labels.split([chunk.shape[1] for chunk in logits], dim=1), strict=True)
        )
        return total / (labels != self.ignore_index).sum()


class LinearCrossEntropyLoss(nn.Module):
    """Mean cross-entropy of hidden states: the output projection runs chunk by chunk in here, so that the logits of all
    tokens never exist at once.

    set_model_output(model) makes the model return hidden states and takes its output projection. Labels are not shifted.
    mask_ignored_tokens drops tokens with ignore_index before the projection, which waits for the device once.
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100, tp_enabled: bool = False, mask_ignored_tokens: bool = True):
        super().__init__()
        self.linear_projection = None
        self.num_output_chunks = num_output_chunks
        self.ignore_index = ignore_index
        self.tp_enabled = tp_enabled
        self.mask_ignored_tokens = mask_ignored_tokens

    def set_model_output(self, model: nn.Module) -> None:
        model.skip_output_layer = True
        self.linear_projection = model.output

    def apply_compile_strategy(self, *args, **kwargs) -> nn.Module:
        """Compile the part that sees one chunk; the whole would hold all of them. Returns self."""
        self.compute_cross_entropy = torch.compile(self.compute_cross_entropy, *args, **kwargs)
        return self

    def compute_cross_entropy(self, hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        """hidden_chunk: [n, d], target_chunk: int [n]  ->  the sum, in fp32 (fp64 for fp64)."""
        if self.linear_projection is None:
            raise AttributeError("forward called before update_model: call set_model_output(model) first")
        logits = self.linear_projection(hidden_chunk)
        if self.tp_enabled:
            logits = logits.full_tensor()
        return F.cross_entropy(_wide(logits), target_chunk, ignore_index=self.ignore_index, reduction="sum")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """outputs: hidden states [b, s, d], targets: int [b, s]  ->  mean over the valid targets, 0 where there are none."""
        if self.linear_projection is None:
            raise AttributeError("forward called before update_model: call set_model_output(model) first")
        if outputs.shape[:-1] != targets.shape:
            raise ValueError(f"outputs has shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}: expected (b, s, d) and (b, s)")
        hidden, targets = outputs.flatten(0, 1), targets.flatten()
        valid = targets != self.ignore_index
        if self.mask_ignored_tokens and not torch.compiler.is_compiling():
            kept = valid.nonzero().squeeze(1)
            hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
        total = _wide(outputs[..., :0]).sum()  # zero; keeps a graph where no target is valid
        for chunk, part in zip(hidden.tensor_split(self.num_output_chunks), targets.tensor_split(self.num_output_chunks), strict=True):
            if chunk.shape[0]:
                total = total + self.compute_cross_entropy(chunk, part)
        return total / valid.sum().clamp(min=1)
