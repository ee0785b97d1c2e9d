"""Pictures of Pillow's many modes as plain RGB."""

from typing import TYPE_CHECKING

from fastfuse.errors import InvalidArgument

if TYPE_CHECKING:
    from PIL import Image


def rgb_on_white(image: "Image.Image") -> "Image.Image":
    """A PIL image of any mode as RGB, with transparency (an alpha channel or a transparent colour) laid over white.

    16-bit greyscale keeps its whole range: 65535 is white. Pixels stay where they are stored: no EXIF orientation is applied.
    Pillow does not tell the depth of 2- and 4-bit grey PNGs, so a transparent grey of theirs shows, unless it is black.
    Raises InvalidArgument for an image without pixels, and for modes I and F, whose range nobody states, where 0..255 is not
    what their values fill.
    """
    from PIL import Image

    if 0 in image.size:
        raise InvalidArgument(f"Input image is {image.width} x {image.height} pixels.")
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None:
        return image
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:  # of a 16-bit PNG, of whose pixels Pillow keeps the high bytes
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        if low < 0 or high > 255 or (image.mode == "F" and 0 < high <= 1):  # converted, they would be clipped, or all black
            raise InvalidArgument(f"Input image has mode {image.mode} and values from {low:g} to {high:g}: scale them to 0..255")
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow converts premultiplied grey to nothing else
    if image.mode not in ("RGBA", "RGBa", "LA", "PA") and "transparency" not in image.info and not (image.mode == "P" and image.palette.mode == "RGBA"):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """16-bit greyscale as L, or LA where a grey is transparent: Pillow's own conversions clip at 255, and miss that grey."""
    from PIL import ImageChops

    values = image.convert("F")
    grey = values.point(lambda v: v * (1 / 257) + 0.5).convert("L")
    transparent = image.info.get("transparency")
    if transparent is not None:
        above = values.point(lambda v: v * 1 - transparent).convert("L")
        below = values.point(lambda v: v * -1 + transparent).convert("L")
        grey.putalpha(ImageChops.lighter(above, below).point(lambda v: 255 * (v > 0)))
    return grey
