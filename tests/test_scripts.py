"""The scripts as a user runs them: in processes of their own, on the sample."""
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import data_helpers
import numpy_resnet
import resnet
import resnet_train
import sample
from data_helpers import InputError
from presets_and_results import (COLUMNS, check_output_dir, checkpoint_steps, load_predictions, load_preset,
                                 load_presets, make_preset, start_run)
from resnet import tf
from resnet_train import learning_rate, train
from sample import TINY, run_script


def copied(trained, tmp_path):
    shutil.copytree(trained[0], str(tmp_path / 'copied'))
    return str(tmp_path / 'copied')


def variables(output_dir, step):
    reader = tf.train.NewCheckpointReader(load_preset(output_dir).checkpoint_path(output_dir, step))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def points(run_dir, name):
    """The curves of summaries/<name>: {tag: {step: value}}."""
    curves = {}
    for path in glob.glob(os.path.join(run_dir, 'summaries', name, '*')):
        for event in tf.train.summary_iterator(path):
            for value in event.summary.value:
                curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


# ------------------------------------------------------------------------------ training

def test_training_says_what_runs_and_is_quiet_otherwise(trained):
    output_dir, out, err = trained
    preset = load_preset(output_dir)
    for part in ('Preset 3 (study3): ResNet8 (n = 1), 75,290 parameters', '270 training and 30 validation images',
                 sample.SAMPLE_DIR, tf.__version__, preset.run_dir(output_dir), 'seed 5', '6 steps, 2 epochs', 'CPU'):
        assert part in out
    assert out.count('validation  step') == 3 and err == ''


def test_training_is_recorded(trained):
    output_dir, _, _ = trained
    preset = load_preset(output_dir)
    assert (preset.preset, preset.model, preset.seed, preset.steps, preset.status, preset.finished) == (
        3, 'ResNet8', 5, 6, 'complete', False)
    assert preset.early_stopping_epoch in (2, 4, 6) and 0 <= preset.val_accuracy <= 1
    assert 0 < preset.training_time < 5 and preset.images_per_second > 1
    assert preset.tensorflow_version == tf.__version__ and sys.version.startswith(preset.python_version)
    with open(os.path.join(output_dir, 'INFOS', 'train_overall.txt')) as file:
        header, line = file.read().splitlines()
    assert dict(zip(header.split('\t'), line.split('\t')))['timestamp'] == str(preset.timestamp)
    assert glob.glob(os.path.join(output_dir, 'INFOS', 'pickles', '*')) == [preset.pickle_path(output_dir)]


def test_best_and_latest_are_two_checkpoints(trained):
    output_dir, _, _ = trained
    preset = load_preset(output_dir)
    run_dir = preset.run_dir(output_dir)
    curve = points(run_dir, 'dev')['accuracy']
    bests = [step for step in (2, 4, 6) if curve[step] > max([curve[k] for k in (2, 4, 6) if k < step], default=-1)]
    assert checkpoint_steps(run_dir) == sorted(set(bests[-2:]) | {6})
    assert preset.early_stopping_epoch == bests[-1]
    assert abs(curve[bests[-1]] - preset.val_accuracy) < 1e-6
    held = variables(output_dir, 6)
    assert held['global_step'] == 6 and 'init/init_conv/DW/Momentum' in held
    with open(os.path.join(run_dir, 'checkpoints', 'checkpoint')) as file:
        assert run_dir not in file.read()  # or a moved run could not be found


def test_curves(tmp_path):
    status, _, err = run_script('resnet_train.py', *TINY, '--batch_size', 27, '--max_steps', 20, '--lr_decay', 0.5,
                                '--output_dir', tmp_path)
    assert status == 0, err
    run_dir = load_preset(str(tmp_path)).run_dir(str(tmp_path))
    train, dev = points(run_dir, 'train'), points(run_dir, 'dev')
    assert set(train) == {'loss', 'accuracy', 'learning_rate', 'images_per_second'} and set(dev) == {
        'loss', 'accuracy', 'best_accuracy'}
    best = [max(dev['accuracy'][k] for k in dev['accuracy'] if k <= step) for step in sorted(dev['accuracy'])]
    assert [dev['best_accuracy'][step] for step in sorted(dev['best_accuracy'])] == best
    assert sorted(train['loss']) == [10, 20] and sorted(dev['loss']) == list(range(2, 21, 2))
    assert abs(train['learning_rate'][20] - 0.1) < 1e-6 and train['loss'][10] > 0


@pytest.mark.parametrize('number, rates', [
    (4, {0: 0.1, 23999: 0.1, 24000: 0.096, 70399: 0.09216}), (1, {70399: 0.1}),
    ('paper20', {0: 0.1, 31999: 0.1, 32000: 0.01, 47999: 0.01, 48000: 0.001, 63999: 0.001}),
    ('paper110', {0: 0.1 / 353, 175: 0.1 * 176 / 353, 352: 0.1, 31999: 0.1, 48000: 0.001}),
    ('fast', {'warmup_epochs': 2, 'num_epochs': 10, 0: 0.8 / 705, 703: 0.8 * 704 / 705, 704: 0.8, 2112: 0.4,
              3519: 0.8 / 2816}),
    ('fast', {'schedule': 'cosine', 'num_epochs': 10, 0: 0.8, 880: 0.8 * (2 + math.sqrt(2)) / 4, 1760: 0.4,
              3519: 0.8 * math.sin(math.pi / 7040) ** 2})])
def test_schedules_by_hand(number, rates):
    preset = make_preset(number, **{name: value for name, value in rates.items() if isinstance(name, str)})
    for step, rate in rates.items():
        if not isinstance(step, str):
            assert abs(learning_rate(preset, step, steps_per_epoch=352) - rate) < 1e-12, step


def test_the_same_seed_gives_the_same_run(trained, tmp_path):
    for seed, same in ((5, True), (6, False)):
        output_dir = str(tmp_path / str(seed))
        assert run_script('resnet_train.py', *TINY, '--seed', seed, '--output_dir', output_dir)[0] == 0
        first, second = variables(trained[0], 6), variables(output_dir, 6)
        assert all(np.array_equal(first[name], second[name]) for name in first) == same


@pytest.mark.parametrize('flag, message', [
    ('--mixed_precision', 'mixed_precision needs a GPU of compute capability 7 or more, or a processor with'),
    ('--xla', 'xla is for GPUs, and TensorFlow sees none; it would slow')])
def test_what_the_hardware_cannot_is_refused(flag, message, tmp_path):
    status, out, err = run_script('resnet_train.py', *TINY, flag, 'true', '--output_dir', tmp_path,
                                  prepare='import resnet; resnet.half_precision = lambda: None; '
                                  'resnet.KERNELS = "Eigen"; ')
    assert status == 2 and message in err and len(err.splitlines()) == 1
    assert os.listdir(str(tmp_path / 'runs')) == []


@pytest.mark.parametrize('half', [None, tf.float16])
def test_auto_records_what_the_hardware_gains_by(half, cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resnet, 'half_precision', lambda: half)
    tiny = dict(batch_size=20, max_steps=2, num_residual_units=1)
    preset = train(make_preset('fast', **tiny), cifar10, str(tmp_path))
    used = half is not None
    assert preset.mixed_precision is used and load_preset(str(tmp_path)).mixed_precision is used
    assert (', mixed precision, seed' in capsys.readouterr().out) == used
    runs = load_presets(str(tmp_path))
    for asked, found in (('auto', True), (used, True), (not used, False)):
        again = make_preset('fast', mixed_precision=asked, **tiny)
        assert (resnet_train._on_record(again, runs) is not None) == found


def test_on_record_is_what_counts_as_the_same_recipe():
    whole = make_preset('study1', max_steps=0, timestamp=7)  # once cut short, then trained to its end
    lowered = make_preset('study1', lr=0.05, rate_history='lr 0.1 to step 5', timestamp=8)
    assert resnet_train._on_record(make_preset('study1'), [whole, lowered]) is whole
    assert resnet_train._on_record(make_preset('study1', lr=0.05), [whole, lowered]) is None
    assert resnet_train._on_record(make_preset('study1', max_steps=9), [whole, lowered]) is None


@pytest.mark.long
@pytest.mark.parametrize('name', [
    'fast', 'standard', 'paper20', 'paper110', 'best20', 'best56'])  # paper32 and paper56 are as these
def test_the_first_steps_of_the_long_presets(name, cifar10, tmp_path):
    preset = train(make_preset(name, batch_size=20, max_steps=2), sample.SAMPLE_DIR, str(tmp_path))
    assert preset.status == 'complete' and preset.early_stopping_epoch == 2
    curve = points(preset.run_dir(str(tmp_path)), 'dev')
    assert curve['loss'][2] > 0 and curve['accuracy'][2] == pytest.approx(preset.val_accuracy)


def test_a_run_for_each_of_several_seeds(tmp_path):
    for flags, seeds in ((['2'], [0, 1]), (['7', '5'], [7, 5])):
        output_dir = str(tmp_path / flags[0])
        status, out, err = run_script('resnet_train.py', *TINY, '--max_steps', 2, '--seeds', *flags,
                                      '--output_dir', output_dir)
        assert status == 0 and err == '', err
        runs = load_presets(output_dir)
        assert [(run.seed, run.status, run.steps) for run in runs] == [(seed, 'complete', 2) for seed in seeds]
        with open(os.path.join(output_dir, 'INFOS', 'train_overall.txt')) as file:
            assert len(file.readlines()) == 3
        kernels = [tf.train.NewCheckpointReader(run.checkpoint_path(output_dir, 2)).get_tensor('init/init_conv/DW')
                   for run in runs]
        assert np.abs(kernels[0] - kernels[1]).max() > 0.01


@pytest.mark.parametrize('evaluate_every, checkpoint_every, message', [
    (1, 100, 'the validation loss is nan'), (100, 1, ''), (100, 100, 'the loss is ')])
def test_a_training_that_diverges_stops_and_says_so(evaluate_every, checkpoint_every, message, tmp_path):
    status, out, err = run_script('resnet_train.py', *TINY, '--lr', 100, '--batch_size', 30, '--max_steps', 50,
                                  '--evaluate_every', evaluate_every, '--checkpoint_every', checkpoint_every,
                                  '--output_dir', tmp_path)
    assert status == 2 and 'diverged: ' + message in err and len(err.splitlines()) == 1, err
    preset = load_preset(str(tmp_path))
    assert preset.status == 'diverged' and (preset.steps > 0) == (1 in (checkpoint_every, evaluate_every))
    assert len((tmp_path / 'INFOS' / 'train_overall.txt').read_text().splitlines()) == 2
    for step in checkpoint_steps(preset.run_dir(str(tmp_path))):
        assert all(np.isfinite(value).all() for value in variables(str(tmp_path), step).values())
    status, out, err = run_script('resnet_eval.py', '--output_dir', tmp_path)
    assert (status, err) == (0, '')  # what has no checkpoint is left alone


def train_here(output_dir, **overrides):
    """A training in this process; returns its last variables."""
    preset = make_preset(0, **dict(dict(batch_size=90, max_steps=6, evaluate_every=6, checkpoint_every=6), **overrides))
    train(preset, sample.SAMPLE_DIR, str(output_dir))
    return variables(str(output_dir), 6)


def test_rate_augmentation_and_statistics_reach_the_training(cifar10, monkeypatch, tmp_path):
    plain = train_here(tmp_path / 'plain')
    kernel = 'unit_1_0/sub1/conv1/DW'
    augmented = train_here(tmp_path / 'augmented', data_augmentation=True)
    assert np.abs(plain[kernel] - augmented[kernel]).max() > 1e-3
    monkeypatch.setattr(resnet_train, 'DECAY_STEPS', 2)
    stopped = train_here(tmp_path / 'decayed', lr_decay=0.001)  # steps 3 to 6 hardly move
    assert np.abs(plain[kernel] - stopped[kernel]).max() > 1e-3

    # The saved statistics of the first layer are those of the training images, at the saved weights.
    images, _ = data_helpers.load(sample.SAMPLE_DIR, data_helpers.TRAIN_FILES)
    training, _ = data_helpers.split(300, seed=0)
    x = data_helpers.scale(images[training]).astype(np.float64)
    stem = numpy_resnet.convolution(x, plain['init/init_conv/DW'], 1)
    bn = 'unit_1_0/common_activation/init_bn/'
    np.testing.assert_allclose(plain[bn + 'moving_mean'], stem.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(plain[bn + 'moving_variance'], stem.var((0, 1, 2)), rtol=1e-3)


def ended_by(number, output_dir):
    """A training that this signal ended cleanly: its Preset."""
    process = run_script('resnet_train.py', '--preset', 0, '--batch_size', 20, '--num_epochs', 10000,
                         '--evaluate_every', 10, '--output_dir', output_dir, popen=True)
    lines = []
    while not any(line.startswith('validation') for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Stopping' in out and 'is interrupted' in out and err == ''
    preset = load_preset(str(output_dir))
    assert preset.status == 'interrupted' and preset.steps >= 10
    assert checkpoint_steps(preset.run_dir(str(output_dir)))[-1] == preset.steps
    assert len((output_dir / 'INFOS' / 'train_overall.txt').read_text().splitlines()) == 2
    return preset


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_cleanly(number, tmp_path):
    ended_by(number, tmp_path)


def test_ctrl_c_ends_cleanly_and_the_run_goes_on(tmp_path):
    preset = ended_by(signal.SIGINT, tmp_path)
    process = run_script('resnet_train.py', '--resume', '--output_dir', tmp_path, popen=True)
    began = ''
    for line in iter(process.stdout.readline, ''):
        began += line
        if line.startswith('validation'):
            break
    status, _, err = run_script('resnet_train.py', '--resume', preset.timestamp, '--output_dir', tmp_path)
    assert status == 2 and 'is in use by another process' in err
    status, _, err = run_script('resnet_eval.py', '--output_dir', tmp_path)
    assert status == 2 and 'is in use by another process' in err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ''
    assert 'resnet_train.py --resume {} --output_dir {}'.format(preset.timestamp, tmp_path) in out
    assert 'Resuming run {} at step {:,} of '.format(preset.timestamp, preset.steps) in began
    assert load_preset(str(tmp_path)).steps > preset.steps
    header, line = (tmp_path / 'INFOS' / 'train_overall.txt').read_text().splitlines()
    assert dict(zip(header.split('\t'), line.split('\t')))['steps'] == str(load_preset(str(tmp_path)).steps)


def test_a_resumed_run_keeps_its_own_values(tmp_path):
    preset = make_preset(3, lr=0.05, status='interrupted', steps=7)
    check_output_dir(str(tmp_path))
    start_run(preset, str(tmp_path))
    preset.save(str(tmp_path))
    for flags, message in ((['--lr', 0.1], 'was started with lr 0.05, and is resumed with it; leave out --lr'),
                           (['--preset', 4], 'was started with preset 3'),
                           (['--lr', '5e-2', '--preset', 'study3'], 'cannot be resumed: ')):
        status, _, err = run_script('resnet_train.py', '--resume', *flags, '--output_dir', tmp_path,
                                    tensorflow='cannot be' in message)
        assert status == 2 and message in err and len(err.splitlines()) == 1, err
    assert 'model-7 is missing, trimmed or damaged' in err
    for status, message in (('complete', 'it is at its end; a larger --num_epochs or --max_steps extends it'),
                            ('diverged', 'train it anew with a lower --lr')):
        preset.update(dict(status=status, steps=7 if status == 'complete' else 0))
        preset.save(str(tmp_path))
        _, _, err = run_script('resnet_train.py', '--resume', preset.timestamp, '--output_dir', tmp_path,
                               tensorflow=False)
        assert message in err, err
    _, _, err = run_script('resnet_train.py', '--resume', '--output_dir', tmp_path, tensorflow=False)
    assert 'there is no interrupted run in' in err, err


def interrupted(output_dir, **overrides):
    """A training in this process, complete, with a record that says it was broken off after its last save."""
    train_here(output_dir, num_checkpoints=2, **overrides)
    preset = load_preset(str(output_dir))
    preset.update(dict(status='interrupted', max_steps=8))
    preset.save(str(output_dir))
    return preset


def test_a_resumed_run_keeps_the_last_bests_and_no_more(cifar10, tmp_path):
    preset = interrupted(tmp_path, evaluate_every=1, checkpoint_every=1)
    run_dir = preset.run_dir(str(tmp_path))
    rose = [step for step, best in sorted(points(run_dir, 'dev')['best_accuracy'].items())
            if points(run_dir, 'dev')['accuracy'][step] == best]
    held = set(checkpoint_steps(run_dir))
    folder = os.path.join(run_dir, 'checkpoints')
    for extra in ('model-0.index', 'model-6.data-00000-of-00001.tempstate123'):  # as a kill amid cleaning up leaves
        with open(os.path.join(folder, extra), 'wb'):
            pass
    train(preset, sample.SAMPLE_DIR, str(tmp_path), resume=True)
    assert rose and 6 in held and not [name for name in os.listdir(folder) if 'tempstate' in name or '-0.' in name]
    rose += [step for step in (7, 8) if points(run_dir, 'dev')['accuracy'][step] > max(
        accuracy for earlier, accuracy in points(run_dir, 'dev')['accuracy'].items() if earlier < step)]
    assert set(checkpoint_steps(run_dir)) == set(sorted(set(rose))[-2:]) | {8}


@pytest.mark.parametrize('damage', [
    lambda content: content[:8] + b'?' + content[9:],             # the checksum of the first length is wrong
    lambda content: content[:12] + b'?' + content[13:],           # that of the first record is
    lambda content: content[:-9] + b'\xff' * 8 + content[-1:]])   # that of the last one
def test_damaged_curves_are_named_and_not_dropped(damage, cifar10, tmp_path):
    preset = interrupted(tmp_path)
    path, = (tmp_path / 'runs').glob('*/summaries/dev/*')
    path.write_bytes(damage(path.read_bytes()))
    content = path.read_bytes()
    with pytest.raises(InputError, match='{} is damaged .*remove it to go on'.format(path.name)):
        train(preset, sample.SAMPLE_DIR, str(tmp_path), resume=True)
    assert path.read_bytes() == content
    path.unlink()
    best = load_preset(str(tmp_path)).early_stopping_epoch
    for max_steps in (8, 10, 12):  # from the second time on there are validations again, and the best is not among them
        preset = load_preset(str(tmp_path))
        preset.update(dict(status='interrupted', max_steps=max_steps, val_accuracy=1.0))
        preset.save(str(tmp_path))
        train(preset, sample.SAMPLE_DIR, str(tmp_path), resume=True)
        assert (preset.status, preset.early_stopping_epoch) == ('complete', best)
        assert best in checkpoint_steps(preset.run_dir(str(tmp_path)))


def test_a_record_that_claims_more_than_there_is_ends_the_curves(cifar10, tmp_path):
    """As one that was being written; TensorFlow's reader would crash on it."""
    preset = interrupted(tmp_path)
    path, = (tmp_path / 'runs').glob('*/summaries/dev/*')
    path.write_bytes(path.read_bytes() + record_header(1 << 60) + bytes(99))
    train(preset, sample.SAMPLE_DIR, str(tmp_path), resume=True)
    assert sorted(points(preset.run_dir(str(tmp_path)), 'dev')['loss']) == [6, 8]


def record_header(length):
    """Of an event file: a length and its checksum, right whatever it claims."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    length = length.to_bytes(8, 'little')
    return length + masked_crc32c(length).to_bytes(4, 'little')


def test_a_batch_too_large_for_the_memory_is_named(cifar10, monkeypatch, tmp_path):
    def small(*words, made=resnet.make_session):
        session = made(*words)

        def exhausted(fetches, *feed, run=session.run):
            if isinstance(fetches, list):  # a training step's
                raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
            return run(fetches, *feed)
        session.run = exhausted
        return session
    monkeypatch.setattr(resnet, 'make_session', small)
    with pytest.raises(InputError, match='too small for a training step on batches of 90: .* smaller --batch_size '
                                         '.OOM'):
        train_here(tmp_path)


# ------------------------------------------------------------------------------ testing

def test_evaluation_of_all_of_one_and_of_the_newest(trained, tmp_path):
    output_dir = copied(trained, tmp_path)
    timestamp = load_preset(output_dir).timestamp
    status, out, err = run_script('resnet_eval.py', '--output_dir', output_dir)
    assert status == 0 and err == '', err
    preset = load_preset(output_dir)
    assert preset.finished and 'test accuracy {:.4f}'.format(preset.test_accuracy) in out and 'truck' in out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] and line.split()[0] in
            'airplane automobile bird cat deer dog frog horse ship truck'.split()]
    confusion = np.array([[int(count) for count in row[3:]] for row in rows])
    assert confusion.shape == (10, 10) and confusion.sum() == 100
    assert abs(confusion.trace() / 100 - preset.test_accuracy) < 1e-9

    status, out, _ = run_script('resnet_eval.py', '--output_dir', output_dir, tensorflow=False)
    assert status == 0 and 'No run is left to test' in out
    for flags in (('--timestamp',), ('--timestamp', timestamp)):
        assert run_script('resnet_eval.py', '--output_dir', output_dir, *flags)[0] == 0
    with open(os.path.join(output_dir, 'INFOS', 'eval_overall.txt')) as file:
        lines = file.read().splitlines()
    assert len(lines) == 4 and lines[0].split('\t') == list(COLUMNS) and lines[1] == lines[2] == lines[3]


def test_a_run_with_more_variables_and_an_old_pickle_evaluates(trained, tmp_path):
    """As a run that was trained elsewhere: other variables beside ours, a record without the newer attributes."""
    import pickle
    output_dir = copied(trained, tmp_path)
    preset = load_preset(output_dir)
    path = preset.checkpoint_path(output_dir, preset.early_stopping_epoch)
    with tf.Graph().as_default(), tf.Session() as session:
        others = dict(extra=np.zeros(3), global_step=np.int32(7))  # int32, as tf.Variable(0) made it
        for name, value in dict(variables(output_dir, preset.early_stopping_epoch), **others).items():
            tf.get_variable(name, initializer=value)
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, path)
    for name in COLUMNS[26:]:
        del preset.__dict__[name]
    preset.timestamp = str(preset.timestamp)
    with open(preset.pickle_path(output_dir), 'wb') as file:
        pickle.dump(preset, file, protocol=3)
    status, out, err = run_script('resnet_eval.py', '--output_dir', output_dir)
    assert status == 0 and 'test accuracy' in out, err


@pytest.fixture
def resnet8(tmp_path):
    """A copy of the ResNet-8, which was tested before there was an accuracy with the mirror image.

    Its folder, and what NumPy makes of uint8 [N, 32, 32, 3]: the mean of the probabilities of both views.
    """
    output_dir = str(tmp_path / 'resnet8')
    shutil.copytree(os.path.join(sample.TESTS_DIR, 'resnet8'), output_dir)
    found = variables(output_dir, 3520)
    return output_dir, lambda images: (numpy_resnet.probabilities(images, found, 1, 0.1)
                                       + numpy_resnet.probabilities(np.flip(images, 2), found, 1, 0.1)) / 2


def test_the_accuracy_with_the_mirror_image_is_a_figure_of_its_own(resnet8, cifar10):
    output_dir, both_views = resnet8
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    one_view = numpy_resnet.probabilities(images, variables(output_dir, 3520), 1, 0.1).argmax(1)
    status, out, _ = run_script('resnet_eval.py', '--output_dir', output_dir, tensorflow=False)
    assert status == 0 and 'No run is left to test' in out and load_preset(output_dir).test_accuracy_mirrored is None
    status, out, err = run_script('resnet_eval.py', '--output_dir', output_dir, '--timestamp')
    assert (status, err) == (0, '')
    preset = load_preset(output_dir)
    plain, mirrored = (one_view == labels).mean(), (both_views(images).argmax(1) == labels).mean()
    assert (preset.test_accuracy, preset.test_accuracy_mirrored) == (plain, mirrored) and plain != mirrored
    assert out.splitlines()[-2:] == [f'test accuracy {plain:.4f}', f'with mirror image {mirrored:.4f}']
    saved = load_predictions([preset], output_dir)[preset.timestamp]
    assert np.array_equal(saved, (labels, one_view))
    with open(os.path.join(output_dir, 'INFOS', 'eval_overall.txt')) as file:
        row = dict(zip(*[line.split('\t') for line in file.read().split('\n')[:2]]))
    assert (float(row['test_accuracy']), float(row['test_accuracy_mirrored'])) == (plain, mirrored)


def test_an_image_and_its_mirror_image_get_the_same_answer(resnet8, cifar10, tmp_path):
    output_dir, both_views = resnet8
    images = data_helpers.load(cifar10, data_helpers.TEST_FILES)[0][:3]
    for k, image in enumerate(images):
        Image.fromarray(image).save(str(tmp_path / f'{k}.png'))
        Image.fromarray(image).transpose(Image.FLIP_LEFT_RIGHT).save(str(tmp_path / f'{k} mirrored.png'))
    status, out, err = run_script('resnet_eval.py', '--output_dir', output_dir, '--json',
                                  '--images', tmp_path / '*.png')
    assert (status, err) == (0, '')
    answers = {os.path.basename(answer['image']): list(answer['probabilities'].values())
               for answer in map(json.loads, out.splitlines())}
    for k, expected in enumerate(both_views(images)):
        assert answers[f'{k}.png'] == answers[f'{k} mirrored.png']
        np.testing.assert_allclose(answers[f'{k}.png'], expected, atol=1e-5)


def classify(output_dir, *places):
    return run_script('resnet_eval.py', '--output_dir', output_dir, '--timestamp', '--images', *places,
                      PYTHONIOENCODING='utf-8')


def test_own_images_of_all_kinds(trained, tmp_path):
    output_dir = copied(trained, tmp_path)
    folder = tmp_path / '내 사진들' / 'deeper'
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, shape in (('a.png', (40, 60, 3)), ('$1$ one pixel.jpg', (1, 1, 3)), ('tall.png', (300, 20, 3))):
        Image.fromarray(random.randint(0, 256, shape).astype(np.uint8)).save(str(folder / name))
    palette = Image.fromarray(random.randint(0, 8, (50, 50)).astype(np.uint8), mode='P')
    palette.putpalette(list(random.randint(0, 256, 768)))
    palette.save(str(folder / 'palette.png'), transparency=3)
    Image.new('1', (8000, 6300), 1).save(str(folder / '50 megapixels.png'))
    (folder / '.hidden').write_bytes(b'no image')

    status, out, err = classify(output_dir, folder.parent, folder / '*.png', folder / 'a.png')
    assert status == 0 and err == '', err
    assert out.startswith('By run {}: preset 3 (study3, '.format(load_preset(output_dir).timestamp))
    rows = [line for line in out.splitlines() if line.count('%') == 3]
    assert [row.split('deeper')[1].split('  ')[0][1:] for row in rows] == [
        '$1$ one pixel.jpg', '50 megapixels.png', 'a.png', 'palette.png', 'tall.png']  # each once
    sheet = Image.open(os.path.join(output_dir, 'for_report', 'used_images.png'))
    alone = classify(output_dir, folder / 'palette.png')[1].splitlines()[1]
    assert alone.split() == next(row for row in rows if 'palette.png' in row).split()
    assert Image.open(os.path.join(output_dir, 'for_report', 'used_images.png')).height < sheet.height

    (folder / 'text.png').write_bytes(b'no image')
    os.mkfifo(str(folder / 'fifo'))
    (folder / 'cut.jpg').write_bytes((folder / '$1$ one pixel.jpg').read_bytes()[:300])
    (tmp_path / 'empty').mkdir()
    status, out, err = classify(output_dir, folder, tmp_path / 'empty', tmp_path / 'gone*')
    assert status == 2 and len([line for line in out.splitlines() if line.count('%') == 3]) == 5
    for message in ('text.png is no image', 'cut.jpg is no image', 'empty holds no files', 'gone* is not there',
                    'fifo is no file', '5 of what --images names could not be read'):
        assert message in err


def test_the_contact_sheet_shows_pictures_and_bars(trained, tmp_path):
    output_dir = copied(trained, tmp_path)
    Image.new('RGB', (90, 90), (250, 10, 10)).save(str(tmp_path / 'red.png'))
    assert classify(output_dir, tmp_path / 'red.png')[0] == 0
    sheet = np.asarray(Image.open(os.path.join(output_dir, 'for_report', 'used_images.png')).convert('RGB')).astype(int)
    red = (abs(sheet - (250, 10, 10)).sum(2) < 30).sum(0) > 100  # columns: the picture, a gap, what the network saw
    assert (np.diff(red.astype(int)) == 1).sum() == 2
    bars = sheet[:, red.nonzero()[0].max() + 1:]
    blue, light_blue = (0, 0x72, 0xB2), (0x56, 0xB4, 0xE9)
    likeliest, others = [(abs(bars - colour).sum(2) < 12).sum() > 50 for colour in (blue, light_blue)]
    assert likeliest and others


# ------------------------------------------------------------------------------ bad input, before TensorFlow

@pytest.mark.parametrize('script, flags, message', [
    ('resnet_train.py', ['--preset', '99'], 'there is no preset 99; choose one of 0 (first), 1'),
    ('resnet_train.py', ['--batchsize', '3'], 'unrecognized arguments: --batchsize'),
    ('resnet_train.py', ['--batch', '3'], 'unrecognized arguments: --batch'),
    ('resnet_train.py', ['--batch_size', '0'], 'batch_size must be a whole number from 1'),
    ('resnet_train.py', ['--lr', 'abc'], "lr must be a number from 1e-09 to 100, not 'abc'"),
    ('resnet_train.py', ['--data_dir', os.path.join(__file__, 'data')], 'cannot be written there'),
    ('resnet_train.py', ['--output_dir', os.path.join(__file__, 'out')], 'cannot write to the output folder'),
    ('resnet_train.py', ['--preset', 'slow'], 'there is no preset slow; choose one of 0 (first), 1 (study1)'),
    ('resnet_train.py', ['--schedule', 'triangle'],
     "schedule must be step, one-cycle (or linear) or cosine, not 'triangle'"),
    ('resnet_train.py', ['--lr_milestones', '5;6'], "lr_milestones must be steps such as 32000,48000, not '5;6'"),
    ('resnet_train.py', ['--seeds', '3', '--seed', '1'], '--seed and --seeds exclude each other'),
    ('resnet_train.py', ['--preset', ''], 'there is no preset ; choose one of'),
    ('resnet_train.py', ['--preset', 'fast', '--lr_decay', '0.5'], 'lr_decay has no part in the schedule one-cycle'),
    ('resnet_train.py', ['--preset', 'fast', '--schedule', 'cosine', '--lr_milestones', '5'],
     'lr_milestones has no part in the schedule cosine'),
    ('resnet_train.py', ['--preset', 'standard', '--num_epochs', '5'],
     'warmup_epochs 5 must be less than num_epochs 5'),
    ('resnet_train.py', ['--seeds', '0'], '--seeds must be a whole number from 1'),
    ('resnet_train.py', ['--trim', '--show'], '--trim trains nothing: leave out the other flags'),
    ('resnet_train.py', ['--trim', '--init_from', '7'], '--trim trains nothing: leave out the other flags'),
    ('resnet_eval.py', ['--output_dir', '{trained}', '--timestamp', '--export', ''], 'is there already'),
    ('resnet_train.py', ['--seeds', '1', 'x'], "seed must be a whole number from 0 to 4294967295, not 'x'"),
    ('resnet_eval.py', ['--output_dir', '{trained}', '--timestamp', '7'], 'there is no run 7; known: {timestamp}'),
    ('resnet_eval.py', ['--output_dir', '{trained}', '--timestamp', ''], 'there is no run ; known'),
    ('resnet_eval.py', ['--output_dir', '{trained}', '--images', 'x.png'], 'no run is tested, so none is the best'),
    ('resnet_eval.py', ['--output_dir', '{empty}'], 'there are no runs in {empty}; make one with'),
    ('resnet_eval.py', ['--output_dir', '{bare}'], 'run {timestamp} has no checkpoint to test in'),
    ('resnet_eval.py', ['--output_dir', '{trained}', '--data_dir', '{damaged}'], 'test_batch.bin is truncated'),
    ('resnet_eval.py', ['--output_dir', '{trained}', '--timestamp', '--images', __file__],
     'there is no image to classify'),
    ('presets_and_results.py', ['--output_dir', '{empty}'], 'there are no runs in {empty}; make one with'),
    ('presets_and_results.py', ['--data_dir', '{empty}'], 'unrecognized arguments: --data_dir'),
    ('tensorboard_run', ['--output_dir', '{empty}'], 'there are no runs in {empty}; make one with'),
    ('tensorboard_run', ['--output_dir', '{bare}'], 'no run on record has summaries in'),
    ('tensorboard_run', ['--output_dir', '{trained}', '--port', 'x'], "invalid int value: 'x'"),
    ('tensorboard_run', ['--output_dir', '{trained}', '--port', '99999'], '--port must be from 0'),
    ('tensorboard_run', ['--output_dir', '{trained}', '--bogus'], 'unrecognized arguments: --bogus'),
    ('tensorboard_run', ['--output_dir', '{trained}', '--host', '1.2.3.4'], 'ssign'),  # cannot (be) assign(ed)
])
def test_bad_input(script, flags, message, trained, tmp_path):
    names = dict(trained=trained[0], timestamp=load_preset(trained[0]).timestamp, empty=tmp_path / 'empty',
                 bare=tmp_path / 'bare', damaged=tmp_path / 'damaged')
    shutil.copytree(os.path.join(trained[0], 'INFOS'), str(tmp_path / 'bare' / 'INFOS'))
    os.mkdir(str(tmp_path / 'damaged'))
    (tmp_path / 'damaged' / 'test_batch.bin').write_bytes(sample.content('test_batch')[:-1])
    prepare = 'data_helpers.OFFICIAL_URL = "http://127.0.0.1:9/"; data_helpers.shutil.which = lambda name: None; '
    status, out, err = run_script(script, *[flag.format(**names) for flag in flags], tensorflow=False, prepare=prepare)
    assert status == 2 and message.format(**names) in err, err
    lines = [line for line in err.splitlines() if not line.startswith('skipped:')]
    assert len(lines) == 1 and lines[0].startswith(script + ': error: ')


def test_a_read_only_folder_is_tested_elsewhere(trained, tmp_path):
    blocked = tmp_path / 'blocked'
    shutil.copytree(trained[0], str(blocked))
    prepare = ('import tempfile; tempfile.TemporaryFile = lambda dir: (_ for _ in ()).throw('
               'OSError(30, "Read-only file system")); ')
    status, _, err = run_script('resnet_eval.py', '--output_dir', blocked, tensorflow=False, prepare=prepare)
    assert status == 2 and 'Read-only file system' in err
    assert 'copy INFOS/ and runs/ to a folder of your own, and test there with --output_dir' in err


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    output_dir = copied(trained, tmp_path)
    preset = load_preset(output_dir)
    path = preset.checkpoint_path(output_dir, preset.early_stopping_epoch)
    data = path + '.data-00000-of-00001'
    for damaged, content in ((data, open(data, 'rb').read()[:1000]), (path + '.index', b'nonsense')):
        with open(damaged, 'wb') as file:
            file.write(content)
        status, _, err = run_script('resnet_eval.py', '--output_dir', output_dir)
        assert status == 2 and path in err and len(err.splitlines()) == 1, err


def test_a_checkpoint_on_which_tensorflow_aborts_ends_neither_the_others_nor_the_script(trained, tmp_path):
    output_dir = copied(trained, tmp_path)
    whole = load_preset(output_dir)
    shutil.copytree(whole.run_dir(output_dir), os.path.join(output_dir, 'runs', '7'))
    tampered = load_preset(output_dir)
    tampered.update(dict(timestamp=7))
    tampered.save(output_dir)
    prepare = ('import os, resnet; read = resnet.tf.train.NewCheckpointReader; resnet.tf.train.NewCheckpointReader = '
               'lambda path: os.abort() if "/runs/7/" in path else read(path); ')
    status, out, err = run_script('resnet_eval.py', '--output_dir', output_dir, prepare=prepare)
    assert status == 2 and 'TensorFlow would end on it' in err and len(err.splitlines()) == 1, err
    assert [run.finished for run in load_presets(output_dir)] == [False, True] and 'test accuracy' in out


def test_a_checkpoint_of_another_network_is_named(trained, tmp_path):
    output_dir = copied(trained, tmp_path)
    preset = load_preset(output_dir)
    preset.update(dict(num_residual_units=2))
    preset.save(output_dir)
    status, _, err = run_script('resnet_eval.py', '--output_dir', output_dir)
    assert status == 2 and 'does not fit a ResNet14: unit_1_1/' in err


@pytest.mark.parametrize('script', ['resnet_train.py', 'resnet_eval.py', 'presets_and_results.py', 'tensorboard_run'])
def test_help_is_documentation_at_once(script):
    best = float('inf')
    for _ in range(3):  # the machine may be busy
        began = time.time()
        out = subprocess.check_output([sys.executable, os.path.join(sample.PROJECT_DIR, script), '--help'],
                                      universal_newlines=True)
        best = min(best, time.time() - began)
    assert best < 1
    assert '--output_dir' in out and script in out and ('--data_dir' in out) == script.startswith('resnet')
    if script == 'resnet_train.py':
        for part in ('--lr FLOAT', '--num_residual_units', 'ResNet56', 'every 24,000 steps'):
            assert part in out
