"""The plan of the house: what lies at the top, which room imports which, and how long a function may be."""
import ast
import os
import subprocess
import sys

import pytest

from sample import PROJECT_DIR

TOP = {'data_helpers.py', 'resnet.py', 'resnet_train.py', 'resnet_eval.py', 'presets_and_results.py', 'tensorboard_run',
       'INFOS', 'runs', 'for_report', 'LastResNet.ipynb', 'requirements.txt', 'tests', 'README.md', '.ci', '.gitignore'}
MAY_IMPORT = {  # a room: the rooms below it
    'data_helpers.py': (),
    'resnet.py': ('data_helpers',),
    'for_report/uncertainty.py': (),
    'presets_and_results.py': ('data_helpers', 'for_report.uncertainty'),
    'for_report/evidence.py': ('data_helpers', 'presets_and_results', 'for_report.uncertainty'),
    'for_report/workbook.py': ('data_helpers', 'presets_and_results', 'for_report.uncertainty', 'for_report.evidence'),
    'for_report/pictures.py': ('data_helpers', 'presets_and_results', 'for_report.uncertainty', 'for_report.evidence'),
    'for_report/page.py': ('data_helpers', 'presets_and_results', 'for_report.evidence'),
    'for_report/__main__.py': ('data_helpers', 'presets_and_results', 'for_report.uncertainty', 'for_report.evidence',
                               'for_report.workbook', 'for_report.pictures', 'for_report.page'),
    'for_report/__init__.py': (),
    'resnet_train.py': ('data_helpers', 'resnet', 'presets_and_results'),
    'resnet_eval.py': ('data_helpers', 'resnet', 'presets_and_results', 'for_report.pictures'),
    'tensorboard_run': ('data_helpers', 'presets_and_results', 'for_report.evidence'),
}
SCRIPTS = sorted(MAY_IMPORT)
LONGEST_FUNCTION = 45  # lines


def parsed(room):
    with open(os.path.join(PROJECT_DIR, room), encoding='utf-8') as file:
        return ast.parse(file.read())


def imported(room):
    """Modules of the collection that a room names in an import, also within functions."""
    own = {path.replace('/', '.').rpartition('.py')[0] or path for path in SCRIPTS} | {'for_report'}
    found = set()
    for node in ast.walk(parsed(room)):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{room} imports relatively'
            found.add(node.module)
            found.update(f'{node.module}.{name.name}' for name in node.names)
    found = {name for name in found if name in own}
    return found - {'for_report'} if any(name.startswith('for_report.') for name in found) else found


@pytest.mark.parametrize('room', SCRIPTS)
def test_imports_run_one_way(room):
    itself = {room.rpartition('.py')[0]} if room == 'presets_and_results.py' else set()  # as a program, by its name
    assert imported(room) - itself <= set(MAY_IMPORT[room])


def test_every_room_has_its_place_in_the_plan():
    files = subprocess.check_output(['git', 'ls-files'], cwd=PROJECT_DIR, universal_newlines=True).splitlines() \
        if os.path.isdir(os.path.join(PROJECT_DIR, '.git')) else []
    top = {path.split('/')[0] for path in files} or set(os.listdir(PROJECT_DIR)) - {'.venv', 'data', '__pycache__',
                                                                                   '.pytest_cache'}
    assert top <= TOP
    rooms = {os.path.join('for_report', name) for name in os.listdir(os.path.join(PROJECT_DIR, 'for_report'))
             if name.endswith('.py')}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize('room', SCRIPTS)
def test_functions_fit_on_a_screen(room):
    with open(os.path.join(PROJECT_DIR, room), encoding='utf-8') as file:
        lines = file.read().splitlines()
    starts = [(node.lineno, node.name) for node in ast.walk(parsed(room)) if isinstance(node, ast.FunctionDef)]
    for first, name in starts:
        indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
        last = first
        for number in range(first + 1, len(lines) + 1):  # Python 3.7 does not say where a function ends
            text = lines[number - 1]
            if text.strip() and not text.lstrip().startswith(')') and len(text) - len(text.lstrip()) <= indent:
                break
            if text.strip():
                last = number
        assert last - first + 1 <= LONGEST_FUNCTION, f'{name} in {room} has {last - first + 1} lines'


def test_the_ground_floor_and_the_table_are_light():
    """What must answer at once imports nothing slow."""
    slow = {'tensorflow', 'matplotlib', 'openpyxl', 'scipy.special', 'scipy.stats', 'tensorboard'}
    code = (f'import sys; sys.path.insert(0, {PROJECT_DIR!r}); import presets_and_results; '
            f'print(sorted({slow!r} & set(sys.modules)))')
    assert subprocess.check_output([sys.executable, '-c', code], universal_newlines=True).strip() == '[]'
