"""`twn-rl ui`: a page on which one asks a model, and sees it think and find."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from twn_rl.cli import serve
from twn_rl.cli.model_arguments import load_embedder
from twn_rl.inference.item_rows import ItemFile
from twn_rl.runtime.extras import extra

if TYPE_CHECKING:
    from twn_rl.inference.collection import Collection
    from twn_rl.inference.embedder import ThinkingEmbedder

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `twn-rl serve` does, and the questions to offer."""
    serve.add_arguments(parser)
    parser.add_argument(
        "--data",
        help="records whose questions are offered and, without --collection, whose answers are "
        "searched; else data/test.jsonl beside the model's folder, as the demo has it",
    )
    parser.add_argument("--data_root", help="folder no image path may leave; else the file's")
    parser.add_argument("--limit", type=int, default=1000, help="read this many rows of --data")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until the process is told to end."""
    with extra("serve"):
        from twn_rl.serving.app import create_app
        from twn_rl.serving.page import Page, read_curve, read_samples
        from twn_rl.serving.run import bind, make_server, run_server
        from twn_rl.serving.service import EmbeddingService
    settings = serve.settings_of(arguments)
    if settings.api_key is not None:
        raise ValueError(
            "an api_key is set, which the page does not send; expected none; leave it out, and "
            f"unset {serve.KEY_VARIABLE}"
        )
    data, folder = data_file(arguments), Path(arguments.model)
    with bind(settings) as listener, tempfile.TemporaryDirectory() as made:
        samples = []
        if data is not None:
            samples = read_samples(
                data,
                data_root=arguments.data_root,
                limit=arguments.limit,
                is_indexed=arguments.collection is None,
            )
        embedder = load_embedder(arguments)
        collection = open_collection(embedder, arguments, data, Path(made).resolve())
        decides = "policy" if embedder.model.is_policy_deciding else "gate"
        page = Page(samples, read_curve(folder / decides))
        service = EmbeddingService(embedder, settings, name=folder.resolve().name)
        app = create_app(service, collection=collection, routers=[page.router])
        logger.info("open the address in a browser; Ctrl+C ends")
        run_server(make_server(app, settings), listener)
    logger.info("ended")
    return 0


def data_file(arguments: argparse.Namespace) -> Path | None:
    """Return the file of the questions to offer; None has none, which needs a collection.

    Raises:
        ValueError: If there is nothing to search.
    """
    if arguments.data is not None:
        return Path(arguments.data)
    beside = Path(arguments.model).resolve().parent / "data" / "test.jsonl"
    if beside.is_file():
        return beside
    if arguments.collection is None:
        raise ValueError(
            f"there is nothing to search: no {beside}; expected records or a collection; give "
            "--data FILE, or --collection FOLDER of `twn-rl index`"
        )
    return None


def open_collection(
    embedder: ThinkingEmbedder, arguments: argparse.Namespace, data: Path | None, made: Path
) -> Collection:
    """Return the collection that was named, or one of the answers of `data`, made in `made`."""
    from twn_rl.inference.collection import Collection
    from twn_rl.inference.collection_writing import build_collection

    if arguments.collection is not None:
        return Collection(arguments.collection)
    assert data is not None  # `data_file` refuses to have neither
    source = ItemFile(data, side="document", data_root=arguments.data_root, limit=arguments.limit)
    logger.info("embedding the answers of %s", data)
    return build_collection(embedder, source, made / "answers", is_distinct=True)
