"""Words of the report that a newcomer may not know, and what they mean, shown on hover."""

import re

from markupsafe import Markup, escape

TERMS = {
    "hit@1": "Share of queries whose nearest target is the right one; ties count as misses.",
    "95 % interval": "Bootstrap over queries: where the value lies for 95 of 100 such samples.",
    "think tokens": "Tokens the model writes as its thought, before the vector is made.",
    "no thinking": "The vector of the query as it is: one forward pass, nothing is written.",
    "own thoughts": "Every query is embedded with the chain of thought the model writes for it.",
    "latent thoughts": "Learned tokens think inside the forward pass; nothing is written.",
    "gate decides": "A small network looks at the cheap vector and says whether a thought pays.",
    "policy decides": "The model itself decides by its first token whether to think.",
    "chance decides": "As many queries think as with the gate, drawn at random.",
    "oracle": "Thinks exactly where the right target then ranks higher: the ceiling of any gate.",
    "sampled thoughts": "Mean quality over thoughts drawn at temperature 1.",
    "earlier model": "The model before the last stages; as a rule the warm start.",
    "this model": "The model that this page is about; as a rule after RL and a refit.",
    "gold": "The thought that generated the question, without mistakes.",
    "another query's": "A thought written for another query of the same task.",
    "another task's": "A thought written for a query of another task.",
    "empty thought": "The marks of a thought with nothing between them.",
    "first half of the own thought": "The own thought, cut in the middle.",
    "rank": "Place of the right target among all targets; 1 is best.",
    "reward_std": "Spread of rewards; near 0 nothing can be learned from them.",
    "frac_reward_zero_std": "Share of groups in which all thoughts earned the same reward.",
    "hop": "Steps of reasoning that the question needs.",
}
_PATTERN = re.compile(
    "|".join(rf"(?<!\w){re.escape(term)}" for term in sorted(TERMS, key=len, reverse=True))
)


class Explainer:
    """Explains words in texts, and knows which it has met.

    >>> explain = Explainer()
    >>> str(explain("hit@1 & x"))[:19]
    '<abbr title="Share '
    >>> list(explain.met)
    ['hit@1']
    """

    def __init__(self) -> None:
        self._met: set[str] = set()

    @property
    def met(self) -> dict[str, str]:
        """Words that were in the texts so far, with their meanings."""
        return {term: meaning for term, meaning in TERMS.items() if term in self._met}

    def __call__(self, text: str) -> Markup:
        """Return text as HTML whose known words are explained on hover."""
        parts, end = [], 0
        for found in _PATTERN.finditer(text):
            word = found[0]
            self._met.add(word)
            parts += [escape(text[end : found.start()])]
            parts += [Markup('<abbr title="{}">{}</abbr>').format(TERMS[word], word)]
            end = found.end()
        return Markup("").join([*parts, escape(text[end:])])
