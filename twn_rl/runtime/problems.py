"""Everything that is wrong with settings, told in one error."""

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from twn_rl.runtime.nearest import nearest

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, ">": operator.gt,
    "[": operator.ge, "(": operator.gt, "]": operator.le, ")": operator.lt,
}  # fmt: skip
_LOW = re.compile(r"(>=?|[\[(]) ?(-?[\d.]+)")
_HIGH = re.compile(r", (-?[\d.]+)([\])])")


class Problems(list[str]):
    """What is wrong with settings, a phrase each such as "seed = -1, expected >= 0".

    >>> from types import SimpleNamespace
    >>> RULES = ("all",)
    >>> settings = SimpleNamespace(seed=-1, share=1.0, limit=None, rule="best")
    >>> problems = Problems()
    >>> problems.expect(settings, ">= 0", "seed")
    >>> problems.expect(settings, "in [0, 1)", "share")
    >>> problems.expect(settings, "None or >= 1", "limit")
    >>> problems.unless(settings.rule in RULES, f"rule = {settings.rule!r}, expected all")
    >>> problems.refuse("Settings")
    Traceback (most recent call last):
    ValueError: Settings: seed = -1, expected >= 0; share = 1.0, expected in [0, 1); rule = 'best',
    expected all; change these fields
    """

    def unless(self, is_fine: object, problem: str) -> None:
        """Add a problem unless a condition holds."""
        if not is_fine:
            self.append(problem)

    def expect(self, settings: Any, expected: str, *names: str) -> None:
        """Add a problem for each named field of `settings` that is not what is expected.

        Args:
            settings: Object with the fields.
            expected: Bounds of a number, ">= 1", "> 0" or "in [0, 1)", as the message says them;
                None passes where "None" or "null" is one of the words.
            names: Names of the fields.
        """
        for name in names:
            value = getattr(settings, name)
            if value is None and re.search(r"\b(None|null)\b", expected):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                self.append(f"{name} = {value!r:.80}, expected a number {expected}")
                continue
            bounds = [*_LOW.findall(expected), *(found[::-1] for found in _HIGH.findall(expected))]
            assert bounds, f"{expected!r} names no bounds"
            if not all(_COMPARISONS[sign](value, float(bound)) for sign, bound in bounds):
                self.append(f"{name} = {value}, expected {expected}")

    def typed(self, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
        """Add a problem for each value that is not of the type of its name in `kinds`.

        Types that JSON and YAML cannot tell apart are passed over.

        >>> problems = Problems()
        >>> problems.typed({"seed": "one", "rate": 1}, {"seed": int, "rate": float})
        >>> problems
        ["seed = 'one', expected `int`, got `str`"]
        """
        for name in [name for name in values if name in kinds]:
            try:
                msgspec.convert(values[name], kinds[name])
            except msgspec.ValidationError as error:
                complaint = str(error)
                told = complaint[:1].lower() + complaint[1:]
                self.append(f"{name} = {values[name]!r:.80}, {told}")
            except TypeError:  # a type that only Python has
                continue

    def one_of(self, settings: Any, allowed: Collection[Any], *names: str) -> None:
        """Add a problem for each named field of `settings` that is none of the allowed values."""
        for name in names:
            value = getattr(settings, name)
            near = nearest(str(value), map(str, allowed))
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            self.unless(value in allowed, f"{name} = {value!r}, expected one of {allowed}{meant}")

    def some_of(self, settings: Any, allowed: Collection[str], *names: str) -> None:
        """Add a problem for each named list that is empty or holds another value than allowed."""
        for name in names:
            values = getattr(settings, name)
            wrong = [value for value in values if value not in allowed]
            near = [other for value in wrong for other in nearest(value, allowed)]
            meant = f" (did you mean {', '.join(near)}?)" if near else ""
            self.unless(
                values and not wrong,
                f"{name} = {values}, expected some of {tuple(allowed)}{meant}",
            )

    @contextmanager
    def told(self, *kinds: type[Exception]) -> Iterator[None]:
        """Add an exception of the body, and go on after it."""
        try:
            yield
        except kinds as error:
            self.append(str(error))

    def refuse(self, what: str, remedy: str = "change these fields") -> None:
        """Raise one error with every problem; without any, do nothing.

        Raises:
            ValueError: If there is a problem.
        """
        if self:
            raise ValueError(f"{what}: {'; '.join(self)}; {remedy}")
