"""Measures this collection's speed on the machine at hand, beside two peers in the same run.

    python tests/benchmark.py                                    preset 3 (ResNet-20), batch 128
    python tests/benchmark.py --preset 1 --batch_size 256 --json
    python tests/benchmark.py --study_python .venv37/bin/python --torch_python .venv_torch/bin/python

The peers are the same network as the 2020 study built it (batch normalization and leaky ReLU of single
operations, Python lists fed), and in PyTorch (channels last, torch.compile) where that is installed; each
may run under another Python, and steps by SGD, whatever the preset. Every program is a process of its own;
they take turns, and a ratio is the median over the turns, so that a machine that drifts does not bias it.
The images are random: speed does not depend on them, and no data set is needed. Leave the machine alone meanwhile.
"""
import argparse
import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

BEGAN = time.time()
PROJECT_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT_DIR)

import numpy as np

import data_helpers
from data_helpers import exit_on_input_error
from presets_and_results import RESUME, check_output_dir, make_preset, start_run

IMAGES = 45000       # training images, as in CIFAR-10
EVALUATED = 1000     # images; evaluations are of multiples of so many
STUDY_BATCH = 100    # images, of an evaluation the study's way
TORCH_BATCH = 125    # images, of an evaluation: its fastest


# ------------------------------------------------------------------------------ programs
# A program is a function of a preset and random data; it returns {measurement: function of a number of images, or of
# saves}.

def ours(preset, images, labels):
    """The scripts' own loop, evaluation and input."""
    from resnet import ResNet, evaluate, make_session
    from resnet_train import Run
    output_dir = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, output_dir, ignore_errors=True)
    check_output_dir(output_dir)
    start_run(preset, output_dir)
    net = ResNet(preset)
    session = make_session(preset)
    run = Run(preset, net, session, data_dir='', output_dir=output_dir, n_training=len(images), resume=False,
              began=time.monotonic())
    session.graph.finalize()
    batches = run.batches(images, labels)
    fixed = next(batches)
    steps = iter(range(1, 10 ** 9))

    def train(n):
        for _ in range(-(-n // preset.batch_size)):
            run.train_step(next(steps), *next(batches))

    def train_without_input(n):
        for _ in range(-(-n // preset.batch_size)):
            run.train_step(next(steps), *fixed)

    def prepare(n):
        source = data_helpers.training_batches(images, labels, preset)
        for _ in range(-(-n // preset.batch_size)):
            next(source)

    def save(n):
        for _ in range(n):
            run.save(next(steps), RESUME)

    return dict(training=train, training_without_input=train_without_input, input=prepare, saves=save,
                evaluation=lambda n: evaluate(net, session, images[:n], labels[:n]))


def study(preset, images, labels):
    """The 2020 way: unfused layers, augmentation image by image, lists of float64 arrays fed."""
    import resnet
    from resnet import BN_EPSILON, tf

    def activation(self, x, name, training):
        with tf.variable_scope(name):
            beta, gamma, *moving = self._statistics(x.shape[-1].value)
        batch = tf.nn.moments(x, [0, 1, 2])
        if training:
            self._batch_statistics += zip(moving, batch)
        x = tf.nn.batch_normalization(x, *batch, offset=beta, scale=gamma, variance_epsilon=BN_EPSILON)
        return tf.where(tf.less(x, 0.0), self.preset.relu_leakiness * x, x)

    def unit(self, x, filters, stride, training, activate_before_split):
        with tf.variable_scope('common_activation' if activate_before_split else 'residual_activation'):
            activated = self._activation(x, 'init_bn', training)
        shortcut = activated if activate_before_split else x
        with tf.variable_scope('sub1'):
            x = resnet._convolution(activated, self._kernel('conv1', activated, filters))
        with tf.variable_scope('sub2'):
            x = self._activation(x, 'bn2', training)
            x = resnet._convolution(x, self._kernel('conv2', x, filters), stride)
        return x + resnet._match(shortcut, filters, stride)

    resnet.KERNELS = None  # plain convolutions, whatever the machine
    StudyResNet = type('StudyResNet', (resnet.ResNet,), dict(_activation=activation, _unit=unit))
    net = StudyResNet(preset)
    session = tf.Session(config=tf.ConfigProto(allow_soft_placement=True))
    session.run(tf.global_variables_initializer())
    random = np.random.RandomState(0)
    scaled = images[:10000] / 127.5 - 1  # float64, as the study kept all of them

    def augmented(image):
        image = np.pad(image[:, ::random.choice((1, -1))], ((4, 4), (4, 4), (0, 0)), mode='constant')
        row, column = random.randint(0, 9, 2)
        return image[row:row + 32, column:column + 32]

    def batches(n, size, augment):
        for _ in range(-(-n // size)):
            chosen = random.randint(0, len(scaled), size)
            yield {net.X: [augmented(scaled[k]) if augment else scaled[k] for k in chosen],
                   net.Y: [np.eye(preset.num_classes)[labels[k]] for k in chosen]}

    def train(n):
        for feed in batches(n, preset.batch_size, preset.data_augmentation):
            feed[net.learning_rate] = preset.lr
            session.run([net.train_step, net.training_loss, net.training_accuracy], feed)

    def test(n):
        for feed in batches(n, STUDY_BATCH, False):
            session.run([net.loss, net.predictions], feed)

    return dict(training=train, evaluation=test)


def torch(preset, images, labels):
    """The same network, input and step in PyTorch, channels last, compiled."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Unit(nn.Module):
        def __init__(self, inputs, outputs, stride, before_split):
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(inputs, eps=0.001), nn.BatchNorm2d(outputs, eps=0.001)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
            self.stride, self.missing, self.before_split = stride, outputs - inputs, before_split

        def forward(self, x):
            y = functional.leaky_relu(self.bn1(x), preset.relu_leakiness)
            shortcut = y if self.before_split else x
            y = self.conv2(functional.leaky_relu(self.bn2(self.conv1(y)), preset.relu_leakiness))
            if self.stride > 1:
                shortcut = functional.avg_pool2d(shortcut, 2)
            if self.missing:
                shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
            return y + shortcut

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [(16, 16, 1)] + [(16, 16, 1)] * (preset.num_residual_units - 1)
            for inputs, outputs in ((16, 32), (32, 64)):
                widths += [(inputs, outputs, 2)] + [(outputs, outputs, 1)] * (preset.num_residual_units - 1)
            self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.units = nn.Sequential(*[Unit(*width, before_split=k == 0) for k, width in enumerate(widths)])
            self.bn, self.dense = nn.BatchNorm2d(64, eps=0.001), nn.Linear(64, preset.num_classes)

        def forward(self, x):
            x = functional.leaky_relu(self.bn(self.units(self.stem(x))), preset.relu_leakiness)
            return self.dense(x.mean((2, 3)))

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = Net().to(memory_format=torch.channels_last)
    kernels = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.SGD([dict(params=kernels, weight_decay=preset.l2_reg_lambda), dict(params=others)],
                                lr=preset.lr, momentum=preset.momentum, nesterov=preset.nesterov)
    compiled = torch.compile(net, dynamic=False)
    batches = data_helpers.training_batches(images, labels, preset)

    def tensors(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2)  # a view: channels last

    def train(n):
        net.train()
        for _ in range(-(-n // preset.batch_size)):
            x, y = next(batches)
            while len(y) < preset.batch_size:  # an epoch's last batch would be compiled anew
                x, y = next(batches)
            y = torch.from_numpy(y.argmax(1))
            with torch.autocast('cpu', torch.bfloat16, enabled=preset.mixed_precision):
                logits = compiled(tensors(x))
            loss = functional.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item(), (logits.argmax(1) == y).float().mean().item()

    def test(n):
        net.eval()
        with torch.no_grad():
            for k in range(0, n, TORCH_BATCH):
                logits = compiled(tensors(data_helpers.scale(images[k:k + TORCH_BATCH])))
                functional.cross_entropy(logits, torch.from_numpy(labels[k:k + TORCH_BATCH])).item(), logits.argmax(1)

    return dict(training=train, evaluation=test)


PROGRAMS = dict(ours=ours, study=study, torch=torch)


# ------------------------------------------------------------------------------ turns

def work(flags):
    """A process with one program: makes it ready, then measures on request until its input ends."""
    preset = make_preset(flags.preset, batch_size=flags.batch_size,
                         mixed_precision=flags.mixed_precision and flags.worker != 'study')
    if flags.worker != 'ours':
        preset.update(dict(muon_lr=0))
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    labels = random.randint(0, 10, IMAGES)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a program prints is not an answer
    try:
        measurements = PROGRAMS[flags.worker](preset, images, labels)
    except ImportError as error:
        print(json.dumps(dict(error=str(error))), file=answers, flush=True)
        return
    measurements['training'](1)
    print(json.dumps(dict(measurements=sorted(measurements), first_step=time.time() - flags.began)), file=answers,
          flush=True)
    for line in sys.stdin:
        name, n = line.split()
        began = time.perf_counter()
        measurements[name](int(n))
        seconds = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes
        print(json.dumps(dict(seconds=seconds, memory=memory)), file=answers, flush=True)


class Program:
    """A worker process, seen from here."""

    def __init__(self, name, python, flags):
        self.name, self.memory = name, None
        self.process = subprocess.Popen(
            [python, os.path.abspath(__file__), '--worker', name, '--began', repr(time.time()),
             '--preset', str(flags.preset), '--batch_size', str(flags.batch_size)]
            + ['--mixed_precision'] * flags.mixed_precision,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
        ready = json.loads(self.process.stdout.readline() or '{"error": "it failed to start"}')
        self.error, self.first_step = ready.get('error'), ready.get('first_step')
        self.measurements = ready.get('measurements', ())

    def measure(self, name, n):
        """Images per second over n images, or saves over n saves."""
        self.process.stdin.write('{} {}\n'.format(name, n))
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.memory = answer['memory']
        return n / answer['seconds']


def matrix_product_rate(seconds=3.0):
    """GFLOP/s of NumPy's single-precision matrix product, the best of several."""
    a = np.random.RandomState(0).rand(2048, 2048).astype(np.float32)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a.dot(a)
        best = max(best, 2 * 2048 ** 3 / (time.perf_counter() - start) / 1e9)
    return best


def training_flop(preset):
    """Floating point operations of a training step per image: three times those of the forward products."""
    n, products = preset.num_residual_units, 32 * 32 * 9 * 3 * 16 + 64 * preset.num_classes
    for inputs, outputs, side in ((16, 16, 32), (16, 32, 16), (32, 64, 8)):
        first = side * (2 if inputs != outputs else 1)  # the stride sits on the second convolution
        products += 9 * (first * first * inputs * outputs + (2 * n - 1) * side * side * outputs * outputs)
    return 3 * 2 * products


def median(values):
    return float(np.median(values))


@exit_on_input_error
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default=3)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--mixed_precision', action='store_true', help='in 16 bits; PyTorch too, by its autocast')
    parser.add_argument('--rounds', type=int, default=5, help='turns of every program (default: 5)')
    parser.add_argument('--seconds', type=float, default=6, help='length of a turn, about (default: 6)')
    parser.add_argument('--study_python', default=sys.executable, help='Python of the 2020 way (default: this one)')
    parser.add_argument('--torch_python', default=sys.executable, help='Python of PyTorch (default: this one)')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--worker', choices=sorted(PROGRAMS), help=argparse.SUPPRESS)
    parser.add_argument('--began', type=float, default=BEGAN, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags)

    preset = make_preset(flags.preset, batch_size=flags.batch_size)
    say = (lambda *words: print(*words, file=sys.stderr, flush=True))
    say('Preset {}, {}, batch {}: measuring the matrix product, then {} rounds'.format(
        preset.preset, preset.model, preset.batch_size, flags.rounds))
    gflops = matrix_product_rate()
    programs = {}
    for name, python in (('ours', sys.executable), ('study', flags.study_python), ('torch', flags.torch_python)):
        program = Program(name, python, flags)
        if program.error:
            say('{} is left out: {}'.format(name, program.error))
        else:
            programs[name] = program
    order = 'training', 'training_without_input', 'evaluation', 'input', 'saves'
    turns = [(name, measurement) for measurement in order
             for name in programs if measurement in programs[name].measurements]
    counts, rates = {}, {turn: [] for turn in turns}
    for name, measurement in turns:  # warm up, and learn how long a turn is
        part = dict(evaluation=EVALUATED, saves=1).get(measurement, preset.batch_size)
        for parts in (1, 4):
            rate = programs[name].measure(measurement, parts * part)
        counts[name, measurement] = min(IMAGES // part, max(1, int(rate * flags.seconds / part))) * part
    for turn in range(flags.rounds):
        say('round {} of {}'.format(turn + 1, flags.rounds))
        for name, measurement in turns:
            rates[name, measurement].append(programs[name].measure(measurement, counts[name, measurement]))

    result = dict(preset=preset.preset, model=preset.model, batch_size=preset.batch_size, rounds=flags.rounds,
                  checkpoint_minutes=preset.checkpoint_minutes, matrix_product_gflops=gflops,
                  training_mflop_per_image=training_flop(preset) / 1e6, programs={})
    for name, program in programs.items():
        figures = {measurement + '_images_per_second': median(rates[name, measurement])
                   for measurement in program.measurements if measurement != 'saves'}
        figures['share_of_matrix_product_rate'] = (
            figures['training_images_per_second'] * training_flop(preset) / 1e9 / gflops)
        figures['peak_memory_mb'] = program.memory / 1e6
        figures['seconds_to_first_step'] = program.first_step
        for measurement in ('training', 'evaluation'):
            figures['ours_is_so_many_times_as_fast_' + measurement] = median(
                np.array(rates['ours', measurement]) / rates[name, measurement])
        result['programs'][name] = figures
    result['input_share_of_a_step'] = 1 - median(
        np.array(rates['ours', 'training']) / rates['ours', 'training_without_input'])
    seconds = result['seconds_to_save'] = 1 / median(rates['ours', 'saves'])
    result['saving_share_of_the_time'] = seconds / (seconds + 60 * preset.checkpoint_minutes)
    if flags.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)


def print_table(result):
    print('{model}, batch {batch_size}; matrix product {matrix_product_gflops:.0f} GFLOP/s, of which a step needs '
          '{training_mflop_per_image:.0f} MFLOP an image'.format(**result))
    print('{:8}{:>16}{:>8}{:>18}{:>8}{:>8}{:>10}{:>14}'.format(
        '', 'training img/s', 'ours x', 'evaluation img/s', 'ours x', 'share', 'memory MB', 'first step s'))
    for name, figures in result['programs'].items():
        print('{:8}{:16,.0f}{:8.2f}{:18,.0f}{:8.2f}{:8.0%}{:10,.0f}{:14.1f}'.format(
            name, figures['training_images_per_second'], figures['ours_is_so_many_times_as_fast_training'],
            figures['evaluation_images_per_second'], figures['ours_is_so_many_times_as_fast_evaluation'],
            figures['share_of_matrix_product_rate'], figures['peak_memory_mb'], figures['seconds_to_first_step']))
    print('input alone {:,.0f} images/s; it costs {:.1%} of a step'.format(
        result['programs']['ours']['input_images_per_second'], result['input_share_of_a_step']))
    print('what --resume goes on from, saved in {:.3f} seconds every {:g} minutes, costs {:.3%} of the time'.format(
        result['seconds_to_save'], result['checkpoint_minutes'], result['saving_share_of_the_time']))


if __name__ == '__main__':
    main()
