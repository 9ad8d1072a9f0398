"""vLLM behind a server: adapters, prompts and pictures go there over HTTP; knows no trainer."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from twn_rl.runtime.extras import extra
from twn_rl.training.vllm_engines import Answer, Request, logprobs_mode, lora_rank, sampled_only

with extra("train"):
    from trl.generation.vllm_client import VLLMClient, parse_logprobs

_CONNECTIONS = 64


class EngineServer:
    """A vLLM server that somebody started with `serve_command`; it must see the run's folder."""

    def __init__(
        self, address: str, *, timeout_seconds: float, logprobs_mode: str, command: str
    ) -> None:
        """Wait for the server."""
        self._command, self._logprobs_mode = command, logprobs_mode
        self._client = VLLMClient(base_url=address, connection_timeout=timeout_seconds)
        self._base = self._client.model
        self._name: str | None = None

    def load(self, name: str, folder: Path) -> None:
        """Serve this adapter from here on, and no longer the one before."""
        previous, self._name = self._name, name
        if previous is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": previous}, text=True)
        path = str(folder.absolute())
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, text=True)
        if previous is None:
            self._check_logprobs()

    def ask(self, requests: Sequence[Request], parameters: Mapping[str, Any]) -> list[Answer]:
        """Return one answer a request, by the adapter loaded last."""
        with ThreadPoolExecutor(max_workers=min(_CONNECTIONS, max(1, len(requests)))) as pool:
            return list(pool.map(lambda request: self._ask(request, parameters), requests))

    def close(self) -> None:
        """Take the adapter out of the server, if that is still there."""
        if self._name is not None:
            with suppress(RuntimeError, OSError):
                self._post("/v1/unload_lora_adapter", {"lora_name": self._name}, text=True)

    def _ask(self, request: Request, parameters: Mapping[str, Any]) -> Answer:
        body: dict[str, Any] = {
            "model": self._name or self._base,
            "token_ids": request.token_ids,
            "sampling_params": dict(parameters),
            "return_token_ids": True,
        }
        if request.pictures:
            body["content_parts"] = [
                {"type": "image_url", "url": _data_url(picture)} for picture in request.pictures
            ]
        reply = self._post("/inference/v1/generate", body)
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        logprobs, _ = parse_logprobs([choice["logprobs"] for choice in choices])
        answer = Answer(
            prompt_ids=reply["prompt_token_ids"],
            completion_ids=[choice["token_ids"] for choice in choices],
            logprobs=sampled_only(logprobs),
        )
        if reply.get("prompt_logprobs"):
            pairs = zip(reply["prompt_token_ids"], reply["prompt_logprobs"], strict=True)
            answer.prompt_logprobs = [
                found[str(token)]["logprob"] for token, found in pairs if found
            ]
        return answer

    def _post(self, path: str, body: dict[str, Any], *, text: bool = False) -> Any:
        reply = self._client.session.post(f"{self._client.base_url}{path}", json=body)
        if reply.status_code != 200:
            raise RuntimeError(
                f"the vLLM server at {self._client.base_url} answered {path} with "
                f"{reply.status_code}: {reply.text[:500]}; expected a server started by: "
                f"{self._command}"
            )
        return reply.text if text else reply.json()

    def _check_logprobs(self) -> None:
        """Ask for a token that is the only one allowed: sampled so, its probability is 1."""
        parameters = {"max_tokens": 1, "logprobs": 0, "allowed_token_ids": [1]}
        (answer,) = self.ask([Request([1, 1])], parameters)
        found = "processed_logprobs" if answer.logprobs[0][0] == 0.0 else "raw_logprobs"
        if found != self._logprobs_mode:
            raise RuntimeError(
                f"the vLLM server at {self._client.base_url} reports {found}; expected "
                f"{self._logprobs_mode}; start it by: {self._command}"
            )


def serve_command(
    backbone: str, revision: str | None, dtype: torch.dtype, rank: int, temperature: float
) -> str:
    """Return the shell command that starts a server for a backbone and adapters of this rank."""
    flags = [
        f"--dtype {str(dtype).removeprefix('torch.')} --load-format safetensors",
        f"--enable-lora --max-loras 1 --max-lora-rank {lora_rank(rank)}",
        f"--enable-scale-out --logprobs-mode {logprobs_mode(temperature)} --generation-config vllm",
    ]
    if revision:
        flags.insert(0, f"--revision {revision}")
    return (
        "VLLM_NO_USAGE_STATS=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "
        f"vllm serve {backbone} --host 127.0.0.1 --port 8000 {' '.join(flags)}"
    )


def _data_url(picture: Any) -> str:
    written = io.BytesIO()
    picture.save(written, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
