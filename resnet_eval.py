"""Tests trained runs on CIFAR-10's 10,000 test images, classifies a person's own images, or exports a network.

    python resnet_eval.py                            every untested run
    python resnet_eval.py --timestamp 1795558284     that run
    python resnet_eval.py --timestamp                the newest
    python resnet_eval.py --timestamp best --images cat.jpg photos/
    python resnet_eval.py --timestamp best --export network/

A test takes the run's best checkpoint by validation accuracy, prints accuracy by class and the
confusion matrix, and records the test accuracy in the run's pickle and in INFOS/eval_overall.txt,
and the predictions beside the checkpoints. Beside it stands the accuracy with the mirror image: by the mean of
the class probabilities of each image and its mirror image. A person's images are judged by that mean, and drawn in
for_report/used_images.png too. The test accuracy, the matrix and exported networks are of the images as they are.
An export is for programs without this collection: SavedModel, TensorFlow Lite and ONNX, with a model.json that
says what they are and how to call them.
"""
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import unicodedata

import numpy as np
from PIL import Image

import data_helpers
from data_helpers import (CLASSES, PROJECT_DIR, SIDE, UNFINISHED, ArgumentParser, InputError, Progress,
                          exit_on_input_error, printable, shortened, survives, text_width, write_atomically)
from presets_and_results import (BEST, NEWEST, RECIPE, as_tested, best_checkpoint, check_folder_name, check_output_dir,
                                 checkpoint_steps, command, confusion_matrix, describe, load_predictions, load_preset,
                                 load_presets, locked, no_runs, read_preset, require_checkpoint, save_predictions,
                                 test_interval)
# TensorFlow comes with `resnet`, matplotlib with `for_report.pictures`: imported where they are first needed.

PREVIEW = 280  # pixels, of a person's image on the contact sheet
SHEET = 300    # images at most on the contact sheet
READ_ONLY = 'copy INFOS/ and runs/ to a folder of your own, and test there with --output_dir'
SHORTEST_NAME = 20  # columns of a terminal, for an image's name
SAVED_MODEL, TFLITE, ONNX, LABELS, CARD = 'saved_model', 'model.tflite', 'model.onnx', 'labels.txt', 'model.json'
FORMATS = {'savedmodel': SAVED_MODEL, 'tflite': TFLITE, 'onnx': ONNX}  # of an export: what each is called there
OPSET = 15  # of ONNX
NO_ONNX = 'ONNX needs one more package: pip install tf2onnx'


# ------------------------------------------------------------------------------ the network of a run

def restored(preset, checkpoint, use):
    """Returns use(net, session) of the inference form with a checkpoint's variables.

    The checkpoint may hold more variables than the network has. Raises InputError where it is
    damaged, or lacks variables of the preset's network.
    """
    check_folder_name(os.path.dirname(checkpoint))
    from resnet import ResNet, make_session, reason, tf
    with tf.Graph().as_default():
        net = ResNet(preset, training=False)
        with make_session(preset, log_placement=False) as session:
            if not survives(tf.train.NewCheckpointReader, checkpoint):
                raise InputError(f'{checkpoint} is damaged: TensorFlow would end on it')
            try:
                shapes = tf.train.NewCheckpointReader(checkpoint).get_variable_to_shape_map()
                for variable in tf.global_variables():
                    name, shape = variable.op.name, variable.shape.as_list()
                    if shapes.get(name) != shape:
                        raise InputError(f'{checkpoint} does not fit a {preset.model}: {name} is '
                                         f'{shapes.get(name, "missing")} there, not {shape}')
                tf.train.Saver().restore(session, checkpoint)
            except InputError:
                raise
            except Exception as error:  # a damaged file can raise anything
                raise InputError(f'{checkpoint} is damaged: {reason(error)}')
            return use(net, session)


# ------------------------------------------------------------------------------ test

def test(preset, checkpoint, images, labels, output_dir):
    """Tests a run (a Preset) on uint8 [N, 32, 32, 3] and int64 [N], and records the result.

    Returns the updated Preset and the confusion matrix int64 [classes, classes], a true class a row.
    Raises InputError where the checkpoint cannot be used, or is no longer the run's best.
    """
    from resnet import evaluate_both_views
    predictions, probabilities = restored(preset, checkpoint,
                                          lambda net, session: evaluate_both_views(net, session, images))
    tested = read_preset(preset.pickle_path(output_dir))
    if tested.early_stopping_epoch != preset.early_stopping_epoch:
        raise InputError(f'run {preset.timestamp} was trained further in the meantime; test it again')
    if tested.status == 'training':  # as a killed process left it
        tested.status = 'interrupted'
    tested.update(dict(test_accuracy=float((predictions == labels).mean()), finished=True,
                       test_accuracy_mirrored=float((probabilities.argmax(1) == labels).mean())))
    try:
        save_predictions(tested, output_dir, labels, predictions)
        tested.save(output_dir)
        tested.log(output_dir, 'eval_overall.txt')
    except OSError as error:
        raise InputError(f'the result of run {preset.timestamp}, test accuracy {tested.test_accuracy:.4f}, cannot be '
                         f'written ({error})')
    return tested, confusion_matrix(labels, predictions, preset.num_classes)


def print_confusion(confusion):
    """Accuracy by class and the confusion matrix: true classes in rows, predicted ones in columns.

    In a terminal that is too narrow for the matrix, the two most frequent mistakes stand in its place.
    """
    counts = confusion[:len(CLASSES), :len(CLASSES)]
    head = ''.join(f'{name[:5]:>6}' for name in CLASSES)
    mistakes = [''.join(f'{count:>6}' for count in row) for row in counts]
    if shutil.get_terminal_size(fallback=(1000, 24)).columns < 28 + len(head):
        head = '  most often taken for'
        mistakes = [_likeliest_mistakes(k, row) for k, row in enumerate(counts)]
    else:
        print(' ' * 28 + 'predicted')
    print(f'{"true":11}{"images":>7} {"accuracy":>8} {head}')
    for k, name in enumerate(CLASSES):
        total = confusion[k].sum()
        print(f'{name:11}{total:>7} {confusion[k, k] / max(total, 1):>8.3f} {mistakes[k]}')


def _likeliest_mistakes(k, counts):
    """The two classes that class k is most often taken for, with their counts."""
    mistakes = [(int(count), CLASSES[j]) for j, count in enumerate(counts) if j != k and count]
    return '  ' + ', '.join(f'{name} {count}' for count, name in sorted(mistakes, reverse=True)[:2])


# ------------------------------------------------------------------------------ own images

def classify(preset, checkpoint, places, output_dir, as_json=False):
    """Prints the three likeliest classes of a person's images under a trained run, and draws a contact sheet of them.

    Each is judged by the mean of the probabilities of itself and of its mirror image. `places` are files, folders and
    globs; the sheet is for_report/used_images.png in output_dir. Returns the paths of the images, their probabilities,
    float32 [images, classes], and sentences about what could not be read. Raises InputError where there is no image
    at all.
    """
    names, previews, pictures, problems = _read_images(places)
    for problem in problems:
        print(f'skipped: {shown_path(problem)}', file=sys.stderr)
    if not pictures:
        raise InputError('there is no image to classify in what --images names')

    from resnet import evaluate_both_views
    # One at a time: the answer for an image is then the same to the last bit whatever is given beside it.
    _, probabilities = restored(preset, checkpoint, lambda net, session: evaluate_both_views(
        net, session, np.stack(pictures), batch=1, desc='classifying'))
    labels = [shown_path(name) for name in names]
    if as_json:
        for name, row in zip(names, probabilities):
            values = {label: round(float(p), 6) for label, p in zip(CLASSES, row)}
            print(json.dumps(dict(image=name, run=preset.timestamp, probabilities=values)))
    else:
        print_answers(labels, probabilities)
    from for_report.pictures import contact_sheet
    contact_sheet(preset, labels, previews, pictures, probabilities, output_dir, quiet=as_json)
    return names, probabilities, problems


def _read_images(places):
    """Paths, thumbnails (PIL, of the first SHEET) and uint8 [32, 32, 3] of a person's images, and what is wrong."""
    paths, problems = data_helpers.find_images(places)
    names, previews, pictures = [], [], []
    with Progress(total=len(paths), desc='reading images', unit='images') as progress:
        for path in paths:
            try:
                picture = data_helpers.read_image(path)
                pictures.append(data_helpers.resize(picture))
                names.append(path)
                if len(previews) < SHEET:
                    previews.append(Image.fromarray(picture))
                    previews[-1].thumbnail((PREVIEW, PREVIEW), Image.BILINEAR)
            except InputError as error:
                problems.append(str(error))
            progress.update()
    return names, previews, pictures, problems


def print_answers(labels, probabilities):
    """A line an image: its name, shortened where the terminal is too narrow, and the three likeliest classes."""
    likeliest = np.argsort(-probabilities[:, :len(CLASSES)], axis=1, kind='stable')[:, :3]
    answers = [''.join(f'  {CLASSES[k]:>10} {row[k]:6.1%}' for k in best)
               for best, row in zip(likeliest, probabilities)]
    terminal = shutil.get_terminal_size(fallback=(1000, 24)).columns
    room = max(SHORTEST_NAME, terminal - len(answers[0]))
    names = [shortened(label, room) for label in labels]
    width = max(map(text_width, names))
    for name, answer in zip(names, answers):
        print(name + ' ' * (width - text_width(name)) + answer, flush=True)


def shown_path(path):
    """A path for the console and for pictures: composed letters, no control characters, no broken ones."""
    return printable(unicodedata.normalize('NFC', os.fsencode(path).decode('utf-8', 'replace')))


# ------------------------------------------------------------------------------ export

HOW_TO_CALL = {
    SAVED_MODEL: 'tf.saved_model.load("saved_model").signatures["serving_default"](images=tf.constant(images)), '
                 'images being uint8 [N, 32, 32, 3]',
    TFLITE: 'an interpreter\'s set_tensor, invoke and get_tensor, by the names of its inputs and outputs; images '
            'being float32 [1, 32, 32, 3], also 0 to 255; resize_tensor_input makes it [N, 32, 32, 3]',
    ONNX: 'onnxruntime.InferenceSession("model.onnx").run(["probabilities", "classes"], {"images": images}), images '
          'being uint8 [N, 32, 32, 3]; OpenVINO reads it as well, and computes in 32 bits where its property '
          'INFERENCE_PRECISION_HINT is f32'}


def possible_formats():
    """Those of FORMATS whose packages are installed."""
    return [name for name in FORMATS if name != 'onnx' or importlib.util.find_spec('tf2onnx')]


def export(preset, checkpoint, folder, output_dir, formats=None, force=False):
    """Writes a run's network into a new folder, for programs that do not have this collection.

    The folder is there whole or not at all. `formats` are names of FORMATS, those possible if it is not given; labels
    and model.json lie beside them. Returns the latter's content, a dictionary. `force` replaces an export that is
    there. Raises InputError where the folder is taken or cannot be written, a package is missing, or a converter
    fails.
    """
    formats = formats or possible_formats()
    if not set(formats).issubset(possible_formats()):
        raise InputError(NO_ONNX)
    folder = os.path.abspath(folder)
    unfinished = f'{folder}{UNFINISHED}{secrets.token_hex(4)}'
    try:
        _check_vacant(folder, force)
        os.makedirs(unfinished)
        frozen = restored(preset, checkpoint, _freeze)
        for name in formats:
            WRITERS[name](frozen, os.path.join(unfinished, FORMATS[name]))
        labels = _labels(preset)
        write_atomically(os.path.join(unfinished, LABELS), '\n'.join(labels + ['']).encode())
        card = _card(preset, checkpoint, labels, unfinished, output_dir)
        write_atomically(os.path.join(unfinished, CARD), (json.dumps(card, indent=2) + '\n').encode())
        _check_vacant(folder, force)  # others may have written there meanwhile
        if os.path.isdir(folder):
            os.rename(folder, f'{unfinished}-replaced')
        os.rename(unfinished, folder)
        shutil.rmtree(f'{unfinished}-replaced', ignore_errors=True)
    except OSError as error:
        raise InputError(f'{folder} cannot be written ({error.strerror or error})')
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return card


def _check_vacant(folder, force):
    """Raises InputError where something is there that may not be replaced; by force an export alone may."""
    if not os.path.lexists(folder):
        return
    if not force:
        raise InputError(f'{folder} is there already; --force replaces an export')
    if os.path.islink(folder) or not _is_export(folder):
        raise InputError(f'{folder} is no export, or holds other files too, and is not replaced; name another folder')


def _is_export(folder):
    """Whether a folder holds an export's files, by its model.json, and no others."""
    try:
        with open(os.path.join(folder, CARD), encoding='utf-8') as file:
            return {CARD, *json.load(file)['sha256']}.issuperset(_files_in(folder))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _files_in(folder):
    """The paths of all files in a folder, relative to it and with slashes, sorted."""
    return sorted(os.path.relpath(os.path.join(root, name), folder).replace(os.sep, '/')
                  for root, _, names in os.walk(folder) for name in names)


def _labels(preset):
    return [CLASSES[k] if k < len(CLASSES) else f'class {k}' for k in range(preset.num_classes)]


def _freeze(net, session):
    """The inference form as a GraphDef that holds its weights: X to logit/probabilities and logit/predictions."""
    from resnet import tf
    outputs = [net.probabilities.op.name, net.predictions.op.name]
    frozen = tf.graph_util.convert_variables_to_constants(session, session.graph_def, outputs)
    for node in frozen.node:
        if node.op == 'IdentityN':  # of a gradient of our own: TensorFlow Lite has no such operation
            kind = node.attr['T'].list.type[0]
            del node.input[1:]
            node.op = 'Identity'
            node.attr.clear()
            node.attr['T'].type = kind
    return frozen


def _with_signature(frozen, kind):
    """Puts the frozen network into the current graph: {name: tensor} of its input, and of its outputs.

    `images` [N, 32, 32, 3], 0 to 255, of the type `kind`; `probabilities` float32 [N, classes], `classes` int64 [N].
    """
    from resnet import tf
    images = tf.placeholder(kind, [None, SIDE, SIDE, 3], name='images')
    scaled = tf.cast(images, tf.float32) / 127.5 - 1
    probabilities, classes = tf.import_graph_def(frozen, {'X:0': scaled}, name='network',
                                                 return_elements=['logit/probabilities:0', 'logit/predictions:0'])
    return {'images': images}, {'probabilities': tf.identity(probabilities, 'probabilities'),
                                'classes': tf.identity(classes, 'classes')}


def _write_saved_model(frozen, path):
    from resnet import reason, tf
    with tf.Graph().as_default(), tf.Session() as session:
        signature = tf.saved_model.predict_signature_def(*_with_signature(frozen, tf.uint8))
        try:
            builder = tf.saved_model.Builder(path)
            # Without the defaults: an older TensorFlow does not know all of a newer one's attributes.
            builder.add_meta_graph_and_variables(session, [tf.saved_model.tag_constants.SERVING],
                                                 {'serving_default': signature}, strip_default_attrs=True)
            builder.save()
        except (tf.errors.OpError, UnicodeError) as error:  # the latter of a folder's name
            raise OSError(reason(error))


def _write_tflite(frozen, path):
    """By float32 images: the converter of TensorFlow 1.15 takes others for quantized ones."""
    from resnet import reason, tf
    with tf.Graph().as_default(), tf.Session() as session:
        inputs, outputs = _with_signature(frozen, tf.float32)
        converter = tf.lite.TFLiteConverter.from_session(session, list(inputs.values()), list(outputs.values()))
        path_of_programs = os.environ.get('PATH', '')
        os.environ['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), path_of_programs])
        try:  # TensorFlow 1.15 starts a program that pip has put beside Python
            content = converter.convert()
        except Exception as error:
            raise InputError(f'TensorFlow Lite cannot convert the network ({reason(error)})')
        finally:
            os.environ['PATH'] = path_of_programs
    write_atomically(path, content)


def _write_onnx(frozen, path):
    """By tf2onnx in a process of its own, which prints a lot."""
    with tempfile.TemporaryDirectory() as folder:
        saved_model = os.path.join(os.path.abspath(folder), SAVED_MODEL)
        _write_saved_model(frozen, saved_model)
        convert = [sys.executable, '-m', 'tf2onnx.convert', '--saved-model', saved_model, '--output', path, '--opset',
                   str(OPSET)]
        # From the project's folder, because Python imports from the folder where it is started.
        done = subprocess.run(convert, cwd=PROJECT_DIR, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        if done.returncode or not os.path.isfile(path):
            problem = (done.stdout.strip() or 'it says nothing').splitlines()[-1]
            raise InputError(f'tf2onnx cannot convert the network ({problem})')


WRITERS = {'savedmodel': _write_saved_model, 'tflite': _write_tflite, 'onnx': _write_onnx}


def _card(preset, checkpoint, labels, folder, output_dir):
    """What an export is and how to call it, of the formats in `folder`: a dictionary for JSON."""
    from resnet import tf
    digests = {name: data_helpers.sha256_of(os.path.join(folder, name)) for name in _files_in(folder)}
    interval = test_interval(preset, load_predictions([preset], output_dir))
    return {
        'run': preset.timestamp,
        'preset': preset.preset,
        'model': preset.model,
        'recipe': {'in words': describe(preset), 'seed': preset.seed, 'steps': preset.steps,
                   **{name: getattr(preset, name) for name in RECIPE}},
        'checkpoint': os.path.basename(checkpoint),
        'test_accuracy': preset.test_accuracy if preset.finished else None,
        'interval_95': interval and [round(bound, 6) for bound in interval],
        'test_accuracy_mirrored': preset.test_accuracy_mirrored if preset.finished else None,
        'images': '[N, 32, 32, 3], red, green, blue, each 0 to 255; scaling and normalization are inside. What comes '
                  'out is of the images as they are; test_accuracy_mirrored is by the mean of the probabilities of '
                  'each image and its mirror image',
        'outputs': {'probabilities': f'float32 [N, {len(labels)}]', 'classes': 'int64 [N], lines of labels.txt from 0'},
        'labels': labels,
        'how_to_call': {name: call for name, call in HOW_TO_CALL.items() if os.path.exists(os.path.join(folder, name))},
        'exported_by': f'TensorFlow {tf.__version__}',
        'sha256': digests}


# ------------------------------------------------------------------------------ command line

@exit_on_input_error
def main(arguments=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--timestamp', nargs='?', const=NEWEST,
                        help="the run: its timestamp, a unique beginning of it, its folder, or 'best'; alone: the "
                             'newest (default: every untested run; with --images or --export: the best)')
    task = parser.add_mutually_exclusive_group()
    task.add_argument('--images', nargs='+', metavar='PLACE',
                      help='classify these files, folders and globs instead of testing')
    task.add_argument('--export', metavar='FOLDER', type=os.path.expanduser,
                      help="write the run's network into this new folder, for other programs, instead of testing")
    parser.add_argument('--format', choices=sorted(FORMATS),
                        help='export this alone (default: all, onnx where tf2onnx is installed)')
    parser.add_argument('--force', action='store_true', help='replace an export that is there')
    parser.add_argument('--json', action='store_true', help='print one JSON object a line, and nothing else')
    flags = parser.parse_args(arguments)
    if flags.export is None and (flags.format or flags.force):
        parser.error('--format and --force go with --export FOLDER')
    if flags.images:
        _classify(flags)
    elif flags.export is not None:
        _export(flags)
    else:
        _test(flags)


def _classify(flags):
    preset = load_preset(flags.output_dir, flags.timestamp or BEST)
    checkpoint = best_checkpoint(preset, flags.output_dir)
    preset = as_tested(preset, checkpoint, flags.output_dir)
    if not flags.json:
        print(f'By run {_in_words(preset)}', flush=True)
    _, _, problems = classify(preset, checkpoint, flags.images, flags.output_dir, flags.json)
    if problems:
        raise InputError(f'{len(problems)} of what --images names could not be read, see above')


def _in_words(preset):
    """A run in a line: its timestamp, recipe, model, test accuracy, and the latter with the mirror image."""
    name = f'{preset.timestamp}: {describe(preset)}, {preset.model}'
    if not preset.finished:
        return f'{name}, not tested'
    if preset.test_accuracy_mirrored is None:
        return f'{name}, test accuracy {preset.test_accuracy:.2%}'
    return f'{name}, test accuracy {preset.test_accuracy:.2%}, with mirror image {preset.test_accuracy_mirrored:.2%}'


def _export(flags):
    preset = load_preset(flags.output_dir, flags.timestamp or BEST)
    checkpoint = best_checkpoint(preset, flags.output_dir)
    preset = as_tested(preset, checkpoint, flags.output_dir)
    if not flags.json:
        print(f'Run {_in_words(preset)}', flush=True)
    formats = [flags.format] if flags.format else None
    card = export(preset, checkpoint, flags.export, flags.output_dir, formats, flags.force)
    if flags.json:
        print(json.dumps(card))
        return
    for name in list(card['sha256']) + [CARD]:
        path = os.path.join(flags.export, name)
        print(f'written     {path}, {os.path.getsize(path):,} bytes')
    if not flags.format and ONNX not in card['sha256']:
        print(f'not written {os.path.join(flags.export, ONNX)}: {NO_ONNX}')


def _test(flags):
    with contextlib.redirect_stdout(sys.stderr if flags.json else sys.stdout):  # what is said before the answers
        testable, problems = _testable(flags)
        if testable:
            check_output_dir(flags.output_dir, READ_ONLY)
            images, labels = data_helpers.load(flags.data_dir, data_helpers.TEST_FILES)
    for preset in testable:
        try:
            with locked(preset, flags.output_dir):
                preset = read_preset(preset.pickle_path(flags.output_dir))  # it may have been trained further meanwhile
                _test_one(preset, best_checkpoint(preset, flags.output_dir), images, labels, flags)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError('; '.join(problems))


def _testable(flags):
    """The runs that the flags name and that have a checkpoint, and sentences about those without one."""
    testable, problems = [], []
    if flags.timestamp is None:
        presets = _untested(flags.output_dir)
    else:
        presets = [load_preset(flags.output_dir, flags.timestamp)]
    for preset in presets:
        try:
            require_checkpoint(preset, flags.output_dir)
            testable.append(preset)
        except InputError as error:
            problems.append(str(error))
    return testable, problems


def _test_one(preset, checkpoint, images, labels, flags):
    name = os.path.basename(checkpoint)
    if not flags.json:
        print(f'Run {preset.timestamp}: {describe(preset)}, {preset.model}, {name} on {len(labels):,} test images',
              flush=True)
    tested, confusion = test(preset, checkpoint, images, labels, flags.output_dir)
    if flags.json:
        by_class = {name: float(row[k] / max(row.sum(), 1)) for k, (name, row) in enumerate(zip(CLASSES, confusion))}
        print(json.dumps(dict(run=tested.timestamp, preset=tested.preset, checkpoint=name, images=len(labels),
                              test_accuracy=tested.test_accuracy, accuracy_by_class=by_class,
                              test_accuracy_mirrored=tested.test_accuracy_mirrored)), flush=True)
    else:
        print_confusion(confusion)
        print(f'test accuracy {tested.test_accuracy:.4f}\n'
              f'with mirror image {tested.test_accuracy_mirrored:.4f}', flush=True)


def _untested(output_dir):
    """The runs without a test accuracy, save those that diverged before their first checkpoint."""
    runs = load_presets(output_dir)
    presets = [preset for preset in runs if not preset.finished and (
        preset.status != 'diverged' or checkpoint_steps(preset.run_dir(output_dir)))]
    if not runs:
        raise InputError(no_runs(output_dir))
    if not presets:
        print('No run is left to test')
        tested = [preset for preset in runs if preset.finished and checkpoint_steps(preset.run_dir(output_dir))]
        if tested:
            retest = command('resnet_eval.py', '--timestamp', tested[-1].timestamp, output_dir=output_dir)
            print(f'To test the newest again: {retest}')
    return presets


if __name__ == '__main__':
    main()
