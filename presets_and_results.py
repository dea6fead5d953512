"""What to train and what came out: presets, the record of a run, the table of all runs.

A preset is data: `FIELDS` holds the defaults, `PRESETS` numbered deltas. A run is a preset with a timestamp and
its results. It is kept in three places under the output folder:

    INFOS/pickles/<preset>_<timestamp>.pickle   its record, a pickled `Preset`
    INFOS/train_overall.txt, eval_overall.txt   a line per training, a line per test
    runs/<timestamp>/                           checkpoints, summaries, test predictions

    python presets_and_results.py               prints the table of all runs, and what chance says of it

Imports neither TensorFlow nor matplotlib nor openpyxl: a wrong flag is refused, and the table printed, at once.
"""
import collections
import contextlib
import copy
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import tempfile
import time

import numpy as np

from data_helpers import (PROJECT_DIR, UNFINISHED, ArgumentParser, Busy, InputError, exit_on_input_error, file_lock,
                          printable, read_pickle, steps_per_epoch, warn, write_atomically)
from for_report.uncertainty import HINT, SIGNIFICANCE, compare, compare_recipes, spread, verdict, wilson

TRAINING_IMAGES = 45000
TEST_IMAGES = 10000                   # where a run's own predictions are not at hand
RECORD_CLASSES = ('presets_and_results.Preset', '__main__.Preset')  # the latter from a notebook
NUMPY_SCALARS = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar', 'numpy.dtype')
LARGEST_RECORD = 1 << 20              # bytes; a real one has about one thousand
LONGEST_TEXT = 1000                   # characters of an attribute
LARGEST_PREDICTIONS = 1 << 20         # characters; 10,000 images take 40,000
NEWEST, BEST = 'newest', 'best'       # in place of a timestamp
AUTO = 'auto'                         # in place of true or false
LOCK = '.lock'                        # of a run's folder, and of INFOS/
LOG_PATIENCE = 60                     # seconds to wait for INFOS/, which others hold for milliseconds
RUN_PATIENCE = 1                      # seconds to wait for a run, which a table may be looking at
ABANDONED = 3600                      # seconds after which what a killed process left is removed
MODEL, RESUME = 'model', 'resume'     # kinds of checkpoint: fit to judge by; to resume from, its statistics lag
PREDICTIONS = 'test_predictions.csv'  # in runs/<timestamp>/
CONSOLE_LOG = 'console.log'           # in runs/<timestamp>/
COMPARED = 5                          # best runs whose networks are compared in the table; the workbook has all
LARGEST_DECAY = 0.1                   # share of a kernel that Muon's weight decay may take in a step


# ------------------------------------------------------------------------------ fields

class Number(collections.namedtuple('Number', 'default type low high meaning')):
    """A field of Preset: an int or a float in an inclusive range."""

    @property
    def expected(self):
        kind = 'whole number' if self.type is int else 'number'
        return f'a {kind} from {self.low} to {self.high}'

    def check(self, name, value):
        """Returns `value` (text from a flag, or a number) in the field's type, or raises InputError."""
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = self.type(value)
            whole = number == value or not isinstance(value, float)
            if whole and self.low <= number <= self.high:
                return number
        raise InputError(f'{name} must be {self.expected}, not {value!r}')


class Switch(collections.namedtuple('Switch', 'default meaning')):
    """A field of Preset: true or false."""
    expected = 'true or false'
    type = bool

    def check(self, name, value):
        """Returns `value` (text from a flag, or a bool) as a bool, or raises InputError."""
        known = {'true': True, '1': True, 'false': False, '0': False}
        if str(value).lower() not in known:
            raise InputError(f'{name} must be {self.expected}, not {value!r}')
        return known[str(value).lower()]


class SwitchOrAuto(Switch):
    """A field of Preset: true, false or, until the training decides, auto."""
    expected = 'true, false or auto'

    def check(self, name, value):
        return AUTO if value == AUTO else super().check(name, value)


class Text(collections.namedtuple('Text', 'default pattern expected meaning')):
    """A field of Preset: a text that a regular expression matches; `expected` says the same in words."""
    type = str

    def check(self, name, value):
        """Returns `value`, or raises InputError."""
        if not isinstance(value, str) or not re.match(f'({self.pattern})\\Z', value):
            raise InputError(f'{name} must be {self.expected}, not {value!r}')
        return value


def free_text(default, meaning):
    return Text(default, r'[\s\S]*', 'text', meaning)


# Every attribute of a Preset, in the order of the logs' columns. What has None for a default may be None.
FIELDS = {
    'preset': Number(None, int, 0, 10**9, 'number in PRESETS'),
    'model': free_text('ResNet8', 'ResNet-(6n + 2), n being num_residual_units'),
    'optimizer': free_text('SGD (Momentum)', 'see momentum, nesterov and muon_lr'),
    'activation_function': free_text('ReLU', 'leaky, see relu_leakiness'),
    'weight_initialization': free_text('He_normal', 'of the convolutions'),
    'normalization': free_text('Batch Norm', 'before every activation'),
    'lr': Number(0.1, float, 1e-9, 100, 'learning rate at its highest'),
    'lr_decay': Number(1.0, float, 1e-3, 1, 'factor on the learning rate, by the step schedule, every 24,000 steps'),
    'l2_reg_lambda': Number(0.001, float, 0, 1, 'weight of the L2 loss over the kernels'),
    'relu_leakiness': Number(0.1, float, 0, 1, 'slope of the activation for negative inputs'),
    'num_residual_units': Number(1, int, 1, 200, 'n units a group: the network has 6n + 2 layers'),
    'num_classes': Number(10, int, 10, 1000, 'width of the last layer; CIFAR-10 fills the first 10'),
    'batch_size': Number(128, int, 1, TRAINING_IMAGES, 'images per training step'),
    'num_epochs': Number(200, int, 1, 100000, 'passes over the 45,000 training images'),
    'evaluate_every': Number(100, int, 1, 10**9, 'steps between validations'),
    'checkpoint_every': Number(100, int, 1, 10**9, 'steps between checkpoints of the latest weights'),
    'num_checkpoints': Number(3, int, 1, 1000, 'best checkpoints kept, beside the latest'),
    'data_augmentation': Switch(True, 'random flip and crop of the training images'),
    'allow_soft_placement': Switch(True, 'operations without a GPU kernel run on the CPU'),
    'log_device_placement': Switch(False, 'list where each operation runs'),
    'timestamp': Number(None, int, 0, 10**12, 'start of the run in seconds since 1970, and its name'),
    'training_time': Number(None, float, 0, 10**9, 'minutes at work, from loading TensorFlow to the last save'),
    'early_stopping_epoch': Number(None, int, 0, 10**12, 'step (not epoch) of the best validation accuracy'),
    'val_accuracy': Number(None, float, 0, 1, 'best validation accuracy, 0 to 1'),
    'test_accuracy': Number(None, float, 0, 1, 'test accuracy, 0 to 1'),
    'finished': Switch(False, 'the test accuracy is in'),
    # Newer than the 2020 study's records:
    'seed': Number(0, int, 0, 2**32 - 1, 'seed of the split, the weights, the order and the augmentation'),
    'max_steps': Number(None, int, 0, 10**9, 'stop after so many steps; 0: the epochs alone end the training'),
    'steps': Number(None, int, 0, 10**12, 'steps trained so far'),
    'status': Text(None, 'training|interrupted|complete|diverged', 'a status of the training', 'of the training'),
    'images_per_second': Number(None, float, 0, 10**9, 'of the training steps alone'),
    'device': free_text(None, 'what it was trained on'),
    'tensorflow_version': free_text(None, 'of the training'),
    'python_version': free_text(None, 'of the training'),
    'schedule': Text('step', 'step|one-cycle|cosine', 'step, one-cycle (or linear) or cosine',
                     'of the learning rate after the warm-up: in steps, or to 0 linearly (one-cycle) or as a cosine'),
    'lr_milestones': Text(None, r'[0-9]{1,9}(,[0-9]{1,9}){0,9}', 'steps such as 32000,48000',
                          'steps at which lr_decay multiplies, in place of every 24,000'),
    'warmup_epochs': Number(0.0, float, 0, 100000, 'epochs over which the learning rate rises linearly to lr'),
    'momentum': Number(0.9, float, 0, 0.9999, 'momentum of SGD and of Muon'),
    'nesterov': Switch(False, 'Nesterov momentum'),
    'label_smoothing': Number(0.0, float, 0, 0.9, 'share of each label that is spread over all classes'),
    'mixup': Number(0.0, float, 0, 100, 'alpha of the Beta distribution of mixup; 0: none'),
    'random_erasing': Number(0.0, float, 0, 1, 'probability that a rectangle of a training image is erased'),
    'low_resolution_epochs': Number(0.0, float, 0, 100000, 'epochs, from the first, that train on crops of 24x24'),
    'mixed_precision': SwitchOrAuto(False, 'train in 16 bits; auto: where the hardware gains by it'),
    'xla': Switch(False, 'let XLA compile the graph, on a GPU'),
    'checkpoint_minutes': Number(2.0, float, 0, 10**6, 'minutes between crash-recovery saves'),
    'muon_lr': Number(0.0, float, 0, 100, "Muon's learning rate, at its highest, for the kernels of the convolutions; "
                                          '0: SGD trains them'),
    'git_commit': free_text(None, 'of the code that trained; "with changes" where files differed from it'),
    'init_from': Number(None, int, 0, 10**12, 'timestamp of the run whose weights it started from'),
    'rate_history': free_text(None, 'learning rates before the run diverged and was resumed with lower ones'),
    'towers': Number(1, int, 1, 1000, 'devices that share each batch, each normalizing by its own part of it'),
    'test_accuracy_mirrored': Number(None, float, 0, 1, 'test accuracy by the mean of the class probabilities of each '
                                                        'image and its mirror image, 0 to 1'),
}
COLUMNS = tuple(FIELDS)
HYPERPARAMETERS = tuple(  # have a flag of their name
    'lr lr_decay l2_reg_lambda relu_leakiness num_residual_units num_classes batch_size num_epochs evaluate_every '
    'checkpoint_every num_checkpoints data_augmentation allow_soft_placement log_device_placement seed max_steps '
    'schedule lr_milestones warmup_epochs momentum nesterov muon_lr label_smoothing mixup random_erasing '
    'low_resolution_epochs mixed_precision xla checkpoint_minutes towers'.split())
HOW_COMPUTED = ('seed', 'checkpoint_every', 'num_checkpoints', 'checkpoint_minutes', 'allow_soft_placement',
                'log_device_placement', 'mixed_precision', 'xla')
RECIPE = tuple(name for name in HYPERPARAMETERS if name not in HOW_COMPUTED)  # what a result depends on, chance apart
ORIGIN = ('init_from', 'rate_history')  # a result depends on these too; they are no hyperparameters
LINEAR = ('schedule', 'linear')  # the other name of one-cycle, apt where there is no warm-up


# ------------------------------------------------------------------------------ presets

MODERN = dict(num_residual_units=3, lr=0.4, muon_lr=0.02, schedule='one-cycle', nesterov=True, l2_reg_lambda=0.0005,
              relu_leakiness=0.0, evaluate_every=704, checkpoint_every=704, mixed_precision=AUTO)
LONG = dict(MODERN, num_epochs=200, warmup_epochs=5, low_resolution_epochs=140, label_smoothing=0.1,
            random_erasing=0.25)
PAPER = dict(lr_decay=0.1, lr_milestones='32000,48000', num_epochs=182, max_steps=64000, l2_reg_lambda=0.0001,
             relu_leakiness=0.0, evaluate_every=1000, checkpoint_every=1000)
PRESETS = {
    0: dict(num_residual_units=1, l2_reg_lambda=0.0003, batch_size=64, num_epochs=6, evaluate_every=352,
            checkpoint_every=352, data_augmentation=False),  # a first look: too short for augmentation to pay
    1: dict(num_residual_units=5, lr_decay=1.0),
    2: dict(num_residual_units=5, lr_decay=0.96),
    3: dict(num_residual_units=3, lr_decay=0.96),
    4: dict(num_residual_units=9, lr_decay=0.96),
    5: dict(num_residual_units=9, lr_decay=0.90),
    6: dict(MODERN, batch_size=256, lr=0.8, muon_lr=0.03, num_epochs=8, low_resolution_epochs=7),
    7: dict(MODERN, num_epochs=50, warmup_epochs=5, low_resolution_epochs=35, label_smoothing=0.1),
    8: dict(PAPER, num_residual_units=3),
    9: dict(PAPER, num_residual_units=5),
    10: dict(PAPER, num_residual_units=9),
    11: dict(PAPER, num_residual_units=18, warmup_epochs=1),
    12: LONG,
    13: dict(LONG, num_residual_units=9, mixup=0.2),
}
NAMES = {  # of presets, and what they are for
    0: ('first', 'a first look: minutes on a CPU'),
    1: ('study1', 'the 2020 study: constant learning rate'),
    2: ('study2', 'the 2020 study: learning rate decays'),
    3: ('study3', 'the 2020 study: fewer layers'),
    4: ('study4', 'the 2020 study: more layers; its best'),
    5: ('study5', 'the 2020 study: more layers, faster decay'),
    6: ('fast', "above the 2020 study's best, in minutes"),
    7: ('standard', "above the ResNet paper's ResNet-20, in little more than a quarter of its steps"),
    8: ('paper20', 'the recipe of He et al. 2015: 64,000 steps'),
    9: ('paper32', 'the same, deeper'),
    10: ('paper56', 'the same, deeper'),
    11: ('paper110', 'the same, deeper, after a warm-up'),
    12: ('best20', 'standard for 200 epochs, with random erasing'),
    13: ('best56', 'the same, deeper, with mixup'),
}


def make_preset(number, **overrides):
    """Preset `number` of PRESETS, or by its name, with `overrides`.

    A num_epochs among them sets the length: a max_steps of the preset's own no longer ends the training.
    Raises InputError where there is no such preset, naming what there is, or where the recipe makes no sense.
    """
    for known, delta in PRESETS.items():
        if str(number) in (str(known), NAMES[known][0]):
            values = dict(delta, **overrides)
            if 'num_epochs' in overrides and 'max_steps' not in overrides:
                values.pop('max_steps', None)
            preset = Preset(preset=known, **values)
            _check_recipe(preset, overrides)
            return preset
    known = ', '.join(f'{known} ({name})' for known, (name, _) in NAMES.items())
    raise InputError(f'there is no preset {number}; choose one of {known}')


def _check_recipe(preset, overrides):
    """Raises InputError where parts of a recipe contradict each other, or an override would have no effect."""
    for name in ('warmup_epochs', 'low_resolution_epochs'):
        if getattr(preset, name) >= preset.num_epochs:
            raise InputError(f'{name} {getattr(preset, name):g} must be less than num_epochs {preset.num_epochs}; give '
                             f'--{name} too, smaller')
    for name in ('lr_decay', 'lr_milestones'):
        changed = name in overrides and getattr(preset, name) != FIELDS[name].default
        if changed and preset.schedule != 'step':
            raise InputError(f'{name} has no part in the schedule {preset.schedule}; leave it out, or give '
                             '--schedule step too')
    if preset.lr_milestones and preset.lr_decay == 1:
        raise InputError('lr_milestones have no effect where lr_decay is 1; give --lr_decay too, smaller')
    decay = preset.lr * preset.l2_reg_lambda / (1 - preset.momentum)
    if preset.muon_lr and decay > LARGEST_DECAY:
        raise InputError(f"Muon's weight decay, lr * l2_reg_lambda / (1 - momentum), is {decay:.3g} a step and would "
                         f'destroy the kernels; lower --momentum, --lr or --l2_reg_lambda until it is at most '
                         f'{LARGEST_DECAY}')


def checked(name, value):
    """The value of an attribute (text from a flag, or of its type) in its type. Raises InputError where it has none."""
    return FIELDS[name].check(name, 'one-cycle' if (name, value) == LINEAR else value)


# ------------------------------------------------------------------------------ the record of a run

class Preset:
    """One training run: its hyperparameters, then what came out of it.

    Its attributes are those of FIELDS, all of them plain values (int, float, bool, str or None). Their defaults
    stand at the class, for a record that was written before an attribute existed lacks it.
    """

    def __init__(self, **values):
        """Defaults, then `values`. Raises InputError on an unknown name or a bad value."""
        self.__dict__.update({name: field.default for name, field in FIELDS.items()})
        self.update(values)

    def update(self, values):
        """Sets several attributes; `model` and `optimizer` follow. Raises InputError as __init__ does."""
        for name, value in values.items():
            if name not in FIELDS:
                raise InputError(f'unknown preset attribute {name!r}')
            if value is not None or FIELDS[name].default is not None:
                value = checked(name, value)
            setattr(self, name, value)
        if 'num_residual_units' in values:
            self.model = f'ResNet{self.depth}'
        if 'muon_lr' in values:
            self.optimizer = 'Muon, SGD (Momentum)' if self.muon_lr else FIELDS['optimizer'].default

    @property
    def depth(self):
        """Layers with weights: 6n + 2 (He et al. 2015, section 4.2)."""
        return 6 * self.num_residual_units + 2

    @property
    def name(self):
        """The preset's name, or its number where PRESETS does not know it."""
        return NAMES[self.preset][0] if self.preset in NAMES else str(self.preset)

    @property
    def title(self):
        """The run's readable name, in TensorBoard and in the report's pictures."""
        return f'preset {self.preset}, {self.model}, {self.timestamp}'

    def length(self, n_training=TRAINING_IMAGES):
        """Training steps from start to end, of n_training images."""
        steps = self.num_epochs * steps_per_epoch(n_training, self.batch_size)
        return min(steps, self.max_steps or steps)

    def run_dir(self, output_dir):
        """Folder of checkpoints, summaries and test predictions."""
        return os.path.join(output_dir, 'runs', str(self.timestamp))

    def checkpoint_path(self, output_dir, step, kind=MODEL):
        """Prefix of a checkpoint's files."""
        return os.path.join(self.run_dir(output_dir), 'checkpoints', f'{kind}-{step}')

    def pickle_path(self, output_dir):
        """Where the run is on record."""
        return os.path.join(output_dir, 'INFOS', 'pickles', f'{self.preset}_{self.timestamp}.pickle')

    def save(self, output_dir):
        """Pickles the object, whole or not at all: a reader never sees half a file."""
        write_atomically(self.pickle_path(output_dir), pickle.dumps(self, protocol=4))  # 4: Python 3.7 reads it

    def log(self, output_dir, name, replace=False):
        """Adds a tab-separated line to INFOS/<name>, in place of the run's earlier ones if `replace`.

        The header names all columns, also those that the file lacked before. The file is whole at any
        moment, and of several processes that log at once none loses a line.
        """
        infos = os.path.join(output_dir, 'INFOS')
        path = os.path.join(infos, name)
        os.makedirs(infos, exist_ok=True)
        with file_lock(os.path.join(infos, LOCK), timeout=LOG_PATIENCE):
            lines = _log_lines(path)
            if replace:
                lines = [line for line in lines if _cell(line, 'timestamp') != str(self.timestamp)]
            lines.append('\t'.join(_as_text(getattr(self, column)) for column in COLUMNS))
            content = '\n'.join(['\t'.join(COLUMNS)] + lines) + '\n'
            write_atomically(path, content.encode('utf-8', 'surrogateescape'))


for _name, _field in FIELDS.items():
    setattr(Preset, _name, _field.default)


def _log_lines(path):
    """The lines of a log without its header; none where there is no log. What others wrote stays as it is."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', errors='surrogateescape') as file:
        lines = [line for line in file.read().split('\n') if line]
    headed = lines and lines[0].split('\t')[0] == COLUMNS[0]
    return lines[1:] if headed else lines


def _cell(line, column):
    """The text of a log's line under a column; '' where the line is too short."""
    cells = dict(zip(COLUMNS, line.split('\t')))
    return cells.get(column, '')


def _as_text(value):
    if value is None:
        return ''
    if isinstance(value, float):
        return f'{value:.6g}'
    return ' '.join(str(value).split())


def read_preset(path):
    """The Preset in a pickle. Raises InputError where it holds anything but plain or NumPy scalar values."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError('it is no file')  # a pipe's other end may never come
        with open(path, 'rb') as file:
            content = file.read(LARGEST_RECORD + 1)
        if len(content) > LARGEST_RECORD:
            raise InputError('it is larger than any record of a run')
        record = read_pickle(content, RECORD_CLASSES + NUMPY_SCALARS)
        if type(record).__name__ not in RECORD_CLASSES or not isinstance(record.state, dict):
            raise InputError('it holds no Preset')
        values = {name: _plain(name, value) for name, value in record.state.items()}
        preset = Preset()
        preset.update(values)
        if preset.timestamp is None:
            raise InputError('it has no timestamp')
        preset.finished = preset.finished and preset.test_accuracy is not None  # another program's may say so without
        if re.match(r'[\w.+-]{1,40}\Z', values.get('model') or ''):  # it goes into titles and names of folders
            preset.model = values['model']
        return preset
    except (InputError, OSError) as error:
        raise InputError(f'{path} is refused: {printable(str(error))}')


def _plain(name, value):
    """A pickled value as int, float, bool, str or None. Raises InputError on anything else."""
    if type(value).__name__ in NUMPY_SCALARS:
        try:
            dtype, data = value.args
            kind = dtype.args[0]
            order = dtype.state[1].replace('|', '=')
            if kind[0] not in 'biuf':
                raise ValueError(kind)
            return np.frombuffer(data, order + kind, count=1)[0].item()
        except Exception:  # what a hostile pickle put in their places can raise anything
            raise InputError(f'{name} is no number')
    if type(value) is int and abs(value) >> 63:
        raise InputError(f'{name} is too large a number')
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:  # shown in consoles, workbooks and pictures
        return printable(value[:LONGEST_TEXT])
    raise InputError(f'{name} is of type {type(value).__name__}, neither text nor a number')


# ------------------------------------------------------------------------------ all runs on record

def load_presets(output_dir, refused=warn):
    """All runs on record, oldest first. A refused file is named on stderr, by `refused`, and the others load.

    A record is the file whose name is the record's own. A training whose process has ended counts as interrupted.
    """
    folder = os.path.join(output_dir, 'INFOS', 'pickles')
    presets = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if not name.endswith('.pickle') or name.startswith('.'):  # '._x.pickle' is a Mac's
            continue
        try:
            preset = read_preset(path)
            if name != os.path.basename(preset.pickle_path(output_dir)):
                raise InputError(f'{path} is left out: the record of run {preset.timestamp} has another name')
        except InputError as error:
            refused(error)
            continue
        if preset.status == 'training' and not _in_use(preset, output_dir):
            preset.status = 'interrupted'
        presets.append(preset)
    return sorted(presets, key=lambda preset: preset.timestamp)


def load_preset(output_dir, timestamp=NEWEST):
    """One run, by its timestamp, a unique beginning of it, its folder, 'newest' or 'best' (by test accuracy).

    Raises InputError that lists what there is.
    """
    presets = load_presets(output_dir)
    if not presets:
        raise InputError(no_runs(output_dir))
    if timestamp == NEWEST:
        return presets[-1]
    if timestamp == BEST:
        best = best_first(presets)[0]
        if not best.finished:
            test = command('resnet_eval.py', output_dir=output_dir)
            raise InputError(f'no run is tested, so none is the best; test them with: {test}')
        return best
    wanted = os.path.basename(os.path.normpath(str(timestamp)))
    known = {str(preset.timestamp): preset for preset in presets}
    matching = [name for name in known if name.startswith(wanted)]
    if wanted in known:
        return known[wanted]
    if len(matching) == 1:
        return known[matching[0]]
    if matching:
        raise InputError(f'several runs begin with {wanted}: {", ".join(matching)}')
    raise InputError(f'there is no run {timestamp}; known: {", ".join(known)}')


def no_runs(output_dir):
    """A sentence for an output folder without runs."""
    train = command('resnet_train.py', '--preset', 0, output_dir=output_dir)
    return f'there are no runs in {output_dir}; make one with: {train}'


def command(script, *words, output_dir=PROJECT_DIR, data_dir=None):
    """A line for the shell that runs one of the scripts from here, with the folders that were given."""
    path = os.path.join(PROJECT_DIR, script)
    if os.path.abspath(os.curdir) == PROJECT_DIR:
        path = script
    words = ['python', path] + [str(word) for word in words]
    if os.path.abspath(output_dir) != PROJECT_DIR:
        words += ['--output_dir', output_dir]
    if data_dir is not None and os.path.abspath(data_dir) != os.path.join(PROJECT_DIR, 'data'):
        words += ['--data_dir', data_dir]
    return subprocess.list2cmdline(words) if os.name == 'nt' else ' '.join(map(shlex.quote, words))


# ------------------------------------------------------------------------------ folders and locks

def check_output_dir(output_dir, advice='name another with --output_dir'):
    """Makes the folders of the results. Raises InputError where they cannot be written, before hours are spent."""
    check_folder_name(output_dir)
    try:
        for folder in ('runs', 'INFOS', os.path.join('INFOS', 'pickles')):
            os.makedirs(os.path.join(output_dir, folder), exist_ok=True)
            tempfile.TemporaryFile(dir=os.path.join(output_dir, folder)).close()
    except OSError as error:
        raise InputError(f'cannot write to the output folder ({error}); {advice}')
    _tidy(output_dir)


def check_folder_name(folder):
    """Raises InputError where TensorFlow could not restore a checkpoint below a folder, because of its name."""
    path = os.path.abspath(folder)
    globbed = [letter for letter in '*?[]' + '\\' * (os.sep != '\\') if letter in path]
    if globbed:
        raise InputError(f'TensorFlow cannot restore checkpoints from a folder with {globbed[0]} in its name, as in '
                         f'{path}; rename it, or name another with --output_dir')
    try:
        path.encode()
    except UnicodeEncodeError:  # of letters beyond ASCII in the locale C, or of bytes that are not UTF-8
        raise InputError(f'TensorFlow cannot use the folder {path} in this locale; set PYTHONUTF8=1 in the '
                         'environment, or rename it')


def _tidy(output_dir):
    """Removes what killed processes left an hour ago or more: half-written records, and run folders without a run."""
    pickles, runs = os.path.join(output_dir, 'INFOS', 'pickles'), os.path.join(output_dir, 'runs')
    records = [os.path.join(pickles, name) for name in os.listdir(pickles) if f'.pickle{UNFINISHED}' in name]
    recorded = {name.rpartition('_')[2] for name in os.listdir(pickles)}
    folders = [os.path.join(runs, name) for name in os.listdir(runs)
               if name.isdigit() and f'{name}.pickle' not in recorded]
    for path in records + folders:
        with contextlib.suppress(OSError):
            if time.time() - os.lstat(path).st_mtime < ABANDONED:
                continue
            if path in records:
                os.unlink(path)
            elif set(os.listdir(path)) <= {LOCK, CONSOLE_LOG}:
                shutil.rmtree(path)  # which refuses a link


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
            raise InputError(f'a run cannot be started ({error})')


@contextlib.contextmanager
def locked(preset, output_dir):
    """Keeps a run to this process, among all that share the folder. Raises InputError where another has it."""
    run_dir = preset.run_dir(output_dir)
    for folder in (run_dir, os.path.join(run_dir, 'checkpoints'), os.path.join(run_dir, 'summaries')):
        if os.path.islink(folder):  # what is written, and removed, would be somebody else's
            raise InputError(f'{folder} is a symbolic link; a run is resumed or tested in a folder of its own')
    if not os.path.isdir(run_dir):
        raise InputError(f'run {preset.timestamp} has no folder {run_dir}')
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(os.path.join(run_dir, LOCK), timeout=RUN_PATIENCE))
        except Busy:
            raise InputError(f'run {preset.timestamp} is in use by another process, in training or in test')
        yield


def _in_use(preset, output_dir):
    """Whether another process holds the run."""
    try:
        with file_lock(os.path.join(preset.run_dir(output_dir), LOCK)):
            return False
    except Busy:
        return True
    except InputError:  # the folder is gone or read-only: nobody can be training there
        return False


def checkpoint_steps(run_dir):
    """Steps whose checkpoints are whole, ascending. TensorFlow moves the index into place last."""
    folder = os.path.join(run_dir, 'checkpoints')
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = (re.match(MODEL + r'-(\d+)\.index\Z', name) for name in names)
    return sorted(int(match.group(1)) for match in matches if match)


def require_checkpoint(preset, output_dir):
    """The checkpoint_steps of a run. Raises InputError, with the way out, where there are none."""
    steps = checkpoint_steps(preset.run_dir(output_dir))
    if not steps:
        folder = os.path.join(preset.run_dir(output_dir), 'checkpoints')
        way_out = 'it is in training: test it later'
        if preset.status != 'training':
            way_out = 'bring it back, or train another run'
            if preset.status == 'interrupted' and os.path.isdir(preset.run_dir(output_dir)):
                resume = command('resnet_train.py', '--resume', preset.timestamp, output_dir=output_dir)
                way_out = f'train it with: {resume}'
        raise InputError(f'run {preset.timestamp} has no checkpoint to test in {folder}; {way_out}')
    return steps


def best_checkpoint(preset, output_dir):
    """The path of a run's best checkpoint, or of its latest where the best is gone. Raises InputError without any."""
    steps, best = require_checkpoint(preset, output_dir), preset.early_stopping_epoch
    if best in steps:
        return preset.checkpoint_path(output_dir, best)
    if best is not None:  # a kill can come between the first checkpoint and its record
        warn(f'the best checkpoint of run {preset.timestamp}, step {best}, is not there; taking the latest, step '
             f'{steps[-1]}')
    return preset.checkpoint_path(output_dir, steps[-1])


def as_tested(preset, checkpoint, output_dir):
    """The Preset, or one that is not tested where `checkpoint` is not its best: the test accuracy is another's."""
    if checkpoint == preset.checkpoint_path(output_dir, preset.early_stopping_epoch):
        return preset
    preset = copy.copy(preset)
    preset.finished = False
    return preset


# ------------------------------------------------------------------------------ test predictions

def save_predictions(preset, output_dir, labels, predictions):
    """Keeps what a test said, int64 [N] both, for the confusion matrix and for comparisons of runs."""
    lines = ['label,prediction'] + [f'{label},{prediction}' for label, prediction in zip(labels, predictions)]
    content = '\n'.join(lines) + '\n'
    write_atomically(os.path.join(preset.run_dir(output_dir), PREDICTIONS), content.encode())


def load_predictions(presets, output_dir):
    """{timestamp: (labels int64 [N], predictions int64 [N])} of the tested runs that have them.

    Those that do not fit the recorded test accuracy, or cannot be read, are named on stderr and left out.
    """
    predictions = {}
    for preset in presets:
        path = os.path.join(preset.run_dir(output_dir), PREDICTIONS)
        if preset.finished and os.path.isfile(path):
            try:
                predictions[preset.timestamp] = _read_predictions(path, preset)
            except (OSError, ValueError, OverflowError) as error:
                warn(f'{path} is left out: {error}')
    return predictions


def _read_predictions(path, preset):
    with open(path, encoding='ascii') as file:
        lines = file.read(LARGEST_PREDICTIONS).splitlines()[1:]
    labels, predictions = np.array([line.split(',') for line in lines], np.int64).T
    if abs((labels == predictions).mean() - preset.test_accuracy) > 1e-6:
        raise ValueError('they are not those of the recorded test accuracy')
    if min(labels.min(), predictions.min()) < 0 or labels.max() > 9 or predictions.max() >= preset.num_classes:
        raise ValueError('they name unknown classes')
    return labels, predictions


def confusion_matrix(labels, predictions, num_classes):
    """int64 [num_classes, num_classes], a true class a row, of int64 [N] twice."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    return confusion


# ------------------------------------------------------------------------------ what came out

def best_first(presets):
    """Tested runs by test accuracy, then the others by validation accuracy, both falling."""
    return sorted(presets, key=lambda preset: (not preset.finished, -(preset.test_accuracy or 0),
                                               -(preset.val_accuracy or 0), preset.timestamp))


def unfinished(preset):
    """'in training', 'interrupted' or 'diverged'; '' where the training came to its end."""
    words = {'training': 'in training', 'interrupted': 'interrupted', 'diverged': 'diverged'}
    return words.get(preset.status, '')


def state(preset):
    """'in training', 'interrupted', 'diverged' (tested or not), 'trained' (to its end, not tested) or 'tested'."""
    return unfinished(preset) or ('tested' if preset.finished else 'trained')


def is_shortened(preset):
    """Whether a run that is trained or tested, and not merely on its way, saw fewer epochs than its preset asks for."""
    if preset.steps is None or preset.preset not in PRESETS or unfinished(preset) and not preset.finished:
        return False
    own = make_preset(preset.preset)
    epoch = steps_per_epoch(TRAINING_IMAGES, preset.batch_size)
    return preset.steps / epoch < own.length() / steps_per_epoch(TRAINING_IMAGES, own.batch_size)


def remark(preset):
    """What to know about a run before its figures are compared; '' where it was trained to its end and tested."""
    stage = [state(preset)] if state(preset) != 'tested' else []
    return ', '.join(stage + ['shortened'] * is_shortened(preset))


def differences(preset):
    """What a run's recipe changes of its preset, as 'muon_lr 0, label_smoothing 0'; '' where nothing."""
    if preset.preset not in PRESETS:
        return ''
    own = make_preset(preset.preset)
    names = [name for name in RECIPE + ORIGIN if getattr(preset, name) != getattr(own, name)]
    if preset.length() == own.length() and 'max_steps' in names:
        names.remove('max_steps')
    values = [getattr(preset, name) for name in names]
    shown = [f'{value:g}' if isinstance(value, float) else str(value).lower() for value in values]
    return ', '.join(f'{name} {value}' for name, value in zip(names, shown))


def recipe(preset):
    """A tuple. Runs with equal ones differ by chance alone."""
    names = [name for name in RECIPE + ORIGIN if name != 'max_steps']
    return (preset.preset, preset.length()) + tuple(getattr(preset, name) for name in names)


def test_interval(preset, predictions):
    """The 95 % interval of a run's test accuracy, by as many images as it was tested on; None where it was not."""
    if not preset.finished:
        return None
    n = len(predictions[preset.timestamp][0]) if preset.timestamp in predictions else TEST_IMAGES
    return wilson(preset.test_accuracy * n, n)


def compare_networks(presets, predictions):
    """uncertainty.compare of the `presets` (numbered from 1) that have test predictions: a list of Comparisons."""
    return compare([(number, recipe(preset)) + predictions[preset.timestamp]
                    for number, preset in enumerate(presets, 1) if preset.timestamp in predictions])


def over_seeds(presets):
    """uncertainty.spread of the runs that were trained to their end and tested: a list of Seeds, a recipe each."""
    return spread([(recipe(preset), preset.seed, preset.test_accuracy, preset)
                   for preset in sorted(presets, key=lambda preset: preset.timestamp)
                   if preset.finished and preset.status == 'complete'])


# ------------------------------------------------------------------------------ the table of runs

def table(presets, predictions):
    """The rows of the table as {column: text}, in the order of `presets`."""
    rows = []
    for number, preset in enumerate(presets, 1):
        bounds = test_interval(preset, predictions)
        steps = preset.steps or preset.early_stopping_epoch
        rows.append({
            '#': str(number), 'run': str(preset.timestamp), 'preset': f'{preset.preset} {preset.name}',
            'model': preset.model, 'seed': '' if preset.status is None else str(preset.seed),
            'steps': '' if steps is None else f'{steps:,}', 'validation': _percent(preset.val_accuracy),
            'test': _percent(preset.test_accuracy),
            '95 % interval': f'{bounds[0]:.2%} to {bounds[1]:.2%}' if bounds else '',
            'with mirror image': _percent(preset.test_accuracy_mirrored),
            'minutes': '' if preset.training_time is None else f'{preset.training_time:.1f}',
            'state': _full_state(preset), 'differs from the preset': differences(preset)})
    return rows


def _percent(value):
    return '' if value is None else f'{value:.2%}'


def _full_state(preset):
    return ', '.join(filter(None, ['tested' if preset.finished else '', remark(preset)]))


LEFT_ALIGNED = ('preset', 'model', 'state', 'differs from the preset')
LESS_IMPORTANT = (  # left out first, if narrow
    'model', 'minutes', 'steps', 'with mirror image', 'seed', '95 % interval', 'validation')
LAST_COLUMN = 12  # characters, at least; the rest of it is cut off where the terminal ends


def print_table(presets, predictions):
    """Prints the table, without its less important columns where the terminal is too narrow for them."""
    rows = table(presets, predictions)
    columns = list(rows[0])
    widths = {column: max(len(column), max(len(row[column]) for row in rows)) for column in columns}
    room = shutil.get_terminal_size(fallback=(1000, 24)).columns
    for column in LESS_IMPORTANT:
        if sum(widths[column] + 2 for column in columns[:-1]) + LAST_COLUMN > room:
            columns.remove(column)
    for row in [{column: column for column in columns}] + rows:
        cells = [row[column].ljust(widths[column]) if column in LEFT_ALIGNED else row[column].rjust(widths[column])
                 for column in columns]
        print('  '.join(cells).rstrip()[:room])


def print_json(presets, predictions):
    """Prints a JSON object a run: its record, its state, and the 95 % interval of its test accuracy."""
    for preset in presets:
        values = {name: getattr(preset, name) for name in COLUMNS}
        print(json.dumps(dict(values, state=_full_state(preset), differences=differences(preset),
                              test_interval=test_interval(preset, predictions))))


def print_chance(presets, predictions):
    """Prints the spread over seeds, which recipes differ by their seeds, and which networks cannot be told apart."""
    groups = over_seeds(presets)
    for seeds in groups:
        print(f'{describe(seeds.run)}: test accuracy {seeds.mean:.2%} on average over {len(seeds.seeds)} seeds, '
              f'standard deviation {100 * seeds.deviation:.2f} points, from {seeds.low:.2%} to {seeds.high:.2%}')
    for first, second, difference, low, high in compare_recipes(groups):
        hint = f' (fewer than {HINT} seeds: a hint)' if min(len(first.seeds), len(second.seeds)) < HINT else ''
        print(f'{describe(first.run)} against {describe(second.run)}: {100 * difference:+.2f} points by their seeds, '
              f'95 % interval {100 * low:+.2f} to {100 * high:+.2f}{hint}')
    comparisons = compare_networks(presets[:COMPARED], predictions)
    for comparison in comparisons:
        if comparison.adjusted_p >= SIGNIFICANCE:
            print(f'{verdict(comparison).capitalize()} (p = {comparison.adjusted_p:.2f}): only {comparison.first} is '
                  f'right on {comparison.only_first:,} test images, only {comparison.second} on '
                  f'{comparison.only_second:,}')
    if comparisons:
        differing = sum(comparison.adjusted_p < SIGNIFICANCE for comparison in comparisons)
        print(f"Among runs 1 to {min(COMPARED, len(presets))}, {differing} of {len(comparisons)} pairs of networks of "
              f"different recipes differ beyond chance (McNemar's exact test, Holm's correction, p < {SIGNIFICANCE}).")
    unsaved = [str(number) for number, preset in enumerate(presets, 1)
               if preset.finished and preset.timestamp not in predictions]
    if unsaved:
        more = f' and {len(unsaved) - COMPARED} more' if len(unsaved) > COMPARED else ''
        print(f'Without saved test predictions: {", ".join(unsaved[:COMPARED])}{more}. A test saves them.')


def describe(preset):
    """A recipe in a few words: 'preset 6 (fast)' and what differs from it."""
    changes = differences(preset)
    return f'preset {preset.preset} ({preset.name}{", " if changes else ""}{changes})'


@exit_on_input_error
def main(arguments=None):
    parser = ArgumentParser(needs_data=False, description=__doc__)
    parser.add_argument('--json', action='store_true', help='print one JSON object a line, and nothing else')
    flags = parser.parse_args(arguments)
    output_dir = flags.output_dir
    presets = best_first(load_presets(output_dir))
    if not presets:
        raise InputError(no_runs(output_dir))
    predictions = load_predictions(presets, output_dir)
    if flags.json:
        print_json(presets, predictions)
        return
    print_table(presets, predictions)
    print()
    print_chance(presets, predictions)
    print(f'The report, a workbook and pictures: {command("for_report", output_dir=output_dir)}')


if __name__ == '__main__':
    import presets_and_results  # by the name that the other modules know it by
    presets_and_results.main()
