"""What chance says of accuracies: intervals, paired tests, seeds.

Imports nothing of ours, because the table of runs uses it too, and what is slow to import only where it is needed,
because all scripts start with it.
"""
import collections
import itertools
import statistics

import numpy as np

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05  # two networks differ where chance alone would make them so more rarely
HINT = 6             # with fewer seeds a difference of recipes is a hint
UPPER = (1 + CONFIDENCE) / 2  # an interval leaves as much out above as below


def wilson(hits, n):
    """The 95 % score interval (low, high) of an accuracy, 0 to 1, of `hits` among n images (Wilson 1927)."""
    from scipy.special import ndtri
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
    from scipy.special import bdtr
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
    from scipy.special import stdtrit
    difference = statistics.mean(first) - statistics.mean(second)  # exact: rounding would tell equal accuracies apart
    squares = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    total = sum(squares)
    if not total:
        return difference, difference, difference
    freedom = total ** 2 / sum(square ** 2 / (len(sample) - 1) for square, sample in zip(squares, (first, second)))
    half = float(stdtrit(freedom, UPPER) * np.sqrt(total))
    return difference, difference - half, difference + half


# ------------------------------------------------------------------------------ networks

Comparison = collections.namedtuple('Comparison', 'first second only_first only_second p adjusted_p')


def compare(networks):
    """Comparisons of all pairs of networks of different recipes that were tested on the same images.

    Takes (number, recipe, labels int64 [N], predictions int64 [N]) of each. p is McNemar's, adjusted_p corrects it for
    the number of pairs by Holm's method.
    """
    pairs = []
    for (first, recipe, labels, predicted), (second, *rival) in itertools.combinations(networks, 2):
        if recipe != rival[0] and np.array_equal(labels, rival[1]):
            hits, rival_hits = predicted == labels, rival[2] == labels
            pairs.append((first, second, int((hits & ~rival_hits).sum()), int((rival_hits & ~hits).sum())))
    ps = [mcnemar(only_first, only_second) for _, _, only_first, only_second in pairs]
    return [Comparison(*pair, p, adjusted) for pair, p, adjusted in zip(pairs, ps, holm(ps))]


def verdict(comparison):
    """'networks 1 and 2 cannot be told apart' or 'networks 1 and 2 differ beyond chance'."""
    words = 'differ beyond chance' if comparison.adjusted_p < SIGNIFICANCE else 'cannot be told apart'
    return f'networks {comparison.first} and {comparison.second} {words}'


# ------------------------------------------------------------------------------ seeds

Seeds = collections.namedtuple('Seeds', 'run seeds accuracies mean deviation low high')


def spread(runs):
    """Statistics over the seeds of each recipe that has several: mean, sample standard deviation, range.

    Takes (recipe, seed, accuracy, run) of each; of a seed's runs the first counts, not the luckiest.
    """
    recipes = collections.OrderedDict()
    for recipe, seed, accuracy, run in runs:
        recipes.setdefault(recipe, {}).setdefault(seed, (accuracy, run))
    groups = []
    for members in recipes.values():
        if len(members) > 1:
            accuracies = [members[seed][0] for seed in sorted(members)]
            groups.append(Seeds(next(iter(members.values()))[1], sorted(members), accuracies,
                                statistics.mean(accuracies), statistics.stdev(accuracies), min(accuracies),
                                max(accuracies)))
    return groups


def compare_recipes(groups):
    """[(Seeds, Seeds, difference of their means, low, high)] of all pairs with three seeds or more."""
    compared = [seeds for seeds in groups if len(seeds.seeds) >= 3]
    return [(first, second) + difference_of_means(first.accuracies, second.accuracies)
            for first, second in itertools.combinations(compared, 2)]
