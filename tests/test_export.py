"""Exports as others meet them: programs that import nothing of this collection, and the page in a browser."""
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import data_helpers
import numpy_resnet
import resnet_eval
import sample
from for_report import page
from presets_and_results import best_checkpoint, load_preset, make_preset
from resnet import tf
from sample import run_script
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

RESNET8_DIR = os.path.join(sample.TESTS_DIR, 'resnet8')
RUN = 1795473091
BEGIN = """
import sys
import numpy as np
folder, images = sys.argv[1], np.load(sys.argv[2])
def save(probabilities, classes):
    np.savez(sys.argv[3], probabilities=probabilities, classes=classes)
"""
LITE = """
interpreter = Interpreter(model_path=folder + '/model.tflite')
place, = interpreter.get_input_details()
interpreter.resize_tensor_input(place['index'], images.shape)
interpreter.allocate_tensors()
interpreter.set_tensor(place['index'], images.astype(np.float32))
interpreter.invoke()
save(**{place['name']: interpreter.get_tensor(place['index']) for place in interpreter.get_output_details()})
"""
PROGRAMS = {  # by the packages that they need; each is run without this collection on its path
    'tensorflow': """
import tensorflow as tf
if tf.__version__.startswith('1.'):
    with tf.Session(graph=tf.Graph()) as session:
        model = tf.saved_model.loader.load(session, ['serve'], folder + '/saved_model')
        signature = model.signature_def['serving_default']
        outputs = {name: tensor.name for name, tensor in signature.outputs.items()}
        save(**session.run(outputs, {signature.inputs['images'].name: images}))
else:
    serve = tf.saved_model.load(folder + '/saved_model').signatures['serving_default']
    save(**{name: tensor.numpy() for name, tensor in serve(images=tf.constant(images)).items()})
""",
    'tensorflow.lite': 'import tensorflow as tf\nInterpreter = tf.lite.Interpreter\n' + LITE,
    'ai_edge_litert': 'from ai_edge_litert.interpreter import Interpreter\n' + LITE,
    'onnxruntime': """
import onnxruntime
session = onnxruntime.InferenceSession(folder + '/model.onnx', providers=['CPUExecutionProvider'])
save(*session.run(['probabilities', 'classes'], {'images': images}))
""",
    'openvino': """
import openvino
properties = {'INFERENCE_PRECISION_HINT': 'f32'}  # or it computes in 16 bits where the processor can
answer = openvino.Core().compile_model(folder + '/model.onnx', 'CPU', properties)({'images': images})
save(answer['probabilities'], answer['classes'])
"""}
HAS_ONNX = importlib.util.find_spec('tf2onnx') is not None


def run_eval(*flags):
    """resnet_eval.py's exit status, in this process."""
    try:
        resnet_eval.main([str(flag) for flag in flags])
        return 0
    except SystemExit as end:
        return end.code


@pytest.fixture(scope='module')
def output_dir(tmp_path_factory):
    """A trained ResNet-8, as if it were right on 80 % of the test images, with the mirror image on 81 %."""
    folder = str(tmp_path_factory.mktemp('export') / 'with spaces 와 한글')
    shutil.copytree(RESNET8_DIR, folder)
    preset = load_preset(folder)
    preset.update(dict(test_accuracy=0.8, test_accuracy_mirrored=0.81, finished=True))
    preset.save(folder)
    return folder


@pytest.fixture(scope='module')
def sample_and_answers(output_dir):
    """The sample's 100 test images, and their probabilities by NumPy."""
    records = np.frombuffer(sample.content('test_batch'), np.uint8).reshape(100, 3073)
    images = np.ascontiguousarray(records[:, 1:].reshape(100, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, one_view(images, output_dir)


def one_view(images, output_dir):
    """Probabilities of uint8 [N, 32, 32, 3] as they are, by NumPy."""
    reader = tf.train.NewCheckpointReader(best_checkpoint(load_preset(output_dir), output_dir))
    variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    return numpy_resnet.probabilities(images, variables, 1, 0.1)


def both_views(images, output_dir):
    """The mean of the probabilities of the images and of their mirror images, by NumPy."""
    return (one_view(images, output_dir) + one_view(np.flip(images, 2), output_dir)) / 2


@pytest.fixture(scope='module')
def exported(output_dir):
    """Its export, and what was printed."""
    folder = os.path.join(output_dir, 'elsewhere', 'network')
    status, out, err = run_script('resnet_eval.py', '--export', folder, '--output_dir', output_dir)
    assert (status, err) == (0, '')
    return folder, out


# ------------------------------------------------------------------------------ what is exported

@pytest.mark.parametrize('package', sorted(PROGRAMS))
def test_programs_without_the_collection_predict_the_same(package, exported, sample_and_answers, tmp_path):
    needed = [package.split('.')[0]] + ['tf2onnx'] * ('model.onnx' in PROGRAMS[package])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f'{missing} is not installed')
    images, expected = sample_and_answers
    np.save(str(tmp_path / 'images.npy'), images)
    (tmp_path / 'program.py').write_text(BEGIN + PROGRAMS[package])
    subprocess.check_call([sys.executable, '-I', 'program.py', exported[0], 'images.npy', 'answers.npz'],
                          cwd=str(tmp_path), stderr=subprocess.DEVNULL)
    answers = np.load(str(tmp_path / 'answers.npz'))
    assert answers['probabilities'].dtype == np.float32 and answers['classes'].dtype == np.int64
    np.testing.assert_allclose(answers['probabilities'], expected, atol=1e-4)
    assert np.array_equal(answers['classes'], expected.argmax(1)) and len(set(answers['classes'])) == 10


def test_what_lies_in_the_folder(exported):
    folder, out = exported
    assert set(os.listdir(folder)) - {'model.onnx'} == {'saved_model', 'model.tflite', 'labels.txt', 'model.json'}
    assert os.path.exists(os.path.join(folder, 'model.onnx')) == HAS_ONNX
    with open(os.path.join(folder, 'labels.txt')) as file:
        assert file.read().split('\n') == list(data_helpers.CLASSES) + ['']
    for path in [os.path.join(folder, 'saved_model', 'saved_model.pb'), os.path.join(folder, 'model.json')]:
        assert f'written     {path}, {os.path.getsize(path):,} bytes' in out
    assert ('not written' in out and 'pip install tf2onnx' in out) == (not HAS_ONNX)


def test_the_card_says_what_it_is(exported):
    folder, _ = exported
    with open(os.path.join(folder, 'model.json')) as file:
        card = json.load(file)
    assert (card['run'], card['preset'], card['model']) == (RUN, 0, 'ResNet8')
    assert card['recipe']['num_epochs'] == 5 and card['recipe']['in words'] == (
        'preset 0 (first, num_epochs 5, evaluate_every 250)')
    assert (card['test_accuracy'], card['test_accuracy_mirrored']) == (0.8, 0.81)
    n, z = 10000, 1.959964  # Wilson's interval: the roots of (p - 0.8) ** 2 * n = z ** 2 * p * (1 - p)
    roots = np.roots([n + z ** 2, -2 * n * 0.8 - z ** 2, n * 0.8 ** 2])
    assert card['interval_95'] == pytest.approx(sorted(roots), abs=1e-5)
    files = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names if name != 'model.json']
    digests = {}
    for path in files:
        with open(path, 'rb') as file:
            digests[os.path.relpath(path, folder)] = hashlib.sha256(file.read()).hexdigest()
    assert card['sha256'] == digests
    assert set(card['how_to_call']) == set(os.listdir(folder)) - {'labels.txt', 'model.json'}


def test_the_saved_model_holds_no_variables_and_no_attributes_by_default(exported):
    """An older TensorFlow refuses attributes that it does not know."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.saved_model.loader.load(session, ['serve'], os.path.join(exported[0], 'saved_model'))
        assert tf.global_variables() == []
    with open(os.path.join(exported[0], 'saved_model', 'saved_model.pb'), 'rb') as file:
        graph = SavedModel.FromString(file.read()).meta_graphs[0].graph_def
    convolutions = [node for node in graph.node if node.op == 'Conv2D']
    assert len(convolutions) == 7
    assert all(set(node.attr).isdisjoint({'data_format', 'explicit_paddings', 'dilations'}) for node in convolutions)


def test_more_classes_than_cifar_10_has_get_names():
    labels = resnet_eval._labels(make_preset(0, num_classes=12))
    assert labels == list(data_helpers.CLASSES) + ['class 10', 'class 11']


def test_the_home_folder_is_known(output_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert run_eval('--export=~/network', '--format', 'savedmodel', '--output_dir', output_dir) == 0
    assert str(tmp_path / 'network' / 'saved_model') in capsys.readouterr().out
    assert sorted(os.listdir(str(tmp_path / 'network'))) == ['labels.txt', 'model.json', 'saved_model']


def test_json(output_dir, tmp_path, capsys):
    folder = str(tmp_path / 'network')
    status = run_eval('--export', folder, '--format', 'savedmodel', '--json', '--output_dir', output_dir)
    out, err = capsys.readouterr()
    assert (status, err) == (0, '') and sorted(os.listdir(folder)) == ['labels.txt', 'model.json', 'saved_model']
    with open(os.path.join(folder, 'model.json')) as file:
        assert json.loads(out) == json.load(file)


# ------------------------------------------------------------------------------ whole or not at all

@pytest.mark.parametrize('flags, problem', [
    (['--format', 'caffe'], "invalid choice: 'caffe'"),
    (['--timestamp', 7, '--format', 'tflite'], 'run 7 has no checkpoint'),
    (['--format', 'onnx'], 'pip install tf2onnx'),
    (['--images', 'cat.jpg'], 'not allowed with argument')])
def test_bad_flags(flags, problem, output_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tf2onnx', None)
    here = str(tmp_path / 'records')
    shutil.copytree(output_dir, here)
    make_preset(0, timestamp=7, status='complete').save(here)
    status = run_eval('--export', tmp_path / 'network', '--output_dir', here, *flags)
    out, err = capsys.readouterr()
    assert status == 2 and problem in err and len(err.strip().splitlines()) == 1 and 'written' not in out
    assert os.listdir(str(tmp_path)) == ['records']


@pytest.mark.parametrize('flags', [['--format', 'tflite'], ['--force']])
def test_flags_that_need_an_export(flags, output_dir, capsys):
    assert run_eval('--output_dir', output_dir, *flags) == 2
    assert '--export' in capsys.readouterr().err


def test_what_is_there_is_replaced_by_force_alone(output_dir, tmp_path, capsys):
    folder = tmp_path / 'network'
    folder.mkdir()
    (folder / 'model.json').write_text('{"sha256": {"labels.txt": "", "model.onnx": ""}}')
    for name in ('labels.txt', 'model.onnx'):
        (folder / name).write_text('old')
    flags = ['--export', folder, '--format', 'savedmodel', '--output_dir', output_dir]
    assert run_eval(*flags) == 2 and '--force' in capsys.readouterr().err
    assert (folder / 'labels.txt').read_text() == 'old'
    assert run_eval('--force', *flags) == 0
    assert sorted(os.listdir(str(folder))) == ['labels.txt', 'model.json', 'saved_model']
    assert (folder / 'labels.txt').read_text().startswith('airplane')
    assert os.listdir(str(tmp_path)) == ['network']


@pytest.mark.parametrize('card, mine', [
    ('{"sha256": {"labels.txt": ""}}', 'thesis.docx'), (None, 'labels.txt'), ('{"my": "model"}', 'model.onnx'),
    ('no JSON', 'labels.txt'), ('[]', 'labels.txt'),
    ('{"sha256": {"saved_model/saved_model.pb": ""}}', 'saved_model/assets.extra/requests')])
def test_force_replaces_nothing_but_exports(card, mine, output_dir, tmp_path, capsys):
    path = tmp_path / 'network' / mine
    path.parent.mkdir(parents=True)
    path.write_text('mine')
    if card is not None:
        (tmp_path / 'network' / 'model.json').write_text(card)
    status = run_eval('--force', '--export', tmp_path / 'network', '--format', 'savedmodel', '--output_dir', output_dir)
    assert status == 2 and 'is no export' in capsys.readouterr().err
    assert path.read_text() == 'mine' and os.listdir(str(tmp_path)) == ['network']


def test_another_checkpoint_has_not_the_best_one_s_accuracy(output_dir, tmp_path, capsys):
    folder, network = str(tmp_path / 'records'), str(tmp_path / 'network')
    shutil.copytree(output_dir, folder)
    preset = load_preset(folder)
    preset.update(dict(early_stopping_epoch=preset.early_stopping_epoch + 1))
    preset.save(folder)
    page.write_page(preset, {}, folder)
    with open(os.path.join(folder, 'for_report', 'demo.html'), encoding='utf-8') as file:
        assert f'run {preset.timestamp}, not tested' in file.read()
    assert preset.finished and run_eval('--export', network, '--format', 'tflite', '--output_dir', folder) == 0
    out, err = capsys.readouterr()
    assert 'not tested' in out and '80.00%' not in out and 'taking the latest' in err
    with open(os.path.join(network, 'model.json')) as file:
        card = json.load(file)
    assert [card[name] for name in ('test_accuracy', 'interval_95', 'test_accuracy_mirrored')] == [None] * 3


def test_a_folder_that_tensorflow_would_glob_is_not_called_damage(output_dir, tmp_path, capsys):
    folder = str(tmp_path / 'a[1]')
    shutil.copytree(output_dir, folder)
    assert run_eval('--export', tmp_path / 'network', '--output_dir', folder) == 2
    page.write_page(load_preset(folder), {}, folder)
    for said in capsys.readouterr():
        assert 'with [ in its name' in said and 'damaged' not in said


def test_a_folder_that_cannot_be_written(output_dir, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    status = run_eval('--export', tmp_path / 'file' / 'network', '--output_dir', output_dir)
    assert status == 2 and 'cannot be written (Not a directory)' in capsys.readouterr().err


def test_a_saved_model_that_does_not_fit_on_the_disk(output_dir, tmp_path, capsys):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, hard))  # bytes of a file, of which it has three times as many
    try:
        status = run_eval('--export', tmp_path / 'network', '--format', 'savedmodel', '--output_dir', output_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert status == 2 and re.search(r'network cannot be written \(.*File too large\)\n\Z', capsys.readouterr().err)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('error, said', [
    (data_helpers.InputError('refused'), 'refused'), (KeyboardInterrupt(), 'Interrupted'),
    (OSError(28, 'No space left on device'), 'network cannot be written (No space left on device)')])
def test_a_failure_leaves_nothing(error, said, output_dir, tmp_path, monkeypatch, capsys):
    def fail(frozen, path):
        assert len(os.listdir(str(tmp_path))) == 1  # the SavedModel is written already
        raise error
    monkeypatch.setitem(resnet_eval.WRITERS, 'tflite', fail)
    status = run_eval('--export', tmp_path / 'network', '--output_dir', output_dir)
    assert status in (2, 130) and os.listdir(str(tmp_path)) == []
    assert said in capsys.readouterr().err


def test_what_others_write_meanwhile_stays(output_dir, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'network'

    def write_beside(frozen, path):
        folder.mkdir()
        (folder / 'thesis.docx').write_text('mine')
    monkeypatch.setitem(resnet_eval.WRITERS, 'tflite', write_beside)
    status = run_eval('--export', folder, '--format', 'tflite', '--output_dir', output_dir)
    assert status == 2 and 'is there already' in capsys.readouterr().err
    assert (folder / 'thesis.docx').read_text() == 'mine' and os.listdir(str(tmp_path)) == ['network']


class Refusing:
    """In place of TensorFlow Lite's converter."""

    def convert(self):
        raise RuntimeError('See console for info.\nthe operation Odd is unknown\n\n')


def test_a_converter_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(resnet_eval, '_with_signature', lambda frozen, kind: ({}, {}))
    monkeypatch.setattr(resnet_eval, '_write_saved_model', lambda frozen, path: None)  # tf2onnx, or Python, misses it
    monkeypatch.setattr(tf.lite.TFLiteConverter, 'from_session', lambda *values: Refusing())
    path = os.environ['PATH']
    with pytest.raises(data_helpers.InputError, match='cannot convert the network .the operation Odd is unknown'):
        resnet_eval._write_tflite(None, str(tmp_path / 'file'))
    with pytest.raises(data_helpers.InputError, match='tf2onnx cannot convert the network'):
        resnet_eval._write_onnx(None, str(tmp_path / 'file'))
    assert os.listdir(str(tmp_path)) == [] and os.environ['PATH'] == path


def test_code_is_not_imported_from_the_current_folder(output_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('numpy', 'tensorflow', 'tf2onnx', 'onnx'):
        (tmp_path / (name + '.py')).write_text('raise SystemExit("code of the current folder")')
    here = os.path.relpath(output_dir)
    page.write_page(load_preset(here), {}, here)
    assert capsys.readouterr().out.split()[0] in ('written', 'unchanged')
    if HAS_ONNX:
        assert run_eval('--export', 'network', '--format', 'onnx', '--output_dir', here) == 0
        assert (tmp_path / 'network' / 'model.onnx').stat().st_size > 100000


# ------------------------------------------------------------------------------ the page

def smooth(height, width, channels, seed=3):
    """A picture without edges, whose pixels JPEG decoders agree on."""
    grid = np.random.RandomState(seed).randint(0, 256, (max(height // 16, 2), max(width // 16, 2), channels))
    return Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.BICUBIC)


def pictures_in(folder):
    turned = Image.Exif()
    turned[data_helpers.EXIF_ORIENTATION] = 6
    smooth(120, 200, 3).save(str(folder / 'turned.jpg'), exif=turned.tobytes(), quality=95)
    smooth(90, 130, 4).save(str(folder / 'transparent.png'))
    smooth(20, 25, 3).save(str(folder / 'small.png'))
    smooth(700, 33, 3).save(str(folder / 'tall.png'))
    smooth(90, 131, 3).convert('L').save(str(folder / 'grey.png'))
    smooth(90, 130, 3).save(str(folder / 'progressive.jpg'), progressive=True)
    return sorted(str(path) for path in folder.iterdir())


@pytest.fixture(scope='module')
def demo(output_dir):
    """The page of the ResNet-8: its path."""
    page.write_page(load_preset(output_dir), {}, output_dir)
    return os.path.join(output_dir, 'for_report', 'demo.html')


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    assert chromium, 'this test needs Chromium: apt-get install chromium'
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, demo):
    """The page, opened, and the list of what it asks for, which grows."""
    visited = browser.new_page(viewport=dict(width=900, height=700))
    asked = []
    visited.on('request', lambda request: asked.append(request.url))
    visited.goto('file://' + demo)
    yield visited, asked
    visited.close()


def answer(visited):
    """What the page shows, once it has an answer or a problem: (answer or None, the problem's text)."""
    until = time.time() + 60
    while time.time() < until:
        shown, problem = visited.evaluate('[answer && {name: answer.name, pixels: Array.from(answer.pixels), '
                                          'probabilities: answer.probabilities}, element("problem").textContent]')
        if shown or problem:
            return shown, problem
        time.sleep(0.05)
    raise AssertionError('no answer within a minute')


def test_the_page_s_network_is_the_network(visit, sample_and_answers):
    images, expected = sample_and_answers
    given = [visit[0].evaluate('pixels => oneView(pixels)', image.ravel().tolist()) for image in images[::10]]
    np.testing.assert_allclose(given, expected[::10], atol=1e-4)
    assert visit[0].evaluate('place === weights.length')  # all of them were taken


def test_the_page_looks_at_both_views(visit, output_dir, sample_and_answers):
    images, expected = [values[::20] for values in sample_and_answers]
    given = [visit[0].evaluate('pixels => classify(Uint8Array.from(pixels))', image.ravel().tolist())
             for image in images]
    np.testing.assert_allclose(given, both_views(images, output_dir), atol=1e-4)
    assert np.abs(given - expected).max() > 0.05  # one view would not do
    seen = visit[0].evaluate('pixels => Array.from(mirrored(pixels))', images[0].ravel().tolist())
    assert np.array_equal(np.reshape(seen, (32, 32, 3)), np.flip(images[0], 1))


def test_the_page_sees_and_answers_as_images_does(visit, output_dir, tmp_path):
    visited, asked = visit
    (tmp_path / 'pictures').mkdir()
    paths = pictures_in(tmp_path / 'pictures')
    status, out, err = run_script('resnet_eval.py', '--json', '--images', *paths, '--output_dir', output_dir)
    assert (status, err) == (0, '')
    lines, beyond_one_view = [json.loads(line) for line in out.splitlines()], []
    for path, line in zip(paths, lines):
        visited.evaluate('answer = null')
        visited.set_input_files('#file', path)
        shown, problem = answer(visited)
        assert problem == '' and line['image'] == path and shown['name'] == os.path.basename(path)
        expected = data_helpers.resize(data_helpers.read_image(path)).astype(int)
        assert np.abs(np.reshape(shown['pixels'], (32, 32, 3)) - expected).max() <= 1, path
        probabilities = list(line['probabilities'].values())
        by_numpy, = both_views(expected[None], output_dir)
        np.testing.assert_allclose(probabilities, by_numpy, atol=1e-4)
        beyond_one_view.append(np.abs(probabilities - one_view(expected[None], output_dir)).max())
        np.testing.assert_allclose(shown['probabilities'], probabilities, atol=0.01)
        label = data_helpers.CLASSES[int(np.argmax(probabilities))]
        best = visited.locator('#bars .best').all_inner_texts()
        assert best[0] == label and best[-1] == f'{100 * max(shown["probabilities"]):.1f}%'
    assert asked == [visited.url] and max(beyond_one_view) > 0.02  # twice the tolerance: one view would not do


def test_the_page_shows_what_the_network_sees(visit, tmp_path):
    visited, _ = visit
    smooth(32, 32, 3).save(str(tmp_path / 'a.png'))
    visited.set_input_files('#file', str(tmp_path / 'a.png'))
    shown, _ = answer(visited)
    seen = visited.evaluate('Array.from(element("seen").getContext("2d").getImageData(0, 0, 32, 32).data)')
    assert np.array_equal(np.reshape(seen, (32, 32, 4))[..., :3], np.asarray(Image.open(str(tmp_path / 'a.png'))))
    assert np.array_equal(np.reshape(shown['pixels'], (32, 32, 3)), np.reshape(seen, (32, 32, 4))[..., :3])
    text = visited.inner_text('body')
    assert 'right on 80.00% of the test images (95% interval 79.20% to 80.77%)' in text and 'from a.png' in text
    assert 'to 80.77%), with the mirror image on 81.00%' in text


DROP = """content => {
  const transfer = new DataTransfer();
  if (content) transfer.items.add(new File([Uint8Array.from(content)], 'dropped.png'));
  document.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, cancelable: true}));
}"""


def test_a_picture_is_dropped(visit, tmp_path):
    visited, asked = visit
    smooth(64, 64, 3).save(str(tmp_path / 'a.png'))
    visited.evaluate(DROP, list((tmp_path / 'a.png').read_bytes()))
    shown, problem = answer(visited)
    assert (shown['name'], problem) == ('dropped.png', '') and asked == [visited.url]


def test_the_picture_dropped_last_stays(visit, tmp_path):
    smooth(64, 64, 3).save(str(tmp_path / 'a.png'))
    last = visit[0].evaluate("""async content => {
      const read = readImage;
      readImage = async file => {
        if (file.name === 'slow.png') await new Promise(resolve => setTimeout(resolve, 200));
        return read(file);
      };
      await Promise.all(['slow.png', 'quick.png'].map(name => show(new File([Uint8Array.from(content)], name))));
      return answer.name;
    }""", list((tmp_path / 'a.png').read_bytes()))
    assert last == 'quick.png'


@pytest.mark.parametrize('content, problem', [([1, 2, 3], 'no picture that this browser can read'),
                                              (None, 'This is no file')])
def test_what_is_no_picture_is_refused(content, problem, visit):
    visit[0].evaluate(DROP, content)
    shown, said = answer(visit[0])
    assert shown is None and problem in said


def test_the_browser_lets_the_page_ask_for_nothing(visit):
    visited, _ = visit
    refused = visited.evaluate('fetch("http://localhost:9/").then(() => "sent", error => error.message)')
    violation = visited.evaluate("""new Promise(resolve => {
      document.addEventListener('securitypolicyviolation', event => resolve(event.blockedURI));
      new Image().src = 'http://localhost:9/picture.png';
    })""")
    assert refused != 'sent' and violation == 'http://localhost:9/picture.png'


def test_a_page_is_written_once(demo, output_dir, capsys):
    page.write_page(load_preset(output_dir), {}, output_dir)
    assert capsys.readouterr().out == f'unchanged  {demo}\n'


def test_the_record_s_texts_are_texts(output_dir, tmp_path):
    preset = load_preset(output_dir)
    preset.model = '</script><script>alert(1)</script>'
    shutil.copytree(output_dir, str(tmp_path / 'r'))
    page.write_page(preset, {}, str(tmp_path / 'r'))
    html = (tmp_path / 'r' / 'for_report' / 'demo.html').read_text(encoding='utf-8')
    assert html.count('<script') == html.count('</script') == 2
    network = json.loads(re.search('const network = (.*);', html).group(1))
    assert network['description'].startswith(preset.model)


def without_checkpoint(preset, folder, monkeypatch):
    shutil.rmtree(os.path.join(folder, 'runs'))


def damaged(preset, folder, monkeypatch):
    path = best_checkpoint(preset, folder) + '.index'
    with open(path, 'r+b') as file:
        file.truncate(100)


def of_another_network(preset, folder, monkeypatch):
    preset.update(dict(num_residual_units=2))


def of_other_classes(preset, folder, monkeypatch):
    preset.update(dict(num_classes=11))


def without_tensorflow(preset, folder, monkeypatch):
    monkeypatch.setattr(page, 'READ_CHECKPOINT', 'import a_library_that_nobody_has')


@pytest.mark.parametrize('spoil, problem', [
    (without_checkpoint, 'has no checkpoint'), (damaged, 'TensorFlow cannot read'),
    (of_another_network, 'does not fit'), (of_other_classes, 'does not fit'),
    (without_tensorflow, "No module named 'a_library_that_nobody_has'")])
def test_the_page_is_not_drawn(spoil, problem, output_dir, tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / 'r')
    shutil.copytree(output_dir, folder, ignore=shutil.ignore_patterns('for_report'))
    preset = load_preset(folder)
    spoil(preset, folder, monkeypatch)
    page.write_page(preset, {}, folder)
    out, err = capsys.readouterr()
    assert out.startswith('not drawn  demo.html: ') and problem in out and out.count('\n') == 1 and err == ''
    assert not os.path.exists(os.path.join(folder, 'for_report', 'demo.html'))
