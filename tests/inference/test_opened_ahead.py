"""Picture files are opened a batch ahead, each once, and nothing else changes."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import picture
from PIL import Image

from twn_rl.data.images import ImageError
from twn_rl.data.record import Item
from twn_rl.inference.batches import in_batches
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.opened_ahead import OpenedAhead
from twn_rl.modeling.limits import PromptLimits
from twn_rl.modeling.model import DualLoraModel


@pytest.fixture
def files(tmp_path: Path) -> list[Item]:
    items = []
    for number in range(6):
        picture(number, 64, 64).save(tmp_path / f"{number}.png")
        items.append(Item(text="camel left"[:number], images=(str(tmp_path / f"{number}.png"),)))
    return items


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return (file, thread) of every item that is opened."""
    seen: list[tuple[str, str]] = []
    unwatched = PromptLimits.open

    def watched(limits: PromptLimits, item: Item) -> Item:
        seen.append((str(item.images[0]), threading.current_thread().name))
        return unwatched(limits, item)

    monkeypatch.setattr(PromptLimits, "open", watched)
    return seen


def test_the_next_batch_is_opened_while_one_is_worked_on(
    files: list[Item], openings: list[tuple[str, str]]
) -> None:
    limits = PromptLimits()
    ahead = OpenedAhead(limits)
    batches = ahead.batches(in_batches(files, 2))
    first = next(batches)
    own = [ahead.open(item) for item in first.values()]
    assert all(isinstance(item.images[0], Image.Image) for item in own)
    second = next(batches)  # its files were begun before the first batch was handed out
    for item in second.values():
        ahead.open(item)
    assert all(thread.startswith("pictures") for _, thread in openings)
    names = [item.images[0] for item in (*first.values(), *second.values())]
    assert {name for name, _ in openings} >= set(names)
    assert [list(batch) for batch in batches] == [[1, 0]]
    assert sorted(name for name, _ in openings) == sorted(str(item.images[0]) for item in files)
    assert limits.counts.totals()["pictures"] == len(files)


def test_who_stops_early_leaves_no_thread_behind(files: list[Item]) -> None:
    before = threading.active_count()
    batches = OpenedAhead(PromptLimits()).batches(in_batches(files, 1))
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]  (it is a generator)
    assert threading.active_count() == before


def test_pictures_in_memory_are_opened_by_who_asks(openings: list[tuple[str, str]]) -> None:
    shared = picture(1, 64, 64)
    ahead = OpenedAhead(PromptLimits())
    for batch in ahead.batches(in_batches([Item(images=(shared,))] * 4, 2)):
        for item in batch.values():
            ahead.open(item)
    assert {thread for _, thread in openings} == {threading.current_thread().name}
    assert len(openings) == 4


def test_a_broken_file_is_told_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    ahead = OpenedAhead(PromptLimits())
    for batch in ahead.batches([{0: Item(images=(str(tmp_path / "broken.png"),))}]):
        with pytest.raises(ImageError, match="cannot be decoded"):
            ahead.open(batch[0])


def test_vectors_errors_and_counts_are_those_of_pictures_in_memory(
    make_model: Callable[..., DualLoraModel],
    files: list[Item],
    tmp_path: Path,
    openings: list[tuple[str, str]],
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    inputs = [*files, Item(images=(str(tmp_path / "broken.png"),))]
    embedder = ThinkingEmbedder(make_model("idefics3", max_image_pixels=1024))
    options: dict[str, Any] = {"batch_size": 2, "return_details": True, "on_bad_input": "skip"}
    found = embedder.encode(inputs, **options)
    from_files = embedder.model.limits.counts.totals()
    assert sum(thread.startswith("pictures") for _, thread in openings) == len(inputs)
    memory = [
        replace(item, images=tuple(Image.open(str(source)) for source in item.images))
        for item in files
    ]
    expected = embedder.encode(memory, **options)
    assert np.array_equal(found.embeddings[:-1], expected.embeddings)
    assert list(found.errors) == [len(files)]
    assert not expected.errors
    assert from_files["pictures"] == from_files["resized_pictures"] == len(files)
    totals = embedder.model.limits.counts.totals()
    assert totals["resized_pictures"] == 2 * len(files)
