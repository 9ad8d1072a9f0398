"""TRL's private hooks: that each is there, and is called as `training.trl_hooks` relies on."""

import inspect
import re
from importlib.metadata import version

import pytest
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer

from twn_rl.training.trl_hooks import WRITTEN_AGAINST, HookedGRPOTrainer
from twn_rl.training.vllm_rollouts import VLLMRollouts

SIGNATURES = {
    "_get_train_sampler": ["dataset"],
    "_tokenize_prompts": ["prompts"],
    "_generate_single_turn": [
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_generate_and_score_completions": ["inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["model", "inputs"],
}
# (method of TRL, what its source must say, what of ours rests on it)
CALLS = [
    (
        "_generate",
        "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)",
        "`write_on` finds the prompts of a batch in what was tokenized last",
    ),
    (
        "_generate",
        "completion_ids, logprobs = self._generate_single_turn( "
        "prompt_ids, images, multimodal_fields, num_generations )",
        "`edit_completions` changes this list before masks and rewards are made of it",
    ),
    (
        "_generate_and_score_completions",
        ") = self._generate(prompts)",
        "what `edit_completions` returns belongs to the batch that is scored next",
    ),
    (
        "_generate_and_score_completions",
        "rewards_per_func = self._calculate_rewards("
        "inputs, prompts, completions, completion_ids_list)",
        "`rollout_columns` reads `record_index` in the examples and adds columns to them",
    ),
    (
        "_calculate_rewards",
        "keys = [key for key in inputs[0] if key not in",
        "columns added to the examples reach the rewards by name",
    ),
    (
        "_compute_loss",
        "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(",
        "`shape_loss` gets the policy's log-probabilities, first of what is returned",
    ),
    (
        "_compute_loss",
        'advantages = inputs["advantages"]',
        "`shape_loss` reads the advantages (N,) in the batch of the loss",
    ),
    (
        "_get_per_token_logps_and_entropies",
        "num_images",
        "pictures padded to one row a prompt are counted anew under this name",
    ),
    (
        "_get_per_token_logps_and_entropies",
        "self, model, input_ids, attention_mask, logits_to_keep,",
        "token types are cut to the second argument, and come by their name",
    ),
    (
        "_compute_loss",
        'token_type_ids=inputs.get("token_type_ids")',
        "token types are cut where log-probabilities are computed",
    ),
    (
        "_generate_and_score_completions",
        'output["num_images"] = num_images',
        "pictures padded to one row a prompt are counted anew before the batch is split",
    ),
    (
        "_generate_single_turn",
        "if self.use_vllm: # Sync weights if training step changed "
        "if self.state.global_step != self._last_loaded_step:",
        "rollouts by vLLM are switched on after TRL's __init__, and sync once a step",
    ),
    (
        "_generate_single_turn",
        "_, completion_ids, logprobs, _ = self.vllm_generation.generate( prompts=prompt_ids, "
        "images=images, num_generations=num_generations,",
        "`VLLMRollouts.generate` takes and returns this",
    ),
    (
        "_generate_single_turn",
        "logprobs = [[lp[0] for lp in seq] for seq in logprobs]",
        "`VLLMRollouts.generate` returns a list for each token",
    ),
    (
        "_generate_and_score_completions",
        'torch.tensor([float("nan") if x is None else x for x in logps])',
        "rollouts that `edit_completions` changed have None for vLLM's log-probabilities",
    ),
    (
        "log",
        "for key, val in self._metrics[mode].items()",
        "`log_means` appends to the metrics that TRL averages at the next log",
    ),
]


def recheck(what: str) -> str:
    return (
        f"TRL {version('trl')} is not what trl_hooks was written against ({WRITTEN_AGAINST}.x): "
        f"{what}; read the hook there again, mend it, then raise WRITTEN_AGAINST and the bound on "
        "trl in pyproject.toml"
    )


def test_the_version_is_the_one_it_was_written_against() -> None:
    is_same = version("trl").startswith(f"{WRITTEN_AGAINST}.")
    assert is_same, recheck("every hook of this test may have moved")


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_hook_takes_what_it_took(name: str) -> None:
    hook = getattr(GRPOTrainer, name, None)
    assert hook is not None, recheck(f"GRPOTrainer.{name} is gone")
    taken = list(inspect.signature(hook).parameters)[1:]
    assert taken == SIGNATURES[name], recheck(f"GRPOTrainer.{name} takes {taken}")


@pytest.mark.parametrize(("caller", "call", "reason"), CALLS)
def test_a_hook_is_called_as_it_was(caller: str, call: str, reason: str) -> None:
    source = re.sub(r"\s+", " ", inspect.getsource(getattr(GRPOTrainer, caller)))
    assert call in source, recheck(f"GRPOTrainer.{caller} says no longer {call!r}, but {reason}")


def test_no_hook_is_overridden_without_being_named_here() -> None:
    private = {name for name in vars(HookedGRPOTrainer) if name[0] == "_" and name[:2] != "__"}
    ours = {name for name in private if hasattr(GRPOTrainer, name)}
    assert ours == {*SIGNATURES, "_get_per_token_logps_and_entropies"}
    public = {"prompt_order", "edit_completions", "rollout_columns", "shape_loss", "write_on"}
    for name in {
        *public,
        "whole_model",
        "_short_prompts",
        "_write_with_vllm",
        "log_means",
        "everywhere",
        "own",
        "_marks",
        "_prompts",
        "_loss_inputs",
    }:
        assert not hasattr(GRPOTrainer, name), recheck(f"it has a {name} of its own now")


def test_weights_are_gathered_by_trls_own_function() -> None:
    names = list(inspect.signature(unwrap_model_for_generation).parameters)
    expected = ["model", "accelerator", "gather_deepspeed3_params", "gradient_checkpointing_kwargs"]
    assert names[:2] == expected[:2], recheck(f"unwrap_model_for_generation takes {names}")
    assert set(expected) <= set(names), recheck(f"unwrap_model_for_generation takes {names}")


def test_rollouts_by_vllm_stand_where_trls_own_stood() -> None:
    source = re.sub(r"\s+", " ", inspect.getsource(GRPOTrainer.__init__))
    expected = "if self.use_vllm: # Initialize vLLM generation backend self.vllm_generation ="
    assert expected in source, recheck("GRPOTrainer.__init__ starts vLLM in another way")
    assert list(inspect.signature(VLLMGeneration.generate).parameters) == list(
        inspect.signature(VLLMRollouts.generate).parameters
    ), recheck("VLLMGeneration.generate takes something else")
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
