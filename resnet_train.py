"""Trains one preset on CIFAR-10, keeps the best and the latest weights, and records what came out.

    python resnet_train.py --preset 4
    python resnet_train.py --preset 4 --lr 0.05 --seed 1 --max_steps 2000
    python resnet_train.py --resume

Ctrl-C once ends a training cleanly: validated, saved and recorded. Twice breaks it off. Whatever stopped
it, --resume goes on as if nothing had: on a CPU, with the same TensorFlow, to the same weights to the last bit.
"""
import collections
import concurrent.futures
import contextlib
import glob
import itertools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time

import numpy as np

import data_helpers
from presets_and_results import (FIELDS, HYPERPARAMETERS, NAMES, NEWEST, RECIPE, ArgumentParser, Field, InputError,
                                 ProgressLine, check_output_dir, exit_on_input_error, load_preset, load_presets, locked,
                                 make_preset, read_preset, start_run)
# TensorFlow comes with `resnet`, which is imported where it is first needed: a wrong flag is refused before.

DECAY_STEPS = 24000       # training steps between decays of the learning rate
SUMMARY_EVERY = 10        # training steps between points of the training curves
EVALUATION_BATCH = 250    # images; more are hardly faster, and cost memory
EVALUATED_AT_ONCE = 2     # batches: one is computed while the other is between two operations, or is prepared
REFRESH_IMAGES = 4000     # training images that the statistics are averaged over before a network is judged
REFRESH_BATCH = 500       # images
BEST_OR_LATEST = 'model'  # name of a checkpoint
TO_RESUME = 'resume'      # name of one to go on from: its statistics are not fit to judge by
OPTIONS = ('nesterov', 'muon_lr', 'label_smoothing', 'data_augmentation', 'random_erasing', 'mixup',
           'low_resolution_epochs', 'mixed_precision', 'xla')  # of a recipe: named where they are on
UNFINISHED = ('training', 'interrupted')  # status of what can be resumed
HOW_MANY = Field(int, 1, 1000, 'seeds')
HPARAMS_METRICS = (('dev', 'best_accuracy'), ('dev', 'accuracy'), ('dev', 'loss'), ('train', 'loss'),
                   ('train', 'images_per_second'))


def learning_rate(preset, step, steps_per_epoch):
    """The rate of training step `step`, counted from 0; a pure function.

    Over the warm-up it rises linearly to lr. Then, by the preset's schedule, it is
    step        lr * lr_decay ** n, n counting the milestones passed, or floor(step / 24000)
    one-cycle   falling linearly to 0 (a triangle with the warm-up; Smith 2017, arXiv:1708.07120)
    cosine      falling to 0 as half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983)
    """
    warmup, end = preset.warmup_epochs * steps_per_epoch, preset.num_epochs * steps_per_epoch
    if step < warmup:
        return preset.lr * (step + 1) / (warmup + 1)
    if preset.schedule == 'step':
        milestones = [int(milestone) for milestone in (preset.lr_milestones or '').split(',') if milestone]
        passed = sum(step >= milestone for milestone in milestones) if milestones else step // DECAY_STEPS
        return preset.lr * preset.lr_decay ** passed
    part = (step - warmup) / (end - warmup)
    return preset.lr * (1 - part if preset.schedule == 'one-cycle' else (1 + math.cos(math.pi * part)) / 2)


def in_words(preset):
    """The recipe, for the console."""
    warmup = ' after {:g} epochs of warm-up, then'.format(preset.warmup_epochs) if preset.warmup_epochs else ''
    course = dict(step='x {:g} '.format(preset.lr_decay) + (
        'at steps ' + preset.lr_milestones.replace(',', ', ') if preset.lr_milestones
        else 'every {:,} steps'.format(DECAY_STEPS)), cosine='to 0 as a cosine')
    course['one-cycle'] = 'linearly to 0'
    words = ['learning rate {:g}{} {}'.format(preset.lr, warmup, course[preset.schedule]),
             'L2 {:g}'.format(preset.l2_reg_lambda), 'batch {}'.format(preset.batch_size),
             'momentum {:g}'.format(preset.momentum)]
    for name in OPTIONS:
        value = getattr(preset, name)
        if value:
            words.append(name.replace('_', ' ') + ('' if value is True else ' {:g}'.format(value)))
    return ', '.join(words + ['seed {}'.format(preset.seed)])


def make_session(preset):
    """The one place where a session is made, on the current default graph."""
    from resnet import KERNELS, tf
    config = tf.ConfigProto(allow_soft_placement=preset.allow_soft_placement,
                            log_device_placement=preset.log_device_placement)
    config.gpu_options.allow_growth = True  # leaves the rest of the GPU's memory to others
    if preset.xla and KERNELS == 'GPU':
        config.graph_options.optimizer_options.global_jit_level = tf.OptimizerOptions.ON_1
    return tf.Session(config=config)


def train(preset, data_dir, output_dir, resume=False):
    """Trains `preset` (a Preset), or goes on with its run, and returns it with its results, which are then on disk.

    CIFAR-10 is in data_dir or is fetched to it; INFOS/ and runs/ go to output_dir.
    Raises InputError on data or folders that cannot be used, and where the loss is no longer finite.
    """
    check_output_dir(output_dir)
    images, labels = data_helpers.load(data_dir, data_helpers.TRAIN_FILES)
    training, validation = [(images[part], labels[part]) for part in data_helpers.split(len(labels), preset.seed)]
    del images

    print('Loading TensorFlow ...', flush=True)
    from resnet import KERNELS, ResNet, half_precision, tf
    if preset.mixed_precision and not half_precision():
        raise InputError('mixed_precision needs a GPU of compute capability 7 or more, or a processor with AVX512_BF16 '
                         'or AMX under today\'s TensorFlow; here it would only cost accuracy: leave it out')
    if preset.xla and KERNELS != 'GPU':
        raise InputError('xla is for GPUs, and TensorFlow sees none; it would slow the training here: leave it out')
    if not resume:
        start_run(preset, output_dir)
    with locked(preset, output_dir), tf.Graph().as_default():
        if resume and vars(read_preset(preset.pickle_path(output_dir))) != vars(preset):
            raise InputError('run {} has gone on in other hands meanwhile'.format(preset.timestamp))
        net = ResNet(preset)
        with make_session(preset) as session, _stop_request() as stop, _batch_size_named(preset):
            run = Run(preset, net, session, output_dir, len(training[0]), resume)
            run.announce(data_dir, len(training[0]), len(validation[0]))
            session.graph.finalize()  # from here on nothing may add to it, which would slow every step
            steps = range(preset.steps + 1, run.last_step + 1)
            for step, (x, y) in zip(steps, run.batches(*training)):
                run.train_step(step, x, y)
                ending = step == run.last_step or bool(stop)
                validating = ending or step % preset.evaluate_every == 0
                saving = ending or step % preset.checkpoint_every == 0
                if ending and step < run.last_step:
                    print('\nStopping: validating and saving; Ctrl-C again breaks it off.', flush=True)
                if validating or saving:
                    net.refresh_statistics(session, _refreshing_batches(training[0]))
                if validating:
                    saving |= run.validate(step, *validation)
                if saving:
                    run.save(step)
                elif run.unsaved_seconds() > 60 * preset.checkpoint_minutes:
                    run.save(step, TO_RESUME)
                if ending:
                    break
            return run.finish('complete' if preset.steps == run.last_step else 'interrupted')


class Run:
    """A training at work, and what it writes: console, summaries, checkpoints, the pickle.

    Steps are counted from 1; a checkpoint or validation of step s has seen s batches. What is on disk is
    that of step `preset.steps` of the pickle, or can be brought back to it: the pickle is written last.
    """

    def __init__(self, preset, net, session, output_dir, n_training, resume=False):
        from resnet import tf
        self.preset, self.net, self.session, self.output_dir = preset, net, session, output_dir
        self.steps_per_epoch = data_helpers.steps_per_epoch(n_training, preset.batch_size)
        self.last_step = min(preset.num_epochs * self.steps_per_epoch, preset.max_steps or sys.maxsize)
        self.run_dir = preset.run_dir(output_dir)
        if resume and (preset.steps or 0) >= self.last_step and preset.val_accuracy is None:
            raise InputError('run {} cannot go on: by its record it is at its end, without a result'.format(
                preset.timestamp))
        self.saver = tf.train.Saver(max_to_keep=None, save_relative_paths=True)
        preset.update(dict(status='training', device=_device(session), tensorflow_version=tf.__version__,
                           python_version=platform.python_version()))
        preset.update(dict(test_accuracy=None, finished=False))  # of what it was when it was interrupted
        if not resume:
            preset.update(dict(val_accuracy=None, early_stopping_epoch=None, steps=None, training_time=None,
                               images_per_second=None))
        preset.update(dict(steps=preset.steps or 0, training_time=preset.training_time or 0.0))
        self.began, self.progress = time.time() - 60 * preset.training_time, ProgressLine()
        self.first_step = preset.steps + 1
        self.trained_images = preset.steps * preset.batch_size if preset.images_per_second else 0
        self.training_seconds = self.trained_images / (preset.images_per_second or 1)
        path = None
        if preset.steps:
            path = self._restore()
        else:
            session.run(tf.global_variables_initializer())
        with self._writing():
            preset.save(output_dir)
        with self._writing():  # where this fails there is a record to go on from
            self._open_summaries()
            if path:
                self._remove_all_but(path)
        self.saved = time.time()

    def _restore(self):
        """Sets the variables as the last save left them, and returns the path of its checkpoint."""
        paths = [checkpoint_path(self.run_dir, self.preset.steps, kind) for kind in (BEST_OR_LATEST, TO_RESUME)]
        path = next((path for path in paths if os.path.exists(path + '.index')), paths[0])
        try:
            self.saver.restore(self.session, path)
            return path
        except Exception as error:  # a damaged file can raise anything
            raise InputError('run {0.timestamp} cannot go on: {1} is missing or damaged ({2}); bring it back, or train '
                             'anew with --preset {0.preset}'.format(self.preset, path, reason(error)))

    def _open_summaries(self):
        """Opens the event files; what they held beyond the last save is gone, for it will come again."""
        folder = os.path.join(self.run_dir, 'summaries')
        self.writers = {'': _open_events(folder, -1)[0]}
        self._describe_hparams()
        upto = self.preset.steps or -1  # the graph, at step 0, comes again
        self.writers['train'], _ = _open_events(os.path.join(folder, 'train'), upto)
        self.writers['dev'], events = _open_events(os.path.join(folder, 'dev'), upto)
        self.best_steps = _best_steps(events)[-self.preset.num_checkpoints:]
        if self.preset.early_stopping_epoch and not self.best_steps:  # the curves were removed
            self.best_steps = [self.preset.early_stopping_epoch]
        if not self.preset.steps:
            self._write('train', 0, graph_def=self.session.graph.as_graph_def(add_shapes=True).SerializeToString())
        self._flush()

    def announce(self, data_dir, n_training, n_validation):
        """Says what runs, on what, and where it writes."""
        print('Preset {0.preset}: {0.model} (n = {0.num_residual_units}), {1:,} parameters\n'
              '  recipe  {2}\n'
              '  length  {3:,} steps, {4:.4g} epochs\n'
              '  data    {5:,} training and {6:,} validation images from {7}\n'
              '  device  {0.device}; TensorFlow {0.tensorflow_version}, Python {0.python_version}\n'
              '  writes  {8} and {9}'.format(
                  self.preset, self.net.count_parameters(), in_words(self.preset), self.last_step,
                  self.last_step / self.steps_per_epoch, n_training, n_validation, data_dir,
                  self.run_dir, os.path.join(self.output_dir, 'INFOS')), flush=True)

    def batches(self, images, labels):
        """The training batches that are to come, see data_helpers.training_batches, prepared in the background."""
        return data_helpers.in_background(data_helpers.training_batches(
            images, labels, self.preset, first_step=self.preset.steps))

    def train_step(self, step, x, y):
        """One training step on a batch; a point of the curves and the progress line now and then."""
        rate = learning_rate(self.preset, step - 1, self.steps_per_epoch)
        began = time.time()
        _, loss, accuracy = self.session.run(
            [self.net.train_step, self.net.training_loss, self.net.training_accuracy],
            {self.net.training_X: x, self.net.Y: y, self.net.learning_rate: rate})
        if not np.isfinite(loss):
            self._diverge(step, 'the loss is {}'.format(loss))
        if step > self.first_step:  # which also sets TensorFlow up
            self.training_seconds += time.time() - began
            self.trained_images += len(x)
        if step % SUMMARY_EVERY == 0:
            self._summarize('train', step, loss=loss, accuracy=accuracy, learning_rate=rate,
                            images_per_second=self._images_per_second())
        left = (time.time() - self.began) / step * (self.last_step - step)
        self.progress('step {:,}/{:,}  epoch {:.2f}  loss {:.4f}  accuracy {:.3f}  lr {:.4g}  {:,.0f} images/s  '
                      '{} left', step, self.last_step, step / self.steps_per_epoch, loss, accuracy, rate,
                      self._images_per_second(), _duration(left))

    def validate(self, step, images, labels):
        """Judges the weights on the validation images; a new best is saved and recorded."""
        loss, predictions = evaluate(self.net, self.session, images, labels)
        if not np.isfinite(loss):
            self._diverge(step, 'the validation loss is {}'.format(loss))
        accuracy = float((predictions == labels).mean())
        best = self.preset.val_accuracy is None or accuracy > self.preset.val_accuracy
        if best:
            self.best_steps = (self.best_steps + [step])[-self.preset.num_checkpoints:]
            self.preset.update(dict(val_accuracy=accuracy, early_stopping_epoch=step))
        self._summarize('dev', step, loss=loss, accuracy=accuracy, best_accuracy=self.preset.val_accuracy)
        self.progress.row('validation  step {:,}  epoch {:.2f}  loss {:.4f}  accuracy {:.4f}{}'.format(
            step, step / self.steps_per_epoch, loss, accuracy, '  best' if best else ''))
        return best

    def save(self, step, kind=BEST_OR_LATEST):
        """Writes the checkpoint of `step`, then the record, then removes what is neither best nor latest.

        In this order, so that at any moment the record points to a checkpoint that is there, and to
        summaries that hold all up to it. Raises InputError where they cannot be written, or where the
        weights are not fit to be.
        """
        if not self.session.run(self.net.finite):
            self._diverge(step, 'there are weights that are no longer finite')
        path = checkpoint_path(self.run_dir, step, kind)
        with self._writing():
            self._flush()
            self.saver.save(self.session, path, write_meta_graph=False)
            self.preset.update(dict(steps=step, training_time=(time.time() - self.began) / 60,
                                    images_per_second=self._images_per_second()))
            self.preset.save(self.output_dir)
        self.saved = time.time()
        self._remove_all_but(path)

    def _remove_all_but(self, path):
        """Of the checkpoints, keeps the last bests and the one at `path`."""
        kept = {os.path.basename(checkpoint_path(self.run_dir, best)) for best in self.best_steps}
        kept.add(os.path.basename(path))
        files = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*-*.*'))
        for old in sorted(files, key=lambda file: not file.endswith('.index')):  # without its index it does not count
            if os.path.basename(old).partition('.')[0] not in kept or '.tempstate' in old:  # of a killed saver
                os.unlink(old)

    @contextlib.contextmanager
    def _writing(self):
        """Where something cannot be written, says what is safe."""
        from resnet import tf
        recorded, held = os.path.exists(self.preset.pickle_path(self.output_dir)), self.preset.steps
        try:
            yield
        except (OSError, tf.errors.OpError, ValueError) as error:  # the saver raises ValueError where a folder is gone
            raise InputError('run {0} cannot be written ({1}). {2}'.format(self.preset.timestamp, reason(error), (
                'What was saved of step {1:,} is whole; when there is room again, go on with: python resnet_train.py '
                '--resume {0}' if recorded else 'Nothing of it was saved; when there is room, start anew').format(
                    self.preset.timestamp, held)))

    def unsaved_seconds(self):
        """What a kill would cost now."""
        return time.time() - self.saved

    def finish(self, status):
        """Records the end of the run, after its last save, and returns its Preset."""
        self._end(status)
        print('Run {0.timestamp} is {0.status}: best validation accuracy {0.val_accuracy:.4f} at step '
              '{0.early_stopping_epoch:,}; {0.training_time:.1f} minutes. {1} it with:\n'
              '  python {2} {0.timestamp}'.format(self.preset, *(
                  ('Test', 'resnet_eval.py --timestamp') if status == 'complete' else
                  ('Go on with', 'resnet_train.py --resume'))))
        return self.preset

    def _diverge(self, step, what):
        self._end('diverged')
        raise InputError('run {} diverged: {} at step {:,}, learning rate {:g}; its last good checkpoint: {}. Try a '
                         'lower {}'.format(
                             self.preset.timestamp, what, step,
                             learning_rate(self.preset, step - 1, self.steps_per_epoch),
                             'step {:,}'.format(self.preset.steps) if self.preset.steps else 'none',
                             _rates(self.preset)))

    def _end(self, status):
        from tensorboard.plugins.hparams import api_pb2, summary
        if status != 'interrupted':
            self._write_record(summary.session_end_pb(
                api_pb2.STATUS_SUCCESS if status == 'complete' else api_pb2.STATUS_FAILURE))
        with self._writing():
            for writer in self.writers.values():
                writer.close()
            self.preset.status = status
            self.preset.log(self.output_dir, 'train_overall.txt', replace=True)
            self.preset.save(self.output_dir)

    def _describe_hparams(self):
        """The records that TensorBoard's HParams tab lists, sorts and compares runs by."""
        from tensorboard.plugins.hparams import api
        names = ('preset', 'model', 'seed') + RECIPE
        values = {name: getattr(self.preset, name) for name in names if getattr(self.preset, name) is not None}
        self._write_record(api.hparams_config_pb([api.HParam(name) for name in names], [
            api.Metric(tag, group=group, display_name='{} {}'.format(group, tag)) for group, tag in HPARAMS_METRICS]))
        self._write_record(api.hparams_pb(values, trial_id=self.preset.title, start_time_secs=self.preset.timestamp))

    def _write_record(self, record):
        from resnet import tf
        self._write('', 0, summary=tf.Summary.FromString(record.SerializeToString()))  # TensorBoard's own class

    def _images_per_second(self):
        return self.trained_images / self.training_seconds if self.training_seconds else 0.0

    def _summarize(self, name, step, **values):
        from resnet import tf
        self._write(name, step, summary=tf.Summary(value=[
            tf.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def _write(self, name, step, **content):
        from resnet import tf
        with self._writing():
            self.writers[name].write(tf.Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def _flush(self):
        for writer in self.writers.values():
            writer.flush()


def _open_events(folder, last_step):
    """Rewrites the event files in `folder` as one, with what they hold up to last_step.

    Returns its writer and these events. Raises InputError where a file is damaged.
    """
    from resnet import tf
    old = sorted(glob.glob(os.path.join(glob.escape(folder), '*.tfevents.*')))
    events = collections.OrderedDict()  # a killed start may have left an event in two files
    for path in old:
        try:
            for content in _records(path):
                event = tf.Event.FromString(content)
                if event.step <= last_step and not event.file_version:
                    events[content] = event
        except Exception as error:  # a damaged file can raise anything
            raise InputError('{} is damaged ({}); remove it to go on without the curves that it holds'.format(
                path, reason(error)))
    os.makedirs(folder, exist_ok=True)
    second = int(time.time())
    while any('.tfevents.{}.'.format(second) in path for path in old):
        second += 1
    writer = tf.io.TFRecordWriter(os.path.join(folder, 'events.out.tfevents.{}.{}'.format(second, platform.node())))
    for content in [tf.Event(wall_time=second, file_version='brain.Event:2').SerializeToString()] + list(events):
        writer.write(content)
    writer.flush()
    for path in old:
        os.unlink(path)
    return writer, list(events.values())


def _records(path):
    """The whole records of an event file, bytes, verified; a last one that was being written is left out.

    TensorFlow's reader would allocate whatever a length claims, so the lengths are looked at before:
    8 bytes, their checksum of 4, so many bytes of the record, and its checksum of 4.
    """
    from resnet import tf
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    whole = 0
    with open(path, 'rb') as file:
        left = os.fstat(file.fileno()).st_size
        while left >= 12:
            header = file.read(12)
            length = int.from_bytes(header[:8], 'little')
            left -= 12 + length + 4
            if left < 0 and masked_crc32c(header[:8]) != int.from_bytes(header[8:], 'little'):
                raise ValueError('a length is wrong')
            if left < 0:
                break
            file.seek(length + 4, os.SEEK_CUR)
            whole += 1
    return itertools.islice(tf.python_io.tf_record_iterator(path), whole)


def _best_steps(events):
    """The steps of those validation events at which the accuracy was a new best, ascending."""
    best, steps = -1.0, []
    for event in events:
        for value in event.summary.value:
            if value.tag == 'accuracy' and value.simple_value > best:
                best = value.simple_value
                steps.append(event.step)
    return steps


def evaluate(net, session, images, labels):
    """Judges the inference form on uint8 [N, 32, 32, 3] and int64 [N].

    Returns the mean loss, a float, and the predictions, int64 [N].
    """
    def judge(i):
        now = slice(i, i + EVALUATION_BATCH)
        loss, predicted = session.run([net.loss, net.predictions], {
            net.X: data_helpers.scale(images[now]),
            net.Y: data_helpers.one_hot(labels[now], net.preset.num_classes)})
        return loss * len(predicted), predicted

    judged, progress = [], ProgressLine()
    with concurrent.futures.ThreadPoolExecutor(EVALUATED_AT_ONCE) as pool:
        for result in pool.map(judge, range(0, len(images), EVALUATION_BATCH)):
            progress('judged {:,} of {:,} images', len(judged) * EVALUATION_BATCH, len(images))
            judged.append(result)
    losses, predictions = zip(*judged)
    return float(sum(losses)) / len(images), np.concatenate(predictions)


def checkpoint_path(run_dir, step, kind=BEST_OR_LATEST):
    """Prefix of a checkpoint's files."""
    return os.path.join(run_dir, 'checkpoints', '{}-{}'.format(kind, step))


def checkpoint_steps(run_dir):
    """Steps whose checkpoints are whole, ascending. TensorFlow moves the index into place last."""
    indices = glob.glob(os.path.join(glob.escape(run_dir), 'checkpoints', 'model-*.index'))
    matches = (re.search(r'model-(\d+)\.index$', path) for path in indices)
    return sorted(int(match.group(1)) for match in matches if match)


def _refreshing_batches(images):
    """The first training images (they are shuffled), as they are: the test images are not augmented either."""
    images, progress = images[:REFRESH_IMAGES], ProgressLine()
    for i in range(0, len(images), REFRESH_BATCH):
        progress('averaged the statistics of {:,} of {:,} images', i, len(images))
        yield data_helpers.scale(images[i:i + REFRESH_BATCH])


def reason(error):
    """What an error of TensorFlow says, without where in the graph."""
    return str(error).split('\n\t [[')[0].strip().splitlines()[-1] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _batch_size_named(preset):
    """Where the memory is too small, says what would make it do."""
    from resnet import tf
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise InputError('batches of {} are too large for the memory: train with a smaller --batch_size ({})'.format(
            preset.batch_size, reason(error)))


@contextlib.contextmanager
def _stop_request():
    """A list that fills on Ctrl-C or SIGTERM, for the loop to end in its own time; the second one raises."""
    asked = []

    def handler(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def _device(session):
    """'2 x Tesla T4' or the processor's name and cores."""
    gpus = sum(device.device_type == 'GPU' for device in session.list_devices())
    try:
        if gpus:
            names = subprocess.check_output(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], text=True)
            return '{} x {}'.format(gpus, names.splitlines()[0])
        with open('/proc/cpuinfo') as file:
            name = re.search(r'model name\s*: (.*)', file.read()).group(1)
    except (OSError, subprocess.SubprocessError, AttributeError, IndexError):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()  # this process's
    return '{} x GPU'.format(gpus) if gpus else 'CPU: {}, {} core{}'.format(name, cores, 's' if cores > 1 else '')


def _rates(preset):
    """The flags of what makes a training diverge."""
    return '--lr and --muon_lr' if preset.muon_lr else '--lr'


def _duration(seconds):
    hours, minutes = divmod(int(seconds) // 60, 60)
    return '{}h{:02}m'.format(hours, minutes) if hours else '{}m{:02}s'.format(minutes, int(seconds) % 60)


@exit_on_input_error
def main(arguments=None):
    presets = '\n'.join('  {:>2}  {:8}  {:9} {:>3} epochs  {}'.format(
        number, name, make_preset(number).model, make_preset(number).num_epochs, purpose)
                        for number, (name, purpose) in NAMES.items())
    parser = ArgumentParser(description=__doc__, epilog='presets, by number or name:\n' + presets)
    parser.add_argument('--preset', metavar='N', help='what to train, see below (default: 0)')
    parser.add_argument('--resume', nargs='?', const=NEWEST, metavar='TIMESTAMP', help='go on with this run where its '
                        'last save left it; alone: with the newest unfinished one')
    parser.add_argument('--seeds', nargs='+', metavar='SEED', help='a run for each of these seeds; a single number '
                        'says how many: --seeds 3 is --seeds 0 1 2')
    group = parser.add_argument_group('hyperparameters, in place of the preset\'s')
    for name, field in HYPERPARAMETERS.items():
        group.add_argument('--' + name, metavar=field.type.__name__.upper(), help=field.help)
    flags = vars(parser.parse_args(arguments))
    overrides = {name: flags[name] for name in HYPERPARAMETERS if flags[name] is not None}
    if flags['resume'] is not None:
        if flags['seeds']:
            raise InputError('--seeds starts runs of its own, --resume goes on with one')
        preset = unfinished(flags['output_dir'], None if flags['resume'] == NEWEST else flags['resume'])
        if flags['preset'] is not None:
            overrides['preset'] = make_preset(flags['preset']).preset
        for name, value in overrides.items():
            if FIELDS[name].check(name, value) != getattr(preset, name):
                raise InputError('run {} was started with {} {}, and goes on with it; leave out --{}'.format(
                    preset.timestamp, name, getattr(preset, name), name))
        train(preset, flags['data_dir'], flags['output_dir'], resume=True)
        return

    number, seeds = flags['preset'] if flags['preset'] is not None else 0, flags['seeds'] or [overrides.pop('seed', 0)]
    if flags['seeds'] and flags['seed'] is not None:
        raise InputError('--seed and --seeds exclude each other')
    if flags['seeds'] and len(seeds) == 1:
        seeds = range(HOW_MANY.check('--seeds', seeds[0]))
    for preset in [make_preset(number, seed=seed, **overrides) for seed in seeds]:
        if train(preset, flags['data_dir'], flags['output_dir']).status != 'complete':
            break  # Ctrl-C is meant for all of them


def unfinished(output_dir, timestamp=None):
    """The run with this timestamp, or the newest that is unfinished and in no other hands. Raises InputError."""
    if timestamp is not None:
        preset = load_preset(output_dir, timestamp)
        if preset.status not in UNFINISHED:
            raise InputError('run {0.timestamp} cannot go on: it is {1}'.format(
                preset, 'diverged; train it anew with a lower ' + _rates(preset) if preset.status == 'diverged'
                else 'complete'))
        return preset
    for preset in reversed(load_presets(output_dir)):
        if preset.status in UNFINISHED:
            try:
                with locked(preset, output_dir):
                    return preset
            except InputError:  # in training
                continue
    raise InputError('there is no unfinished run in {} that could go on'.format(output_dir))


if __name__ == '__main__':
    main()
