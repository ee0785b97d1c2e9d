"""The Llama 3 chat format over any tokenizer of plain text: headers, ends of turns, images, and what is trained on."""

import base64
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from fastfuse.data.messages import Message
from fastfuse.errors import InvalidArgument

BOS, EOS, PAD, STEP = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|step_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
EOM, EOT, PYTHON, IMAGE, VIDEO = "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>", "<|video|>"
REQUIRED = (BOS, EOS, PAD, START_HEADER, END_HEADER, EOM, EOT, PYTHON, IMAGE)

# How Llama 3 splits text before merging bytes: a constant of its vocabulary.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _special_tokens() -> dict[str, int]:
    named = {128000: BOS, 128001: EOS, 128004: PAD, 128005: STEP, 128006: START_HEADER, 128007: END_HEADER, 128008: EOM, 128009: EOT}
    named |= {128010: PYTHON, 128012: VIDEO, 128256: IMAGE}
    free = [i for i in range(128000, 128256) if i not in named and i != 128011]
    free.append(128011)  # torchtune leaves it out of the count
    named |= {i: f"<|reserved_special_token_{n}|>" for n, i in enumerate(free)}
    return {named[i]: i for i in sorted(named)}


LLAMA3_SPECIAL_TOKENS = _special_tokens()


@runtime_checkable
class TextTokenizer(Protocol):
    """What fastfuse asks of a tokenizer: ids for a plain text, and the text for such ids.

    transformers', tokenizers', tiktoken's and torchtune's do: they are called so that they add no special tokens.
    One with an attribute `special_tokens`, {"<|image|>": id, ...}, brings its own ids for the tokens of the chat format.
    """

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


def load_tiktoken(path: str | os.PathLike) -> TextTokenizer:
    """A tokenizer from a Llama 3 tokenizer.model: lines of a base64 token and its rank. Needs the package tiktoken."""
    _no_folder("tokenizer path", path, ("tokenizer.model", "original/tokenizer.model"))
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(f"reading {os.fspath(path)} needs tiktoken: pip install tiktoken, or pass a tokenizer instead of a path") from error
    ranks = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise InvalidArgument(
                    f"{os.fspath(path)} is no Llama 3 tokenizer.model: line {number} is {line[:40]!r}, not a base64 token and its rank"
                ) from None
    if not ranks:
        raise InvalidArgument(f"{os.fspath(path)} is no Llama 3 tokenizer.model: it is empty")
    return tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})


def load_special_tokens(path: str | os.PathLike) -> dict[str, int]:
    """The special tokens {text: id} that a Hugging Face tokenizer.json lists under "added_tokens"."""
    _no_folder("special_tokens_path", path, ("tokenizer.json",))
    with open(path, encoding="utf-8") as file:
        try:
            return {token["content"]: token["id"] for token in json.load(file)["added_tokens"]}
        except (ValueError, KeyError, TypeError):
            raise InvalidArgument(f"special_tokens_path {os.fspath(path)} is no tokenizer.json with a list of added_tokens") from None


def _no_folder(argument: str, path: str | os.PathLike, names: Sequence[str]) -> None:
    """A folder is refused, not searched: its files may be of two tokenizers, and open() says no more than "Is a directory"."""
    if os.path.isdir(path):
        found = [os.path.join(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
        raise InvalidArgument(f"{argument} {os.fspath(path)} is a folder, expected {'the file ' + found[0] if found else f'a {names[0]} file'}")


class Llama3Tokenizer:
    """Token ids for text and for conversations, in the chat format of Llama 3.

    tokenizer: path of a tokenizer.model, or a `TextTokenizer`.  special_tokens: {text: id}, Llama 3's where None.
    max_seq_len: tokens a conversation is cut to.  prompt_template: {role: (text before, text after)}, or a function
    (messages, inference=...) -> messages.  Raises ValueError where special_tokens lacks one of the chat format.
    """

    def __init__(
        self,
        tokenizer: str | os.PathLike | TextTokenizer,
        special_tokens: Mapping[str, int] | None = None,
        max_seq_len: int | None = None,
        prompt_template: Mapping[str, tuple[str, str]] | Callable[..., Sequence[Any]] | None = None,
    ):
        text = load_tiktoken(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer
        if not isinstance(text, TextTokenizer):
            raise TypeError(f"Llama3Tokenizer: tokenizer is {type(text).__name__}, neither a path nor an object with encode and decode")
        if max_seq_len is not None and max_seq_len < 1:
            raise InvalidArgument(f"Llama3Tokenizer: max_seq_len is {max_seq_len}, not at least 1")
        if not (prompt_template is None or callable(prompt_template) or isinstance(prompt_template, Mapping)):
            raise TypeError(f"Llama3Tokenizer: prompt_template is {prompt_template!r}, neither a dict by role nor a function of messages")
        self.text_tokenizer = text
        self._encode, self._decode = _plain(text.encode), _plain(text.decode)
        self.special_tokens = dict(special_tokens or getattr(text, "special_tokens", None) or LLAMA3_SPECIAL_TOKENS)
        if missing := [name for name in REQUIRED if name not in self.special_tokens]:
            raise InvalidArgument(f"Llama3Tokenizer: special_tokens lacks {', '.join(missing)}")
        self.max_seq_len, self.prompt_template = max_seq_len, prompt_template
        self.bos_id, self.eos_id, self.pad_id = (self.special_tokens[name] for name in (BOS, EOS, PAD))
        self.eot_id, self.eom_id, self.python_tag = (self.special_tokens[name] for name in (EOT, EOM, PYTHON))
        self.start_header_id, self.end_header_id, self.image_id = (self.special_tokens[name] for name in (START_HEADER, END_HEADER, IMAGE))
        self.stop_tokens = [self.eos_id, self.eot_id, self.eom_id]
        self._names = {i: name for name, i in self.special_tokens.items()}

    @property
    def base_vocab_size(self) -> int:
        """Ids of plain text, those below the special tokens."""
        return min(self.special_tokens.values())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.special_tokens.values()) + 1

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Ids of a text. What looks like a special token in it is plain text."""
        return [self.bos_id] * add_bos + self._plain_ids(text) + [self.eos_id] * add_eos

    def decode(self, token_ids: Iterable[int], truncate_at_eos: bool = True, skip_special_tokens: bool = True) -> str:
        """The text of ids, up to the first end_of_text if truncate_at_eos, without special tokens and headers if skip_special_tokens."""
        ids = [int(i) for i in token_ids]
        if truncate_at_eos and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        pieces, run, header = [], [], None
        for i in [*ids, None]:
            if i is not None and i not in self._names:
                run.append(i)
                continue
            text = self._decode(run) if run else ""
            if skip_special_tokens and header == self.end_header_id:
                text = text.removeprefix("\n\n")
            if not (skip_special_tokens and header == self.start_header_id and i == self.end_header_id):
                pieces.append(text)
            if i is not None and not skip_special_tokens:
                pieces.append(self._names[i])
            run, header = [], i
        return "".join(pieces)

    def tokenize_message(self, message: Any, *, add_start_tokens: bool = True, add_end_tokens: bool = True) -> list[int]:
        """Ids of one turn: its header if add_start_tokens, its text and images, and its eot or eom if add_end_tokens."""
        message = Message.of(message)
        ids = []
        if add_start_tokens:
            # the model has learned what tools return under the name ipython
            role = "ipython" if message.role == "tool" else message.role
            ids += [self.start_header_id, *self._plain_ids(role), self.end_header_id, *self._plain_ids("\n\n")]
        if message.ipython:
            ids.append(self.python_tag)
        for item in message.content:
            ids += [self.image_id] if item["type"] == "image" else self._plain_ids(item["content"].strip())
        if add_end_tokens:
            ids.append(self.eot_id if message.eot else self.eom_id)
        return ids

    def tokenize_messages(self, messages: Sequence[Any], *, add_end_tokens: bool = True) -> tuple[list[int], list[bool]]:
        """Ids of a conversation cut to max_seq_len, and for each whether it is masked: not trained on.

        Masked are begin_of_text, end_of_text, the turns marked so, and all image tokens: the model has no output for them.
        Without add_end_tokens the last turn stays open and end_of_text away, for inference. A cut conversation ends in
        end_of_text all the same.
        """
        messages = self._templated(messages, inference=not add_end_tokens)
        ids, mask = [self.bos_id], [True]
        for n, message in enumerate(messages, 1):
            turn = self.tokenize_message(message, add_end_tokens=add_end_tokens or n < len(messages))
            ids += turn
            mask += [message.masked or i == self.image_id for i in turn]
        if add_end_tokens:
            ids.append(self.eos_id)
            mask.append(True)
        if self.max_seq_len is not None and len(ids) > self.max_seq_len:
            ids, mask = ids[: self.max_seq_len], mask[: self.max_seq_len]
            if add_end_tokens:
                ids[-1], mask[-1] = self.eos_id, True
        return ids, mask

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """The sample with its "messages" replaced by "tokens" and "mask"."""
        tokens, mask = self.tokenize_messages(sample["messages"], add_end_tokens=not inference)
        return {**{key: value for key, value in sample.items() if key != "messages"}, "tokens": tokens, "mask": mask}

    def _templated(self, messages: Sequence[Any], inference: bool) -> list[Message]:
        template = self.prompt_template
        if callable(template):
            messages = template(messages, inference=inference)
        messages = [Message.of(message) for message in messages]
        if isinstance(template, Mapping):
            messages = [_between(message, *template.get(message.role, ("", ""))) for message in messages]
        return messages

    def _plain_ids(self, text: str) -> list[int]:
        ids = self._encode(text)
        ids = list(getattr(ids, "ids", ids))  # tokenizers' returns an Encoding
        if special := [i for i in ids if i in self._names]:
            raise InvalidArgument(f"Llama3Tokenizer: the tokenizer made the special token {self._names[special[0]]} of the text {text[:60]!r}")
        return ids


def _between(message: Message, before: str, after: str) -> Message:
    content = [{"type": "text", "content": before}, *message.content, {"type": "text", "content": after}]
    content = [item for item in content if item["content"] != ""]
    return Message(message.role, content, message.masked, message.ipython, message.eot)


# What each library calls the options that keep its tokenizer from adding or reading special tokens.
_PLAIN_OPTIONS = {
    "add_special_tokens": False,
    "add_bos": False,
    "add_eos": False,
    "disallowed_special": (),
    "skip_special_tokens": False,
    "truncate_at_eos": False,
}


def _plain(function: Callable) -> Callable:
    """`function` with the options, of those it has, that make it deal in plain text alone."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return function
    options = {name: value for name, value in _PLAIN_OPTIONS.items() if name in parameters}
    if "add_special_tokens" in options and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        options["split_special_tokens"] = True  # transformers', which reads <|image|> in a text as an image otherwise
    return functools.partial(function, **options)  # no lambda: data loaders pickle transforms
