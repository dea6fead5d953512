"""benchmark.py: what it says of who is measured, and what it refuses."""
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import benchmark
import peers
from data_helpers import InputError
from presets_and_results import make_preset
from sample import TESTS_DIR


def run(*flags):
    command = [sys.executable, os.path.join(TESTS_DIR, 'benchmark.py'), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


def test_every_program_is_measured_or_left_out_with_a_reason():
    status, out, err = run('--preset', '0', '--seconds', '0', '--rounds', '1')
    assert status == 0, err
    rows = {line.split()[0]: line for line in out.splitlines()}
    for name in benchmark.PROGRAMS:
        assert (name in rows) != (f'{name} is left out: ' in err)
    assert {'ours', 'numpy', 'study'} <= set(rows) and 'ResNet8, batch 64, 32 bits' in out
    assert rows['ours'].split()[2] == '1.00'  # times as fast as ours


@pytest.mark.parametrize('flags, text', [
    (['--preset', '99'], 'there is no preset 99'),
    (['--peers_python', '/nowhere/python'], 'there is no program /nowhere/python'),
    (['--torch_python', 'python'], 'unrecognized arguments: --torch_python')])
def test_mistakes_are_told_before_anything_starts(flags, text):
    status, out, err = run(*flags)
    assert status == 2 and text in err.splitlines()[-1] and 'starting' not in err and not out


@pytest.mark.parametrize('number', [0, 3, 4])
def test_operations_of_a_step_are_three_times_those_of_the_graph(number):
    from resnet import ResNet, tf
    with tf.Graph().as_default() as graph:
        net = ResNet(make_preset(number), training=False)
        products = 64 * net.preset.num_classes
        for convolution in graph.get_operations():
            if convolution.type == 'Conv2D':
                height_to_channels = convolution.outputs[0].shape.as_list()[1:]
                products += np.prod(height_to_channels + convolution.inputs[1].shape.as_list()[:3])
    assert peers.training_gflop(net.preset) == pytest.approx(3 * 2 * products / 1e9)


def test_a_peer_with_another_loss_is_refused():
    programs = [SimpleNamespace(name=name, loss=loss) for name, loss in (('ours', 2.0), ('numpy', None), ('jax', 2.01))]
    assert benchmark.check_losses(programs, 16) == pytest.approx(0.005)
    with pytest.raises(InputError, match='jax computes another network: its loss after a step is 2.0100, ours is '
                                         '2.0000'):
        benchmark.check_losses(programs, 32)
    programs[2].loss = float('nan')
    with pytest.raises(InputError, match='jax'):
        benchmark.check_losses(programs, 16)
