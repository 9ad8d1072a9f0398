"""Rewards that others write and answers of endpoints: refused by name, never taken half."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import RECORDS, serving, writer

from hostile.judging import attempt, judge
from hostile.table import Tally
from hostile.test_inputs import QUICK_AND_ALL
from hostile.texts import damaged, hostile_json, hostile_texts, hostile_values
from twn_rl.data.markup import KNOWN_MARKUP, unusable_character
from twn_rl.rewards import REWARDS
from twn_rl.training.reward_loading import RewardError, RewardLoadingError, load_rewards
from twn_rl.training.thought_selection.drafts import Draft
from twn_rl.training.thought_selection.endpoint import FAILURES

COUNTS = {
    "rewards": {"quick": 30, "all": 90},
    "endpoint replies": {"quick": 10, "all": 90},
}
BODIES = (
    "return [0.0]",
    "return [0.0, float('nan')]",
    "return [0.0, float('inf')]",
    "return [1e308, 1e308]",
    "return ['a', 'b']",
    "return [None, None]",
    "return [True, False]",
    "return 'ab'",
    "return {0: 1.0, 1: 2.0}",
    "return 1.0",
    "return None",
    "return [[0.0], [0.0]]",
    "return [1j, 1j]",
    "return (x for x in [0.0, 1.0])",
    "raise KeyError('x')",
    "raise SystemExit(0)",
    "raise AssertionError",
    "raise StopIteration",
    "import sys; sys.exit('done')",
    "import os; raise OSError('disk')",
    "return f(completions, **kwargs)",
    "return [10**400, 0]",
    "kwargs['positive_similarity'].clear(); return [0.0, 0.0]",
    "completions.clear(); return [0.0, 0.0]",
    "import numpy as np; return np.array([0.5, 1.0])",
    "import numpy as np; return list(np.array([np.nan, 1.0]))",
    "import torch; return torch.tensor([0.5, 1.0])",
    "yield 1.0",
    "x = [0.0, 0.0]; x.append(x); return x",
    "return completions",
)
SIGNATURES = (
    "def f(completions, **kwargs):",
    "def f(completions):",
    "def f(**kwargs):",
    "async def f(completions, **kwargs):",
    "def f(completions, nobody_has_this, **kwargs):",
    "class f:",
    "f = 3 #",
    "def g(completions, **kwargs):",
    "def f(completions, *, top_k=1, **kwargs)",
)
COLUMNS = {"positive_similarity": [0.75, 0.5], "negative_similarities": [[0.25], [0.5]]}


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_rewards(tally: Tally, tmp_path: Path, size: str) -> None:
    die, count = random.Random(41), COUNTS["rewards"][size]
    for case in range(count):
        path = tmp_path / f"reward{case}.py"
        body, head = BODIES[case % len(BODIES)], SIGNATURES[0]
        if case >= len(BODIES):
            head = SIGNATURES[case % len(SIGNATURES)]
        text = f"{head}\n    {body}\n"
        if case % 11 == 10:
            os.mkfifo(path)
        elif case % 7 == 6 and case >= len(BODIES):
            path.write_bytes(damaged(text.encode(), die))
        else:
            path.write_text(text)
        given = {"completions": ["a", "b"], **{k: list(v) for k, v in COLUMNS.items()}}
        untouched = json.dumps(given)

        def score(path: Path = path, given: dict[str, Any] = given) -> Any:
            names = [f"{path}:f"]
            (reward,) = load_rewards(names, REWARDS, available_columns=COLUMNS)
            return reward(**given)

        def complaint(
            values: Any, given: dict[str, Any] = given, untouched: str = untouched
        ) -> str:
            if json.dumps(given) != untouched:
                return "the columns of other rewards were changed"
            if not isinstance(values, list) or len(values) != 2:
                return f"{values!r:.80}"
            numbers = [value for value in values if value is not None]
            is_fine = all(isinstance(v, float | int) and math.isfinite(v) for v in numbers)
            return "" if is_fine and math.isfinite(sum(map(float, numbers))) else f"{values!r:.80}"

        told = (RewardLoadingError, RewardError)
        verdict = judge(attempt(score), [path.name, "reward f", "'f'"], complaint, told)
        tally.add("rewards", f"{case}: {head} {body}", *verdict)
    tally.check(at_least=count)


def hostile_replies(seed: int, count: int) -> list[str]:
    """Return bodies of answers with status 200."""
    die = random.Random(seed)
    texts, values = hostile_texts(seed, count), hostile_values(seed, count)
    bodies = []
    for case in range(count):
        text, value, way = next(texts), next(values), case % 4
        message: Any = {"content": text}
        if way == 1:
            message = die.choice([value, {"content": value}, {"content": None}, {}, []])
        body = {"choices": [{"message": message, "finish_reason": die.choice(["stop", value])}]}
        whole = json.dumps(body)
        if way == 2:
            whole = hostile_json(die, body)
        elif way == 3:
            whole = damaged(whole.encode(), die).decode("latin-1")
        bodies.append(whole)
    return bodies


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_endpoint_replies(tally: Tally, size: str) -> None:
    bodies = hostile_replies(42, COUNTS["endpoint replies"][size])
    current = [""]
    with serving(lambda body, asked: (200, current[0])) as server:
        asked = writer(server, retries=0, max_failures=len(bodies) + 1)
        for case, body in enumerate(bodies):
            current[0] = body
            outcome = attempt(lambda: asked.write(RECORDS[:1])[0][0])

            def complaint(draft: Draft) -> str:
                if unusable_character(draft.cot):
                    return "an unusable character was kept"
                if draft.problem is None and (KNOWN_MARKUP.found(draft.cot) or not draft.cot):
                    return f"it would be taught: {draft.cot[:60]!a}"
                json.dumps(draft.cot, ensure_ascii=False).encode()
                is_known = draft.problem in (None, "truncated", "empty", "marker", "character")
                is_known |= draft.problem in (*FAILURES, "nested", "no_open")
                return "" if is_known else f"problem {draft.problem}"

            verdict = judge(outcome, ["endpoint"], complaint)
            tally.add("endpoint replies", f"{case}: {body[:60]!a}", *verdict)
    tally.check(at_least=len(bodies))
