"""Opening image files safely: inside the data root, whole, of sane size.

Every picture of the project enters through `open_image`, so that training, evaluation and serving
see the same pixels: orientation applied, transparency laid over white, RGB.
"""

import hashlib
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

ImageSource = Image.Image | str | Path

_URL = re.compile(r"^([a-z][a-z0-9+.\-]*://|data:)", re.IGNORECASE)
# What Pillow raises for damaged files, depending on format and on how far it got.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    AttributeError,
    KeyError,
    RuntimeError,
    TypeError,
)
# Pictures of photographs and screens; no format that runs a program or that hides others in it.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short key for counting."""

    def __init__(self, message: str, *, reason: str) -> None:
        """Keep the three-part `message` and the `reason` key."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their positional arguments only.
        return partial(ImageError, str(self), reason=self.reason), ()


class ImageFacts(NamedTuple):
    """What decoding a picture file told; true while its size and time of change stay the same."""

    digest: str  # see `image_digest`
    width: int
    height: int
    size_bytes: int
    modified_ns: int


class KnownImages(Protocol):
    """What somebody else has found out about picture files."""

    def facts(self, path: str, state: tuple[int, int]) -> ImageFacts | None:
        """Return the facts of an absolute path that were found at this size and time of change."""
        ...


# By absolute path, what this process found by decoding; and who else can be asked, by its name.
_remembered: dict[str, ImageFacts] = {}
_others: dict[str, KnownImages] = {}


def resolve_inside(source: str | Path, data_root: str | Path, *, must_exist: bool = True) -> Path:
    """Return the absolute path of `source`, which must be a file inside `data_root`.

    Args:
        source: Path relative to `data_root`, as written in a data file.
        data_root: Folder that no path may leave, neither by `..` nor by a symbolic link.
        must_exist: Refuse a path that is no file.

    Raises:
        ImageError: For URLs, absolute paths, paths that leave the root, and missing files.
    """
    name = str(source)
    if _URL.match(name):
        raise ImageError(
            f"image = {name[:80]!r} is a URL; expected a path relative to the data root; "
            "remote images are never fetched: download it and write its relative path",
            reason="url",
        )
    if Path(name).is_absolute():
        raise ImageError(
            f"image = {name!r} is absolute; expected a path relative to the data root "
            f"{str(data_root)!r}; pass the folder as data_root and write the rest of the path",
            reason="path_outside_root",
        )
    root = Path(data_root).resolve()
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # NUL byte, too long, symlink loop
        raise ImageError(
            f"image = {name[:80]!r} is no usable path ({error}); expected a path relative to the "
            "data root; correct it",
            reason="missing_image",
        ) from error
    if not path.is_relative_to(root):
        raise ImageError(
            f"image = {name!r} leads outside the data root {str(root)!r}; expected a file inside "
            "it; copy the file there or pass a wider data_root",
            reason="path_outside_root",
        )
    if must_exist and not is_file:
        raise ImageError(
            f"image = {name!r} does not exist under {str(root)!r}; expected a file; "
            "check the path and data_root",
            reason="missing_image",
        )
    return path


def open_image(source: ImageSource, data_root: str | Path | None = None) -> Image.Image:
    """Return `source` fully decoded as an RGB image, upright, transparency over white.

    Args:
        source: An image, or a path; a relative path is looked up under `data_root`.
        data_root: Folder for relative paths; the working directory when None.

    Raises:
        ImageError: If the file is missing, damaged, truncated or implausibly large.
    """
    if isinstance(source, Image.Image):
        try:
            return _to_rgb(source)  # an image of bytes may not have been decoded yet
        except _DECODE_ERRORS as error:
            raise ImageError(
                f"image in memory cannot be decoded ({error}); expected a complete image; replace "
                "it or leave the row out",
                reason="unreadable_image",
            ) from error
    if _URL.match(str(source)):
        resolve_inside(source, ".")  # raises the one message there is about URLs
    path = Path(data_root or ".") / source
    if not path.is_file():
        raise ImageError(
            f"image = {str(path)!r} does not exist; expected a file; check the path and data_root",
            reason="missing_image",
        )
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise Image.DecompressionBombError(f"{width} x {height} pixels, limit {limit}")
            return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"image = {str(path)!r} cannot be decoded ({error}); expected a complete image of "
            f"sane size, one of {', '.join(IMAGE_FORMATS)}; replace the file or leave the row out",
            reason="unreadable_image",
        ) from error


def image_of_bytes(content: bytes) -> Image.Image:
    """Return a picture in memory; its pixels are decoded when `open_image` is given it.

    Raises:
        ImageError: If this is no picture of a known format, or an implausibly large one.
    """
    try:
        return Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"picture of {len(content)} bytes cannot be read ({error}); expected an image file, "
            f"one of {', '.join(IMAGE_FORMATS)}; replace it or leave the row out",
            reason="unreadable_image",
        ) from error


def shrink_image(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """Return `image`, or a smaller copy of it with at most `max_pixels` pixels and its aspect.

    >>> shrink_image(Image.new("RGB", (4000, 3000)), 1 << 20).size
    (1182, 886)

    Args:
        image: A decoded picture.
        max_pixels: Width times height, >= 1; None is unlimited.
    """
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    # A strip keeps one pixel across, and rounding never leads above the limit.
    new_height = min(max(1, int(height * scale)), max_pixels)
    new_width = max(1, min(int(width * scale), max_pixels // new_height))
    return image.resize((new_width, new_height), Image.Resampling.LANCZOS)


def image_digest(source: ImageSource, data_root: str | Path | None = None) -> str:
    """Return the sha256 hex digest of the size and RGB pixels of `source`.

    The digest does not depend on file name or format, so a copy of a picture is recognised, and an
    opened image has the digest of its file. Files are decoded once per process (until they change).

    Raises:
        ImageError: If the image cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return _pixel_digest(_to_rgb(source))
    if _URL.match(str(source)):
        open_image(source)  # raises the message for URLs
    is_plain = isinstance(source, str) and source.startswith("/")
    return image_facts(source if is_plain else Path(data_root or ".") / source).digest


def image_facts(path: str | Path) -> ImageFacts:
    """Return digest and size, in upright pixels, of a picture file, decoded as `image_digest` says.

    Raises:
        ImageError: If the image cannot be decoded.
    """
    # A set's paths are absolute and normal already, and making Path objects would take longest.
    known = remembered_facts(path) if isinstance(path, str) and path.startswith("/") else None
    if known is not None:
        return known
    path = Path(path).absolute()
    known = remembered_facts(str(path))
    if known is None:
        stat = path.stat() if path.is_file() else None  # before it is read: it may change
        image = open_image(path)
        assert stat is not None  # opening it would have raised
        known = ImageFacts(_pixel_digest(image), *image.size, stat.st_size, stat.st_mtime_ns)
        _remembered[str(path)] = known
    return known


def remembered_facts(path: str) -> ImageFacts | None:
    """Return what is known of an absolute path, if the file is still the same."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    state = stat.st_size, stat.st_mtime_ns
    known = _remembered.get(path)
    if known is not None and known[3:] == state:
        return known
    found = (other.facts(path, state) for other in [*_others.values()])
    return next((facts for facts in found if facts is not None), None)


def remember_images(facts: Mapping[str, ImageFacts]) -> None:
    """Take over what another process found out, so that this one need not decode the files.

    Args:
        facts: By absolute path; a file that has changed since is decoded anew when asked for.
    """
    _remembered.update(facts)


def forget_images(paths: Iterable[str]) -> None:
    """Leave the facts of these absolute paths to those who were named by `ask_about_images`."""
    for path in paths:
        _remembered.pop(path, None)


def ask_about_images(name: str, source: KnownImages) -> None:
    """Ask `source` about pictures, too, in place of the one that had this name."""
    _others[name] = source


def _pixel_digest(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = _of_8_bits(ImageOps.exif_transpose(image))
    if upright.mode == "RGB" and not upright.has_transparency_data:
        upright.load()
        return upright
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return upright.convert("RGB")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Return a deeper greyscale picture in 8 bits; Pillow itself would cut off what is above 255.

    Integers count as 8 or 16 bits, whichever holds them, floats as shares of 1 or as 0 to 255;
    what fits neither is stretched between its own extremes.
    """
    is_16_bits = image.mode.startswith("I;16")
    if image.mode not in ("I", "F") and not is_16_bits:
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its pixels are not all finite")
    tops = (65_535.0,) if is_16_bits else (255.0, 65_535.0) if image.mode == "I" else (1.0, 255.0)
    low, high = values.min(), values.max()
    if low >= 0 and high <= tops[-1]:
        low, high = 0.0, next(top for top in tops if high <= top)
    scaled = (values - low) * (255 / ((high - low) or 1.0))
    return Image.fromarray(scaled.round().astype(np.uint8))
