"""The items of a file -> a file of vectors, streamed and resumable.

Knows neither how vectors are made nor how they are stored: a `ThinkingEmbedder` does the one,
`vector_files` the other.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.record import Item, RecordError
from twn_rl.inference.encode_settings import EncodeReport, EncodeSettings, ThinkMode
from twn_rl.inference.item_rows import ItemRow, Side
from twn_rl.inference.shared_shards import SharedShards
from twn_rl.inference.vector_files import VectorWriter
from twn_rl.inference.vector_meta import read_meta
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.generation import DualLoraInference
from twn_rl.runtime.processes import Processes, is_main
from twn_rl.runtime.sharded_pass import Progress, make_shards
from twn_rl.runtime.whole_files import digest

logger = logging.getLogger(__name__)

_SHOWN_ERRORS = 3


class Embedder(Protocol):
    """What the job needs of `twn_rl.inference.embedder.ThinkingEmbedder`."""

    model: Any

    def get_embedding_dimension(self) -> int:
        """Return the width D of a vector."""
        ...

    def encode_query(self, items: Sequence[Item], **settings: Any) -> Any:
        """Return details: embeddings and what happened to each item."""
        ...

    def encode_document(self, items: Sequence[Item], **settings: Any) -> Any:
        """Return details, as `encode_query`."""
        ...


class ItemSource(Protocol):
    """Rows to encode; `item_rows.ItemFile` is one."""

    path: Path
    side: Side
    fields: dict[str, str]
    data_root: Path
    ignored_fields: Counter[str]

    def rows(self, start: int = 0) -> Iterator[ItemRow]:
        """Yield the rows from position `start` on."""
        ...

    def describe(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return `rows`, their number, and `sha256`, which changes when their content does."""
        ...


def encode_file(
    embedder: Embedder,
    source: ItemSource,
    output: str | Path,
    settings: EncodeSettings | None = None,
    *,
    overwrite: bool = False,
    show_progress_bar: bool = True,
    model_fingerprints: Mapping[str, str | None] | None = None,
    processes: Processes | None = None,
) -> EncodeReport:
    """Write the vectors of all rows of `source` to `output`, going on where an earlier run stopped.

    Several processes share the shards, and write the bytes that one alone would.

    Beside the vectors stand the details of each row (`id`, `row`, `thought`, `gate_probability`,
    `policy_probability`, `think_tokens`, `problem`, `error`) and what has been done; see
    `vector_files`. A bad row has a zero vector and an error. Never more than a shard of rows is in
    memory.

    Args:
        embedder: A `ThinkingEmbedder`.
        source: Rows to encode; changed rows are refused, a changed file that holds the same is not.
        output: The .npy file.
        settings: How to encode.
        overwrite: Start anew whatever is in `output`.
        show_progress_bar: Show rows done.
        model_fingerprints: What `fingerprints` said of the embedder's model, to hash it once for
            many files; None asks.
        processes: The processes of a run, all of which call this and see the same disk.

    Raises:
        VectorFileError: If `output` was made otherwise, is damaged or in use.
        RecordError: For a bad row, if `on_bad_row` is "raise".
        OSError: If the disk is full; what is written stays, and the same call goes on.
    """
    settings = (settings or EncodeSettings()).of_model(embedder.model, source.side)
    meta = None if overwrite else read_meta(Path(output))
    described = source.describe(meta["notes"].get("input") if meta else None)
    if not described["rows"]:
        raise ValueError(f"{source.path} has no rows; expected at least one; check the file")
    plan = {
        "model": dict(
            model_fingerprints
            or fingerprints(
                embedder.model,
                source.side,
                settings.think_mode(source.side),
                is_judged=settings.keep == "better",
            )
        ),
        "settings": {
            "side": source.side,
            "think": settings.think_mode(source.side),
            "think_rate": settings.think_rate,
            "think_threshold": settings.think_threshold,
            **({} if settings.keep == "thought" else {"keep": settings.keep}),
            "max_think_tokens": settings.max_think_tokens,
            "shard_size": settings.shard_size,
            "dtype": settings.dtype,
            "fields": source.fields,
            "data_root": str(source.data_root),
        },
        "input": {"sha256": described["sha256"], "rows": described["rows"]},
    }
    notes = {"input": described, "path": str(source.path), "settings": asdict(settings)}
    shape = (described["rows"], embedder.get_embedding_dimension())
    work = SharedShards(output, plan, shape[0], settings.shard_size, processes)
    begin = partial(VectorWriter, output, shape, plan, notes=notes, overwrite=overwrite)
    with work.opened(begin, anew=overwrite):
        resumed = work.done_rows
        _encode_rest(embedder, source, work, shape, settings, show_progress_bar)
    if source.ignored_fields and is_main(processes):
        logger.info("%s: fields nothing reads: %s", source.path, dict(source.ignored_fields))
    return EncodeReport(shape[0], resumed, work.counts)


def fingerprints(
    model: DualLoraInference, side: Side, think: ThinkMode, *, is_judged: bool = False
) -> dict[str, str | None]:
    """Return what tells models apart: `space`, who embeds, and `thinker`, who decides and thinks.

    Vectors of one space can be compared, whoever wrote the thoughts. If nothing is written
    `thinker` is None, so that documents stay valid when only the reasoning adapter or a gate is
    trained on.

    Args:
        model: A `DualLoraModel`.
        side: Whose gate decides.
        think: When it thinks.
        is_judged: Whether its judge may leave thoughts out.
    """
    found = Fingerprints(model)
    thinker = None
    if think not in ("never", "latent"):
        decision = found.decision(side) if think == "auto" or is_judged else None
        thinker = digest([found.thoughts, model.config.max_think_tokens, decision])
    return {"space": found.vectors, "thinker": thinker}


def _encode_rest(
    embedder: Embedder,
    source: ItemSource,
    work: SharedShards,
    shape: tuple[int, int],
    settings: EncodeSettings,
    show_progress_bar: bool,
) -> None:
    """Make what is missing, shard by shard; rows come as a stream."""
    rows, width = shape
    stream, at = source.rows(work.done_rows), work.done_rows
    failed = work.counts.get("failed", 0)
    changed = ValueError(
        f"{source.path} no longer has the {rows} rows it had; expected a file that does not "
        "change while it is read; run again with --overwrite"
    )

    def make(number: int, wanted: Sequence[int], progress: Progress) -> None:
        nonlocal at, failed
        skipped = wanted[0] - at  # they are other processes'
        shard = list(islice(stream, skipped, skipped + len(wanted)))
        at = wanted[0] + len(shard)
        if len(shard) < len(wanted):
            raise changed
        numbered = dict(zip(wanted, shard, strict=True))
        vectors, details = _encode_shard(embedder, source.side, numbered, width, settings)
        _log_errors(details, failed)
        failed += _count(details)["failed"]
        work.add(number, vectors, details, _count(details))
        progress(len(shard))

    make_shards(
        work.missing(),
        make,
        description=f"encoding {source.path.name}",
        num_shards=len(work.ranges),
        show_progress_bar=show_progress_bar,
        processes=work.processes,
    )
    work.append_rest()
    if next(islice(stream, rows - at, None), None) is not None:
        raise changed


def _encode_shard(
    embedder: Embedder,
    side: Side,
    rows: Mapping[int, ItemRow],
    width: int,
    settings: EncodeSettings,
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    """Return vectors (n, D) and details of n rows by their numbers, good and bad."""
    shard = list(rows.values())
    vectors = np.zeros((len(shard), width), dtype=np.float32)
    details = [_detail(row, number) for number, row in rows.items()]
    items = {i: row.item for i, row in enumerate(shard) if row.item is not None}
    if len(items) < len(shard):
        _refuse(shard, {i: row.error for i, row in enumerate(shard) if row.error}, settings)
    if items:
        encode = embedder.encode_query if side == "query" else embedder.encode_document
        result = encode(
            list(items.values()),
            think=settings.think_mode(side),
            batch_size=settings.batch_size,
            max_think_tokens=settings.max_think_tokens,
            think_rate=settings.think_rate,
            think_threshold=settings.think_threshold,
            keep=settings.keep,
            on_bad_input="skip",
            show_progress_bar=False,
            return_details=True,
        )
        embeddings = _checked(result.embeddings, (len(items), width))
        for position, i in enumerate(items):
            made = _happened(result, position)
            if made["error"] is None and not np.isfinite(embeddings[position]).all():
                made["error"] = "the model gave NaN or infinity for this row"
            if made["error"] is None:
                vectors[i] = embeddings[position]
            details[i].update(made)
        _refuse(shard, {i: details[i]["error"] for i in items if details[i]["error"]}, settings)
    return vectors, details


def _refuse(
    shard: Sequence[ItemRow], errors: Mapping[int, str | RecordError], settings: EncodeSettings
) -> None:
    """Raise the first error, if bad rows are to stop the job."""
    if settings.on_bad_row == "skip" or not errors:
        return
    place, error = next(iter(errors.items()))
    if isinstance(error, RecordError):
        raise error
    raise RecordError(f"row with id {shard[place].id!r}: {error}", reason="bad_input")


def _detail(row: ItemRow, number: int) -> dict[str, Any]:
    return {
        "id": row.id,
        "row": number,
        "thought": None,
        "gate_probability": None,
        "policy_probability": None,
        "think_tokens": None,
        "problem": None,
        "error": None if row.error is None else str(row.error),
    }


def _happened(result: Any, position: int) -> dict[str, Any]:
    """Return what the embedder says of one item, JSON-ready."""
    gate, policy = result.gate_probabilities[position], result.policy_probabilities[position]
    tokens = result.think_tokens[position]
    problems = [problem for problem in result.problems[position] if problem is not None]
    if position in result.truncated:
        problems.append("input_cut")
    return {
        "thought": next(iter(result.thoughts[position]), None),
        "gate_probability": None if gate is None else float(gate),
        "policy_probability": None if policy is None else float(policy),
        "think_tokens": int(tokens),
        "problem": ", ".join(problems) or None,
        "error": result.errors.get(position),
    }


def _checked(embeddings: Any, shape: tuple[int, int]) -> NDArray[np.float32]:
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.shape != shape:
        raise ValueError(
            f"the embedder returned shape {vectors.shape}; expected {shape}: one vector an item; "
            "correct the embedder"
        )
    return vectors


def _count(details: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(
        failed=sum(line["error"] is not None for line in details),
        thoughts=sum(line["thought"] is not None for line in details),
        think_tokens=sum(line["think_tokens"] or 0 for line in details),
    )
    counts.update(f"problem: {line['problem']}" for line in details if line["problem"] is not None)
    return dict(counts)


def _log_errors(details: Sequence[Mapping[str, Any]], known: int) -> None:
    """Log the first bad rows of a file; the others are in the details."""
    errors = [line["error"] for line in details if line["error"] is not None]
    for error in errors[: max(0, _SHOWN_ERRORS - known)]:
        logger.warning("%s", error)
    if known < _SHOWN_ERRORS < known + len(errors):
        logger.warning("further bad rows are only counted; the details file has their errors")
