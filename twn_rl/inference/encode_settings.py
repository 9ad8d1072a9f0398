"""How the rows of a file are encoded, and what came of it. Knows no rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from twn_rl.inference.item_rows import Side
from twn_rl.inference.options import Keep, ThinkMode
from twn_rl.runtime.problems import Problems


@dataclass(frozen=True)
class EncodeSettings:
    """How the rows of a file become vectors.

    Attributes:
        think: When to write a thought; None is "never" for documents, and for queries "auto" if the
            model has a gate, a policy that decides or reason tokens, else "never".
        think_rate: Share of the items of a shard that may think, in [0, 1]; None is off.
        think_threshold: Gate probability above which to think, in [0, 1]; None is the model's.
        keep: "better" leaves out thoughts that the gate's judge finds implausible.
        max_think_tokens: Budget of one thought; None is the model's.
        batch_size: Items per forward pass. It may change between runs, as after a full memory.
        shard_size: Rows between two writes; a kill loses at most these.
        dtype: Parameter type the model was loaded with; None is the stored one.
        on_bad_row: "skip" leaves a zero vector and counts; "raise" stops.
    """

    think: ThinkMode | None = None
    think_rate: float | None = None
    think_threshold: float | None = None
    keep: Keep = "thought"
    max_think_tokens: int | None = None
    batch_size: int = 32
    shard_size: int = 1024
    dtype: str | None = None
    on_bad_row: Literal["raise", "skip"] = "skip"

    def __post_init__(self) -> None:
        """Collect every problem of the settings into one error."""
        problems = Problems()
        modes, errors = (*get_args(ThinkMode), None), ("raise", "skip")
        problems.unless(
            self.think in modes, f"think = {self.think!r}, expected one of {modes[:-1]} or none"
        )
        problems.one_of(self, get_args(Keep), "keep")
        problems.expect(self, "in [0, 1] or None", "think_rate", "think_threshold")
        problems.expect(self, "None or >= 1", "max_think_tokens")
        problems.expect(self, ">= 1", "batch_size", "shard_size")
        problems.unless(
            self.on_bad_row in errors, f"on_bad_row = {self.on_bad_row!r}, expected one of {errors}"
        )
        problems.refuse("EncodeSettings", "change these settings")

    def think_mode(self, side: Side) -> ThinkMode:
        """Return when items of this side think."""
        return self.think or ("auto" if side == "query" else "never")

    def of_model(self, model: Any, side: Side) -> "EncodeSettings":
        """Return these settings with `think` set by what the model has, where it is None.

        Queries think as a fitted gate, a policy that decides or reason tokens say; a model with
        none of them embeds without thinking. A rate or a threshold asks for a gate.
        """
        if self.think is not None or side != "query":
            return self
        is_asked = self.think_rate is not None or self.think_threshold is not None
        decides = side in model.gates or model.is_policy_deciding or bool(model.reason_ids)
        return replace(self, think="auto" if decides or is_asked else "never")


@dataclass(frozen=True)
class EncodeReport:
    """What a file of vectors holds after a run.

    Attributes:
        rows: Rows of the file.
        resumed_rows: How many of them an earlier run had made.
        counts: Over all rows: `failed`, `thoughts`, `think_tokens`, and `problem: ...` by kind.
    """

    rows: int
    resumed_rows: int
    counts: Mapping[str, int]

    @property
    def failed_rows(self) -> int:
        """Rows without a vector."""
        return self.counts.get("failed", 0)

    def __str__(self) -> str:
        """Return the report as one line."""
        rest = {name: count for name, count in self.counts.items() if name != "failed"}
        text = f"{self.rows} rows, {self.failed_rows} failed"
        text += f", {self.resumed_rows} from an earlier run" if self.resumed_rows else ""
        return text + "".join(f", {name} {count}" for name, count in sorted(rest.items()))
