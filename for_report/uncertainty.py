"""What chance says of accuracies: intervals and tests.

Imports nothing of ours, because the table of runs uses it too, and only the part of SciPy that starts fast.
"""
import numpy as np
from scipy.special import bdtr, ndtri, stdtrit

CONFIDENCE = 0.95
UPPER = (1 + CONFIDENCE) / 2  # an interval leaves as much out above as below


def wilson(hits, n):
    """The 95 % score interval (low, high) of an accuracy, 0 to 1, of `hits` among n images (Wilson 1927)."""
    share = hits / n
    spread = float(ndtri(UPPER)) ** 2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = np.sqrt(share * (1 - share) * spread + spread ** 2 / 4) / (1 + spread)
    low, high = float(middle - half), float(middle + half)
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # rounding could leave the accuracy outside


def mcnemar(only_first, only_second):
    """The two-sided p, 0 to 1, of McNemar's exact test (McNemar 1947): may two networks be equally good?

    Takes the numbers of images that only the first and only the second got right.
    """
    rarer, n = min(only_first, only_second), only_first + only_second
    return min(1.0, 2 * float(bdtr(rarer, n, 0.5)))


def holm(ps):
    """The p of several tests, adjusted for their number (Holm 1979), in the order given: floats 0 to 1."""
    adjusted, highest = [None] * len(ps), 0.0
    for rank, k in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[k]))
        adjusted[k] = highest
    return adjusted


def difference_of_means(first, second):
    """How much higher the mean of `first` is than that of `second`, and its 95 % interval: (difference, low, high).

    Takes two or more accuracies each, for example those of a recipe's seeds, which need not spread alike (Welch 1947).
    """
    difference = float(np.mean(first) - np.mean(second))
    squares = [np.var(sample, ddof=1) / len(sample) for sample in (first, second)]
    total = sum(squares)
    if not total:
        return difference, difference, difference
    freedom = total ** 2 / sum(square ** 2 / (len(sample) - 1) for square, sample in zip(squares, (first, second)))
    half = float(stdtrit(freedom, UPPER) * np.sqrt(total))
    return difference, difference - half, difference + half
