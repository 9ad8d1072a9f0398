"""What people hand to `encode`, and pictures: refused with its place, or done right."""

import io
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import picture
from PIL import Image
from tiny_backbones import awaken, make_idefics3

from hostile.judging import attempt, judge
from hostile.table import Tally
from hostile.texts import UNUSABLE, damaged, hostile_texts, hostile_values
from twn_rl.data.images import ImageError, open_image
from twn_rl.data.record import Item
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

QUICK_AND_ALL = [
    pytest.param("quick", id="quick"),
    pytest.param("all", id="all", marks=pytest.mark.campaign),
]
COUNTS = {
    "texts": {"quick": 14, "all": 100},
    "pictures": {"quick": 40, "all": 140},
    "encode arguments": {"quick": 16, "all": 100},
}
NEIGHBOURS = ("pizza", "zebra left of the tree")


@cache
def embedder() -> ThinkingEmbedder:
    lora = LoraSettings(r=2, alpha=4)
    config = TwnConfig(
        reasoning_lora=lora, embedding_lora=lora, num_readout_tokens=2, max_think_tokens=4
    )
    model = DualLoraModel.from_backbone(make_idefics3(), config)
    awaken(model)
    return ThinkingEmbedder(model.eval())


@cache
def alone() -> Any:
    return embedder().encode(list(NEIGHBOURS))


def wrong_vectors(vectors: Any, neighbours: list[int]) -> str:
    """Return what is wrong with the vectors of hostile inputs and of two neighbours."""
    vectors = np.asarray(vectors)
    if not np.isfinite(vectors).all():
        return "not finite"
    if np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() > 1e-4:
        return "not of unit length"
    if np.abs(vectors[neighbours] - alone()).max() > 1e-4:
        return "mixed: a neighbour has another vector"
    return ""


def test_the_judge_sees_a_neighbour_that_changed() -> None:
    other = embedder().encode(["camel", "tree"])
    assert wrong_vectors(alone(), [0, 1]) == ""
    assert wrong_vectors(other, [0, 1]) == "mixed: a neighbour has another vector"
    assert wrong_vectors(2 * alone(), [0, 1]) == "not of unit length"


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_texts(tally: Tally, size: str) -> None:
    model = embedder().model
    meaningful = model.backbone.markup(model.renderer).tokens - {"<unk>"}
    ids = set(model.tokenizer.convert_tokens_to_ids(sorted(meaningful)))

    def structure(text: str) -> list[int]:
        row = model.collate([Item(text=text)])["input_ids"][0].tolist()
        return [token for token in row if token in ids]

    expected = structure("camel")
    for case, text in enumerate(hostile_texts(14, COUNTS["texts"][size])):
        inputs = [NEIGHBOURS[0], text, NEIGHBOURS[1]]

        def complaint(vectors: Any, text: str = text) -> str:
            if any(letter in text for letter in UNUSABLE):
                return "an unusable character was embedded"
            if structure(text) != expected:
                return "the text wrote structure"
            return wrong_vectors(vectors, [0, 2])

        mode = ("never", "always")[case % 2]
        outcome = attempt(lambda inputs=inputs, mode=mode: embedder().encode(inputs, think=mode))
        if mode == "always" and outcome.error is None:
            outcome = attempt(lambda inputs=inputs: embedder().encode(inputs))
        tally.add("texts", f"{case}: {text[:40]!a}", *judge(outcome, ["input 1"], complaint))
    tally.check(at_least=COUNTS["texts"][size])


def whole_pictures() -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of pictures in every format and mode."""
    base = picture(5, 24, 16)
    modes = {
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P",),
        "BMP": ("RGB", "1"),
        "TIFF": ("RGB", "CMYK", "F", "I;16"),
        "PPM": ("RGB",),
        "JPEG2000": ("RGB",),
        "AVIF": ("RGB",),
    }
    for kind, each in modes.items():
        for mode in each:
            if mode == "I;16":
                image = Image.fromarray(np.asarray(base.convert("L"), np.uint16) * 257)
            else:
                image = base.convert(mode)
            buffer = io.BytesIO()
            image.save(buffer, format=kind, lossless=True, quality=100)
            yield f"{kind}-{mode.replace(';', '')}", buffer.getvalue()


def wrong_picture(image: Any, whole: bytes | None) -> str:
    """Return what is wrong with an opened picture; `whole` are its bytes if they are undamaged."""
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        return "no RGB picture"
    if whole is None:
        return "" if np.asarray(image).ndim == 3 else "its pixels cannot be read"
    grey = np.asarray(image.convert("L"), float)
    expected = np.asarray(picture(5, 24, 16).convert("L"), float)
    # One bit a pixel and palettes keep the mean only.
    if image.size != (24, 16) or abs(grey.mean() - expected.mean()) > 25:
        return f"shown wrongly: size {image.size}, mean {grey.mean():.0f}"
    return ""


@pytest.mark.parametrize("size", QUICK_AND_ALL)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged metadata
def test_pictures(tally: Tally, tmp_path: Path, size: str) -> None:
    pictures, die = list(whole_pictures()), random.Random(15)
    cases: list[tuple[str, bytes, bytes | None]] = [(n, b, b) for n, b in pictures]
    while len(cases) < COUNTS["pictures"][size]:
        name, content = die.choice(pictures)
        cases.append((f"{name}, damaged {len(cases)}", damaged(content, die), None))
    for case, (name, content, whole) in enumerate(cases):
        path = tmp_path / f"picture{case}.{die.choice(['png', 'jpg', 'txt'])}"
        path.write_bytes(content)
        outcome = attempt(lambda path=path: open_image(path))

        def complaint(image: Any, whole: bytes | None = whole) -> str:
            return wrong_picture(image, whole)

        # Jobs that skip bad pictures catch ImageError and nothing else.
        tally.add("pictures", name, *judge(outcome, [path.name], complaint, (ImageError,)))
        if whole is not None:
            assert outcome.error is None, (name, outcome.error)
    tally.check(at_least=COUNTS["pictures"][size])


ARGUMENTS = (
    "think",
    "batch_size",
    "precision",
    "truncate_dim",
    "think_threshold",
    "think_rate",
    "max_think_tokens",
    "temperature",
    "top_p",
    "num_thoughts",
    "seed",
    "on_bad_input",
    "prompt",
    "prompt_name",
    "convert_to_tensor",
    "normalize_embeddings",
    "chunk_size",
    "prefix_cache_gib",
)


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_encode_arguments(tally: Tally, size: str) -> None:
    die, count = random.Random(16), COUNTS["encode arguments"][size]
    for case, value in enumerate(hostile_values(16, count)):
        name = ARGUMENTS[case % len(ARGUMENTS)] if case % 9 else die.choice(["", "inputs", "bad"])
        kwargs: dict[str, Any] = {name: value} if name and name != "inputs" else {}
        inputs: Any = [*NEIGHBOURS, "camel"] if kwargs else value

        def complaint(vectors: Any, kwargs: dict[str, Any] = kwargs) -> str:
            if not kwargs:  # a hostile list of inputs that can be embedded, as one text
                return ""
            harmless = {"truncate_dim", "precision", "normalize_embeddings", "prompt", "think"}
            if set(kwargs) & harmless:
                return "" if len(vectors) == 3 else "a vector is missing"
            return wrong_vectors([np.asarray(v) for v in vectors][:2], [0, 1])

        outcome = attempt(lambda inputs=inputs, kw=kwargs: embedder().encode(inputs, **kw))
        names = [name or "input", "input", "encode"]
        shown = f"{name} = {value!a:.60}"
        tally.add("encode arguments", shown, *judge(outcome, names, complaint))
    tally.check(at_least=count)
