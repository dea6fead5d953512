"""Tests trained runs on CIFAR-10's 10,000 test images, or classifies a person's own images.

    python resnet_eval.py                            every run that is not finished
    python resnet_eval.py --timestamp 1601870034     that run
    python resnet_eval.py --timestamp                the newest
    python resnet_eval.py --timestamp 1601870034 --images cat.jpg photos/*.png

A test takes the run's best checkpoint by validation accuracy, prints accuracy by class and the
confusion matrix, and records the test accuracy in the run's pickle and in INFOS/eval_overall.txt.
"""
import os
import sys

import numpy as np

import data_helpers
from presets_and_results import (ArgumentParser, InputError, check_output_dir, exit_on_input_error, load_preset,
                                 load_presets, read_preset)
from resnet_train import checkpoint_path, checkpoint_steps, evaluate, make_session

NEWEST = 'the newest'


def best_checkpoint(preset, output_dir):
    """The path of a run's best checkpoint, or of its latest where the best is gone. Raises InputError without any."""
    run_dir = preset.run_dir(output_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise InputError('run {} has no checkpoint in {}'.format(
            preset.timestamp, os.path.join(run_dir, 'checkpoints')))
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
            except (tf.errors.OpError, ValueError, RuntimeError) as error:  # 1.15's reader raises ValueError
                raise InputError('{} is damaged: {}'.format(checkpoint, str(error).splitlines()[0]))
            return use(net, session)


def test(preset, checkpoint, images, labels, output_dir):
    """Tests a run (a Preset) on uint8 [N, 32, 32, 3] and int64 [N], prints and records the result.

    Returns the accuracy (0 to 1) and the confusion matrix int64 [classes, classes], a true class a row.
    Raises InputError where the checkpoint cannot be used, or is no longer the run's best.
    """
    print('Run {0.timestamp}: preset {0.preset}, {0.model}, {1} on {2:,} test images'.format(
        preset, os.path.basename(checkpoint), len(labels)), flush=True)
    _, predictions = restored(preset, checkpoint, lambda net, session: evaluate(net, session, images, labels))
    confusion = np.zeros((preset.num_classes, preset.num_classes), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    accuracy = float((predictions == labels).mean())
    _print_confusion(confusion)
    print('test accuracy {:.4f}'.format(accuracy))

    now = read_preset(preset.pickle_path(output_dir))
    if now.early_stopping_epoch != preset.early_stopping_epoch:
        raise InputError('run {} has gone on training meanwhile; test it again'.format(preset.timestamp))
    now.update(dict(test_accuracy=accuracy, finished=True))
    now.save(output_dir)
    now.log(output_dir, 'eval_overall.txt')
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


def classify(preset, checkpoint, paths):
    """Prints the three likeliest classes of a person's images under a trained run.

    Returns the probabilities float32 [images, classes] of those that could be read. The others
    are named on stderr; raises InputError after the table where there were any.
    """
    names, pictures = [], []
    for path in paths:
        try:
            pictures.append(data_helpers.resize(data_helpers.read_image(path)))
            names.append(path)
        except InputError as error:
            print('skipped: {}'.format(error), file=sys.stderr)
    if not pictures:
        raise InputError('none of the {} files given is an image'.format(len(paths)))

    def use(net, session):
        # One at a time: the answer for an image is then the same to the last bit whatever is given beside it.
        return np.concatenate([session.run(net.probabilities, {net.X: data_helpers.scale(picture[None])})
                               for picture in pictures])

    probabilities = restored(preset, checkpoint, use)
    width = max(map(len, names))
    for name, row in zip(names, probabilities):
        likeliest = np.argsort(-row[:len(data_helpers.CLASSES)], kind='stable')[:3]
        print(name.ljust(width) + ''.join(
            '  {:>10} {:5.1%}'.format(data_helpers.CLASSES[k], row[k]) for k in likeliest))
    if len(names) < len(paths):
        raise InputError('{} of {} files were skipped'.format(len(paths) - len(names), len(paths)))
    return probabilities


@exit_on_input_error
def main(arguments=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--timestamp', nargs='?', const=NEWEST,
                        help='the run; alone: the newest (default: every run that is not finished)')
    parser.add_argument('--images', nargs='+', metavar='FILE',
                        help='classify these instead of testing (with no --timestamp: by the newest run)')
    flags = parser.parse_args(arguments)
    if flags.timestamp is not None or flags.images:
        presets = [load_preset(flags.output_dir, None if flags.timestamp == NEWEST else flags.timestamp)]
    else:
        presets = [preset for preset in load_presets(flags.output_dir) if not preset.finished]
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
        classify(*testable[0], flags.images)
    elif testable:
        check_output_dir(flags.output_dir)
        images, labels = data_helpers.load(flags.data_dir, data_helpers.TEST_FILES)
        for preset, checkpoint in testable:
            try:
                test(preset, checkpoint, images, labels, flags.output_dir)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError('; '.join(problems))


if __name__ == '__main__':
    main()
