"""ErrorBudget: how much each verdict of the gate may leave to luck, so that all verdicts together stay within one budget.

Each run asks again whether its version is better. With the same level each time, luck passes sooner or later: at 5% a
verdict, after 14 runs, more likely than not. So the levels are spent from one budget over the life of a data directory, by
LORD++ (Ramdas, Yang, Wainwright and Jordan, 2017, "Online control of the false discovery rate with decaying memory",
arXiv:1710.00499). Until the first promotion the levels add up to less than the budget: whatever the number of verdicts, and
however they depend on each other, luck alone promotes with at most that probability. A promotion gives a part back, so that
learning does not end; the share of promotions that are luck is held to the budget.

The gate's `docs/architecture.md` has the arithmetic. Pure functions; it knows no version.
"""

from collections.abc import Sequence

from scipy.special import zeta

DECAY = 1.5  # faster spends more on the first verdicts, slower leaves more to later ones
FIRST_SHARE = 0.9  # the share of the budget that there is before any promotion


def compute_next_level(budget: float, earlier: Sequence[bool]) -> float:
    """Return the level of the next verdict, after `earlier` ones (True for each that found its version better).

    The k-th verdict has a share of the first part of the budget that falls with k ** -1.5; all shares add up to 1. After
    each promotion another part is shared out in the same way: what the first part left of the budget after the first
    promotion, a whole budget after each later one.
    """
    now = len(earlier) + 1
    level = FIRST_SHARE * budget * _share(now)
    promotions = [number for number, better in enumerate(earlier, 1) if better]
    for order, then in enumerate(promotions):
        level += (budget if order else (1 - FIRST_SHARE) * budget) * _share(now - then)
    return level


def _share(number: int) -> float:
    return float(number**-DECAY / zeta(DECAY))
