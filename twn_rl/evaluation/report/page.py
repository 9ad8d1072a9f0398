"""One self-contained HTML file of what was learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from twn_rl.evaluation.modes import MODE_NAMES
from twn_rl.evaluation.report.charts import (
    Chart,
    draw_bars,
    draw_curves,
    draw_tradeoff,
    read_curves,
)
from twn_rl.evaluation.report.gallery import gallery, routing_gallery
from twn_rl.evaluation.report.headline import headline
from twn_rl.evaluation.report.tables import (
    further_table,
    groups_of,
    quality_table,
    routing_table,
    splits_of,
)
from twn_rl.evaluation.report.terms import Explainer
from twn_rl.evaluation.results import Evaluation
from twn_rl.evaluation.routing import (
    DECIDERS,
    RoutedQuery,
    describe_routing,
    routed_queries,
    routing_curve,
    routing_points,
    routing_summary,
)
from twn_rl.runtime.whole_files import write_text

LEADING = 6  # cards at the top of the page
ABLATION_MODES = ("always", "gold", "shuffled", "foreign", "empty", "never")


def write_report(
    path: str | Path,
    after: Evaluation | str | Path,
    *,
    before: Evaluation | str | Path | None = None,
    curves: Mapping[str, str | Path] | None = None,
    title: str = "What thinking is worth",
    note: str = "",
    num_examples: int = 12,
    num_routing_examples: int = 4,
    facts: Mapping[str, str] | None = None,
    settings: str = "",
) -> Path:
    """Write the report and return its path.

    Args:
        path: HTML file to write; nothing beside it is needed to view it.
        after: The evaluation to show, or its folder; with `before`, the later model's.
        before: The same queries by an earlier model; adds columns and its thoughts.
        curves: Stage name -> its `metrics.jsonl`; a missing file is an error.
        title: Headline.
        note: A sentence below the headline, such as the configuration.
        num_examples: Queries in the gallery; those that training changed come first.
        num_routing_examples: Queries shown of each way a decision can be right or wrong.
        facts: What was measured, such as model, date and data; name -> value.
        settings: All settings of the run as text, folded at the end.
    """
    after = after if isinstance(after, Evaluation) else Evaluation.load(after)
    if before is not None and not isinstance(before, Evaluation):
        before = Evaluation.load(before)
    splits = splits_of(after)
    tables = [
        *(quality_table(split, after, before) for split in splits),
        *(further_table(split, after) for split in splits),
    ]
    stages = {name: draw_curves(read_curves(file)) for name, file in (curves or {}).items()}
    environment = Environment(
        loader=PackageLoader("twn_rl.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    explain = environment.filters["explained"] = Explainer()
    text = environment.get_template("report.html.j2").render(
        title=title,
        note=note,
        has_before=before is not None,
        tables=[table for table in tables if table is not None],
        ablations=_markup(_ablation_charts(after)),
        stages={name: _markup(charts) for name, charts in stages.items() if charts},
        routing=_routing(after, num_routing_examples),
        gallery=gallery(after, before, num_examples, num_leading=LEADING),
        num_leading=LEADING,
        headline=headline(after, before),
        facts=facts or {},
        settings=settings,
        explainer=explain,
    )
    write_text(Path(path), text)
    return Path(path)


def _markup(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    # The only text that is not escaped: drawn here, its labels escaped by the drawing library.
    return [{"title": c.title, "alt": c.alt, "svg": Markup(c.svg)} for c in charts]


def _ablation_charts(evaluation: Evaluation) -> list[Chart]:
    charts = []
    for split in splits_of(evaluation):
        groups = {}
        for group in groups_of(evaluation, split):
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


def _routing(evaluation: Evaluation, num_examples: int) -> list[dict[str, Any]]:
    """Return what the page says of each mode that decides, where it was measured."""
    sections = []
    for mode, decider in DECIDERS.items():
        routed = routed_queries(evaluation.queries, mode)
        summaries = {split: routing_summary(queries) for split, queries in routed.items()}
        everything = [query for queries in routed.values() for query in queries]
        section = {
            "decider": decider.name,
            "words": [describe_routing(split, s, mode) for split, s in summaries.items()],
            "charts": _markup([_routing_chart(s, queries, mode) for s, queries in routed.items()]),
            "tables": [routing_table(split, evaluation, mode) for split in routed],
            "kinds": routing_gallery(everything, evaluation, num_examples, decider.name),
        }
        sections += [section] if routed else []
    return sections


def _routing_chart(split: str, queries: Sequence[RoutedQuery], mode: str) -> Chart:
    names = MODE_NAMES | {"decided": MODE_NAMES[mode]}
    points = {
        names[rule]: (point.think_tokens, point.quality)
        for rule, point in routing_points(queries).items()
    }
    curve = [(point.think_tokens, point.quality) for point in routing_curve(queries).points]
    chance = [points[names[rule]] for rule in ("never", "always")]
    return draw_tradeoff(
        f"Quality for thinking: {split}",
        {f"{DECIDERS[mode].name} at every threshold": curve, "chance at every rate": chance},
        points,
        x_label="think tokens a query",
        y_label="hit@1",
    )
