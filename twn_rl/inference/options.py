"""What a call of `encode` may be told, checked at once. Knows no models and no inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from twn_rl.modeling.config import ThinkingDecision

ThinkMode = Literal["auto", "always", "never", "latent"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Think = ThinkMode | Sequence[bool]


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of one call; the names are those of sentence-transformers where it has them.

    Attributes:
        think: "auto" asks the gate or the policy, "always", "never", "latent" thinks in the model's
            reason tokens and writes nothing, or one bool per input.
        think_decision: With "auto", whom to ask, "gate" or "policy"; None asks whom the model
            names (`TwnConfig.thinking_decision`). About documents the gate alone is asked.
        think_rate: With "auto", think about this share of the call's inputs, those with the
            highest probability (rounded down); None uses the threshold. Which inputs think
            then depends on the other inputs of the call.
        think_threshold: With "auto", think above this probability; None takes the model's.
        max_think_tokens: Longest thought in tokens; None takes the model's. Longer thoughts count
            as truncated and leave the no-think vector.
        do_sample: Sample thoughts instead of taking the likeliest tokens.
        temperature: Of sampling, above 0.
        top_p: Of nucleus sampling; 1 is off.
        num_thoughts: Sampled thoughts per input; the vector is the mean of their vectors.
        seed: Decides sampled thoughts, together with the content of the input alone.
        prompt: Instruction for inputs that bring none.
        batch_size: Inputs a forward, and thoughts written together.
        show_progress_bar: None shows it if the log level is INFO or lower.
        convert_to_numpy: Return an array; otherwise a list of tensors.
        convert_to_tensor: Return a tensor on the model's device; wins over `convert_to_numpy`.
        normalize_embeddings: Return unit vectors.
        truncate_dim: Keep the first numbers only (and normalise again); None keeps all.
        precision: Other than "float32": see `twn_rl.inference.outputs.quantize`.
        on_bad_input: "raise", or "skip": an input that cannot be embedded gets a zero vector, and
            the details name position and reason.
        prefix_cache_gib: With `think_rate`, memory for what was read of inputs that may be chosen;
            those that do not fit are read again.
        return_details: Return `EncodeDetails` instead of the bare vectors.
    """

    think: Think = "never"
    think_decision: ThinkingDecision | None = None
    think_rate: float | None = None
    think_threshold: float | None = None
    max_think_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_thoughts: int = 1
    seed: int = 0
    prompt: str | None = None
    batch_size: int = 32
    show_progress_bar: bool | None = None
    convert_to_numpy: bool = True
    convert_to_tensor: bool = False
    normalize_embeddings: bool = True
    truncate_dim: int | None = None
    precision: Precision = "float32"
    on_bad_input: Literal["raise", "skip"] = "raise"
    prefix_cache_gib: float = 2.0
    return_details: bool = False

    def __post_init__(self) -> None:
        """Collect every problem of the call into one error."""
        problems = [*self._think_problems(), *self._other_problems()]
        if problems:
            raise ValueError("encode: " + "; ".join(problems) + "; change these arguments")

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> EncodeOptions:
        """Return the options of keyword arguments.

        Raises:
            TypeError: For arguments that do not exist.
        """
        known = [option.name for option in fields(cls)]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise TypeError(
                f"encode got unknown arguments {unknown}; expected only {known}; "
                "correct or remove them"
            )
        return cls(**arguments)

    @property
    def is_ungated(self) -> bool:
        """Whether nothing is asked for that only a gate can answer."""
        return self.think_rate is None and self.think_threshold is None

    def _think_problems(self) -> list[str]:
        is_gated = isinstance(self.think, str) and self.think == "auto"
        checks = {
            f"think = {self.think!r}, expected one of {get_args(ThinkMode)} or a list of bools": (
                not isinstance(self.think, str) or self.think in get_args(ThinkMode)
            ),
            "think_rate and think_threshold are both given, expected one": (
                self.think_rate is None or self.think_threshold is None
            ),
            "think_rate or think_threshold without a gate, expected them with think='auto'": (
                is_gated or (self.think_rate is None and self.think_threshold is None)
            ),
            f"think_decision = {self.think_decision!r} where nothing is decided, expected it with "
            "think='auto'": is_gated or self.think_decision is None,
            f"think_decision = {self.think_decision!r}, expected one of "
            f"{get_args(ThinkingDecision)} or None": (
                self.think_decision in (None, *get_args(ThinkingDecision))
            ),
            f"think_rate = {self.think_rate}, expected in [0, 1]": _is_share(self.think_rate),
            f"think_threshold = {self.think_threshold}, expected in [0, 1]": _is_share(
                self.think_threshold
            ),
            f"max_think_tokens = {self.max_think_tokens}, expected >= 1": (
                self.max_think_tokens is None or self.max_think_tokens >= 1
            ),
            f"temperature = {self.temperature}, expected > 0": self.temperature > 0,
            f"top_p = {self.top_p}, expected in (0, 1]": 0 < self.top_p <= 1,
            f"num_thoughts = {self.num_thoughts}, expected >= 1": self.num_thoughts >= 1,
            "temperature, top_p or num_thoughts are set, expected do_sample=True with them": (
                self.do_sample or (self.temperature, self.top_p, self.num_thoughts) == (1, 1, 1)
            ),
        }
        return [problem for problem, is_fine in checks.items() if not is_fine]

    def _other_problems(self) -> list[str]:
        checks = {
            f"batch_size = {self.batch_size}, expected >= 1": self.batch_size >= 1,
            f"truncate_dim = {self.truncate_dim}, expected >= 1 or None": (
                self.truncate_dim is None or self.truncate_dim >= 1
            ),
            f"precision = {self.precision!r}, expected one of {get_args(Precision)}": (
                self.precision in get_args(Precision)
            ),
            f"on_bad_input = {self.on_bad_input!r}, expected 'raise' or 'skip'": (
                self.on_bad_input in ("raise", "skip")
            ),
            f"prefix_cache_gib = {self.prefix_cache_gib}, expected >= 0": (
                self.prefix_cache_gib >= 0
            ),
        }
        return [problem for problem, is_fine in checks.items() if not is_fine]


def think_mask(think: Think, count: int) -> list[bool] | None:
    """Return one bool per input, or None if the gate or the policy decides.

    Raises:
        ValueError: If a list has another length, or holds something else than bools.
    """
    if isinstance(think, str):
        return None if think == "auto" else [think == "always"] * count
    values = think.tolist() if hasattr(think, "tolist") else list(think)  # type: ignore[union-attr]
    if len(values) != count or not all(isinstance(value, bool | np.bool_) for value in values):
        raise ValueError(
            f"think = {str(values)[:80]} ({len(values)} values) for {count} inputs; expected one "
            "bool per input, or 'auto', 'always', 'never', 'latent'; correct the list"
        )
    return [bool(value) for value in values]


def _is_share(value: float | None) -> bool:
    return value is None or 0.0 <= value <= 1.0
