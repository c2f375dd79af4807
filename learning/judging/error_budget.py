"""Error budget: the significance level of each of the gate's verdicts, so that all verdicts together stay within one budget.

Each run tests again whether its version is better. At a constant level of 5%, luck alone would more likely than not promote
a version within 14 runs. So the levels are spent from one budget over the life of a data directory, by LORD++ (Ramdas, Yang,
Wainwright and Jordan, 2017, "Online control of the false discovery rate with decaying memory", arXiv:1710.00499). Until the
first promotion the levels add up to less than the budget, so luck alone promotes with at most that probability. This holds
for any number of verdicts, and however they depend on each other. A promotion gives a part back, so that learning does not
end; the budget then bounds the share of promotions that are luck.

`docs/architecture.md` has the arithmetic. Pure functions.
"""

from collections.abc import Sequence

from scipy.special import zeta

DECAY = 1.5  # a larger value spends more on the first verdicts, a smaller one leaves more for later ones
FIRST_SHARE = 0.9  # share of the budget that is available before any promotion


def compute_next_level(budget: float, earlier: Sequence[bool]) -> float:
    """Return the significance level of the next verdict. `earlier` has True for each verdict that found its version better.

    The k-th verdict gets a share of the first part of the budget that falls with k ** -1.5; all shares add up to 1. Each
    promotion adds another part, which is shared out in the same way: the rest of the budget after the first promotion, a
    whole budget after each later one.
    """
    now = len(earlier) + 1
    level = FIRST_SHARE * budget * _share(now)
    promotions = [number for number, better in enumerate(earlier, 1) if better]
    for order, then in enumerate(promotions):
        level += (budget if order else (1 - FIRST_SHARE) * budget) * _share(now - then)
    return level


def _share(number: int) -> float:
    return float(number**-DECAY / zeta(DECAY))
