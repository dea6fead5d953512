"""What is on disk at any moment: a training broken off at every single write, and what a resumed run keeps."""
import contextlib
import os
import re
import shutil
import time

import numpy as np
import pytest

import data_helpers
import resnet
import resnet_eval
import resnet_train
import sample
import torture
from data_helpers import InputError
from presets_and_results import (MODEL, RESUME, Preset, best_checkpoint, check_output_dir, checkpoint_steps,
                                 load_preset, locked, make_preset, read_preset)
from resnet import tf
from resnet_train import Checkpoints, Curves, Run, train

WRITES = ((Preset, 'save'), (Preset, 'log'), (Checkpoints, 'save'), (Checkpoints, 'prune'), (Curves, 'flush'))
STEPS = dict(batch_size=90, max_steps=5, evaluate_every=2, checkpoint_every=1, num_checkpoints=1)


def begun(output_dir, **overrides):
    """Trains preset 0 on the sample; returns its Preset."""
    return train(make_preset(0, **dict(STEPS, **overrides)), sample.SAMPLE_DIR, str(output_dir))


def resumed(output_dir, **changes):
    preset = load_preset(str(output_dir))
    preset.update(changes)
    return train(preset, sample.SAMPLE_DIR, str(output_dir), resume=True)


def copy_before_writes(output_dir, copies, monkeypatch):
    """Copies output_dir, before each write, to copies / the number of the write: what a kill there would leave.

    Returns the list of the writes, which grows with them.
    """
    writes = []
    for owner, name in WRITES:
        def write(self, *values, _write=getattr(owner, name), _name=name, **options):
            if os.path.exists(str(output_dir)):
                shutil.copytree(str(output_dir), str(copies / str(len(writes))))
            writes.append(_name)
            return _write(self, *values, **options)
        monkeypatch.setattr(owner, name, write)
    return writes


def test_a_kill_at_any_write_changes_nothing_in_the_end(cifar10, tmp_path):
    undisturbed = tmp_path / 'undisturbed'
    with pytest.MonkeyPatch.context() as patch:
        writes = copy_before_writes(undisturbed, tmp_path, patch)
        begun(undisturbed, max_steps=3)
    assert len(writes) > 12 and set(writes) == {'save', 'log', 'prune', 'flush'}
    steps = set()
    for number in range(2, len(writes)):  # from the first record on
        output_dir = str(tmp_path / str(number))
        left = load_preset(output_dir)
        steps.add(left.steps)
        if left.status != 'complete':
            resumed(output_dir)
        torture.compare(str(undisturbed), output_dir)
    assert len(steps) == 4  # none, 1, 2 and 3


def test_crash_recovery_saves_come_by_the_clock(cifar10, tmp_path, monkeypatch):
    saves = []
    save = Run.save
    monkeypatch.setattr(Run, 'save', lambda run, step, kind: (saves.append((step, kind)), save(run, step, kind)))
    begun(tmp_path / 'often', evaluate_every=9, checkpoint_every=9, checkpoint_minutes=0)
    assert saves == [(1, RESUME), (2, RESUME), (3, RESUME), (4, RESUME), (5, MODEL)]
    del saves[:]
    begun(tmp_path / 'seldom', evaluate_every=9, checkpoint_every=9)
    assert saves == [(5, MODEL)]
    del saves[:]
    begun(tmp_path / 'between', evaluate_every=9, checkpoint_every=2)
    assert saves == [(2, RESUME), (4, RESUME), (5, MODEL)]


def test_a_save_without_a_validation_gives_the_same_figures(cifar10, tmp_path):
    """It recomputes no statistics, and nothing depends on whether it did."""
    seldom = dict(evaluate_every=2, checkpoint_every=9)
    first, second = begun(tmp_path / 'a', **seldom), begun(tmp_path / 'b', **dict(seldom, checkpoint_every=1))
    assert (first.val_accuracy, first.early_stopping_epoch) == (second.val_accuracy, second.early_stopping_epoch)
    ends = [torture.checkpoints(run.run_dir(str(tmp_path / name)))[5] for run, name in ((first, 'a'), (second, 'b'))]
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_clock_that_steps_back_changes_nothing(cifar10, tmp_path, monkeypatch):
    clock = iter(range(1795630000, 0, -600))  # every look at it is ten minutes earlier
    monkeypatch.setattr(resnet_train.time, 'time', lambda: float(next(clock)))
    preset = begun(tmp_path, checkpoint_minutes=0, checkpoint_every=9)
    assert preset.status == 'complete' and 0 < preset.training_time < 10 and preset.images_per_second > 0


def test_minutes_count_from_the_start(cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(resnet_train, '_check_hardware', lambda *words: time.sleep(2))
    assert begun(tmp_path).training_time > 2 / 60


def test_elapsed_time_is_kept_over_a_resume(cifar10, tmp_path):
    preset = begun(tmp_path)
    preset.update(dict(status='interrupted', training_time=50.0))
    preset.save(str(tmp_path))
    assert 50 < resumed(tmp_path, max_steps=6).training_time < 55


def test_a_run_that_another_process_resumed_is_left_alone(cifar10, tmp_path):
    preset = begun(tmp_path)
    preset.update(dict(status='interrupted', max_steps=9))
    preset.save(str(tmp_path))
    stale = load_preset(str(tmp_path))
    resumed(tmp_path)
    with pytest.raises(InputError, match='was resumed by another process in the meantime'):
        train(stale, sample.SAMPLE_DIR, str(tmp_path), resume=True)
    assert load_preset(str(tmp_path)).steps == 9


def test_a_run_that_is_trained_further_is_no_longer_tested(cifar10, tmp_path):
    preset = begun(tmp_path)
    preset.update(dict(finished=True, test_accuracy=0.5, test_accuracy_mirrored=0.6))
    preset.save(str(tmp_path))
    run = resumed(tmp_path, max_steps=6)
    assert (run.finished, run.test_accuracy, run.test_accuracy_mirrored) == (False, None, None)


def test_a_test_of_a_run_that_was_trained_further_is_not_recorded(cifar10, tmp_path):
    preset = begun(tmp_path)
    images, labels = data_helpers.load(sample.SAMPLE_DIR, data_helpers.TEST_FILES)
    checkpoint = best_checkpoint(preset, str(tmp_path))
    stale = load_preset(str(tmp_path))
    preset.update(dict(early_stopping_epoch=preset.early_stopping_epoch + 1))
    preset.save(str(tmp_path))
    with pytest.raises(InputError, match='was trained further in the meantime; test it again'):
        resnet_eval.test(stale, checkpoint, images, labels, str(tmp_path))
    assert not load_preset(str(tmp_path)).finished


def test_a_run_that_is_trained_further_before_its_turn_is_tested_as_it_then_is(cifar10, tmp_path, monkeypatch):
    preset = begun(tmp_path)
    preset.update(dict(val_accuracy=0.0))  # so that the next validation is the best, and this checkpoint goes
    preset.save(str(tmp_path))
    load = data_helpers.load

    def meanwhile(*places):
        monkeypatch.setattr(data_helpers, 'load', load)
        resumed(tmp_path, max_steps=8)
        return load(*places)

    monkeypatch.setattr(data_helpers, 'load', meanwhile)
    resnet_eval.main(['--output_dir', str(tmp_path), '--data_dir', sample.SAMPLE_DIR])
    tested = load_preset(str(tmp_path))
    assert tested.finished and tested.steps == 8 and tested.early_stopping_epoch > 5


def test_a_training_that_was_killed_is_no_longer_in_training_once_tested(cifar10, tmp_path, capsys):
    preset = begun(tmp_path)
    preset.update(dict(status='training', early_stopping_epoch=None))  # as before the first checkpoint's record
    preset.save(str(tmp_path))
    resnet_eval.main(['--output_dir', str(tmp_path), '--data_dir', sample.SAMPLE_DIR])
    tested = read_preset(preset.pickle_path(str(tmp_path)))
    assert tested.finished and tested.status == 'interrupted'
    line = (tmp_path / 'INFOS' / 'eval_overall.txt').read_text().splitlines()[-1]
    assert '\tinterrupted\t' in line and '\ttraining\t' not in line
    assert capsys.readouterr().err == ''  # no best checkpoint is missed, where none is on record


def test_runs_without_a_checkpoint_are_named_with_the_way_out(cifar10, tmp_path, capsys):
    preset = begun(tmp_path)
    shutil.rmtree(os.path.join(preset.run_dir(str(tmp_path)), 'checkpoints'))
    flags = ['--output_dir', str(tmp_path), '--data_dir', sample.SAMPLE_DIR]
    preset.update(dict(status='training'))
    preset.save(str(tmp_path))
    for held, message in ((True, 'it is in training: test it later'), (False, 'train it with: python')):
        with locked(preset, str(tmp_path)) if held else contextlib.ExitStack(), pytest.raises(SystemExit):
            resnet_eval.main(flags)
        assert message in capsys.readouterr().err
    preset.update(dict(status='complete'))
    preset.save(str(tmp_path))
    with pytest.raises(SystemExit):
        resnet_eval.main(flags)
    assert 'bring it back, or train another run' in capsys.readouterr().err
    preset.update(dict(finished=True, test_accuracy=0.5))
    preset.save(str(tmp_path))
    resnet_eval.main(flags)
    assert capsys.readouterr().out == 'No run is left to test\n'
    preset.update(dict(status='diverged', finished=False))
    preset.save(str(tmp_path))
    capsys.readouterr()
    resnet_eval.main(flags)
    assert capsys.readouterr().out == 'No run is left to test\n'


def test_where_the_best_checkpoint_is_gone_the_latest_is_tested(cifar10, tmp_path, capsys):
    preset = begun(tmp_path, evaluate_every=1, num_checkpoints=9)
    run_dir = preset.run_dir(str(tmp_path))
    preset.update(dict(early_stopping_epoch=1))
    preset.save(str(tmp_path))
    folder = os.path.join(run_dir, 'checkpoints')
    for name in os.listdir(folder):
        if re.match(r'model-1\.', name):
            os.unlink(os.path.join(folder, name))
    steps = checkpoint_steps(run_dir)
    assert best_checkpoint(preset, str(tmp_path)) == preset.checkpoint_path(str(tmp_path), 5) and steps[-1] == 5
    assert 'step 1, is not there; taking the latest, step 5' in capsys.readouterr().err
    resnet_eval.main(['--output_dir', str(tmp_path), '--data_dir', sample.SAMPLE_DIR])
    assert capsys.readouterr().err.count('taking the latest') == 1


def test_a_diverged_run_resumes_from_its_good_checkpoint_at_a_lower_rate(cifar10, tmp_path):
    preset = begun(tmp_path)
    preset.update(dict(status='diverged', max_steps=7))
    preset.save(str(tmp_path))
    flags = dict(preset=None, seeds=None, init_from=None, output_dir=str(tmp_path), resume=preset.timestamp)
    for rates, message in (({'lr': '0.2'}, 'diverged with lr 0.1: --lr must be lower, and above 0'),
                           ({}, 'diverged, and would again: resume it with a lower --lr$'),
                           ({'lr': '0.1'}, 'diverged, and would again: resume it with a lower --lr$')):
        with pytest.raises(InputError, match=message):
            resnet_train._to_resume(flags, rates)
    run = resnet_train._to_resume(flags, {'lr': '0.01'})
    assert (run.lr, run.rate_history) == (0.01, 'lr 0.1 to step 5')
    assert train(run, sample.SAMPLE_DIR, str(tmp_path), resume=True).status == 'complete'


def test_a_lower_rate_leaves_the_optimizer_as_it_is(tmp_path):
    check_output_dir(str(tmp_path))
    make_preset('fast', timestamp=7, status='diverged', steps=704).save(str(tmp_path))
    flags = dict(preset=None, seeds=None, init_from=None, output_dir=str(tmp_path), resume=7)
    with pytest.raises(InputError, match='diverged with muon_lr 0.03: --muon_lr must be lower, and above 0'):
        resnet_train._to_resume(flags, {'muon_lr': '0'})
    run = resnet_train._to_resume(flags, {'muon_lr': '0.01'})
    assert (run.lr, run.muon_lr, run.rate_history) == (0.8, 0.01, 'muon_lr 0.03 to step 704')


@pytest.mark.parametrize('first, then', [(tf.bfloat16, tf.float16), (tf.float16, tf.bfloat16)])
def test_a_run_goes_on_where_16_bits_are_others(first, then, cifar10, tmp_path, monkeypatch):
    """As on a GPU, after a processor: float16 has a loss scale, bfloat16 has none."""
    preset = make_preset(0, **dict(STEPS, mixed_precision=True, max_steps=2))
    for kind in (first, then):
        monkeypatch.setattr(resnet, 'half_precision', lambda: kind)
        train(preset, sample.SAMPLE_DIR, str(tmp_path), resume=preset.timestamp is not None)
        held = tf.train.NewCheckpointReader(preset.checkpoint_path(str(tmp_path), preset.steps))
        assert held.has_tensor('loss_scale/scale') == (kind == tf.float16)
        preset.update(dict(max_steps=4))
    assert (preset.status, preset.steps) == ('complete', 4)


def test_a_resume_elsewhere_says_that_results_differ(cifar10, tmp_path, capsys):
    begun(tmp_path, max_steps=1)
    resumed(tmp_path, max_steps=2)
    assert 'by rounding' not in capsys.readouterr().out
    resumed(tmp_path, max_steps=3, tensorflow_version='1.2.3', device='an abacus')
    out = capsys.readouterr().out
    assert 'trained by TensorFlow 1.2.3 on an abacus: from here the results differ by rounding\n' in out
