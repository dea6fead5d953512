"""LastResNet.ipynb from top to bottom, without a window: from an empty folder, on the sample."""
import glob
import os
import re
import shutil
import subprocess

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

import sample
from presets_and_results import load_preset

FIELDS = {'repository = ""': 'repository = "~/repository"', 'preset_name = "0"': 'preset_name = "3"',
          'max_steps = 0': 'max_steps = 2', 'export_to = ""': 'export_to = "~/network"'}
PARTS = ('*.py', 'for_report/*.py', 'for_report/page.html', 'tensorboard_run', 'requirements.txt')
SERVER, PAGE = 'board = subprocess', 'IFrame(page'  # in the cells that start TensorBoard and show it


def notebook():
    return nbformat.read(os.path.join(sample.PROJECT_DIR, 'LastResNet.ipynb'), as_version=4)


def sources():
    """The code of every cell."""
    return [cell.source for cell in notebook().cells if cell.cell_type == 'code']


def cell_with(text):
    source, = [source for source in sources() if text in source]
    return source


def execute(cells, folder):
    """Runs cells, given as their code, in `folder`. Returns what they printed, and all outputs."""
    book = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    nbclient.NotebookClient(book, timeout=300, kernel_name='python3',
                            resources={'metadata': {'path': str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.outputs]
    return ''.join(output.get('text', '') for output in outputs), outputs


def pages(outputs):
    """The addresses of the pages that are shown."""
    shown = ''.join(output.get('data', {}).get('text/html', '') for output in outputs)
    return re.findall(r'<iframe[^>]*?src="([^"]+)"', shown)


def repository_in(folder):
    """A repository of the collection, without its runs."""
    for pattern in PARTS:
        for path in glob.glob(os.path.join(sample.PROJECT_DIR, pattern)):
            place = os.path.join(folder, os.path.relpath(path, sample.PROJECT_DIR))
            os.makedirs(os.path.dirname(place), exist_ok=True)
            shutil.copy2(path, place)
    committing = ['-c', 'user.name=x', '-c', 'user.email=x', 'commit', '--quiet', '-m', 'x']
    for command in (['init', '--quiet'], ['add', '.'], committing):
        subprocess.check_call(['git'] + command, cwd=folder)


def test_committed_without_outputs():
    for cell in notebook().cells:
        assert cell.cell_type != 'code' or (cell.outputs == [] and cell.execution_count is None)


def test_every_cell_runs(tmp_path, monkeypatch):
    import matplotlib
    monkeypatch.setenv('MPLCONFIGDIR', matplotlib.get_cachedir())  # its list of fonts takes long to make
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copytree(sample.SAMPLE_DIR, str(tmp_path / 'cifar'))
    monkeypatch.setenv('CIFAR10_DIR', '~/cifar')
    repository_in(str(tmp_path / 'repository'))
    (tmp_path / 'photos').mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(str(tmp_path / 'photos' / 'night.png'))
    (tmp_path / 'photos' / 'torn.png').write_bytes(b'no picture')

    cells = sources()
    for field, value in FIELDS.items():
        place, = [k for k, cell in enumerate(cells) if field in cell]
        cells[place] = cells[place].replace(field, value)
    first_use = next(k for k, cell in enumerate(cells) if 'train(' in cell)
    cells.insert(first_use, f'import data_helpers\ndata_helpers.SHA256 = {sample.digests()!r}')
    cells.append(cell_with('pictures = ""').replace('pictures = ""', 'pictures = "~/photos"'))

    folder = tmp_path / 'empty'
    folder.mkdir()
    printed, outputs = execute(cells, folder)
    pictures = sum('image/png' in output.get('data', {}) for output in outputs)
    output_dir = str(folder / 'LastResNet')
    preset = load_preset(output_dir)
    assert preset.steps == 2 and preset.finished
    assert f'test accuracy {preset.test_accuracy:.4f}' in printed and 'predicted' in printed
    assert 'TensorBoard shows 1 run' in printed and 'test image 0, cat.png' in printed
    page, = pages(outputs)
    assert page.startswith('http://localhost:') and page in printed
    assert pictures == 8  # two of this run, four of the report, two contact sheets
    assert re.search(r'night.png +[a-z]+ +[0-9.]+%', printed)
    errors = ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == 'stderr')
    assert len(errors.splitlines()) == 1 and errors.startswith('skipped: ') and 'torn.png' in errors, errors
    for name in ('evaluation_report.xlsx', 'demo.html'):
        assert os.path.exists(os.path.join(output_dir, 'for_report', name))
    assert {'saved_model', 'model.tflite', 'model.json', 'labels.txt'} <= set(os.listdir(str(tmp_path / 'network')))
    assert f'In {tmp_path / "network"} are model.json' in printed


# ------------------------------------------------------------------------------ TensorBoard, here and elsewhere

@pytest.fixture(scope='module')
def twice_on_record(trained, tmp_path_factory):
    """An output folder with a run, a copy of its record, and a record that is none."""
    output_dir = str(tmp_path_factory.mktemp('notebook') / 'runs')
    shutil.copytree(trained[0], output_dir)
    path = load_preset(output_dir).pickle_path(output_dir)
    shutil.copy(path, path.replace('.pickle', ' (1).pickle'))
    with open(path.replace('.pickle', '_.pickle'), 'w') as file:
        file.write('nonsense')
    return output_dir


def show_tensorboard(output_dir):
    begin = f'import importlib.util, os, platform, subprocess, sys\noutput_dir = {output_dir!r}'
    return execute([begin, cell_with(SERVER), cell_with(PAGE), 'board.terminate()'], sample.PROJECT_DIR)


def test_warnings_before_the_address(twice_on_record):
    printed, outputs = show_tensorboard(twice_on_record)
    assert printed.count('warning: ') == 2
    assert 'TensorBoard shows 1 run' in printed
    page, = pages(outputs)
    port = re.match('http://localhost:([0-9]+)/$', page).group(1)
    assert f'This is {page} of ' in printed  # whoever's browser is elsewhere is told
    assert f'ssh -N -L {port}:localhost:{port} ' in printed


@pytest.mark.parametrize('variable, prefix', [('JUPYTERHUB_SERVICE_PREFIX', '/user/jo/'),
                                              ('NB_PREFIX', '/notebook/team/jo')])
@pytest.mark.parametrize('installed', [True, False])
def test_behind_a_proxy(variable, prefix, installed, twice_on_record, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, prefix)
    if installed:
        (tmp_path / 'jupyter_server_proxy.py').write_text('')
        monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    printed, outputs = show_tensorboard(twice_on_record)
    assert 'TensorBoard shows 1 run' in printed and 'localhost' not in printed
    page = re.search(r'Its page is (\S+) of this site', printed).group(1)
    assert re.match(prefix.rstrip('/') + '/proxy/[0-9]+/$', page)
    assert pages(outputs) == [page] * installed and 'pip install jupyter-server-proxy' in printed


def test_without_runs_tensorboard_says_so_and_the_notebook_goes_on(tmp_path):
    printed, outputs = show_tensorboard(str(tmp_path))
    assert 'there are no runs in' in printed and 'TensorBoard did not start' in printed and pages(outputs) == []


def test_a_server_that_says_nothing_is_not_awaited_for_ever(tmp_path):
    (tmp_path / 'tensorboard_run').write_text('import time; time.sleep(600)')
    begin = 'import importlib.util, os, platform, subprocess, sys\noutput_dir = "."'
    server = cell_with(SERVER)
    assert 'Timer(120, ' in server
    printed, outputs = execute([begin, server.replace('Timer(120, ', 'Timer(1, '), cell_with(PAGE)], tmp_path)
    assert 'TensorBoard did not start' in printed and pages(outputs) == []
