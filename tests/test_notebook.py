"""LastResNet.ipynb from top to bottom, without a window: from an empty folder, on the sample."""
import os
import shutil
import subprocess

import nbclient
import nbformat

import sample

FIELDS = {'preset_number = 0': 'preset_number = 3', 'max_steps = 0': 'max_steps = 2'}
SCRIPTS = ('data_helpers.py', 'resnet.py', 'resnet_train.py', 'resnet_eval.py', 'presets_and_results.py',
           'tensorboard_run', 'requirements.txt')


def notebook():
    return nbformat.read(os.path.join(sample.PROJECT_DIR, 'LastResNet.ipynb'), as_version=4)


def test_committed_without_outputs():
    for cell in notebook().cells:
        assert cell.cell_type != 'code' or (cell.outputs == [] and cell.execution_count is None)


def test_every_cell_runs(tmp_path, monkeypatch):
    repository = tmp_path / 'repository'
    repository.mkdir()
    for name in SCRIPTS:
        shutil.copy2(os.path.join(sample.PROJECT_DIR, name), str(repository))
    committing = ['-c', 'user.name=x', '-c', 'user.email=x', 'commit', '--quiet', '-m', 'x']
    for command in (['init', '--quiet'], ['add', '.'], committing):
        subprocess.check_call(['git'] + command, cwd=str(repository))

    book = notebook()
    fields = dict(FIELDS, **{'repository = ""': 'repository = {!r}'.format(str(repository))})
    for cell in book.cells:
        for field, value in list(fields.items()):
            if field in cell.source:
                cell.source = cell.source.replace(field, value)
                del fields[field]
    assert not fields
    first_use = next(k for k, cell in enumerate(book.cells) if 'train(' in cell.source)
    book.cells.insert(first_use, nbformat.v4.new_code_cell(
        'import data_helpers\ndata_helpers.SHA256 = {!r}'.format(sample.digests())))

    folder = tmp_path / 'empty'
    folder.mkdir()
    monkeypatch.setenv('CIFAR10_DIR', sample.SAMPLE_DIR)
    nbclient.NotebookClient(book, timeout=300, kernel_name='python3',
                            resources={'metadata': {'path': str(folder)}}).execute()

    outputs = [output for cell in book.cells if cell.cell_type == 'code' for output in cell.outputs]
    printed = ''.join(output.get('text', '') for output in outputs)
    pictures = sum('image/png' in output.get('data', {}) for output in outputs)
    assert 'is complete: best validation accuracy' in printed and 'test accuracy 0.' in printed
    assert 'TensorBoard shows 1 run at http://localhost:' in printed and 'test image 0, cat.png' in printed
    assert pictures == 7 and any('IFrame' in str(output.get('data', {})) for output in outputs)
    assert not [output for output in outputs if output.output_type == 'stream' and output.name == 'stderr'], printed
    assert os.path.exists(str(folder / 'LastResNet' / 'for_report' / 'evaluation_report.xlsx'))
