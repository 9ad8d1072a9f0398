"""Who thinks: each input by what the caller said, by the gate, or by the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from twn_rl.inference.options import EncodeOptions, GivenThought, Keep, Side
from twn_rl.modeling.gate import THRESHOLD_FIELDS, Gate
from twn_rl.modeling.judge import Judge
from twn_rl.modeling.model import DualLoraModel


@dataclass(frozen=True)
class Chooser:
    """Which inputs think.

    Attributes:
        entries: Per input whether it writes a thought, or the thought it is given; None asks the
            gate or the policy.
        gate: No-think states (N, D) -> probabilities (N,); None with no entries asks the policy.
        threshold: Probability above which to think; unused with a rate.
        is_latent: Vectors without a written thought have a latent one.
        judge: Says how plausible thoughts are; None where the side has none.
        keep: Whether what it says counts, see `EncodeOptions`.
    """

    entries: Sequence[bool | GivenThought] | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    threshold: float | None = None
    is_latent: bool = False
    judge: Judge | None = None
    keep: Keep = "thought"

    @property
    def is_policy(self) -> bool:
        """Whether the policy's first token decides."""
        return self.entries is None and self.gate is None

    def thinks(self, position: int, probability: float | None) -> bool:
        """Return whether an input thinks, given what the gate or the policy said of it."""
        if self.entries is not None:
            return self.entries[position] is not False
        assert probability is not None
        assert self.threshold is not None
        return probability > self.threshold


def make_chooser(model: DualLoraModel, side: Side, options: EncodeOptions, count: int) -> Chooser:
    """Return who decides about `count` inputs of a call.

    Raises:
        ValueError: If the model lacks what the options ask for.
    """
    if side not in THRESHOLD_FIELDS:
        raise ValueError(f"side = {side!r}; expected one of {tuple(THRESHOLD_FIELDS)}; correct it")
    judge = _judge(model, side, options)
    return replace(_chooser(model, side, options, count), judge=judge, keep=options.keep)


def _judge(model: DualLoraModel, side: Side, options: EncodeOptions) -> Judge | None:
    """Return the judge of one side, if it has one; `keep` = "better" needs it."""
    judge = model.judge(side)
    if judge is None and options.keep == "better":
        raise ValueError(
            f"keep = 'better' but the model has no judge of {side} thoughts; expected a gate that "
            "was fitted with one; run recipes/gate_embed.py on this checkpoint, or leave keep out"
        )
    return judge


def _chooser(model: DualLoraModel, side: Side, options: EncodeOptions, count: int) -> Chooser:
    entries = options.per_input(count)
    is_latent = side == "document" and model.config.latent_documents
    if isinstance(options.think, str) and options.think == "latent":
        if not model.reason_ids:
            raise ValueError(
                "think = 'latent' but the model has num_reason_tokens = 0; expected at least one; "
                "train one with recipes/latent_embed.py, or pass think='always', 'never' or 'auto'"
            )
        is_latent = True
    if not options.is_auto:
        return Chooser(entries, is_latent=is_latent)
    threshold = options.think_threshold
    if _is_policy_asked(model, side, options):
        threshold = model.config.policy_threshold if threshold is None else threshold
        return Chooser(threshold=threshold, is_latent=is_latent)
    if side not in model.gates:
        if model.reason_ids and options.is_ungated:
            return Chooser(entries, is_latent=is_latent or side == "query")
        raise ValueError(
            f"think = 'auto' but the model has no {side} gate (gates: {sorted(model.gates)}); "
            "expected a fitted one; run recipes/gate_embed.py on this checkpoint, or pass "
            "think='always', 'never' or one bool per input"
        )
    if threshold is None:
        threshold = getattr(model.config, THRESHOLD_FIELDS[side])
    if threshold is None and options.think_rate is None:
        raise ValueError(
            f"{THRESHOLD_FIELDS[side]} = None; expected the probability above which a {side} "
            "thinks; fit it with recipes/gate_embed.py, or pass think_threshold or think_rate"
        )
    gate = cast(Gate, model.gates[side])
    return Chooser(gate=gate.probability, threshold=threshold, is_latent=is_latent)


def _is_policy_asked(model: DualLoraModel, side: Side, options: EncodeOptions) -> bool:
    """Tell whether the policy decides; it learned to about queries only."""
    if side == "document" and options.think_decision is None:
        return False
    is_asked = (options.think_decision or model.config.thinking_decision) == "policy"
    if is_asked and (side == "document" or not model.is_policy_deciding):
        raise ValueError(
            f"think_decision = 'policy' for the {side} side of a model with thinking_decision "
            f"= {model.config.thinking_decision!r}; expected queries and a policy that learned to "
            "decide; train one with recipes/adaptive_embed.py, or pass think_decision='gate', "
            "think='always' or 'never'"
        )
    return is_asked
