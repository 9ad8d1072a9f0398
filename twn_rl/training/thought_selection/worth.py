"""What a draft is worth: how well query and target match with it and without it.

MMEmb-R1 (2604.06156) scores a path by the counterfactual: the evaluator's match with it minus the
match without it, with hard negatives as control. The paper does not name its evaluator; there are
two here: the embedding adapter's margin and the bare backbone's yes / no logit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from twn_rl.data.record import Item, Record, pool_of
from twn_rl.metrics.negatives import FalseNegatives, margin
from twn_rl.modeling.adapters import without_adapters
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.readout import position_ids
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.whole_files import digest
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.thought_selection.drafts import RecordRows, Row, SelectionError

EVALUATORS = ("margin", "yes_no")
Pair = tuple[int, str]  # position of a record, CoT about its query


@dataclass(frozen=True)
class Match:
    """What a thought does for one pair, negatives subtracted.

    Attributes:
        with_cot: The match with the thought.
        without: The match without it.
    """

    with_cot: float
    without: float

    @property
    def worth(self) -> float:
        """What the thought adds."""
        return self.with_cot - self.without


class Evaluator(Protocol):
    """Compares with and without a thought; `plan` names everything the matches depend on."""

    plan: dict[str, Any]

    def matches(self, pairs: Sequence[Pair]) -> list[Match | None]:
        """Return one match for each (record, CoT) of a batch; None where there are no negatives."""
        ...


class MarginEvaluator:
    """Match = similarity to the positive - mean over the K hardest negatives, in [-2, 2].

    Negatives are all targets of the record's pool but `false_negatives`, and each vector meets its
    own hardest ones: a thought that leads to a wrong target raises exactly that target's
    similarity.
    """

    def __init__(
        self,
        model: DualLoraModel,
        records: Sequence[Record],
        directory: str | Path,
        *,
        num_negatives: int = 1,
        max_negative_similarity: float | None = None,
        batch_size: int = 64,
        processes: Processes | None = None,
    ) -> None:
        """Embed targets once below `directory`; all processes call this together."""
        self.model = model
        self.scorer = RolloutScorer(
            model,
            records,
            directory,
            num_negatives=num_negatives,
            max_negative_similarity=max_negative_similarity,
            batch_size=batch_size,
            processes=processes,
        )
        self.plan: dict[str, Any] = {
            "evaluator": "margin",
            "scorer": self.scorer.targets.fingerprint,
            "targets": digest(self.scorer.targets.ids),
            "queries": digest(list(dict.fromkeys(self.scorer.query_ids))),
            "num_negatives": num_negatives,
        }
        if any(self.scorer.false_negative_ids):
            self.plan["false_negatives"] = digest(self.scorer.false_negative_ids)
        if max_negative_similarity is not None:
            self.plan["max_negative_similarity"] = max_negative_similarity

    def matches(self, pairs: Sequence[Pair]) -> list[Match | None]:
        """Return one match for each (record, CoT); None where the pool holds no negative."""
        renderer = self.model.renderer
        ids = [
            self.model.completion_ids(renderer.completion(cot), add_eos=True) for _, cot in pairs
        ]
        columns = self.scorer.columns([position for position, _ in pairs], ids)
        sides = [
            [
                margin(positive, negatives)
                for positive, negatives in zip(
                    columns[f"{mode}positive_similarity"],
                    columns[f"{mode}negative_similarities"],
                    strict=True,
                )
            ]
            for mode in ("", "no_think_")
        ]
        return [_match(*margins) for margins in zip(*sides, strict=True)]


class YesNoEvaluator:
    """Match = logit(yes) - logit(no) of the positive - its mean over K listed negatives.

    The backbone is asked with both adapters switched off. Without listed negatives, positives of
    other records of the pool stand in. `false_negatives` are none of either.
    """

    QUESTION = "Does the candidate match the query? Answer yes or no."

    def __init__(
        self,
        model: DualLoraModel,
        records: Sequence[Record],
        *,
        num_negatives: int = 1,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        """Hold the model; `num_negatives` 0 leaves the control out."""
        self.model, self.records, self.batch_size = model, records, batch_size
        self.num_negatives, self.seed = num_negatives, seed
        self.yes, self.no = (answer_ids(model.tokenizer, word) for word in ("yes", "no"))
        self._pools: dict[str, list[int]] = {}
        for position, record in enumerate(records):
            self._pools.setdefault(pool_of(record), []).append(position)
        queries = [record.query.content_key() for record in records]
        positives = [record.positive.content_key() for record in records]
        known = FalseNegatives(zip(queries, positives, strict=True))
        self._positive_ids = positives
        self._barred = [{p, *known.of(q)} for q, p in zip(queries, positives, strict=True)]
        fingerprints = Fingerprints(model)
        self.plan: dict[str, Any] = {
            "evaluator": "yes_no",
            "backbone": fingerprints.backbone,
            "prompts": fingerprints.prompts,
            "question": self.QUESTION,
            "pairs": digest([repr((r.query, r.positive, r.negatives)) for r in records]),
            "num_negatives": num_negatives,
            "seed": seed,
        }
        targets = set(positives)
        others = [sorted((b & targets) - {p}) for b, p in zip(self._barred, positives, strict=True)]
        if any(others):
            self.plan["false_negatives"] = digest(others)

    def matches(self, pairs: Sequence[Pair]) -> list[Match | None]:
        """Return one match for each (record, CoT); None where no negative is left to ask about."""
        questions: dict[tuple[int, int, str | None], int] = {}
        wanted: list[list[list[int]]] = []
        targets = {position: self._targets(position) for position, _ in pairs}
        for position, cot in pairs:
            wanted.append(
                [
                    [
                        questions.setdefault((position, number, text), len(questions))
                        for number in range(len(targets[position]))
                    ]
                    for text in (cot, None)
                ]
            )
        logits = self._logits(
            [
                question_item(self.records[position].query, targets[position][number], cot)
                for position, number, cot in questions
            ]
        )
        return [_match(*(self._controlled(logits[rows]) for rows in both)) for both in wanted]

    def _controlled(self, logits: Tensor) -> float | None:
        """Return the margin of the positive's logit, which comes first."""
        positive, *negatives = logits.tolist()
        return margin(positive, negatives, self.num_negatives)

    def _targets(self, position: int) -> list[Item]:
        record, barred = self.records[position], self._barred[position]
        negatives = [item for item in record.negatives if item.content_key() not in barred]
        if not negatives:
            pool = self._pools[pool_of(record)]
            die = random.Random(f"{self.seed}/{record.id}")
            drawn = die.sample(pool, min(len(pool), 4 * self.num_negatives))
            allowed = [other for other in drawn if self._positive_ids[other] not in barred]
            negatives = [self.records[other].positive for other in allowed]
        return [record.positive, *negatives[: self.num_negatives]]

    @torch.no_grad()
    def _logits(self, items: list[Item]) -> Tensor:
        """Return logit(yes) - logit(no), (N,), of N questions; prompts are padded on the left."""
        parts = []
        backbone = self.model.backbone
        for start in range(0, len(items), self.batch_size):
            batch = self.model.collate(items[start : start + self.batch_size])
            inputs = {key: value.to(self.model.device) for key, value in batch.items()}
            with without_adapters(self.model.peft_model):
                logits = backbone.model(
                    **inputs,
                    position_ids=position_ids(backbone, inputs),
                    logits_to_keep=1,
                    use_cache=False,
                ).logits[:, -1]
            sides = [logits[:, ids].float().logsumexp(dim=-1) for ids in (self.yes, self.no)]
            parts.append((sides[0] - sides[1]).cpu())
        return torch.cat(parts)


def build_evaluator(
    name: str,
    model: DualLoraModel,
    records: Sequence[Record],
    directory: str | Path,
    *,
    num_negatives: int = 1,
    max_negative_similarity: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    processes: Processes | None = None,
) -> Evaluator:
    """Return one of `EVALUATORS`.

    `directory`, `batch_size` and `max_negative_similarity` are those of the margin.
    """
    if name == "yes_no":
        return YesNoEvaluator(model, records, num_negatives=num_negatives, seed=seed)
    return MarginEvaluator(
        model,
        records,
        directory,
        num_negatives=num_negatives,
        max_negative_similarity=max_negative_similarity,
        batch_size=batch_size,
        processes=processes,
    )


def _match(with_cot: float | None, without: float | None) -> Match | None:
    return None if with_cot is None or without is None else Match(with_cot, without)


def question_item(query: Item, target: Item, cot: str | None) -> Item:
    """Return one item that asks whether `target` is what `query` looks for.

    Pictures and frames of the query come first, then those of the target, as the text says.
    """
    own, other = (len(item.images) + len(item.video) for item in (query, target))
    lines = [f"The first {own} pictures belong to the query."] if own and other else []
    lines.append("Query: " + " ".join(part for part in (query.instruction, query.text) if part))
    if cot is not None:
        lines.append(f"Reasoning: {cot.strip()}")
    shown = " ".join(part for part in (target.instruction, target.text) if part)
    lines.append(f"Candidate: {shown or f'the last {other} pictures'}")
    return replace(
        Item(text="\n".join([*lines, YesNoEvaluator.QUESTION])),
        images=(*query.images, *query.video, *target.images, *target.video),
    )


def answer_ids(tokenizer: Any, word: str) -> list[int]:
    """Return the distinct single tokens that spell an answer, with and without capital and space.

    Raises:
        SelectionError: If the tokenizer has none.
    """
    found: dict[int, None] = {}
    for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found[ids[0]] = None
    if not found:
        raise SelectionError(
            f"evaluator = 'yes_no', but the tokenizer has no single token for {word!r}; expected a "
            "backbone that can answer; use --evaluator margin"
        )
    return list(found)


def judge(
    rows: Sequence[Row],
    evaluator: Evaluator,
    model: DualLoraModel,
    folder: Path,
    *,
    batch_size: int = 64,
    rebuild: bool = False,
    processes: Processes | None = None,
    show_progress_bar: bool = True,
) -> RecordRows:
    """Return the rows with `with_cot`, `without` and `worth` at every draft that can be taught.

    Equal CoTs of a record are scored once. A CoT beyond the model's think budget could never be
    written again; it gets the problem "too_long". One that cannot be judged gets "no_negatives".
    """

    def score(positions: Sequence[int]) -> list[Row]:
        judged = {
            position: [_within_budget(draft, model) for draft in rows[position]["drafts"]]
            for position in positions
        }
        usable = [
            ((position, draft["cot"]), draft)
            for position, drafts in judged.items()
            for draft in drafts
            if draft["problem"] is None
        ]
        pairs, found = list(dict(usable)), dict[Pair, Match | None]()
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            found |= zip(batch, evaluator.matches(batch), strict=True)
        for pair, draft in usable:
            match = found[pair]
            if match is None:
                draft["problem"] = "no_negatives"
            else:
                draft |= {**asdict(match), "worth": match.worth}
        return [{"drafts": drafts} for drafts in judged.values()]

    plan = {**evaluator.plan, "drafts": digest([row["drafts"] for row in rows])}
    plan["max_think_tokens"] = model.config.max_think_tokens
    return RecordRows(folder, [row["id"] for row in rows], plan).fill(
        score, rebuild=rebuild, processes=processes, show_progress_bar=show_progress_bar
    )


def _within_budget(draft: Row, model: DualLoraModel) -> Row:
    if draft["problem"] is not None:
        return dict(draft)
    tokens = len(model.completion_ids(model.renderer.completion(draft["cot"]), add_eos=True))
    is_too_long = tokens > model.config.max_think_tokens
    return {**draft, "problem": "too_long" if is_too_long else None}
