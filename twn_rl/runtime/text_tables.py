"""Rows of texts as a Markdown table."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table whose last line ends; the first `texts` columns are set left, others right.

    >>> print(markdown_table(["task", "score"], [["MSVD", "0.5"]]), end="")
    | task | score |
    | --- | ---: |
    | MSVD | 0.5 |
    """
    rule = ["---" if place < texts else "---:" for place in range(len(columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, rule, *rows))
