"""Rows of texts as a Markdown table."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Collection[int] = (0,)
) -> str:
    """Return a table, its last line ended; columns at the places `texts` are set left.

    >>> print(markdown_table(["task", "score"], [["MSVD", "0.5"]]), end="")
    | task | score |
    | --- | ---: |
    | MSVD | 0.5 |
    """
    rule = ["---" if place in texts else "---:" for place in range(len(columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, rule, *rows))
