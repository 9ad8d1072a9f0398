"""One self-contained HTML file of what was learned; knows no models and measures nothing."""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from twn_rl.evaluation.charts import Chart, draw_bars, draw_curves, read_curves
from twn_rl.evaluation.results import Evaluation, query_values
from twn_rl.images import ImageError, open_image

logger = logging.getLogger(__name__)

PICTURE_PIXELS = 160
# Mode -> how a reader would call it; the order of columns and bars.
MODE_NAMES = {
    "never": "no thinking",
    "always": "own thoughts",
    "auto": "gate decides",
    "oracle": "oracle",
    "sampled": "sampled thoughts",
    "gold": "gold thoughts",
    "shuffled": "another query's",
    "foreign": "another task's",
    "empty": "empty thought",
}
TABLE_MODES = ("never", "always", "auto", "oracle", "sampled")
ABLATION_MODES = ("always", "gold", "shuffled", "foreign", "empty", "never")


@dataclass(frozen=True)
class Cell:
    """One number of the table, as text."""

    value: str = "–"  # noqa: RUF001 -- a dash is what tables print for nothing
    detail: str = ""


def write_report(
    path: str | Path,
    after: Evaluation | str | Path,
    *,
    before: Evaluation | str | Path | None = None,
    curves: Mapping[str, str | Path] | None = None,
    title: str = "What thinking is worth",
    note: str = "",
    num_examples: int = 12,
) -> Path:
    """Write the report and return its path.

    Args:
        path: HTML file to write; nothing beside it is needed to view it.
        after: The evaluation to show, or its folder; with `before`, the one after RL.
        before: The same queries before RL; adds columns and the earlier thoughts.
        curves: Stage name -> its `metrics.jsonl`; a missing file is an error.
        title: Headline.
        note: A sentence below the headline, such as the configuration.
        num_examples: Queries in the gallery; those that RL changed come first.
    """
    after = after if isinstance(after, Evaluation) else Evaluation.load(after)
    if before is not None and not isinstance(before, Evaluation):
        before = Evaluation.load(before)
    stages = {name: draw_curves(read_curves(file)) for name, file in (curves or {}).items()}
    environment = Environment(
        loader=PackageLoader("twn_rl.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(
        title=title,
        note=note,
        has_before=before is not None,
        tables=[_table(split, after, before) for split in _splits(after)],
        ablations=_markup(_ablation_charts(after)),
        stages={name: _markup(charts) for name, charts in stages.items() if charts},
        examples=_examples(after, before, num_examples),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _markup(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    # The only text that is not escaped: drawn here, its labels escaped by the drawing library.
    return [{"title": c.title, "alt": c.alt, "svg": Markup(c.svg)} for c in charts]


def _splits(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(key.split("/")[0] for key in evaluation.metrics))


def _groups(evaluation: Evaluation, split: str) -> list[str]:
    """Return hops, then everything, then tasks."""
    found = {key.split("/")[1] for key in evaluation.metrics if key.startswith(f"{split}/")}
    found.discard("collapse")
    hops = sorted(group for group in found if group.startswith("hop"))
    return [*hops, *(["all"] if "all" in found else []), *sorted(found - {"all", *hops})]


def _table(split: str, after: Evaluation, before: Evaluation | None) -> dict[str, Any]:
    columns: list[tuple[str, Evaluation, str]] = []
    for mode in TABLE_MODES:
        if before is not None and _has_mode(before, split, mode):
            columns.append((f"{MODE_NAMES[mode]}, before RL", before, mode))
        if _has_mode(after, split, mode):
            name = MODE_NAMES[mode] + (", after RL" if before is not None else "")
            columns.append((name, after, mode))
    rows = [
        (group, [_cell(evaluation, f"{split}/{group}/{mode}") for _, evaluation, mode in columns])
        for group in _groups(after, split)
    ]
    return {"split": split, "columns": [name for name, _, _ in columns], "rows": rows}


def _has_mode(evaluation: Evaluation, split: str, mode: str) -> bool:
    return f"{split}/all/{mode}/hit@1" in evaluation.metrics


def _cell(evaluation: Evaluation, key: str) -> Cell:
    metrics = evaluation.metrics
    if f"{key}/hit@1" not in metrics:
        return Cell()
    low, high = metrics[f"{key}/hit@1_low"], metrics[f"{key}/hit@1_high"]
    tokens = metrics[f"{key}/think_tokens"]
    return Cell(f"{metrics[f'{key}/hit@1']:.2f}", f"{low:.2f} to {high:.2f}, {tokens:.0f} tokens")


def _ablation_charts(evaluation: Evaluation) -> list[Chart]:
    charts = []
    for split in _splits(evaluation):
        groups = {}
        for group in _groups(evaluation, split):
            keys = {MODE_NAMES[mode]: f"{split}/{group}/{mode}/hit@1" for mode in ABLATION_MODES}
            groups[group] = {
                name: tuple(evaluation.metrics[key + end] for end in ("", "_low", "_high"))
                for name, key in keys.items()
                if key in evaluation.metrics
            }
        is_ablated = any(set(bars) - {"own thoughts", "no thinking"} for bars in groups.values())
        shown = {g: bars for g, bars in groups.items() if g == "all" or g.startswith("hop")}
        if is_ablated:
            charts.append(draw_bars(f"Whose thoughts help: {split}", shown, label="hit@1"))
    return charts


def _examples(
    after: Evaluation, before: Evaluation | None, num_examples: int
) -> list[dict[str, Any]]:
    """Return gallery entries: queries whose outcome RL changed first, then the rest in order."""
    runs = [("before RL", before)] if before is not None else []
    runs.append(("after RL" if before is not None else "own thoughts", after))
    # A query counts once per split and id.
    found: dict[tuple[str, str], list[tuple[str, dict[str, Any], Evaluation]]] = {}
    for name, run in [("no thinking", after), *runs]:
        wanted = "never" if name == "no thinking" else "always"
        for row in run.queries:
            if row["mode"] == wanted:
                found.setdefault((row["split"], row["id"]), []).append((name, row, run))

    def interest(answers: list[tuple[str, dict[str, Any], Evaluation]]) -> tuple[int, float]:
        hits = [query_values(row)["hit@1"] for name, row, _ in answers if name != "no thinking"]
        change = hits[-1] - hits[0] if len(hits) > 1 else 0.0
        gain = hits[-1] - query_values(answers[0][1])["hit@1"] if hits else 0.0
        return (-int(change != 0), -abs(gain))

    chosen = sorted(found.values(), key=interest)[:num_examples]
    return [_example(answers) for answers in chosen]


def _example(answers: list[tuple[str, dict[str, Any], Evaluation]]) -> dict[str, Any]:
    row = answers[0][1]
    query = row["query"]
    return {
        "id": row["id"],
        "group": " · ".join(filter(None, [row["split"], row["task"], row["hop"]])),
        "question": "\n".join(filter(None, [query["instruction"], query["text"]])),
        "pictures": [_picture(path) for path in query["images"]],
        "positive": _target(row["positive"], row, answers[0][2]),
        "answers": [
            {
                "name": name,
                "cot": answer["cot"],
                "problem": answer["problems"][0],
                "rank": answer["ranks"][0],
                "nearest": [_target(key, answer, run) for key in answer["nearest"]],
            }
            for name, answer, run in answers
        ],
    }


def _target(key: str, row: Mapping[str, Any], run: Evaluation) -> dict[str, Any]:
    target = run.targets.get(key, {"text": key, "images": [], "instruction": None})
    name = target["text"] or next((Path(path).stem for path in target["images"]), key)
    return {
        "is_positive": key == row["positive"],
        "name": name,
        "picture": _picture(target["images"][0]) if target["images"] else None,
    }


@lru_cache(maxsize=512)
def _picture(path: str) -> str | None:
    """Return a picture as a data URI; None, and a warning, if it is gone."""
    try:
        picture = open_image(path)
    except ImageError as error:
        logger.warning("left out of the report: %s", error)
        return None
    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
