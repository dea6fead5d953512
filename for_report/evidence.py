"""What the report rests on: the study of 2020, curves and predictions in runs/, the stages of the network."""
import collections
import glob
import os
import statistics

from data_helpers import InputError, event_records, warn, write_atomically
from presets_and_results import ORIGIN, RECIPE, is_shortened, make_preset, test_interval

LARGEST_EVENTS = 1 << 22     # bytes of a file of validation curves; 700 validations take about 90,000
LARGEST_EVENT = 1 << 16      # bytes of a point of a curve; it has about 40
FILTERS = (16, 16, 32, 64)   # of the first convolution, then of the three groups, as in resnet.py
KERNEL_AREA = 3 * 3

STUDY_2020 = {  # as its report gave them: one Colab GPU, one seed each
    number: make_preset(number, finished=True, timestamp=timestamp, val_accuracy=validation, test_accuracy=test,
                        training_time=minutes, early_stopping_epoch=step)
    for number, timestamp, validation, test, minutes, step in (
        (1, 1601857360, 0.8666, 0.8592, 135.8, 68600),
        (2, 1601826199, 0.8684, 0.8564, 295.2, 56300),
        (3, 1601851629, 0.8596, 0.8510, 94.6, 50400),
        (4, 1601870034, 0.8812, 0.8659, 222.3, 61600),
        (5, 1601900363, 0.8760, 0.8635, 485.9, 61000))}


# ------------------------------------------------------------------------------ the study of 2020, beside ours

STUDY, OURS = '2020 study', 'this collection'  # sources of a Point
Point = collections.namedtuple('Point', 'source preset accuracy low high seeds')


def study_series(field):
    """The study's presets that differ in nothing but `field`: lists of two or more numbers, by its rising value."""
    groups = collections.OrderedDict()
    for number, study in STUDY_2020.items():
        rest = tuple(getattr(study, name) for name in RECIPE if name != field)
        groups.setdefault(rest, []).append(number)
    return [sorted(numbers, key=lambda number: getattr(STUDY_2020[number], field))
            for numbers in groups.values() if len(numbers) > 1]


def study_points(numbers, presets, predictions):
    """Test accuracies of presets of the study: a Point each of 2020, then one each of our runs of full length.

    low and high are the 95 % interval of a run, or of several seeds the lowest and the highest.
    """
    points = []
    for number in numbers:
        study = STUDY_2020[number]
        points.append(Point(STUDY, study, study.test_accuracy, *test_interval(study, {}), seeds=1))
    for number in numbers:
        runs = full_runs(number, presets)
        if runs:
            accuracies = [run.test_accuracy for run in runs]
            low, high = min(accuracies), max(accuracies)
            if len(runs) == 1:
                low, high = test_interval(runs[0], predictions)
            mean = statistics.mean(accuracies)
            points.append(Point(OURS, STUDY_2020[number], mean, low, high, len(runs)))
    return points


def study_runs(number, presets):
    """Our runs of one of the study's presets that differ from it in nothing but their length."""
    names = [name for name in RECIPE + ORIGIN if name not in ('max_steps', 'num_epochs')]
    study = STUDY_2020[number]
    return [run for run in presets if run.preset == number
            and all(getattr(run, name) == getattr(study, name) for name in names)]


def full_runs(number, presets):
    """Those of study_runs that were trained to the preset's end and tested: of each seed the first."""
    runs = collections.OrderedDict()
    for run in sorted(study_runs(number, presets), key=lambda run: run.timestamp):
        whole = run.length() == STUDY_2020[number].length() and not is_shortened(run)
        if whole and run.finished:
            runs.setdefault(run.seed, run)
    return list(runs.values())


def study_gaps(numbers, presets):
    """Which of our runs study_points lacks: two sentences at most, '' where none."""
    sentences = []
    lacking = [STUDY_2020[number].name for number in sorted(numbers) if not full_runs(number, presets)]
    if lacking:
        sentences.append(f'Not trained and tested to the end here: {", ".join(lacking)}.')
    shortened = []
    for number in numbers:
        runs = [run for run in study_runs(number, presets) if is_shortened(run)]
        if runs:
            run = max(runs, key=lambda run: run.steps)
            tested = f', {run.test_accuracy:.1%} on test' if run.finished else ''
            shortened.append(f'{run.name} ({run.steps:,} of {STUDY_2020[number].length():,} steps{tested})')
    if shortened:
        sentences.append(f'Left out of the test accuracies because shortened: {", ".join(shortened)}.')
    return ' '.join(sentences)


# ------------------------------------------------------------------------------ what lies in runs/

def read_curves(presets, output_dir):
    """Validation accuracies over training steps: {timestamp: ([step], [accuracy, 0 to 1])} of the runs that have them.

    Damaged files are named on stderr and left out.
    """
    curves = {}
    for preset in presets:
        folder = os.path.join(preset.run_dir(output_dir), 'summaries', 'dev')
        points = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.tfevents.*'))):
            try:
                points.update(_read_accuracies(path))
            except Exception as error:  # a damaged file can raise anything
                warn(f'{path} is left out: {error}')
        if points:
            steps = sorted(points)
            curves[preset.timestamp] = steps, [points[step] for step in steps]
    return curves


def _read_accuracies(path):
    """{step: accuracy} of a file of validation curves. Raises ValueError where it is damaged."""
    from tensorboard.compat.proto.event_pb2 import Event  # takes a while, and only the report needs it
    if not os.path.isfile(path):
        raise ValueError('it is no file')
    with open(path, 'rb') as file:
        content = file.read(LARGEST_EVENTS + 1)
    if len(content) > LARGEST_EVENTS:
        raise ValueError('it is larger than any file of validation curves')
    points = {}
    for record in event_records(content):
        if len(record) <= LARGEST_EVENT:
            event = Event.FromString(record)
            points.update({event.step: value.simple_value for value in event.summary.value
                           if value.tag == 'accuracy' and event.step > 0 and 0 <= value.simple_value <= 1})
    return points


# ------------------------------------------------------------------------------ the network

Stage = collections.namedtuple('Stage', 'name units operations shortcut shape parameters')


def network_stages(preset):
    """The network from input to output, as resnet.py builds it: a list of Stages.

    A Stage has its number of units (0 for the stem and the head), the operations and the shortcut of its first
    unit in words, its output's shape, and the trainable parameters of all its units.
    """
    activation = ['batch\nnorm', 'leaky\nReLU' if preset.relu_leakiness else 'ReLU']
    n = preset.num_residual_units
    side, width = 32, FILTERS[0]
    stages = [Stage('stem', 0, [_convolution(3, width)], '', (side, side, width), KERNEL_AREA * 3 * width)]
    for group, filters in enumerate(FILTERS[1:], 1):
        stride = 1 if group == 1 else 2
        side //= stride
        operations = activation + [_convolution(width, filters)] + activation + [_convolution(filters, filters, stride)]
        shortcut = 'from after the activation' if stride == 1 else '2x2 average pooling, zero channels'
        if n > 1:
            shortcut += '; in later units ' + ('from before it' if stride == 1 else 'the identity, without stride')
        parameters = _unit_parameters(width, filters) + (n - 1) * _unit_parameters(filters, filters)
        stages.append(Stage(f'group {group}', n, operations, shortcut, (side, side, filters), parameters))
        width = filters
    classes = preset.num_classes
    operations = activation + ['mean over\nh, w', f'dense\n{width} to {classes}']
    stages.append(Stage('head', 0, operations, '', (classes,), 2 * width + width * classes + classes))
    return stages


def _convolution(inputs, filters, stride=1):
    return f'conv 3x3\n{inputs} to {filters}' + ('\nstride 2' if stride == 2 else '')


def _unit_parameters(inputs, filters):
    """Of two convolutions and of the batch normalization before each."""
    return 2 * inputs + KERNEL_AREA * inputs * filters + 2 * filters + KERNEL_AREA * filters * filters


# ------------------------------------------------------------------------------ what the report writes

def write_report(output_dir, name, content, same=None, quiet=False):
    """Writes bytes to for_report/<name>, unless what is there is the same, and says which.

    `same` takes the path and the bytes; by default the bytes are compared. Raises InputError where the file cannot be
    written.
    """
    path = os.path.join(output_dir, 'for_report', name)
    try:
        unchanged = os.path.isfile(path) and (same or _same_bytes)(path, content)
    except Exception:  # it is damaged or cannot be read
        unchanged = False
    try:
        if not unchanged:
            write_atomically(path, content)
    except OSError as error:
        raise InputError(f'{path} cannot be written ({error.strerror or error}); close it where it is open, or see to '
                         "the folder's permissions")
    if not quiet:
        print('unchanged ' if unchanged else 'written   ', path, flush=True)


def _same_bytes(path, content):
    with open(path, 'rb') as file:
        return file.read(len(content) + 1) == content
