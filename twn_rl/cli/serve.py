"""`twn-rl serve`: a model over HTTP, with OpenAI's embeddings endpoint."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields
from pathlib import Path

from twn_rl.cli.model_arguments import load_embedder
from twn_rl.runtime.extras import extra
from twn_rl.serving.settings import ServeSettings

logger = logging.getLogger(__name__)

KEY_VARIABLE = "TWN_RL_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model, the address and the limits."""
    off = ServeSettings()
    parser.add_argument("--model", required=True, help="folder written by save_pretrained")
    parser.add_argument("--device", help="as cuda:0 or cpu; chosen if not given")
    parser.add_argument("--dtype", help="parameter type to load, as bfloat16; else the stored one")
    parser.add_argument("--collection", help="folder of `twn-rl index`, for POST /search")
    parser.add_argument("--host", default=off.host, help="address to listen on")
    parser.add_argument("--port", type=int, default=off.port, help="0 takes a free one")
    parser.add_argument("--name", help="name of the model in requests; else its folder's")
    parser.add_argument(
        "--api_key", help=f"secret that clients must send; else the variable {KEY_VARIABLE}"
    )
    parser.add_argument(
        "--is_open", action="store_true", help="let other machines in without an API key"
    )
    parser.add_argument(
        "--allowed_hosts", nargs="+", default=(), help="names by which clients may call the server"
    )
    told = {
        "batch_size": "inputs read at a time",
        "places": "thoughts written at a time",
        "max_body_mib": "largest body of a request, MiB",
        "max_pending_mib": "bodies of all requests, MiB",
        "max_inputs": "inputs of a request",
        "max_text_characters": "characters of an input",
        "max_pictures": "pictures of an input",
        "max_picture_pixels": "pixels of a picture",
        "max_pending_pixels": "pixels of all pictures in work",
        "max_queue": "inputs in work or waiting",
        "max_connections": "open connections",
        "timeout_seconds": "longest wait for an answer",
        "body_seconds": "longest wait for a request to arrive",
        "drain_seconds": "longest wait for what is in work at the end",
    }
    for name, text in told.items():
        default = getattr(off, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--max_think_tokens", type=int, help="longest thought; else the model's")


def settings_of(arguments: argparse.Namespace) -> ServeSettings:
    """Return the settings that `add_arguments` declared.

    Raises:
        ValueError: If one of them cannot be.
    """
    given = {each.name: getattr(arguments, each.name) for each in fields(ServeSettings)}
    given["api_key"] = given["api_key"] or os.environ.get(KEY_VARIABLE)
    given["allowed_hosts"] = tuple(given["allowed_hosts"])
    return ServeSettings(**given)


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process is told to end."""
    from twn_rl.inference.collection import Collection

    with extra("serve"):
        from twn_rl.serving.app import create_app
        from twn_rl.serving.run import bind, make_server, run_server
        from twn_rl.serving.service import EmbeddingService
    settings = settings_of(arguments)
    listener = bind(settings)  # a port that is taken shows before the model is loaded
    with listener:
        embedder = load_embedder(arguments)
        collection = None if arguments.collection is None else Collection(arguments.collection)
        service = EmbeddingService(embedder, settings, name=Path(arguments.model).resolve().name)
        run_server(make_server(create_app(service, collection=collection), settings), listener)
    logger.info("ended")
    return 0
