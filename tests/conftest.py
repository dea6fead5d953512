import os
import sys

import pytest

TESTS_DIR = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TESTS_DIR, os.path.dirname(TESTS_DIR)]


@pytest.fixture
def cifar10(monkeypatch):
    """The sample passes for CIFAR-10."""
    import data_helpers
    import sample
    monkeypatch.setattr(data_helpers, 'SHA256', sample.digests())
    return sample.SAMPLE_DIR
