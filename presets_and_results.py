"""What to train and what came out: presets, the record of a run, pickles, text logs and the report.

A preset is data: the class attributes of `Preset` are the defaults, `PRESETS` holds numbered
deltas. A run is a preset with a timestamp and its results, kept in three places under the output folder:

    INFOS/pickles/<preset>_<timestamp>.pickle   the `Preset` object
    INFOS/train_overall.txt, eval_overall.txt   one line per training, one per evaluation
    runs/<timestamp>/                           checkpoints, summaries, test predictions

    python presets_and_results.py               prints all runs and writes the report to for_report/

Nothing here imports TensorFlow, so a wrong flag is refused before the slow import. What only the
report needs (SciPy, openpyxl, matplotlib, TensorBoard's reader) is imported where it is used.
"""
import argparse
import collections
import contextlib
import io
import itertools
import logging
import math
import os
import pickle
import pickletools
import re
import statistics
import sys
import tempfile
import time
import types
import zipfile

import filelock

PROJECT_DIR = os.path.dirname(os.path.abspath(__file__))
PRESET_PICKLE = 'presets_and_results.Preset'
NUMPY_SCALARS = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar', 'numpy.dtype')
LARGEST_PRESET_PICKLE = 1 << 20  # bytes; a real one has about one thousand
MOST_OPCODES = 100000            # of a pickle; CIFAR-10's name 10,000 labels and files each
MOST_TUPLES = 1000               # of a pickle; one within another, C code that descends into many more would crash
LONGEST_TEXT = 200               # characters of an attribute
NO_RUNS = 'there are no runs in {}; make one with: python resnet_train.py --preset 0'
NEWEST = 'the newest'            # in place of a timestamp
LOCK = '.lock'                   # of a run's folder, and of INFOS/
PATIENCE = 60                    # seconds that others may hold INFOS/, for what takes milliseconds
PREDICTIONS = 'test_predictions.csv'  # in runs/<timestamp>/
PASSED_ON = 4                    # nodes at most between a variable and the product that takes it
LARGEST_PREDICTIONS = 1 << 20    # characters; 10,000 images take 40,000


class InputError(Exception):
    """A mistake that the user can mend: scripts print it as one line and exit with status 2."""


# ------------------------------------------------------------------------------ presets

class Preset:
    """One training run: its hyperparameters, then what came out of it.

    The attributes stand in the order of the text logs' columns. Everything is a plain
    value (int, float, bool, str or None). A pickle that lacks an attribute, because it was
    written before the attribute existed, gets the default below.
    """
    preset = None                         # number in PRESETS
    model = 'ResNet8'                     # ResNet-(6n + 2), n = num_residual_units
    optimizer = 'SGD (Momentum)'          # see momentum, nesterov and muon_lr
    activation_function = 'ReLU'          # leaky, see relu_leakiness
    weight_initialization = 'He_normal'
    normalization = 'Batch Norm'
    lr = 0.1                              # learning rate at its highest
    lr_decay = 1.0                        # factor on the learning rate, by the step schedule, every 24,000 steps
    l2_reg_lambda = 0.001                 # weight of the L2 loss over the kernels
    relu_leakiness = 0.1                  # slope for negative inputs
    num_residual_units = 1                # per group, three groups
    num_classes = 10
    batch_size = 128                      # images per step
    num_epochs = 200                      # passes over the training images
    evaluate_every = 100                  # steps between validations
    checkpoint_every = 100                # steps between checkpoints of the latest weights
    num_checkpoints = 3                   # best checkpoints kept, beside the latest
    data_augmentation = True              # flip and crop
    allow_soft_placement = True           # ops without a GPU kernel run on the CPU
    log_device_placement = False          # TensorFlow lists where each op runs
    timestamp = None                      # start in seconds since 1970, and the run's name
    training_time = None                  # minutes
    early_stopping_epoch = None           # step (not epoch) of the best validation accuracy
    val_accuracy = None                   # best validation accuracy, 0 to 1
    test_accuracy = None                  # 0 to 1
    finished = False                      # the test accuracy is in
    # Newer than the 2020 study's pickles:
    seed = 0                              # of the split, the weights, the order, the augmentation
    max_steps = None                      # training stops here if the epochs do not end it before
    steps = None                          # steps trained so far
    status = None                         # 'training', 'interrupted', 'complete' or 'diverged'
    images_per_second = None              # training steps alone, without validation
    device = None                         # what it was trained on
    tensorflow_version = None
    python_version = None
    # The recipe beyond the 2020 study's:
    schedule = 'step'                     # of the learning rate after the warm-up: 'step', 'one-cycle' or 'cosine'
    lr_milestones = None                  # steps at which lr_decay multiplies, as '32000,48000'; None: every 24,000
    warmup_epochs = 0.0                   # epochs over which the rate rises linearly to lr
    momentum = 0.9                        # of SGD and of Muon
    nesterov = False                      # both look ahead (Nesterov momentum)
    label_smoothing = 0.0                 # share of the label that is spread over all classes
    mixup = 0.0                           # alpha of Beta(alpha, alpha), from which images and labels are mixed
    random_erasing = 0.0                  # probability that a rectangle of a training image is erased
    low_resolution_epochs = 0.0           # epochs, from the first, that are trained on crops of 24x24
    mixed_precision = False               # training computes in 16 bits
    xla = False                           # XLA compiles the graph
    checkpoint_minutes = 2.0              # minutes of work that a kill may cost
    muon_lr = 0.0                         # rate at which Muon, in place of SGD, moves the convolutions' kernels

    def __init__(self, **values):
        """Defaults, then `values`. Raises InputError on an unknown name or a bad value."""
        self.__dict__.update({name: getattr(Preset, name) for name in COLUMNS})
        self.update(values)

    def update(self, values):
        """Sets several attributes; `model` and `optimizer` follow. Raises InputError as __init__ does."""
        for name, value in values.items():
            if name not in COLUMNS:
                raise InputError('unknown preset attribute {!r}'.format(name))
            if name in FIELDS and value is not None:
                value = FIELDS[name].check(name, value)
            elif not isinstance(value, (str, type(None))):
                raise InputError('{} must be text, not {!r}'.format(name, value))
            setattr(self, name, value)
        if 'num_residual_units' in values:
            self.model = 'ResNet{}'.format(self.depth)
        if 'muon_lr' in values:
            self.optimizer = 'Muon, SGD (Momentum)' if self.muon_lr else Preset.optimizer

    @property
    def depth(self):
        """Layers with weights: 6n + 2 (He et al. 2015, section 4.2)."""
        return 6 * self.num_residual_units + 2

    @property
    def title(self):
        """The run's readable name, in TensorBoard and in the report's pictures."""
        return 'preset {0.preset}, {0.model}, {0.timestamp}'.format(self)

    def run_dir(self, output_dir):
        """Folder of checkpoints and summaries."""
        return os.path.join(output_dir, 'runs', str(self.timestamp))

    def pickle_path(self, output_dir):
        """Where the run is on record."""
        return os.path.join(output_dir, 'INFOS', 'pickles', '{}_{}.pickle'.format(self.preset, self.timestamp))

    def save(self, output_dir):
        """Pickles the object, whole or not at all: a reader never sees half a file."""
        write_atomically(self.pickle_path(output_dir), pickle.dumps(self, protocol=4))  # 4: Python 3.7 reads it

    def log(self, output_dir, name, replace=False):
        """Adds a tab-separated line to INFOS/<name>, in place of the run's last one if `replace`.

        The header names all columns, also those that the file lacked before. The file is whole at any
        moment, and of several processes that log at once none loses a line.
        """
        path = os.path.join(output_dir, 'INFOS', name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with filelock.FileLock(os.path.join(output_dir, 'INFOS', LOCK), timeout=PATIENCE):
            lines = []
            if os.path.exists(path):
                with open(path, encoding='utf-8', errors='surrogateescape') as file:  # what others wrote stays as it is
                    lines = [line for line in file.read().split('\n')[1:] if line]
            if replace:
                lines = [line for line in lines if str(self.timestamp) != (
                    line.split('\t') + [''] * len(COLUMNS))[COLUMNS.index('timestamp')]]
            lines.append('\t'.join(_as_text(getattr(self, column)) for column in COLUMNS))
            write_atomically(path, '\n'.join(['\t'.join(COLUMNS)] + lines + ['']).encode('utf-8', 'surrogateescape'))


COLUMNS = tuple(name for name, value in vars(Preset).items()
                if not name.startswith('_') and not callable(value) and not isinstance(value, property))


class Field(collections.namedtuple('Field', 'type low high help')):
    """Type, inclusive range and meaning of a number among the attributes of Preset."""

    def check(self, name, value):
        """Returns `value` (text from a flag, or a number) in its type, or raises InputError."""
        if self.type is bool:
            known = {'true': True, '1': True, 'false': False, '0': False}
            if str(value).lower() not in known:
                raise InputError('{} must be true or false, not {!r}'.format(name, value))
            return known[str(value).lower()]
        try:
            number = self.type(value)
            if isinstance(value, float) and number != value:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not self.low <= number <= self.high:
            raise InputError('{} must be {} from {} to {}, not {!r}'.format(
                name, 'a whole number' if self.type is int else 'a number', self.low, self.high, value))
        return number


class Text(collections.namedtuple('Text', 'pattern expected help')):
    """Regular expression, the same in words, and meaning of a text among the attributes of Preset."""
    type = str

    def check(self, name, value):
        """Returns `value`, or raises InputError."""
        if not isinstance(value, str) or not re.match('(' + self.pattern + r')\Z', value):
            raise InputError('{} must be {}, not {!r}'.format(name, self.expected, value))
        return value


HYPERPARAMETERS = {  # each has a flag of its name
    'lr': Field(float, 1e-9, 100, 'learning rate at its highest'),
    'lr_decay': Field(float, 1e-3, 1, 'factor on the learning rate, by the step schedule, every 24,000 steps'),
    'l2_reg_lambda': Field(float, 0, 1, 'weight of the L2 loss over the kernels'),
    'relu_leakiness': Field(float, 0, 1, 'slope of the activation for negative inputs'),
    'num_residual_units': Field(int, 1, 200, 'n units a group: the network has 6n + 2 layers'),
    'num_classes': Field(int, 10, 1000, 'width of the last layer; CIFAR-10 fills the first 10'),
    'batch_size': Field(int, 1, 45000, 'images per training step'),
    'num_epochs': Field(int, 1, 100000, 'passes over the 45,000 training images'),
    'evaluate_every': Field(int, 1, 10**9, 'steps between validations'),
    'checkpoint_every': Field(int, 1, 10**9, 'steps between checkpoints of the latest weights'),
    'num_checkpoints': Field(int, 1, 1000, 'best checkpoints kept, beside the latest'),
    'data_augmentation': Field(bool, None, None, 'random flip and crop of the training images'),
    'allow_soft_placement': Field(bool, None, None, 'ops without a GPU kernel run on the CPU'),
    'log_device_placement': Field(bool, None, None, 'list where each op runs'),
    'seed': Field(int, 0, 2**32 - 1, 'seed of the split, the weights, the order, the augmentation'),
    'max_steps': Field(int, 1, 10**9, 'stop after so many steps'),
    'schedule': Text('step|one-cycle|cosine', 'step, one-cycle or cosine',
                     'of the learning rate: step, or after the warm-up to 0, linearly (one-cycle) or as a cosine'),
    'lr_milestones': Text(r'[0-9]{1,9}(,[0-9]{1,9}){0,9}', 'steps such as 32000,48000',
                          'steps at which lr_decay multiplies, in place of every 24,000'),
    'warmup_epochs': Field(float, 0, 100000, 'epochs over which the learning rate rises linearly to lr'),
    'momentum': Field(float, 0, 0.9999, 'momentum of SGD and of Muon'),
    'nesterov': Field(bool, None, None, 'Nesterov momentum'),
    'muon_lr': Field(float, 0, 100, 'rate at its highest at which Muon moves the convolutions\' kernels; 0: SGD does'),
    'label_smoothing': Field(float, 0, 0.9, 'share of each label that is spread over all classes'),
    'mixup': Field(float, 0, 100, 'alpha of the Beta distribution of mixup; 0: none'),
    'random_erasing': Field(float, 0, 1, 'probability that a rectangle of a training image is erased'),
    'low_resolution_epochs': Field(float, 0, 100000, 'epochs, from the first, that are trained on crops of 24x24'),
    'mixed_precision': Field(bool, None, None, 'train in 16 bits: faster where the hardware can'),
    'xla': Field(bool, None, None, 'let XLA compile the graph, on a GPU'),
    'checkpoint_minutes': Field(float, 0, 10**6, 'minutes of work that a kill may cost'),
}
RECIPE = tuple(name for name in HYPERPARAMETERS if name not in (  # what a result depends on, chance apart
    'seed', 'checkpoint_every', 'num_checkpoints', 'checkpoint_minutes', 'allow_soft_placement',
    'log_device_placement', 'xla'))
FIELDS = dict(
    HYPERPARAMETERS,
    preset=Field(int, 0, 10**9, 'number in PRESETS'),
    timestamp=Field(int, 0, 10**12, 'start of the run in seconds since 1970'),
    training_time=Field(float, 0, 10**9, 'minutes'),
    early_stopping_epoch=Field(int, 0, 10**12, 'step of the best validation accuracy'),
    val_accuracy=Field(float, 0, 1, 'best validation accuracy'),
    test_accuracy=Field(float, 0, 1, 'test accuracy'),
    finished=Field(bool, None, None, 'the test accuracy is in'),
    steps=Field(int, 0, 10**12, 'steps trained so far'),
    images_per_second=Field(float, 0, 10**9, 'training steps alone'),
)

MODERN = dict(num_residual_units=3, lr=0.4, muon_lr=0.02, schedule='one-cycle', nesterov=True, l2_reg_lambda=0.0005,
              relu_leakiness=0.0, evaluate_every=704, checkpoint_every=704)
PAPER = dict(lr_decay=0.1, lr_milestones='32000,48000', num_epochs=182, max_steps=64000, l2_reg_lambda=0.0001,
             relu_leakiness=0.0, evaluate_every=1000, checkpoint_every=1000)
BEST = dict(schedule='cosine', warmup_epochs=5, nesterov=True, l2_reg_lambda=0.0005, relu_leakiness=0.0,
            evaluate_every=704, checkpoint_every=704)
PRESETS = {
    0: dict(num_residual_units=1, l2_reg_lambda=0.0003, batch_size=64, num_epochs=6, evaluate_every=352,
            checkpoint_every=352, data_augmentation=False),  # a first look: too short for augmentation to pay
    1: dict(num_residual_units=5, lr_decay=1.0),
    2: dict(num_residual_units=5, lr_decay=0.96),
    3: dict(num_residual_units=3, lr_decay=0.96),
    4: dict(num_residual_units=9, lr_decay=0.96),
    5: dict(num_residual_units=9, lr_decay=0.90),
    6: dict(MODERN, num_epochs=6, low_resolution_epochs=4.5, evaluate_every=528, checkpoint_every=528),
    7: dict(MODERN, num_epochs=30, warmup_epochs=5, label_smoothing=0.1),
    8: dict(PAPER, num_residual_units=3),
    9: dict(PAPER, num_residual_units=5),
    10: dict(PAPER, num_residual_units=9),
    11: dict(PAPER, num_residual_units=18, warmup_epochs=1),
    12: dict(BEST, num_residual_units=3, random_erasing=0.5),
    13: dict(BEST, num_residual_units=9, mixup=1.0),
}
NAMES = {  # of presets, and what they are for
    0: ('first', 'a first look: minutes on a CPU'),
    1: ('study1', 'the 2020 study: constant learning rate'),
    2: ('study2', 'the 2020 study: learning rate decays'),
    3: ('study3', 'the 2020 study: fewer layers'),
    4: ('study4', 'the 2020 study: more layers; its best'),
    5: ('study5', 'the 2020 study: more layers, faster decay'),
    6: ('fast', 'better than the 2020 study\'s best, in minutes'),
    7: ('standard', 'about the accuracy of the ResNet paper\'s ResNet-20, in a sixth of its steps'),
    8: ('paper20', 'the recipe of He et al. 2015: 64,000 steps'),
    9: ('paper32', 'the same, deeper'),
    10: ('paper56', 'the same, deeper'),
    11: ('paper110', 'the same, deeper, after a warm-up'),
    12: ('best20', '200 epochs, cosine, random erasing'),
    13: ('best56', '200 epochs, cosine, mixup'),
}


def make_preset(number, **overrides):
    """Preset `number` of PRESETS, or by its name, with `overrides`.

    Raises InputError where there is none, naming what there is, or where the recipe makes no sense.
    """
    for known in PRESETS:
        if str(number) in (str(known), NAMES[known][0]):
            preset = Preset(preset=known, **dict(PRESETS[known], **overrides))
            for name in ('warmup_epochs', 'low_resolution_epochs'):
                if getattr(preset, name) >= preset.num_epochs:
                    raise InputError('{} is {:g}, which leaves none of num_epochs {} for the rest of the recipe; give '
                                     '--{} too, smaller'.format(name, getattr(preset, name), preset.num_epochs, name))
            for name in ('lr_decay', 'lr_milestones'):
                if preset.schedule != 'step' and name in overrides and getattr(preset, name) != getattr(Preset, name):
                    raise InputError('{} has no part in the schedule {}; leave it out, or give --schedule step '
                                     'too'.format(name, preset.schedule))
            return preset
    raise InputError('there is no preset {}; choose one of {}'.format(
        number, ', '.join('{} ({})'.format(known, NAMES[known][0]) for known in PRESETS)))


def start_run(preset, output_dir):
    """Gives the run its timestamp and its folder, and returns the folder; check_output_dir comes before.

    Creating the folder reserves the timestamp, so two runs of the same second get two of them.
    Raises InputError where it cannot be made.
    """
    preset.timestamp = int(time.time())
    while True:
        try:
            os.mkdir(preset.run_dir(output_dir))
            return preset.run_dir(output_dir)
        except FileExistsError:
            preset.timestamp += 1
        except OSError as error:
            raise InputError('a run cannot be started ({})'.format(error))


def check_output_dir(output_dir):
    """Makes the folders of the results. Raises InputError where they cannot be written, before hours are spent."""
    try:
        for folder in ('runs', 'INFOS', os.path.join('INFOS', 'pickles')):
            os.makedirs(os.path.join(output_dir, folder), exist_ok=True)
            tempfile.TemporaryFile(dir=os.path.join(output_dir, folder)).close()
    except OSError as error:
        raise InputError('cannot write to the output folder ({}); name another with --output_dir'.format(error))


@contextlib.contextmanager
def locked(preset, output_dir):
    """Keeps a run to this process, among all that share the folder. Raises InputError where another has it."""
    if not os.path.isdir(preset.run_dir(output_dir)):
        raise InputError('run {} has no folder {}'.format(preset.timestamp, preset.run_dir(output_dir)))
    lock = filelock.FileLock(os.path.join(preset.run_dir(output_dir), LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError('run {} is in the hands of another process, in training or in test'.format(preset.timestamp))
    except OSError as error:
        raise InputError('run {} cannot be written to ({})'.format(preset.timestamp, error))
    try:
        yield
    finally:
        lock.release()


# ------------------------------------------------------------------------------ files

def write_atomically(path, content):
    """Writes bytes beside `path` and moves them into place."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=os.path.dirname(path), prefix=os.path.basename(path) + '.')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp makes it private, and results are for sharing
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


class Inert:
    """Stands in for whatever a pickle names: it keeps arguments and state, and runs nothing."""

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        self.state = state


def read_pickle(content, admitted, encoding='ASCII'):
    """Reads a pickle (bytes) as data: every class or function that it names becomes an Inert.

    The names (module.name) must be among `admitted`. Raises InputError that says which is not,
    or what else is wrong. The interpreter's unpickler in Python is used, because the one in C
    lets a few bytes claim gigabytes for its memo, and what is read is bounded before it is built.
    """
    class Reader(pickle._Unpickler):
        def find_class(self, module, name):
            if module + '.' + name not in admitted:
                raise InputError('it names {}.{}, and a file of results has no use for that'.format(module, name))
            return type(module + '.' + name, (Inert,), {})

    try:
        names = [opcode.name for opcode, _, _ in itertools.islice(pickletools.genops(content), MOST_OPCODES)]
        if len(names) == MOST_OPCODES or sum(name.startswith('TUPLE') for name in names) > MOST_TUPLES:
            raise InputError('it has more parts than any file of results')
        return Reader(io.BytesIO(content), encoding=encoding).load()
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError('it is damaged or no pickle ({}: {})'.format(type(error).__name__, error))


def read_preset(path):
    """The Preset in a pickle. Raises InputError where it holds anything but plain or NumPy scalar values."""
    try:
        with open(path, 'rb') as file:
            content = file.read(LARGEST_PRESET_PICKLE + 1)
        if len(content) > LARGEST_PRESET_PICKLE:
            raise InputError('it is larger than any record of a run')
        record = read_pickle(content, (PRESET_PICKLE,) + NUMPY_SCALARS)
        if type(record).__name__ != PRESET_PICKLE or not isinstance(record.state, dict):
            raise InputError('it holds no Preset')
        values = {name: _plain(name, value) for name, value in record.state.items()}
        preset = Preset()
        preset.update({name: value for name, value in values.items() if value is not None})
        if preset.timestamp is None:
            raise InputError('it has no timestamp')
        if re.match(r'[\w.+-]{1,40}$', values.get('model') or ''):  # it goes into titles and names of folders
            preset.model = values['model']
        return preset
    except (InputError, OSError) as error:
        raise InputError('{} is refused: {}'.format(path, printable(str(error))))


def _plain(name, value):
    """A pickled value as int, float, bool, str or None. Raises InputError on anything else."""
    if type(value).__name__ in NUMPY_SCALARS:
        import numpy
        try:
            dtype, data = value.args
            kind = dtype.args[0]
            if kind[0] not in 'biuf':
                raise ValueError(kind)
            order = dtype.state[1].replace('|', '=')
            return numpy.frombuffer(data, order + kind, count=1)[0].item()
        except Exception:
            raise InputError('{} is no number'.format(name))
    if type(value) is int and abs(value) >> 63:
        raise InputError('{} is too large a number'.format(name))
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:  # shown in consoles, workbooks and pictures
        return printable(value[:LONGEST_TEXT])
    raise InputError('{} is of type {}, neither text nor a number'.format(name, type(value).__name__))


def load_presets(output_dir):
    """All runs on record, oldest first. A refused pickle is named on stderr and the others load."""
    folder = os.path.join(output_dir, 'INFOS', 'pickles')
    presets = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith('.pickle'):
            try:
                presets.append(read_preset(os.path.join(folder, name)))
            except InputError as error:
                warn(error)
    presets.sort(key=lambda preset: preset.timestamp)
    for one, other in zip(presets, presets[1:]):
        if one.timestamp == other.timestamp:
            warn('there are two records of run {} in {}; one is left out'.format(one.timestamp, folder))
    return list({preset.timestamp: preset for preset in presets}.values())


def load_preset(output_dir, timestamp=None):
    """The run with this timestamp, or the newest. Raises InputError that lists what there is."""
    presets = load_presets(output_dir)
    if not presets:
        raise InputError(NO_RUNS.format(output_dir))
    if timestamp is None:
        return presets[-1]
    for preset in presets:
        if str(preset.timestamp) == str(timestamp):
            return preset
    raise InputError('there is no run {}; known: {}'.format(
        timestamp, ', '.join(str(preset.timestamp) for preset in presets)))


def warn(problem):
    """A line on stderr about what is left out."""
    print('warning: {}'.format(printable(str(problem))), file=sys.stderr)


def printable(text):
    """A foreign text for consoles, workbooks and pictures: control characters and broken letters become '?'."""
    return ''.join(letter if letter.isprintable() else '?' for letter in text)


def _as_text(value):
    if value is None:
        return ''
    if isinstance(value, float):
        return '{:.6g}'.format(value)
    return ' '.join(str(value).split())


# ------------------------------------------------------------------------------ report: figures

STUDY_2020 = {number: make_preset(number, timestamp=timestamp, val_accuracy=val, test_accuracy=test, finished=True,
                                  training_time=minutes, early_stopping_epoch=best)
              for number, timestamp, val, test, minutes, best in (  # as its report gave them: one GPU, one seed
                  (1, 1601857360, 0.8666, 0.8592, 135.8, 68600),
                  (2, 1601826199, 0.8684, 0.8564, 295.2, 56300),
                  (3, 1601851629, 0.8596, 0.8510, 94.6, 50400),
                  (4, 1601870034, 0.8812, 0.8659, 222.3, 61600),
                  (5, 1601900363, 0.8760, 0.8635, 485.9, 61000))}
TEST_IMAGES = 10000            # of CIFAR-10, where a run's own predictions are not at hand
Z_95 = 1.959963984540054       # the normal distribution holds 95 % within +- so many standard deviations
SIGNIFICANCE = 0.05            # two runs differ where chance alone would do so more rarely
COMPARED = 5                   # best runs whose comparisons are printed; the workbook has all


def best_first(presets):
    """Finished runs by test accuracy, then the others by validation accuracy, both falling."""
    return sorted(presets, key=lambda preset: (not preset.finished, -(preset.test_accuracy or 0),
                                               -(preset.val_accuracy or 0), preset.timestamp))


def remark(preset):
    """What to know about a run before its numbers are compared; '' where it is trained to its end and tested."""
    own = PRESETS.get(preset.preset, {}).get('max_steps')
    remarks = {'training': ['in training, or killed'], 'interrupted': ['interrupted'], 'diverged': ['diverged'],
               'complete': ['shortened'] * (preset.steps is not None and preset.steps == preset.max_steps != own)}
    words = remarks.get(preset.status, []) + ['not tested'] * (not preset.finished)
    return ('' if preset.finished else 'unfinished: ') + ', '.join(words)


def interval(hits, n):
    """The 95 % interval (low, high) of an accuracy of `hits` among n images: Wilson 1927's score interval."""
    p, spread = hits / n, Z_95 ** 2 / n
    middle = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread ** 2 / 4) / (1 + spread)
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # rounding could leave p outside


def test_interval(preset, judged):
    """interval() of a run's test accuracy, by as many images as it was tested on; None where it was not tested."""
    if not preset.finished or preset.test_accuracy is None:
        return None
    n = len(judged[preset.timestamp][0]) if preset.timestamp in judged else TEST_IMAGES
    return interval(preset.test_accuracy * n, n)


def mcnemar(only_first, only_second):
    """McNemar's exact test (McNemar 1947): the chance that two equally good networks differ at least so much.

    Counts of the images that only the first and only the second got right. Returns the two-sided p, 0 to 1.
    """
    from scipy.stats import binom
    return min(1.0, 2 * float(binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)))


Comparison = collections.namedtuple('Comparison', 'first second only_first only_second p')


def compare(presets, judged):
    """Comparisons of all pairs of `presets` (numbered from 1) that were tested on the same images."""
    comparisons = []
    numbered = [(number, judged[preset.timestamp]) for number, preset in enumerate(presets, 1)
                if preset.timestamp in judged]
    for (first, (labels, one)), (second, (others, two)) in itertools.combinations(numbered, 2):
        if labels.tobytes() == others.tobytes():
            right, too = one == labels, two == labels
            counts = int((right & ~too).sum()), int((too & ~right).sum())
            comparisons.append(Comparison(first, second, *counts, p=mcnemar(*counts)))
    return comparisons


def verdict(comparison):
    """'1 and 2 cannot be told apart' or '1 and 2 differ beyond chance'."""
    return '{0.first} and {0.second} {1}'.format(
        comparison, 'differ beyond chance' if comparison.p < SIGNIFICANCE else 'cannot be told apart')


Seeds = collections.namedtuple('Seeds', 'preset seeds mean deviation low high')


def over_seeds(presets):
    """Seeds of each recipe that was run to its end with several: mean, sample standard deviation, range."""
    recipes = collections.OrderedDict()
    for preset in sorted(presets, key=lambda preset: preset.timestamp):  # of a seed's runs the first, not the luckiest
        if preset.finished and preset.status == 'complete':
            recipe = (preset.preset,) + tuple(getattr(preset, name) for name in RECIPE)
            recipes.setdefault(recipe, {}).setdefault(preset.seed, preset)
    for runs in recipes.values():
        if len(runs) > 1:
            accuracies = [preset.test_accuracy for preset in runs.values()]
            yield Seeds(next(iter(runs.values())), sorted(runs), statistics.mean(accuracies),
                        statistics.stdev(accuracies), min(accuracies), max(accuracies))


# ------------------------------------------------------------------------------ report: what lies in runs/

def save_predictions(preset, output_dir, labels, predictions):
    """Keeps what a test said, int64 [N] both, for the confusion matrix and for comparisons of runs."""
    lines = ['label,prediction'] + ['{},{}'.format(*pair) for pair in zip(labels, predictions)]
    write_atomically(os.path.join(preset.run_dir(output_dir), PREDICTIONS), '\n'.join(lines + ['']).encode())


def load_predictions(presets, output_dir):
    """{timestamp: (labels int64 [N], predictions int64 [N])} of the finished runs that have them.

    Those that do not fit the recorded test accuracy, or cannot be read, are named on stderr and left out.
    """
    import numpy as np
    judged = {}
    for preset in presets:
        path = os.path.join(preset.run_dir(output_dir), PREDICTIONS)
        if not preset.finished or not os.path.exists(path):
            continue
        try:
            with open(path, encoding='ascii') as file:
                lines = file.read(LARGEST_PREDICTIONS).splitlines()[1:]
            labels, predictions = np.array([line.split(',') for line in lines], np.int64).T
            if abs((labels == predictions).mean() - preset.test_accuracy) > 1e-6:
                raise ValueError('they are not those of the recorded test accuracy')
            if min(labels.min(), predictions.min()) < 0 or labels.max() > 9 or predictions.max() >= preset.num_classes:
                raise ValueError('they name classes that there are not')
            judged[preset.timestamp] = labels, predictions
        except (OSError, ValueError, OverflowError) as error:
            warn('{} is left out: {}'.format(path, error))
    return judged


def confusion_matrix(labels, predictions, num_classes):
    """int64 [num_classes, num_classes], a true class a row, of int64 [N] twice."""
    import numpy as np
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    return confusion


def keep_tensorboard_from_tensorflow():
    """TensorBoard would import TensorFlow, if it is installed, and let it talk, merely to open files."""
    sys.modules.setdefault('tensorboard.compat.notf', types.ModuleType('notf'))


def read_events(run_dir, name):
    """TensorBoard's reader of summaries/<name>, loaded, or None where there are none that can be read."""
    keep_tensorboard_from_tensorflow()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = os.path.join(run_dir, 'summaries', name)
    if not os.path.isdir(folder):
        return None
    events = EventAccumulator(folder, size_guidance={'scalars': 0, 'graph': 1})
    try:
        return events.Reload()
    except Exception as error:  # a damaged file can raise anything
        warn('{} is left out: {}'.format(folder, error))
        return None


def read_curve(preset, output_dir):
    """Validation accuracy over training steps: ([step], [accuracy, 0 to 1]), or None where there is none."""
    events = read_events(preset.run_dir(output_dir), 'dev')
    if events is None or 'accuracy' not in events.Tags()['scalars']:
        return None
    points = {point.step: point.value for point in events.Scalars('accuracy')}
    return sorted(points), [points[step] for step in sorted(points)]


# ------------------------------------------------------------------------------ report: table and workbook

def print_table(presets, judged):
    """All runs, numbered, aligned."""
    def percent(value):
        return '' if value is None else '{:.2%}'.format(value)

    rows = [('#', 'run', 'preset', 'model', 'decay', 'seed', 'steps', 'validation', 'test', '95 % interval', 'minutes',
             '')]
    for number, preset in enumerate(presets, 1):
        bounds = test_interval(preset, judged)
        steps = preset.steps or preset.early_stopping_epoch
        rows.append((
            str(number), str(preset.timestamp), str(preset.preset), preset.model,
            '{:g}'.format(preset.lr_decay) if preset.schedule == 'step' else preset.schedule,
            '' if preset.status is None else str(preset.seed), '' if steps is None else '{:,}'.format(steps),
            percent(preset.val_accuracy), percent(preset.test_accuracy),
            '{:.2%} to {:.2%}'.format(*bounds) if bounds else '',
            '' if preset.training_time is None else '{:.1f}'.format(preset.training_time), remark(preset)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(text.ljust(width) if k in (3, 11) else text.rjust(width)
                        for k, (text, width) in enumerate(zip(row, widths))).rstrip())


def print_uncertainty(presets, judged, comparisons):
    """Spread over seeds, and which runs cannot be told apart."""
    for seeds in over_seeds(presets):
        print('Preset {0.preset.preset}, {0.preset.model}, seeds {1}: test accuracy {0.mean:.2%} on average, standard '
              'deviation {0.deviation:.2%}, from {0.low:.2%} to {0.high:.2%}'.format(
                  seeds, ', '.join(map(str, seeds.seeds))))
    printed = [comparison for comparison in comparisons if comparison.second <= COMPARED]
    for comparison in printed:
        if comparison.p >= SIGNIFICANCE:
            print('{} (p = {:.2f}): {:,} test images only {} got right, {:,} only {}'.format(
                verdict(comparison), comparison.p, comparison.only_first, comparison.first, comparison.only_second,
                comparison.second))
    differing = sum(comparison.p < SIGNIFICANCE for comparison in printed)
    if printed:
        print('{} of {} pairs{} differ beyond chance (exact McNemar test, p < {} for each pair).'.format(
            differing, len(printed), ' among the best {}'.format(COMPARED) if len(presets) > COMPARED else '',
            SIGNIFICANCE))
    silent = [str(number) for number, preset in enumerate(presets, 1)
              if preset.finished and preset.timestamp not in judged]
    if silent:
        print('No saved predictions to compare: {}{}. A test saves them: python resnet_eval.py --timestamp ...'.format(
            ', '.join(silent[:COMPARED]), ' and {} more'.format(len(silent) - COMPARED) * (len(silent) > COMPARED)))


COLUMN_GROUPS = {  # the first column of each
    'preset': 'setCustomParameters', 'lr': 'setModelParameters', 'batch_size': 'setTrainingParameters',
    'allow_soft_placement': 'setMiscParameters', 'timestamp': 'results', 'schedule': 'setRecipeParameters'}


def write_workbook(presets, judged, comparisons, output_dir):
    """for_report/evaluation_report.xlsx: the runs, the 2020 study beside them, uncertainty, charts."""
    from openpyxl import Workbook
    workbook = Workbook()
    _fill_runs(workbook.active, presets, judged)
    _fill_study(workbook.create_sheet(), presets, judged)
    _fill_uncertainty(workbook.create_sheet(), presets, judged, comparisons)
    _fill_seeds(workbook.create_sheet(), presets)
    _fill_charts(workbook.create_sheet(), presets)
    content = io.BytesIO()
    workbook.save(content)
    write_report(output_dir, 'evaluation_report.xlsx', content.getvalue(), same=_same_workbook)


def _fill_runs(sheet, presets, judged):
    from openpyxl.styles import Font, PatternFill
    from openpyxl.worksheet.pagebreak import Break
    sheet.title = 'runs'
    header = ['#'] + list(COLUMNS) + ['test_95_low', 'test_95_high', 'remark']
    groups = [COLUMN_GROUPS.get(name) for name in header]
    rows = []
    for number, preset in enumerate(presets, 1):
        best = 'best' if number == 1 and preset.finished else ''
        rows.append([number] + [getattr(preset, name) for name in COLUMNS]
                    + list(test_interval(preset, judged) or (None, None))
                    + [', '.join(filter(None, (best, remark(preset))))])
    _fill(sheet, [groups, header] + rows, headers=2)
    starts = [k for k, group in enumerate(groups, 1) if group] + [len(header) + 1]
    for start, end in zip(starts, starts[1:]):
        sheet.merge_cells(start_row=1, end_row=1, start_column=start, end_column=end - 1)
    if presets[0].finished:
        for cell in sheet[3]:
            cell.font, cell.fill = Font(name='Calibri', size=11, bold=True), PatternFill('solid', fgColor='DDDDDD')
    sheet.freeze_panes, sheet.print_title_cols = 'C3', 'A:A'
    sheet.sheet_properties.pageSetUpPr.fitToPage, sheet.page_setup.scale = False, 60
    for name in ('lr', 'batch_size', 'timestamp'):  # printed, no group is torn apart
        sheet.col_breaks.append(Break(id=header.index(name)))
    sheet.auto_filter.ref = 'A2:{}'.format(sheet.cell(len(rows) + 2, len(header)).coordinate)


def _fill_study(sheet, presets, judged):
    """The 2020 results beside ours of the same recipe, max_steps apart: the best of them by validation accuracy."""
    sheet.title = '2020 study'
    names = ['val_accuracy', 'test_accuracy', 'test_95_low', 'test_95_high', 'training_time', 'early_stopping_epoch']
    rows = [[None, None, None, 'study of 2020: one Colab GPU, one seed each'] + [None] * 5 + ['this collection'],
            ['preset', 'model', 'lr_decay'] + names + ['timestamp'] + names + ['steps', 'device', 'remark']]
    for number, study in STUDY_2020.items():
        ours = max((preset for preset in presets if preset.preset == number and preset.finished and all(
            getattr(preset, name) == getattr(study, name) for name in RECIPE if name != 'max_steps')),
            key=lambda preset: preset.val_accuracy or 0, default=None)
        row = [number, study.model, study.lr_decay]
        for preset in filter(None, (study, ours)):
            if preset is ours:
                row.append(preset.timestamp)
            row += [preset.val_accuracy, preset.test_accuracy] + list(test_interval(preset, judged)) + [
                preset.training_time, preset.early_stopping_epoch]
        rows.append(row + ([ours.steps, ours.device, remark(ours)] if ours else ['not run']))
    _fill(sheet, rows, headers=2)
    sheet.merge_cells('D1:I1')
    sheet.merge_cells('J1:S1')
    sheet.freeze_panes = 'B3'


def _fill_uncertainty(sheet, presets, judged, comparisons):
    sheet.title = 'uncertainty'
    rows = [['first', 'second', 'first_run', 'second_run', 'first_test_accuracy', 'second_test_accuracy',
             'only_first_right', 'only_second_right', 'p', 'verdict']]
    for comparison in comparisons:
        pair = [presets[number - 1] for number in (comparison.first, comparison.second)]
        rows.append([comparison.first, comparison.second] + [preset.timestamp for preset in pair]
                    + [preset.test_accuracy for preset in pair]
                    + [comparison.only_first, comparison.only_second, comparison.p, verdict(comparison)])
    _fill(sheet, rows, headers=1)


def _fill_seeds(sheet, presets):
    sheet.title = 'seeds'
    rows = [['preset', 'model', 'seeds', 'number of seeds', 'mean_test_accuracy', 'standard_deviation_accuracy',
             'lowest_accuracy', 'highest_accuracy']]
    rows += [[seeds.preset.preset, seeds.preset.model, ', '.join(map(str, seeds.seeds)), len(seeds.seeds), seeds.mean,
              seeds.deviation, seeds.low, seeds.high] for seeds in over_seeds(presets)]
    _fill(sheet, rows, headers=1)


def _fill_charts(sheet, presets):
    """Test accuracy by depth and by decay, ours and 2020's, as Excel's own charts over the table beside them."""
    from openpyxl.chart import Reference, ScatterChart, Series
    sheet.title = 'charts'
    header = ['source', 'preset', 'model', 'depth', 'lr_decay', 'test_accuracy']
    sources = [('this collection', [preset for preset in presets if preset.finished]),
               ('2020 study', list(STUDY_2020.values()))]
    rows = [[source, preset.preset, preset.model, preset.depth, preset.lr_decay, preset.test_accuracy]
            for source, runs in sources for preset in runs]
    _fill(sheet, [header] + rows, headers=1)
    lowest = min(row[-1] for row in rows)
    for column, title, anchor in ((4, 'depth (layers)', 'H2'), (5, 'lr_decay (factor every 24,000 steps)', 'H22')):
        chart = ScatterChart()
        chart.style, chart.scatterStyle = 1, 'lineMarker'
        chart.title = 'Test accuracy by {}'.format(title.split(' (')[0])
        chart.x_axis.title, chart.y_axis.title = title, 'test accuracy'
        chart.x_axis.delete = chart.y_axis.delete = False  # or newer openpyxl leaves them out
        chart.x_axis.majorGridlines = None
        chart.x_axis.number_format, chart.y_axis.number_format = 'General', '0%'
        chart.y_axis.scaling.min = math.floor(lowest * 20 - 0.2) / 20
        chart.width, chart.height, chart.legend.position = 18, 9, 'b'
        first = 2
        for (source, runs), symbol in zip(sources, ('circle', 'diamond')):
            if runs:
                last = first + len(runs) - 1
                series = Series(Reference(sheet, min_col=6, min_row=first, max_row=last),
                                Reference(sheet, min_col=column, min_row=first, max_row=last), title=source)
                series.marker.symbol, series.marker.size = symbol, 10
                series.marker.graphicalProperties.solidFill = '222222' if symbol == 'circle' else '999999'
                series.marker.graphicalProperties.line.solidFill = '333333'
                series.graphicalProperties.line.noFill = True
                chart.series.append(series)
                first = last + 1
        sheet.add_chart(chart, anchor)


def _fill(sheet, rows, headers):
    """Writes rows; accuracies as percentages, text as text whatever it begins with, columns as wide as they need."""
    from openpyxl.styles import Alignment, Font
    from openpyxl.utils import get_column_letter
    from openpyxl.worksheet.properties import PageSetupProperties
    names = rows[headers - 1]
    widths = [4] * len(names)
    for i, row in enumerate(rows, 1):
        for k, value in enumerate(row, 1):
            cell = sheet.cell(i, k)
            if isinstance(value, str):
                cell.value, cell.data_type = value, 's'  # or '=1+1' is a formula
            elif isinstance(value, float):
                cell.value = float('{:.9g}'.format(value))  # further digits vary with the versions of Python and SciPy
            else:
                cell.value = value
            percent = 'accuracy' in names[k - 1] or '_95_' in names[k - 1]
            if i <= headers:
                cell.font = Font(name='Calibri', size=11, bold=True)
                cell.alignment = Alignment(horizontal='left' if i < headers else 'center')
            elif isinstance(value, str):
                cell.alignment = Alignment(horizontal='left', indent=1)
            elif isinstance(value, float):
                cell.number_format = '0.00%' if percent else {
                    'training_time': '0.0', 'images_per_second': '0', 'p': '0.0E+00'}.get(names[k - 1], 'General')
            if i >= headers:  # the row of groups is merged over several columns
                widths[k - 1] = max(widths[k - 1], 8 if isinstance(value, float) else len(str(value)))
    for k, width in enumerate(widths, 1):
        sheet.column_dimensions[get_column_letter(k)].width = min(width, 60) + 4
    sheet.freeze_panes = sheet.cell(headers + 1, 1)
    sheet.print_title_rows = '1:{}'.format(headers)
    sheet.page_setup.orientation, sheet.page_setup.fitToHeight = 'landscape', 0
    sheet.sheet_properties.pageSetUpPr = PageSetupProperties(fitToPage=True)


def _same_workbook(one, other):
    """Whether two workbooks' bytes differ in nothing but the time of saving."""
    def parts(content):
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            return {name: file.read(name) for name in file.namelist() if name != 'docProps/core.xml'}
    return parts(one) == parts(other)


# ------------------------------------------------------------------------------ report: pictures

GREYS = ('#111111', '#555555', '#888888', '#333333', '#6e6e6e')
STROKES = ('-', '--', '-.', ':')
MARKERS = 'osD^vPX*<>'
CURVES = 10   # best runs that have a line of their own in the legend; the others are thin
DPI = 110     # pixels per inch


def new_figure(width, height):
    """A matplotlib Figure of so many inches, drawn without a window."""
    logging.getLogger('matplotlib').setLevel(logging.ERROR)  # quiet while it builds its font cache
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), dpi=DPI)


def write_picture(figure, output_dir, name):
    """Draws a Figure into for_report/<name>, a PNG. Raises InputError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_report(output_dir, name, content.getvalue())


def write_report(output_dir, name, content, same=lambda one, other: one == other):
    """Writes bytes to for_report/<name> unless the `same` is there. Raises InputError where that is not possible."""
    path = os.path.join(output_dir, 'for_report', name)
    try:
        with open(path, 'rb') as file:
            unchanged = same(file.read(), content)
    except Exception:  # there is none, or it is damaged
        unchanged = False
    try:
        if not unchanged:
            write_atomically(path, content)
    except OSError as error:
        raise InputError('{} cannot be written ({}); close it where it is open, or see to the folder\'s '
                         'permissions'.format(path, error.strerror or error))
    print('{}  {}'.format('unchanged' if unchanged else 'written  ', path), flush=True)


def _stroke(k):
    """Style of line k, told apart without colour."""
    return dict(color=GREYS[k % len(GREYS)], linestyle=STROKES[k % len(STROKES)], marker=MARKERS[k % len(MARKERS)],
                markersize=4, linewidth=1.4)


def _curve_axes(axes):
    axes.set_xlabel('training steps')
    axes.set_ylabel('validation accuracy (%)')
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.xaxis.set_major_formatter(lambda step, _: '{:,.0f}'.format(step))


def runs_figure(presets, curves):
    """Validation accuracy over steps, a line per run; `curves` are read_curve's by timestamp."""
    figure = new_figure(9, 4.8)
    axes = figure.add_subplot(111)
    for number, preset in reversed(list(enumerate(presets, 1))):  # the best on top
        if preset.timestamp in curves:
            steps, accuracies = curves[preset.timestamp]
            if number <= CURVES:
                axes.plot(steps, [100 * a for a in accuracies], zorder=3, markevery=max(1, len(steps) // 12),
                          label='{}: {}{}'.format(number, preset.title, ' ({})'.format(remark(preset))
                                                  if remark(preset) else ''), **_stroke(number - 1))
            else:
                axes.plot(steps, [100 * a for a in accuracies], color='#bbbbbb', linewidth=0.7)
    _curve_axes(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc='best')
    axes.set_title('Validation accuracy (5,000 images); runs by test accuracy, untested ones last', fontsize=10)
    figure.tight_layout()
    return figure


def comparison_figure(attribute, label, presets, curves, judged):
    """Curves in the stroke of a hyperparameter's value, and test accuracy over it beside 2020's."""
    figure = new_figure(9, 4.2)
    left, right = figure.subplots(1, 2)
    values = sorted({getattr(preset, attribute) for preset in presets})
    labelled = set()
    for preset in presets:
        if preset.timestamp in curves:
            value = getattr(preset, attribute)
            steps, accuracies = curves[preset.timestamp]
            left.plot(steps, [100 * a for a in accuracies], markevery=max(1, len(steps) // 12),
                      label='{:g}'.format(value) if value not in labelled else None, **_stroke(values.index(value)))
            labelled.add(value)
    _curve_axes(left)
    if not labelled:
        left.text(0.5, 0.5, 'no run has curves', ha='center', transform=left.transAxes)
        left.set_xticks([])
        left.set_yticks([])
    else:
        handles, labels = left.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda k: float(labels[k]))
        left.legend([handles[k] for k in order], [labels[k] for k in order], title=label.split(' (')[0], fontsize=8,
                    title_fontsize=8, loc='best')

    finished = [preset for preset in presets if preset.finished]
    places = sorted({getattr(preset, attribute) for preset in finished + list(STUDY_2020.values())})
    crowd = collections.Counter(getattr(preset, attribute) for preset in finished + list(STUDY_2020.values()))
    taken = collections.Counter()  # runs beside one another at a value
    for runs, fill, source in (([preset for preset in finished if not remark(preset)], '#222222', 'this collection'),
                               ([preset for preset in finished if remark(preset)], '#aaaaaa', 'shortened'),
                               (list(STUDY_2020.values()), 'white', '2020 study')):
        for preset in runs:
            value = getattr(preset, attribute)
            low, high = test_interval(preset, judged)
            accuracy = 100 * preset.test_accuracy
            x = places.index(value) + min(0.12, 0.8 / crowd[value]) * (taken[value] - (crowd[value] - 1) / 2)
            right.errorbar(x, accuracy, [[accuracy - 100 * low], [100 * high - accuracy]], fmt='o', color='#222222',
                           mfc=fill, capsize=2, markersize=5, linewidth=1,
                           label=source if preset is runs[0] else None)
            if crowd[value] <= 6:
                right.annotate(str(preset.preset), (x, 100 * low), (0, -4), fontsize=6.5,
                               textcoords='offset points', ha='center', va='top', rotation=90)
            taken[value] += 1
    right.set_xticks(range(len(places)))
    right.set_xticklabels(['{:g}'.format(place) for place in places], rotation=90 * (len(places) > 8))
    right.margins(y=0.12)
    right.set_xlim(-0.6, len(places) - 0.4)
    right.set_xlabel(label)
    right.set_ylabel('test accuracy (%), with 95 % interval')
    right.grid(color='#dddddd', linewidth=0.6, axis='y')
    right.legend(fontsize=8, loc='lower center', bbox_to_anchor=(0.5, 1), ncol=3, frameon=False, columnspacing=1)
    figure.tight_layout()
    return figure


def confusion_figure(preset, labels, predictions):
    """True classes in rows, predicted ones in columns, counts of test images. Takes int64 [N] twice."""
    import numpy as np
    from data_helpers import CLASSES
    confusion = confusion_matrix(labels, predictions, preset.num_classes)[:len(CLASSES), :len(CLASSES)]
    beyond = len(labels) - int(confusion.sum())
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure = new_figure(7.4, 6.6)
    axes = figure.add_subplot(111)
    image = axes.imshow(share, cmap='Greys', vmin=0, vmax=1)
    for (i, k), count in np.ndenumerate(confusion):
        axes.text(k, i, '{:,}'.format(count), ha='center', va='center', fontsize=8,
                  color='white' if share[i, k] > 0.5 else 'black')
    axes.set_xticks(range(len(CLASSES)))
    axes.set_yticks(range(len(CLASSES)))
    axes.set_xticklabels(CLASSES, rotation=45, ha='right')
    axes.set_yticklabels(CLASSES)
    axes.set_xlabel('predicted class' + '; {:,} beyond the ten'.format(beyond) * (beyond > 0))
    axes.set_ylabel('true class')
    axes.set_title('{}: {:.2%} of {:,} test images right'.format(
        preset.title, preset.test_accuracy, len(labels)), fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.046, label='share of the true class')
    figure.tight_layout()
    return figure


Stage = collections.namedtuple('Stage', 'name units operations shape parameters')


def read_network(preset, output_dir):
    """The network as it was built, from the graph in the run's summaries: a list of Stages, or None without a graph.

    A Stage has its number of units, the operations of the first (as words), its output's shape
    [height, width, channels] or [classes], and the trainable parameters of all its units.
    """
    events = read_events(preset.run_dir(output_dir), 'train')
    if events is None or not events.Tags()['graph']:
        return None
    try:
        stages = _stages(events.Graph())
    except Exception:  # the graph of another program, or a damaged one, which can raise anything
        return None
    return stages if all(len(stage.operations) >= 6 for stage in stages if stage.units) else None


def _stages(graph):
    """read_network's Stages of a GraphDef. Raises KeyError or IndexError where it is not of a ResNet of ours."""
    import numpy as np
    nodes = {node.name: node for node in graph.node}

    def kernel_of(node):
        """The shape of the variable that a product takes, perhaps by way of identities and casts."""
        source = nodes[node.input[1]]
        for _ in range(PASSED_ON):
            if source.op in ('Identity', 'Cast'):
                source = nodes[source.input[0]]
        return [dim.size for dim in source.attr['shape'].shape.dim]

    scopes = collections.OrderedDict()
    for node in graph.node:
        # Operations are those of the training form, for the inference form is folded; shapes are those of the
        # inference form, for a training may begin at low resolution; variables belong to both.
        name = node.name[len('training/'):] if node.name.startswith('training/') else node.name
        training = name != node.name
        scope, _, inside = name.partition('/')
        if scope not in ('init', 'logit') and not scope.startswith('unit_'):
            continue
        operations, parameters, shapes = scopes.setdefault(scope, ([], [], []))
        leaf = inside.rpartition('/')[2]
        if node.op == 'VariableV2' and leaf in ('DW', 'beta', 'gamma', 'biases'):
            parameters.append(int(np.prod([dim.size for dim in node.attr['shape'].shape.dim])))
        elif not training:
            if node.op in ('Conv2D', 'AddV2', 'Add', 'BiasAdd') and node.attr['_output_shapes'].list.shape:
                shapes.append([dim.size for dim in node.attr['_output_shapes'].list.shape[0].dim][1:])
        elif node.op == 'Conv2D':
            operations.append('conv {}x{}\n{} to {}'.format(*kernel_of(node)) + (
                '\nstride 2' if node.attr['strides'].list.i[1] == 2 else ''))
        elif node.op.startswith('FusedBatchNorm'):
            operations.append('batch\nnorm')
        elif node.op in ('LeakyRelu', 'Relu'):
            operations.append('leaky\nReLU' if node.op == 'LeakyRelu' else 'ReLU')
        elif node.op == 'MatMul':
            operations += ['mean over\nh, w', 'dense\n{} to {}'.format(*kernel_of(node))]
        elif node.op == 'AvgPool':
            operations.append('pool')
    stages = []
    groups = [('stem', ['init'])] + [('group {}'.format(group), [
        name for name in scopes if name.startswith('unit_{}_'.format(group))]) for group in (1, 2, 3)]
    for title, members in groups + [('head', ['unit_last', 'logit'])]:
        found = [scopes[name] for name in members]
        operations = found[0][0] + (found[1][0] if title == 'head' else [])
        stages.append(Stage(title, len(found) if title.startswith('group') else 0, operations, found[-1][2][-1],
                            sum(sum(parameters) for _, parameters, _ in found)))
    return stages


def network_figure(preset, stages):
    """A row per stage: the operations of its first unit, its output's shape and its parameters."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    figure = new_figure(9.5, 6.4)
    axes = figure.add_axes([0, 0, 1, 1])
    axes.set_xlim(0, 95)
    axes.set_ylim(0, 64)
    axes.axis('off')

    def arrow(start, end, **style):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=8, color='#444444', linewidth=0.9,
                                       shrinkA=0, shrinkB=0, **style))

    total = sum(stage.parameters for stage in stages)
    axes.text(2, 61, '{0.model} as built: {1} layers with weights, {2:,} parameters'.format(
        preset, preset.depth, total), fontsize=12, weight='bold', va='center')
    for x, text, align in ((80, 'output shape', 'center'), (93, 'parameters', 'right')):
        axes.text(x, 56.5, text, fontsize=9, ha=align, va='center', color='#444444')
    axes.text(2, 56.5, 'input 32 x 32 x 3', fontsize=9, va='center', color='#444444')
    for row, stage in enumerate(stages):
        y = 49.5 - 11.4 * row
        axes.axhline(y + 5.5, color='#cccccc', linewidth=0.7)
        axes.text(2, y + (1.2 if stage.units else 0), stage.name, fontsize=11, weight='bold', va='center')
        if stage.units:
            axes.text(2, y - 1.7, '{} unit{}'.format(stage.units, 's' * (stage.units > 1)), fontsize=9, va='center')
        axes.text(80, y, ' x '.join(map(str, stage.shape)), fontsize=10, ha='center', va='center')
        axes.text(93, y, '{:,}'.format(stage.parameters), fontsize=10, ha='right', va='center')
        boxes = [text for text in stage.operations if text != 'pool']
        centres = [18.5 + 9.2 * k for k in range(len(boxes))]
        middle = y + (1.6 if stage.units else 0)
        for x, text in zip(centres, boxes):
            axes.add_patch(FancyBboxPatch((x - 3.7, middle - 2.6), 7.4, 5.2, boxstyle='round,pad=0.25', linewidth=0.9,
                                          facecolor='#d9d9d9' if 'conv' in text or 'dense' in text else '#f4f4f4',
                                          edgecolor='#444444'))
            axes.text(x, middle, text, fontsize=8, ha='center', va='center', linespacing=1.1)
        for x, after in zip(centres, centres[1:]):
            arrow((x + 3.95, middle), (after - 3.95, middle))
        if stage.units:
            end = centres[-1] + 6.2
            arrow((centres[-1] + 3.95, middle), (end - 0.9, middle))
            arrow((centres[0] - 6, middle), (centres[0] - 3.95, middle))
            axes.text(end, middle, '+', fontsize=13, ha='center', va='center')
            # Where the unit's activation comes before the split, the shortcut carries the activated tensor.
            start = (centres[1] + centres[2]) / 2 if row == 1 else centres[0] - 5.2
            axes.plot([start, start, end], [middle, y - 3.6, y - 3.6], color='#444444', linewidth=0.9)
            arrow((end, y - 3.6), (end, middle - 1.2))
            text = '2x2 average pooling, zero channels; in later units plain, without stride' \
                if 'pool' in stage.operations else 'in later units from before the activation'
            axes.text((start + end) / 2, y - 3.3, 'shortcut: ' + text, fontsize=7.5, ha='center', va='bottom',
                      color='#444444')
    return figure


def report(output_dir):
    """Prints all runs and writes for_report/. Raises InputError where there are none, or it cannot be written."""
    presets = load_presets(output_dir)
    if not presets:
        raise InputError(NO_RUNS.format(output_dir))
    for preset in presets:  # others' records may say finished without a result
        preset.finished = preset.finished and preset.test_accuracy is not None
    presets = best_first(presets)
    judged = load_predictions(presets, output_dir)
    comparisons = compare(presets, judged)
    print_table(presets, judged)
    print()
    print_uncertainty(presets, judged, comparisons)
    print(flush=True)

    write_workbook(presets, judged, comparisons, output_dir)
    curves = {preset.timestamp: read_curve(preset, output_dir) for preset in presets}
    curves = {timestamp: curve for timestamp, curve in curves.items() if curve}
    best = next((preset for preset in presets if preset.timestamp in judged), None)
    networks = ((preset, read_network(preset, output_dir)) for preset in presets)
    network = next((found for found in networks if found[1]), None)
    for name, figure, lack in (
            ('123result.png', curves and runs_figure(presets, curves), 'has validation accuracies in its summaries'),
            ('layer_increase.png', comparison_figure(
                'num_residual_units', 'residual units a group (beside the points: preset)', presets, curves, judged),
             None),
            ('lr_decay.png', comparison_figure(
                'lr_decay', 'decay every 24,000 steps (beside the points: preset)',
                [preset for preset in presets if preset.schedule == 'step' and not preset.lr_milestones], curves,
                judged), None),
            ('confusion_matrix.png', best and confusion_figure(best, *judged[best.timestamp]),
             'has saved test predictions'),
            ('model_graph.png', network and network_figure(*network), 'has the graph in its summaries')):
        if figure:
            write_picture(figure, output_dir, name)
        else:
            print('not drawn  {}: no run {}'.format(name, lack))


# ------------------------------------------------------------------------------ command line

class ArgumentParser(argparse.ArgumentParser):
    """One line on a mistake, exact flag names, and the folders that the scripts take."""

    def __init__(self, needs_data=True, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        if needs_data:
            self.add_argument('--data_dir', default=os.environ.get('CIFAR10_DIR') or os.path.join(PROJECT_DIR, 'data'),
                              help='where CIFAR-10 is, or is fetched to (default: $CIFAR10_DIR, or data/ of the '
                                   'project)')
        self.add_argument('--output_dir', default=PROJECT_DIR,
                          help='where INFOS/, runs/ and for_report/ are (default: beside the scripts)')

    def error(self, message):
        self.exit(2, '{}: error: {} (--help lists the flags)\n'.format(self.prog, message))


class ProgressLine:
    """Rewrites one line of a terminal twice a second; where output is no terminal, adds one every 30 seconds."""
    WIDTH = 110  # characters

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.shown = time.monotonic()

    def __call__(self, template, *values):
        if time.monotonic() - self.shown > (0.5 if self.terminal else 30):
            self.shown = time.monotonic()
            self.row(template.format(*values), end='\r' if self.terminal else '\n')

    def row(self, text, end='\n'):
        """Prints a line that stays, over what the progress left."""
        print(text.ljust(self.WIDTH) if self.terminal else text, end=end, flush=True)


def exit_on_input_error(main):
    """Decorates a script's main(): an InputError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    def wrapped(*args):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, 'reconfigure'):  # a notebook's has not
                stream.reconfigure(errors='replace')  # letters that the console lacks
        try:
            return main(*args)
        except InputError as error:
            print('{}: error: {}'.format(os.path.basename(sys.argv[0]), printable(str(error))), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print('\nBroken off.', file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader has seen enough, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
    return wrapped


@exit_on_input_error
def main(arguments=None):
    parser = ArgumentParser(needs_data=False, description=__doc__)
    report(parser.parse_args(arguments).output_dir)


if __name__ == '__main__':
    import presets_and_results  # by the name that the other modules know it by
    presets_and_results.main()
