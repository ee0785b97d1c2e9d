"""The photo a demo is given, whatever it is."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from fastfuse.data.photos import rgb_on_white

MAX_SIDE = 8192  # a longer image is reduced first: the model sees four tiles at most


class DemoError(Exception):
    """Something about the user's input, in one line."""


def load_image(path: str | None) -> tuple[Image.Image, str]:
    """An RGB image and its name, turned upright by its EXIF orientation. Transparency is laid over white."""
    if path is None:
        from skimage import data

        return Image.fromarray(data.astronaut()), "scikit-image's astronaut"
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise DemoError(f"--image {path}: not a regular file")  # reading a pipe could wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
                image.load()
    except FileNotFoundError:
        raise DemoError(f"--image {path}: no such file") from None
    except UnidentifiedImageError:
        raise DemoError(f"--image {path}: not an image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DemoError(f"--image {path}: more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS}") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise DemoError(f"--image {path}: cannot be read: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}") from None
    try:
        image = rgb_on_white(image)
    except ValueError as e:
        raise DemoError(f"--image {path}: {e}") from None
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image, path
