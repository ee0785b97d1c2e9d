"""A turn of a conversation: who speaks, and text and images in the order they appear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastfuse.errors import InvalidArgument

ROLES = ("system", "user", "assistant", "ipython", "tool")


@dataclass
class Message:
    """One turn. Raises ValueError where its parts do not fit together.

    role: system, user, assistant, ipython or tool (what a tool returned).
    content: a text, or a list of {"type": "text" | "image", "content": text | PIL image | tensor}.
        Images are taken as `fastfuse.data.transforms.image_to_tensor` says.
    masked: not trained on.  ipython: a call of a tool by the assistant.  eot: the turn ends here; else the same side goes on.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]]
    masked: bool = False
    ipython: bool = False
    eot: bool = True

    def __post_init__(self):
        if self.role not in ROLES:
            raise InvalidArgument(f"Message: role is {self.role!r}, not one of {', '.join(ROLES)}")
        if isinstance(self.content, str):
            self.content = [{"type": "text", "content": self.content}]
        if not isinstance(self.content, Sequence) or not all(isinstance(item, Mapping) for item in self.content):
            raise InvalidArgument(f"Message: content is {self.content!r}, neither a text nor a list of dicts")
        self.content = [_item(item) for item in self.content]
        if self.ipython and self.role != "assistant":
            raise InvalidArgument(f"Message: only an assistant calls tools, ipython is set for role {self.role!r}")
        if self.ipython and self.contains_media:
            raise InvalidArgument("Message: ipython is set, and a call of a tool holds no images")

    @classmethod
    def of(cls, message: Any) -> "Message":
        """A message from a dict or from any object with role and content (torchtune's, say), which is not changed."""
        if isinstance(message, Message):
            return message
        get = message.get if isinstance(message, Mapping) else lambda name, default=None: getattr(message, name, default)
        if get("role") is None or get("content") is None:
            raise InvalidArgument(f"Message: role and content are needed, {message!r} lacks one")
        return cls(get("role"), get("content"), get("masked", False), get("ipython", False), get("eot", True))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "Message":
        """`Message.of` under torchtune's name for it."""
        return cls.of(d)

    @property
    def contains_media(self) -> bool:
        return bool(self.get_media())

    @property
    def text_content(self) -> str:
        """All text, joined."""
        return "".join(item["content"] for item in self.content if item["type"] == "text")

    def get_media(self) -> list[Any]:
        """All images, in order."""
        return [item["content"] for item in self.content if item["type"] == "image"]


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type")
    if kind not in ("text", "image"):
        raise InvalidArgument(f"Message: an item of content has type {kind!r}, neither 'text' nor 'image'")
    content = item.get("content", item.get(kind))  # transformers' templates name it after the type
    if kind == "text" and not isinstance(content, str):
        raise InvalidArgument(f"Message: an item of content of type 'text' holds {type(content).__name__}, not str")
    return {"type": kind, "content": content}
