"""What a call of `encode` may be told: one class whose fields are the keyword arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, get_args

import torch

from twn_rl.modeling.config import ThinkingDecision
from twn_rl.runtime.problems import Problems

if TYPE_CHECKING:
    from twn_rl.inference.process_pool import EncodePool

ThinkMode = Literal["auto", "always", "never", "latent"]
Side = Literal["query", "document"]
# What becomes of a usable thought: it is used, or the judge says whether it is.
Keep = Literal["thought", "better"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
# The text of a thought without markers, or the token ids of one with them.
GivenThought = str | Sequence[int]
# Entries may be bools, given thoughts and None. A sequence of them would let any text pass as one.
Think = ThinkMode | Sequence[bool] | list[Any] | tuple[Any, ...]

Arguments = ParamSpec("Arguments")
Self = TypeVar("Self")
Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of one call; names, order and defaults are those of sentence-transformers.

    Those it has come first and may be passed by position, ours by keyword only. What differs:
    vectors are of unit length unless `normalize_embeddings` is False, and bytes of "int8" and
    "uint8" are scaled for each vector by itself.

    Attributes:
        prompt_name: Which of the model's `prompts` to use; `prompt` wins over it.
        prompt: Instruction for inputs that bring none.
        batch_size: Inputs a forward, and thoughts written together.
        show_progress_bar: None shows it if the log level is INFO or lower; a text is its title.
        output_value: "sentence_embedding", or None: a dict for each input with its
            "sentence_embedding" and the details of the same position. There are no token
            embeddings: read-outs make the vector.
        precision: Other than "float32" or None: see `twn_rl.inference.vector_forms.quantize`.
        convert_to_numpy: Return an array; otherwise a list of tensors.
        convert_to_tensor: Return a tensor on the model's device; wins over `convert_to_numpy`.
        device: Moves the model there first; a list embeds in a process for each of its devices.
        normalize_embeddings: Return unit vectors.
        truncate_dim: Keep the first numbers only (and normalise again); None keeps as many as the
            model's `truncate_dim`, by default all.
        pool: Processes to embed in, of `start_multi_process_pool`.
        chunk_size: Inputs a process takes at a time; None makes ten shares for each process.
        think: "auto" asks the gate or the policy, "always", "never", "latent" thinks in the model's
            reason tokens and writes nothing. Or a list with one entry per input: a bool, or the
            thought to embed the input with: its text, or token ids as `EncodeDetails.thought_ids`
            has them; "" is an empty thought, None no thought.
        think_decision: With "auto", whom to ask, "gate" or "policy"; None asks whom the model
            names (`TwnConfig.thinking_decision`). About documents the gate alone is asked.
        think_rate: With "auto", think about this share of the call's inputs, those with the
            highest probability (rounded down); None uses the threshold. Which inputs think
            then depends on the other inputs of the call.
        think_threshold: With "auto", think above this probability; None takes the model's. With 1
            nobody thinks, and the details still hold the probabilities.
        keep: "better" asks the gate's judge about each usable thought: one that is not like those
            that helped is left out, and the input keeps its no-think vector. "thought" uses it.
        max_think_tokens: Longest thought in tokens; None takes the model's. Longer thoughts count
            as truncated and leave the no-think vector.
        do_sample: Sample thoughts instead of taking the likeliest tokens.
        temperature: Of sampling, above 0.
        top_p: Of nucleus sampling; 1 is off.
        num_thoughts: Sampled thoughts per input; the vector is the mean of their vectors.
        seed: Decides sampled thoughts, together with the content of the input alone; or one seed
            per input, which then decides by itself.
        on_bad_input: "raise", or "skip": an input that cannot be embedded gets a zero vector, and
            the details name position and reason.
        prefix_cache_gib: With `think_rate`, memory for what was read of inputs that may be chosen;
            those that do not fit are read again.
        return_details: Return `EncodeDetails` instead of the bare vectors.
    """

    prompt_name: str | None = None
    prompt: str | None = None
    batch_size: int = 32
    show_progress_bar: bool | str | None = None
    output_value: Literal["sentence_embedding"] | None = "sentence_embedding"
    precision: Precision | None = "float32"
    convert_to_numpy: bool = True
    convert_to_tensor: bool = False
    device: str | torch.device | list[str | torch.device] | None = None
    normalize_embeddings: bool = True
    truncate_dim: int | None = None
    pool: EncodePool | None = None
    chunk_size: int | None = None
    _: KW_ONLY
    think: Think = "never"
    think_decision: ThinkingDecision | None = None
    think_rate: float | None = None
    think_threshold: float | None = None
    keep: Keep = "thought"
    max_think_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_thoughts: int = 1
    seed: int | Sequence[int] = 0
    on_bad_input: Literal["raise", "skip"] = "raise"
    prefix_cache_gib: float = 2.0
    return_details: bool = False

    def __post_init__(self) -> None:
        """Collect every problem of the call into one error."""
        problems, is_auto, modes = Problems(), self.is_auto, get_args(ThinkMode)
        problems.unless(
            not isinstance(self.think, str) or self.think in modes,
            f"think = {self.think!r}, expected one of {modes} or a list of bools or thoughts",
        )
        problems.unless(
            self.think_rate is None or self.think_threshold is None,
            "think_rate and think_threshold are both given, expected one",
        )
        problems.unless(
            is_auto or self.is_ungated,
            "think_rate or think_threshold without a gate, expected them with think='auto'",
        )
        problems.unless(
            is_auto or self.think_decision is None,
            f"think_decision = {self.think_decision!r} where nothing is decided, expected it with "
            "think='auto'",
        )
        for name in ("prompt", "prompt_name"):
            value = getattr(self, name)
            problems.unless(
                value is None or isinstance(value, str),
                f"{name} = {value!r:.80}, expected a text or None",
            )
        problems.one_of(self, (None, *get_args(ThinkingDecision)), "think_decision")
        problems.one_of(self, get_args(Keep), "keep")
        problems.unless(
            self.keep == "thought" or str(self.think) not in ("never", "latent"),
            f"keep = {self.keep!r} where nothing is written, expected it with think='auto', "
            "'always' or a list",
        )
        problems.one_of(self, (None, *get_args(Precision)), "precision")
        problems.one_of(self, ("sentence_embedding", None), "output_value")
        problems.one_of(self, ("raise", "skip"), "on_bad_input")
        problems.expect(self, "None or in [0, 1]", "think_rate", "think_threshold")
        problems.expect(self, "None or >= 1", "max_think_tokens", "truncate_dim", "chunk_size")
        problems.unless(
            self.think_rate is None or not self.is_spread,
            "think_rate in several processes, expected it in one: it is a share of the whole call",
        )
        problems.expect(self, "> 0", "temperature")
        problems.expect(self, "in (0, 1]", "top_p")
        problems.expect(self, ">= 1", "num_thoughts", "batch_size")
        problems.expect(self, ">= 0", "prefix_cache_gib")
        problems.unless(
            self.do_sample or (self.temperature, self.top_p, self.num_thoughts) == (1, 1, 1),
            "temperature, top_p or num_thoughts are set, expected do_sample=True with them",
        )
        problems.refuse("encode", "change these arguments")

    @property
    def is_spread(self) -> bool:
        """Whether several processes embed."""
        return self.pool is not None or isinstance(self.device, list)

    @property
    def is_auto(self) -> bool:
        """Whether the gate or the policy decides."""
        return isinstance(self.think, str) and self.think == "auto"

    @property
    def is_ungated(self) -> bool:
        """Whether nothing is asked for that only a gate can answer."""
        return self.think_rate is None and self.think_threshold is None

    def of_rows(self, rows: Sequence[int]) -> EncodeOptions:
        """Return the options of some of a call's inputs: lists about single inputs are cut."""
        think, seed = self.think, self.seed
        if not isinstance(think, str):
            entries = list(think)
            think = [entries[row] for row in rows]
        if isinstance(seed, Sequence):
            seed = [seed[row] for row in rows]
        return replace(self, think=think, seed=seed)

    def per_input(self, count: int) -> list[bool | GivenThought]:
        """Return for each of `count` inputs whether it writes a thought, or which it is given.

        Raises:
            ValueError: If a list of thoughts or seeds has another length, or strange entries.
        """
        if isinstance(self.seed, Sequence) and len(self.seed) != count:
            raise ValueError(
                f"seed has {len(self.seed)} values for {count} inputs; expected one int, or one "
                "per input; correct the list"
            )
        if isinstance(self.think, str):
            return [self.think == "always"] * count
        entries = _plain(self.think)
        values = [value for value in map(_entry, entries) if value is not None]
        if not len(entries) == len(values) == count:
            raise ValueError(
                f"think = {str(entries)[:80]} ({len(entries)} values) for {count} inputs; expected "
                "one bool or thought per input, or 'auto', 'always', 'never', 'latent'; correct "
                "the list"
            )
        return values


@dataclass(frozen=True, kw_only=True)
class QueryOptions(EncodeOptions):
    """Settings of what searches: by default gate or policy decides who thinks."""

    think: Think = "auto"


@dataclass(frozen=True, kw_only=True)
class SidedOptions(EncodeOptions):
    """Settings of either side.

    Attributes:
        side: "query" or "document": whose gate is asked; the policy decides about queries.
    """

    side: Side = "query"


def takes(
    options: Callable[Arguments, EncodeOptions],
) -> Callable[
    [Callable[[Self, Inputs, Any], Result]], Callable[Concatenate[Self, Inputs, Arguments], Result]
]:
    """Let a method (self, inputs, options) be called with the fields of `options` as keywords.

    Type checkers, editors and `inspect.signature` see each of them with its type and default.
    """
    keywords = list(inspect.signature(options).parameters.values())
    known = [keyword.name for keyword in keywords]

    def decorate(
        method: Callable[[Self, Inputs, Any], Result],
    ) -> Callable[Concatenate[Self, Inputs, Arguments], Result]:
        @functools.wraps(method)
        def encode(
            self: Self, inputs: Inputs, *args: Arguments.args, **arguments: Arguments.kwargs
        ) -> Result:
            if unknown := sorted(set(arguments) - set(known)):
                raise TypeError(
                    f"encode got unknown arguments {unknown}; expected only {known}; "
                    "correct or remove them"
                )
            return method(self, inputs, options(*args, **arguments))

        signature = inspect.signature(method)
        own = list(signature.parameters.values())[:2]
        encode.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        return encode

    return decorate


def _entry(value: Any) -> bool | GivenThought | None:
    """Return what a list says of one input, False for no thought; None if it is no such thing."""
    value = _plain(value)
    if isinstance(value, bool | str):
        return value
    if value is None:
        return False
    is_ids = isinstance(value, list) and all(type(token) is int for token in value)
    return value if is_ids else None


def _plain(value: Any) -> Any:
    """Return arrays, tensors and their scalars as Python has them, and sequences as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
