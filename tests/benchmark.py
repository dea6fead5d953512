"""Measures this collection's speed on the machine at hand, beside its peers in the same run.

    python tests/benchmark.py                                preset 3 (ResNet-20)
    python tests/benchmark.py --preset 4 --mixed_precision   ResNet-56 in 16 bits
    python tests/benchmark.py --study_python .venv37/bin/python --peers_python .venv_peers/bin/python

Who is measured:

    ours         training and evaluation, as the scripts do them
    numpy        a matrix product alone
    study        training as in the 2020 study: unfused layers, images augmented one by one, lists fed; in 32 bits
    torch        training and evaluation by torch.compile, channels last
    jax          training and evaluation by jit; a step is compiled as a whole, and donates its state
    onnxruntime  evaluation of what resnet_eval.py exports, in 32 bits
    openvino     evaluation of the same

What is not installed is left out. One environment of Python 3.11 to 3.13 holds everything:

    pip install -r requirements.txt torch jax onnxruntime openvino tf2onnx

All train by SGD at full resolution, whatever the preset, and all but the study on the same batches, prepared in the
background. After one step from the same weights, all that evaluate must have the same loss. With --mixed_precision they
train in 16 bits, and the peers evaluate in them, too.

Every program is a process of its own. They take turns: in every round each works for some seconds while the others
wait, and a ratio is the median over the rounds, so that a machine that drifts does not bias it. The machine's limit is
a large matrix product, in the bits of the training, by the library that is fastest at it. The images are random: speed
does not depend on them, and no data set is needed. Leave the machine alone meanwhile.
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

PROJECT_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT_DIR)

import numpy as np

import data_helpers
import peers
from data_helpers import InputError, Progress, exit_on_input_error
from peers import EVALUATED, MATRIX
from presets_and_results import MODEL, RESUME, check_output_dir, make_preset, start_run

IMAGES = 45000  # training images, as in CIFAR-10
SAME_LOSS = {32: 0.001, 16: 0.01}  # bits: how far a peer's loss may be from ours, as a part of it


# ------------------------------------------------------------------------------ ours

def ours(preset, images, labels, folder):
    """A program as those of peers.py: the scripts' own training loop, input and evaluation.

    For the peers the folder gets the weights before the first step, and a run with a checkpoint of those after it.
    """
    from resnet import ResNet, evaluate, half_precision, make_session, tf
    from resnet_train import Run
    kind = half_precision() if preset.mixed_precision else tf.float32
    if kind is None:
        raise InputError('this machine gains nothing by 16 bits: leave --mixed_precision out')
    check_output_dir(folder)
    start_run(preset, folder)
    net = ResNet(preset)
    session = make_session(preset)
    run = Run(preset, net, session, data_dir='', output_dir=folder, n_training=len(images), resume=False,
              began=time.monotonic())
    session.graph.finalize()
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    # By the statistics of an untouched network, 0 and 1, the logits of a deep one explode, and its loss tells nothing.
    net.refresh_statistics(session, [data_helpers.scale(images[:EVALUATED])])
    np.savez(os.path.join(folder, peers.WEIGHTS), **session.run(variables))
    kernels = [variable for name, variable in variables.items() if name.endswith('/DW')]
    batches, fixed = run.batches(images, labels), next(run.batches(images, labels))
    steps = iter(range(1, 10 ** 9))

    def train():
        step = next(steps)
        run.train_step(step, *next(batches))
        if step == 1:
            run.save(step, MODEL)

    def test():
        loss, _ = evaluate(net, session, images[:EVALUATED], labels[:EVALUATED])
        l2 = sum((kernel ** 2).sum() for kernel in session.run(kernels)) / 2
        return loss - preset.l2_reg_lambda * l2  # the mean cross entropy

    return dict(training=train, training_without_input=lambda: run.train_step(next(steps), *fixed),
                evaluation=test, saves=lambda: run.save(next(steps), RESUME), product=tensorflow_product(kind))


def tensorflow_product(kind):
    """The action of a matrix product in numbers of `kind`."""
    from resnet import tf
    with tf.Graph().as_default():
        matrix = tf.Variable(tf.cast(tf.random_uniform([MATRIX, MATRIX]), kind))
        product = tf.matmul(matrix, matrix).op
        session = tf.Session()
        session.run(matrix.initializer)
    return lambda: session.run(product)


PROGRAMS = dict(ours=ours, numpy=peers.numpy, study=peers.study, torch=peers.torch, jax=peers.jax,
                onnxruntime=peers.onnxruntime, openvino=peers.openvino)


# ------------------------------------------------------------------------------ a process for each

def preset_of(flags):
    """The preset, to be trained by SGD at full resolution, at a constant rate from the first step on."""
    return make_preset(flags.preset, mixed_precision=flags.mixed_precision, muon_lr=0, nesterov=False,
                       low_resolution_epochs=0, warmup_epochs=0, label_smoothing=0)


def work(flags):
    """What the process of a program does: it makes the program ready, then measures on request, line by line."""
    name, folder, began = flags.worker
    answers, sys.stdout = sys.stdout, sys.stderr  # what a program prints is not an answer
    preset = preset_of(flags)
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    labels = random.randint(0, 10, IMAGES)
    ready = {}
    try:
        actions = PROGRAMS[name](preset, images, labels, folder)
        if 'training' in actions:
            actions['training']()
            ready['first_step'] = time.time() - float(began)
        if 'evaluation' in actions:
            ready['loss'] = float(actions['evaluation']())
        ready['measurements'] = list(actions)
    except Exception as error:  # whatever keeps a peer from working
        ready['error'] = str(error) if isinstance(error, (ImportError, InputError)) else repr(error)
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        measurement, count = line.split()
        began = time.perf_counter()
        for _ in range(int(count)):
            actions[measurement]()
        seconds = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # MB
        print(json.dumps(dict(seconds=seconds, memory=memory)), file=answers, flush=True)


class Program:
    """A process that works, seen from here. Where it cannot, `error` says why."""

    def __init__(self, name, python, folder, flags):
        self.name, self.memory = name, None
        command = [python, os.path.abspath(__file__), '--worker', name, folder, repr(time.time()), '--preset',
                   str(flags.preset)] + ['--mixed_precision'] * flags.mixed_precision
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, universal_newlines=True)
        ready = json.loads(self.process.stdout.readline() or '{"error": "its process ended as it started"}')
        self.error, self.loss, self.first_step = ready.get('error'), ready.get('loss'), ready.get('first_step')
        self.measurements = ready.get('measurements', ())

    def measure(self, measurement, count):
        """The seconds that so many actions take."""
        try:
            self.process.stdin.write(f'{measurement} {count}\n')
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            raise InputError(f'the process of {self.name} ended while its {measurement} was measured')
        self.memory = answer['memory']
        return answer['seconds']


def start(folder, flags):
    """The Programs that work on this machine, ours first. Raises InputError where that does not."""
    programs = []
    for name in PROGRAMS:
        Progress.row(f'starting {name}', sys.stderr)
        python = {'ours': sys.executable, 'numpy': sys.executable, 'study': flags.study_python}
        program = Program(name, python.get(name, flags.peers_python), folder, flags)
        if not program.error:
            programs.append(program)
        elif name == 'ours':
            raise InputError(program.error)
        else:
            Progress.row(f'{name} is left out: {program.error}', sys.stderr)
    return programs


def check_losses(programs, bits):
    """How far a peer's loss is from ours at most, as a part of it. Raises InputError where it is another network's."""
    expected, worst = programs[0].loss, 0.0
    for program in programs:
        if program.loss is not None:
            difference = abs(program.loss - expected) / expected
            if not difference <= SAME_LOSS[bits]:
                raise InputError(f'{program.name} computes another network: its loss after a step is '
                                 f'{program.loss:.4f}, ours is {expected:.4f}')
            worst = max(worst, difference)
    return worst


# ------------------------------------------------------------------------------ turns

MEASUREMENTS = 'training', 'training_without_input', 'evaluation', 'saves', 'product'
COLUMNS = (  # heading, format
    ('training img/s', ',.0f'), ('ours x', '.2f'), ('of limit', '.0%'), ('evaluation img/s', ',.0f'), ('ours x', '.2f'),
    ('product GFLOP/s', ',.0f'), ('first step s', '.1f'), ('memory MB', ',.0f'))


def take_turns(programs, preset, flags):
    """{(name of a program, measurement): its rates, one a round}, in images/s, saves/s, or GFLOP/s."""
    sizes = dict(training=preset.batch_size, training_without_input=preset.batch_size, evaluation=EVALUATED, saves=1,
                 product=2 * MATRIX ** 3 / 1e9)  # of an action
    turns = [(program, measurement) for measurement in MEASUREMENTS for program in programs
             if measurement in program.measurements]
    for program, measurement in turns:
        program.measure(measurement, 1)  # warms up
    counts = [max(1, round(flags.seconds / program.measure(measurement, 1))) for program, measurement in turns]
    rates = {(program.name, measurement): [] for program, measurement in turns}
    with Progress(total=flags.rounds * len(turns), desc='measuring', unit='turns') as progress:
        for _ in range(flags.rounds):
            for (program, measurement), count in zip(turns, counts):
                seconds = program.measure(measurement, count)
                rates[program.name, measurement].append(count * sizes[measurement] / seconds)
                progress.update()
    return {turn: np.array(values) for turn, values in rates.items()}


def table_row(program, rates, limit):
    """The cells of a program; `limit` is the images/s of a training at the rate of the matrix product."""
    missing = np.array([np.nan])
    training, evaluation, product = [rates.get((program.name, measurement), missing)
                                     for measurement in ('training', 'evaluation', 'product')]
    values = [np.median(training), np.median(rates['ours', 'training'] / training), np.median(training) / limit,
              np.median(evaluation), np.median(rates['ours', 'evaluation'] / evaluation), product.max(),
              program.first_step or np.nan, program.memory]
    return ['-' if np.isnan(value) else format(value, form) for value, (_, form) in zip(values, COLUMNS)]


def print_results(programs, rates, preset):
    gflops, fastest = max((values.max(), name) for (name, measurement), values in rates.items()
                          if measurement == 'product')
    gflop = peers.training_gflop(preset)
    bits = 16 if preset.mixed_precision else 32
    print(f'{preset.model}, batch {preset.batch_size}, {bits} bits. The limit is the matrix product of '
          f'{"TensorFlow" if fastest == "ours" else fastest}, {gflops:,.0f} GFLOP/s; a training step takes '
          f'{1000 * gflop:.0f} MFLOP an image')
    print(' ' * 12 + ''.join(f'  {heading}' for heading, _ in COLUMNS))
    for program in programs:
        cells = table_row(program, rates, gflops / gflop)
        aligned = [cell.rjust(len(heading) + 2) for cell, (heading, _) in zip(cells, COLUMNS)]
        print(f'{program.name:12}' + ''.join(aligned))
    input_share = 1 - np.median(rates['ours', 'training'] / rates['ours', 'training_without_input'])
    seconds = 1 / np.median(rates['ours', 'saves'])
    saving_share = seconds / (seconds + 60 * preset.checkpoint_minutes)
    print(f'of our training step the input costs {input_share:.1%}; a save for --resume takes {seconds:.3f} seconds, '
          f'which every {preset.checkpoint_minutes:g} minutes is {saving_share:.3%} of the time')


def interpreter(path):
    if not shutil.which(path):
        raise argparse.ArgumentTypeError(f'there is no program {path}')
    return path


@exit_on_input_error
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='3', help='number or name (default: 3)')
    parser.add_argument('--mixed_precision', action='store_true', help='16 bits')
    parser.add_argument('--rounds', type=int, default=5, help='turns of every program (default: 5)')
    parser.add_argument('--seconds', type=float, default=3, help='length of a turn, about (default: 3)')
    parser.add_argument('--study_python', type=interpreter, default=sys.executable, metavar='PYTHON',
                        help='interpreter for the study (default: this one)')
    parser.add_argument('--peers_python', type=interpreter, default=sys.executable, metavar='PYTHON',
                        help='interpreter for the other peers (default: this one)')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags)
    if flags.rounds < 1:
        parser.error('--rounds must be at least 1')

    preset = preset_of(flags)
    with tempfile.TemporaryDirectory() as folder:
        programs = start(folder, flags)
        difference = check_losses(programs, 16 if flags.mixed_precision else 32)
        rates = take_turns(programs, preset, flags)
    print_results(programs, rates, preset)
    print(f'after a step from the same weights the losses differ from ours by {difference:.3%} at most')


if __name__ == '__main__':
    main()
