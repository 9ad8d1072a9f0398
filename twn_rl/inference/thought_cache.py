"""Thoughts on disk, so that an input is thought about once.

One SQLite file with a write-ahead log: any number of processes read while one writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CACHE_FILE = "cots.sqlite3"
_KEYS_PER_QUERY = 500  # SQLite's limit on the variables of a statement is 999 in old builds
_BUSY_SECONDS = 30.0

Thoughts = list[list[int]]


def cache_key(content_key: str, fingerprint: str, settings: Mapping[str, Any]) -> str:
    """Return the key of one input's thoughts.

    Args:
        content_key: Of the input, see `Item.content_key`.
        fingerprint: Of the model that writes, see `Fingerprints.thoughts`.
        settings: Everything else that decides what is written.
    """
    text = json.dumps([content_key, fingerprint, dict(sorted(settings.items()))])
    return hashlib.sha256(text.encode()).hexdigest()


class CotCache:
    """Key -> token ids of the thoughts of one input.

    Attributes:
        path: The file.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open the cache in `directory`, which is made if needed.

        Raises:
            ValueError: If the file there is no such cache.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / CACHE_FILE
        self._open: tuple[int, sqlite3.Connection] | None = None
        try:
            with self._connection as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS cots (key TEXT PRIMARY KEY, ids TEXT NOT NULL) "
                    "WITHOUT ROWID"
                )
                connection.execute("SELECT key, ids FROM cots LIMIT 1")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"cot cache {str(self.path)!r} cannot be used ({error}); expected a file written "
                "by this program or none; move it away or choose another cot_cache_dir"
            ) from error

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM cots").fetchone()[0])

    def get(self, keys: Sequence[str]) -> dict[str, Thoughts]:
        """Return the thoughts of those keys that are stored."""
        found: dict[str, Thoughts] = {}
        distinct = list(dict.fromkeys(keys))
        for start in range(0, len(distinct), _KEYS_PER_QUERY):
            part = distinct[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            rows = self._connection.execute(
                f"SELECT key, ids FROM cots WHERE key IN ({marks})", part
            )
            found |= {key: json.loads(ids) for key, ids in rows}
        return found

    def put(self, thoughts: Mapping[str, Thoughts]) -> None:
        """Store thoughts, all or none of them; a full disk or a lasting lock is only logged."""
        rows = [(key, json.dumps(ids)) for key, ids in thoughts.items()]
        try:
            with self._connection as connection:
                connection.executemany("INSERT OR IGNORE INTO cots VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            # The thoughts themselves are fine, and writing them again costs time only.
            logger.warning("%d thoughts could not be stored in %s: %s", len(rows), self.path, error)

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    @property
    def _connection(self) -> sqlite3.Connection:
        # SQLite forbids carrying a connection over a fork. Threads take turns in the embedder.
        if self._open is None or self._open[0] != os.getpid():
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            self._open = os.getpid(), connection
        return self._open[1]
