"""vLLM in this process, and what every vLLM is asked and answers; knows no trainer.

Prompts are token ids in which each picture is one placeholder, which vLLM writes out itself;
parameters are fields of its `SamplingParams` by name.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from twn_rl.runtime.extras import extra

with extra("train"):
    from trl.generation.vllm_generation import extract_logprobs
    from trl.trainer.utils import ensure_master_addr_port

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM has room for
# Nothing is reported to anybody; set before vLLM is imported, which reads them then.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # or a launcher's ranks would be split once more
}


@dataclass(frozen=True)
class Request:
    """A prompt for vLLM.

    Attributes:
        token_ids: The prompt, each picture as the one placeholder of its chat template.
        pictures: PIL pictures in the order of their placeholders.
    """

    token_ids: list[int]
    pictures: Sequence[Any] = ()


@dataclass
class Answer:
    """What vLLM made of one request.

    Attributes:
        prompt_ids: The prompt as the model read it, placeholders written out.
        completion_ids: What was sampled, n of them.
        logprobs: Of the sampled tokens as they were sampled, NaN as None.
        prompt_logprobs: Of the prompt's tokens but the first, if they were asked for.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float | None]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)


class Engine(Protocol):
    """What `vllm_rollouts` needs of vLLM."""

    def load(self, name: str, folder: Path) -> None:
        """Serve this adapter from here on, and no longer the one before."""
        ...

    def ask(self, requests: Sequence[Request], parameters: Mapping[str, Any]) -> list[Answer]:
        """Return one answer a request, by the adapter loaded last."""
        ...

    def close(self) -> None:
        """Give back what it holds; nothing may be asked afterwards."""
        ...


def lora_rank(rank: int) -> int:
    """Return the smallest rank that vLLM makes room for and that holds this one.

    >>> lora_rank(4), lora_rank(33)
    (8, 64)

    Raises:
        ValueError: If there is none.
    """
    if rank > LORA_RANKS[-1]:
        raise ValueError(
            f"reasoning_rank = {rank} with use_vllm; expected at most {LORA_RANKS[-1]}, which vLLM "
            "has room for; train a smaller reasoning adapter, or set use_vllm to false"
        )
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


class ColocatedEngine:
    """vLLM in this process, on this process's device, with a backbone of its own."""

    def __init__(
        self,
        backbone: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        rank: int,
        max_length: int | None,
        max_rows: int,
        memory_share: float,
        implementation: str,
        logprobs_mode: str,
        process_index: int,
        local_process_index: int,
        num_processes: int,
        is_on_cpu: bool,
    ) -> None:
        """Load the backbone; this process's random state and environment stay as they were."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with extra("vllm"):
            from vllm import LLM  # pyright: ignore[reportMissingImports]

        launch = {
            "RANK": process_index,
            "LOCAL_RANK": local_process_index,
            "WORLD_SIZE": num_processes,
        }
        self._joined_before = torch.distributed.is_initialized()
        with _random_state_kept(), _environment(launch):
            ensure_master_addr_port()
            self._llm: Any = LLM(
                model=backbone,
                revision=revision,
                tokenizer_revision=revision,
                dtype=str(dtype).removeprefix("torch."),
                load_format="safetensors",
                trust_remote_code=False,
                enable_lora=True,
                max_loras=1,
                max_lora_rank=lora_rank(rank),
                max_model_len=max_length,
                max_num_seqs=max_rows,
                max_num_batched_tokens=4096,  # TRL's: larger ones mislead vLLM's memory profile
                gpu_memory_utilization=memory_share,
                model_impl=implementation,
                distributed_executor_backend="external_launcher",
                logprobs_mode=logprobs_mode,
                generation_config="vllm",
                seed=process_index,
                enforce_eager=is_on_cpu,
                disable_log_stats=True,
            )
        self._adapter: Any = None

    def load(self, name: str, folder: Path) -> None:
        """Serve this adapter from here on, and no longer the one before."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        engine, number = self._llm.llm_engine, 1
        if self._adapter is not None:
            engine.remove_lora(self._adapter.lora_int_id)
            number = self._adapter.lora_int_id + 1
        self._adapter = LoRARequest(name, number, str(folder.absolute()))
        if not engine.add_lora(self._adapter):
            raise RuntimeError(f"vLLM did not load the adapter in {folder}; see its messages")

    def ask(self, requests: Sequence[Request], parameters: Mapping[str, Any]) -> list[Answer]:
        """Return one answer a request, by the adapter loaded last."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        prompts = []
        for request in requests:
            prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
            if request.pictures:
                prompt["multi_modal_data"] = {"image": list(request.pictures)}
            prompts.append(prompt)
        outputs = self._llm.generate(
            prompts, SamplingParams(**parameters), lora_request=self._adapter, use_tqdm=False
        )
        answers = []
        for output in outputs:
            logprobs, _ = extract_logprobs([output])
            answer = Answer(
                prompt_ids=list(output.prompt_token_ids),
                completion_ids=[list(each.token_ids) for each in output.outputs],
                logprobs=sampled_only(logprobs),
            )
            if output.prompt_logprobs is not None:
                pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                answer.prompt_logprobs = [found[token].logprob for token, found in pairs if found]
            answers.append(answer)
        return answers

    def close(self) -> None:
        """Give the memory back: weights, keys and values.

        vLLM would end torch's default process group, too, which the run's processes joined before
        vLLM did: each would then take itself for the only one, and all would write the same files.
        """
        with _default_group_kept() if self._joined_before else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """Let the body end process groups of its own, and not that of all processes."""
    destroy = torch.distributed.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if group not in (None, torch.distributed.group.WORLD):
            destroy(group)

    torch.distributed.destroy_process_group = destroy_own
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def _environment(values: Mapping[str, Any]) -> Iterator[None]:
    """Set variables in the body, those of the rendezvous included; afterwards all are as before."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name in (*values, "MASTER_ADDR", "MASTER_PORT"):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def sampled_only(logprobs: list[list[list[float | None]]] | None) -> list[list[float | None]]:
    """Return the first of each token's log-probabilities, that of the sampled token."""
    return [[entry[0] for entry in row] for row in logprobs or []]


def logprobs_mode(temperature: float) -> str:
    """Return which log-probabilities vLLM must report for TRL to compare with the trainer's.

    The trainer's are those of all tokens at the temperature. Raw ones are of all tokens at
    temperature 1; processed ones have the temperature, and leave forbidden tokens out: weighed by
    them a rollout would count less, the more probability its policy wastes on such tokens.
    """
    return "raw_logprobs" if temperature == 1.0 else "processed_logprobs"


def mean_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the mean absolute difference of log-probabilities of the same tokens, in nats.

    >>> mean_difference([-1.0, -2.0], [-1.5, -2.0])
    0.25
    """
    pairs = list(zip(first, second, strict=True))
    return math.fsum(abs(a - b) for a, b in pairs) / len(pairs)
