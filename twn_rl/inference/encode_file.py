"""The items of a file -> a file of vectors, streamed and resumable.

Knows neither how vectors are made nor how they are stored: a `ThinkingEmbedder` does the one,
`vector_files` the other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from twn_rl.inference.encode_settings import EncodeReport, EncodeSettings, ThinkMode
from twn_rl.inference.item_rows import Side
from twn_rl.inference.shard_maker import Embedder, ItemSource, ShardMaker
from twn_rl.inference.shared_shards import SharedShards
from twn_rl.inference.vector_files import VectorWriter
from twn_rl.inference.vector_meta import read_meta
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.generation import DualLoraInference
from twn_rl.runtime.processes import Processes, is_main
from twn_rl.runtime.sharded_pass import Progress, make_shards
from twn_rl.runtime.whole_files import digest

logger = logging.getLogger(__name__)


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
    job = plan_job(
        *(embedder, source, output, settings),
        overwrite=overwrite,
        model_fingerprints=model_fingerprints,
    )
    work = SharedShards(output, job.plan, job.shape[0], job.settings.shard_size, processes)
    with work.opened(partial(job.open_writer, overwrite=overwrite), anew=overwrite):
        resumed = work.done_rows
        _encode_rest(embedder, source, work, job, show_progress_bar)
    if source.ignored_fields and is_main(processes):
        logger.info("%s: fields nothing reads: %s", source.path, dict(source.ignored_fields))
    return EncodeReport(job.shape[0], resumed, work.counts)


@dataclass(frozen=True)
class EncodeJob:
    """One file to be made, whoever makes its shards.

    Attributes:
        output: The .npy file.
        shape: Rows and width of the file.
        plan: What the rows depend on.
        notes: What the file says of its making besides.
        settings: How to encode, with what the model decides.
    """

    output: str | Path
    shape: tuple[int, int]
    plan: dict[str, Any]
    notes: dict[str, Any]
    settings: EncodeSettings

    def open_writer(self, *, overwrite: bool) -> VectorWriter:
        """Open the file."""
        return VectorWriter(
            self.output, self.shape, self.plan, notes=self.notes, overwrite=overwrite
        )


def plan_job(
    embedder: Embedder,
    source: ItemSource,
    output: str | Path,
    settings: EncodeSettings | None,
    *,
    overwrite: bool,
    model_fingerprints: Mapping[str, str | None] | None = None,
) -> EncodeJob:
    """Return what is to be made; see `encode_file`."""
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
    return EncodeJob(output, shape, plan, notes, settings)


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
    job: EncodeJob,
    show_progress_bar: bool,
) -> None:
    """Make what is missing, shard by shard; rows come as a stream."""
    known = work.counts.get("failed", 0)
    maker = ShardMaker(*(embedder, source, job.shape, job.settings), work.done_rows, known)

    def make(number: int, wanted: Sequence[int], progress: Progress) -> None:
        work.add(number, *maker.make(wanted))
        progress(len(wanted))

    make_shards(
        work.missing(),
        make,
        description=f"encoding {source.path.name}",
        num_shards=len(work.ranges),
        show_progress_bar=show_progress_bar,
        processes=work.processes,
    )
    work.append_rest()
    maker.expect_end()
