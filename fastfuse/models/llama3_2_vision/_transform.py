"""From a conversation with images to what the model takes: token ids, tiles, and which text sees which image."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastfuse.data.llama3_tokenizer import Llama3Tokenizer, TextTokenizer, load_special_tokens
from fastfuse.data.messages import Message
from fastfuse.data.transforms import CLIPImageTransform, VisionCrossAttentionMask

# What the vision encoder was trained with: CLIP's.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

PromptTemplate = Mapping[str, tuple[str, str]] | Callable[..., Sequence[Any]]


class Llama3VisionTransform:
    """Tokenize a conversation, cut its images into tiles, and mask which text sees which image.

    Images are PIL images as they are stored (a camera's EXIF orientation is for the caller to apply) or tensors;
    transparency is laid over white. See `fastfuse.data.transforms.image_to_tensor`.
    path: of a Llama 3 tokenizer.model (needs tiktoken), or an object with encode and decode, see `TextTokenizer`.
    tile_size, patch_size: pixels.  max_num_tiles: tiles of an image at most.  max_seq_len: tokens, cut beyond.
    special_tokens_path: a Hugging Face tokenizer.json to take the ids of special tokens from.
    image_mean, image_std: one value a channel, both or none.  prompt_template: see `Llama3Tokenizer`.
    """

    def __init__(
        self,
        path: str | os.PathLike | TextTokenizer,
        *,
        tile_size: int,
        patch_size: int,
        max_num_tiles: int = 4,
        special_tokens_path: str | os.PathLike | None = None,
        max_seq_len: int | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        prompt_template: PromptTemplate | None = None,
    ):
        special_tokens = None if special_tokens_path is None else load_special_tokens(special_tokens_path)
        self.tokenizer = Llama3Tokenizer(path, special_tokens, max_seq_len, prompt_template)
        self.transform_image = CLIPImageTransform(image_mean=image_mean, image_std=image_std, tile_size=tile_size, max_num_tiles=max_num_tiles)
        self.xattn_mask = VisionCrossAttentionMask(tile_size, patch_size, self.tokenizer.image_id)
        self.special_tokens, self.stop_tokens, self.pad_id = self.tokenizer.special_tokens, self.tokenizer.stop_tokens, self.tokenizer.pad_id
        self.max_seq_len, self.prompt_template = max_seq_len, prompt_template
        self.max_num_tiles = max_num_tiles
        self.image_seq_len = max_num_tiles * (self.xattn_mask.patches_per_tile + 1)

    @property
    def base_vocab_size(self) -> int:
        """Ids of plain text."""
        return self.tokenizer.base_vocab_size

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, the image token included."""
        return self.tokenizer.vocab_size

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Ids of a text, see `Llama3Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_bos, add_eos)

    def decode(self, token_ids: Iterable[int], truncate_at_eos: bool = True, skip_special_tokens: bool = True) -> str:
        """The text of ids, see `Llama3Tokenizer.decode`."""
        return self.tokenizer.decode(token_ids, truncate_at_eos, skip_special_tokens)

    def tokenize_message(self, message: Any, *, add_start_tokens: bool = True, add_end_tokens: bool = True) -> list[int]:
        """Ids of one turn, see `Llama3Tokenizer.tokenize_message`."""
        return self.tokenizer.tokenize_message(message, add_start_tokens=add_start_tokens, add_end_tokens=add_end_tokens)

    def tokenize_messages(self, messages: Sequence[Any], *, add_end_tokens: bool = True) -> tuple[list[int], list[bool]]:
        """Ids of a conversation and which of them are not trained on, see `Llama3Tokenizer.tokenize_messages`."""
        return self.tokenizer.tokenize_messages(messages, add_end_tokens=add_end_tokens)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """The sample with its "messages" replaced by what the model takes; inference leaves the last turn open.

        tokens: ids.  mask: bools, True is not trained on.  encoder_input: {"images": [[t, 3, tile_size, tile_size], ...],
        "aspect_ratio": [[2], ...]}.  encoder_mask: for each image a bool [tokens, t * n], see `VisionCrossAttentionMask`.
        Raises RuntimeError where max_seq_len cuts an image token away.
        """
        messages = [Message.of(message) for message in sample["messages"]]
        result = self.tokenizer({**sample, "messages": messages}, inference)
        media = [image for message in messages for image in message.get_media()]
        if (kept := result["tokens"].count(self.tokenizer.image_id)) != len(media):  # before the work on images
            cut = "" if self.max_seq_len is None else f" max_seq_len {self.max_seq_len} cuts the conversation before its last image token."
            raise RuntimeError(f"The number of image tokens ({kept}) does not match the number of images ({len(media)}).{cut}")
        images = [self.transform_image({"image": image}, inference) for image in media]
        result["encoder_input"] = {"images": [i["image"] for i in images], "aspect_ratio": [i["aspect_ratio"] for i in images]}
        return self.xattn_mask(result, inference)


def llama3_2_vision_transform(
    path: str | os.PathLike | TextTokenizer,
    max_seq_len: int = 8192,
    image_size: int = 560,
    special_tokens_path: str | os.PathLike | None = None,
    prompt_template: PromptTemplate | None = None,
) -> Llama3VisionTransform:
    """The transform of Llama 3.2 Vision 11B and 90B: tiles of image_size pixels, patches of 14, at most 4 tiles an image."""
    return Llama3VisionTransform(
        path,
        tile_size=image_size,
        patch_size=14,
        max_num_tiles=4,
        special_tokens_path=special_tokens_path,
        max_seq_len=max_seq_len,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
        prompt_template=prompt_template,
    )
