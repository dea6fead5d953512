"""Treats the collection badly for as long as you like, and says what broke.

    python tests/torture.py                     a round of everything: some minutes
    python tests/torture.py kills --n 100       SIGKILL at random moments of one training, resumed each time
    python tests/torture.py writers --n 1000    ten processes that record runs side by side
    python tests/torture.py disk                a training on a file system that fills up (as root, on Linux)
    python tests/torture.py inputs --n 10000    mutated pickles, archives, checkpoints, images, event files

Everything happens in a temporary folder, on the sample of CIFAR-10. The exit status is 1 where anything
broke; --seed repeats a round's draws.
"""
import argparse
import glob
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

TESTS_DIR = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TESTS_DIR, os.path.dirname(TESTS_DIR)]

import sample
from data_helpers import InputError
from presets_and_results import (COLUMNS, best_checkpoint, check_output_dir, checkpoint_steps, load_preset,
                                 load_presets, make_preset, read_preset, start_run)

TRAINING = ('--preset', 0, '--batch_size', 10, '--num_epochs', 100000, '--evaluate_every', 20, '--checkpoint_every', 15,
            '--num_checkpoints', 2, '--checkpoint_minutes', 0.02, '--data_augmentation', 'true', '--muon_lr', 0.02)
STARTING = 8    # seconds, about, until a training is at work
WRITERS = 10  # processes


class Broken(Exception):
    """Something did not survive."""


def check(condition, what):
    if not condition:
        raise Broken(what)


# ------------------------------------------------------------------------------ kills

def kills(n, draw, folder):
    """One training killed n times and resumed, against one that was left alone: all that they left must be the same."""
    steps = 25 * n + 400  # what comes after the last kill included
    flags = TRAINING + ('--max_steps', steps)
    left_alone = os.path.join(folder, 'left_alone')
    status, _, err = sample.run_script('resnet_train.py', *flags, '--output_dir', left_alone, timeout=None)
    check(status == 0 and not err, err)
    seconds = 60 * load_preset(left_alone).training_time

    output_dir, done = os.path.join(folder, 'killed'), 0
    while done < n:
        known = load_presets(output_dir)
        if known and known[0].status == 'complete':
            break
        resume = ('--resume',) if known else flags
        process = sample.run_script('resnet_train.py', *resume, '--output_dir', output_dir, popen=True)
        if known and draw.random() < 0.8 or done == n - 1:  # otherwise mostly while it starts; the last at work
            for line in iter(process.stdout.readline, ''):
                if line.startswith('validation'):
                    break
            left = steps - (known[0].steps if known else 0)
            time.sleep(draw.uniform(0, seconds * left / steps / (n - done + 1)))
        else:
            time.sleep(draw.uniform(0, STARTING))
        process.kill()
        err = process.communicate()[1]
        killed = process.returncode == -signal.SIGKILL  # while TensorFlow starts, its words then come to light
        check(killed or process.returncode == 0 and not err, 'it failed by itself: ' + err)
        done += process.returncode != 0
        say('kill {} of {}, at step {:,} of {:,} or later', done, n, known[0].steps if known else 0, steps)
    if load_preset(output_dir).status != 'complete':
        status, _, err = sample.run_script('resnet_train.py', '--resume', '--output_dir', output_dir, timeout=None)
        check(status == 0 and not err, err)
    compare(left_alone, output_dir)
    return '{} kills over {:,} steps: the end is the same to the last bit'.format(done, steps)


def compare(one, other):
    """Weights, momentum, statistics, curves, record and logs of the only runs in two folders. Raises Broken."""
    import numpy as np
    runs = [load_presets(output_dir) for output_dir in (one, other)]
    check([len(found) for found in runs] == [1, 1], 'there are {} runs'.format([len(found) for found in runs]))
    (first,), (second,) = runs
    passing = ('timestamp', 'training_time', 'images_per_second')  # what the clock decides
    for name in COLUMNS:
        check(name in passing or getattr(first, name) == getattr(second, name), 'the records differ in ' + name)
    found = []
    for preset, output_dir in ((first, one), (second, other)):
        run_dir = preset.run_dir(output_dir)
        found.append((checkpoints(run_dir), curves(run_dir)))
        with open(os.path.join(output_dir, 'INFOS', 'train_overall.txt')) as file:
            check(len(file.readlines()) == 2, 'a log has lost or doubled a line')
        left = [name for name in os.listdir(os.path.join(run_dir, 'checkpoints'))
                if name != 'checkpoint' and not name.startswith('model-') or 'temp' in name]
        check(not left, 'there are leftovers: {}'.format(left))
    (tensors, points), (others, other_points) = found
    check(tensors.keys() == others.keys(), 'the checkpoints are of steps {} and {}'.format(list(tensors), list(others)))
    for step, values in tensors.items():
        for name, value in values.items():
            check(np.array_equal(value, others[step][name]), 'step {}: {} differs'.format(step, name))
    check(points == other_points, 'the curves differ')


def checkpoints(run_dir):
    """{step: {variable: array}} of all checkpoints."""
    from resnet import tf
    found = {}
    for step in checkpoint_steps(run_dir):
        reader = tf.train.NewCheckpointReader(os.path.join(run_dir, 'checkpoints', f'model-{step}'))
        found[step] = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    return found


def curves(run_dir):
    """[(folder, step, tag, value)] of all points but those of the clock, doubles included."""
    from resnet import tf
    found = []
    for name in ('train', 'dev'):
        for path in glob.glob(os.path.join(run_dir, 'summaries', name, '*')):
            found += [(name, event.step, value.tag, value.simple_value)
                      for event in tf.train.summary_iterator(path) for value in event.summary.value
                      if value.tag != 'images_per_second']
    return sorted(found)


# ------------------------------------------------------------------------------ writers

def _write(arguments):
    output_dir, n = arguments
    for _ in range(n):
        preset = make_preset(0)
        start_run(preset, output_dir)
        preset.save(output_dir)
        preset.log(output_dir, 'train_overall.txt', replace=True)
        preset.update(dict(test_accuracy=0.5, finished=True))
        preset.save(output_dir)
        preset.log(output_dir, 'eval_overall.txt')


def writers(n, draw, folder):
    """Ten processes that record n runs in all: none may be lost, doubled or torn."""
    check_output_dir(folder)
    with multiprocessing.Pool(WRITERS) as pool:
        pool.map(_write, [(folder, n // WRITERS)] * WRITERS)
    n = n // WRITERS * WRITERS
    runs = load_presets(folder)
    check(len(runs) == n and all(run.finished for run in runs), '{} of {} pickles are whole'.format(len(runs), n))
    for name in ('train_overall.txt', 'eval_overall.txt'):
        with open(os.path.join(folder, 'INFOS', name)) as file:
            header, *lines = file.read().splitlines()
        rows = [line.split('\t') for line in lines]
        check(all(len(row) == len(COLUMNS) for row in rows), '{} has a torn line'.format(name))
        stamps = {int(row[COLUMNS.index('timestamp')]) for row in rows}
        check(len(rows) == n and stamps == {run.timestamp for run in runs}, '{} has {} of {} lines'.format(
            name, len(rows), n))
    return '{} writers, {:,} runs: every pickle and every line is there, whole'.format(WRITERS, n)


# ------------------------------------------------------------------------------ disk

def disk(n, draw, folder):
    """A training whose file system fills up n times: it says so, nothing is torn, and it goes on when there is room."""
    full = os.path.join(folder, 'full')
    os.mkdir(full)
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', full], stderr=subprocess.PIPE)
    if mounted.returncode:
        raise Broken('a small file system needs root: {}'.format(mounted.stderr.decode().strip()))
    try:
        flags = TRAINING + ('--max_steps', 300)
        left_alone = os.path.join(folder, 'left_alone')
        status, _, err = sample.run_script('resnet_train.py', *flags, '--output_dir', left_alone)
        check(status == 0, err)
        output_dir = os.path.join(full, 'out')
        for turn in range(n + 1):
            filler = os.path.join(full, 'filler')
            resume = ('--resume',) if load_presets(output_dir) else flags
            process = sample.run_script('resnet_train.py', *resume, '--output_dir', output_dir, popen=True)
            for line in iter(process.stdout.readline, ''):
                if 'writes' in line or turn == n:
                    break
            time.sleep(draw.uniform(0, 0.5) if turn < n else 0)
            if turn < n:
                with open(filler, 'wb', buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:  # full
                        pass
            out, err = process.communicate()
            if turn < n:
                said = process.returncode == 2 and err.count('\n') == 1 and 'No space' in err
                check(said or process.returncode == 0, err)
                for run in load_presets(output_dir):
                    check(run.steps is not None, 'a record is torn')
                os.unlink(filler)
                if process.returncode == 0:
                    break
        check(process.returncode == 0, err)
        compare(left_alone, output_dir)
    finally:
        subprocess.run(['umount', full])
    return 'a full disk, {} times: said, and gone on from to the same end'.format(n)


# ------------------------------------------------------------------------------ inputs

class Trap:
    """Leaves a file behind where an unpickler runs it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def mutated(content, draw):
    """Bytes flipped, cut, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, kind = draw.randrange(len(content) + 1), draw.randrange(5)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at:at + draw.randrange(64)] = b''
        elif kind == 2:
            content[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(16)))
        elif kind == 3:
            content[at:at + 8] = draw.choice((b'\xff' * 8, b'\x7f' + b'\xff' * 7, bytes(8)))
        else:
            content = content[:at]
    return bytes(content)


def seeds(folder):
    """What is mutated: {kind: (name, content, reader)}."""
    import data_helpers
    from PIL import Image
    output_dir = os.path.join(TESTS_DIR, 'resnet8')
    run = load_preset(output_dir)
    trap = os.path.join(folder, 'sprung')

    def content(path):
        with open(path, 'rb') as file:
            return file.read()

    def archive(*first):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode='w:gz', compresslevel=1) as tar:
            for info in first:
                tar.addfile(info)
            for name in data_helpers.SHA256:
                info = tarfile.TarInfo('cifar-10-batches-bin/{}.bin'.format(name))
                part = sample.content(name)[:3073]
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
        return packed.getvalue()

    def picture(kind, **options):
        saved = io.BytesIO()
        Image.radial_gradient('L').convert('RGB').resize((61, 47)).save(saved, kind, **options)
        return saved.getvalue()

    def record(value):
        """The pickle of a Preset with one attribute."""
        return b'\x80\x02cpresets_and_results\nPreset\n)\x81}X\x02\x00\x00\x00lr' + value + b'sb.'

    programs = os.path.join(folder, 'in', 'bin')
    os.mkdir(programs)
    with open(os.path.join(programs, 'gs'), 'w') as file:  # what Pillow would start on PostScript
        file.write('#!/bin/sh\ntouch ' + trap)
    os.chmod(file.name, 0o755)
    os.environ['PATH'] = programs + os.pathsep + os.environ['PATH']
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = os.path.join(TESTS_DIR, 'cases')
    odd_pictures = {name: (name, content(os.path.join(cases, name)), data_helpers.read_image)
                    for name in sorted(os.listdir(cases))}
    return {
        **odd_pictures,
        'pickle': ('1_1.pickle', content(run.pickle_path(output_dir)), read_preset),
        'trap': ('1_2.pickle', pickle.dumps(Trap(trap), protocol=2), read_preset),
        'deep': ('1_3.pickle', record(b'}' + b')' + b'\x85' * 900000 + b'Ns'), read_preset),
        'huge': ('1_4.pickle', record(pickle.dumps(10 ** 5000, protocol=2)[2:-1]), read_preset),
        'batch': ('data_batch_1', pickle.dumps({b'data': Trap(trap), b'labels': [1]}, protocol=2),
                  lambda path: data_helpers._from_python_batch(content(path))),
        'archive': ('cifar-10-python.tar.gz', archive(), data_helpers._unpack),
        'long_name': ('cifar-10-batches-py.tar.gz', archive(tarfile.TarInfo('a' * (1 << 24))), data_helpers._unpack),
        'postscript': ('a.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n',
                       data_helpers.read_image),
        'jpeg': ('a.jpg', picture('JPEG', exif=exif.tobytes()), data_helpers.read_image),
        'png': ('a.png', picture('PNG'), data_helpers.read_image),
        'gif': ('a.gif', picture('GIF'), data_helpers.read_image),
        'tiff': ('a.tif', picture('TIFF'), data_helpers.read_image),
        'webp': ('a.webp', picture('WEBP'), data_helpers.read_image),
    }


def feed(n, number, folder):
    """Gives n mutated inputs to their readers; prints the peak memory in MB."""
    from for_report.evidence import read_curves
    from resnet_train import open_events
    import data_helpers
    import warnings
    warnings.simplefilter('ignore')
    data_helpers.SHA256 = sample.digests()
    draw, kinds, place = random.Random(number), seeds(folder), os.path.join(folder, 'in')
    output_dir = os.path.join(place, 'out')
    shutil.copytree(os.path.join(TESTS_DIR, 'resnet8'), output_dir)
    run = load_preset(output_dir)
    fragile = [path for path in glob.glob(os.path.join(run.run_dir(output_dir), '**'), recursive=True)
               if '.index' in path or '.data' in path or 'tfevents' in path]
    whole = {path: open(path, 'rb').read() for path in fragile}
    for turn in range(n):
        if turn % 50 == 0:  # slow, for each makes a session
            path = draw.choice(fragile)
            name, content, read = path, whole[path], None
        else:
            name, content, read = kinds[draw.choice(sorted(kinds))]
            path = os.path.join(place, name)
        spoilt = mutated(content, draw) if draw.random() < 0.95 else content
        with open(path, 'wb') as file:
            file.write(spoilt)
        try:
            if read:
                read(path)
            elif 'tfevents' in path:
                read_curves([run], output_dir)
                open_events(os.path.dirname(path), run.steps)
            else:
                from resnet_eval import restored
                restored(run, best_checkpoint(run, output_dir), lambda net, session: None)
        except InputError as error:
            if name != 'data_batch_1' and os.path.basename(name).split('.')[0] not in str(error):
                raise Broken('a message does not name {}: {}'.format(name, error))
        except Exception as error:
            kept = os.path.join(tempfile.gettempdir(), 'torture-' + os.path.basename(name))
            shutil.copy(path, kept)
            raise Broken('{} was not refused but raised {}: {}; it is kept as {}'.format(
                name, type(error).__name__, error, kept))
        finally:
            if os.path.exists(path):
                os.unlink(path)
            for path, content in whole.items() if not read else ():
                with open(path, 'wb') as file:
                    file.write(content)
        if turn % 50 == 0 or 'archive' in name:
            shutil.rmtree(os.path.join(place, data_helpers.BINARY_FOLDER), ignore_errors=True)
    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def inputs(n, draw, folder):
    """n mutated or hostile inputs: each is read or refused by name, nothing is executed, nothing written elsewhere."""
    peak, left, chunk = 0, n, 500
    while left:
        part = min(left, chunk)
        place = tempfile.mkdtemp(dir=folder)
        os.mkdir(os.path.join(place, 'in'))
        process = subprocess.run([sys.executable, os.path.abspath(__file__), '--n', str(part), '--seed',
                                  str(draw.randrange(10 ** 9)), '--folder', place],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        check(process.returncode == 0, 'exit status {}: {}'.format(process.returncode, process.stderr[-2000:]))
        check(os.listdir(place) == ['in'], 'something was written outside: {}'.format(os.listdir(place)))
        peak = max(peak, int(process.stdout.split()[-1]))
        left -= part
        shutil.rmtree(place)
        say('{:,} of {:,} inputs', n - left, n)
    return '{:,} inputs: read, or refused by name; at most {:,} MB of memory'.format(n, peak)


# ------------------------------------------------------------------------------ command line

def say(text, *values):
    print('  ' + text.format(*values), flush=True)


ROUNDS = dict(kills=(kills, 5), writers=(writers, 200), disk=(disk, 3), inputs=(inputs, 1000))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', help='of {} (default: all)'.format(', '.join(ROUNDS)))
    parser.add_argument('--n', type=int, help='how often')
    parser.add_argument('--seed', type=int, default=int(time.time()))
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.folder:
        return feed(flags.n, flags.seed, flags.folder)
    if set(flags.what) - set(ROUNDS):
        parser.error('there is only ' + ', '.join(ROUNDS))
    broken = 0
    for name in flags.what or ROUNDS:
        run, n = ROUNDS[name]
        folder = tempfile.mkdtemp(prefix='torture-')
        print('{}, --seed {}'.format(name, flags.seed), flush=True)
        try:
            print('  ' + run(flags.n or n, random.Random(flags.seed), folder), flush=True)
        except Broken as error:
            print('  BROKEN: {}; see {}'.format(error, folder), flush=True)
            broken += 1
        else:
            shutil.rmtree(folder)
    sys.exit(min(broken, 1))


if __name__ == '__main__':
    main()
