"""Candidates that a reasoning adapter writes; knows no evaluator and no endpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from twn_rl.data.record import Record
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.thought_selection.candidates import Candidate


class AdapterWriter:
    """CoTs of a model's own reasoning adapter at several temperatures."""

    shard_size = 256

    def __init__(
        self,
        model: DualLoraModel,
        name: str,
        *,
        temperatures: Sequence[float],
        num_thoughts: int = 1,
        max_think_tokens: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        """Hold settings.

        Args:
            model: Any model; another checkpoint is another writer.
            name: Of its folder; candidates are called `name@temperature`.
            temperatures: One or more; 0 is greedy and writes one CoT.
            num_thoughts: CoTs for each temperature above 0.
            max_think_tokens: Budget; the model's if None.
            batch_size: Queries a forward; does not change what is written.
            seed: Makes sampling repeatable, whatever the batches.
        """
        self.model, self.name, self.batch_size = model, name, batch_size
        self.temperatures, self.num_thoughts, self.seed = temperatures, num_thoughts, seed
        self.max_think_tokens = max_think_tokens
        self.plan: dict[str, Any] = {
            "writer": Fingerprints(model).thoughts,
            "temperatures": list(temperatures),
            "num_thoughts": num_thoughts,
            "max_think_tokens": max_think_tokens or model.config.max_think_tokens,
            "seed": seed,
        }

    def write(self, records: Sequence[Record]) -> list[list[Candidate]]:
        """Return the candidates of each record, malformed and truncated ones marked."""
        written: list[list[Candidate]] = [[] for _ in records]
        for start in range(0, len(records), self.batch_size):
            batch = records[start : start + self.batch_size]
            prompts = self.model.prepare(self.model.collate([record.query for record in batch]))
            for temperature in self.temperatures:
                count = self.num_thoughts if temperature else 1
                ids = self.model.reason(
                    prompts,
                    max_think_tokens=self.max_think_tokens,
                    do_sample=temperature > 0,
                    temperature=temperature or 1.0,
                    num_thoughts=count,
                    seeds=[self._die(record, temperature) for record in batch],
                )
                for row, completion in enumerate(ids):
                    think = self.model.think(completion)
                    source = f"{self.name}@{temperature:g}"
                    candidate = Candidate(think.text, source, think.problem)
                    written[start + row // count].append(candidate)
        return written

    def _die(self, record: Record, temperature: float) -> int:
        text = f"{self.seed}/{record.id}/{temperature:g}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
