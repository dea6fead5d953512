"""tensorboard_run as a person meets it: on the console, and in a browser, Chromium without a window."""
import contextlib
import glob
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

import sample
from data_helpers import InputError
from presets_and_results import load_preset, load_presets, make_preset
from sample import TINY, run_script

SCRIPT = os.path.join(sample.PROJECT_DIR, 'tensorboard_run')
NO_LINKS = 'import os; os.symlink = lambda *places, **options: os.rmdir(""); '  # raises an OSError
PLUGINS = {  # a package of others, as it is installed
    'others-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: others\nVersion: 1.0\n',
    'others-1.0.dist-info/entry_points.txt': '[tensorboard_plugins]\nbroken = broken_plugin:Plugin\n'
                                             'odd = odd_plugin:Plugin\nfine = fine_plugin:Plugin\n',
    'broken_plugin.py': 'import a_library_that_nobody_has\n',
    'odd_plugin.py': 'Plugin = 3\n',
    'fine_plugin.py': 'from tensorboard.plugins.base_plugin import TBPlugin\n'
                      'class Plugin(TBPlugin):\n    plugin_name = "fine"\n'
                      '    def get_plugin_apps(self):\n        return {}\n'
                      '    def is_active(self):\n        return True\n',
}


@pytest.fixture(scope='module')
def runs(trained, tmp_path_factory):
    """Two runs, and a record whose run folder is gone."""
    output_dir = str(tmp_path_factory.mktemp('runs') / 'two')
    shutil.copytree(trained[0], output_dir)
    status, _, err = run_script('resnet_train.py', *TINY, '--lr', 0.05, '--output_dir', output_dir)
    assert status == 0, err
    first, second = load_preset(trained[0]), load_preset(output_dir)
    make_preset(5, timestamp=77).save(output_dir)
    return output_dir, [first.title, second.title]


@contextlib.contextmanager
def running(*flags, **options):
    """tensorboard_run at work: its process and address."""
    board = run_script('tensorboard_run', '--port', 0, *flags, popen=True, tensorflow=False, **options)
    try:
        line = board.stdout.readline()
        found = re.match(r'TensorBoard shows [0-9]+ runs? at (http://\S+)/ ', line)
        assert found, line + board.stderr.read()
        yield board, found.group(1)
    finally:
        board.kill()
        board.communicate()


def end(board, number=signal.SIGINT):
    """Sends a signal, waits, and returns the exit status and the rest of stdout and stderr."""
    board.send_signal(number)
    out, err = board.communicate(timeout=60)
    return board.returncode, out, err


def fetch(address):
    with urllib.request.urlopen(address, timeout=30) as response:
        return json.loads(response.read().decode())


def poll(question, answer):
    """The answer, once it is the one that is expected, or the last of two minutes."""
    until = time.time() + 120
    while time.time() < until:
        with contextlib.suppress(OSError):  # not there yet
            given = question()
            if given == answer:
                break
        time.sleep(0.5)
    return given


def record_sizes(content):
    """Bytes of each record in an event file: a length of 8, its checksum of 4, the event, its checksum of 4."""
    sizes = []
    while sum(sizes) < len(content):
        length, = struct.unpack_from('<Q', content, sum(sizes))
        sizes.append(8 + 4 + length + 4)
    return sizes


def script_as_module():
    loader = importlib.machinery.SourceFileLoader('tensorboard_run', SCRIPT)
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader('tensorboard_run', loader))
    loader.exec_module(script)
    return script


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------ in a browser

def test_in_a_browser(runs):
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    assert chromium, 'this test needs Chromium: apt-get install chromium'
    output_dir, titles = runs
    board = subprocess.Popen([sys.executable, SCRIPT, '--output_dir', output_dir, '--reload_interval', '5'],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    try:
        address = re.search(r'TensorBoard shows 2 runs at (http://localhost:\d+)', board.stdout.readline()).group(1)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])
            page = browser.new_page(viewport=dict(width=1400, height=1000))
            page.set_default_timeout(60000)

            page.goto(address + '/#scalars')
            for title in titles:
                for name in ('/train', '/dev'):
                    page.get_by_text(title + name, exact=True).first.wait_for()
            card = page.locator('tf-scalar-card').filter(has_text='accuracy').first
            card.locator('path.line').first.wait_for(state='attached')
            time.sleep(2)  # the lines come one by one
            curves = [path.get_attribute('d') for path in card.locator('path.line').all()]

            page.goto(address + '/#hparams')
            page.reload()
            for name in ('seed', 'lr', 'batch_size', 'l2_reg_lambda', 'nesterov'):  # five as columns, all to be ticked
                page.get_by_text(name, exact=True).first.wait_for(state='attached')
            expected = set(titles) | {'dev best_accuracy', 'dev loss'}
            cells, until = [], time.time() + 60
            while not expected <= set(cells) and time.time() < until:  # its rows come and go while the board reloads
                time.sleep(0.5)
                cells = [text.strip() for text in page.locator('vaadin-grid-cell-content').all_inner_texts()]
            browser.close()
    finally:
        status, out, err = end(board)
    assert sum(len(re.findall('[ML]', curve)) == 3 for curve in curves) >= 2  # validated at steps 2, 4 and 6
    assert expected <= set(cells)
    shown = [float(cell) for cell in cells if re.match(r'\d*\.\d+$', cell)]
    for preset in load_presets(output_dir)[-2:]:
        assert any(abs(number - preset.val_accuracy) < 1e-4 for number in shown)
    assert status == 0 and err == '' and 'Ended' in out


# ------------------------------------------------------------------------------ the server

def test_on_localhost_only_unless_asked(runs):
    for flags in ((), ('--host', '0.0.0.0')):
        with running('--output_dir', runs[0], *flags) as (board, address):
            port = int(address.rpartition(':')[2])
            with open('/proc/net/tcp') as file:
                listening = {line.split()[1].split(':')[0] for line in file.readlines()[1:]
                             if line.split()[3] == '0A' and int(line.split()[1].split(':')[1], 16) == port}
            assert listening == {'00000000' if flags else '0100007F'}


def test_a_taken_port(runs):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        status, out, err = run_script('tensorboard_run', '--output_dir', runs[0], '--port', port)
    assert status == 2 and out == '' and len(err.splitlines()) == 1
    assert f'port {port} is taken' in err and '--port' in err


def test_by_default_the_first_free_port(monkeypatch):
    script, free = script_as_module(), free_port()
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen(1)
        monkeypatch.setattr(script, 'PORTS', [taken.getsockname()[1], free])
        assert script.choose_port(None) == free


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_whatever_ends_it_leaves_nothing_behind(name, runs, tmp_path):
    with running('--output_dir', runs[0], TMPDIR=str(tmp_path)) as (board, address):
        assert [name for name in os.listdir(str(tmp_path)) if name.startswith('tensorboard_run_')]
        status, out, err = end(board, getattr(signal, name))
    assert (status, out, err) == (0, '\nEnded.\n', '')
    assert not [name for name in os.listdir(str(tmp_path)) if name.startswith('tensorboard_run_')]


def test_nohup_is_respected(runs):
    with running('--output_dir', runs[0], prepare='import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); ') as (
            board, address):
        board.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert fetch(address + '/data/environment') and board.poll() is None


def test_a_console_that_breaks_does_not_matter(runs):
    with running('--output_dir', runs[0]) as (board, address):
        board.stdout.close()
        board.stderr.close()
        assert fetch(address + '/data/environment')
        board.send_signal(signal.SIGINT)
        assert board.wait(60) == 0
        board.stdout = board.stderr = None
    port = free_port()
    with open('/dev/full', 'w') as full:
        board = run_script('tensorboard_run', '--output_dir', runs[0], '--port', port, popen=True, stdout=full)
    try:
        assert poll(lambda: bool(fetch(f'http://localhost:{port}/data/environment')), True)
        status, _, err = end(board)
    finally:
        board.kill()
    assert (status, err) == (0, '')


# ------------------------------------------------------------------------------ its own flags, and TensorBoard's

@pytest.mark.parametrize('flags', [('--logdir', 'elsewhere'), ('--logdir=',), ('--logdir_spec', 'name:elsewhere'),
                                   ('--inspect', '--event_file', 'elsewhere'), ('--db', 'sqlite:elsewhere')])
def test_other_data_are_refused(flags, runs):
    status, out, err = run_script('tensorboard_run', '--output_dir', runs[0], *flags, tensorflow=False, timeout=60)
    assert status == 2 and out == '' and len(err.splitlines()) == 1
    assert 'shows the runs of --output_dir and nothing else' in err and 'tensorboard --logdir' in err


def test_a_shortened_flag_does_not_slip_through(runs):
    status, out, err = run_script('tensorboard_run', '--output_dir', runs[0], '--logd', 'elsewhere', timeout=60)
    assert status == 2 and out == '' and len(err.splitlines()) == 1
    assert 'nothing else' in err or 'ambiguous option: --logd' in err


def test_flags_that_print_and_end(runs, tmp_path):
    from tensorboard import version
    for flag in ('--version', '--version_tb'):
        status, out, err = run_script('tensorboard_run', '--output_dir', tmp_path / 'none', flag, timeout=60)
        assert (status, out, err) == (0, version.VERSION + '\n', '')
    status, out, err = run_script('tensorboard_run', '--helpfull', timeout=60)
    assert status == 0 and '--reload_interval' in out and err == ''
    status, out, err = run_script('tensorboard_run', '--output_dir', runs[0], '--inspect', '--tag', 'best_accuracy',
                                  tensorflow=False, timeout=60)
    assert status == 0 and err == '' and 'TensorBoard shows' not in out
    digest = r'Event statistics for tag best_accuracy in [^\n]+/(preset[^\n]+)/dev:.+?num_steps +([0-9]+)'
    digests = re.findall(digest, out, re.DOTALL)
    assert sorted(digests) == [(title, '3') for title in sorted(runs[1])]


def test_a_flag_that_tensorboard_refuses(runs):
    status, out, err = run_script('tensorboard_run', '--output_dir', runs[0], '--reload_interval', 'soon', timeout=60)
    assert status == 2 and out == '' and len(err.splitlines()) == 1
    assert 'tensorboard_run: error: TensorBoard does not start: argument --reload_interval' in err


# ------------------------------------------------------------------------------ other people's systems

def test_without_the_right_to_make_links(runs, tmp_path):
    """The runs are copied, and the copies grow as a training goes on."""
    output_dir = str(tmp_path / 'copy')
    shutil.copytree(runs[0], output_dir)
    preset = load_preset(output_dir)
    events, = glob.glob(os.path.join(preset.run_dir(output_dir), 'summaries', 'dev', '*tfevents*'))
    with open(events, 'rb') as file:
        content = file.read()
    half = sum(record_sizes(content)[:2])  # the file's version and the first validation
    with open(events, 'wb') as file:  # as if the training were there
        file.write(content[:half])

    def steps():
        query = urllib.parse.urlencode(dict(run=preset.title + '/dev', tag='accuracy'))
        return [step for _, step, _ in fetch(f'{address}/data/plugin/scalars/scalars?{query}')]

    with running('--output_dir', output_dir, '--reload_interval', 1, prepare=NO_LINKS, TMPDIR=str(tmp_path)) as (
            board, address):
        folder, = glob.glob(str(tmp_path / 'tensorboard_run_*'))
        assert not any(os.path.islink(os.path.join(folder, name)) for name in os.listdir(folder))
        shown = poll(lambda: {run.partition('/')[0] for run in fetch(address + '/data/runs')}, set(runs[1]))
        assert shown == set(runs[1])
        assert poll(steps, [2]) == [2]
        with open(events, 'ab') as file:
            file.write(content[half:])
        assert poll(steps, [2, 4, 6]) == [2, 4, 6]
        assert end(board) == (0, '\nEnded.\n', '')


def test_copies_follow_what_they_are_copies_of(tmp_path, monkeypatch):
    script = script_as_module()

    def refuse(*places, **options):
        raise OSError('a required privilege is not held by the client')

    monkeypatch.setattr(os, 'symlink', refuse)
    output_dir, folder = str(tmp_path / 'output'), str(tmp_path / 'shown')
    os.mkdir(folder)
    presets = [make_preset(0, timestamp=timestamp) for timestamp in (1, 2)]
    whole = os.urandom(100000)
    for preset, name, size in ((presets[0], 'a', 10), (presets[0], 'a', 70000), (presets[0], 'b', 0),
                               (presets[1], 'a', 100000), (presets[0], 'b', 5)):
        path = os.path.join(preset.run_dir(output_dir), 'summaries', 'dev', name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(whole[:size])
        script.show_runs(presets, output_dir, folder)
        with open(os.path.join(folder, preset.title, 'dev', name), 'rb') as file:
            assert file.read() == whole[:size]
    assert script.show_runs(presets, output_dir, folder) == 2
    os.rename(path, path + '-resumed')
    script.show_runs(presets, output_dir, folder)
    assert sorted(os.listdir(os.path.join(folder, preset.title, 'dev'))) == ['a', 'b-resumed']

    with pytest.raises(InputError, match='can be neither linked nor copied .* TMPDIR'):
        script.show_runs(presets, output_dir, os.path.join(folder, presets[0].title, 'dev', 'a'))  # no folder


def test_without_a_temporary_folder(runs):
    status, out, err = run_script('tensorboard_run', '--output_dir', runs[0], tensorflow=False, timeout=60,
                                  prepare='import tempfile; tempfile._candidate_tempdir_list = lambda: ["/nowhere"]; ')
    assert status == 2 and out == '' and len(err.splitlines()) == 1
    assert 'temporary folder' in err and 'TMPDIR' in err


def test_a_plugin_that_cannot_be_imported_is_named(runs, tmp_path):
    for name, content in PLUGINS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with running('--output_dir', runs[0], PYTHONPATH=str(tmp_path)) as (board, address):
        plugins = fetch(address + '/data/plugins_listing')
        status, _, err = end(board)
    assert status == 0 and 'scalars' in plugins
    if sys.version_info < (3, 8):  # TensorBoard 1.15 is started with its own plugins alone
        assert err == ''
        return
    assert 'fine' in plugins and len(err.splitlines()) == 2
    assert 'warning: the TensorBoard plugin broken cannot be imported' in err and 'a_library_that_nobody_has' in err
    assert 'warning: the TensorBoard plugin odd cannot be imported' in err


def test_without_tensorboard(runs):
    status, out, err = run_script('tensorboard_run', '--output_dir', runs[0],
                                  prepare='sys.modules["tensorboard"] = None; ')
    assert status == 2 and out == '' and len(err.splitlines()) == 1
    assert 'tensorboard' in err and 'pip install -r requirements.txt' in err
