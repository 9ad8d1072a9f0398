"""What a model is made of: LoRA sizes, read-out, interface, renderer. Knows no tensors."""

import json
import logging
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from twn_rl.data.chat import Renderer
from twn_rl.modeling.backbone_names import found_name, stored_name
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.reading import load_json
from twn_rl.runtime.whole_files import digest, write_text

logger = logging.getLogger(__name__)

CONFIG_FILE = "twn_config.json"
_SAVED = "settings_digest"  # of all else in the file
INTERFACES = ("reencode", "kv_detach", "shared_prefill")
# As Qwen3-VL-Embedding.
MAX_LENGTH = 8192
# About 1024 tokens of 32 x 32 pixels, as Qwen3-VL makes them.
MAX_IMAGE_PIXELS = 1_048_576
# Far beyond any use; what is larger is a slip that would fill the memory before it showed.
MAX_TAIL_TOKENS = 1024
MAX_RANK = 4096
MAX_THINK_TOKENS = 1_000_000
ReadoutStart = Literal["random", "pooled_token"]
ThinkingDecision = Literal["gate", "policy"]
LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _check_keys(owner: str, data: dict[str, Any], known: list[str]) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(
            f"{owner} has unknown keys {unknown}; expected only {known}; "
            "remove them or use the version that wrote them"
        )


def _check_types(owner: str, data: dict[str, Any], kind: type) -> None:
    problems = Problems()
    kinds = get_type_hints(kind)
    problems.typed(data, {name: _type_to_check(hint) for name, hint in kinds.items()})
    problems.refuse(owner, "correct these settings")


def _type_to_check(hint: Any) -> Any:
    """Return what a value must be to be judged by its settings, all of which are told at once."""
    if is_dataclass(hint):
        return dict
    return str if get_origin(hint) is Literal else hint


@dataclass
class LoraSettings:
    """Size of one LoRA adapter.

    Attributes:
        r: Rank.
        alpha: Scale numerator; updates are scaled by `alpha / r`.
        dropout: Dropout on the adapter's input; 0 is off.
        targets: Names of the language model's linear maps that get an adapter. The vision tower
            never gets one, also where its maps have the same names.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR_TARGETS

    def __post_init__(self) -> None:
        """Collect every problem of the settings into one error."""
        self.targets = tuple(self.targets)
        problems = Problems()
        problems.expect(self, f"in [1, {MAX_RANK}]", "r")
        problems.expect(self, "> 0", "alpha")
        problems.expect(self, "in [0, 1)", "dropout")
        problems.unless(self.targets, "targets is empty, expected at least one linear map")
        problems.refuse("LoraSettings")


@dataclass
class TwnConfig:
    """Everything needed to rebuild a model around its adapter weights.

    Attributes:
        backbone: Name or path of the backbone; empty until a model is built.
        backbone_revision: Commit of the backbone; None follows its default branch.
        interface: "reencode" re-reads input and CoT under the embedding adapter; "kv_detach" lets
            the read-out tokens attend to the detached cache the reasoning adapter left; in
            "shared_prefill" the bare backbone reads the prompt for both adapters, each of which
            acts from the prompt's last token on.
        num_readout_tokens: Q, learned tokens whose last states are averaged into the vector.
        readout_start: What read-out tokens are before training: "random" rows near the table's
            mean, or, on an embedder that pools its last token, that "pooled_token": the untrained
            no-think vector is then the backbone's own (`pooled_token.find_pooled_token`).
        num_reason_tokens: K, learned tokens before the read-outs in which a latent thought happens
            (LaME, arXiv 2606.13061); 0 is none.
        latent_bottleneck: Let the read-outs of a latent thought see the K reason states only.
        latent_documents: Embed documents with a latent thought too, in training and serving;
            otherwise only queries have one, and documents are indexed as without reason tokens.
        reasoning_lora: Adapter that writes CoTs.
        embedding_lora: Adapter that makes vectors.
        renderer: How items become prompts.
        max_length: Longest prompt in tokens, picture tokens included: longer ones lose the end of
            their text. A model lowers it to what its backbone's context leaves. None is unlimited.
        max_image_pixels: Largest picture or video frame in pixels; larger ones are scaled down,
            aspect kept. None is unlimited.
        max_think_tokens: Default budget of one CoT, in tokens.
        gate_threshold: Gate probability above which a query thinks; None while no gate was fitted.
        document_gate_threshold: The same for documents.
        thinking_decision: Who is asked whether a query is worth a thought: the "gate", or the
            "policy" itself, which was trained (`training.adaptive`) to open a thought or to end its
            turn at once.
        policy_threshold: Probability of opening a thought above which such a query thinks.
        versions: Library versions that wrote the checkpoint.
        backbone_fingerprint: `Fingerprints.frozen` of the backbone it was trained on; None if that
            is not known, or any is to be accepted.
        digests: sha256 of every file of weights beside these settings, by its path in the folder;
            empty if any content is to be accepted.
    """

    backbone: str = ""
    backbone_revision: str | None = None
    interface: Literal["reencode", "kv_detach", "shared_prefill"] = "reencode"
    num_readout_tokens: int = 4
    readout_start: ReadoutStart = "random"
    num_reason_tokens: int = 0
    latent_bottleneck: bool = False
    latent_documents: bool = False
    reasoning_lora: LoraSettings = field(default_factory=lambda: LoraSettings(r=32, alpha=64))
    embedding_lora: LoraSettings = field(default_factory=lambda: LoraSettings(r=64, alpha=128))
    renderer: Renderer = field(default_factory=Renderer)
    max_length: int | None = MAX_LENGTH
    max_image_pixels: int | None = MAX_IMAGE_PIXELS
    max_think_tokens: int = 256
    gate_threshold: float | None = None
    document_gate_threshold: float | None = None
    thinking_decision: ThinkingDecision = "gate"
    policy_threshold: float = 0.5
    versions: dict[str, str] = field(default_factory=dict)
    backbone_fingerprint: str | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Collect every problem of the config into one error."""
        problems = Problems()
        for name, known in (
            ("interface", INTERFACES),
            ("thinking_decision", get_args(ThinkingDecision)),
            ("readout_start", get_args(ReadoutStart)),
        ):
            value = getattr(self, name)
            problems.unless(value in known, f"{name} = {value!r}, expected one of {known}")
        problems.expect(self, f"in [1, {MAX_TAIL_TOKENS}]", "num_readout_tokens")
        problems.expect(self, f"in [0, {MAX_TAIL_TOKENS}]", "num_reason_tokens")
        problems.expect(self, f"in [1, {MAX_THINK_TOKENS}]", "max_think_tokens")
        problems.unless(
            self.readout_start == "random" or self.num_readout_tokens == 1,
            f"num_readout_tokens = {self.num_readout_tokens} with readout_start = "
            f"{self.readout_start!r}, expected 1: one token takes the place of the pooled one",
        )
        for name in ("latent_bottleneck", "latent_documents"):
            problems.unless(
                self.num_reason_tokens or not getattr(self, name),
                f"{name} = True with num_reason_tokens = 0, expected >= 1 of them",
            )
        problems.expect(self, "None or >= 1", "max_length", "max_image_pixels")
        problems.expect(self, "None or in [0, 1]", "gate_threshold", "document_gate_threshold")
        problems.expect(self, "in [0, 1]", "policy_threshold")
        problems.refuse("TwnConfig")

    @property
    def readout_settings(self) -> dict[str, Any]:
        """What the read-out is made of, for fingerprints; as ever without reason tokens."""
        settings: dict[str, Any] = {"num_readout_tokens": self.num_readout_tokens}
        if self.readout_start != "random":
            settings["readout_start"] = self.readout_start
        if self.num_reason_tokens:
            settings["num_reason_tokens"] = self.num_reason_tokens
            settings["latent_bottleneck"] = self.latent_bottleneck
            settings["latent_documents"] = self.latent_documents
        return settings

    @property
    def limit_settings(self) -> dict[str, int]:
        """What limits a prompt, for fingerprints; nothing without limits, as ever."""
        limits = {"max_length": self.max_length, "max_image_pixels": self.max_image_pixels}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_dict` is its inverse."""
        return {**asdict(self), "renderer": self.renderer.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TwnConfig":
        """Return the config of a `to_dict` result; one older than the limits of prompts has none.

        Raises:
            ValueError: For keys this version does not know.
        """
        if not isinstance(data, dict):
            raise ValueError(
                f"{CONFIG_FILE} holds {type(data).__name__}; expected an object of settings; use "
                "the file that save_pretrained wrote"
            )
        _check_keys(CONFIG_FILE, data, [f.name for f in fields(cls)])
        _check_types(CONFIG_FILE, data, cls)
        values = {"max_length": None, "max_image_pixels": None, **data}
        lora_keys = [f.name for f in fields(LoraSettings)]
        for name in ("reasoning_lora", "embedding_lora"):
            if name in values:
                _check_keys(name, values[name], lora_keys)
                _check_types(name, values[name], LoraSettings)
                values[name] = LoraSettings(**values[name])
        if "renderer" in values:
            _check_types("renderer", values["renderer"], Renderer)
            values["renderer"] = Renderer.from_dict(values["renderer"])
        return cls(**values)

    def save(self, directory: str | Path, *, folder: str | Path | None = None) -> None:
        """Write `twn_config.json` into `directory`.

        Args:
            directory: Where to write.
            folder: Where the file will lie, if that is another place: a backbone that is a folder
                is named by its way from there.
        """
        backbone = stored_name(self.backbone, directory if folder is None else folder)
        data = {**self.to_dict(), "backbone": backbone}
        data = {**data, _SAVED: digest(data)}
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        write_text(Path(directory) / CONFIG_FILE, text)

    @classmethod
    def load(cls, directory: str | Path, *, folder: str | Path | None = None) -> "TwnConfig":
        """Read `twn_config.json` from `directory`; arguments are those of `save`.

        Settings that were changed since they were saved are warned of.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it cannot be read, or for settings that cannot work; the file is named.
        """
        path = Path(directory) / CONFIG_FILE
        data = load_json(path)
        saved = data.pop(_SAVED, None) if isinstance(data, dict) else None
        try:
            config = cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if saved not in (None, digest(data)):
            logger.warning("%s has been changed since it was saved", path)
        config.backbone = found_name(config.backbone, directory if folder is None else folder)
        return config
