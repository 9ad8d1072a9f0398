"""Every query read once and embedded with each of its thoughts; knows no candidates, no ranks."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from twn_rl.data.record import Item, Record
from twn_rl.evaluation import modes
from twn_rl.evaluation.modes import ABLATIONS, MODES, NO_THOUGHT, WORDLESS_MODES, Thought
from twn_rl.evaluation.retrieval_pools import CandidateScope
from twn_rl.metrics.ranking import collapse_report
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.prompt_features import Prompts

logger = logging.getLogger(__name__)

COLLAPSE_SAMPLE = 2000  # a singular value decomposition of more rows takes minutes on a CPU


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure.

    Attributes:
        split: First part of every metric key.
        modes: Any of `MODES` and `ABLATIONS`.
        candidates: "pool" or "local"; see `collect_candidates`.
        batch_size: Queries or targets a forward.
        max_think_tokens: Budget of one thought; None takes the model's.
        num_thoughts: Sampled thoughts a query, in modes "sampled" and "averaged".
        temperature: Of sampling.
        gate_threshold: Probability above which mode "auto" thinks; None takes the model's.
        policy_threshold: The same of mode "policy".
        confidence: Of the bootstrap intervals.
        seed: Decides sampled and borrowed thoughts and the bootstrap.
        show_progress_bar: Whether to draw progress bars.
    """

    split: str = "test"
    modes: tuple[str, ...] = ("never", "always", "oracle")
    candidates: CandidateScope = "pool"
    batch_size: int = 32
    max_think_tokens: int | None = None
    num_thoughts: int = 4
    temperature: float = 1.0
    gate_threshold: float | None = None
    policy_threshold: float | None = None
    confidence: float = 0.95
    seed: int = 0
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        known = (*MODES, *ABLATIONS)
        checks = {
            f"modes = {self.modes}, expected some of {known}": set(self.modes) <= set(known)
            and bool(self.modes),
            f"candidates = {self.candidates!r}, expected 'pool' or 'local'": self.candidates
            in ("pool", "local"),
            f"batch_size = {self.batch_size}, expected at least 1": self.batch_size >= 1,
            f"num_thoughts = {self.num_thoughts}, expected at least 1": self.num_thoughts >= 1,
            f"gate_threshold = {self.gate_threshold}, expected None or in [0, 1]": (
                self.gate_threshold is None or 0.0 <= self.gate_threshold <= 1.0
            ),
            f"policy_threshold = {self.policy_threshold}, expected None or in [0, 1]": (
                self.policy_threshold is None or 0.0 <= self.policy_threshold <= 1.0
            ),
            f"split = {self.split!r}, expected a name without '/'": bool(self.split)
            and "/" not in self.split,
        }
        problems = [problem for problem, is_fine in checks.items() if not is_fine]
        if problems:
            raise ValueError("EvaluationSettings: " + "; ".join(problems) + "; change these fields")


# Un-normalised no-think states (N, D) -> probability that thinking helps, per query.
Gate = Callable[[Tensor], Tensor]


class Queries:
    """The vectors of all records' queries under the modes they were embedded in.

    Attributes:
        thoughts: Mode -> thoughts of each record.
        embeds: Mode -> per record (thoughts, D) unit vectors.
        seconds: Mode -> seconds of each record.
        gate_seconds: Seconds of each record after its prompt was read until the gate has spoken.
        probabilities: What the gate said of each record, once "never" was embedded.
        policy_seconds: Seconds of each record in which the policy reads its prompt to decide, and
            goes on writing from there: part of those of "always".
        policy_probabilities: What the policy said of each record, if it decides.
        collapse: Metric key -> how far the vectors have collapsed.
    """

    def __init__(
        self,
        model: DualLoraModel,
        records: list[Record],
        settings: EvaluationSettings,
        data_root: str | Path | None,
        gate: Gate | None,
    ) -> None:
        self.model, self.records, self.settings = model, records, settings
        self.data_root, self.gate = data_root, gate
        self.thoughts: dict[str, list[list[Thought]]] = {}
        self.embeds: dict[str, list[NDArray[Any]]] = {}
        self.seconds: dict[str, NDArray[Any]] = {}
        self.gate_seconds = np.zeros(len(records))
        self.probabilities: list[float] | None = None
        self.policy_seconds = np.zeros(len(records))
        self.policy_probabilities = np.zeros(len(records))
        self.collapse: dict[str, float] = {}

    def embed(self, asked: set[str]) -> None:
        """Embed all queries under modes and ablations that stand on their own.

        Thoughts made of own ones need all of these first, hence a second reading of the prompts.
        """
        borrowed = asked & {"shuffled", "foreign", "truncated"}
        first = asked - borrowed | ({"always"} if borrowed else set())
        self._embed([mode for mode in (*MODES, *ABLATIONS) if mode in first])
        if borrowed:
            own = [thoughts[0] for thoughts in self.thoughts["always"]]
            for mode in borrowed:
                self._know(mode, self._borrow(mode, own))
            self._embed(sorted(borrowed))

    def _borrow(self, mode: str, own: list[Thought]) -> list[Thought | None]:
        if mode == "truncated":
            return modes.truncated_thoughts(own, self.model.renderer)
        borrow = modes.shuffled_thoughts if mode == "shuffled" else modes.foreign_thoughts
        return borrow(self.records, own, seed=self.settings.seed)

    def cosines(self, mode: str) -> NDArray[Any]:
        """Return the cosines (n,) of queries' vectors with their own thought and under `mode`."""
        pairs = zip(self.embeds["always"], self.embeds[mode], strict=True)
        return np.array([float(own[0] @ other[0]) for own, other in pairs if len(other)])

    def _know(self, mode: str, thoughts: Sequence[Thought | None]) -> None:
        self.thoughts[mode] = [[] if thought is None else [thought] for thought in thoughts]
        if not any(self.thoughts[mode]):
            logger.warning("mode %r has no query with a thought to embed: left out", mode)

    def _embed(self, chosen: Sequence[str]) -> None:
        """Read every query once and embed it with each of its thoughts under every chosen mode."""
        renderer, count = self.model.renderer, len(self.records)
        if "gold" in chosen:
            self._know("gold", modes.gold_thoughts(self.records, renderer))
        if "empty" in chosen:
            self._know("empty", modes.empty_thoughts(self.records, renderer))
        for mode in chosen:
            self.embeds[mode] = [np.zeros(0)] * count
            self.seconds[mode] = np.zeros(count)
            self.thoughts.setdefault(mode, [[] for _ in range(count)])
        # Pictures with pictures and long texts with long ones: a batch is as long as its longest.
        order = sorted(range(count), key=lambda i: item_size(self.records[i].query))
        probabilities: list[float] = [0.0] * count
        for rows in batches(order, self.settings, "queries: " + ", ".join(chosen)):
            clock = _Clock(len(rows))
            items = [self.records[row].query.load(self.data_root) for row in rows]
            prompts = self.model.prepare(self.model.collate(items))
            prefix = self.model.read(prompts)
            reading, deciding, start = clock.lap(), 0.0, prompts
            if self.model.is_policy_deciding and {"always", "sampled"} & set(chosen):
                start = self._ask_policy(rows, prompts)
                deciding = clock.lap()
                self.policy_seconds[rows] = deciding
            for mode in chosen:
                clock.lap()
                if mode in (*WORDLESS_MODES, "always", "sampled"):
                    self._think(mode, rows, start)
                states = self._read_out(mode, rows, prefix)
                own = clock.lap()
                self.seconds[mode][rows] = reading + own
                if mode in ("always", "sampled"):
                    self.seconds[mode][rows] += deciding
                if mode == "never" and self.gate is not None:
                    for row, value in zip(rows, self.gate(states).tolist(), strict=True):
                        probabilities[row] = value
                    self.gate_seconds[rows] = own + clock.lap()
        if "never" in chosen and self.gate is not None:
            self.probabilities = probabilities
        for mode in chosen:
            parts = [embeds for embeds in self.embeds[mode] if len(embeds)]
            if parts:
                name = f"{self.settings.split}/collapse/query_{mode}"
                self.collapse |= check_embeds(name, np.concatenate(parts))

    def _ask_policy(self, rows: list[int], prompts: Prompts) -> Prefix:
        """Note what the policy's first token says, and return from where it writes."""
        started = self.model.start_reasoning(prompts)
        self.policy_probabilities[rows] = self.model.think_probability(started).cpu().numpy()
        return started

    def _think(self, mode: str, rows: list[int], start: Prompts | Prefix) -> None:
        if mode in WORDLESS_MODES:
            for row in rows:
                self.thoughts[mode][row] = [NO_THOUGHT]
            return
        is_sampled, settings = mode == "sampled", self.settings
        count = settings.num_thoughts if is_sampled else 1
        written = self.model.reason(
            start,
            max_think_tokens=settings.max_think_tokens,
            do_sample=is_sampled,
            temperature=settings.temperature,
            num_thoughts=count,
            seeds=[settings.seed * 1_000_003 + row for row in rows] if is_sampled else None,
        )
        for place, row in enumerate(rows):
            own = written[place * count : (place + 1) * count]
            self.thoughts[mode][row] = [self._thought(ids) for ids in own]

    def _read_out(self, mode: str, rows: list[int], prefix: Prefix) -> Tensor:
        """Embed the thoughts of some records; return their un-normalised states."""
        pairs = [(place, t) for place, row in enumerate(rows) for t in self.thoughts[mode][row]]
        if not pairs:
            return torch.zeros(0, self.model.hidden_size)
        states = self.model.read_out(
            prefix.select([place for place, _ in pairs]),
            None if mode in WORDLESS_MODES else [thought.completion for _, thought in pairs],
            is_latent=mode == "latent",
        )
        vectors = torch.nn.functional.normalize(states, dim=-1).cpu().numpy()
        places = np.array([place for place, _ in pairs])
        for place, row in enumerate(rows):
            self.embeds[mode][row] = vectors[places == place]
        return states

    def _thought(self, ids: list[int]) -> Thought:
        think = self.model.think(ids)
        completion = self.model.completion_for_embedding(ids)
        return Thought(
            completion=tuple(completion) if completion else None,
            text=think.text,
            think_tokens=sum(token != self.model.backbone.eos_token_id for token in ids),
            problem=think.problem,
        )


def batches(order: Sequence[int], settings: EvaluationSettings, description: str) -> Iterable[Any]:
    """Yield slices of `order`, with a progress bar."""
    starts = tqdm(
        range(0, len(order), settings.batch_size),
        desc=f"{settings.split}: {description}",
        disable=not settings.show_progress_bar,
        leave=False,
    )
    for start in starts:
        yield order[start : start + settings.batch_size]


def item_size(item: Item) -> tuple[int, int]:
    """Return what to sort by, so that pictures meet pictures and long texts long ones."""
    return len(item.images) + len(item.video), len(item.text or "")


def check_embeds(name: str, embeds: NDArray[Any]) -> dict[str, float]:
    """Return how far unit vectors (N, D) have collapsed, as `<name>/<metric>`.

    Raises:
        ValueError: If any is non-finite.
    """
    is_bad = ~np.isfinite(embeds).all(axis=1)
    if is_bad.any():
        raise ValueError(
            f"{int(is_bad.sum())} of {len(embeds)} vectors of {name!r} are non-finite (first: "
            f"row {int(is_bad.argmax())}); expected finite ones; check dtype and checkpoint"
        )
    if len(embeds) < 2:
        return {}
    report = collapse_report(embeds[:: -(-len(embeds) // COLLAPSE_SAMPLE)])
    return {f"{name}/{metric}": value for metric, value in report.items()}


class _Clock:
    """Seconds per query since the last lap."""

    def __init__(self, num_queries: int) -> None:
        self.num_queries, self.last = num_queries, time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.last = (now - self.last) / self.num_queries, now
        return seconds
