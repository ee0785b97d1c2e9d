"""Conversations to tokens, tiles and masks: Llama 3's chat format in words, and the ids torchtune 0.6.1 gives for it. To batches: test_examples.py."""

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import skimage.data
import tokenizers
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastfuse.data import CLIPImageTransform, Llama3Tokenizer, Message
from fastfuse.data.llama3_tokenizer import LLAMA3_SPECIAL_TOKENS, REQUIRED, load_tiktoken
from fastfuse.data.transforms import VisionCrossAttentionMask
from fastfuse.errors import InvalidArgument
from fastfuse.models.llama3_2_vision._transform import IMAGE_MEAN, IMAGE_STD, Llama3VisionTransform, llama3_2_vision_transform

PHOTO = Image.fromarray(skimage.data.chelsea())  # 451 x 300
IMAGE, BOS, EOS, EOT, EOM, START, END, PYTHON = 128256, 128000, 128001, 128009, 128008, 128006, 128007, 128010


@pytest.fixture(scope="session")
def llama():
    """Over the real vocabulary: 128000 tokens, in the llama-models wheel."""
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models, which carries Llama 3's tokenizer.model, is not installed")
    return llama3_2_vision_transform(Path(spec.origin).parent / "llama3" / "tokenizer.model")


class Bytes:
    """The smallest tokenizer of plain text: a byte an id, special tokens above."""

    special_tokens = {name: 256 + i for i, name in enumerate(REQUIRED)}  # noqa: RUF012

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def small(tokenizer=None, **options):
    return Llama3VisionTransform(tokenizer or Bytes(), tile_size=28, patch_size=14, **options)


def said(error, make, *args, **options):
    """The words of the error that a call ends in."""
    with pytest.raises(error) as raised:
        make(*args, **options)
    return str(raised.value)


TOOL_TALK = [
    {"role": "user", "content": "hi", "masked": True},
    {"role": "assistant", "content": "yo", "eot": False},
    {"role": "assistant", "content": "print(1)", "ipython": True, "eot": False},
    {"role": "ipython", "content": "1", "eot": False},
    {"role": "assistant", "content": "done"},
]
TOOL_TALK_IDS = [
    *(BOS, START, 882, END, 271, 6151, EOT),
    *(START, 78191, END, 271, 16417, EOM),
    *(START, 78191, END, 271, PYTHON, 1374, 7, 16, 8, EOM),
    *(START, 23799, 4690, END, 271, 16, EOM),
    *(START, 78191, END, 271, 10655, EOT, EOS),
]
TOOL_TALK_MASK = [True] * 7 + [False] * 29 + [True]


def ask(*content, answer="A cat."):
    content = [{"type": "text" if isinstance(item, str) else "image", "content": item} for item in content]
    return [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": content, "masked": True}, {"role": "assistant", "content": answer}]


def test_ids_of_torchtune(llama):
    assert llama.tokenize_messages(TOOL_TALK) == (TOOL_TALK_IDS, TOOL_TALK_MASK)
    assert llama.tokenize_messages(TOOL_TALK, add_end_tokens=False) == (TOOL_TALK_IDS[:-2], TOOL_TALK_MASK[:-2])
    ids, mask = llama.tokenize_messages(ask(PHOTO, "What is  this?\n", answer="A dog."))
    system, user = [START, 9125, END, 271, 3513, 10015, 13, EOT], [START, 882, END, 271, IMAGE, 3923, 374, 220, 420, 30, EOT]
    assert ids == [BOS, *system, *user, START, 78191, END, 271, 32, 5679, 13, EOT, EOS]
    assert mask == [True] + [False] * len(system) + [True] * len(user) + [False] * 8 + [True]
    assert llama.encode("Héllo <|image|> 你好 🎉") == [BOS, 39, 19010, 385, 83739, 1843, 91, 29, 118195, 53901, 11410, 236, 231, EOS]
    assert llama.encode("  hello <|eot_id|> world \n", add_eos=False) == [BOS, 220, 24748, 83739, 68, 354, 851, 91, 29, 1917, 720]
    hi = {"role": "user", "content": " hi  "}
    assert llama.tokenize_message(hi, add_start_tokens=False) == [6151, EOT]
    assert llama.tokenize_message(hi, add_end_tokens=False) == [START, 882, END, 271, 6151]


def test_what_the_ids_say(llama):
    ids, _ = llama.tokenize_messages(ask(PHOTO, "What is this?"))
    assert llama.decode(ids, truncate_at_eos=False, skip_special_tokens=False) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|image|>What is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|><|end_of_text|>"
    )
    assert llama.decode([*ids, 15339]) == "Be brief.What is this?A cat." and llama.decode([*ids, 15339], truncate_at_eos=False).endswith("A cat.hello")
    assert llama.decode([EOS]) == llama.decode([]) == ""
    tool = {"role": "tool", "content": "1"}
    assert llama.tokenize_message(tool) == llama.tokenize_message(tool | {"role": "ipython"})  # the name the model was trained with


def test_names_and_numbers(llama):
    assert (llama.base_vocab_size, llama.vocab_size, llama.pad_id) == (128000, 128257, 128004)
    assert llama.stop_tokens == [EOS, EOT, EOM]
    assert (llama.max_num_tiles, llama.image_seq_len, llama.max_seq_len) == (4, 6404, 8192)
    assert llama.special_tokens == LLAMA3_SPECIAL_TOKENS and sorted(LLAMA3_SPECIAL_TOKENS.values()) == list(range(128000, 128257))
    named = {"<|reserved_special_token_0|>": 128002, "<|reserved_special_token_2|>": 128013, "<|reserved_special_token_244|>": 128255, "<|image|>": IMAGE}
    assert named.items() <= LLAMA3_SPECIAL_TOKENS.items()


@pytest.mark.parametrize("text", ["  two  spaces ", "<|image|><|eot_id|>", "日本語 🎉 ß e\u0301", "1234567\r\n\tx", "", "don't"])
def test_text_comes_back(llama, text):
    """What looks like a special token is text, and stays."""
    ids = llama.encode(text)
    assert ids[0] == BOS and ids[-1] == EOS and max(ids[1:-1], default=0) < 128000
    assert llama.decode(ids) == llama.decode(torch.tensor(ids)) == text


def test_image_tokens_are_never_trained_on():
    """The model has no output for the image token, so it cannot be a label."""
    ids, mask = small().tokenize_messages([{"role": "user", "content": ask(PHOTO, "a")[1]["content"]}])
    masked = [i for i, hidden in zip(ids, mask, strict=True) if hidden]
    assert masked == [Bytes.special_tokens[f"<|{name}|>"] for name in ("begin_of_text", "image", "end_of_text")]


def test_cut_conversations(llama):
    for length in (1, 3, 12, 16, 36, 37, 100):
        tokenizer = Llama3Tokenizer(llama.tokenizer.text_tokenizer, max_seq_len=length)
        kept = min(length, 37) - 1
        assert tokenizer.tokenize_messages(TOOL_TALK) == ([*TOOL_TALK_IDS[:kept], EOS], [*TOOL_TALK_MASK[:kept], True])
        kept = min(length, 35)
        assert tokenizer.tokenize_messages(TOOL_TALK, add_end_tokens=False) == (TOOL_TALK_IDS[:kept], TOOL_TALK_MASK[:kept])


@pytest.mark.parametrize("inference", [False, True])
def test_cutting_an_image_token_away_is_refused(inference):
    """Position 33 holds the second image token: a text of 33 loses it, and one of 34 loses it to end_of_text."""
    talk = {"messages": ask(PHOTO, "a" * 24, PHOTO)[1:2]}
    whole = small()(talk, inference=inference)["tokens"]
    assert [i for i, token in enumerate(whole) if token == small().tokenizer.image_id] == [9, 34]
    for length in (9, 20, 34) if inference else (10, 20, 35):
        message = f"The number of image tokens ({int(length > 10)}) does not match the number of images (2)."
        cut = f"{message} max_seq_len {length} cuts the conversation before its last image token."
        assert said(RuntimeError, small(max_seq_len=length), talk, inference=inference) == cut
    kept = small(max_seq_len=36)(talk, inference=inference)
    assert len(kept["encoder_mask"]) == 2 and len(kept["tokens"]) == (35 if inference else 36)


@pytest.mark.parametrize("inference", [False, True])
def test_a_conversation_with_photos(llama, inference):
    coffee = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)  # 400 x 600
    sample = {"messages": ask(PHOTO, coffee, "What", PHOTO, "?"), "id": 5}
    result = llama(sample, inference=inference)
    assert list(sample) == ["messages", "id"] and "messages" not in result and result["id"] == 5
    assert (result["tokens"], result["mask"]) == llama.tokenize_messages(sample["messages"], add_end_tokens=not inference)
    clip = CLIPImageTransform(image_mean=IMAGE_MEAN, image_std=IMAGE_STD, tile_size=560, max_num_tiles=4)
    images, ratios = result["encoder_input"]["images"], result["encoder_input"]["aspect_ratio"]
    for got, ratio, image in zip(images, ratios, [PHOTO, coffee, PHOTO], strict=True):
        want = clip({"image": image})
        assert got.dtype == torch.bfloat16 and torch.equal(got, want["image"]) and torch.equal(ratio, want["aspect_ratio"])
    masks = VisionCrossAttentionMask(560, 14, IMAGE)({"tokens": result["tokens"], "encoder_input": {"images": images}})["encoder_mask"]
    assert [mask.shape[1] for mask in masks] == [1601, 3202, 1601] and all(map(torch.equal, result["encoder_mask"], masks))


def test_a_conversation_without_images():
    result = small()({"messages": [Message("user", "hello"), Message("assistant", "x")]})
    assert result["encoder_input"] == {"images": [], "aspect_ratio": []} and result["encoder_mask"] == []
    assert small().decode(result["tokens"]) == "hellox"


def test_forms_of_messages():
    talk = ask(PHOTO, "What?")
    hugging_face = [talk[0], talk[1] | {"content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "What?"}]}, talk[2]]
    objects = [SimpleNamespace(**{"ipython": False, "eot": True, "masked": False} | message) for message in talk]
    want = small()({"messages": talk})
    for messages in (objects, [Message.from_dict(message) for message in talk], hugging_face):
        got = small()({"messages": messages})
        assert got["tokens"] == want["tokens"] and got["mask"] == want["mask"]
        assert torch.equal(got["encoder_input"]["images"][0], want["encoder_input"]["images"][0])


def test_prompt_template(llama):
    talk = [{"role": "user", "content": " hi  "}, {"role": "assistant", "content": " yo "}]
    template = {"user": ("  Q: ", " \n A:"), "assistant": ("", "!")}
    tokenizer = Llama3Tokenizer(llama.tokenizer.text_tokenizer, prompt_template=template)
    ids = [BOS, START, 882, END, 271, 48, 25, 6151, 32, 25, EOT, START, 78191, END, 271, 16417, 0, EOT, EOS]  # torchtune's
    assert tokenizer.tokenize_messages(talk)[0] == ids
    seen = []
    function = Llama3Tokenizer(Bytes(), prompt_template=lambda messages, inference: seen.append(inference) or [*messages, {"role": "user", "content": "!"}])
    assert function.decode(function.tokenize_messages(talk)[0]) == "hiyo!"
    function.tokenize_messages(talk, add_end_tokens=False)
    assert seen == [False, True]


def test_message():
    message = Message("user", ask("a ", PHOTO, "b")[1]["content"])
    assert message.text_content == "a b" and message.get_media() == [PHOTO] and message.contains_media
    assert Message("system", "x") == Message("system", [{"type": "text", "content": "x"}], masked=False, ipython=False, eot=True)
    assert not Message("user", "x").contains_media


def byte_level():
    """A tokenizers.Tokenizer that adds begin_of_text to every text and reads <|image|> in one, as Llama's does."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(REQUIRED))
    begin = "<|begin_of_text|>"
    made.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))])
    return made


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_tokenizers_of_other_libraries(library, tmp_path):
    """The special tokens they would add to a text are not added, and their ids come from tokenizer.json."""
    made, path = byte_level(), tmp_path / "tokenizer.json"
    made.save(str(path))
    transform = small(PreTrainedTokenizerFast(tokenizer_object=made) if library == "transformers" else made, special_tokens_path=path)
    assert transform.special_tokens == Bytes.special_tokens and transform.vocab_size == 265
    result = transform({"messages": ask(PHOTO, "What is this ?")})
    assert result["tokens"].count(256) == 1 and result["tokens"].count(264) == 1
    assert transform.decode(result["tokens"]) == "Be brief.What is this ?A cat."
    assert len(transform.encode("é", add_eos=False)) == 3
    if library == "transformers":
        ids = transform.encode("<|image|>")
        assert 264 not in ids and transform.decode(ids) == "<|image|>"
    else:
        words = "Llama3Tokenizer: the tokenizer made the special token <|image|> of the text 'an <|image|>'"
        assert said(InvalidArgument, transform.encode, "an <|image|>") == words


def test_tiktoken_and_nested_tokenizers(llama):
    text = "a <|image|> b"
    for tokenizer in (llama.tokenizer.text_tokenizer, llama.tokenizer):  # tiktoken's, and one with encode(text, add_bos, add_eos)
        assert Llama3Tokenizer(tokenizer).encode(text) == llama.encode(text)


def test_data_loaders_can_pickle_it(llama):
    copy = pickle.loads(pickle.dumps(llama))
    assert copy.tokenize_messages(TOOL_TALK)[0] == TOOL_TALK_IDS and copy.decode(TOOL_TALK_IDS) == llama.decode(TOOL_TALK_IDS)


def test_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    words = "reading somewhere/tokenizer.model needs tiktoken: pip install tiktoken, or pass a tokenizer instead of a path"
    assert said(ImportError, llama3_2_vision_transform, "somewhere/tokenizer.model") == words


def test_files_that_are_none(tmp_path):
    pytest.importorskip("tiktoken")
    wrong, empty = tmp_path / "tokenizer.json", tmp_path / "empty.model"
    wrong.write_text(json.dumps({"model": 1}))
    empty.touch()
    with pytest.raises(FileNotFoundError):
        llama3_2_vision_transform(tmp_path / "missing.model")
    for path, why in [(wrong, "line 1 is b'{\"model\": 1}', not a base64 token and its rank"), (empty, "it is empty")]:
        assert said(InvalidArgument, llama3_2_vision_transform, str(path)) == f"{path} is no Llama 3 tokenizer.model: {why}"
    special = {"special_tokens_path": wrong}
    assert said(InvalidArgument, small, **special) == f"special_tokens_path {wrong} is no tokenizer.json with a list of added_tokens"
    wrong.write_text(json.dumps({"added_tokens": [{"content": name, "id": i} for i, name in enumerate(REQUIRED[2:])]}))
    assert said(InvalidArgument, small, **special) == "Llama3Tokenizer: special_tokens lacks <|begin_of_text|>, <|end_of_text|>"


@pytest.mark.parametrize("where", ["tokenizer.model", "original/tokenizer.model", None])
def test_folders_where_a_file_is_meant(tmp_path, where):
    expected = "a tokenizer.model file"
    if where is not None:
        (tmp_path / where).parent.mkdir(exist_ok=True)
        (tmp_path / where).touch()
        expected = f"the file {tmp_path / where}"
    for make in (Llama3Tokenizer, llama3_2_vision_transform, load_tiktoken):
        assert said(InvalidArgument, make, str(tmp_path)) == f"tokenizer path {tmp_path} is a folder, expected {expected}"
    words = f"special_tokens_path {tmp_path} is a folder, expected a tokenizer.json file"
    assert said(InvalidArgument, small, special_tokens_path=tmp_path) == words


WRONG_MESSAGES = [
    (("robot", "x"), {}, "role is 'robot', not one of system, user, assistant, ipython, tool"),
    (("user", 3), {}, "content is 3, neither a text nor a list of dicts"),
    (("user", ["x"]), {}, "content is ['x'], neither a text nor a list of dicts"),
    (("user", [{"type": "audio"}]), {}, "an item of content has type 'audio', neither 'text' nor 'image'"),
    (("user", [{"type": "text", "content": 3}]), {}, "an item of content of type 'text' holds int, not str"),
    (("user", "x"), {"ipython": True}, "only an assistant calls tools, ipython is set for role 'user'"),
    (("assistant", [{"type": "image", "content": PHOTO}]), {"ipython": True}, "ipython is set, and a call of a tool holds no images"),
]


def test_refusals():
    for args, options, words in WRONG_MESSAGES:
        assert said(InvalidArgument, Message, *args, **options) == f"Message: {words}"
    for given in ({"role": "user"}, "hello"):
        assert said(InvalidArgument, Message.of, given) == f"Message: role and content are needed, {given!r} lacks one"
    assert said(TypeError, Llama3Tokenizer, 3) == "Llama3Tokenizer: tokenizer is int, neither a path nor an object with encode and decode"
    assert said(InvalidArgument, small, max_seq_len=0) == "Llama3Tokenizer: max_seq_len is 0, not at least 1"
    words = "Llama3Tokenizer: prompt_template is 'x.Y', neither a dict by role nor a function of messages"
    assert said(TypeError, small, prompt_template="x.Y") == words
    words = f"CLIPImageTransform: needs both image_mean and image_std or none, has image_mean={IMAGE_MEAN}, image_std=None"
    assert said(InvalidArgument, small, image_mean=IMAGE_MEAN) == words
