"""Tests trained runs on CIFAR-10's 10,000 test images, or classifies a person's own images.

    python resnet_eval.py                            every run that is not finished
    python resnet_eval.py --timestamp 1795558284     that run
    python resnet_eval.py --timestamp                the newest
    python resnet_eval.py --timestamp 1795558284 --images cat.jpg photos/

A test takes the run's best checkpoint by validation accuracy, prints accuracy by class and the
confusion matrix, and records the test accuracy in the run's pickle and in INFOS/eval_overall.txt,
and the predictions beside the checkpoints. Images are drawn in for_report/used_images.png too.
"""
import os
import sys
import unicodedata

import numpy as np
from PIL import Image

import data_helpers
from presets_and_results import (NEWEST, ArgumentParser, InputError, ProgressLine, check_output_dir, confusion_matrix,
                                 exit_on_input_error, load_preset, load_presets, locked, new_figure, printable,
                                 read_preset, save_predictions, write_picture)
from resnet_train import UNFINISHED, checkpoint_path, checkpoint_steps, evaluate, make_session, reason

PREVIEW = 280  # pixels, of a person's image on the contact sheet
SHEET = 300    # images at most on the contact sheet
WIDE_FONTS = ('NanumGothic', 'Noto Sans CJK KR', 'Noto Sans CJK JP', 'Malgun Gothic', 'Apple SD Gothic Neo',
              'Arial Unicode MS', 'Microsoft YaHei', 'WenQuanYi Zen Hei')  # where file names need them


def best_checkpoint(preset, output_dir):
    """The path of a run's best checkpoint, or of its latest where the best is gone. Raises InputError without any."""
    run_dir = preset.run_dir(output_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise InputError('run {0.timestamp} has no checkpoint in {1}; {2}'.format(
            preset, os.path.join(run_dir, 'checkpoints'),
            ('go on with it: python resnet_train.py --resume {0.timestamp}' if preset.status in UNFINISHED else
             'bring it back, or train anew: python resnet_train.py --preset {0.preset}').format(preset)))
    if preset.early_stopping_epoch not in steps:
        print('run {}: its best checkpoint, step {}, is not there; taking the latest, step {}'.format(
            preset.timestamp, preset.early_stopping_epoch, steps[-1]))
        return checkpoint_path(run_dir, steps[-1])
    return checkpoint_path(run_dir, preset.early_stopping_epoch)


def restored(preset, checkpoint, use):
    """Returns use(net, session) of the inference form with a checkpoint's variables.

    The checkpoint may hold more variables than the network has. Raises InputError where it is
    damaged, or lacks variables of the preset's network.
    """
    from resnet import ResNet, tf
    with tf.Graph().as_default():
        net = ResNet(preset, training=False)
        with make_session(preset) as session:
            try:
                held = tf.train.NewCheckpointReader(checkpoint).get_variable_to_shape_map()
                for variable in tf.global_variables():
                    name, shape = variable.op.name, variable.shape.as_list()
                    if held.get(name) != shape:
                        raise InputError('{} does not fit a {}: {} is {} there, not {}'.format(
                            checkpoint, preset.model, name, held.get(name, 'missing'), shape))
                tf.train.Saver().restore(session, checkpoint)
            except InputError:
                raise
            except Exception as error:  # a damaged file can raise anything
                raise InputError('{} is damaged: {}'.format(checkpoint, reason(error)))
            return use(net, session)


def test(preset, checkpoint, images, labels, output_dir):
    """Tests a run (a Preset) on uint8 [N, 32, 32, 3] and int64 [N], prints and records the result.

    Returns the accuracy (0 to 1) and the confusion matrix int64 [classes, classes], a true class a row.
    Raises InputError where the checkpoint cannot be used, or is no longer the run's best.
    """
    print('Run {0.timestamp}: preset {0.preset}, {0.model}, {1} on {2:,} test images'.format(
        preset, os.path.basename(checkpoint), len(labels)), flush=True)
    _, predictions = restored(preset, checkpoint, lambda net, session: evaluate(net, session, images, labels))
    confusion = confusion_matrix(labels, predictions, preset.num_classes)
    accuracy = float((predictions == labels).mean())
    _print_confusion(confusion)
    print('test accuracy {:.4f}'.format(accuracy))

    now = read_preset(preset.pickle_path(output_dir))
    if now.early_stopping_epoch != preset.early_stopping_epoch:
        raise InputError('run {} has gone on training meanwhile; test it again'.format(preset.timestamp))
    now.update(dict(test_accuracy=accuracy, finished=True))
    try:
        save_predictions(now, output_dir, labels, predictions)
        now.save(output_dir)
        now.log(output_dir, 'eval_overall.txt')
    except OSError as error:
        raise InputError('the result of run {} cannot be written ({})'.format(now.timestamp, error))
    return accuracy, confusion


def _print_confusion(confusion):
    """Rows are true classes, columns predicted ones."""
    n = len(data_helpers.CLASSES)
    print('{:24}predicted'.format('') + '\n{:11}{:>7} {:>8} '.format('true', 'images', 'accuracy')
          + ''.join('{:>6}'.format(name[:5]) for name in data_helpers.CLASSES))
    for k, name in enumerate(data_helpers.CLASSES):
        total = confusion[k].sum()
        print('{:11}{:>7} {:>8.3f} '.format(name, total, confusion[k, k] / max(total, 1))
              + ''.join('{:>6}'.format(count) for count in confusion[k, :n]))


def classify(preset, checkpoint, places, output_dir):
    """Prints the three likeliest classes of a person's images under a trained run, and draws a contact sheet of them.

    `places` are files, folders and globs; the sheet is for_report/used_images.png in output_dir.
    Returns the paths of the images and their probabilities, float32 [images, classes]. What is no
    image is named on stderr, and InputError raised in the end.
    """
    paths, problems = data_helpers.find_images(places)
    names, previews, pictures, progress = [], [], [], ProgressLine()
    for path in paths:
        progress('read {:,} of {:,} images', len(names), len(paths))
        try:
            picture = data_helpers.read_image(path)
            pictures.append(data_helpers.resize(picture))
            names.append(path)
            if len(previews) < SHEET:
                previews.append(Image.fromarray(picture))
                previews[-1].thumbnail((PREVIEW, PREVIEW), Image.BILINEAR)
        except InputError as error:
            problems.append(str(error))
    for problem in problems:
        print('skipped: {}'.format(_printable(problem)), file=sys.stderr)
    if not pictures:
        raise InputError('there is no image to classify in what --images names')

    def use(net, session):
        # One at a time: the answer for an image is then the same to the last bit whatever is given beside it.
        return np.concatenate([session.run(net.probabilities, {net.X: data_helpers.scale(picture[None])})
                               for picture in pictures])

    probabilities = restored(preset, checkpoint, use)
    labels = [_printable(name) for name in names]
    width = max(map(_columns, labels))
    for label, row in zip(labels, probabilities):
        likeliest = np.argsort(-row[:len(data_helpers.CLASSES)], kind='stable')[:3]
        print(label + ' ' * (width - _columns(label)) + ''.join(
            '  {:>10} {:5.1%}'.format(data_helpers.CLASSES[k], row[k]) for k in likeliest), flush=True)
    _draw_contact_sheet(preset, labels, previews, pictures, probabilities, output_dir)
    if problems:
        raise InputError('{} skipped, see above'.format(
            'one place or file was' if len(problems) == 1 else '{} places or files were'.format(len(problems))))
    return names, probabilities


def _printable(path):
    """A path for the console and for pictures: composed letters, no control characters, no broken ones."""
    return printable(unicodedata.normalize('NFC', os.fsencode(path).decode('utf-8', 'replace')))


def _columns(text):
    """The width of a text in a terminal, where East Asian letters take two columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in 'WF' else 1 for letter in text)


def _draw_contact_sheet(preset, labels, previews, pictures, probabilities, output_dir):
    """for_report/used_images.png: an image a cell, as given, as the network saw it, and its probabilities."""
    shown = len(previews)
    across = min(3, -(-shown // 4))
    down = -(-shown // across)
    width, height = 5.2, 1.75  # of a cell, inches
    figure = new_figure(width * across, height * down + 0.5)
    axes = figure.add_axes([0, 0, 1, 1])
    axes.text(0.1, height * down + 0.32, preset.title, fontsize=9, va='center', weight='bold')
    rest = '' if shown == len(pictures) else '; the first {} of {:,} images'.format(shown, len(pictures))
    axes.text(0.1, height * down + 0.12, 'as given, as the network saw it (32x32), probabilities in %' + rest,
              fontsize=8, va='center')
    for k in range(shown):
        left, bottom = width * (k % across), height * (down - 1 - k // across)
        text, family = _drawable(_fitting(labels[k], 48))
        axes.text(left + 0.1, bottom + 1.6, text, fontsize=8, va='center', family=family)
        columns, rows = previews[k].size
        scale = 1.4 / max(columns, rows)
        x, y = left + 0.8, bottom + 0.78
        half = max(columns * scale / 2, 0.015), max(rows * scale / 2, 0.015)  # a hair at least
        axes.imshow(np.asarray(previews[k]), extent=(x - half[0], x + half[0], y - half[1], y + half[1]),
                    interpolation='antialiased' if max(columns, rows) > 32 else 'nearest')
        axes.imshow(pictures[k], extent=(left + 1.6, left + 3, y - 0.7, y + 0.7), interpolation='nearest')
        row = probabilities[k][:len(data_helpers.CLASSES)]
        places = y + 0.63 - 0.14 * np.arange(len(row))
        axes.barh(places, 1.0 * row, height=0.11, left=left + 3.75,
                  color=['#222222' if p == row.max() else '#999999' for p in row])
        axes.plot([left + 3.75] * 2, [y - 0.72, y + 0.72], color='#666666', linewidth=0.6)
        for place, name, p in zip(places, data_helpers.CLASSES, row):
            axes.text(left + 3.7, place, name, fontsize=6, ha='right', va='center')
            axes.text(left + 3.8 + p, place, '{:.1f}'.format(100 * p), fontsize=6, va='center')
    axes.set_aspect('auto')
    axes.set_xlim(0, width * across)
    axes.set_ylim(0, height * down + 0.5)
    axes.axis('off')
    write_picture(figure, output_dir, 'used_images.png')


def _fitting(text, columns):
    """A text cut in its middle to so many columns."""
    while _columns(text) > columns:
        middle = len(text) // 2
        text = text[:middle - 2] + '...' + text[middle + 2:]
    return text


def _drawable(text):
    """A text and a font of this machine that has its letters; those that none has become question marks."""
    from matplotlib import font_manager
    letters = set(map(ord, text))
    for family in ('DejaVu Sans',) + WIDE_FONTS:
        try:
            held = font_manager.get_font(font_manager.findfont(family, fallback_to_default=False)).get_charmap()
        except ValueError:  # not installed
            continue
        if letters <= held.keys():
            break
    else:
        family = 'DejaVu Sans'
        held = font_manager.get_font(font_manager.findfont(family)).get_charmap()
        text = ''.join(letter if ord(letter) in held else '?' for letter in text)
    return text.replace('$', r'\$'), family  # or matplotlib takes what is between two dollars for a formula


@exit_on_input_error
def main(arguments=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--timestamp', nargs='?', const=NEWEST,
                        help='the run; alone: the newest (default: every run that is not finished)')
    parser.add_argument('--images', nargs='+', metavar='PLACE',
                        help='classify these files, folders and globs instead of testing (with no --timestamp: by '
                             'the newest run)')
    flags = parser.parse_args(arguments)
    if flags.timestamp is not None or flags.images:
        presets = [load_preset(flags.output_dir, None if flags.timestamp == NEWEST else flags.timestamp)]
    else:
        presets = [preset for preset in load_presets(flags.output_dir) if not preset.finished and not (
            preset.status == 'diverged' and not checkpoint_steps(preset.run_dir(flags.output_dir)))]
        if not presets:
            newest = load_preset(flags.output_dir)  # says what to do where there is no run at all
            print('Every run is finished. To test the newest again: --timestamp {}'.format(newest.timestamp))
            return

    testable, problems = [], []
    for preset in presets:
        try:
            testable.append((preset, best_checkpoint(preset, flags.output_dir)))
        except InputError as error:
            problems.append(str(error))
    if testable and flags.images:
        classify(*testable[0], flags.images, flags.output_dir)
    elif testable:
        check_output_dir(flags.output_dir)
        images, labels = data_helpers.load(flags.data_dir, data_helpers.TEST_FILES)
        for preset, checkpoint in testable:
            try:
                with locked(preset, flags.output_dir):
                    test(preset, checkpoint, images, labels, flags.output_dir)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError('; '.join(problems))


if __name__ == '__main__':
    main()
