"""Pictures as viewers show them: deep, turned, animated, transparent; damaged ones are told."""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from twn_rl.data.images import IMAGE_FORMATS, ImageError, image_of_bytes, open_image

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def shown(image: Image.Image) -> np.ndarray:
    return np.asarray(open_image(image))[..., 0]


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 65_535).astype(np.uint16),
        (RAMP * 65_535).astype(np.int32),
        (RAMP * 255).astype(np.int32),
        (RAMP * 1e6 - 5e5).astype(np.int32),
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
        (RAMP * 80 - 40).astype(np.float32),
    ],
    ids=["16 bits", "16 of 32 bits", "8 of 32 bits", "32 bits", "shares", "floats", "heights"],
)
def test_deep_grey_is_scaled_and_not_cut_off(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "deep.tiff"
    Image.fromarray(values).save(path)
    expected = RAMP * 255
    assert np.abs(np.asarray(open_image(path))[..., 0] - expected).max() <= 1
    assert np.abs(shown(Image.fromarray(values)) - expected).max() <= 1


def test_deep_png_and_even_grey() -> None:
    even = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    content = io.BytesIO()
    even.save(content, "PNG")
    assert np.unique(shown(image_of_bytes(content.getvalue()))) == [round(40_000 / 257)]
    flat = Image.fromarray(np.full((4, 4), -3.0, dtype=np.float32))
    assert np.unique(shown(flat)) == [0]


def test_pixels_that_are_not_finite_are_no_picture() -> None:
    broken = Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32))
    with pytest.raises(ImageError, match="not all finite"):
        open_image(broken)


def test_other_kinds_are_shown_as_viewers_do() -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert open_image(palette).getpixel((0, 0)) == (10, 20, 30)
    assert open_image(Image.new("CMYK", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    content = io.BytesIO()
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    assert open_image(image_of_bytes(content.getvalue())).getpixel((0, 0)) == (255, 0, 0)


def test_formats_that_run_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.eps"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ImageError, match="one of PNG, JPEG") as caught:
        open_image(path)
    assert caught.value.reason == "unreadable_image"
    with pytest.raises(ImageError, match="one of PNG, JPEG"):
        image_of_bytes(path.read_bytes())


CONTENTS: dict[str, bytes] = {}
for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"):
    file = io.BytesIO()
    Image.fromarray((np.indices((24, 24)).sum(0) * 5).astype(np.uint8)).convert("RGB").save(
        file, name
    )
    CONTENTS[name] = file.getvalue()


def test_every_allowed_format_is_read() -> None:
    assert set(CONTENTS) == set(IMAGE_FORMATS)
    for content in CONTENTS.values():
        assert open_image(image_of_bytes(content)).size == (24, 24)


# Pillow warns of damaged metadata and goes on.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_an_image_error_or_a_picture(data: Any) -> None:
    content = bytearray(CONTENTS[data.draw(st.sampled_from(sorted(CONTENTS)))])
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(content)))
    with suppress(ImageError):
        assert open_image(image_of_bytes(bytes(content[:cut]))).mode == "RGB"
