"""Retrieval tasks of our own in mteb's form, records among them.

mteb breaks ties by document id. Our tasks score with ties against the model, and name their
pictures instead of holding them, so that mteb never copies pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from datasets import Dataset, Features, List, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from twn_rl.data.images import ImageSource
from twn_rl.data.record import Item, Record, hop_of, task_of
from twn_rl.evaluation.retrieval_pools import Candidates, collect_candidates
from twn_rl.metrics.ranking import ndcg_at_k, positive_ranks

HIT = "hit_at_1_ties_last"
NDCG = "ndcg_at_10_ties_last"
EMOJI_SCENES = "EmojiScenes"


@dataclass(frozen=True)
class Entry:
    """A query or a document.

    Attributes:
        id: Its name in the qrels.
        text: With the instruction in front, as the project's renderer joins them.
        pictures: References: paths, or what the task's `open_picture` understands.
    """

    id: str
    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitData:
    """One split.

    Attributes:
        queries: Every query has a relevant document.
        corpus: All documents.
        relevant: Query id -> document id -> relevance, above 0.
        candidates: Query id -> documents it is ranked against; None ranks against the corpus.
        groups: Query id -> name of a group whose scores are also given on their own.
    """

    queries: Sequence[Entry]
    corpus: Sequence[Entry]
    relevant: Mapping[str, Mapping[str, int]]
    candidates: Mapping[str, Sequence[str]] | None = None
    groups: Mapping[str, str] = field(default_factory=dict)


class OwnRetrieval(AbsTaskRetrieval):
    """Interleaved texts and pictures; its splits are read when mteb asks for them."""

    def __init__(
        self,
        metadata: TaskMetadata,
        splits: Mapping[str, Callable[[], SplitData]],
        open_picture: Callable[[str], ImageSource] | None = None,
    ) -> None:
        """Describe a task.

        Args:
            metadata: Its `revision` must change with the data: it decides whether scores are kept.
            splits: Split -> what reads it.
            open_picture: Reference -> picture; None if references are paths.
        """
        self.metadata = metadata
        super().__init__()
        self.splits, self.open_picture = splits, open_picture
        self.groups: dict[str, Mapping[str, str]] = {}

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the splits."""
        if self.data_loaded:
            return
        data = {split: read() for split, read in self.splits.items() if split in self.eval_splits}
        self.groups = {split: part.groups for split, part in data.items()}
        self.dataset = {"default": {split: _mteb_form(part) for split, part in data.items()}}
        self.data_loaded = True

    def unload_data(self) -> None:
        """Forget the splits; mteb's way would take the metadata too, which belong to this one."""
        self.dataset, self.groups, self.data_loaded = {}, {}, False

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """Return hit@1 and nDCG@10 with ties against the model, for all queries and each group."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for query, relevance in qrels.items():
            pair = tie_averse_scores(results.get(query, {}), relevance)
            group = self.groups.get(hf_split, {}).get(query)
            for name in ("", *([f"_{group}"] if group else [])):
                groups.setdefault(name, []).append(pair)
        means = {name: np.mean(pairs, axis=0) for name, pairs in groups.items()}
        hits = {f"{HIT}{name}": float(mean[0]) for name, mean in means.items()}
        return hits | {f"{NDCG}{name}": float(mean[1]) for name, mean in means.items()}


def tie_averse_scores(
    found: Mapping[str, float], relevance: Mapping[str, int]
) -> tuple[float, float]:
    """Return hit@1 and nDCG@10 (linear gains) of one query, ties against the model.

    >>> tie_averse_scores({"a": 0.9, "b": 0.9, "c": 0.1}, {"a": 1})
    (0.0, 0.63...)

    Args:
        found: Document -> similarity, the nearest ones at least.
        relevance: Relevant document -> gain; those not found rank behind all found.
    """
    relevant = {name: gain for name, gain in relevance.items() if gain > 0}
    lowest = min(found.values(), default=0.0) - 1.0
    names = [*found, *(name for name in relevant if name not in found)]
    similarities = np.array([[found.get(name, lowest) for name in names]], dtype=np.float64)
    gains = np.array([[float(relevant.get(name, 0)) for name in names]])
    best = int(np.where(gains[0] > 0, similarities[0], -np.inf).argmax())
    rank = positive_ranks(similarities, [best], mask=gains > 0)[0]
    return float(rank == 1), float(ndcg_at_k(similarities, gains, 10)[0])


def own_metadata(name: str, *, revision: str, main_score: str, **settings: Any) -> TaskMetadata:
    """Return metadata of a task with texts and pictures on both sides."""
    values: dict[str, Any] = {
        "name": name,
        "dataset": {"path": name, "revision": revision},
        "main_score": main_score,
        "type": "Any2AnyRetrieval",
        "category": "it2it",
        "modalities": ["text", "image"],
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "reference": None,
        "description": name,
        "prompt": None,
        **settings,
    }
    return TaskMetadata(**values)


def records_task(name: str, splits: Mapping[str, Sequence[Record]]) -> OwnRetrieval:
    """Return records as a task: every query against the pool its record names, scored by hit@1.

    Scores also come by number of hops, or by the records' task where they have none.
    """
    digest = hashlib.sha256()
    readers = {}
    for split, records in splits.items():
        candidates = collect_candidates(records)
        digest.update(json.dumps([split, candidates.keys, candidates.positive]).encode())
        for index, record in enumerate(records):
            rivals = candidates.competing(index)
            about = [record.id, record.query.content_key(), _group(record), rivals]
            digest.update(json.dumps(about).encode())
        readers[split] = partial(_split_data, records, candidates)
    metadata = own_metadata(
        name,
        revision=digest.hexdigest()[:16],
        main_score=HIT,
        eval_splits=list(splits),
        description="Records of query, positive and negatives; pools compete.",
        prompt={"query": ""},  # every query brings its own instruction
    )
    return OwnRetrieval(metadata, readers)


def _split_data(records: Sequence[Record], candidates: Candidates) -> SplitData:
    keys = candidates.keys
    positives = zip(records, candidates.positive, strict=True)
    return SplitData(
        queries=[_entry(record.id, record.query) for record in records],
        corpus=[_entry(*pair) for pair in zip(keys, candidates.items, strict=True)],
        relevant={record.id: {keys[positive]: 1} for record, positive in positives},
        candidates={
            record.id: [keys[column] for column in candidates.competing(index)]
            for index, record in enumerate(records)
        },
        groups={record.id: _group(record) for record in records},
    )


def _group(record: Record) -> str:
    return hop_of(record) or task_of(record)


def _entry(name: str, item: Item) -> Entry:
    text = "\n".join(part for part in (item.instruction, item.text) if part)
    return Entry(name, text, tuple(str(picture) for picture in (*item.images, *item.video)))


def _mteb_form(data: SplitData) -> RetrievalSplitData:
    columns = {"id": Value("string"), "text": Value("string"), "image": List(Value("string"))}

    def table(entries: Sequence[Entry]) -> Dataset:
        rows = [{"id": e.id, "text": e.text, "image": list(e.pictures)} for e in entries]
        return Dataset.from_list(rows, features=Features(columns))

    ranked = data.candidates
    form: dict[str, Any] = {
        "corpus": table(data.corpus),
        "queries": table(data.queries),
        "relevant_docs": {query: dict(found) for query, found in data.relevant.items()},
        "top_ranked": None if ranked is None else {q: list(ids) for q, ids in ranked.items()},
    }
    return cast(RetrievalSplitData, form)
