import collections
import errno
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from data_helpers import InputError, write_atomically
from presets_and_results import (COLUMNS, FIELDS, HYPERPARAMETERS, NAMES, PRESETS, PROJECT_DIR, Preset,
                                 check_output_dir, checked, load_preset, load_presets, locked, make_preset, read_preset,
                                 start_run)

TABLE = {  # the study's
    1: ('ResNet32', 0.1, 1, 0.001, 0.1, 5),
    2: ('ResNet32', 0.1, 0.96, 0.001, 0.1, 5),
    3: ('ResNet20', 0.1, 0.96, 0.001, 0.1, 3),
    4: ('ResNet56', 0.1, 0.96, 0.001, 0.1, 9),
    5: ('ResNet56', 0.1, 0.90, 0.001, 0.1, 9),
}
OLD_COLUMNS = (
    'preset model optimizer activation_function weight_initialization normalization lr lr_decay l2_reg_lambda '
    'relu_leakiness num_residual_units num_classes batch_size num_epochs evaluate_every checkpoint_every '
    'num_checkpoints data_augmentation allow_soft_placement log_device_placement timestamp training_time '
    'early_stopping_epoch val_accuracy test_accuracy finished').split()


def test_linear_is_another_name_of_one_cycle():
    assert checked('schedule', 'linear') == 'one-cycle' == make_preset(0, schedule='linear').schedule


@pytest.mark.parametrize('number', TABLE)
def test_presets_are_the_study_s(number):
    preset = make_preset(number)
    assert (preset.model, preset.lr, preset.lr_decay, preset.l2_reg_lambda, preset.relu_leakiness,
            preset.num_residual_units) == TABLE[number]
    assert (preset.num_classes, preset.batch_size, preset.num_epochs, preset.evaluate_every, preset.checkpoint_every,
            preset.num_checkpoints, preset.data_augmentation) == (10, 128, 200, 100, 100, 3, True)
    assert (preset.optimizer, preset.activation_function, preset.weight_initialization, preset.normalization) == (
        'SGD (Momentum)', 'ReLU', 'He_normal', 'Batch Norm')


def test_every_preset_has_a_name_of_its_own():
    assert make_preset(0).model == 'ResNet8' and list(PRESETS) == list(NAMES) == list(range(14))
    for number, (name, purpose) in NAMES.items():
        assert vars(make_preset(name)) == vars(make_preset(number)) == vars(make_preset(str(number)))
    assert len({name for name, _ in NAMES.values()}) == 14


def test_paper_presets_are_the_paper_s():
    for name, model in (('paper20', 'ResNet20'), ('paper32', 'ResNet32'), ('paper56', 'ResNet56'),
                        ('paper110', 'ResNet110')):
        preset = make_preset(name)
        assert (preset.model, preset.lr, preset.lr_decay, preset.lr_milestones, preset.max_steps, preset.momentum,
                preset.l2_reg_lambda, preset.batch_size, preset.relu_leakiness, preset.nesterov, preset.schedule) == (
            model, 0.1, 0.1, '32000,48000', 64000, 0.9, 0.0001, 128, 0, False, 'step')
        assert preset.num_epochs * 352 >= 64000


def test_columns_begin_as_in_2020():
    assert list(COLUMNS[:26]) == OLD_COLUMNS


@pytest.mark.parametrize('overrides, message', [
    ({'batch_size': 0}, 'batch_size must be a whole number from 1'), ({'batch_size': '1.5'}, 'batch_size'),
    ({'lr': 'abc'}, "lr must be a number .* not 'abc'"), ({'lr': 'nan'}, 'lr'), ({'lr': 'inf'}, 'lr'),
    ({'lr': -1}, 'lr'), ({'lr': 0}, 'lr'), ({'lr_decay': 1.1}, 'lr_decay'), ({'num_residual_units': 0}, 'num_res'),
    ({'num_classes': 9}, 'num_classes'), ({'data_augmentation': 'auto'}, "must be true or false, not 'auto'"),
    ({'mixed_precision': 'maybe'}, "mixed_precision must be true, false or auto, not 'maybe'"),
    ({'seed': -1}, 'seed must be a whole number from 0 to 4294967295'),
    ({'max_steps': -1}, 'max_steps'), ({'max_steps': 1.5}, 'max_steps'), ({'learning_rate': 1}, 'learning_rate'),
    ({'relu_leakiness': [0.1]}, 'relu_leakiness'), ({'device': 7}, 'device must be text')])
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        make_preset(3, **overrides)


def test_overrides_take_text_and_change_the_model():
    preset = make_preset(3, num_residual_units='18', lr='1e-2', data_augmentation='False')
    assert (preset.model, preset.depth, preset.lr, preset.data_augmentation) == ('ResNet110', 110, 0.01, False)
    assert [make_preset('fast', muon_lr=rate).optimizer for rate in ('0.01', '0')] == [
        'Muon, SGD (Momentum)', 'SGD (Momentum)']
    with pytest.raises(InputError, match=r'no preset 99; choose one of 0 \(first\), 1 \(study1\)'):
        make_preset(99)


def test_pickle_round_trip(tmp_path):
    preset = make_preset(4, seed=7)
    check_output_dir(str(tmp_path))
    start_run(preset, str(tmp_path))
    preset.update(dict(val_accuracy=0.5, early_stopping_epoch=300, device='GPU'))
    preset.save(str(tmp_path))
    path = tmp_path / 'INFOS' / 'pickles' / '4_{}.pickle'.format(preset.timestamp)
    assert vars(read_preset(str(path))) == vars(preset)
    assert type(pickle.loads(path.read_bytes())) is Preset  # any program that has the class reads it too
    assert os.listdir(str(path.parent)) == [path.name]


def old_pickle(tmp_path, name='1_1601857360', state=(), **attributes):
    """A pickle as the 2020 scripts left it: no newer attributes, NumPy scalars, protocol 3."""
    old = Preset.__new__(Preset)
    old.__dict__.update(preset=1, model='ResNet32', num_residual_units=5, timestamp='1601857360',
                        val_accuracy=np.float32(0.5), early_stopping_epoch=np.int64(68600), finished=np.bool_(True),
                        test_accuracy=np.float64(0.25))
    vars(old).update(attributes)
    vars(old).update(state)
    path = tmp_path / 'INFOS' / 'pickles' / (name + '.pickle')
    write_atomically(str(path), pickle.dumps(old, protocol=3))
    return path


def test_an_old_pickle_loads_with_numpy_scalars_and_defaults(tmp_path):
    preset = read_preset(str(old_pickle(tmp_path)))
    assert (preset.timestamp, preset.val_accuracy, preset.test_accuracy) == (1601857360, 0.5, 0.25)
    assert preset.early_stopping_epoch == 68600
    assert preset.finished is True and preset.seed == 0 and preset.status is None
    assert type(preset.val_accuracy) is float and type(preset.early_stopping_epoch) is int


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, ('touch {}'.format(self.path),)


@pytest.mark.parametrize('state, message', [
    ({'device': collections.OrderedDict()}, 'collections.OrderedDict'),
    ({'val_accuracy': np.zeros(3)}, r'numpy\.\w*core\.multiarray\._reconstruct'),
    ({'device': ['a']}, 'device is of type list'),
    ({'surprise': 1}, 'surprise'), ({7: 1}, 'keys that are neither text nor bytes'), ({'self': 1}, 'self'),
    ({'batch_size': 10 ** 5000}, 'LONG4'), ({'batch_size': 1 << 99}, 'batch_size is too large a number'),
    ({'a\x1b[2J': []}, r'a\?\[2J is of type list'),
    ({'timestamp': '../../etc'}, 'timestamp'), ({'lr': 'abc'}, 'lr'),
    ({'seed': None}, 'seed must be a whole number .* not None'), ({'val_accuracy': np.complex64(1)}, 'val_accuracy'),
    ({'device': Preset()}, 'device'), ({'device': np.str_('a')}, 'device is no number')])
def test_anything_but_plain_values_is_refused_by_name(state, message, tmp_path, capsys):
    old_pickle(tmp_path, name='1_7', timestamp=7)
    bad = old_pickle(tmp_path, state=state)
    with pytest.raises(InputError, match=message) as error:
        read_preset(str(bad))
    assert str(bad) in str(error.value)
    assert [preset.timestamp for preset in load_presets(str(tmp_path))] == [7]
    assert str(bad) in capsys.readouterr().err


def test_a_pipe_is_no_record(tmp_path, capsys):
    old_pickle(tmp_path, name='1_7', timestamp=7)
    os.mkfifo(str(tmp_path / 'INFOS' / 'pickles' / '1_8.pickle'))  # reading it would wait for ever
    assert [preset.timestamp for preset in load_presets(str(tmp_path))] == [7]
    assert '1_8.pickle is refused: it is no file' in capsys.readouterr().err


def test_a_pickle_runs_no_code(tmp_path):
    for number, value in enumerate([Touch(str(tmp_path / 'touched')), [Touch(str(tmp_path / 'touched'))]]):
        path = old_pickle(tmp_path, device=value)
        with pytest.raises(InputError, match='posix.system|nt.system'):
            read_preset(str(path))
    write_atomically(str(path), pickle.dumps(Touch(str(tmp_path / 'touched'))))
    with pytest.raises(InputError, match='posix.system|nt.system'):
        read_preset(str(path))
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize('content', [
    b'', b'no pickle', b'\x80\x04', pickle.dumps(7), pickle.dumps({'lr': 1}), b'cpresets_and_results\nPreset\n.',
    b'cpresets_and_results\nPreset\n)\x81]b.', b'\x80\x02K\x01r\xff\xff\xff\x7f.', b'x' * (2 << 20),
    b'\x80\x02cpresets_and_results\nPreset\n)\x81})' + b'\x85' * 900000 + b'Nsb.',  # a key that hash() descends into
    b'\x80\x02]' + b'\x8f0' * 200000 + b'.'])
def test_damaged_pickles_are_refused(content, tmp_path):
    path = tmp_path / 'a.pickle'
    path.write_bytes(content)
    with pytest.raises(InputError, match='a.pickle is refused'):
        read_preset(str(path))


def test_loading_by_timestamp(tmp_path):
    with pytest.raises(InputError, match='resnet_train.py --preset 0'):
        load_preset(str(tmp_path))
    old_pickle(tmp_path, name='1_30', timestamp=30)
    old_pickle(tmp_path, name='2_200', timestamp=200, preset=2)
    assert load_preset(str(tmp_path)).timestamp == 200
    assert load_preset(str(tmp_path), '30').timestamp == 30
    with pytest.raises(InputError, match='no run 31; known: 30, 200'):
        load_preset(str(tmp_path), 31)


def test_runs_of_one_second_get_timestamps_of_their_own(tmp_path):
    check_output_dir(str(tmp_path))
    presets = [make_preset(0) for _ in range(5)]
    folders = {start_run(preset, str(tmp_path)) for preset in presets}
    assert len(folders) == 5 == len({preset.timestamp for preset in presets})


@pytest.mark.parametrize('name', ['runs', 'INFOS', os.path.join('INFOS', 'pickles')])
def test_an_output_folder_that_cannot_be_written(name, tmp_path):
    os.makedirs(os.path.dirname(str(tmp_path / 'out' / name)))
    (tmp_path / 'out' / name).write_bytes(b'in the way')
    with pytest.raises(InputError, match='name another with --output_dir'):
        check_output_dir(str(tmp_path / 'out'))


def test_logs(tmp_path):
    preset = make_preset(2)
    preset.update(dict(timestamp=5, val_accuracy=0.86789, device='a\tb\nc'))
    preset.log(str(tmp_path), 'train_overall.txt')
    preset.log(str(tmp_path), 'train_overall.txt')
    lines = (tmp_path / 'INFOS' / 'train_overall.txt').read_text().splitlines()
    assert lines[0].split('\t') == list(COLUMNS) and len(lines) == 3 and lines[1] == lines[2]
    row = dict(zip(COLUMNS, lines[1].split('\t')))
    assert [row[name] for name in ('model', 'lr_decay', 'val_accuracy', 'test_accuracy', 'finished', 'device')] == [
        'ResNet32', '0.96', '0.86789', '', 'False', 'a b c']


def test_a_log_of_fewer_columns_gets_their_names(tmp_path):
    preset = make_preset(2, timestamp=5)
    os.mkdir(str(tmp_path / 'INFOS'))
    path = tmp_path / 'INFOS' / 'train_overall.txt'
    path.write_text('preset\tmodel\n1\tResNet32\n')
    for n in (3, 4):
        preset.log(str(tmp_path), 'train_overall.txt')
        lines = path.read_text().splitlines()
        assert lines[0].split('\t') == list(COLUMNS) and lines[1] == '1\tResNet32' and len(lines) == n


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a'
    write_atomically(str(path), b'old')

    def full(*arguments):
        raise OSError(errno.ENOSPC, 'no space left')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError):
        write_atomically(str(path), b'new')
    assert path.read_bytes() == b'old' and os.listdir(str(tmp_path)) == ['a']


def test_a_record_from_a_notebook_is_data_too(tmp_path):
    """There the class was __main__.Preset."""
    path = old_pickle(tmp_path)
    content = path.read_bytes()
    assert b'presets_and_results' in content
    path.write_bytes(content.replace(b'cpresets_and_results\n', b'c__main__\n'))
    assert read_preset(str(path)).val_accuracy == 0.5


@pytest.mark.parametrize('name, warned', [
    ('1_30 (1).pickle', True), ('1_30_backup.pickle', True), ('._1_30.pickle', False), ('1_30.pickle~', False)])
def test_a_copy_is_no_record(name, warned, tmp_path, capsys):
    old_pickle(tmp_path, name='1_30', timestamp=30, val_accuracy=0.1)
    copy = old_pickle(tmp_path, name='1_31', timestamp=30, val_accuracy=0.9)
    copy.rename(copy.parent / name)
    (run,) = load_presets(str(tmp_path))
    assert run.val_accuracy == 0.1
    err = capsys.readouterr().err
    assert (f'{name} is left out: the record of run 30 has another name' in err) == warned and err.count('\n') == warned


def test_a_killed_training_counts_as_interrupted_and_one_at_work_does_not(tmp_path):
    preset = make_preset(0, status='training')
    check_output_dir(str(tmp_path))
    start_run(preset, str(tmp_path))
    preset.save(str(tmp_path))
    assert load_preset(str(tmp_path)).status == 'interrupted'
    code = (f'import sys, time; sys.path.insert(0, {PROJECT_DIR!r})\n'
            'from presets_and_results import load_preset, locked\n'
            f'preset = load_preset({str(tmp_path)!r})\n'
            f'with locked(preset, {str(tmp_path)!r}): print("held", flush=True); time.sleep(60)')
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b'held\n'
        assert load_preset(str(tmp_path)).status == 'training'
        with pytest.raises(InputError, match='is in use by another process'):
            with locked(preset, str(tmp_path)):
                pass
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize('link', ['', 'checkpoints', 'summaries'])
def test_a_run_folder_that_is_a_link_is_refused(link, tmp_path):
    preset = make_preset(0)
    check_output_dir(str(tmp_path / 'out'))
    folder = start_run(preset, str(tmp_path / 'out'))
    (tmp_path / 'elsewhere').mkdir()
    if not link:
        os.rmdir(folder)
    os.symlink(str(tmp_path / 'elsewhere'), os.path.join(folder, link) if link else folder)
    with pytest.raises(InputError, match='is a symbolic link'):
        with locked(preset, str(tmp_path / 'out')):
            pass


@pytest.mark.parametrize('name', ['a[1]', 'a*', 'a?', 'a\\b'])
def test_a_folder_that_tensorflow_would_glob_is_refused_before_the_first_step(name, tmp_path):
    with pytest.raises(InputError, match='TensorFlow cannot restore checkpoints from a folder with .* in its name'):
        check_output_dir(str(tmp_path / name / 'out'))
    assert os.listdir(str(tmp_path)) == []


def test_a_folder_whose_name_the_locale_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match='in this locale; set PYTHONUTF8=1'):
        check_output_dir(str(tmp_path / 'caf\udcc3\udca9'))  # as Python reads bytes in the locale C
    assert os.listdir(str(tmp_path)) == []


def test_leavings_are_tidied_and_nothing_else(tmp_path):
    check_output_dir(str(tmp_path))
    old = time.time() - 2 * 3600
    empty, locked_only, full, young, recorded = [tmp_path / 'runs' / name for name in ('1', '2', '3', '4', '5')]
    for folder in (empty, locked_only, full, young, recorded):
        folder.mkdir()
    for folder in (locked_only, recorded):
        (folder / '.lock').write_bytes(b'')
    (full / 'thesis.docx').write_bytes(b'mine')
    pickles = tmp_path / 'INFOS' / 'pickles'
    torn = [pickles / name for name in ('0_5.pickle.unfinished-1a2b', '1_6.pickle.unfinished-ff')]
    kept = [pickles / name for name in ('0_5.pickle', '0_5.pickle.zip', 'notes.txt')]
    for path in torn + kept:
        path.write_bytes(b'x')
    for path in [empty, locked_only, locked_only / '.lock', full, recorded] + torn + kept:
        os.utime(str(path), (old, old))
    check_output_dir(str(tmp_path))
    assert sorted(os.listdir(str(tmp_path / 'runs'))) == ['3', '4', '5'] and (full / 'thesis.docx').exists()
    assert sorted(os.listdir(str(pickles))) == sorted(path.name for path in kept)


def test_a_log_without_a_header_keeps_its_first_line(tmp_path):
    (tmp_path / 'INFOS').mkdir()
    path = tmp_path / 'INFOS' / 'train_overall.txt'
    path.write_text('1\tResNet32\n')
    make_preset(2, timestamp=5).log(str(tmp_path), 'train_overall.txt')
    lines = path.read_text().splitlines()
    assert lines[0].split('\t') == list(COLUMNS) and lines[1] == '1\tResNet32' and len(lines) == 3


def test_every_field_is_documented_and_every_flag_is_a_field():
    assert set(HYPERPARAMETERS) < set(FIELDS) and all(field.meaning for field in FIELDS.values())
    assert vars(Preset()) == {name: getattr(Preset, name) for name in COLUMNS}
