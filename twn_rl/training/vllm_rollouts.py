"""Rollouts by vLLM: at each sync the reasoning adapter, and nothing else, goes to the engine.

TRL's own way merges the active adapter into the backbone in place, pushes all weights and takes
it out again. The backbone is under the frozen scorer, too, and in bfloat16 every such round moves
it; and the embedding adapter's token rows have names that vLLM does not know. Here nothing is
merged: vLLM reads the backbone as it is stored, and each sync is a small folder with a fresh name,
by which vLLM also tells its cached prompts apart.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoConfig

from twn_rl.data.record import Item
from twn_rl.modeling.adapter_files import save_adapter
from twn_rl.modeling.adapters import REASONING_ADAPTER, use_adapter
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.readout import without_checkpointing
from twn_rl.training.vllm_engines import (
    ColocatedEngine,
    Engine,
    Request,
    logprobs_mode,
    mean_difference,
)
from twn_rl.training.vllm_server import EngineServer, serve_command

# Added to the logit of what a policy must never write: its probability is 0 in float32.
FORBIDDEN_BIAS = -1e4
# Nats a token: bfloat16 differs by some hundredths; a missing adapter by more than this.
MAX_PROBE_DIFFERENCE = 0.25
# A policy that moved by this much on the probe cannot have left vLLM's answer the same to the bit.
CLEAR_CHANGE = 1e-3


class VLLMRollouts:
    """What TRL's trainer calls in place of its own `VLLMGeneration`.

    Attributes:
        engine: vLLM.
        probe_differences: Of each sync, the mean difference in nats between vLLM's and the
            trainer's log-probabilities of one prompt.
    """

    def __init__(
        self,
        model: DualLoraModel,
        args: Any,
        accelerator: Any,
        whole_model: Callable[[], AbstractContextManager[None]],
        eos_token_ids: Sequence[int],
    ) -> None:
        """Start vLLM in this process, or find the server.

        Args:
            model: The policy's model; its backbone must lie where vLLM can load it.
            args: `EmbedGRPOConfig`.
            accelerator: The trainer's.
            whole_model: Gathers the weights, so that the model can be called outside an engine.
            eos_token_ids: What ends a completion.
        """
        self.model, self._args, self._accelerator = model, args, accelerator
        self._whole_model = whole_model
        self._folder = Path(args.output_dir or ".") / ".vllm"
        # A server may serve several runs, and every process must know the folder by one name.
        self._run: str = broadcast_object_list([uuid.uuid4().hex[:8]], from_process=0)[0]
        self._syncs = 0
        self._short: dict[tuple[int, ...], list[int]] = {}
        probe = model.collate([Item(text="which object is it")])["input_ids"][0].tolist()
        closing = [*model.think_open_ids, *probe[-2:], model.backbone.eos_token_id]
        self._probe: list[int] = [*probe, *closing]
        self._probed: tuple[list[float], list[float]] | None = None
        self.probe_differences: list[float] = []
        self.engine = self._start()
        self._parameters = self._sampling_parameters(eos_token_ids)
        accelerator.wait_for_everyone()

    def _start(self) -> Engine | None:
        """Return this process's engine; None where the first process asks for all."""
        model, args, accelerator = self.model, self._args, self._accelerator
        backbone = model.backbone
        if not backbone.name:
            raise ValueError(
                "use_vllm = True on a backbone that was built in code; expected one that vLLM can "
                "load by its name or path; save the backbone and load it, or set use_vllm to false"
            )
        dtype, rank = backbone.model.dtype, model.config.reasoning_lora.r
        if args.vllm_mode == "server":
            if not accelerator.is_main_process:
                return None
            host = f"http://{args.vllm_server_host}:{args.vllm_server_port}"
            return EngineServer(
                args.vllm_server_base_url or host,
                timeout_seconds=args.vllm_server_timeout,
                logprobs_mode=logprobs_mode(args.temperature),
                command=serve_command(
                    backbone.name, backbone.revision, dtype, rank, args.temperature
                ),
            )
        return ColocatedEngine(
            backbone.name,
            revision=backbone.revision,
            dtype=dtype,
            rank=rank,
            max_length=args.vllm_max_model_length,
            max_rows=args.per_device_train_batch_size * args.steps_per_generation,
            memory_share=args.vllm_gpu_memory_utilization,
            implementation=args.vllm_model_impl,
            logprobs_mode=logprobs_mode(args.temperature),
            process_index=accelerator.process_index,
            local_process_index=accelerator.local_process_index,
            num_processes=accelerator.num_processes,
            is_on_cpu=accelerator.device.type == "cpu",
        )

    def _sampling_parameters(self, eos_token_ids: Sequence[int]) -> dict[str, Any]:
        args = self._args
        given = {k: v for k, v in (args.generation_kwargs or {}).items() if k != "suppress_tokens"}
        return {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            "max_tokens": args.max_completion_length,
            "logprobs": 0,
            "stop_token_ids": [int(token) for token in eos_token_ids],
            "logit_bias": dict.fromkeys(forbidden_tokens(self.model), FORBIDDEN_BIAS),
            **given,
        }

    def close(self) -> None:
        """Give back what vLLM holds."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def name_prompts(self, prompt_ids: list[list[int]], short_ids: list[list[int]]) -> None:
        """Say how the next prompts read before their placeholders were written out."""
        self._short = {
            tuple(whole): short for whole, short in zip(prompt_ids, short_ids, strict=True)
        }

    def sync_weights(self) -> None:
        """Give vLLM the reasoning adapter as it is now; every process must call this.

        Raises:
            RuntimeError: If vLLM's policy is not the trainer's afterwards.
        """
        self._syncs += 1
        name = f"reasoning-{self._run}-{self._syncs}"
        folder = self._folder / name
        save_adapter(self.model.peft_model, REASONING_ADAPTER, folder)
        self._accelerator.wait_for_everyone()
        if self.engine is not None:
            self.engine.load(name, folder)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._check_sync()

    def _check_sync(self) -> None:
        expected = self._own_probe()
        if self.engine is None:
            return
        parameters = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "logprobs": 0}
        (answer,) = self.engine.ask([Request(self._probe)], parameters)
        found = answer.prompt_logprobs
        self.probe_differences.append(mean_difference(expected, found))
        if problem := sync_problem((expected, found), self._probed):
            raise RuntimeError(f"sync {self._syncs} of the policy to vLLM: {problem}")
        self._probed = expected, found

    def _own_probe(self) -> list[float]:
        """Return the trainer's log-probabilities of the probe's tokens but the first."""
        model, ids = self.model, torch.tensor([self._probe])
        with (
            self._whole_model(),
            torch.no_grad(),
            without_checkpointing(model),
            evaluating(model),
            use_adapter(model.peft_model, REASONING_ADAPTER),
        ):
            logits = model.backbone.model(input_ids=ids.to(model.device)).logits[0, :-1]
        logps = logits.float().log_softmax(-1).cpu()
        return logps.gather(1, ids[0, 1:, None])[:, 0].tolist()

    def generate(
        self,
        prompts: list[list[int]],
        images: Sequence[Sequence[Any] | None] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]], None]:
        """Return prompts, completions and their log-probabilities, one row a rollout, as TRL does.

        Args:
            prompts: Whole prompts of this process's rollouts.
            images: Their pictures.
            num_generations: Rollouts of a prompt, which lie side by side.
            profiler: TRL's clock.

        Raises:
            RuntimeError: If vLLM read a prompt that is not the trainer's.
        """
        pictures = images if images is not None else [None] * len(prompts)
        requests = [
            Request(self._short.get(tuple(ids), ids), tuple(row or ()))
            for ids, row in zip(prompts, pictures, strict=True)
        ]
        with profiler or nullcontext():
            completions, logprobs = self._write(prompts, requests, num_generations)
        return prompts, completions, [[[value] for value in row] for row in logprobs], None

    def _write(
        self, prompts: list[list[int]], requests: list[Request], num_generations: int
    ) -> tuple[list[list[int]], list[list[float | None]]]:
        if self._args.vllm_mode != "server":
            return self._ask(prompts, requests, 1)
        # The first process asks for all: prompts once, with as many completions as a group has.
        prompts, counts = gather_object(prompts), gather_object([len(prompts)])
        requests = gather_object(requests)
        written: list[Any] = [None]
        if self.engine is not None:
            written = [self._ask(prompts, requests, num_generations)]
        completions, logprobs = broadcast_object_list(written, from_process=0)[0]
        first = sum(counts[: self._accelerator.process_index])
        own = slice(first, first + counts[self._accelerator.process_index])
        return completions[own], logprobs[own]

    def _ask(
        self, prompts: list[list[int]], requests: list[Request], group: int
    ) -> tuple[list[list[int]], list[list[float | None]]]:
        assert self.engine is not None
        answers = self.engine.ask(requests[::group], {**self._parameters, "n": group})
        for answer, whole in zip(answers, prompts[::group], strict=True):
            if answer.prompt_ids != whole:
                raise RuntimeError(
                    f"vLLM read a prompt of {len(answer.prompt_ids)} tokens where the trainer has "
                    f"{len(whole)}; expected the same tokens: this backbone's pictures are written "
                    "out in another way there; set use_vllm to false"
                )
        completions = [ids for answer in answers for ids in answer.completion_ids]
        return completions, [row for answer in answers for row in answer.logprobs]


def forbidden_tokens(model: DualLoraModel) -> list[int]:
    """Return what a policy must never write, of the tokens that the stored backbone has.

    Rows for read-outs may have been added since; vLLM has none of them, and refuses their numbers.
    """
    backbone = model.backbone
    stored = AutoConfig.from_pretrained(backbone.name, revision=backbone.revision)
    rows = stored.get_text_config(decoder=True).vocab_size
    return [token for token in model.suppressed_token_ids if token < rows]


Probed = tuple[Sequence[float], Sequence[float]]


def sync_problem(now: Probed, before: Probed | None) -> str | None:
    """Return what is wrong with a sync; None if nothing is.

    Args:
        now: The trainer's and vLLM's log-probabilities of the same tokens.
        before: Those of the sync before, if there was one.

    >>> sync_problem(([-1.0, -2.0], [-1.01, -2.0]), None)
    >>> sync_problem(([-1.5, -2.0], [-1.01, -2.0]), ([-1.0, -2.0], [-1.01, -2.0]))
    "vLLM's policy stayed the same to the bit while the trainer's moved by 0.250 nats a token; \
expected it to follow; is a server's adapter folder the run's?"
    """
    expected, found = now
    if before is not None:
        moved = mean_difference(expected, before[0])
        if moved > CLEAR_CHANGE and list(found) == list(before[1]):
            return (
                "vLLM's policy stayed the same to the bit while the trainer's moved by "
                f"{moved:.3f} nats a token; expected it to follow; is a server's adapter folder "
                "the run's?"
            )
    difference = mean_difference(expected, found)
    # Not the other way round: NaN is a problem, too.
    if not difference <= MAX_PROBE_DIFFERENCE:
        return (
            f"log-probabilities of one prompt differ by {difference:.3f} nats a token from the "
            f"trainer's; expected at most {MAX_PROBE_DIFFERENCE}: vLLM has another backbone, or "
            "does not apply the adapter to this architecture; check the server's model, or set "
            "use_vllm to false"
        )
    return None
