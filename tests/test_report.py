"""The report: its statistics against sums made by hand, its workbook and pictures as files."""
import glob
import os
import shutil
import subprocess
import sys

import numpy as np
import openpyxl
import pytest
from PIL import Image

import presets_and_results
from presets_and_results import (COLUMNS, Comparison, best_first, compare, interval, load_predictions, load_presets,
                                 make_preset, mcnemar, over_seeds, read_network, remark, report, save_predictions,
                                 verdict)
from sample import run_script

PICTURES = ['123result.png', 'confusion_matrix.png', 'layer_increase.png', 'lr_decay.png', 'model_graph.png']


# ------------------------------------------------------------------------------ statistics

def test_interval_by_hand():
    # 2 of 4, z^2 = 3.8415, z^2 / n = 0.96036: middle (0.5 + 0.48018) / 1.96036 = 0.5,
    # half sqrt(0.25 * 0.96036 + 0.96036^2 / 4) / 1.96036 = sqrt(0.47067) / 1.96036 = 0.34996.
    assert interval(2, 4) == pytest.approx((0.15004, 0.84996), abs=1e-5)
    # 8,000 of 10,000, z^2 / n = 0.00038415: middle 0.80019207 / 1.00038415 = 0.79988480,
    # half sqrt(0.16 * 0.00038415 + 0.00038415^2 / 4) / 1.00038415 = 0.0078422 / 1.00038415 = 0.0078392.
    assert interval(8000, 10000) == pytest.approx((0.7920456, 0.8077240), abs=1e-6)
    for n in range(1, 100):  # rounding must not leave the accuracy outside
        low, high = interval(n, n)
        assert 0 < low < 1 and high == 1 and interval(0, n)[0] == 0
    assert interval(10, 10)[0] == pytest.approx(0.72247, abs=1e-5)  # 1 / (1 + z^2 / n)


@pytest.mark.parametrize('counts, p', [
    ((0, 0), 1), ((5, 5), 1),
    ((1, 9), 2 * (1 + 10) / 1024),            # 2 * (C(10,0) + C(10,1)) / 2^10
    ((8, 2), 2 * (1 + 10 + 45) / 1024),
    ((0, 6), 2 / 64)])
def test_mcnemar_by_hand(counts, p):
    assert mcnemar(*counts) == pytest.approx(p, abs=1e-12)


def test_comparisons_count_who_alone_was_right():
    labels = np.arange(10) % 10
    runs = [make_preset(0, timestamp=k, finished=True, test_accuracy=0.5) for k in range(4)]
    first, second = labels.copy(), labels.copy()
    first[:1] = 9   # wrong on one image
    second[1:7] = 9  # wrong on six others
    judged = {0: (labels, first), 1: (labels, second), 3: (labels[:5], labels[:5])}
    comparisons = compare(runs, judged)
    assert comparisons == [Comparison(1, 2, 6, 1, pytest.approx(2 * (1 + 7) / 128))]  # others: other images, or none
    assert verdict(comparisons[0]) == '1 and 2 cannot be told apart'
    assert verdict(Comparison(2, 5, 0, 6, 2 / 64)) == '2 and 5 differ beyond chance'


def test_spread_over_seeds():
    def run(seed, accuracy, **values):
        return make_preset(0, **dict(dict(seed=seed, test_accuracy=accuracy, finished=True, status='complete',
                                          timestamp=seed), **values))
    runs = [run(0, 0.70), run(1, 0.72), run(2, 0.74), run(3, 0.1, status='interrupted'), run(4, 0.1, lr=0.2),
            run(5, 0.1, finished=False), run(1, 0.9, timestamp=9)]
    (seeds,) = over_seeds(best_first(runs))  # the second run of seed 1 is better, and does not count
    assert seeds.seeds == [0, 1, 2] and (seeds.low, seeds.high) == (0.70, 0.74)
    assert seeds.mean == pytest.approx(0.72) and seeds.deviation == pytest.approx(0.02)


def test_order_and_remarks():
    runs = [make_preset(0, timestamp=1, val_accuracy=0.9, status='interrupted'),
            make_preset(0, timestamp=2, val_accuracy=0.5, test_accuracy=0.4, finished=True, status='complete'),
            make_preset(0, timestamp=3, val_accuracy=0.4, test_accuracy=0.5, finished=True, status='complete',
                        steps=7, max_steps=7)]
    assert [run.timestamp for run in best_first(runs)] == [3, 2, 1]
    assert [remark(run) for run in best_first(runs)] == ['shortened', '', 'unfinished: interrupted, not tested']
    whole = dict(status='complete', finished=True, test_accuracy=0.9)
    assert remark(make_preset('paper20', steps=64000, **whole)) == ''  # where max_steps is the preset's own
    assert remark(make_preset('paper20', max_steps=5, steps=5, **whole)) == 'shortened'


def test_predictions_that_are_not_the_record_s_are_left_out(tmp_path, capsys):
    labels, predictions = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])
    run = make_preset(0, timestamp=5, finished=True, test_accuracy=0.75)
    save_predictions(run, str(tmp_path), labels, predictions)
    judged = load_predictions([run], str(tmp_path))
    assert np.array_equal(judged[5], (labels, predictions)) and capsys.readouterr().err == ''
    path = tmp_path / 'runs' / '5' / presets_and_results.PREDICTIONS
    for content in (b'label,prediction\n1,1\n', b'label,prediction\n1,1\n2,2\n3,3\n4,77\n', b'\xff', b'', b'a\nb,c\n'):
        path.write_bytes(content)
        assert load_predictions([run], str(tmp_path)) == {} and 'is left out' in capsys.readouterr().err


# ------------------------------------------------------------------------------ files

@pytest.fixture(scope='module')
def reported(tested, tmp_path_factory):
    """Three records, the second hostile in its text, one not finished; the report of them, and what it printed."""
    output_dir = str(tmp_path_factory.mktemp('reported') / 'r')
    shutil.copytree(tested, output_dir)
    other = make_preset(4, timestamp=7, val_accuracy=0.6, steps=100, status='interrupted')
    hostile = make_preset(2, timestamp=8, val_accuracy=0.99, test_accuracy=0.98, finished=True, status='complete',
                          device='=HYPERLINK("http://x")\x07\ufffe\ud800')
    hostile.model = '/../$x'
    for preset in (other, hostile):
        preset.save(output_dir)
    status, out, err = run_script('presets_and_results.py', '--output_dir', output_dir, tensorflow=False)
    assert status == 0 and err == '', err
    return output_dir, out


def test_the_table_is_aligned_and_says_what_is_unfinished(reported):
    output_dir, out = reported
    table = out.split('\n\n')[0].splitlines()
    assert [row.split()[0] for row in table] == ['#', '1', '2', '3']
    assert 'ResNet32' in table[1] and '98.00%' in table[1] and '97.71% to 98.26%' in table[1]
    assert 'shortened' in table[2] and table[3].endswith('unfinished: interrupted, not tested')
    assert len({row.index(' ', 3) for row in table}) <= 2 and len({row.find('%') for row in table[1:]}) == 1
    assert 'No saved predictions to compare: 1.' in out


def test_the_workbook(reported):
    output_dir, _ = reported
    workbook = openpyxl.load_workbook(os.path.join(output_dir, 'for_report', 'evaluation_report.xlsx'))
    runs = workbook['runs']
    header = [cell.value for cell in runs[2]]
    assert header[1:1 + len(COLUMNS)] == list(COLUMNS)
    groups = {cell.value: header[cell.column - 1] for cell in runs[1] if cell.value}
    assert groups == {'setCustomParameters': 'preset', 'setModelParameters': 'lr',
                      'setTrainingParameters': 'batch_size', 'setMiscParameters': 'allow_soft_placement',
                      'results': 'timestamp', 'setRecipeParameters': 'schedule'}
    assert runs.freeze_panes == 'C3' and runs.max_row == 5
    best, tiny, other = [dict(zip(header, row)) for row in runs.iter_rows(min_row=3)]
    assert (best['remark'].value, best['#'].value) == ('best', 1) and best['preset'].font.bold
    assert not tiny['preset'].font.bold and other['test_accuracy'].value is None
    for name, kind in (('lr', float), ('num_residual_units', int), ('val_accuracy', float), ('timestamp', int),
                       ('data_augmentation', bool)):
        assert type(best[name].value) is kind
    assert best['test_accuracy'].number_format == best['test_95_low'].number_format == '0.00%'
    assert best['device'].data_type == 's' and best['device'].value.startswith('=HYPERLINK')
    for column, cell in zip(runs.columns, runs[3]):
        wanted = max(len(str(c.value)) for c in column[1:] if not isinstance(c.value, float))
        assert runs.column_dimensions[cell.column_letter].width >= wanted

    study = workbook.worksheets[1]
    assert study.title == '2020 study'
    rows = {row[0].value: [cell.value for cell in row] for row in study.iter_rows(min_row=3)}
    assert rows[4][3:5] == [0.8812, 0.8659] and rows[4][7:9] == [222.3, 61600] and rows[4][9] == 'not run'
    assert rows[2][9:12] == [8, 0.99, 0.98]
    charts = workbook['charts']
    assert len(charts._charts) == 2
    for chart, column in zip(charts._charts, 'DE'):
        assert [series.xVal.numRef.f for series in chart.series] == [
            "'charts'!${0}$2:${0}$3".format(column), "'charts'!${0}$4:${0}$8".format(column)]
        assert all(series.yVal.numRef.f.startswith("'charts'!$F$") for series in chart.series)
    assert charts['F2'].value == 0.98 and charts['F8'].value == 0.8635


def test_the_pictures_are_grey_and_full(reported):
    output_dir, _ = reported
    assert sorted(os.listdir(os.path.join(output_dir, 'for_report'))) == sorted(PICTURES + ['evaluation_report.xlsx'])
    for name in PICTURES:
        picture = np.asarray(Image.open(os.path.join(output_dir, 'for_report', name)).convert('RGB')).astype(int)
        assert 700 < picture.shape[1] < 1100 and np.ptp(picture, axis=2).max() == 0
        ink = picture.min(2) < 128
        halves = np.array_split(ink, 2, axis=0) + np.array_split(ink, 2, axis=1)
        assert all(half.mean() > 0.002 for half in halves), name
        margin = np.concatenate([ink[:2].ravel(), ink[-2:].ravel(), ink[:, :2].ravel(), ink[:, -2:].ravel()])
        assert not margin.any(), '{} is clipped'.format(name)


def test_running_it_again_changes_nothing(reported, tmp_path, capsys):
    output_dir = str(tmp_path / 'copy')
    shutil.copytree(reported[0], output_dir)
    report(output_dir)  # pictures may come out otherwise in this process
    files = {path: (os.stat(path).st_mtime_ns, open(path, 'rb').read())
             for path in glob.glob(os.path.join(output_dir, '**', '*.*'), recursive=True) if os.path.isfile(path)}
    capsys.readouterr()
    report(output_dir)
    assert capsys.readouterr().out.count('unchanged') == 6
    for path, (changed, content) in files.items():
        assert os.stat(path).st_mtime_ns == changed and open(path, 'rb').read() == content
    make_preset(1, timestamp=9, val_accuracy=0.3).save(output_dir)
    report(output_dir)
    assert 'written    ' + os.path.join(output_dir, 'for_report', 'evaluation_report.xlsx') in capsys.readouterr().out


def test_the_network_is_read_as_it_was_built(tested):
    (preset,) = load_presets(tested)
    stages = {stage.name: stage for stage in read_network(preset, tested)}
    n = {name: stage.parameters for name, stage in stages.items()}
    # Kernels, then beta and gamma: 3*3*in*out, 2*channels each.
    assert n['stem'] == 9 * 3 * 16 and n['group 1'] == 2 * 9 * 16 * 16 + 4 * 16
    assert n['group 2'] == 9 * 16 * 32 + 9 * 32 * 32 + 2 * 16 + 2 * 32
    assert n['group 3'] == 9 * 32 * 64 + 9 * 64 * 64 + 2 * 32 + 2 * 64
    assert n['head'] == 2 * 64 + 64 * 10 + 10 and sum(n.values()) == 75290
    assert [stage.shape for stage in stages.values()] == [
        [32, 32, 16], [32, 32, 16], [16, 16, 32], [8, 8, 64], [10]]
    assert stages['group 2'].units == 1 and stages['group 2'].operations == [
        'batch\nnorm', 'leaky\nReLU', 'conv 3x3\n16 to 32', 'batch\nnorm', 'leaky\nReLU',
        'conv 3x3\n32 to 32\nstride 2', 'pool']


# ------------------------------------------------------------------------------ odd and bad input

def test_many_runs_and_records_without_results(tmp_path, capsys):
    random = np.random.RandomState(0)
    for k in range(60):
        make_preset(k % 6, timestamp=k, val_accuracy=random.rand(), test_accuracy=random.rand(), finished=True,
                    lr_decay=0.8 + 0.01 * (k % 15)).save(str(tmp_path))
    make_preset(0, timestamp=60, finished=True).save(str(tmp_path))
    perfect = make_preset(0, timestamp=61, test_accuracy=1, finished=True, num_classes=12)
    perfect.save(str(tmp_path))
    save_predictions(perfect, str(tmp_path), np.arange(10), np.arange(10))
    shutil.copy(perfect.pickle_path(str(tmp_path)), str(tmp_path / 'INFOS' / 'pickles' / 'copy.pickle'))
    report(str(tmp_path))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) < 62 + 20 and '100.00%' in out and 'unfinished: not tested' in out
    assert err == 'warning: there are two records of run 61 in {}; one is left out\n'.format(
        tmp_path / 'INFOS' / 'pickles')


def test_a_foreign_graph_is_passed_over(tmp_path):
    from resnet import tf
    preset = make_preset(0, timestamp=5)
    with tf.Graph().as_default() as graph:
        with tf.variable_scope('init'):
            tf.nn.conv2d(tf.zeros([1, 8, 8, 3]), tf.get_variable('kernel', [3, 3, 3, 4]), 1, 'SAME')
        tf.summary.FileWriter(os.path.join(preset.run_dir(str(tmp_path)), 'summaries', 'train'), graph).close()
    assert read_network(preset, str(tmp_path)) is None


def test_a_reader_that_leaves_early(reported):
    script = os.path.join(presets_and_results.PROJECT_DIR, 'presets_and_results.py')
    process = subprocess.Popen([sys.executable, script, '--output_dir', reported[0]], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 141


def test_a_run_without_summaries(reported, tmp_path, capsys):
    output_dir = str(tmp_path / 'bare')
    shutil.copytree(os.path.join(reported[0], 'INFOS'), os.path.join(output_dir, 'INFOS'))
    report(output_dir)
    out = capsys.readouterr().out
    for name in ('123result.png: no run has validation', 'confusion_matrix.png: no run has saved',
                 'model_graph.png: no run has the graph'):
        assert 'not drawn  ' + name in out
    assert os.path.exists(os.path.join(output_dir, 'for_report', 'lr_decay.png'))


def test_a_damaged_summary_is_survived(tested, tmp_path, capsys):
    output_dir = str(tmp_path / 'damaged')
    shutil.copytree(tested, output_dir)
    for path in glob.glob(os.path.join(output_dir, 'runs', '*', 'summaries', '*', 'events*')):
        with open(path, 'r+b') as file:
            content = file.read()
            file.seek(len(content) // 2)
            file.write(b'\xff' * 40)
    report(output_dir)
    assert 'lr_decay.png' in capsys.readouterr().out


def test_what_cannot_be_written_is_said(reported, tmp_path, monkeypatch):
    output_dir = str(tmp_path / 'blocked')
    shutil.copytree(os.path.join(reported[0], 'INFOS'), os.path.join(output_dir, 'INFOS'))
    with open(os.path.join(output_dir, 'for_report'), 'w'):
        pass
    status, out, err = run_script('presets_and_results.py', '--output_dir', output_dir)
    assert status == 2 and 'evaluation_report.xlsx cannot be written' in err and len(err.splitlines()) == 1
    assert 'ResNet32' in out  # the table is there all the same

    os.unlink(os.path.join(output_dir, 'for_report'))
    os.mkdir(os.path.join(output_dir, 'for_report'))
    workbook = os.path.join(output_dir, 'for_report', 'evaluation_report.xlsx')
    with open(workbook, 'wb') as file:
        file.write(b'as it was')

    def locked(source, target):  # as where the workbook is open in Excel
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(os, 'replace', locked)
    with pytest.raises(presets_and_results.InputError, match='close it where it is open'):
        report(output_dir)
    assert open(workbook, 'rb').read() == b'as it was'
    assert os.listdir(os.path.dirname(workbook)) == ['evaluation_report.xlsx']
