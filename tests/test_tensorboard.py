"""tensorboard_run as a person meets it: in a browser, Chromium without a window."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from presets_and_results import load_preset, load_presets, make_preset
from sample import PROJECT_DIR, TINY, run_script

SCRIPT = os.path.join(PROJECT_DIR, 'tensorboard_run')


def start(*flags):
    return subprocess.Popen([sys.executable, SCRIPT] + [str(flag) for flag in flags], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True)


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


def test_in_a_browser(runs):
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    assert chromium, 'this test needs Chromium: apt-get install chromium'
    output_dir, titles = runs
    board = start('--output_dir', output_dir, '--reload_interval', 5)
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
        board.send_signal(signal.SIGINT)
        out, err = board.communicate(timeout=30)
    assert sum(len(re.findall('[ML]', curve)) == 3 for curve in curves) >= 2  # validated at steps 2, 4 and 6
    assert expected <= set(cells)
    shown = [float(cell) for cell in cells if re.match(r'\d*\.\d+$', cell)]
    for preset in load_presets(output_dir)[-2:]:
        assert any(abs(number - preset.val_accuracy) < 1e-4 for number in shown)
    assert board.returncode == 0 and err == '' and 'Ended' in out


def test_on_localhost_only_unless_asked(runs):
    for flags in ((), ('--host', '0.0.0.0')):
        board = start('--output_dir', runs[0], *flags)
        try:
            port = int(re.search(r':(\d+)/', board.stdout.readline()).group(1))
            with open('/proc/net/tcp') as file:
                listening = {line.split()[1].split(':')[0] for line in file.readlines()[1:]
                             if line.split()[3] == '0A' and int(line.split()[1].split(':')[1], 16) == port}
            assert listening == {'00000000' if flags else '0100007F'}
        finally:
            board.terminate()
            assert board.wait(30) == 0


def test_a_taken_port(runs):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        board = start('--output_dir', runs[0], '--port', port)
        out, err = board.communicate(timeout=60)
    assert board.returncode == 2 and out == '' and len(err.splitlines()) == 1
    assert 'port {} is taken'.format(port) in err and '--port' in err
