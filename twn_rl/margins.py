"""The margin of a positive over its negatives; knows no tensors, rollouts or rewards."""

from collections.abc import Sequence


def margin(
    positive: float, negatives: Sequence[float], num_negatives: int | None = None
) -> float | None:
    """Return the positive minus the mean of the hardest negatives; None where there are none.

    None says that there is nothing to measure against: neither a lost margin nor one of 0. Tensors
    cannot hold it; `decisions.utility_gaps` puts NaN in its place for them.

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
