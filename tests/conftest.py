import os
import shutil
import sys

import pytest

TESTS_DIR = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TESTS_DIR, os.path.dirname(TESTS_DIR)]


def pytest_configure(config):
    config.addinivalue_line('markers', 'long: half a minute or more, with its variants; .ci/run runs it on one stack')


@pytest.fixture
def cifar10(monkeypatch):
    """The sample passes for CIFAR-10."""
    import data_helpers
    import sample
    monkeypatch.setattr(data_helpers, 'SHA256', sample.digests())
    return sample.SAMPLE_DIR


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A short training: its output folder and what it printed."""
    import sample
    output_dir = str(tmp_path_factory.mktemp('trained'))
    status, out, err = sample.run_script('resnet_train.py', *sample.TINY, '--seed', 5, '--output_dir', output_dir)
    assert status == 0, err
    return output_dir, out, err


@pytest.fixture(scope='session')
def tested(trained, tmp_path_factory):
    """A copy of it, tested: its output folder."""
    import sample
    output_dir = str(tmp_path_factory.mktemp('tested') / 'with spaces 와 한글')
    shutil.copytree(trained[0], output_dir)
    assert sample.run_script('resnet_eval.py', '--output_dir', output_dir)[0] == 0
    return output_dir
