"""The scripts as they are met in a terminal: its width, its end, Ctrl-C, what they tell to type next, and --json."""
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import termios

import numpy as np
import pytest
from PIL import Image

import resnet_train
from data_helpers import InputError
from presets_and_results import (PROJECT_DIR, checkpoint_steps, command, differences, is_shortened, load_preset,
                                 load_predictions, load_presets, make_preset, recipe, remark, state)
from resnet import tf
from resnet_train import describe_recipe, git_commit
from sample import TINY, run_script

ENDLESS = ('--preset', 0, '--batch_size', 20, '--num_epochs', 10000, '--evaluate_every', 10)


def in_terminal(script, *flags, width=80, tensorflow=True):
    """Runs a script in a pseudo-terminal of so many columns; returns its exit status and all that it wrote."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, width, 0, 0))
    process = run_script(script, *flags, tensorflow=tensorflow, popen=True, stdout=slave, stderr=slave,
                         COLUMNS='', TERM='xterm')
    os.close(slave)
    written = b''
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # Linux's way to say that the last writer has closed it
            break
        if not part:
            break
        written += part
    os.close(master)
    return process.wait(60), written.decode('utf-8', 'replace')


def screen_lines(written):
    """What was written between line ends and carriage returns, without control sequences."""
    plain = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', written)
    return [line for line in re.split(r'[\r\n]+', plain) if line]


# ------------------------------------------------------------------------------ width

@pytest.mark.parametrize('width', [60, 80, 120])
def test_nothing_wraps(width, tested, tmp_path):
    output_dir = str(tmp_path / 'out')
    status, written = in_terminal('resnet_train.py', *TINY, '--output_dir', output_dir, width=width)
    assert status == 0, written
    bars = [line for line in screen_lines(written) if 'training' in line and '/6' in line]
    assert bars and max(map(len, bars)) <= width
    status, written = in_terminal('resnet_eval.py', '--output_dir', output_dir, width=width)
    matrix = [line for line in screen_lines(written) if line.startswith(('airplane', 'true', 'truck'))]
    assert status == 0 and len(matrix) == 3 and max(map(len, matrix)) <= width
    shutil.copytree(tested, str(tmp_path / 'table'))
    status, written = in_terminal('presets_and_results.py', '--output_dir', tmp_path / 'table', width=width,
                                  tensorflow=False)
    rows = screen_lines(written)[:2]
    assert status == 0 and max(map(len, rows)) <= width
    assert all(word in rows[0] for word in ('run', 'preset', 'test', 'state'))
    assert ('95 % interval' in rows[0]) == (width == 120)


def test_a_long_name_does_not_push_the_answers_aside(tested, tmp_path):
    tested = shutil.copytree(tested, str(tmp_path / 'out'))
    short, long = tmp_path / 'a.png', tmp_path / ('b' * 90 + '.png')
    for path in (short, long):
        Image.new('RGB', (9, 9)).save(str(path))
    status, written = in_terminal('resnet_eval.py', '--output_dir', tested, '--images', short, long, width=100)
    assert status == 0, written
    line = next(line for line in screen_lines(written) if 'a.png' in line and '%' in line)
    assert len(line) <= 100
    preset = load_preset(tested)
    assert f'By run {preset.timestamp}: preset 3 (study3, ' in written
    assert f'ResNet8, test accuracy {preset.test_accuracy:.2%}' in written


# ------------------------------------------------------------------------------ a console that breaks

@pytest.mark.parametrize('break_it', ['closed', '/dev/full', 'none'])
def test_a_console_that_breaks_ends_no_training(break_it, tmp_path):
    options = dict(stdout=open('/dev/full', 'w')) if break_it == '/dev/full' else {}
    prepare = 'sys.stdout = sys.stderr = None; ' if break_it == 'none' else ''
    process = run_script('resnet_train.py', *TINY, '--output_dir', tmp_path, popen=True, prepare=prepare, **options)
    if break_it == 'closed':
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == '', err
    preset = load_preset(str(tmp_path))
    assert (preset.status, preset.steps) == ('complete', 6)
    log = (tmp_path / 'runs' / str(preset.timestamp) / 'console.log').read_text()
    assert break_it == 'none' or 'is complete' in log


def test_ctrl_c_after_tee_has_died(tmp_path):
    process = run_script('resnet_train.py', *ENDLESS, '--output_dir', tmp_path, popen=True)
    for line in iter(process.stdout.readline, ''):
        if line.startswith('validation'):
            break
    process.stdout.close()
    process.stdout = None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    preset = load_preset(str(tmp_path))
    assert process.returncode == 130 and err == '' and preset.status == 'interrupted'
    assert checkpoint_steps(preset.run_dir(str(tmp_path)))[-1] == preset.steps >= 10


def test_the_second_ctrl_c_says_what_is_safe(tmp_path):
    slow = ('import resnet, time; whole = resnet.evaluate; '
            'resnet.evaluate = lambda *words: (time.sleep(3), whole(*words))[1]; ')
    process = run_script('resnet_train.py', *ENDLESS, '--output_dir', tmp_path, popen=True, prepare=slow)
    for line in iter(process.stdout.readline, ''):
        if line.startswith('validation  step 20 '):  # step 10 is saved
            break
    process.send_signal(signal.SIGINT)
    for line in iter(process.stdout.readline, ''):
        if line.startswith('Stopping'):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    preset = load_preset(str(tmp_path))
    assert process.returncode == 130 and preset.steps >= 10
    assert f'What was saved of step {preset.steps:,} is whole' in out
    assert f'--resume {preset.timestamp} --output_dir {tmp_path}' in out
    assert state(preset) == 'interrupted'  # nobody is at it any more


@pytest.mark.parametrize('signals, ignored, ends', [
    (['SIGHUP'], True, False), (['SIGTERM', 'SIGHUP'], False, True), (['SIGHUP', 'SIGTERM'], False, True)])
def test_signals(signals, ignored, ends, tmp_path):
    """nohup is respected; what a closing session sends after the first signal does not break off the last save."""
    prepare = 'import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); ' if ignored else ''
    process = run_script('resnet_train.py', *ENDLESS, '--output_dir', tmp_path, popen=True, prepare=prepare)
    for line in iter(process.stdout.readline, ''):
        if line.startswith('validation'):
            break
    for name in signals:
        process.send_signal(getattr(signal, name))
    if not ends:
        lines = [process.stdout.readline() for _ in range(2)]
        assert all(line.startswith('validation') for line in lines)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    preset = load_preset(str(tmp_path))
    assert process.returncode == 130 and err == '' and 'is interrupted' in out
    assert checkpoint_steps(preset.run_dir(str(tmp_path)))[-1] == preset.steps


# ------------------------------------------------------------------------------ several seeds, longer runs

def test_the_same_command_finishes_what_seeds_began(tmp_path):
    flags = (*TINY, '--batch_size', 20, '--max_steps', 100, '--evaluate_every', 20, '--num_epochs', 1000,
             '--seeds', 1, 2, 1, '--output_dir', tmp_path)
    process = run_script('resnet_train.py', *flags, popen=True)
    for line in iter(process.stdout.readline, ''):
        if line.startswith('validation'):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'The same command resumes it and then trains seed 2.' in out, err
    status, out, err = run_script('resnet_train.py', *flags)
    assert status == 0 and 'Resuming run' in out, err
    runs = load_presets(str(tmp_path))
    assert [(run.seed, run.status, run.steps) for run in runs] == [(1, 'complete', 100), (2, 'complete', 100)]
    status, out, err = run_script('resnet_train.py', *flags, tensorflow=False)
    assert status == 0 and out.count('is on record, trained') == 2 and len(load_presets(str(tmp_path))) == 2


def test_a_seed_that_diverges_does_not_end_the_others(tmp_path):
    prepare = ('import resnet_train; rate = resnet_train.learning_rate; resnet_train.learning_rate = '
               'lambda preset, *rest: 1e9 if preset.seed == 1 else rate(preset, *rest); ')
    code = prepare + 'sys.argv[0] = "resnet_train.py"; resnet_train.main(); sys.exit(); '
    status, _, err = run_script('resnet_train.py', *TINY, '--seeds', 3, '--output_dir', tmp_path, prepare='',
                                call=code)
    assert status == 2 and 'error: seed 1: run' in err and 'diverged' in err.splitlines()[-1]
    assert [(run.seed, run.status) for run in load_presets(str(tmp_path))] == [
        (0, 'complete'), (1, 'diverged'), (2, 'complete')]


def test_a_run_is_extended(trained, tmp_path):
    output_dir = str(tmp_path / 'copied')
    shutil.copytree(trained[0], output_dir)
    timestamp = load_preset(output_dir).timestamp
    flags = ('--resume', timestamp, '--output_dir', output_dir)
    status, _, err = run_script('resnet_train.py', *flags, tensorflow=False)
    assert status == 2 and 'it is at its end; a larger --num_epochs or --max_steps extends it' in err
    status, out, err = run_script('resnet_train.py', *flags, '--max_steps', 9)
    assert status == 0 and f'Resuming run {timestamp} at step 6 of 9' in out, err
    straight = str(tmp_path / 'straight')
    assert run_script('resnet_train.py', *TINY, '--seed', 5, '--max_steps', 9, '--output_dir', straight)[0] == 0
    ends = []
    for folder in (output_dir, straight):
        preset = load_preset(folder)
        reader = tf.train.NewCheckpointReader(preset.checkpoint_path(folder, 9))
        ends.append({name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.parametrize('preset, values, flags, message', [
    (0, dict(steps=6, max_steps=6), ['--max_steps', '1'], '1 steps are no more than the 6 that it has'),
    (0, dict(steps=4224), ['--num_epochs', '6'], 'it is at its end; a larger --num_epochs or --max_steps extends it'),
    (1, dict(steps=None), [], 'its record does not say how many steps it was trained; start anew from its weights with '
                              '--init_from 7 --seed 0'),
    (1, dict(steps=None), ['--num_epochs', '300'], 'its record does not say how many steps it was trained'),
    (0, dict(steps=4224), ['--max_steps', '0'], '4,224 steps are no more than the 4,224 that it has'),
    (0, dict(steps=6, max_steps=6), ['--lr', '0.5'], 'was started with lr 0.1, and is resumed with it')])
def test_a_finished_run_is_not_lost_to_flags(preset, values, flags, message, tmp_path):
    run = make_preset(preset, timestamp=7, status='complete', finished=True, test_accuracy=0.5, **values)
    run.save(str(tmp_path))
    status, _, err = run_script('resnet_train.py', '--resume', 7, *flags, '--output_dir', tmp_path, tensorflow=False)
    assert status == 2 and message in err, err
    assert vars(load_preset(str(tmp_path))) == vars(run)


def test_more_epochs_lift_the_preset_s_own_end():
    run = make_preset('paper20', timestamp=7, status='complete', steps=64000)
    resnet_train._extend(run, {'num_epochs': 300})
    assert run.length() == 300 * 352


@pytest.mark.parametrize('flags', [[], ['--num_epochs', 9], ['--max_steps', 3000]])
def test_a_schedule_that_ends_at_0_is_not_extended(flags, tmp_path):
    run = make_preset('fast', timestamp=7, status='complete', steps=1408)
    run.save(str(tmp_path))
    status, _, err = run_script('resnet_train.py', '--resume', 7, *flags, '--output_dir', tmp_path, tensorflow=False)
    assert status == 2 and 'its learning rate falls to 0 at the end of its 8 epochs' in err
    assert err.endswith('with --init_from 7 --seed 0\n')


def test_training_from_the_weights_of_another_run(trained, tmp_path):
    output_dir = str(tmp_path / 'copied')
    shutil.copytree(trained[0], output_dir)
    source = load_preset(output_dir)
    flags = (*TINY, '--max_steps', 1, '--lr', 1e-9, '--init_from', source.timestamp, '--output_dir', output_dir)
    status, _, err = run_script('resnet_train.py', *flags, tensorflow=False)
    assert status == 2 and (f'run {source.timestamp} was trained on most of the images that another seed validates on: '
                            'go on from its weights with --seed 5') in err
    status, _, err = run_script('resnet_train.py', *flags, '--seed', 5)
    assert status == 0, err
    run = load_preset(output_dir)
    assert run.init_from == source.timestamp != run.timestamp
    kernels = [tf.train.NewCheckpointReader(preset.checkpoint_path(output_dir, step)).get_tensor('init/init_conv/DW')
               for preset, step in ((source, source.early_stopping_epoch), (run, 1))]
    np.testing.assert_allclose(*kernels, atol=1e-6)
    status, _, err = run_script('resnet_train.py', '--preset', 4, '--max_steps', 1, '--init_from', source.timestamp,
                                '--seed', 5, '--output_dir', output_dir)
    assert status == 2 and 'do not fit a ResNet56' in err and len(err.splitlines()) == 1
    source.update(dict(num_residual_units=2, model='ResNet14'))  # a deeper one has all variables of a shallower
    source.save(output_dir)
    status, _, err = run_script('resnet_train.py', *flags, '--seed', 5)
    assert status == 2 and 'a ResNet14, do not fit a ResNet8' in err and len(err.splitlines()) == 1


@pytest.mark.parametrize('flags, message', [
    (['--lr_milestones', '100,200', '--preset', '1'], 'lr_milestones have no effect where lr_decay is 1'),
    (['--preset', 'fast', '--momentum', '0.9999'], "Muon's weight decay, lr * l2_reg_lambda / (1 - momentum), is 4 a"),
    (['--seeds', '2', '--resume'], '--seeds, --init_from and several presets start runs, --resume resumes one'),
    (['--preset', '0', '3', '--resume'], '--seeds, --init_from and several presets start runs, --resume resumes one'),
    (['--init_from', '9'], 'there are no runs in')])
def test_overrides_without_effect_are_refused(flags, message, tmp_path):
    status, _, err = run_script('resnet_train.py', *flags, '--output_dir', tmp_path, tensorflow=False)
    assert status == 2 and message in err and len(err.splitlines()) == 1, err


def test_the_length_can_be_lifted():
    assert make_preset('paper20').length() == 64000
    assert make_preset('paper20', num_epochs=300).length() == 300 * 352
    assert make_preset('paper20', max_steps=0).length() == 182 * 352


@pytest.mark.parametrize('overrides, words', [
    (dict(number=1), 'learning rate 0.1, constant, L2 0.001'),
    (dict(number=2), 'learning rate 0.1 x 0.96 every 24,000 steps'),
    (dict(number='paper110'), 'learning rate 0.1 after 1 epoch of warm-up, then x 0.1 at steps 32,000, 48,000'),
    (dict(number='fast'), 'learning rate 0.8, linearly to 0'),
    (dict(number='standard'), 'learning rate 0.4 after 5 epochs of warm-up, then linearly to 0'),
    (dict(number='fast', schedule='cosine'), 'learning rate 0.8, to 0 as a cosine')])
def test_the_recipe_in_words(overrides, words):
    assert words in describe_recipe(make_preset(**overrides))


# ------------------------------------------------------------------------------ one set of words, one way to name a run

def test_states_and_remarks():
    run = dict(number=0, timestamp=5, steps=4224)
    for values, words in ((dict(status='training'), 'in training'), (dict(status='interrupted'), 'interrupted'),
                          (dict(status='diverged'), 'diverged'), (dict(status='complete'), 'trained'),
                          (dict(status='complete', finished=True, test_accuracy=0.5), 'tested')):
        preset = make_preset(**run, **values)
        assert state(preset) == words and remark(preset) == ('' if words == 'tested' else words)
        preset.update(dict(steps=99))  # on its way, or all that there will be
        assert remark(preset) == {'trained': 'trained, shortened', 'tested': 'shortened'}.get(words, words)
    tested = dict(finished=True, test_accuracy=0.5)
    both = make_preset(**run, status='interrupted', **tested)
    assert state(both) == remark(both) == 'interrupted'
    assert remark(make_preset(**dict(run, steps=99), status='interrupted', **tested)) == 'interrupted, shortened'


def test_shortened_is_by_the_preset_s_own_length():
    assert not is_shortened(make_preset(0, max_steps=4224, steps=4224))
    assert is_shortened(make_preset('standard', num_epochs=40, steps=14080))
    assert not is_shortened(make_preset('standard', batch_size=64, steps=35200))
    assert not is_shortened(make_preset('paper20', steps=64000)) and is_shortened(make_preset('paper20', steps=63999))


def test_differences_tell_recipes_apart():
    tuned = make_preset('fast', init_from=7)
    assert differences(tuned) == 'init_from 7' and recipe(tuned) != recipe(make_preset('fast'))
    assert recipe(make_preset('fast', seed=1, max_steps=1408)) == recipe(make_preset('fast'))
    assert vars(make_preset('fast', schedule='linear')) == vars(make_preset('fast'))
    assert differences(make_preset('fast', seed=3, mixed_precision=True)) == ''
    assert differences(make_preset('standard', muon_lr=0, label_smoothing=0)) == 'muon_lr 0, label_smoothing 0'
    assert differences(make_preset(0, max_steps=4224)) == ''
    assert differences(make_preset(0, max_steps=9)) == 'max_steps 9'


def test_ways_to_name_a_run(tmp_path):
    for timestamp, accuracy in ((1795558284, 0.9), (1795558300, 0.8), (1695558284, None)):
        make_preset(0, timestamp=timestamp, test_accuracy=accuracy, finished=accuracy is not None).save(str(tmp_path))
    for name, timestamp in (('runs/1795558284', 1795558284), ('runs/1795558284/', 1795558284), ('16', 1695558284),
                            ('best', 1795558284), ('newest', 1795558300), (1795558300, 1795558300)):
        assert load_preset(str(tmp_path), name).timestamp == timestamp
    with pytest.raises(InputError, match='several runs begin with 17: 1795558284, 1795558300'):
        load_preset(str(tmp_path), '17')


def test_commands_to_type_next(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT_DIR)
    assert command('resnet_eval.py', '--timestamp', 7) == 'python resnet_eval.py --timestamp 7'
    folder = str(tmp_path / 'with spaces')
    line = command('resnet_eval.py', '--timestamp', 7, output_dir=folder, data_dir='/x')
    assert shlex.split(line) == ['python', 'resnet_eval.py', '--timestamp', '7', '--output_dir', folder,
                                 '--data_dir', '/x']
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command('for_report'))[1] == os.path.join(PROJECT_DIR, 'for_report')


def test_json_of_the_table_of_a_test_and_of_images(tested, tmp_path):
    tested = shutil.copytree(tested, str(tmp_path / 'out'))
    Image.new('RGB', (9, 9)).save(str(tmp_path / 'a.png'))
    preset = load_preset(tested)
    preset.update(dict(log_device_placement=True))  # TensorFlow would print the places of all operations
    preset.save(tested)
    status, out, err = run_script('presets_and_results.py', '--json', '--output_dir', tested, tensorflow=False)
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, '') and row['timestamp'] == preset.timestamp and row['state'] == 'tested, shortened'
    assert row['test_accuracy'] == preset.test_accuracy and len(row['test_interval']) == 2
    assert row['test_accuracy_mirrored'] == preset.test_accuracy_mirrored is not None
    status, out, err = run_script('resnet_eval.py', '--json', '--timestamp', preset.timestamp, '--output_dir', tested)
    (answer,) = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, '') and answer['test_accuracy'] == preset.test_accuracy
    assert answer['test_accuracy_mirrored'] == preset.test_accuracy_mirrored
    predictions = load_predictions([preset], tested)[preset.timestamp]
    for k, accuracy in enumerate(answer['accuracy_by_class'].values()):
        assert accuracy == (predictions[1] == k)[predictions[0] == k].mean()
    status, out, err = run_script('resnet_eval.py', '--json', '--output_dir', tested, tensorflow=False)
    assert (status, out) == (0, '') and 'No run is left to test' in err
    status, out, err = run_script('resnet_eval.py', '--json', '--images', tmp_path / 'a.png', '--output_dir', tested)
    (answer,) = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, '') and answer['image'].endswith('a.png')
    assert sum(answer['probabilities'].values()) == pytest.approx(1, abs=1e-4)


# ------------------------------------------------------------------------------ a light repository

def test_without_runs_there_is_nothing_to_trim(tmp_path):
    with pytest.raises(InputError, match='there are no runs in'):
        resnet_train.trim(str(tmp_path))


def test_a_trimmed_run_keeps_what_it_is_worth(tested, tmp_path):
    output_dir = str(tmp_path / 'out')
    shutil.copytree(tested, output_dir)
    first = load_preset(output_dir)
    status, _, err = run_script('resnet_train.py', *TINY, '--output_dir', output_dir)  # another run of this network
    assert status == 0, err
    second = load_preset(output_dir)
    status, out, _ = run_script('resnet_train.py', '--trim', '--output_dir', output_dir)
    assert status == 0 and f'Run {second.timestamp}: left as it is, trained' in out
    assert run_script('resnet_eval.py', '--output_dir', output_dir)[0] == 0
    before = {run.timestamp: _read(run, output_dir, 'test_predictions.csv') for run in (first, second)}
    assert run_script('resnet_train.py', '--trim', '--output_dir', output_dir)[0] == 0
    for run in (first, second):
        assert checkpoint_steps(run.run_dir(output_dir)) == [run.early_stopping_epoch]
        reader = tf.train.NewCheckpointReader(run.checkpoint_path(output_dir, run.early_stopping_epoch))
        names = set(reader.get_variable_to_shape_map())
        assert 'logit/DW' in names and 'global_step' in names and not any('Momentum' in name for name in names)
        assert run_script('resnet_eval.py', '--timestamp', run.timestamp, '--output_dir', output_dir)[0] == 0
        assert _read(run, output_dir, 'test_predictions.csv') == before[run.timestamp]
    graphs = [any(event.graph_def for event in _events(run, output_dir)) for run in (first, second)]
    curves = [sum(bool(event.summary.value) for event in _events(run, output_dir, 'dev')) for run in (first, second)]
    assert graphs == [True, False] and curves == [3, 3]
    status, _, err = run_script('resnet_train.py', '--resume', first.timestamp, '--max_steps', 9,
                                '--output_dir', output_dir)
    assert status == 2 and 'cannot be resumed' in err and len(err.splitlines()) == 1

    # A kill came between the two files of a checkpoint: the index that belongs to the new data is still aside.
    index = first.checkpoint_path(output_dir, first.early_stopping_epoch) + '.index'
    os.rename(index, os.path.join(os.path.dirname(index), 'trimmed.index'))
    with open(index, 'wb') as file:
        file.write(b'of the old data')
    resnet_train.trim(output_dir, first.timestamp)
    tf.train.NewCheckpointReader(index[:-len('.index')]).get_tensor('logit/DW')
    assert not [name for name in os.listdir(os.path.dirname(index)) if name.startswith('trimmed')]


def _read(run, output_dir, name):
    with open(os.path.join(run.run_dir(output_dir), name)) as file:
        return file.read()


def _events(run, output_dir, name='train'):
    folder = os.path.join(run.run_dir(output_dir), 'summaries', name)
    (path,) = os.listdir(folder)
    return list(tf.train.summary_iterator(os.path.join(folder, path)))


def test_only_a_run_s_own_checkpoints_are_removed(trained, tmp_path):
    output_dir = str(tmp_path / 'out')
    shutil.copytree(trained[0], output_dir)
    preset = load_preset(output_dir)
    folder = os.path.join(preset.run_dir(output_dir), 'checkpoints')
    strangers = ['my-thesis.docx', 'model-final.index', 'notes-1.txt', 'model-3.h5']
    for name in strangers + ['model-1.index', 'resume-1.data-00000-of-00001']:
        with open(os.path.join(folder, name), 'w'):
            pass
    status, _, err = run_script('resnet_train.py', '--resume', preset.timestamp, '--max_steps', 9,
                                '--output_dir', output_dir)
    assert status == 0, err
    assert set(strangers) <= set(os.listdir(folder))
    assert not {'model-1.index', 'resume-1.data-00000-of-00001'} & set(os.listdir(folder))


# ------------------------------------------------------------------------------ help, show, log

def test_help_tells_ranges_and_defaults():
    status, out, err = run_script('resnet_train.py', '--preset', 'fast', '--help', tensorflow=False)
    text = ''.join(out.split())  # argparse breaks lines at hyphens too
    assert (status, err) == (0, '')
    for part in ('a number from 1e-09 to 100; default: 0.8', 'true or false; default: True', '--nesterov [BOOL]',
                 'step, one-cycle (or linear) or cosine; default: one-cycle', 'seed of the split'):
        assert part.replace(' ', '') in text, part


def test_help_tells_what_is_trained_where_no_preset_is_named():
    _, out, _ = run_script('resnet_train.py', '--help', tensorflow=False)
    assert 'images per training step (a whole number from 1 to 45000; default: 64)' in ' '.join(out.split())


def test_a_missing_package_is_a_line():
    status, out, err = run_script('resnet_train.py', '--help', prepare='', call=(
        'sys.modules.pop("data_helpers"); sys.modules["scipy"] = None; '
        f'runpy.run_path({os.path.join(PROJECT_DIR, "resnet_train.py")!r}, run_name="__main__")'))
    assert (status, out) == (2, '') and 'pip install -r requirements.txt' in err and len(err.splitlines()) == 1


def test_show_says_that_a_schedule_is_cut_short():
    _, out, _ = run_script('resnet_train.py', '--preset', 'fast', '--max_steps', 20, '--show')
    assert '20 steps, 0.114 epochs; cut short: the learning rate falls over 1,408 steps' in out


def test_show_prints_the_recipe_and_ends(tmp_path):
    status, out, err = run_script('resnet_train.py', '--preset', 'fast', '--nesterov', '--show',
                                  '--output_dir', tmp_path)
    assert (status, err) == (0, '') and os.listdir(str(tmp_path)) == []
    for part in ('Preset 6 (fast): ResNet20 (n = 3), 269,722 parameters', '1,408 steps', 'linearly to 0', 'nesterov'):
        assert part in out


def test_a_bare_switch_is_true():
    _, out, _ = run_script('resnet_train.py', '--preset', 3, '--nesterov', '--show')
    assert re.search(r'nesterov +True', out)


def test_each_run_keeps_its_console_log(trained):
    output_dir, out, _ = trained
    preset = load_preset(output_dir)
    with open(os.path.join(preset.run_dir(output_dir), 'console.log'), encoding='utf-8') as file:
        log = file.read()
    assert log in out and log.count('validation  step') == 3 and 'is complete' in log and '\r' not in log


def test_the_record_names_the_commit(trained, tmp_path, monkeypatch):
    assert load_preset(trained[0]).git_commit == git_commit()

    def git(*words):
        return subprocess.check_output(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(tmp_path)]
                                       + list(words), universal_newlines=True, stderr=subprocess.DEVNULL).strip()
    monkeypatch.setattr(resnet_train, 'PROJECT_DIR', str(tmp_path))
    assert git_commit() is None
    git('init')
    (tmp_path / 'resnet.py').write_text('1')
    (tmp_path / 'INFOS').mkdir()
    (tmp_path / 'INFOS' / 'train_overall.txt').write_text('1')
    git('add', '-A')
    git('commit', '-m', 'first')
    assert git_commit() == git('rev-parse', 'HEAD')
    (tmp_path / 'INFOS' / 'train_overall.txt').write_text('2')  # as a training changes it
    assert git_commit() == git('rev-parse', 'HEAD')
    (tmp_path / 'resnet.py').write_text('2')
    assert git_commit() == git('rev-parse', 'HEAD') + ' with changes'
    (tmp_path / 'deeper').mkdir()
    monkeypatch.setattr(resnet_train, 'PROJECT_DIR', str(tmp_path / 'deeper'))
    assert git_commit() is None  # the repository is somebody else's
