"""The report: what it compares, its workbook and its pictures as files, and odd or hostile records."""
import glob
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import zipfile

import matplotlib.text
import numpy as np
import openpyxl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from openpyxl.utils import get_column_letter
from PIL import Image

import presets_and_results
import resnet
from for_report import evidence, pictures, workbook
from for_report.__main__ import report
from for_report.evidence import STUDY_2020, network_stages, read_curves, study_points, study_series
from for_report.pictures import PALETTE
from for_report.uncertainty import mcnemar
from data_helpers import InputError
from for_report.uncertainty import Comparison, compare_recipes, verdict
from presets_and_results import (COLUMNS, best_first, compare_networks, load_predictions, load_presets, make_preset,
                                 over_seeds, save_predictions)
from resnet import tf
from sample import PROJECT_DIR, run_script

PICTURES = ['123result.png', 'confusion_matrix.png', 'layer_increase.png', 'lr_decay.png', 'model_graph.png']


def a_run(number, timestamp, accuracy=None, **values):
    """A run of a preset, trained to its end and, where an accuracy is given, tested."""
    recipe = {name: values.pop(name) for name in list(values) if name in presets_and_results.HYPERPARAMETERS}
    preset = make_preset(number, timestamp=timestamp, **recipe)
    tested = {} if accuracy is None else dict(test_accuracy=accuracy, finished=True)
    preset.update(dict(dict(status='complete', steps=preset.length(), val_accuracy=accuracy or 0.5), **tested))
    preset.update(values)
    return preset


def framed(record, claimed=None):
    """A record as it stands in an event file; it may claim to be longer than it is."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    length = struct.pack('<Q', claimed or len(record))
    checksums = [struct.pack('<I', masked_crc32c(part)) for part in (length, record)]
    return length + checksums[0] + record + checksums[1]


def write_curve(output_dir, preset, curve, tag='accuracy'):
    """An event file with {step: value}; returns its path."""
    from tensorboard.compat.proto.event_pb2 import Event
    folder = os.path.join(preset.run_dir(output_dir), 'summaries', 'dev')
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'events.out.tfevents.1.host')
    with open(path, 'wb') as file:
        file.write(framed(Event(file_version='brain.Event:2').SerializeToString()))
        for step, value in curve.items():
            event = Event(step=step)
            event.summary.value.add(tag=tag, simple_value=value)
            file.write(framed(event.SerializeToString()))
    return path


# ------------------------------------------------------------------------------ what is compared

def test_comparisons_count_who_alone_was_right():
    labels = np.arange(10) % 10
    runs = [a_run(0, timestamp, 0.5, lr=lr) for timestamp, lr in enumerate((0.1, 0.2, 0.1, 0.3, 0.4))]
    first, second = labels.copy(), labels.copy()
    first[:1] = 9   # wrong on one image
    second[1:7] = 9  # wrong on six others
    predictions = {0: (labels, first), 1: (labels, second), 2: (labels, second), 4: (labels[:5], labels[:5])}
    comparisons = compare_networks(runs, predictions)
    p = 2 * (1 + 7) / 128
    assert comparisons == [  # 1 and 3 are of one recipe, 4 has no predictions, 5 other images
        Comparison(1, 2, 6, 1, pytest.approx(p), pytest.approx(2 * p)), Comparison(2, 3, 0, 0, 1, 1)]
    assert verdict(comparisons[0]) == 'networks 1 and 2 cannot be told apart'
    assert verdict(Comparison(2, 5, 0, 6, 0.01, 2 / 64)) == 'networks 2 and 5 differ beyond chance'
    assert verdict(Comparison(2, 5, 0, 6, 0.01, 4 / 64)) == 'networks 2 and 5 cannot be told apart'


def test_spread_over_seeds():
    runs = [a_run(0, 0, 0.70), a_run(0, 1, 0.72, seed=1), a_run(0, 2, 0.74, seed=2),
            a_run(0, 3, 0.1, seed=3, status='interrupted'), a_run(0, 4, 0.1, seed=4, lr=0.2), a_run(0, 5, seed=5),
            a_run(0, 9, 0.9, seed=1)]
    (seeds,) = over_seeds(best_first(runs))  # the second run of seed 1 is better, and does not count
    assert seeds.seeds == [0, 1, 2] and (seeds.low, seeds.high) == (0.70, 0.74)
    assert seeds.mean == pytest.approx(0.72) and seeds.deviation == pytest.approx(0.02)


def recipes_of_three_seeds():
    """Two recipes with the accuracies of test_uncertainty's sum by hand, and one of two seeds."""
    runs = [a_run(6, k, accuracy, seed=k) for k, accuracy in enumerate((0.89, 0.90, 0.91))]
    runs += [a_run(7, 10 + k, accuracy, seed=k) for k, accuracy in enumerate((0.85, 0.87, 0.89))]
    return runs + [a_run(3, 20 + k, accuracy, seed=k) for k, accuracy in enumerate((0.8, 0.81))]


def test_recipes_are_compared_by_three_seeds_or_more():
    ((first, second, *difference),) = compare_recipes(over_seeds(recipes_of_three_seeds()))
    assert (first.run.preset, second.run.preset) == (6, 7)
    assert difference == pytest.approx([0.03, -0.0115540, 0.0715540], abs=1e-6)


def test_the_best_comes_first_and_untested_runs_last():
    runs = [a_run(0, 1, val_accuracy=0.9, status='interrupted'), a_run(0, 2, 0.4, val_accuracy=0.5),
            a_run(0, 3, 0.5, val_accuracy=0.4)]
    assert [run.timestamp for run in best_first(runs)] == [3, 2, 1]


def test_the_accuracy_with_the_mirror_image_is_shown_and_decides_nothing(tmp_path):
    runs = [a_run(0, k, accuracy, seed=k, test_accuracy_mirrored=mirrored)
            for k, (accuracy, mirrored) in enumerate(((0.70, 0.9), (0.72, 0.8), (0.74, None)))]
    without = [a_run(0, k, accuracy, seed=k) for k, accuracy in enumerate((0.70, 0.72, 0.74))]
    ranked, rows = best_first(runs), presets_and_results.table(best_first(runs), {})
    assert [run.timestamp for run in ranked] == [2, 1, 0]
    assert [(row['test'], row['with mirror image']) for row in rows] == [
        ('74.00%', ''), ('72.00%', '80.00%'), ('70.00%', '90.00%')]
    assert [dict(row, **{'with mirror image': ''}) for row in rows] == presets_and_results.table(
        best_first(without), {})
    seeds, others = over_seeds(runs) + over_seeds(without)
    assert seeds[1:] == others[1:]  # the run apart
    sheets, others = [sheets_of(presets, {}, tmp_path) for presets in (runs, without)]
    cells = {cell.value: cell.column for cell in sheets['runs'][2]}
    column = [sheets['runs'].cell(row, cells['test_accuracy_mirrored']) for row in (3, 4, 5)]
    assert [cell.value for cell in column] == [None, 0.8, 0.9] and column[1].number_format == '0.00%'
    for name in ('2020 study', 'uncertainty', 'seeds', 'recipes', 'charts'):
        assert list(sheets[name].values) == list(others[name].values)


def test_predictions_that_are_not_the_record_s_are_left_out(tmp_path, capsys):
    labels, predictions = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])
    run = a_run(0, 5, 0.75)
    save_predictions(run, str(tmp_path), labels, predictions)
    loaded = load_predictions([run], str(tmp_path))
    assert np.array_equal(loaded[5], (labels, predictions)) and capsys.readouterr().err == ''
    path = tmp_path / 'runs' / '5' / presets_and_results.PREDICTIONS
    for content in (b'label,prediction\n1,1\n', b'label,prediction\n1,1\n2,2\n3,3\n4,77\n', b'\xff', b'', b'a\nb,c\n'):
        path.write_bytes(content)
        assert load_predictions([run], str(tmp_path)) == {} and 'is left out' in capsys.readouterr().err


def test_the_study_is_compared_where_one_thing_differs():
    assert study_series('num_residual_units') == [[3, 2, 4]] and study_series('lr_decay') == [[2, 1], [5, 4]]
    runs = [a_run(3, 1, 0.86), a_run(3, 2, 0.88, seed=1), a_run(3, 3, 0.99, seed=1),  # a seed's first run counts
            a_run(3, 4, 0.99, max_steps=5000), a_run(3, 5, 0.99, num_epochs=9), a_run(3, 6, 0.99, lr=0.2),
            a_run(3, 7, 0.99, num_residual_units=5), a_run(3, 8), a_run(3, 9, 0.99, seed=2, steps=70399),
            a_run(2, 10, 0.87), a_run(8, 11, 0.99), a_run(3, 12, 0.99, seed=3, init_from=11),
            a_run(4, 13, status='training', steps=500)]
    old, ours = study_points([3, 2, 4], runs, {})[:3], study_points([3, 2, 4], runs, {})[3:]
    assert [(point.source, point.preset.preset, point.accuracy) for point in old] == [
        ('2020 study', 3, 0.8510), ('2020 study', 2, 0.8564), ('2020 study', 4, 0.8659)]
    assert [(point.preset.preset, point.seeds) for point in ours] == [(3, 2), (2, 1)]
    assert (ours[0].accuracy, ours[0].low, ours[0].high) == pytest.approx((0.87, 0.86, 0.88))  # the range of seeds
    assert (ours[1].low, ours[1].high) == pytest.approx((0.8633, 0.8764), abs=2e-4)  # 0.87 +- 1.96 * 0.00336
    gaps = evidence.study_gaps([3, 2, 4], runs)
    assert 'to the end here: study4.' in gaps and 'study3 (70,399 of 70,400 steps, 99.0% on test)' in gaps
    assert 'study4 (' not in gaps  # it is on its way


# ------------------------------------------------------------------------------ curves

def test_curves_are_those_that_the_training_wrote(tested):
    (preset,) = load_presets(tested)
    (path,) = glob.glob(os.path.join(preset.run_dir(tested), 'summaries', 'dev', '*'))
    wanted = {event.step: value.simple_value for event in tf.train.summary_iterator(path)
              for value in event.summary.value if value.tag == 'accuracy'}
    assert read_curves([preset], tested) == {preset.timestamp: (list(wanted), list(wanted.values()))}
    assert list(wanted) == [2, 4, 6]


def test_damaged_curves_are_named_and_left_out(tmp_path, capsys):
    output_dir = str(tmp_path / 'a [b]')  # what a glob would misread
    run = a_run(0, 5)
    path = write_curve(output_dir, run, {100: 0.5, 200: 0.75, 300: 7, 0: 0.5})  # neither 700 % nor step 0
    assert read_curves([run, a_run(0, 6)], output_dir) == {5: ([100, 200], [0.5, 0.75])}
    with open(path, 'rb') as file:
        whole = file.read()
    for cut in (1, 5, 20):  # what a kill leaves
        with open(path, 'wb') as file:
            file.write(whole + whole[-50:][:cut] if cut == 5 else whole[:-cut])
        assert read_curves([run], output_dir)[5][0] == [100, 200] and capsys.readouterr().err == ''
    for at in range(0, len(whole) - 60, 7):
        with open(path, 'wb') as file:
            file.write(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert read_curves([run], output_dir) == {}
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and path in err and 'it is damaged at byte' in err


def test_what_is_no_file_of_curves_is_not_read(tmp_path, capsys):
    run, output_dir = a_run(0, 5), str(tmp_path)
    path = write_curve(output_dir, run, {100: 0.5})
    os.mkfifo(path + '.fifo')  # to read it would be to wait for ever
    with open(path + '.large', 'wb') as file:
        file.truncate(evidence.LARGEST_EVENTS + 1)
    with open(path + '.claims', 'wb') as file:
        file.write(framed(b'x', claimed=1 << 60))  # no such memory is asked for
    with open(path + '.odd', 'wb') as file:
        file.write(framed(b'\xff\xff\xff') + framed(b'x' * (evidence.LARGEST_EVENT + 1)))
    assert read_curves([run], output_dir) == {5: ([100], [0.5])}
    err = capsys.readouterr().err
    for name, problem in (('fifo', 'it is no file'), ('large', 'it is larger than'), ('odd', '')):
        assert '{}.{} is left out: {}'.format(path, name, problem) in err
    assert err.count('\n') == 3


# ------------------------------------------------------------------------------ the network

def graph_stages(preset):
    """What network_stages says, by the graph that resnet.py builds."""
    with tf.Graph().as_default() as graph:
        resnet.ResNet(preset)
        operations = [operation for operation in graph.get_operations() if operation.name.startswith('training/')]
        parameters = {variable.op.name: variable.shape.num_elements() for variable in tf.trainable_variables()}
    stages = []
    for title, prefixes in (('stem', ['init']), ('group 1', ['unit_1_']), ('group 2', ['unit_2_']),
                            ('group 3', ['unit_3_']), ('head', ['unit_last', 'logit'])):
        scopes = []
        for operation in operations:
            scope = operation.name.split('/')[1]
            if any(scope.startswith(prefix) for prefix in prefixes) and scope not in scopes:
                scopes.append(scope)
        first = scopes if title == 'head' else scopes[:1]
        words, last = graph_words([operation for operation in operations if operation.name.split('/')[1] in first])
        if title == 'head':
            words[2:2] = ['mean over\nh, w'] * ('Mean' in [operation.name.split('/')[1] for operation in operations])
        shape = tuple(last.outputs[0].shape.as_list()[1:])
        size = sum(n for name, n in parameters.items() if any(name.startswith(prefix) for prefix in prefixes))
        stages.append((title, len(scopes) if title.startswith('group') else 0, words, shape, size))
    return stages, operations


def graph_words(operations):
    """Operations as network_stages words them, and the one whose output is the stage's."""
    words, last = [], None
    for operation in operations:
        if operation.type == 'Conv2D':
            height, width, inputs, filters = operation.inputs[1].shape.as_list()
            stride = operation.get_attr('strides')[1]
            words.append('conv {}x{}\n{} to {}'.format(height, width, inputs, filters)
                         + ('\nstride {}'.format(stride) if stride > 1 else ''))
        elif operation.type.startswith('FusedBatchNorm'):
            words.append('batch\nnorm')
        elif operation.type in ('LeakyRelu', 'Relu'):
            words.append({'LeakyRelu': 'leaky\nReLU', 'Relu': 'ReLU'}[operation.type])
        elif operation.type == 'MatMul':
            words.append('dense\n{} to {}'.format(*operation.inputs[1].shape.as_list()))
        if operation.type in ('Conv2D', 'Add', 'AddV2', 'BiasAdd') and len(operation.outputs[0].shape) > 1:
            last = operation
    return words, last


@pytest.mark.parametrize('overrides', [
    dict(num_residual_units=1), dict(num_residual_units=3, relu_leakiness=0, num_classes=12)])
def test_the_drawing_is_of_the_network_that_is_built(overrides):
    preset = make_preset(3, **overrides)
    stages = network_stages(preset)
    built, operations = graph_stages(preset)
    assert [(stage.name, stage.units, stage.operations, stage.shape, stage.parameters) for stage in stages] == built
    assert evidence.FILTERS == resnet.FILTERS
    types = {name: {operation.type for operation in operations if operation.name.startswith('training/' + name)}
             for name in ('unit_1_0', 'unit_2_0', 'unit_3_0')}
    for name, stage in zip(types, stages[1:4]):
        assert ('AvgPool' in types[name]) == ('2x2 average pooling' in stage.shortcut)
        assert ('Pad' in types[name]) == ('zero channels' in stage.shortcut)
    adds = [operation for operation in operations if operation.type in ('Add', 'AddV2')
            and operation.name.split('/')[1].startswith('unit_1')]
    adds = [operation for operation in adds if len(operation.outputs[0].shape) == 4]
    sources = [operation.inputs[1].op.name.split('/')[1:3] for operation in adds]
    assert sources[0] == ['unit_1_0', 'common_activation']  # after the activation
    assert all('activation' not in source[1] for source in sources[1:]) and len(sources) == preset.num_residual_units


def test_the_parameters_by_hand():
    # Kernels, then beta and gamma: 3*3*in*out, 2*channels each.
    n = {stage.name: stage.parameters for stage in network_stages(make_preset(0))}
    assert n['stem'] == 9 * 3 * 16 and n['group 1'] == 2 * 9 * 16 * 16 + 4 * 16
    assert n['group 2'] == 9 * 16 * 32 + 9 * 32 * 32 + 2 * 16 + 2 * 32
    assert n['group 3'] == 9 * 32 * 64 + 9 * 64 * 64 + 2 * 32 + 2 * 64
    assert n['head'] == 2 * 64 + 64 * 10 + 10 and sum(n.values()) == 75290


# ------------------------------------------------------------------------------ the workbook

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
    status, out, err = run_script('for_report', '--output_dir', output_dir, tensorflow=False)
    assert status == 0 and err == '', err
    return output_dir, out


def test_it_says_what_it_wrote(reported):
    output_dir, out = reported
    paths = [os.path.join(output_dir, 'for_report', name) for name in [
        'evaluation_report.xlsx', '123result.png', 'layer_increase.png', 'lr_decay.png', 'confusion_matrix.png',
        'model_graph.png']]
    *written, page = out.splitlines()
    assert written == ['written    ' + path for path in paths]
    assert page.startswith('not drawn  demo.html: run 8 has no checkpoint to test in')
    assert sorted(os.listdir(os.path.dirname(paths[0]))) == sorted(map(os.path.basename, paths))


def test_the_workbook(reported):
    output_dir, _ = reported
    book = openpyxl.load_workbook(os.path.join(output_dir, 'for_report', 'evaluation_report.xlsx'))
    assert book.sheetnames == ['runs', '2020 study', 'uncertainty', 'seeds', 'recipes', 'charts']
    runs = book['runs']
    header = [cell.value for cell in runs[2]]
    assert header[1:1 + len(COLUMNS)] == list(COLUMNS)
    groups = {cell.value: header[cell.column - 1] for cell in runs[1] if cell.value}
    assert groups == {'setCustomParameters': 'preset', 'setModelParameters': 'lr',
                      'setTrainingParameters': 'batch_size', 'setMiscParameters': 'allow_soft_placement',
                      'results': 'timestamp', 'setRecipeParameters': 'schedule',
                      'results, with mirror image': 'test_accuracy_mirrored', 'comparison': 'test_95_low'}
    assert runs.freeze_panes == 'C3' and runs.max_row == 5
    best, tiny, other = [dict(zip(header, row)) for row in runs.iter_rows(min_row=3)]
    assert (best['remark'].value, best['#'].value) == ('best', 1) and best['preset'].font.bold
    assert not tiny['preset'].font.bold and other['test_accuracy'].value is None
    assert tiny['differs_from_preset'].value.startswith('num_residual_units 1, batch_size 100')
    for name, kind in (('lr', float), ('num_residual_units', int), ('val_accuracy', float), ('timestamp', int),
                       ('data_augmentation', bool)):
        assert type(best[name].value) is kind
    assert best['test_accuracy'].number_format == best['test_95_low'].number_format == '0.00%'
    assert best['device'].data_type == 's' and best['device'].value.startswith('=HYPERLINK')
    for column, cell in zip(runs.columns, runs[3]):
        wanted = max(len(str(c.value)) for c in column[1:] if not isinstance(c.value, float))
        assert runs.column_dimensions[cell.column_letter].width >= min(wanted, workbook.WIDEST)

    study = book.worksheets[1]
    assert study.title == '2020 study'
    rows = {row[0].value: [cell.value for cell in row] for row in study.iter_rows(min_row=3)}
    assert rows[4][3:5] == [0.8812, 0.8659] and rows[4][7:9] == [222.3, 61600] and rows[4][9] == 'none tested'
    assert rows[2][9:12] == [8, 0.99, 0.98]


def sheets_of(presets, predictions, tmp_path):
    """The workbook of some runs, read again: {name: sheet}."""
    workbook.write_workbook(best_first(presets), predictions, str(tmp_path))
    book = openpyxl.load_workbook(str(tmp_path / 'for_report' / 'evaluation_report.xlsx'))
    return dict(zip(book.sheetnames, book.worksheets))


def test_these_two_networks(tmp_path):
    labels = np.zeros(1000, np.int64)
    right = np.arange(1000)[None] < np.array([[990], [985], [600], [600]])  # of each network, the first so many
    runs = [a_run(0, k, right[k].mean(), lr=0.1 + k // 3, seed=k) for k in range(4)]
    runs[1].lr = 0.7
    predictions = {k: (labels, np.where(right[k], 0, 1)) for k in range(4)}
    sheet = sheets_of(runs, predictions, tmp_path)['uncertainty']
    assert sheet['A1'].value.startswith('Do these two networks differ')
    header = [cell.value for cell in sheet[2]]
    rows = [dict(zip(header, row)) for row in sheet.iter_rows(min_row=3)]
    assert [(row['first'].value, row['second'].value) for row in rows] == [(1, 2), (1, 4), (2, 3), (2, 4), (3, 4)]
    ps = [mcnemar(*counts) for counts in ((5, 0), (390, 0), (385, 0), (385, 0), (0, 0))]  # 1 and 3 are of one recipe
    assert [row['p'].value for row in rows] == pytest.approx(ps, rel=1e-8)
    adjusted = [2 * ps[0], 5 * ps[1], 4 * ps[2], 4 * ps[2], 1]
    assert [row['adjusted_p'].value for row in rows] == pytest.approx(adjusted, rel=1e-8)
    assert [row['these two networks'].value for row in rows][:2] == [
        'networks 1 and 2 cannot be told apart', 'networks 1 and 4 differ beyond chance']
    for row in rows:
        assert shown_p(row['p']) == shown_p(row['adjusted_p']) == '<1E-12' or row['p'].value > 0.01
    assert shown_p(rows[0]['p']) == '0.062'


def shown_p(cell):
    """What a spreadsheet shows of a p: its number format has two conditions, then the rest."""
    tiny, small, rest = cell.number_format.split(';')
    assert tiny == '[<0.000000000001]"<1E-12"' and small == '[<0.001]0.0E+00' and rest == '0.000'
    if cell.value < 1e-12:
        return '<1E-12'
    return '{:.1E}'.format(cell.value) if cell.value < 0.001 else '{:.3f}'.format(cell.value)


def test_recipes_and_seeds_in_the_workbook(tmp_path):
    sheets = sheets_of(recipes_of_three_seeds(), {}, tmp_path)
    rows = [[cell.value for cell in row] for row in sheets['seeds'].iter_rows(min_row=3)]
    assert [row[0] for row in rows] == ['preset 6 (fast)', 'preset 7 (standard)', 'preset 3 (study3)']
    assert rows[0][2:] == ['0, 1, 2', 3, 0.9, 0.01, 0.89, 0.91]
    (row,) = sheets['recipes'].iter_rows(min_row=3)
    assert [cell.value for cell in row[:4]] == ['preset 6 (fast)', 'preset 7 (standard)', 3, 3]
    assert [cell.value for cell in row[4:7]] == pytest.approx([0.03, -0.0115540, 0.0715540], abs=1e-6)
    assert row[7].value == 'cannot be told apart' and row[4].number_format == '+0.00%;-0.00%'
    runs = [a_run(6 + half, 10 * half + k, 0.9 - 0.1 * half + 0.01 * k, seed=k) for half in (0, 1) for k in range(3)]
    assert list(sheets_of(runs, {}, tmp_path)['recipes'].values)[2][7] == 'hint: the first is better'
    runs += [a_run(6 + half, 10 * half + k, 0.9 - 0.1 * half, seed=k) for half in (0, 1) for k in range(3, 6)]
    assert list(sheets_of(runs, {}, tmp_path)['recipes'].values)[2][7] == 'the first is better'
    assert sheets_of(runs[:1], {}, tmp_path)['recipes']['A3'].value == 'none'


def test_the_charts_show_what_the_pictures_show(tmp_path):
    runs = [a_run(3, 1, 0.86), a_run(2, 2, 0.87), a_run(4, 3, 0.88), a_run(1, 4, 0.868), a_run(0, 5, 0.7),
            a_run('fast', 6, 0.91)]
    sheet = sheets_of(runs, {}, tmp_path)['charts']
    header = [cell.value for cell in sheet[1]]
    rows = [dict(zip(header, row)) for row in sheet.iter_rows(min_row=2, max_row=14)]
    assert [row['preset'].value for row in rows] == [3, 2, 4, 3, 2, 4, 2, 1, 2, 1, 5, 4, 4]  # no first, no fast
    points = [point for field in ('num_residual_units', 'lr_decay') for numbers in study_series(field)
              for point in study_points(numbers, runs, {})]
    for row, point in zip(rows, points):
        shown = [row[name].value for name in ('test_accuracy', 'bar_below_accuracy', 'bar_above_accuracy')]
        assert shown == pytest.approx([point.accuracy, point.accuracy - point.low, point.high - point.accuracy])
    depth, decay = sheet._charts
    assert series_of(depth) == [('2020 study', 'E', 2, 4), ('this collection', 'E', 5, 7)]
    assert series_of(decay) == [('2020 study, ResNet32', 'F', 8, 9), ('this collection, ResNet32', 'F', 10, 11),
                                ('2020 study, ResNet56', 'F', 12, 13), ('this collection, ResNet56', 'F', 14, 14)]
    looks = [(series.marker.symbol, '#' + series.marker.graphicalProperties.solidFill.srgbClr)
             for series in decay.series]
    assert len({symbol for symbol, _ in looks}) == len({colour for _, colour in looks}) == 4
    assert {colour for _, colour in looks} <= set(PALETTE)


def series_of(chart):
    """(title, column of x, first and last row) of a chart's series."""
    found = []
    for series in chart.series:
        column, first = series.xVal.numRef.f.split('!')[1].split(':')[0].split('$')[1:]
        last = series.xVal.numRef.f.split('$')[-1]
        for source, place in ((series.xVal, column), (series.yVal, 'G'), (series.errBars.minus, 'H'),
                              (series.errBars.plus, 'I')):
            several = ':${}${}'.format(place, last) if last != first else ''
            assert source.numRef.f == "'charts'!${}${}{}".format(place, first, several)
        found.append((series.tx.v, column, int(first), int(last)))
    return found


def test_the_workbook_prints_readably(tmp_path):
    runs = [a_run(number, number + 1, 0.8, device='GPU: ' + 'a long name ' * 5) for number in range(14)]
    sheets = sheets_of(runs, {}, tmp_path)
    for name, repeated, scale in (('runs', 1, 70), ('2020 study', 3, 80)):
        sheet = sheets[name]
        widths = [sheet.column_dimensions[get_column_letter(k)].width for k in range(1, sheet.max_column + 1)]
        ends = [page.id for page in sheet.col_breaks.brk] + [len(widths)]
        pages = [range(start, end) for start, end in zip([repeated] + ends, ends)]
        assert all(len(page) > 1 for page in pages), 'a column stands alone'
        for page in pages:  # 110 letters of a wide font, in the size of the cells
            assert sum(widths[:repeated]) + sum(widths[k] for k in page) <= 110 * 100 / scale
        assert sheet.page_setup.scale == scale and not sheet.sheet_properties.pageSetUpPr.fitToPage
        assert sheet.print_title_cols == '$A:${}'.format(get_column_letter(repeated))
    for name in ('uncertainty', 'seeds', 'recipes', 'charts'):
        assert sheets[name].page_setup.orientation == 'landscape' and sheets[name].page_setup.fitToHeight in (0, 1)
        assert sheets[name].sheet_properties.pageSetUpPr.fitToPage


def test_rows_are_as_high_as_their_texts(tmp_path):
    runs = sheets_of([a_run('standard', 1, 0.9, muon_lr=0, label_smoothing=0, nesterov=False, warmup_epochs=1, lr=0.2),
                      a_run('standard', 2, 0.8), a_run(0, 3, 0.7, device='x' * 5000)], {}, tmp_path)['runs']
    assert [runs.row_dimensions[row].height for row in (3, 4, 5)] == [30, None, 409]
    cell = runs[3][[cell.value for cell in runs[2]].index('differs_from_preset')]
    assert len(cell.value) > workbook.WIDEST and cell.alignment.wrap_text


def test_a_foreign_workbook_is_not_inflated(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'for_report' / 'evaluation_report.xlsx'
    sheets_of([a_run(0, 1, 0.7)], {}, tmp_path)
    before = path.read_bytes()

    def inflate(*arguments, **options):
        raise AssertionError('a part is read')
    monkeypatch.setattr(zipfile.ZipFile, 'open', inflate)
    monkeypatch.setattr(zipfile.ZipFile, 'read', inflate)
    assert workbook.same_workbook(str(path), before)
    monkeypatch.undo()

    changed = io.BytesIO()  # the time of saving is no difference, a figure is
    with zipfile.ZipFile(io.BytesIO(before)) as old, zipfile.ZipFile(changed, 'w', zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            content = old.read(part)
            new.writestr(part.filename, content + b' ' if part.filename == 'docProps/core.xml' else content)
    assert workbook.same_workbook(str(path), changed.getvalue())
    with zipfile.ZipFile(changed, 'a', zipfile.ZIP_DEFLATED) as new:
        new.writestr('xl/bomb.xml', bytes(50 << 20))  # which comes to 50 kB
    path.write_bytes(changed.getvalue())
    assert not workbook.same_workbook(str(path), before)
    capsys.readouterr()
    sheets_of([a_run(0, 1, 0.7)], {}, tmp_path)
    assert 'written' in capsys.readouterr().out and abs(len(path.read_bytes()) - len(before)) < 100
    path.write_bytes(before + bytes(len(before) + 1))
    assert not workbook.same_workbook(str(path), before)


# ------------------------------------------------------------------------------ the pictures

def chromatic(picture):
    """The colours of a picture's areas and lines that are no greys: int64 [N, 3]."""
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    return colours[(counts >= 50) & (np.ptp(colours, axis=1) > 20)]


def is_tint(colour):
    """Whether a colour is one of the palette's, mixed with white and, at the edge of a word or a line, with black."""
    for name in PALETTE:
        pure = np.array([int(name[k:k + 2], 16) for k in (1, 3, 5)])
        directions = np.stack([pure - 255, np.full(3, -255)], axis=1)
        shares = np.linalg.lstsq(directions, colour - 255, rcond=None)[0]
        if shares.min() > -0.02 and shares.sum() < 1.02 and np.abs(directions @ shares - (colour - 255)).max() < 6:
            return True
    return False


def grey(name):
    red, green, blue = (int(name[k:k + 2], 16) for k in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_the_pictures_are_in_the_palette_s_colours_and_full(reported):
    output_dir, _ = reported
    assert sorted(os.listdir(os.path.join(output_dir, 'for_report'))) == sorted(PICTURES + ['evaluation_report.xlsx'])
    for name in PICTURES:
        picture = np.asarray(Image.open(os.path.join(output_dir, 'for_report', name)).convert('RGB')).astype(int)
        assert 700 < picture.shape[1] < 1100
        colours = chromatic(picture)
        assert len(colours) and all(map(is_tint, colours)), name
        ink = picture.min(2) < 128
        halves = np.array_split(ink, 2, axis=0) + np.array_split(ink, 2, axis=1)
        assert all(half.mean() > 0.002 for half in halves), name
        margin = np.concatenate([ink[:2].ravel(), ink[-2:].ravel(), ink[:, :2].ravel(), ink[:, -2:].ravel()])
        assert not margin.any(), '{} is clipped'.format(name)


def test_lines_are_told_apart_in_grey():
    looks = [pictures.line_style(k) for k in range(pictures.NAMED)]
    assert len({(look['marker'], look['linestyle']) for look in looks}) == pictures.NAMED
    for first, second in zip(looks, looks[1:]):
        assert abs(grey(first['color']) - grey(second['color'])) > 25
    assert {look['color'] for look in looks} <= set(PALETTE)


def test_seeds_are_one_line_with_its_band():
    runs = [a_run(6, 1, 0.86), a_run(6, 2, 0.88, seed=1), a_run(6, 3, 0.9, muon_lr=0), a_run(11, 4, val_accuracy=0.6),
            a_run(6, 5, seed=3, status='interrupted')]
    curves = {1: ([500, 1000, 2816], [0.5, 0.75, 0.25]), 2: ([500, 1000, 2816], [0.25, 0.5, 0.875]),
              3: ([500, 1000, 2816], [0.5, 0.6, 0.7]), 4: ([700, 50000], [0.5, 0.6]), 5: ([500], [0.4])}
    figure = pictures.runs_figure(best_first(runs), curves)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ['fast, muon_lr 0: 90.0%', 'fast, 2 seeds: 87.0%', 'paper110: not tested',
                           'fast, interrupted: not tested']
    line = lines['fast, 2 seeds: 87.0%']
    assert list(line.get_xdata()) == [500, 1000, 2816]
    assert list(line.get_ydata()) == [0.375, 0.625, 0.8125]  # best so far: 0.5, 0.75, 0.75 and 0.25, 0.5, 0.875
    (band,) = axes.collections
    edges = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(500, 0.25), (500, 0.5), (1000, 0.5), (1000, 0.75), (2816, 0.75), (2816, 0.875)} <= edges
    assert axes.get_xscale() == 'log'  # 50,000 steps beside 2,816
    short = pictures.runs_figure(runs[:3], curves)
    assert short.axes[0].get_xscale() == 'linear'
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)


def test_depth_and_decay_are_compared_within_the_study(tmp_path):
    runs = [a_run(number, number, 0.86 + number / 1000) for number in (1, 2, 3, 4, 5)]
    runs += [a_run(3, 6, 0.8, max_steps=5000), a_run('fast', 7, 0.9), a_run(0, 8, 0.7)]
    curves = {run.timestamp: ([100, run.steps], [0.4, run.test_accuracy]) for run in runs}
    for figure, numbers in ((pictures.depth_figure(runs, curves, {}), (3, 2, 4)),
                            (pictures.decay_figure(runs, curves, {}), (2, 1, 5, 4))):
        left, right = figure.axes
        drawn = {tuple(line.get_ydata()) for line in left.lines if len(line.get_xdata())}
        wanted = {(0.4, 0.86 + number / 1000) for number in numbers}
        wanted |= {(STUDY_2020[number].val_accuracy,) for number in numbers} | ({(0.4, 0.8)} if 3 in numbers else set())
        assert drawn == wanted  # neither fast nor first
        assert [tick.get_text().split('\n')[0] for tick in right.get_xticklabels()] == [
            'study{}'.format(number) for number in numbers]
        labels = sorted(text.get_text() for text in right.texts)
        assert labels == sorted(['{:.1%}'.format(0.86 + number / 1000) for number in numbers]
                                + ['{:.1%}'.format(STUDY_2020[number].test_accuracy) for number in numbers])
    assert 'study3 (5,000 of 70,400 steps, 80.0% on test)' in shown_texts(pictures.depth_figure(runs, curves, {}))
    bare = shown_texts(pictures.decay_figure([], {}, {}))
    assert 'no run of these presets has curves here' in bare
    assert 'Not trained and tested to the end here: study1, study2, study4, study5.' in bare


def shown_texts(figure):
    """All that is written in a figure, on one line."""
    return ' '.join(' '.join(text.get_text().split()) for text in figure.findobj(matplotlib.text.Text))


def boxes(figure):
    """The places of a figure's words: {text: box}, tick labels within the axes' limits only."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += axes.texts + [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += list(axes.get_legend().get_texts()) if axes.get_legend() else []
        for axis, k in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            texts += [label for label in axis.get_ticklabels() if low <= label.get_position()[k] <= high]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts
            if text.get_visible() and text.get_text()]


@pytest.mark.parametrize('draw', range(6))
def test_no_words_overlap(draw):
    random = np.random.RandomState(draw)
    if draw < 5:
        runs = [a_run(number, 10 * number + seed, 0.84 + 0.05 * random.rand(), seed=seed)
                for number in (1, 2, 3, 4, 5) for seed in range(random.randint(0, 3))]
    else:  # many recipes of long names
        runs = [a_run(k % 14, k, random.rand(), lr=0.001 * (k + 1), momentum=0.5, l2_reg_lambda=0.0123)
                for k in range(1, 40)]
    curves = {run.timestamp: ([100, 1000, run.steps], [0.4, 0.5, run.test_accuracy]) for run in runs}
    for figure in (pictures.runs_figure(best_first(runs), curves), pictures.depth_figure(runs, curves, {}),
                   pictures.decay_figure(runs, curves, {})):
        width, height = figure.canvas.get_width_height()
        placed = boxes(figure)
        for text, box in placed:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, '{!r} is cut'.format(text)
        for (first, one), (second, two) in itertools.combinations(placed, 2):
            assert not one.padded(-1).overlaps(two.padded(-1)), '{!r} and {!r} overlap'.format(first, second)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                ticks = [label.get_text() for label in axis.get_ticklabels()]
                assert len(set(ticks)) == len(ticks)


def test_the_pictures_do_not_depend_on_the_user_s_matplotlibrc(reported, tmp_path):
    output_dir = str(tmp_path / 'copy')
    shutil.copytree(reported[0], output_dir)
    settings = tmp_path / 'matplotlibrc'
    settings.write_text('text.usetex: True\nfigure.facecolor: black\naxes.facecolor: black\ntext.color: white\n'
                        'axes.labelcolor: white\nlines.linewidth: 9\nsavefig.dpi: 30\nfont.family: serif\n'
                        'font.size: 20\nimage.cmap: jet\naxes.grid: True\nsavefig.bbox: tight\n'
                        'path.sketch: 1, 100, 2\n')
    shutil.rmtree(os.path.join(output_dir, 'for_report'))
    status, _, err = run_script('for_report', '--output_dir', output_dir, MATPLOTLIBRC=str(settings))
    assert status == 0 and err == ''
    for name in PICTURES:
        with open(os.path.join(reported[0], 'for_report', name), 'rb') as wanted:
            with open(os.path.join(output_dir, 'for_report', name), 'rb') as file:
                assert file.read() == wanted.read(), name


def test_a_figure_leaves_the_settings_as_they_are():
    settings = dict(matplotlib.rcParams)
    pictures.runs_figure([a_run(0, 1, 0.7)], {1: ([352, 4224], [0.5, 0.7])})
    assert dict(matplotlib.rcParams) == settings


def test_the_contact_sheet(tmp_path, capsys):
    previews = [Image.new('RGB', (90, 90), (250, 10, 10)), Image.new('RGB', (1, 280)), Image.new('RGB', (280, 3))]
    images = np.zeros((4, 32, 32, 3), np.uint8)
    probabilities = np.full((4, 10), 0.05, np.float32)
    probabilities[:, 3] = 0.55
    run = a_run(7, 5, 0.9)
    run.model = '모델'  # another program's record; no font here may have its letters
    labels = ['a $x_1$ ' + 'long ' * 30, '사진', '\u0645.png', 'the fourth']
    pictures.contact_sheet(run, labels, previews, images, probabilities, str(tmp_path))
    path = str(tmp_path / 'for_report' / 'used_images.png')
    assert capsys.readouterr() == ('written    {}\n'.format(path), '')
    sheet = np.asarray(Image.open(path).convert('RGB')).astype(int)
    bars = [(abs(sheet - colour).max(2) < 3).sum() for colour in ((0x00, 0x72, 0xB2), (0x56, 0xB4, 0xE9))]
    assert bars[0] > 3 * 500 and bars[1] > 3 * 9 * 40 and bars[0] / bars[1] == pytest.approx(0.55 / 0.45, rel=0.15)
    pictures.contact_sheet(run, labels, previews, images, probabilities, str(tmp_path), quiet=True)
    assert capsys.readouterr().out == ''


# ------------------------------------------------------------------------------ running it

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


@pytest.mark.parametrize('started', [['for_report'], ['-m', 'for_report'], ['for_report' + os.sep]])
def test_code_is_imported_from_beside_the_scripts_alone(started, tmp_path):
    make_preset(0, timestamp=5, val_accuracy=0.5).save(str(tmp_path))
    os.mkdir(str(tmp_path / 'for_report'))
    folder = PROJECT_DIR if started[0] == '-m' else str(tmp_path)
    for name in ('data_helpers', 'presets_and_results', 'openpyxl', 'matplotlib', 'numpy', 'evidence'):
        for place in (tmp_path, tmp_path / 'for_report'):
            (place / (name + '.py')).write_text('raise SystemExit("code of the output folder")')
    (tmp_path / 'for_report' / '__init__.py').write_text('raise SystemExit("code of the output folder")')
    program = started if started[0] == '-m' else [os.path.join(PROJECT_DIR, started[0])]
    process = subprocess.run([sys.executable] + program + ['--output_dir', str(tmp_path)], cwd=folder,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert process.returncode == 0 and process.stderr == '', process.stderr
    assert process.stdout.count('written') == 4 and process.stdout.count('not drawn') == 3


def test_errors_are_one_line_with_the_way_out(tmp_path):
    for flags, message in ((['--output_dir', str(tmp_path)], 'make one with: python '), (['--rows'], '--help lists')):
        status, out, err = run_script('for_report', *flags)
        assert status == 2 and out == '' and message in err and len(err.splitlines()) == 1
        assert err.startswith('for_report: error: ')
    status, _, err = run_script('for_report', '--output_dir', os.path.join(PROJECT_DIR, 'tests', 'resnet8'),
                                prepare='sys.modules["openpyxl"] = None; ')
    assert status == 2 and 'pip install -r requirements.txt' in err and len(err.splitlines()) == 1


def test_a_line_has_each_seed_once():
    runs = [a_run('fast', timestamp, seed=seed) for timestamp, seed in ((3, 1), (2, 0), (1, 1), (4, 2))]
    curves = {run.timestamp: ([100, 200], [0.3, 0.1 * run.timestamp]) for run in runs}
    lines = pictures.lines_by_recipe(runs, curves)
    assert [[run.timestamp for run in line.runs] for line in lines] == [[3], [2, 1, 4]]
    assert lines[1].accuracies.tolist() == [[0.3, 0.2], [0.3, 0.1], [0.3, 0.4]] and lines[1].steps == [100, 200]


# ------------------------------------------------------------------------------ odd and bad input

def test_many_runs_and_records_without_results(tmp_path, capsys):
    random = np.random.RandomState(0)
    for k in range(60):
        run = make_preset(k % 6, timestamp=k, val_accuracy=random.rand(), test_accuracy=random.rand(), finished=True,
                          lr_decay=0.8 + 0.01 * (k % 15))
        run.save(str(tmp_path))
        write_curve(str(tmp_path), run, {100: random.rand(), 1000 * (k + 1): random.rand()})
    make_preset(0, timestamp=60, finished=True).save(str(tmp_path))
    assert not load_presets(str(tmp_path))[-1].finished
    perfect = make_preset(0, timestamp=61, test_accuracy=1, finished=True, num_classes=12)
    perfect.save(str(tmp_path))
    save_predictions(perfect, str(tmp_path), np.arange(10), np.arange(10))
    report(str(tmp_path))
    out, err = capsys.readouterr()
    assert out.count('written') == 6 and err == ''
    sheet = openpyxl.load_workbook(str(tmp_path / 'for_report' / 'evaluation_report.xlsx'))['runs']
    rows = [dict(zip([cell.value for cell in sheet[2]], row)) for row in sheet.iter_rows(min_row=3, values_only=True)]
    assert len(rows) == 62 and (rows[0]['timestamp'], rows[0]['test_accuracy']) == (61, 1)
    assert rows[-1]['timestamp'] == 60 and rows[-1]['test_95_low'] is None


def test_one_run_alone(tmp_path, capsys):
    run = a_run('fast', 5, 0.87)
    run.save(str(tmp_path))
    write_curve(str(tmp_path), run, {704: 0.7, 1408: 0.77, 2112: 0.82, 2816: 0.88})
    report(str(tmp_path))
    out, err = capsys.readouterr()
    assert out.count('written') == 5 and 'not drawn  confusion_matrix.png' in out and err == ''
    assert '; a test saves them: python ' in out


def test_texts_of_another_program(tmp_path):
    run = a_run('fast', 5, 0.87, device='\u202e' * 150, seed=7)
    run.preset, run.model = 77, '모델.$\\frac'  # read_preset refuses such a model
    labels = np.arange(100) % 10
    save_predictions(run, str(tmp_path), labels, np.where(np.arange(100) < 87, labels, 9 - labels))
    run.save(str(tmp_path))
    run.model = '모델'
    run.save(str(tmp_path))
    write_curve(str(tmp_path), run, {704: 0.7, 10**12: 0.77})
    status, out, err = run_script('for_report', '--output_dir', str(tmp_path), tensorflow=False)
    assert status == 0 and out.count('written') + out.count('unchanged') == 6, out
    assert err == ''


def test_a_reader_that_leaves_early(reported, tmp_path):
    output_dir = str(tmp_path / 'copy')
    shutil.copytree(os.path.join(reported[0], 'INFOS'), os.path.join(output_dir, 'INFOS'))
    process = subprocess.Popen([sys.executable, os.path.join(PROJECT_DIR, 'for_report'), '--output_dir', output_dir],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 0
    assert 'model_graph.png' in os.listdir(os.path.join(output_dir, 'for_report'))


def test_a_run_without_summaries(reported, tmp_path, capsys):
    output_dir = str(tmp_path / 'bare')
    shutil.copytree(os.path.join(reported[0], 'INFOS'), os.path.join(output_dir, 'INFOS'))
    report(output_dir)
    out = capsys.readouterr().out
    for name in ('123result.png: no run has validation', 'confusion_matrix.png: no run has saved'):
        assert 'not drawn  ' + name in out
    for name in ('lr_decay.png', 'layer_increase.png', 'model_graph.png'):
        assert os.path.exists(os.path.join(output_dir, 'for_report', name))


def test_a_damaged_summary_is_survived(tested, tmp_path, capsys):
    output_dir = str(tmp_path / 'damaged')
    shutil.copytree(tested, output_dir)
    for path in glob.glob(os.path.join(output_dir, 'runs', '*', 'summaries', '*', 'events*')):
        with open(path, 'r+b') as file:
            content = file.read()
            file.seek(len(content) // 2)
            file.write(b'\xff' * 40)
    report(output_dir)
    out, err = capsys.readouterr()
    assert 'lr_decay.png' in out and 'not drawn  123result.png' in out
    assert err.count('is left out: it is damaged at byte') == 1


def test_what_cannot_be_written_is_said(reported, tmp_path, monkeypatch):
    output_dir = str(tmp_path / 'blocked')
    shutil.copytree(os.path.join(reported[0], 'INFOS'), os.path.join(output_dir, 'INFOS'))
    with open(os.path.join(output_dir, 'for_report'), 'w'):
        pass
    status, out, err = run_script('for_report', '--output_dir', output_dir)
    assert status == 2 and 'evaluation_report.xlsx cannot be written' in err and len(err.splitlines()) == 1

    os.unlink(os.path.join(output_dir, 'for_report'))
    os.mkdir(os.path.join(output_dir, 'for_report'))
    path = os.path.join(output_dir, 'for_report', 'evaluation_report.xlsx')
    with open(path, 'wb') as file:
        file.write(b'as it was')

    def locked(source, target):  # as where the workbook is open in Excel
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(os, 'replace', locked)
    with pytest.raises(InputError, match='close it where it is open'):
        report(output_dir)
    assert open(path, 'rb').read() == b'as it was'
    assert os.listdir(os.path.dirname(path)) == ['evaluation_report.xlsx']
