"""`twn-rl check-data`: verify a file of records before a run and print what it holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from twn_rl.data.inspection import Distribution, RecordReport, add_markup, inspect_records
from twn_rl.data.record_files import load_records
from twn_rl.runtime.terminal import say

_BAR_WIDTH = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare file, model and output."""
    parser.add_argument("file", help="records, .jsonl or .parquet")
    parser.add_argument("--data_root", help="folder no image path may leave; else the file's")
    parser.add_argument("--limit", type=int, help="read at most this many rows")
    parser.add_argument("--workers", type=int, default=0, help="image processes; 0: threads")
    parser.add_argument("--show", type=int, default=5, help="failing rows to print")
    parser.add_argument("--json", metavar="PATH", help="write the whole report there")
    parser.add_argument("--model", help="saved model or backbone whose tokens to count")
    parser.add_argument(
        "--token_sample", type=int, default=1000, help="records to count tokens of; 0: all"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 if anything must be corrected, 0 otherwise."""
    for name in ("workers", "show", "token_sample"):
        if getattr(arguments, name) < 0:
            raise ValueError(
                f"--{name} = {getattr(arguments, name)}; expected 0 or more; change it"
            )
    records = load_records(
        arguments.file,
        data_root=arguments.data_root,
        on_bad_record="skip",
        limit=arguments.limit,
        workers=arguments.workers,
    )
    report = inspect_records(records, arguments.file)
    if arguments.model is not None:
        # Imported here: everything else works without torch's start-up time.
        from twn_rl.modeling.token_lengths import TokenCounter, add_token_lengths

        counter = TokenCounter.from_name(arguments.model)
        add_token_lengths(report, records, counter, sample=arguments.token_sample)
        add_markup(report, records, counter.markup)
    for line in report_lines(report, show=arguments.show):
        say(line)
    if arguments.json is not None:
        report.save(arguments.json)
    return 1 if report.problems else 0


def report_lines(report: RecordReport, *, show: int) -> Iterator[str]:
    """Yield the report as lines of text, with at most `show` failing rows and duplicates."""
    left_out = report.rows - report.usable
    yield f"{report.file}: {report.rows} rows, {report.usable} usable, {left_out} left out"
    for reason, count in report.left_out.items():
        yield f"  {reason:32s} {count:>9}"
    yield from ("", f"{'source':32s} {'task':24s} {'records':>9}")
    for source, tasks in report.tasks.items():
        for task, count in tasks.items():
            yield f"{source:32s} {task or '-':24s} {count:>9}"
    yield ""
    for trait, share in report.shares.items():
        yield f"{'with ' + trait:32s} {100 * share:8.1f} %"
    yield f"{'repeated records':32s} {report.duplicates:>9}"
    for repeated, first in report.duplicate_ids[:show]:
        yield f"  {repeated!r} repeats {first!r}"
    if report.marked_texts:
        yield f"{'texts with markup, shown as text':32s} {report.marked_texts:>9}"
    yield f"{'distinct pictures':32s} {report.pictures:>9}"
    for size, count in report.picture_sizes.items():
        yield f"  {size:30s} {count:>9}"
    yield from _histogram("negatives a record", report.negatives)
    yield from _histogram("frames a video", report.frames)
    yield from _histogram("longer side of a picture, pixels", report.picture_sides)
    if report.tokens:
        yield from ("", f"tokens after rendering, of {report.token_records} records")
    for name, lengths in report.tokens.items():
        yield from _histogram(f"{name}, tokens", lengths)
    if report.problems:
        yield from ("", f"to correct: {len(report.problems)}")
        yield from (f"  {problem.message}" for problem in report.problems[:show])
        if len(report.problems) > show:
            yield f"  ... and {len(report.problems) - show} more (--show, or --json for all)"


def _histogram(title: str, values: Distribution | None) -> Iterator[str]:
    if values is None:
        return
    yield from (
        "",
        f"{title}: mean {values.mean:.1f}, median {values.median}, 95 % <= {values.p95}, "
        f"max {values.maximum} (n = {values.count})",
    )
    highest = max(count for _, _, count in values.bins)
    for first, last, count in values.bins:
        label = str(first) if first == last else f"{first}-{last}"
        # A bin that is not empty must not look empty.
        bar = "#" * -(-_BAR_WIDTH * count // highest)
        yield f"  {label:>15s} {count:>9} {bar}".rstrip()
