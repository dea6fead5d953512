"""What to train and what came out: presets, the record of a run, pickles and text logs.

A preset is data: the class attributes of `Preset` are the defaults, `PRESETS` holds numbered
deltas. A run is a preset with a timestamp and its results, kept in three places under the output folder:

    INFOS/pickles/<preset>_<timestamp>.pickle   the `Preset` object
    INFOS/train_overall.txt, eval_overall.txt   one line per training, one per evaluation
    runs/<timestamp>/                           checkpoints and summaries

Nothing here imports TensorFlow, so a wrong flag is refused before the slow import.
"""
import argparse
import collections
import io
import os
import pickle
import sys
import tempfile
import time

PROJECT_DIR = os.path.dirname(os.path.abspath(__file__))
PRESET_PICKLE = 'presets_and_results.Preset'
NUMPY_SCALARS = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar', 'numpy.dtype')
LARGEST_PRESET_PICKLE = 1 << 20  # bytes; a real one has about one thousand


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
    optimizer = 'SGD (Momentum)'          # momentum 0.9
    activation_function = 'ReLU'          # leaky, see relu_leakiness
    weight_initialization = 'He_normal'
    normalization = 'Batch Norm'
    lr = 0.1                              # learning rate of the first step
    lr_decay = 1.0                        # factor on the learning rate every 24,000 steps
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

    def __init__(self, **values):
        """Defaults, then `values`. Raises InputError on an unknown name or a bad value."""
        self.__dict__.update({name: getattr(Preset, name) for name in COLUMNS})
        self.update(values)

    def update(self, values):
        """Sets several attributes; `model` follows the depth. Raises InputError as __init__ does."""
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

    @property
    def depth(self):
        """Layers with weights: 6n + 2 (He et al. 2015, section 4.2)."""
        return 6 * self.num_residual_units + 2

    def run_dir(self, output_dir):
        """Folder of checkpoints and summaries."""
        return os.path.join(output_dir, 'runs', str(self.timestamp))

    def pickle_path(self, output_dir):
        """Where the run is on record."""
        return os.path.join(output_dir, 'INFOS', 'pickles', '{}_{}.pickle'.format(self.preset, self.timestamp))

    def save(self, output_dir):
        """Pickles the object, whole or not at all: a reader never sees half a file."""
        write_atomically(self.pickle_path(output_dir), pickle.dumps(self, protocol=4))  # 4: Python 3.7 reads it

    def log(self, output_dir, name):
        """Appends one tab-separated line to INFOS/<name>; a new file begins with the header."""
        path = os.path.join(output_dir, 'INFOS', name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        line = '\t'.join(_as_text(getattr(self, column)) for column in COLUMNS) + '\n'
        with open(path, 'a', encoding='utf-8') as file:
            if file.tell() == 0:
                line = '\t'.join(COLUMNS) + '\n' + line
            file.write(line)


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


HYPERPARAMETERS = {  # each has a flag of its name
    'lr': Field(float, 1e-9, 100, 'learning rate of the first step'),
    'lr_decay': Field(float, 1e-3, 1, 'factor on the learning rate every 24,000 steps'),
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
}
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

PRESETS = {
    0: dict(num_residual_units=1, l2_reg_lambda=0.0003, batch_size=64, num_epochs=6, evaluate_every=352,
            checkpoint_every=352, data_augmentation=False),  # a first look: too short for augmentation to pay
    1: dict(num_residual_units=5, lr_decay=1.0),
    2: dict(num_residual_units=5, lr_decay=0.96),
    3: dict(num_residual_units=3, lr_decay=0.96),
    4: dict(num_residual_units=9, lr_decay=0.96),
    5: dict(num_residual_units=9, lr_decay=0.90),
}


def make_preset(number, **overrides):
    """Preset `number` of PRESETS with `overrides`. Raises InputError, naming what there is."""
    if number not in PRESETS:
        raise InputError('there is no preset {}; choose one of {}'.format(
            number, ', '.join(map(str, PRESETS))))
    return Preset(preset=number, **dict(PRESETS[number], **overrides))


def start_run(preset, output_dir):
    """Gives the run its timestamp and its folder, and returns the folder; check_output_dir comes before.

    Creating the folder reserves the timestamp, so two runs of the same second get two of them.
    """
    preset.timestamp = int(time.time())
    while True:
        try:
            os.mkdir(preset.run_dir(output_dir))
            return preset.run_dir(output_dir)
        except FileExistsError:
            preset.timestamp += 1


def check_output_dir(output_dir):
    """Makes the folders of the results. Raises InputError where they cannot be written, before hours are spent."""
    try:
        for folder in ('runs', 'INFOS', os.path.join('INFOS', 'pickles')):
            os.makedirs(os.path.join(output_dir, folder), exist_ok=True)
            tempfile.TemporaryFile(dir=os.path.join(output_dir, folder)).close()
    except OSError as error:
        raise InputError('cannot write to the output folder ({}); name another with --output_dir'.format(error))


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
    lets a few bytes claim gigabytes for its memo.
    """
    class Reader(pickle._Unpickler):
        def find_class(self, module, name):
            if module + '.' + name not in admitted:
                raise InputError('it names {}.{}, and a file of results has no use for that'.format(module, name))
            return type(module + '.' + name, (Inert,), {})

    try:
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
        preset.model = values.get('model') or preset.model
        return preset
    except (InputError, OSError) as error:
        raise InputError('{} is refused: {}'.format(path, error))


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
    if value is None or type(value) in (bool, int, float, str):
        return value
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
                print('warning: {}'.format(error), file=sys.stderr)
    return sorted(presets, key=lambda preset: preset.timestamp)


def load_preset(output_dir, timestamp=None):
    """The run with this timestamp, or the newest. Raises InputError that lists what there is."""
    presets = load_presets(output_dir)
    if not presets:
        raise InputError('there are no runs in {}; make one with: python resnet_train.py --preset 0'.format(output_dir))
    if timestamp is None:
        return presets[-1]
    for preset in presets:
        if str(preset.timestamp) == str(timestamp):
            return preset
    raise InputError('there is no run {}; known: {}'.format(
        timestamp, ', '.join(str(preset.timestamp) for preset in presets)))


def _as_text(value):
    if value is None:
        return ''
    if isinstance(value, float):
        return '{:.6g}'.format(value)
    return ' '.join(str(value).split())


# ------------------------------------------------------------------------------ command line

class ArgumentParser(argparse.ArgumentParser):
    """One line on a mistake, exact flag names, and the folders that every script takes."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.add_argument('--data_dir', default=os.environ.get('CIFAR10_DIR') or os.path.join(PROJECT_DIR, 'data'),
                          help='where CIFAR-10 is, or is fetched to (default: $CIFAR10_DIR, or data/ of the project)')
        self.add_argument('--output_dir', default=PROJECT_DIR,
                          help='where INFOS/ and runs/ go (default: beside the scripts)')

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
        try:
            return main(*args)
        except InputError as error:
            print('{}: error: {}'.format(os.path.basename(sys.argv[0]), error), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print('\nBroken off.', file=sys.stderr)
            sys.exit(130)
    return wrapped
