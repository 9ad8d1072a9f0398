"""What is no negative of an input, by content alone; knows no vectors, pools or files.

One meaning for all stages: no negative of an input are the input itself and its partners, the other
sides of all pairs whose own side has the same content. A query's partners are the positives of all
records with an equal query; a target's are the queries of all records with an equal positive.

- Rewards and selection (`rollouts.RolloutScorer`), gate labels and evaluation ask this module.
- The warm start says the same of the records of one global batch: `losses.false_negative_mask`.
- Mining keeps files instead of keys (`jobs.mining_plan`). It leaves out the same, and whatever
  differs from it in the instruction only: what it adds stays in the data.

Pools are kept by whoever has them: a partner bars an item in every pool that the item is in.
"""

from collections.abc import Iterable


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
