"""What the tests of formats share: a data root with pictures, files in real shapes, conversions."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from twn_rl.cli import main
from twn_rl.data.record_files import RecordSet, load_records


def make_root(tmp_path: Path) -> Path:
    """Return a data root with pictures a to d, and a folder of three frames."""
    folder = tmp_path / "data"
    (folder / "pics").mkdir(parents=True)
    (folder / "clips" / "v1").mkdir(parents=True)
    names = ["pics/a.png", "pics/b.png", "pics/c.jpg", "pics/d.png"]
    names += [f"clips/v1/frame{i}.png" for i in range(3)]
    pixels = np.random.default_rng(0).integers(256, size=(len(names), 16, 16, 3), dtype=np.uint8)
    for name, array in zip(names, pixels, strict=True):
        Image.fromarray(array).save(folder / name)
    return folder


def png(value: int) -> bytes:
    """Return the bytes of a small picture whose red is `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path: Path, *rows: Any) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def convert(root: Path, name: str, source: Path, *options: str) -> RecordSet:
    """Convert to both output formats, which must load as the same records; return them."""
    loaded = []
    for suffix in ("jsonl", "parquet"):
        output = root / f"out.{suffix}"
        words = ["--from", name, "--input", str(source), "--output", str(output), *options]
        assert main(["convert", *words]) == 0
        loaded.append(load_records(output, data_root=root))
    assert list(loaded[0]) == list(loaded[1])
    assert [record.id for record in loaded[0]] == [record.id for record in loaded[1]]
    return loaded[0]


def under(root: Path, *names: str) -> tuple[str, ...]:
    """Return the paths that loaded records show."""
    return tuple(str(root / name) for name in names)
