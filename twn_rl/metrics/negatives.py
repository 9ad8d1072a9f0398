"""What is no negative of an input, by content alone, and how far a positive is above the rest.

One meaning for all stages: no negative of an input are the input itself and its partners, the other
sides of all pairs whose own side has the same content. A query's partners are the positives of all
records with an equal query; a target's are the queries of all records with an equal positive.

- Rewards and selection (`training.rollout_scorer`), gate labels and evaluation ask this module.
- The warm start says the same of the records of one global batch: `losses.false_negative_mask`.
- Mining keeps files instead of keys (`inference.mine_negatives`). It leaves out the same, and
  whatever differs from it in the instruction only: what it adds stays in the data.

Pools are kept by whoever has them: a partner bars an item in every pool that the item is in.
"""

from collections.abc import Iterable, Sequence


class FalseNegatives:
    """Content keys that are no negatives, by the content key of an input.

    >>> known = FalseNegatives([("q", "a"), ("r", "c"), ("q", "b"), ("q", "a")])
    >>> known.of("q"), known.of("c")
    (('q', 'a', 'b'), ('c',))
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Hold the (own, partner) content keys of all pairs, not only of those that are asked for.

        Keys may be shortened, all alike.
        """
        self._keys: dict[str, dict[str, None]] = {}
        for own, partner in pairs:
            self._keys.setdefault(own, {own: None})[partner] = None

    def of(self, key: str) -> tuple[str, ...]:
        """Return the keys that are no negatives of an input: its own first, then its partners."""
        return tuple(self._keys.get(key, (key,)))


def margin(
    positive: float, negatives: Sequence[float], num_negatives: int | None = None
) -> float | None:
    """Return the positive minus the mean of the hardest negatives; None where there are none.

    None says that there is nothing to measure against: neither a lost margin nor one of 0.

    >>> margin(0.75, [0.25, -1.0, 0.5], 2), margin(0.75, [0.5, -1.0]), margin(0.75, [0.5], 0)
    (0.375, 1.0, 0.75)
    >>> margin(0.75, []) is None
    True

    Args:
        positive: Score of the positive, such as a cosine.
        negatives: Scores of the negatives on the same scale, in any order.
        num_negatives: K, how many of the hardest to average; a shorter list is used whole, and so
            is any by None. 0 asks for no negatives: the positive alone.
    """
    if num_negatives == 0:
        return positive
    hardest = sorted(negatives, reverse=True)[:num_negatives]
    return positive - sum(hardest) / len(hardest) if hardest else None


def margin_gains(
    positives: Sequence[float],
    negatives: Sequence[Sequence[float]],
    bare_positives: Sequence[float],
    bare_negatives: Sequence[Sequence[float]],
    *,
    num_negatives: int | None = None,
) -> list[float | None]:
    """Return `margin` with a thought minus `margin` without, per row; None where either is None.

    >>> margin_gains([0.75], [[0.25, 0.0]], [0.5], [[0.5, 0.0]], num_negatives=1)
    [0.5]
    """
    gains: list[float | None] = []
    rows = zip(positives, negatives, bare_positives, bare_negatives, strict=True)
    for positive, own, bare_positive, bare_own in rows:
        think = margin(positive, own, num_negatives)
        bare = margin(bare_positive, bare_own, num_negatives)
        gains.append(None if think is None or bare is None else think - bare)
    return gains
