"""What a call of `encode` gives back: vectors in the asked form, and what happened on the way.

Knows no models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twn_rl.data.chat import Think
from twn_rl.inference.options import EncodeOptions, Precision

logger = logging.getLogger(__name__)


@dataclass
class EncodeDetails:
    """The vectors of one call and how they came about; lists have one entry per input.

    Attributes:
        embeddings: What the call returns without `return_details`.
        thoughts: Texts of the thoughts of each input, malformed ones included; [] where it did not
            think.
        problems: Beside each thought None, or why it was left out ("truncated", "no_open", ...).
        think_tokens: Tokens of all thoughts of each input, end of turn not counted.
        gate_probabilities: What the gate said of each input; None where it was not asked.
        policy_probabilities: How likely the policy was to open a thought about each input; None
            where it was not asked.
        fallbacks: Positions that were to think but have their no-think vector, for want of a
            usable thought.
        truncated: Positions whose text was cut to fit `max_seq_length`.
        errors: Position -> why it has a zero vector, with `on_bad_input="skip"`.
        cot_cache_hits: Inputs whose thoughts came from the cache on disk.
        rereads: Inputs that were read twice because `prefix_cache_gib` was full.
        timings: Seconds by part of the work, and "total".
    """

    embeddings: Any
    thoughts: list[list[str]]
    problems: list[list[str | None]]
    think_tokens: list[int]
    gate_probabilities: list[float | None]
    policy_probabilities: list[float | None]
    fallbacks: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    cot_cache_hits: int = 0
    rereads: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, count: int) -> EncodeDetails:
        """Return the details of `count` inputs of which nothing is known yet."""
        return cls(
            embeddings=None,
            thoughts=[[] for _ in range(count)],
            problems=[[] for _ in range(count)],
            think_tokens=[0] * count,
            gate_probabilities=[None] * count,
            policy_probabilities=[None] * count,
        )

    @property
    def has_thought(self) -> list[bool]:
        """Whether each vector was read with at least one thought."""
        return [any(problem is None for problem in row) for row in self.problems]

    def add_thought(self, position: int, think: Think, tokens: int) -> None:
        """Note one thought of an input."""
        self.thoughts[position].append(think.text)
        self.problems[position].append(think.problem)
        self.think_tokens[position] += tokens

    def log(self) -> None:
        """Warn once of each kind of thing that went another way than asked for."""
        left_out = sum(problem is not None for row in self.problems for problem in row)
        total = sum(len(row) for row in self.problems)
        if left_out:
            logger.warning(
                "%d of %d thoughts were truncated or malformed and left out; %d inputs keep their "
                "no-think vector (positions %s)",
                *(left_out, total, len(self.fallbacks), _first(self.fallbacks)),
            )
        if self.truncated:
            logger.warning(
                "%d inputs were cut to max_seq_length (positions %s)",
                *(len(self.truncated), _first(self.truncated)),
            )
        if self.errors:
            position, problem = next(iter(sorted(self.errors.items())))
            logger.warning(
                "%d inputs were skipped and have zero vectors, first: input %d: %s",
                *(len(self.errors), position, problem),
            )
        if self.rereads:
            logger.info("%d inputs were read twice: prefix_cache_gib was full", self.rereads)


def _first(positions: list[int]) -> str:
    return ", ".join(map(str, sorted(positions)[:5])) + (", ..." if len(positions) > 5 else "")


def normalize_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return unit rows; rows of zeros stay zeros.

    >>> normalize_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def quantize(vectors: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
    """Return vectors (N, D) in fewer bits; each depends on itself alone, never on the others.

    "int8" scales each vector's largest number to 127, which cosine similarity does not notice, and
    "uint8" adds 128 to that. "ubinary" packs the signs, eight to a byte (D/8), and "binary" is the
    same shifted by -128, as in sentence-transformers: compare these by Hamming distance.

    >>> quantize(np.array([[0.5, -1.0, 0.0]], np.float32), "int8").tolist()
    [[64, -127, 0]]
    >>> quantize(np.array([[1, -1, 1, 1, -1, -1, -1, 1]], np.float32), "ubinary").tolist()
    [[177]]
    """
    if precision == "float32":
        return vectors
    if precision in ("int8", "uint8"):
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        scaled = np.rint(127 * (vectors / np.where(largest > 0, largest, 1)))
        return scaled.astype(np.int8) if precision == "int8" else (scaled + 128).astype(np.uint8)
    packed = np.packbits(vectors > 0, axis=1)
    return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def finish(
    states: NDArray[np.float32], options: EncodeOptions, *, is_single: bool, device: torch.device
) -> Any:
    """Return vectors in the form the caller asked for.

    Args:
        states: (N, D), not normalised; rows of zeros belong to skipped inputs.
        options: The caller's wishes.
        is_single: Return the one row as a vector.
        device: Where tensors go.
    """
    vectors = states[:, : options.truncate_dim]
    vectors = normalize_rows(vectors) if options.normalize_embeddings else vectors
    rows = np.ascontiguousarray(quantize(vectors, options.precision))
    if options.convert_to_tensor or not options.convert_to_numpy:
        tensor = torch.from_numpy(rows).to(device)
        if is_single:
            return tensor[0]
        return tensor if options.convert_to_tensor else list(tensor)
    return rows[0] if is_single else rows


def as_float_rows(vectors: Any) -> Tensor:
    """Return vectors (N, D) or one vector (D,) of any of the returned forms as a float32 tensor.

    Raises:
        TypeError: For quantised vectors, whose comparison depends on their form.
    """
    if isinstance(vectors, list | tuple) and len(vectors) and isinstance(vectors[0], Tensor):
        vectors = torch.stack(list(vectors))
    tensor = vectors if isinstance(vectors, Tensor) else torch.as_tensor(np.asarray(vectors))
    if not tensor.is_floating_point() and tensor.numel():
        raise TypeError(
            f"embeddings of type {tensor.dtype}; expected floating point; quantised vectors are "
            "for indexes, encode with precision='float32' to compare here"
        )
    return tensor.float() if tensor.ndim > 1 else tensor.float()[None]
