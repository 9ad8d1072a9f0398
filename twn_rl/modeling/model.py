"""One backbone that thinks and embeds: the room where adapters, read-out and prompts meet.

Knows no losses, no rewards, no trainers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twn_rl.modeling.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    attach_adapters,
    under_own_adapter,
    use_adapter,
)
from twn_rl.modeling.backbone import Backbone, load_backbone
from twn_rl.modeling.backbone_names import check_found
from twn_rl.modeling.checkpoint import (
    check_backbone,
    find_files,
    freeze_unless,
    load_weights,
    save_model,
)
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate_files import GATE_FILE, forget_thresholds, load_gates, warn_dropped
from twn_rl.modeling.generation import Batch, DualLoraInference
from twn_rl.modeling.hub import HubAccess, model_folder
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.pooled_token import find_pooled_token
from twn_rl.modeling.prefix_reading import completion_logits, read_rows
from twn_rl.modeling.prompt_features import prepare_prompts
from twn_rl.modeling.readout import (
    Tail,
    add_readout_tokens,
    check_bottleneck,
    join_sequence,
    kv_detach,
    pool,
    position_ids,
    reencode,
    without_checkpointing,
)
from twn_rl.modeling.vision import share_images

# What transformers calls it; it was "gradient" up to a version we still run on.
_IS_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
_CHECKPOINTING = "activation_checkpointing" if _IS_RENAMED else "gradient_checkpointing"


class DualLoraModel(DualLoraInference):
    """A frozen backbone with a reasoning and an embedding adapter: trained, stored, and served.

    Attributes are those of `DualLoraInference`.
    """

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | Backbone,
        config: TwnConfig | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
        access: HubAccess | None = None,
        attn_implementation: str | None = None,
    ) -> "DualLoraModel":
        """Return a model with new adapters on a backbone.

        Args:
            backbone: Name, path, or a loaded backbone, which is changed in place.
            config: Settings; defaults if None. Its `backbone` field is filled in.
            dtype: Parameter type when loading; None keeps the stored one.
            seed: Decides the initial adapter weights; the global random state is untouched.
            access: How the hub may be asked for a name.
            attn_implementation: Attention kernel when loading; None leaves it to transformers.
        """
        config = config or TwnConfig()
        if not isinstance(backbone, Backbone):
            revision = config.backbone_revision
            backbone = load_backbone(
                backbone,
                revision=revision,
                dtype=dtype,
                access=access,
                attn_implementation=attn_implementation,
            )
        config = replace(config, backbone=backbone.name or config.backbone)
        if config.latent_bottleneck:
            check_bottleneck(backbone)
        if config.readout_start == "pooled_token" and backbone.counts_columns:
            raise ValueError(
                "readout_start = 'pooled_token' on a backbone with sliding windows or linear "
                "attention; expected full attention; start at 'random'"
            )
        num_readouts = config.num_readout_tokens
        tail_ids = add_readout_tokens(backbone, num_readouts, config.num_reason_tokens)
        peft_model = attach_adapters(
            backbone,
            reasoning=config.reasoning_lora,
            embedding=config.embedding_lora,
            readout_ids=tail_ids,
            start_token=(
                find_pooled_token(backbone) if config.readout_start == "pooled_token" else None
            ),
            seed=seed,
        )
        tail = tail_ids[:num_readouts], tail_ids[num_readouts:]
        model = cls(backbone, peft_model, config, *tail)
        model.config.backbone_fingerprint = Fingerprints(model).frozen
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        backbone: str | Path | Backbone | None = None,
        dtype: str | torch.dtype | None = None,
        is_trainable: bool = False,
        accept_other_backbone: bool = False,
        revision: str | None = None,
        access: HubAccess | None = None,
        attn_implementation: str | None = None,
    ) -> "DualLoraModel":
        """Return the model stored in `path`; its vectors are those of the model that was saved.

        Args:
            path: Folder written by `save_pretrained`, or "owner/name" on the hub.
            backbone: Backbone to use instead of the one named in the config.
            dtype: Parameter type when loading the backbone.
            is_trainable: Leave both adapters trainable; otherwise everything is frozen. Stored
                gates stay behind with a warning: training changes what they are about.
            accept_other_backbone: Load although the backbone's weights are not those it was
                trained on, with a warning.
            revision: Commit, tag or branch of a hub name.
            access: How the hub may be asked, for the model and for its backbone.
            attn_implementation: Attention kernel of the backbone; None leaves it to transformers.

        Raises:
            FileNotFoundError: If `path` is nowhere, holds no config or no weights, or the folder
                of its backbone is gone.
            KeyError: If adapter keys or gate tensors are missing or unexpected, all named.
            ValueError: If shapes do not fit the backbone, no backbone is known or it is another
                one, a file is damaged or of another model, or a gate was fitted to another one.
        """
        path = model_folder(path, revision, access)
        config, files = find_files(path)
        source = backbone if backbone is not None else config.backbone
        if not source:
            raise ValueError(
                f"{CONFIG_FILE} names no backbone; expected a name or a path; pass backbone=..."
            )
        if isinstance(source, str):
            check_found(source, path)
        kernel = attn_implementation
        model = cls.from_backbone(
            source, config, dtype=dtype, access=access, attn_implementation=kernel
        )
        load_weights(model, path, files)
        if not is_trainable:
            load_gates(model, path, files[GATE_FILE])
        elif files[GATE_FILE].is_file():
            forget_thresholds(model.config)
            warn_dropped(f"{path} is loaded to be trained", "OUTPUT_DIR")
        check_backbone(model, path, config.backbone_fingerprint, accept_other_backbone)
        freeze_unless(model, is_trainable)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write adapters and settings; see `checkpoint.save_model`."""
        save_model(self, path)

    def embed(self, batch: Batch, *, is_latent: bool = False) -> Tensor:
        """Return unit-norm float32 vectors (N, D), local, of a batch from `collate`.

        Rows whose completion is empty give the no-think vector. Gradient reaches the embedding
        adapter and the rows of the tail only.

        Args:
            batch: N prompts, with or without completions.
            is_latent: Put the reason tokens before the read-outs: a latent thought.
        """
        tail = self._tail(is_latent)
        return pool(self._tail_states(batch, tail)[:, len(tail.reason_ids) :])

    def _tail_states(self, batch: Batch, tail: Tail) -> Tensor:
        """Return the states (N, K + Q, D) of the tail after prompts and completions."""
        if self.shares_prefill:
            return self._read_shared([(batch, tail)])[0]
        parts = self.backbone, self.peft_model, self._on_device(batch), tail
        if self._is_detached:
            return kv_detach(*parts, prefill_adapter=self.prefill_adapter)
        return reencode(*parts)

    def _read_bare(self, batch: Batch) -> Prefix:
        """Return what the bare backbone reads of a batch's prompts; no gradient."""
        with torch.no_grad(), without_checkpointing(self.peft_model):
            prompts = prepare_prompts(self.backbone, self._on_device(batch))
            return read_rows(self.backbone, self.peft_model, prompts, adapter=None)

    def _read_shared(
        self, batches: Sequence[tuple[Batch, Tail]], prefix: Prefix | None = None
    ) -> list[Tensor]:
        """Return tail states of batches with the same prompts, after the bare backbone's prefix.

        There is little to recompute: prompts have no gradient, and a checkpointed layer would drop
        its cache.
        """
        prefix = self._read_bare(batches[0][0]) if prefix is None else prefix
        with without_checkpointing(self.peft_model):
            return [
                self._read_tail(prefix, self._on_device(batch), tail) for batch, tail in batches
            ]

    def token_nll(self, batch: Batch, prefix: Prefix | None = None) -> tuple[Tensor, Tensor]:
        """Return the summed NLL (N,) in nats of each completion, and its length (N,) in tokens.

        Logits are computed for the completion only. Gradient reaches the reasoning adapter only.

        Args:
            batch: N prompts with completions.
            prefix: What the bare backbone has read of the prompts, if that is at hand.
        """
        batch = self._on_device(batch)
        if "completion_ids" not in batch:
            raise ValueError(
                "batch has no completion_ids; expected completions; pass them to collate"
            )
        targets, mask = batch["completion_ids"], batch["completion_mask"]
        logits = self._completion_logits(batch, prefix)
        labels = targets.masked_fill(mask == 0, -100)
        nll = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100
        )
        return nll.view_as(labels).sum(1), mask.sum(1)

    def _completion_logits(self, batch: Batch, prefix: Prefix | None) -> Tensor:
        """Return (N, C, V), what the reasoning adapter gives each token of the completions."""
        if self.shares_prefill:
            prefix = self._read_bare(batch) if prefix is None else prefix
            parts = self.backbone, self.peft_model, prefix, batch
            with without_checkpointing(self.peft_model):
                return completion_logits(*parts, adapter=REASONING_ADAPTER)
        inputs = join_sequence(batch)
        with use_adapter(self.peft_model, REASONING_ADAPTER):
            return self.backbone.model(
                **inputs,
                position_ids=position_ids(self.backbone, inputs),
                logits_to_keep=batch["completion_ids"].shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]

    def forward(
        self,
        embed: Mapping[str, Batch] | None = None,
        token_nll: Batch | None = None,
        latent: Mapping[str, Batch] | None = None,
    ) -> dict[str, Any]:
        """Return every vector and token loss of one training step in one forward.

        DDP and DeepSpeed must see exactly one forward of the wrapped module per backward. Batches
        that hold the very same prompt tensor share one pass of the vision tower and, where they are
        embedded, one key/value cache, gradient included.

        Args:
            embed: Batches by name, each given to `embed`.
            token_nll: Batch given to `token_nll`.
            latent: Batches by other names, embedded with a latent thought.

        Returns:
            `embeds`: name -> (N, D); `reason_states`: name -> (N, K, D) of the latent ones;
            `token_nll`, `token_count`: (N,), if asked for. Gradient flows into all of them.
        """
        tails = {name: self._tail(False) for name in embed or {}}
        tails |= {name: self._tail(True) for name in latent or {}}
        embedded = {**(embed or {}), **(latent or {})}
        groups = _by_prompt(embedded)
        batches: dict[Any, Batch] = {("embed", name): batch for name, batch in embedded.items()}
        if token_nll is not None:
            batches["token_nll", ""] = token_nll
        moved = {key: self._on_device(batch) for key, batch in batches.items()}
        batches = dict(share_images(self.backbone, moved))
        last = batches.pop(("token_nll", ""), None)
        states: dict[str, Tensor] = {}
        prefixes: dict[int, Prefix] = {}  # of the bare backbone, by the tensor of the prompts
        for names in groups:
            shared = [(batches["embed", name], tails[name]) for name in names]
            if self.shares_prefill:
                key = id(embedded[names[0]]["input_ids"])
                prefixes[key] = self._read_bare(shared[0][0])
                found = self._read_shared(shared, prefixes[key])
            else:
                found = self._read_together(shared)
            states |= dict(zip(names, found, strict=True))
        lengths = {name: len(tails[name].reason_ids) for name in embedded}
        embeds = {name: pool(states[name][:, k:]) for name, k in lengths.items()}
        output: dict[str, Any] = {"embeds": embeds}
        if latent:
            output["reason_states"] = {name: states[name][:, : lengths[name]] for name in latent}
        if token_nll is not None:
            nll = self.token_nll(last or token_nll, prefixes.get(id(token_nll["input_ids"])))
            output["token_nll"], output["token_count"] = nll
        return output

    def _read_together(self, batches: Sequence[tuple[Batch, Tail]]) -> list[Tensor]:
        """Return tail states of batches with the same prompts, which are read once if possible."""
        # A recomputed layer drops its cache, states of linear attention are written in place, and
        # "kv_detach" has no gradient in the prompt anyway.
        is_apart = self._is_detached or self.is_gradient_checkpointing
        if len(batches) == 1 or is_apart or self.backbone.counts_columns:
            return [self._tail_states(batch, tail) for batch, tail in batches]
        prompts = prepare_prompts(self.backbone, batches[0][0])
        prefix = read_rows(self.backbone, self.peft_model, prompts, adapter=EMBEDDING_ADAPTER)
        return [self._read_tail(prefix, batch, tail) for batch, tail in batches]

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass; trainers ask for it."""
        return bool(getattr(self.backbone.model, f"is_{_CHECKPOINTING}"))

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Trade time for memory; each layer is recomputed under the adapter of its forward.

        Arguments are those of `transformers.PreTrainedModel`.
        """
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        enable = getattr(self.backbone.model, f"{_CHECKPOINTING}_enable")
        enable(
            **{f"{_CHECKPOINTING}_kwargs": kwargs}, every_n_layers=every_n_layers, offload=offload
        )
        if kwargs["use_reentrant"]:
            self.backbone.model.enable_input_require_grads()
        for module in self.backbone.model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                checkpoint: Any = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = under_own_adapter(  # type: ignore[assignment]
                    checkpoint, self.peft_model
                )

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        getattr(self.backbone.model, f"{_CHECKPOINTING}_disable")()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Do `activation_checkpointing_enable` under its old name, which TRL still calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Do `activation_checkpointing_disable` under its old name."""
        self.activation_checkpointing_disable()


def _by_prompt(batches: Mapping[str, Batch]) -> list[list[str]]:
    """Return the names grouped by the very tensor that holds their prompts."""
    groups: dict[int, list[str]] = {}
    for name, batch in batches.items():
        groups.setdefault(id(batch["input_ids"]), []).append(name)
    return list(groups.values())
