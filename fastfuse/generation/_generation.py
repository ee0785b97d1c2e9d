"""Text generation: prefill, then a token at a time, with or without key-value caches, with or without images."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.errors import InvalidArgument
from fastfuse.modules.peft import norms_kept
from fastfuse.modules.transformer import ready_for_steps
from fastfuse.ops import EncoderMask


def sample(logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, q: Tensor | None = None) -> Tensor:
    """logits: [..., v]  ->  a token of each row, int32 [..., 1].

    temperature: 0 takes the likeliest. top_k: only tokens at least as likely as the k-th. q: exponential noise like logits,
    argmax(probs / q) being a draw from probs without waiting for the device (the Gumbel trick); drawn here where None.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, expected >= 0")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True).to(torch.int32)
    logits = logits / max(temperature, 1e-5)
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, expected >= 1")
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if q is None:
        q = _exponential(torch.rand_like(probs))
    return (probs / q).argmax(-1, keepdim=True).to(torch.int32)


def generate_next_token(
    model: nn.Module,
    input_pos: Tensor,
    x: Tensor,
    q: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    **encoder: Any,
) -> tuple[Tensor, Tensor]:
    """The next token of each row: (int32 [b, 1], logits [b, 1, v] of the last position).

    x: int [b, s], input_pos, mask and the keywords encoder_input and encoder_mask: as the model's forward; q, temperature,
    top_k: as sample.
    """
    logits = model(x, input_pos=input_pos, mask=mask, **encoder)[:, -1]
    return sample(logits, temperature=temperature, top_k=top_k, q=q), logits.unsqueeze(1)


def get_causal_mask_from_padding_mask(padding_mask: Tensor, target_seq_len: int | None = None) -> Tensor:
    """padding_mask: bool [b, s], True for tokens, False for padding  ->  bool [b, s, target_seq_len], causal, padding hidden.

    Padding sees itself, for a softmax over nothing is NaN. Raises ValueError where target_seq_len < s.
    """
    s = padding_mask.shape[-1]
    target = s if target_seq_len is None else target_seq_len
    if target < s:
        raise InvalidArgument(f"target_seq_len is {target}, shorter than the sequence of padding_mask, {s}")
    keys = torch.arange(target, device=padding_mask.device)
    queries = keys[:s, None]
    visible = F.pad(padding_mask, (0, target - s), value=False)[:, None, :]
    return (keys <= queries) & visible | (keys == queries)


def get_position_ids_from_padding_mask(padding_mask: Tensor) -> Tensor:
    """padding_mask: bool [b, s], True for tokens  ->  int32 [b, s], counted from each row's first token; 0 for padding."""
    return ((padding_mask.cumsum(-1) - 1) * padding_mask).to(torch.int32)


@torch.no_grad()
@norms_kept()  # nothing moves while it runs: a DoRA layer's norms are computed once, not for every token
def generate(
    model: nn.Module,
    prompt: Tensor | Sequence[Tensor],
    *,
    max_generated_tokens: int,
    pad_id: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_tokens: list[int] | None = None,
    rng: torch.Generator | None = None,
    compiled_generate_next_token: Callable | None = None,
    encoder_input: dict[str, Any] | Tensor | None = None,
    encoder_mask: Tensor | EncoderMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Extend each prompt by up to max_generated_tokens: (tokens [b, s + n] with the prompts, logits [b, n, v] of the new ones).

    prompt: int [s], [b, s] with shorter rows padded by pad_id on the left, or a list of 1-D tensors of any lengths, in which pad_id
    means nothing.
    encoder_input, encoder_mask [b, s, s_e], a tensor or an EncoderMask: images, as the model's forward takes them for the prompt; new
    tokens see what the prompt's last token sees. stop_tokens: a row that has made one of them goes on with pad_id and zero logits, and
    generation ends when all have. temperature, top_k: as sample. rng: where the noise comes from.
    Works a token at a time where the model's caches are enabled (they are emptied first and left full), else over the
    whole sequence at every step; images are encoded once either way. compiled_generate_next_token: generate_next_token,
    compiled, for the steps after the prompt.
    Raises ValueError where the tokens, the batch or the image tokens do not fit the model, its caches or each other, and where a
    row ends in pad_id.
    """
    prompt, is_token = _left_padded(prompt, pad_id)
    _check_sizes(model, prompt.shape, max_generated_tokens, encoder_input, encoder_mask)
    (b, s), cached = prompt.shape, model.caches_are_enabled()
    total = s + max_generated_tokens
    if cached:
        model.reset_caches()
    width = model.decoder_max_cache_seq_len if cached else total
    model, whole, alone = _told_of_images(model, encoder_input, encoder_mask, cached)
    is_token = F.pad(is_token, (0, max_generated_tokens), value=True)
    masks, positions = get_causal_mask_from_padding_mask(is_token, width), get_position_ids_from_padding_mask(is_token)
    stops = None if stop_tokens is None or not len(stop_tokens) else torch.tensor([int(t) for t in stop_tokens], device=prompt.device)
    stopped = torch.zeros(b, 1, dtype=torch.bool, device=prompt.device)
    tokens = prompt.masked_fill(~is_token[:, :s], 0)  # what the model sees: pad_id may lie outside the vocabulary
    padding, all_logits = [], []
    with _logits_of(getattr(model, "decoder", model)):
        for end in range(s, total):
            if cached and end > s:
                step, encoder = compiled_generate_next_token or generate_next_token, alone
                # A slice would have another stride at every step, and torch.compile make another graph of it.
                x = tokens[:, -1:].clone(memory_format=torch.contiguous_format)
                pos, mask = positions[:, end - 1], masks[:, end - 1 : end]
            else:
                step, encoder = generate_next_token, whole and whole | {"encoder_mask": _extended(whole["encoder_mask"], end)}
                x, pos, mask = tokens, positions[:, :end], masks[:, :end, : width if cached else end]
            q = None if rng is None else _exponential(torch.rand(b, _logits_width(model), generator=rng, device=prompt.device))
            made, logits = step(model, pos, x, q, mask=mask, temperature=temperature, top_k=top_k, **encoder)
            tokens = torch.cat([tokens, made.to(tokens.dtype)], 1)
            padding.append(stopped)
            all_logits.append(logits.masked_fill(stopped[:, :, None], 0))
            if stops is not None and (stopped := stopped | torch.isin(made, stops)).all():
                break
    return torch.cat([prompt, tokens[:, s:].masked_fill(torch.cat(padding, 1), pad_id)], 1), torch.cat(all_logits, 1)


def _check_sizes(model: nn.Module, prompt_shape: torch.Size, new: int, encoder_input: Any, encoder_mask: Tensor | EncoderMask | None) -> None:
    b, s = prompt_shape
    if new < 1:
        raise ValueError(f"max_generated_tokens is {new}, expected >= 1")
    if s + new > getattr(model, "max_seq_len", s + new):
        raise ValueError(f"prompt and max_generated_tokens are {s + new} tokens, max_seq_len of the model is {model.max_seq_len}")
    if (encoder_input is None) != (encoder_mask is None):
        given = "encoder_mask" if encoder_input is None else "encoder_input"
        raise ValueError(f"encoder_input and encoder_mask go together, only {given} is given")
    if encoder_mask is not None and encoder_mask.shape[:2] != (b, s):
        raise ValueError(f"encoder_mask has shape {tuple(encoder_mask.shape)}, the prompt has {b} rows of {s} tokens")
    if model.caches_are_enabled():
        _check_caches(model, b, s + new, encoder_mask)


def _told_of_images(model: nn.Module, encoder_input: Any, mask: Tensor | EncoderMask | None, cached: bool) -> tuple[nn.Module, dict, dict]:
    """The model for the text, and its keywords about images: with all tokens, and with a new one whose past is in caches."""
    if encoder_input is None:
        return model, {}, {}
    if not isinstance(encoder_input, Tensor):
        encoder_input = model.encoder(**encoder_input)
    model = getattr(model, "decoder", model)
    mask = _fitted(mask, encoder_input, model.encoder_max_cache_seq_len if cached else encoder_input.shape[1])
    alone = {"encoder_mask": _last_row(model, mask, encoder_input)} if cached else {}
    return model, {"encoder_input": encoder_input, "encoder_mask": mask}, alone


def _left_padded(prompt: Tensor | Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """(int [b, s], bool [b, s], True for tokens). In a list every element is a token, pad_id included."""
    if isinstance(prompt, Tensor):
        prompt = prompt[None] if prompt.dim() == 1 else prompt
        if prompt.dim() != 2 or 0 in prompt.shape:
            raise ValueError(f"prompt has shape {tuple(prompt.shape)}, expected (s,) or (b, s) with at least one token")
        is_token = (prompt != pad_id).cumsum(1) > 0  # pad_id after a row's first token is a token
        wrong = (prompt[:, -1] == pad_id).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(f"prompt row {wrong[0]} ends in pad_id={pad_id}: pad on the left, or pass a list of prompts")
        return prompt, is_token
    wrong = [tuple(p.shape) for p in prompt if p.dim() != 1 or p.shape[0] == 0]
    if wrong or not prompt:
        raise ValueError(f"prompt is a list of {len(prompt)} tensors, expected 1-D tensors of at least one token; found shapes {wrong}")
    s = max(len(p) for p in prompt)
    tokens = torch.stack([F.pad(p, (s - len(p), 0), value=pad_id) for p in prompt])
    lengths = torch.tensor([len(p) for p in prompt], device=tokens.device)
    return tokens, torch.arange(s, device=tokens.device) >= s - lengths[:, None]


def _check_caches(model: nn.Module, b: int, total: int, encoder_mask: Tensor | EncoderMask | None) -> None:
    if total > model.decoder_max_cache_seq_len:
        raise ValueError(f"prompt and max_generated_tokens are {total} tokens, decoder_max_seq_len of the caches is {model.decoder_max_cache_seq_len}")
    if encoder_mask is not None and encoder_mask.shape[2] > model.encoder_max_cache_seq_len:
        raise ValueError(f"encoder_mask has {encoder_mask.shape[2]} image tokens, encoder_max_seq_len of the caches is {model.encoder_max_cache_seq_len}")
    caches = [m.kv_cache for m in model.modules() if isinstance(getattr(m, "kv_cache", None), nn.Module)]
    if caches and caches[0].batch_size != b:
        raise ValueError(f"prompt has {b} rows, the caches are set up for a batch of {caches[0].batch_size}")


def _fitted(mask: Tensor | EncoderMask, encoder_input: Tensor, width: int) -> Tensor | EncoderMask:
    """The mask as wide as the caches, whose tail nobody sees."""
    b, s_e = encoder_input.shape[:2]
    if b != mask.shape[0]:
        raise ValueError(f"encoder_input has {b} rows, the prompt has {mask.shape[0]}")
    if mask.shape[2] < s_e or mask.shape[2] > width:
        raise ValueError(f"encoder_mask has {mask.shape[2]} columns, encoder_input has {s_e} tokens")
    if isinstance(mask, EncoderMask):
        return mask.widened(width)
    return F.pad(mask, (0, width - mask.shape[2]), value=False if mask.dtype == torch.bool else -torch.inf)


def _last_row(decoder: nn.Module, mask: Tensor | EncoderMask, x: Tensor) -> Tensor | EncoderMask:
    """What new tokens see, [b, 1, s_e], made once for all steps; x: of the model's device and dtype."""
    last = mask.last_row() if isinstance(mask, EncoderMask) else mask[:, -1:].contiguous()
    return ready_for_steps(decoder, last, x)


@contextlib.contextmanager
def _logits_of(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder gives logits: a loss may have asked it for hidden states or chunks, which is given back on leaving."""
    asked = {name: getattr(decoder, name) for name in ("skip_output_layer", "num_output_chunks", "output_hidden_states") if hasattr(decoder, name)}
    for name, value in asked.items():
        setattr(decoder, name, type(value)())
    try:
        yield
    finally:
        for name, value in asked.items():
            setattr(decoder, name, value)


def _extended(encoder_mask: Tensor | EncoderMask, length: int) -> Tensor | EncoderMask:
    """[b, s, s_e] -> [b, length, s_e], the last row repeated."""
    if isinstance(encoder_mask, EncoderMask):
        return encoder_mask.extended(length)
    new = length - encoder_mask.shape[1]
    return torch.cat([encoder_mask, encoder_mask[:, -1:].expand(-1, new, -1)], 1) if new else encoder_mask


def _exponential(uniform: Tensor) -> Tensor:
    """Uniform noise in 0..1 -> exponential noise, never 0: a division by it would win every draw."""
    smallest = torch.finfo(uniform.dtype).eps / 2
    return torch.where(uniform >= 1 - smallest, smallest, -uniform.log())


def _logits_width(model: nn.Module) -> int:
    """The vocabulary of the logits; embeddings may have more rows, for tokens that are never predicted."""
    weight = getattr(model.output, "weight", None)
    if weight is None:
        weight = model.output.tied_module.weight
    return weight.shape[0]
