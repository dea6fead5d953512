"""Intervals and tests against sums made by hand."""
import os
import subprocess
import sys

import pytest

from for_report.uncertainty import difference_of_means, holm, mcnemar, wilson

PROJECT_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_wilson_by_hand():
    # 2 of 4, z^2 = 3.8415, z^2 / n = 0.96036: middle (0.5 + 0.48018) / 1.96036 = 0.5,
    # half sqrt(0.25 * 0.96036 + 0.96036^2 / 4) / 1.96036 = sqrt(0.47067) / 1.96036 = 0.34996.
    assert wilson(2, 4) == pytest.approx((0.15004, 0.84996), abs=1e-5)
    # 8,000 of 10,000, z^2 / n = 0.00038415: middle 0.80019207 / 1.00038415 = 0.79988480,
    # half sqrt(0.16 * 0.00038415 + 0.00038415^2 / 4) / 1.00038415 = 0.0078422 / 1.00038415 = 0.0078392.
    assert wilson(8000, 10000) == pytest.approx((0.7920456, 0.8077240), abs=1e-6)
    for n in range(1, 100):  # rounding must not leave the accuracy outside
        low, high = wilson(n, n)
        assert 0 < low < 1 and high == 1 and wilson(0, n)[0] == 0
    assert wilson(10, 10)[0] == pytest.approx(0.72247, abs=1e-5)  # 1 / (1 + z^2 / n)


@pytest.mark.parametrize('counts, p', [
    ((0, 0), 1), ((5, 5), 1),
    ((1, 9), 2 * (1 + 10) / 1024),            # 2 * (C(10,0) + C(10,1)) / 2^10
    ((8, 2), 2 * (1 + 10 + 45) / 1024),
    ((0, 6), 2 / 64)])
def test_mcnemar_by_hand(counts, p):
    assert mcnemar(*counts) == pytest.approx(p, abs=1e-12)


def test_holm_by_hand():
    # In rising order 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and none below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6, 0.001]) == pytest.approx([1, 1, 0.003])  # 2 * 0.6 is more than 1
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04]) and holm([0.3]) == [0.3] and holm([]) == []


def test_difference_of_means_by_hand():
    # Means 0.90 and 0.87, variances 0.0001 and 0.0004 of 3 each: standard error sqrt(0.0005 / 3) = 0.0129099.
    # Degrees of freedom: (0.0005 / 3)^2 / ((0.0001 / 3)^2 / 2 + (0.0004 / 3)^2 / 2) = 2 * 25 / 17 = 2.941176,
    # where t, by the integral of its density, is 3.218759: half the interval is 0.0415540.
    difference, low, high = difference_of_means([0.89, 0.90, 0.91], [0.85, 0.87, 0.89])
    assert difference == pytest.approx(0.03) and (low, high) == pytest.approx((-0.0115540, 0.0715540), abs=1e-6)
    # Variances 2 and 2 of 2 each: 2 degrees of freedom, t = 4.302653, standard error sqrt(2).
    assert difference_of_means([1, 3], [2, 4]) == pytest.approx((-1, -1 - 6.0848690, -1 + 6.0848690), abs=1e-5)
    assert difference_of_means([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert difference_of_means([0.1] * 8, [0.1] * 7) == (0, 0, 0)  # rounding must not make a difference of none


def test_it_starts_fast():
    code = 'from for_report import uncertainty; import sys; print(sorted(sys.modules))'
    loaded = subprocess.run([sys.executable, '-c', code], cwd=PROJECT_DIR, stdout=subprocess.PIPE, check=True).stdout
    for slow in (b'scipy', b'matplotlib', b'openpyxl', b'tensorflow', b'tensorboard', b'data_helpers'):
        assert b"'" + slow + b"'" not in loaded
