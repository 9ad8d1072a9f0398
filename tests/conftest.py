"""Fixtures that many files take, and the order and the summary of a run."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile.table import PROPERTY, Tally, table_lines
from huggingface_hub import constants
from local_hub import LocalHub, running_hub
from made_records import picture, picture_records
from tiny_backbones import BACKBONES, COUNTING_BACKBONES, awaken
from transformers.utils import hub as hub_of_transformers

from twn_rl.data.record import Item
from twn_rl.data.record_files import RecordSet
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

LONG_MARKERS = ("slow", "distributed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the switch of `make hostile`."""
    parser.addoption("--campaign", action="store_true", help="run tests marked campaign, too")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Return the verdicts of this test, which the table at the end of the run counts."""
    return Tally(request.node)


@contextmanager
def logs_restored() -> Iterator[None]:
    """Take back what a command that ran in this process did to logs and uncaught errors."""
    root = logging.getLogger()
    level, handlers, hook = root.level, list(root.handlers), sys.excepthook
    yield
    root.setLevel(level)
    root.handlers[:] = [each for each in root.handlers if each in handlers]
    sys.excepthook = hook


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Leave logs to the next test as they were."""
    with logs_restored():
        yield


@pytest.fixture(autouse=True, scope="module")
def logs_as_before_the_file() -> Iterator[None]:
    """Leave logs to the next file as they were, whatever this one's own fixtures have run."""
    with logs_restored():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what became of all hostile cases of the run."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    verdicts = [
        (value[0], value[1])
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if verdicts:
        terminalreporter.section("hostile cases")
        for line in table_lines(verdicts):
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long campaigns unless they are asked for, and then their quick subsets.

    The longest files come first, so that workers which share a run end at about the same time.
    """
    is_asked = config.getoption("campaign")
    left_out = [
        item
        for item in items
        if (item.name.endswith("[quick]") if is_asked else item.get_closest_marker("campaign"))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    length: Counter[Path] = Counter()
    for item in items:
        length[item.path] += sum(item.get_closest_marker(m) is not None for m in LONG_MARKERS)
    items.sort(key=lambda item: -length[item.path])


@pytest.fixture
def make_backbone() -> Callable[[str], Backbone]:
    """Return name -> new tiny backbone, the same weights at each call."""
    return lambda name: BACKBONES[name]()


@pytest.fixture
def make_model() -> Callable[..., DualLoraModel]:
    """Return (name, **config) -> model with awakened adapters, so that they change every output."""

    def make(name: str = "idefics3", *, seed: int = 0, **settings: Any) -> DualLoraModel:
        settings = {
            "reasoning_lora": LoraSettings(r=2, alpha=4),
            "embedding_lora": LoraSettings(r=3, alpha=6),
            "num_readout_tokens": 3,
            "max_think_tokens": 8,
            **settings,
        }
        backbone = {**BACKBONES, **COUNTING_BACKBONES}[name]()
        model = DualLoraModel.from_backbone(backbone, TwnConfig(**settings), seed=seed)
        awaken(model, seed)
        return model.eval()

    return make


@pytest.fixture
def make_items() -> Callable[[str], list[Item]]:
    """Return name -> items of different lengths: text, one image, several images, video frames."""

    def make(name: str) -> list[Item]:
        text = [
            Item(instruction="find the picture of a camel"),
            Item(text="pizza"),
            Item(instruction="which object is in the top row", text="left of the zebra"),
        ]
        if name in ("llama", *COUNTING_BACKBONES):
            return text
        side = {"qwen3_vl": 64, "qwen2_5_vl": 56}.get(name, 32)
        return [
            *text[:2],
            Item(instruction="which object is it", images=(picture(1, side, side),)),
            Item(text="tree", images=(picture(2, side, side), picture(3, 2 * side, side))),
            Item(instruction="answer", video=(picture(4, side, side), picture(5, side, side))),
        ]

    return make


@pytest.fixture
def records(tmp_path: Path) -> RecordSet:
    """Six records with random pictures on disk."""
    folder = tmp_path / "records"
    folder.mkdir()
    return picture_records(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Let everything that speaks to the hub speak to one on loopback, with an empty cache."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_of_transformers, "_hf_api", None)  # remembers where the hub was
        yield running
