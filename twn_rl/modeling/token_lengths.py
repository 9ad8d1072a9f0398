"""How long records are in tokens, rendered and cut as in training. Reads no weights."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from twn_rl.data.images import ImageError
from twn_rl.data.inspection import Distribution, Problem, RecordReport
from twn_rl.data.record import Item, Record
from twn_rl.modeling.backbone import Backbone, load_backbone
from twn_rl.modeling.collator import collate_prompts, completion_ids
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig
from twn_rl.modeling.limits import PromptLimits, context_tokens, settle_limits
from twn_rl.modeling.readout import readout_tokens, reason_tokens

_REMEMBERED_ITEMS = 100_000
_SEED = 0


class TokenCounter:
    """Counts the tokens of prompts and CoTs for one backbone and renderer.

    Attributes:
        longest: Positions the backbone has; None if it does not say.
        limits: What prompts are cut to.
        markup: What gives prompts their structure.
    """

    def __init__(self, backbone: Backbone, config: TwnConfig) -> None:
        """Count for a backbone, loaded with or without weights, and a model's settings."""
        self.backbone, self.config = backbone, settle_limits(backbone, config)
        self.longest = context_tokens(backbone)
        self.limits = PromptLimits(self.config.max_length, self.config.max_image_pixels)
        tail = readout_tokens(config.num_readout_tokens) + reason_tokens(config.num_reason_tokens)
        self.markup = backbone.markup(config.renderer).extended(tail)
        self._prompts: dict[Item, tuple[int, int]] = {}

    @classmethod
    def from_name(cls, model: str) -> "TokenCounter":
        """Return the counter of a saved model's folder, or of a backbone's name or folder."""
        is_saved = (Path(model) / CONFIG_FILE).is_file()
        config = TwnConfig.load(model) if is_saved else TwnConfig(backbone=model)
        revision = config.backbone_revision
        return cls(load_backbone(config.backbone, revision=revision, with_weights=False), config)

    def prompt(self, item: Item) -> int:
        """Return the tokens of an item's prompt, image tokens included.

        Raises:
            ValueError: If it cannot be rendered, as images for a text-only backbone, or is too long
                even without its text.
        """
        return self._measured(item)[0]

    def cut(self, item: Item) -> int:
        """Return how many tokens an item's prompt loses to `max_length`; 0 if it fits."""
        kept, whole = self._measured(item)
        return whole - kept

    def _measured(self, item: Item) -> tuple[int, int]:
        """Return the tokens of an item's prompt, and what they would be if its text was not cut."""
        if item not in self._prompts:
            if len(self._prompts) >= _REMEMBERED_ITEMS:
                self._prompts.clear()
            whole = self._tokens(item, replace(self.limits, max_length=None))
            is_cut = self.limits.is_too_long(whole)
            self._prompts[item] = self._tokens(item, self.limits) if is_cut else whole, whole
        return self._prompts[item]

    def _tokens(self, item: Item, limits: PromptLimits) -> int:
        batch = collate_prompts(self.backbone, self.config.renderer, [item], limits=limits)
        return int(batch["attention_mask"].sum())

    def cot(self, text: str | None) -> int:
        """Return the tokens of a CoT with its markers, without the end of turn; 0 for None.

        Raises:
            ValueError: If the CoT has a think marker in it.
        """
        if text is None:
            return 0
        return len(completion_ids(self.backbone, self.config.renderer.completion(text)))


def add_token_lengths(
    report: RecordReport, records: Sequence[Record], counter: TokenCounter, *, sample: int = 1000
) -> None:
    """Add token lengths to `report`, and records that cannot be rendered or are too long.

    "whole query" is the longest sequence of a query: prompt, CoT, end of turn and read-out tokens.
    "cut off prompts" is about the prompts that `max_length` cuts, and absent if there are none.

    Args:
        report: Changed in place.
        records: The records it is about.
        counter: Whose tokens to count.
        sample: How many records to measure, drawn at random with a fixed seed; 0 measures all.
    """
    chosen: Sequence[int] = range(len(records))
    if 0 < sample < len(records):
        chosen = sorted(random.Random(_SEED).sample(chosen, sample))
    lengths: dict[str, list[int]] = defaultdict(list)
    for index in tqdm(chosen, desc="Counting tokens", unit="record", disable=None):
        record = records[index]
        try:
            measured = _measure(record, counter)
        except (ImageError, ValueError) as error:
            report.problems.append(Problem(f"record {record.id!r}", "not_rendered", str(error)))
            continue
        for name, values in measured.items():
            lengths[name] += values
        longest = max(measured["whole query"] + measured["whole positive"])
        if counter.longest is not None and longest > counter.longest:
            message = (
                f"record {record.id!r} has {longest} tokens; expected at most the backbone's "
                f"{counter.longest} positions; shorten its text or CoT, or shrink its images"
            )
            report.problems.append(Problem(f"record {record.id!r}", "too_long", message))
    spreads = {name: Distribution.of(values) for name, values in lengths.items()}
    report.tokens = {name: spread for name, spread in spreads.items() if spread is not None}
    report.token_records = len(chosen)


def _measure(record: Record, counter: TokenCounter) -> dict[str, list[int]]:
    rest = 1 + counter.config.num_readout_tokens  # end of turn and read-outs
    rest += counter.config.num_reason_tokens
    measured = {
        "query prompt": [counter.prompt(record.query)],
        "positive prompt": [counter.prompt(record.positive)],
        "negative prompt": [counter.prompt(item) for item in record.negatives],
        "query CoT": [counter.cot(record.query_cot)] if record.query_cot else [],
        "positive CoT": [counter.cot(record.positive_cot)] if record.positive_cot else [],
    }
    measured["cut off prompts"] = [cut for item in record.items() if (cut := counter.cut(item))]
    for side in ("query", "positive"):
        measured[f"whole {side}"] = [
            measured[f"{side} prompt"][0] + sum(measured[f"{side} CoT"]) + rest
        ]
    return measured
