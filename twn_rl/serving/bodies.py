"""The requests of `/v1/embeddings`: OpenAI's fields, vLLM's messages, and ours."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from twn_rl.inference.options import Keep, Side, ThinkMode
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.received import Received, received_messages
from twn_rl.serving.service import Wish


class ThinkFields(BaseModel):
    """What every request may say about thinking.

    Attributes:
        model: Name of the model; None takes the only one there is.
        think: "auto", "always", "never" or "latent".
        think_threshold: With auto, think above this probability instead of the model's threshold.
        keep: "better" leaves out thoughts that the gate's judge finds implausible.
        max_think_tokens: Longest thought.
        return_thoughts: Return the texts of thoughts, too.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    think: ThinkMode | None = None
    think_threshold: float | None = Field(default=None, ge=0, le=1)
    keep: Keep = "thought"
    max_think_tokens: int | None = Field(default=None, ge=1)
    return_thoughts: bool = False

    @model_validator(mode="after")
    def _threshold_needs_auto(self) -> ThinkFields:
        if self.think_threshold is not None and self.think not in (None, "auto"):
            raise ValueError("think_threshold is set; expected it with think = auto; remove it")
        return self

    def check_model(self, name: str) -> None:
        """Refuse another model's name: a vector of the wrong model would be worse than an error.

        Raises:
            ServiceError: 404.
        """
        if self.model not in (None, name):
            raise ServiceError(
                404,
                f"model = {self.model[:80]!r} is not served here; expected {name!r}; change it",
                code="model_not_found",
                param="model",
            )

    def wish_as(self, side: Side | None) -> Wish:
        """Return how to embed; without a side nobody thinks unless it is said."""
        think = self.think
        if think is None and side is None:
            think = "never" if self.think_threshold is None else "auto"
        return Wish(
            input_type=side,
            think=think,
            think_threshold=self.think_threshold,
            keep=self.keep,
            max_think_tokens=self.max_think_tokens,
        )


class EmbeddingRequest(ThinkFields):
    """The body of `POST /v1/embeddings`.

    Attributes:
        input: A text or a list of texts.
        messages: Instead of `input`, one conversation with pictures as data URIs.
        instruction: For inputs that bring none of their own.
        input_type: "query" or "document"; without it an input is read as a query that does not
            think, unless `think` says so: one space serves both.
        encoding_format: "float", or "base64" of little-endian float32.
        dimensions: Keep the first numbers only, normalised again.
        user: Taken and not used, as OpenAI's clients send it.
        stream: Send events while a single input is worked on.
    """

    input: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    instruction: str | None = None
    input_type: Side | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None
    stream: bool = False

    @field_validator("input", mode="before")
    @classmethod
    def _texts_only(cls, value: Any) -> Any:
        """Refuse tokens in one sentence instead of one problem for each."""
        if isinstance(value, str) or value is None:
            return value
        if not isinstance(value, list):
            raise ValueError("expected a string or a list of strings; change it")
        for number, entry in enumerate(value):
            if isinstance(entry, str):
                continue
            if isinstance(entry, int | list):
                raise ValueError(
                    "holds token ids; expected texts: a prompt is laid out by the model's own "
                    "template, which tokens cannot pass through; send the text"
                )
            raise ValueError(f"entry {number} is no string; expected texts; change it")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages; send one of them")
        return self

    def wish(self) -> Wish:
        """Return how to embed."""
        return self.wish_as(self.input_type)

    def received(self) -> list[Received]:
        """Return the inputs.

        Raises:
            ServiceError: For messages of other roles or parts.
        """
        if self.messages is not None:
            one = received_messages(self.messages, "messages")
            return [with_instruction(one, self.instruction)]
        if isinstance(self.input, str):
            return [Received("input", self.input, (), self.instruction)]
        return [
            Received(f"input.{number}", text, (), self.instruction)
            for number, text in enumerate(self.input or [])
        ]


def with_instruction(received: Received, instruction: str | None) -> Received:
    """Return an input with an instruction, unless it has one."""
    if received.instruction is not None or instruction is None:
        return received
    return Received(received.where, received.text, received.pictures, instruction)
