"""demo.html: a page that classifies a visitor's picture, by a run's network, in the browser and without any server.

Its template is page.html beside this file, with the network in JavaScript. The weights come from TensorFlow, which
is started in a process of its own: only the page needs it, and it writes to the console as it starts.
"""
import base64
import io
import json
import os
import subprocess
import sys

import numpy as np

from data_helpers import CLASSES, PROJECT_DIR, InputError
from for_report.evidence import FILTERS, network_stages, write_report
from presets_and_results import as_tested, best_checkpoint, check_folder_name, describe, test_interval

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'page.html')
BN_EPSILON = 0.001  # as in resnet.py
READ_CHECKPOINT = """
import os, sys
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
import numpy
import tensorflow.compat.v1 as tf
reader = tf.train.NewCheckpointReader(sys.argv[1])
numpy.savez(sys.stdout.buffer, **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})
"""


def write_page(preset, predictions, output_dir):
    """Writes for_report/demo.html with a run's network and says so, or prints why it was not drawn.

    Raises InputError where the file cannot be written.
    """
    try:
        checkpoint = best_checkpoint(preset, output_dir)
        weights = _weights(preset, _read_checkpoint(checkpoint))
    except InputError as error:
        print(f'not drawn  demo.html: {error}')
        return
    network = dict(labels=CLASSES, classes=preset.num_classes, filters=FILTERS, units=preset.num_residual_units,
                   slope=preset.relu_leakiness,
                   description=_description(as_tested(preset, checkpoint, output_dir), predictions))
    with open(TEMPLATE, encoding='utf-8') as file:
        page = file.read()
    page = page.replace('NETWORK_AS_JSON', json.dumps(network, sort_keys=True).replace('<', r'\u003c'))
    page = page.replace('WEIGHTS_AS_BASE64', base64.b64encode(weights.tobytes()).decode())
    write_report(output_dir, 'demo.html', page.encode())


def _description(preset, predictions):
    name = f'{preset.model}, {describe(preset)}, run {preset.timestamp}'
    interval = test_interval(preset, predictions)
    if interval is None:
        return f'{name}, not tested'
    low, high = interval
    tested = f'{name}: right on {preset.test_accuracy:.2%} of the test images (95% interval {low:.2%} to {high:.2%})'
    if preset.test_accuracy_mirrored is None:
        return tested
    return f'{tested}, with the mirror image on {preset.test_accuracy_mirrored:.2%}'


def _read_checkpoint(path):
    """{name: array} of a checkpoint's variables. Raises InputError where they cannot be read."""
    check_folder_name(os.path.dirname(path))
    try:
        # From the project's folder, because Python imports from the folder where it is started.
        done = subprocess.run([sys.executable, '-c', READ_CHECKPOINT, os.path.abspath(path)], cwd=PROJECT_DIR,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if not done.returncode:
            with np.load(io.BytesIO(done.stdout)) as variables:
                return dict(variables)
        said = done.stderr.decode('utf-8', 'replace').strip().splitlines()
        problem = said[-1] if said else f'status {done.returncode}'
    except (OSError, ValueError) as error:
        problem = error
    raise InputError(f'TensorFlow cannot read {path} ({problem})')


def _weights(preset, variables):
    """Little-endian float32 [parameters], in the order in which page.html takes them; normalizations folded.

    A normalization at fixed statistics is a factor and a summand for each channel. Raises InputError where the
    variables are not those of the preset's network.
    """
    def normalization(name):
        beta, gamma, mean, variance = [variables[f'{name}/{part}'] for part in
                                       ('beta', 'gamma', 'moving_mean', 'moving_variance')]
        factor = gamma / np.sqrt(variance + np.float32(BN_EPSILON))
        return [factor, beta - mean * factor]

    try:
        parts = [variables['init/init_conv/DW']]
        for group in range(1, len(FILTERS)):
            for i in range(preset.num_residual_units):
                unit = f'unit_{group}_{i}'
                activation = 'common_activation' if unit == 'unit_1_0' else 'residual_activation'
                parts += normalization(f'{unit}/{activation}/init_bn') + [variables[f'{unit}/sub1/conv1/DW']]
                parts += normalization(f'{unit}/sub2/bn2') + [variables[f'{unit}/sub2/conv2/DW']]
        parts += normalization('unit_last/final_bn') + [variables['logit/DW'], variables['logit/biases']]
        weights = np.concatenate([part.ravel() for part in parts]).astype('<f4')
    except (KeyError, ValueError) as error:
        raise InputError(f'the checkpoint of run {preset.timestamp} does not fit a {preset.model} ({error})')
    if len(weights) != sum(stage.parameters for stage in network_stages(preset)):
        raise InputError(f'the checkpoint of run {preset.timestamp} does not fit a {preset.model}')
    return weights
