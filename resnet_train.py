"""Trains presets on CIFAR-10, keeps the best and the latest weights, and records what came out.

    python resnet_train.py --preset 4
    python resnet_train.py --preset 4 --lr 0.05 --seed 1 --max_steps 2000
    python resnet_train.py --preset fast --seeds 3       seeds 0, 1 and 2; again: what is missing of them
    python resnet_train.py --preset fast standard --seeds 3 --ray    the same of two presets, side by side
    python resnet_train.py --resume                      the newest interrupted run

Where TF_CONFIG describes a cluster, its tasks share one training, a tower each.

Ctrl-C once ends a training cleanly: validated, saved and recorded. Twice breaks it off. Any stopped run can be
resumed: on as many cores of a CPU, with the same TensorFlow, to the same weights to the last bit.
"""
import argparse
import collections
import contextlib
import glob
import json
import logging
import math
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

import data_helpers
from data_helpers import (PROJECT_DIR, UNFINISHED, ArgumentParser, InputError, Progress, console_log,
                          event_records, exit_on_input_error, file_lock, survives, warn, write_atomically)
from presets_and_results import (AUTO, CONSOLE_LOG, FIELDS, HOW_COMPUTED, HYPERPARAMETERS, LOCK, MODEL, NAMES, NEWEST,
                                 RECIPE, RESUME, TRAINING_IMAGES, Number, Switch, best_checkpoint, check_output_dir,
                                 checked, command, load_preset, load_presets, locked, make_preset, no_runs, read_preset,
                                 recipe, start_run, state)
# TensorFlow comes with `resnet`, which is imported where it is first needed: a wrong flag is refused before.

DECAY_STEPS = 24000       # training steps between decays of the learning rate
SUMMARY_EVERY = 10        # training steps between points of the training curves
REFRESH_IMAGES = 4000     # training images over which batch-norm statistics are averaged before a validation
REFRESH_BATCH = 500       # images
OPTIONS = ('nesterov', 'muon_lr', 'label_smoothing', 'data_augmentation', 'random_erasing', 'mixup',
           'low_resolution_epochs', 'mixed_precision', 'xla')  # of a recipe: named where they are on
HOW_MANY_SEEDS = Number(None, int, 1, 1000, 'seeds')
WHICH_TASK = Number(None, int, 0, 10**6, 'run, from 0')
TASK_VARIABLES = ('SLURM_ARRAY_TASK_ID', 'JOB_COMPLETION_INDEX')  # of Slurm's array jobs, of Kubernetes' Indexed Jobs
BY_VARIABLE = 'by variable'  # --task without a number
THIS_MACHINE = 'local'       # --ray without an address, in Ray's word
RETRIES = 10                 # of a run whose node is lost
LOCK_OUTLIVES = 120          # seconds that the lock of a lost node may; NFS frees it after 90
LOOK_EVERY = 5               # seconds between looks at what other processes do
CODE = ('*.py', 'tensorboard_run', 'requirements.txt')  # what git is asked about
HPARAMS_METRICS = (('dev', 'best_accuracy'), ('dev', 'accuracy'), ('dev', 'loss'), ('train', 'loss'),
                   ('train', 'images_per_second'))
START_PATIENCE = 600      # seconds, for the other processes of a cluster to start
TF_CONFIG_EXAMPLE = ('{"cluster": {"chief": ["a:2222"], "worker": ["b:2222"]}, '
                     '"task": {"type": "worker", "index": 0}}')
WAYS_OUT = {              # of jobs that a cluster cannot have
    'ps': 'the chief has the variables: leave the parameter servers out',
    'evaluator': 'the chief validates, and resnet_eval.py tests: leave the evaluator out',
    'master': 'call it chief'}
ALL = 'all'               # in place of a timestamp
CHECKPOINT_FILE = re.compile(rf'({MODEL}|{RESUME})-\d+\.(index|data-\d+-of-\d+)(\.tempstate\d*)?\Z')


# ------------------------------------------------------------------------------ the recipe

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
        return preset.lr * preset.lr_decay ** _decays(preset, step)
    part = (step - warmup) / (end - warmup)
    if preset.schedule == 'one-cycle':
        return preset.lr * (1 - part)
    return preset.lr * (1 + math.cos(math.pi * part)) / 2


def _decays(preset, step):
    """How often the step schedule has multiplied the rate by lr_decay before `step`."""
    if preset.lr_milestones:
        return sum(step >= int(milestone) for milestone in preset.lr_milestones.split(','))
    return step // DECAY_STEPS


def describe_recipe(preset):
    """The recipe in a line, for the console."""
    words = [f'learning rate {preset.lr:g}{_course(preset)}', f'L2 {preset.l2_reg_lambda:g}',
             f'batch {preset.batch_size}', f'momentum {preset.momentum:g}']
    for name in OPTIONS:
        value = getattr(preset, name)
        if value is True:
            words.append(name.replace('_', ' '))
        elif value == AUTO:
            words.append(f'{name.replace("_", " ")} where the hardware gains by it')
        elif value:
            words.append(f'{name.replace("_", " ")} {value:g}')
    if preset.towers > 1:
        words.append(f'{preset.towers} towers')
    return ', '.join(words + [f'seed {preset.seed}'])


def _course(preset):
    """The learning rate schedule in words, to follow the rate."""
    if preset.schedule == 'one-cycle':
        course = 'linearly to 0'
    elif preset.schedule == 'cosine':
        course = 'to 0 as a cosine'
    elif preset.lr_decay == 1:
        course = 'constant'
    elif preset.lr_milestones:
        steps = ', '.join(f'{int(milestone):,}' for milestone in preset.lr_milestones.split(','))
        course = f'x {preset.lr_decay:g} at steps {steps}'
    else:
        course = f'x {preset.lr_decay:g} every {DECAY_STEPS:,} steps'
    if preset.warmup_epochs:
        return f' after {counted(preset.warmup_epochs, "epoch")} of warm-up, then {course}'
    return f' {course}' if course.startswith('x ') else f', {course}'


def describe_training(preset, parameters, n_training):
    """What would be trained, for the console: network, recipe and length, of n_training images."""
    steps_per_epoch = data_helpers.steps_per_epoch(n_training, preset.batch_size)
    steps, whole = preset.length(n_training), preset.num_epochs * steps_per_epoch
    length = f'{counted(steps, "step")}, {counted(round(steps / steps_per_epoch, 3), "epoch")}'
    if steps < whole and preset.schedule != 'step':
        length += f'; cut short: the learning rate falls over {whole:,} steps'
    return (f'Preset {preset.preset} ({preset.name}): {preset.model} (n = {preset.num_residual_units}), '
            f'{parameters:,} parameters\n'
            f'  recipe  {describe_recipe(preset)}\n'
            f'  length  {length}')


def counted(n, noun):
    """'1 step', '2,000 steps', '0.5 epochs'."""
    number = f'{int(n):,}' if n == int(n) else f'{n:g}'
    return f'{number} {noun}' if n == 1 else f'{number} {noun}s'


# ------------------------------------------------------------------------------ several machines

class Task(collections.namedtuple('Task', 'job index address')):
    """A process of a cluster: job 'chief' or 'worker', index in the job, address 'host:port'."""

    @property
    def device(self):
        return f'/job:{self.job}/task:{self.index}'

    def __str__(self):
        return f'{self.job} {self.index} ({self.address})'


class Cluster:
    """The processes that train one network together, a tower each; or this process alone, without tasks.

    tasks    the chief, which trains and has all variables, then those that serve
    own      that of this process
    target   where a session is made: the server of this process, '' where it is alone
    """

    def __init__(self, tasks=(), own=None):
        self.tasks, self.own, self.target = tasks, own, ''
        self.sessions = {}  # on the others
        self.chief, self.others = (tasks[0], tasks[1:]) if tasks else (None, ())

    @property
    def serves(self):
        """Whether another process is the chief."""
        return self.own != self.chief

    @property
    def devices(self):
        """A device a tower, the variables' first, or None: those of this machine."""
        return [task.device for task in self.tasks] or None

    def start(self):
        """Starts the server of this process, which is the chief, and waits for the others.

        Raises InputError where the server cannot listen, or one of the others does not come.
        """
        self._listen()
        self.sessions = {task: self._reach(task) for task in self.others}

    def serve(self):
        """Lends this process to the chief until that ends, and ends it.

        Raises InputError where there is no chief, or the server cannot listen.
        """
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it has nothing to save
        chief = self._reach(self.chief)
        from resnet import answers
        self._listen()  # only now: the chief, which waits for that, begins when each of the two has reached the other
        print(f'At work for {self.chief}.', flush=True)
        while answers(chief):
            time.sleep(LOOK_EVERY)
        print('The chief has ended.', flush=True)
        data_helpers.leave()  # what it was computing for the chief would wait for that

    def _listen(self):
        from resnet import start_server
        jobs = collections.defaultdict(list)
        for task in self.tasks:
            jobs[task.job].append(task.address)
        self.server = start_server(dict(jobs), self.own.job, self.own.index)  # it lives as long as its object
        self.target = self.server.target
        print(f'This is {self.own}. TensorFlow listens on its port of every interface, without authentication: '
              'a firewall or a closed network must keep others out.', flush=True)

    @contextlib.contextmanager
    def watched(self, saved):
        """Within the block, a process of the cluster that is lost ends this one with status 2.

        The error says which, and what saved() returns. No exception could do it: the step that waits for the lost
        process may never return.
        """
        from resnet import answers
        left, looking = threading.Event(), threading.Lock()

        def look():
            with looking:  # one thread reports
                for task, session in self.sessions.items():
                    if not answers(session):
                        data_helpers.leave(f'{task} does not answer any more, or was started again. {saved()}')

        def watch():
            while self.sessions and not left.wait(LOOK_EVERY):
                look()

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        except Exception:
            look()  # which may be why
            raise
        finally:
            left.set()
            watching.join()

    def _reach(self, task):
        """A session on the server of `task`, when it is up."""
        from resnet import reach
        print(f'Waiting for {task} ...', flush=True)
        end = time.monotonic() + START_PATIENCE
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Ctrl-C would have to wait, too
        try:
            while time.monotonic() < end:
                session = reach(task.address, task.device)
                if session:
                    return session
                time.sleep(1)
        finally:
            signal.signal(signal.SIGINT, before)
        raise InputError(f'{task} did not answer within {START_PATIENCE // 60} minutes; start it with the same command '
                         'line and cluster, and see that its port can be reached from here')


def read_cluster(text):
    """The Cluster that TF_CONFIG describes: {"cluster": {"chief": ["host:port"], "worker": ["host:port", ...]},
    "task": {"type": "worker", "index": 0}}. Without a chief worker 0 is it.

    Without text, or with a single task, it has no tasks. Raises InputError on any other text.
    """
    try:
        config = json.loads(text or '{}')
        if config == {}:
            return Cluster()
        job, index = str(config['task']['type']), int(config['task']['index'])
        jobs = {str(name): list(addresses) for name, addresses in dict(config['cluster']).items()}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f'TF_CONFIG must read like {TF_CONFIG_EXAMPLE}; it does not ({type(error).__name__}: {error})')
    for name in sorted(set(jobs) | {job}):
        if name not in ('chief', 'worker'):
            raise InputError(f'TF_CONFIG names the job {name}; '
                             f'{WAYS_OUT.get(name, "there are only a chief and workers")}')
    tasks = [Task(name, k, address) for name in sorted(jobs) for k, address in enumerate(jobs[name])]
    for task in tasks:
        address = str(task.address)
        if not re.match(r'[^\s/]+:[1-9][0-9]{0,4}\Z', address) or int(address.rpartition(':')[2]) > 65535:
            raise InputError(f'TF_CONFIG names the address {task.address!r}; it must be host:port')
    if len({task.address for task in tasks}) < len(tasks) or len(jobs.get('chief', [])) > 1:
        raise InputError('TF_CONFIG must name one chief at most, and no address twice')
    own = [task for task in tasks if task[:2] == (job, index)]
    if not own:
        raise InputError(f'TF_CONFIG says that this is {job} {index}, which is not in its cluster')
    return Cluster(tasks, own[0]) if len(tasks) > 1 else Cluster()


# ------------------------------------------------------------------------------ the loop

def train(preset, data_dir, output_dir, resume=False, cluster=Cluster()):
    """Trains `preset` (a Preset), or resumes its run, and returns it with its results, which are then on disk.

    CIFAR-10 is in data_dir or is fetched to it; INFOS/ and runs/ go to output_dir. A cluster with tasks has been
    started. Raises InputError on data or folders that cannot be used, and where the loss is no longer finite.
    """
    check_output_dir(output_dir)
    if cluster.tasks and preset.towers != len(cluster.tasks):
        raise InputError(f'this training has towers {preset.towers}, and TF_CONFIG names {len(cluster.tasks)} tasks, a '
                         'tower each: name as many tasks')
    images, labels = data_helpers.load(data_dir, data_helpers.TRAIN_FILES)
    began = time.monotonic()  # after the data, which may have to be fetched
    training, validation = [(images[part], labels[part]) for part in data_helpers.split(len(labels), preset.seed)]
    del images
    _check_parts(preset, len(training[1]))
    print('Loading TensorFlow ...', flush=True)
    import resnet
    _check_hardware(preset, resnet, cluster)
    if preset.mixed_precision == AUTO:
        preset.mixed_precision = resnet.half_precision() is not None
    if not resume:
        start_run(preset, output_dir)
    log = os.path.join(preset.run_dir(output_dir), CONSOLE_LOG)
    watched = cluster.watched(lambda: _saved(preset, data_dir, output_dir))
    home = cluster.chief and cluster.chief.device
    with locked(preset, output_dir), console_log(log), watched, resnet.tf.Graph().as_default(), resnet.tf.device(home):
        if resume:
            _check_unchanged(preset, output_dir)
        net = resnet.ResNet(preset, devices=cluster.devices)
        made = resnet.make_session(preset, cluster.target)
        with made as session, _stop_request(preset, data_dir, output_dir) as stop:
            run = Run(preset, net, session, data_dir, output_dir, len(training[0]), resume, began)
            run.announce(len(training[0]), len(validation[0]))
            session.graph.finalize()  # from here on nothing may add to it, which would slow every step
            with run.progress:
                _loop(run, training, validation, stop)
            return run.finish('complete' if preset.steps == run.last_step else 'interrupted')


def _loop(run, training, validation, stop):
    """Trains from the step after the last save to the end, or until `stop` is not empty."""
    preset = run.preset
    for step, (x, y) in zip(range(preset.steps + 1, run.last_step + 1), run.batches(*training)):
        run.train_step(step, x, y)
        ending = step == run.last_step or bool(stop)
        best = False
        validating = ending or step % preset.evaluate_every == 0
        if validating:
            best = run.validate(step, training[0], *validation)
        if ending or best or step % preset.checkpoint_every == 0:
            run.save(step, MODEL if validating else RESUME)
        elif run.unsaved_seconds() > 60 * preset.checkpoint_minutes:
            run.save(step, RESUME)
        if ending:
            break


class Run:
    """A training at work: its steps, its validations, and what it says of them.

    Steps are counted from 1; a checkpoint or validation of step s has seen s batches. What is on disk is
    that of step `preset.steps` of the record, or can be brought back to it: the record is written last. Its minutes
    count from `began`, by time.monotonic().
    """

    def __init__(self, preset, net, session, data_dir, output_dir, n_training, resume, began):
        self.preset, self.net, self.session = preset, net, session
        self.data_dir, self.output_dir = data_dir, output_dir
        self.steps_per_epoch = data_helpers.steps_per_epoch(n_training, preset.batch_size)
        self.last_step = preset.length(n_training)
        if resume and (preset.steps or 0) >= self.last_step and preset.val_accuracy is None:
            raise InputError(f'run {preset.timestamp} cannot be resumed: by its record it is at its end, without a '
                             'result')
        self._begin_record(resume)
        self.began = began - 60 * preset.training_time
        self.first_step = preset.steps + 1
        self.trained_images = preset.steps * preset.batch_size if preset.images_per_second else 0
        self.training_seconds = self.trained_images / (preset.images_per_second or 1)
        self.checkpoints = Checkpoints(preset, session, output_dir)
        self.curves = Curves(preset, output_dir)
        path = self.checkpoints.restore() if preset.steps else self._initialize()
        with self._writing():
            preset.save(output_dir)
        with self._writing():  # where this fails there is a record to resume from
            self.curves.open(session.graph)
            self.checkpoints.best_steps = self.curves.best_steps()
            if path:
                self.checkpoints.prune(path)
        self.saved = time.monotonic()
        self.progress = Progress(total=self.last_step, initial=preset.steps, desc='training', unit='steps')

    def _begin_record(self, resume):
        from resnet import device_name, tf
        preset = self.preset
        self.resumed_from = (preset.tensorflow_version, preset.device) if resume and preset.steps else None
        if not resume:
            preset.update(dict(val_accuracy=None, early_stopping_epoch=None, steps=None, training_time=None,
                               images_per_second=None, git_commit=git_commit()))
        preset.update(dict(status='training', device=device_name(self.session), tensorflow_version=tf.__version__,
                           python_version=platform.python_version(), test_accuracy=None, test_accuracy_mirrored=None,
                           finished=False, steps=preset.steps or 0, training_time=preset.training_time or 0.0))

    def _initialize(self):
        from resnet import tf
        self.session.run(tf.global_variables_initializer())
        if self.preset.init_from:
            self.checkpoints.load_weights(load_preset(self.output_dir, self.preset.init_from))

    def announce(self, n_training, n_validation):
        """Says what runs, on what, and where it writes."""
        preset = self.preset
        if preset.steps:
            print(f'Resuming run {preset.timestamp} at step {preset.steps:,} of {self.last_step:,}')
        if self.resumed_from not in (None, (preset.tensorflow_version, preset.device)):
            version, device = self.resumed_from
            print(f'It was trained by TensorFlow {version} on {device}: from here the results differ by rounding')
        print(f'{describe_training(preset, self.net.count_parameters(), n_training)}\n'
              f'  data    {n_training:,} training and {n_validation:,} validation images from {self.data_dir}\n'
              f'  device  {preset.device}; TensorFlow {preset.tensorflow_version}, Python {preset.python_version}\n'
              f'  writes  {preset.run_dir(self.output_dir)} and {os.path.join(self.output_dir, "INFOS")}', flush=True)

    def batches(self, images, labels):
        """The training batches to come, see data_helpers.training_batches, prepared in the background."""
        return data_helpers.in_background(data_helpers.training_batches(
            images, labels, self.preset, first_step=self.preset.steps))

    def train_step(self, step, x, y):
        """One training step on a batch; a point of the curves and the progress bar now and then."""
        rate = learning_rate(self.preset, step - 1, self.steps_per_epoch)
        began = time.monotonic()
        what = f'a training step on batches of {self.preset.batch_size}'
        with _memory_for(what, 'train with a smaller --batch_size'):
            _, loss, accuracy, skipped = self.session.run(
                [self.net.train_step, self.net.training_loss, self.net.training_accuracy, self.net.skipped],
                {self.net.training_X: x, self.net.Y: y, self.net.learning_rate: rate})
        if not np.isfinite(loss) and not skipped:
            self._diverge(step, f'the loss is {loss}')
        if step > self.first_step:  # which also sets TensorFlow up
            self.training_seconds += time.monotonic() - began
            self.trained_images += len(x)
        if step % SUMMARY_EVERY == 0:
            with self._writing():
                self.curves.add('train', step, loss=loss, accuracy=accuracy, learning_rate=rate,
                                images_per_second=self._images_per_second())
        self.progress.set_postfix_str(
            f'epoch {step / self.steps_per_epoch:.2f}, loss {loss:.4f}, accuracy {accuracy:.3f}, lr {rate:.4g}, '
            f'{self._images_per_second():,.0f} images/s', refresh=False)
        self.progress.update()

    def validate(self, step, training_images, images, labels):
        """Judges the weights on the validation images and returns whether they are the best so far.

        Batch-norm statistics are recomputed before, over training images as they are: the test images are not
        augmented either.
        """
        from resnet import evaluate
        with _memory_for(f'recomputing batch-norm statistics in batches of {REFRESH_BATCH}', 'close other programs'):
            self.net.refresh_statistics(self.session, _refreshing_batches(training_images))
        loss, predictions = evaluate(self.net, self.session, images, labels, 'validating')
        if not np.isfinite(loss):
            self._diverge(step, f'the validation loss is {loss}')
        accuracy = float((predictions == labels).mean())
        best = self.preset.val_accuracy is None or accuracy > self.preset.val_accuracy
        if best:
            self.checkpoints.best_steps.append(step)
            self.preset.update(dict(val_accuracy=accuracy, early_stopping_epoch=step))
        with self._writing():
            self.curves.add('dev', step, loss=loss, accuracy=accuracy, best_accuracy=self.preset.val_accuracy)
        Progress.row(f'validation  step {step:,}  epoch {step / self.steps_per_epoch:.2f}  loss {loss:.4f}  '
                     f'accuracy {accuracy:.4f}{"  best" if best else ""}')
        return best

    def save(self, step, kind):
        """Writes the checkpoint of `step`, then the record, then removes what is neither best nor latest.

        In this order, so that at any moment the record points to a checkpoint that is there, and to
        summaries that hold all up to it. Raises InputError where they cannot be written, or where the
        weights are not fit to be.
        """
        if not self.session.run(self.net.finite):
            self._diverge(step, 'there are weights that are no longer finite')
        with self._writing():
            self.curves.flush()
            path = self.checkpoints.save(step, kind)
            self.preset.update(dict(steps=step, training_time=(time.monotonic() - self.began) / 60,
                                    images_per_second=self._images_per_second()))
            self.preset.save(self.output_dir)
        self.saved = time.monotonic()
        with self._writing():
            self.checkpoints.prune(path)

    def unsaved_seconds(self):
        """What a kill would cost."""
        return time.monotonic() - self.saved

    def finish(self, status):
        """Records the end of the run, after its last save, and returns its Preset."""
        self._end(status)
        preset = self.preset
        proceed = f'Resume it with:\n  {_resume_command(preset, self.output_dir, self.data_dir)}'
        if status == 'complete':
            test = command('resnet_eval.py', '--timestamp', preset.timestamp, output_dir=self.output_dir,
                           data_dir=self.data_dir)
            proceed = f'Test it with:\n  {test}'
        print(f'Run {preset.timestamp} is {preset.status}: best validation accuracy {preset.val_accuracy:.4f} at step '
              f'{preset.early_stopping_epoch:,}; {preset.training_time:.1f} minutes. {proceed}', flush=True)
        return preset

    def _diverge(self, step, what):
        self._end('diverged')
        rate = learning_rate(self.preset, step - 1, self.steps_per_epoch)
        advice = f'Try a lower {_rate_flags(self.preset)}'
        if self.preset.steps:
            halved = [f'--{name}={getattr(self.preset, name) / 2:g}' for name in _rates(self.preset)]
            resume = _resume_command(self.preset, self.output_dir, self.data_dir, *halved)
            advice = (f'Its checkpoint of step {self.preset.steps:,} is good: resume it with a lower '
                      f'{_rate_flags(self.preset)}, as in: {resume}')
        raise InputError(f'run {self.preset.timestamp} diverged: {what} at step {step:,}, learning rate {rate:g}. '
                         f'{advice}')

    def _end(self, status):
        with self._writing():
            self.curves.close(status)
            self.preset.status = status
            self.preset.log(self.output_dir, 'train_overall.txt', replace=True)
            self.preset.save(self.output_dir)

    def _images_per_second(self):
        return self.trained_images / self.training_seconds if self.training_seconds else 0.0

    @contextlib.contextmanager
    def _writing(self):
        """Where something cannot be written, says what is safe."""
        from resnet import reason, tf
        recorded, saved = os.path.exists(self.preset.pickle_path(self.output_dir)), self.preset.steps
        try:
            yield
        except (OSError, tf.errors.OpError, ValueError) as error:  # the saver raises ValueError where a folder is gone
            safe = 'Nothing was saved; fix this and start again'
            if recorded:
                resume = _resume_command(self.preset, self.output_dir, self.data_dir)
                safe = f'What was saved of step {saved:,} is whole; fix this and resume it with: {resume}'
            raise InputError(f'run {self.preset.timestamp} cannot be written ({reason(error)}). {safe}')


# ------------------------------------------------------------------------------ checkpoints

class Checkpoints:
    """The files in a run's checkpoints/: the last best ones, and the latest, to resume from."""

    def __init__(self, preset, session, output_dir):
        from resnet import tf
        self.preset, self.session, self.output_dir = preset, session, output_dir
        self.saver = tf.train.Saver(max_to_keep=None, save_relative_paths=True)
        self.best_steps = []  # ascending

    def restore(self):
        """Sets the variables as the last save left them, and returns the path of its checkpoint."""
        from resnet import LossScale, reason, tf
        preset = self.preset
        paths = [preset.checkpoint_path(self.output_dir, preset.steps, kind) for kind in (MODEL, RESUME)]
        path = next((path for path in paths if os.path.exists(path + '.index')), paths[0])
        try:
            if not survives(tf.train.NewCheckpointReader, path):
                raise InputError('TensorFlow would end on it')
            saver, held = self.saver, tf.train.NewCheckpointReader(path)
            absent = [variable for variable in tf.global_variables(LossScale.SCOPE)
                      if not held.has_tensor(variable.op.name)]
            if absent:  # it was begun in bfloat16, and goes on in float16
                self.session.run(tf.variables_initializer(absent))
                saver = tf.train.Saver([variable for variable in tf.global_variables() if variable not in absent])
            saver.restore(self.session, path)
            return path
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f'run {preset.timestamp} cannot be resumed: {path} is missing, trimmed or damaged '
                             f'({reason(error)}); bring it back, or train anew with --preset {preset.preset}')

    def load_weights(self, source):
        """Sets weights and statistics to those of another run's best checkpoint; momentum starts at 0."""
        from resnet import reason, tf
        weights = [variable for variable in tf.global_variables()
                   if variable.op.name.rpartition('/')[2] in ('DW', 'biases', 'beta', 'gamma', 'moving_mean',
                                                              'moving_variance')]
        path = best_checkpoint(source, self.output_dir)
        try:
            if source.num_residual_units != self.preset.num_residual_units:  # a deeper one has all that is asked of it
                raise InputError('their depths differ')
            if not survives(tf.train.NewCheckpointReader, path):
                raise InputError('TensorFlow would end on them')
            tf.train.Saver(weights).restore(self.session, path)
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f'the weights of run {source.timestamp}, a {source.model}, do not fit a '
                             f'{self.preset.model}, or are damaged ({reason(error)})')

    def save(self, step, kind):
        """Writes the checkpoint of a step, and returns its path."""
        path = self.preset.checkpoint_path(self.output_dir, step, kind)
        self.saver.save(self.session, path, write_meta_graph=False)
        return path

    def prune(self, path):
        """Removes all checkpoints but the last bests and the one at `path`; other files are not a run's to remove."""
        folder = os.path.dirname(path)
        kept = {f'{MODEL}-{best}' for best in self.best_steps[-self.preset.num_checkpoints:]}
        kept.add(os.path.basename(path))
        written = [name for name in os.listdir(folder) if CHECKPOINT_FILE.match(name)]
        for name in sorted(written, key=lambda name: not name.endswith('.index')):  # no checkpoint without its index
            if name.partition('.')[0] not in kept or 'tempstate' in name:  # the latter of a killed saver
                os.unlink(os.path.join(folder, name))


# ------------------------------------------------------------------------------ summaries

class Curves:
    """The event files in a run's summaries/: curves of training and validation, the graph, hyperparameters."""

    def __init__(self, preset, output_dir):
        self.preset = preset
        self.folder = os.path.join(preset.run_dir(output_dir), 'summaries')
        self.writers, self.validations = {}, []

    def open(self, graph):
        """Opens the files; what they held beyond the last save is gone, for it will come again."""
        last_step = self.preset.steps or -1  # the graph, at step 0, comes again
        self.writers[''], _ = open_events(self.folder, -1)
        self._describe_hparams()
        self.writers['train'], _ = open_events(os.path.join(self.folder, 'train'), last_step)
        self.writers['dev'], self.validations = open_events(os.path.join(self.folder, 'dev'), last_step)
        if not self.preset.steps:
            self._write('train', 0, graph_def=graph.as_graph_def(add_shapes=True).SerializeToString())
        self.flush()

    def best_steps(self):
        """The steps at which the validation accuracy was a new best, ascending."""
        highest, steps = -1.0, []
        for event in self.validations:
            for value in event.summary.value:
                if value.tag == 'accuracy' and value.simple_value > highest:
                    highest = value.simple_value
                    steps.append(event.step)
        best = self.preset.early_stopping_epoch  # where curves were removed, the record alone knows it
        return [step for step in steps if step < best] + [best] if best else []

    def add(self, name, step, **values):
        """A point of the curves 'train' or 'dev'."""
        from resnet import tf
        self._write(name, step, summary=tf.Summary(value=[
            tf.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def flush(self):
        for writer in self.writers.values():
            writer.flush()

    def close(self, status):
        """Closes the files, at the end of the run with this status."""
        from tensorboard.plugins.hparams import api_pb2, summary
        if status != 'interrupted':
            outcome = api_pb2.STATUS_SUCCESS if status == 'complete' else api_pb2.STATUS_FAILURE
            self._write_record(summary.session_end_pb(outcome))
        for writer in self.writers.values():
            writer.close()

    def _describe_hparams(self):
        """The records by which TensorBoard's HParams tab lists, sorts and compares runs."""
        from tensorboard.plugins.hparams import summary_v2 as api  # its own .api has the same, and imports Keras
        names = ('preset', 'model', 'seed') + RECIPE + ('mixed_precision',)
        values = {name: getattr(self.preset, name) for name in names if getattr(self.preset, name) is not None}
        metrics = [api.Metric(tag, group=group, display_name=f'{group} {tag}') for group, tag in HPARAMS_METRICS]
        self._write_record(api.hparams_config_pb([api.HParam(name) for name in names], metrics))
        self._write_record(api.hparams_pb(values, trial_id=self.preset.title, start_time_secs=self.preset.timestamp))

    def _write_record(self, record):
        from resnet import tf
        self._write('', 0, summary=tf.Summary.FromString(record.SerializeToString()))  # TensorBoard's own class

    def _write(self, name, step, **content):
        from resnet import tf
        self.writers[name].write(tf.Event(wall_time=time.time(), step=step, **content).SerializeToString())


def open_events(folder, last_step, with_graph=True):
    """Rewrites the event files in `folder` as one, with what they hold up to last_step.

    Returns its writer and these events. Raises InputError where a file is damaged.
    """
    from resnet import tf
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    old = [os.path.join(folder, name) for name in names if '.tfevents.' in name]
    events = collections.OrderedDict()  # a killed start may have left an event in two files
    for path in old:
        events.update((content, event) for content, event in _read_events(path, last_step)
                      if with_graph or not event.graph_def)
    os.makedirs(folder, exist_ok=True)
    second = int(time.time())
    while any(f'.tfevents.{second}.' in path for path in old):
        second += 1
    writer = tf.io.TFRecordWriter(os.path.join(folder, f'events.out.tfevents.{second}.{platform.node()}'))
    writer.write(tf.Event(wall_time=second, file_version='brain.Event:2').SerializeToString())
    for content in events:
        writer.write(content)
    writer.flush()
    for path in old:
        os.unlink(path)
    return writer, list(events.values())


def _read_events(path, last_step):
    """[(bytes, Event)] of an event file up to last_step. Raises InputError where it is damaged."""
    from resnet import reason, tf
    try:
        with open(path, 'rb') as file:
            events = [(content, tf.Event.FromString(content)) for content in event_records(file.read())]
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f'{path} is damaged ({reason(error)}); remove it to go on without the curves that it holds')
    return [(content, event) for content, event in events if event.step <= last_step and not event.file_version]


# ------------------------------------------------------------------------------ trimming

def trim(output_dir, timestamp=None):
    """Drops from a run, or from all that are trained to their end and tested, what only resuming needs.

    What stays is the best checkpoint without momentum, the curves, and a graph for the first run of each network.
    """
    presets = load_presets(output_dir)
    if not presets:
        raise InputError(no_runs(output_dir))
    chosen = None if timestamp is None else load_preset(output_dir, timestamp).timestamp
    networks = set()
    for preset in presets:
        network = (preset.model, preset.num_classes)
        if chosen in (None, preset.timestamp):
            if preset.finished and preset.status == 'complete':
                with locked(preset, output_dir):
                    _trim_run(preset, output_dir, with_graph=network not in networks)
                print(f'Run {preset.timestamp}: trimmed')
            else:
                print(f'Run {preset.timestamp}: left as it is, {state(preset)}')
        networks.add(network)


def _files_of(checkpoint):
    """The paths of a checkpoint's files, the data before the index."""
    return sorted(glob.glob(glob.escape(checkpoint) + '.*'))


def _trim_run(preset, output_dir, with_graph):
    from resnet import ResNet, make_session, reason, tf
    path = best_checkpoint(preset, output_dir)
    folder = os.path.dirname(path)
    light = os.path.join(folder, 'trimmed')
    with tf.Graph().as_default():
        ResNet(preset, training=False)
        tf.train.get_or_create_global_step()
        with make_session(preset, log_placement=False) as session:
            checkpoints = Checkpoints(preset, session, output_dir)
            try:
                if _files_of(light) == [light + '.index']:  # a kill came between the two files
                    os.replace(light + '.index', path + '.index')
                checkpoints.saver.restore(session, path)
                checkpoints.saver.save(session, light, write_meta_graph=False)
                checkpoints.saver.restore(session, light)  # so that what takes the old one's place is whole
                for file in _files_of(light):
                    os.replace(file, path + file[len(light):])
            except Exception as error:  # a damaged file can raise anything
                raise InputError(f'{path} is missing, damaged or cannot be written ({reason(error)})')
    try:
        checkpoints.prune(path)
        tf.train.update_checkpoint_state(folder, os.path.basename(path))
        writer, _ = open_events(os.path.join(preset.run_dir(output_dir), 'summaries', 'train'), sys.maxsize, with_graph)
        writer.close()
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f'run {preset.timestamp} is trimmed but for its summaries, which cannot be written '
                         f'({reason(error)}); trim it again')


# ------------------------------------------------------------------------------ helpers of the loop

def _check_parts(preset, n_training):
    """Raises InputError where a batch of an epoch of n_training images has fewer images than there are towers."""
    smallest = n_training % preset.batch_size or preset.batch_size
    if smallest < preset.towers:
        raise InputError(f'{counted(preset.towers, "tower")} cannot share the last batch of an epoch, which has '
                         f'{counted(smallest, "image")}; choose another --batch_size')


def _check_hardware(preset, resnet, cluster):
    """Raises InputError where the hardware lacks the devices, or would not gain by what the preset asks for."""
    gpus = resnet.count_gpus()
    if not cluster.tasks and preset.towers > gpus > 0:
        raise InputError(f'{preset.towers} towers need as many GPUs, and TensorFlow sees {gpus}: lower --towers, '
                         'or resume the run where there are as many')
    if preset.mixed_precision is True and not resnet.half_precision():
        raise InputError('mixed_precision needs a GPU of compute capability 7 or more, or a processor with AVX512_BF16 '
                         "or AMX under today's TensorFlow; here it would only cost accuracy: give --mixed_precision "
                         'false or auto, or resume the run where it was begun')
    if preset.xla and resnet.KERNELS != 'GPU':
        raise InputError('xla is for GPUs, and TensorFlow sees none; it would slow the training here: leave it out')


def _check_unchanged(preset, output_dir):
    """Raises InputError where another process has trained the run since its record was read."""
    recorded = read_preset(preset.pickle_path(output_dir))
    if any(getattr(recorded, name) != getattr(preset, name) for name in ('steps', 'training_time', 'val_accuracy')):
        raise InputError(f'run {preset.timestamp} was resumed by another process in the meantime')


def _refreshing_batches(images):
    """The first training images (they are shuffled), scaled: float32 [500, 32, 32, 3] in [-1, 1]."""
    images = images[:REFRESH_IMAGES]
    with Progress(total=len(images), desc='recomputing batch-norm statistics', unit='images') as progress:
        for i in range(0, len(images), REFRESH_BATCH):
            yield data_helpers.scale(images[i:i + REFRESH_BATCH])
            progress.update(REFRESH_BATCH)


@contextlib.contextmanager
def _memory_for(what, advice):
    """Where the memory is too small for `what`, says so, and what would help."""
    from resnet import reason, tf
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise InputError(f'the memory is too small for {what}: {advice} ({reason(error)})')


def _saved(preset, data_dir, output_dir):
    """What there is of a run that ends here, and how to go on."""
    if not os.path.exists(preset.pickle_path(output_dir)):
        return 'Nothing was saved; start all processes again'
    resume = _resume_command(preset, output_dir, data_dir)
    return f'What was saved of step {preset.steps or 0:,} is whole; start all processes again with: {resume}'


@contextlib.contextmanager
def _stop_request(preset, data_dir, output_dir):
    """A list that fills on Ctrl-C, SIGTERM or a lost connection, for the loop to end in its own time.

    A second Ctrl-C breaks the training off. Under nohup a lost connection does nothing.
    """
    asked = []

    def handler(number, frame):
        if not asked:
            asked.append(number)
            print('\nStopping: validating and saving. Ctrl-C again breaks it off.', flush=True)
        elif number == signal.SIGINT:
            resume = _resume_command(preset, output_dir, data_dir)
            print(f'\nBroken off. What was saved of step {preset.steps or 0:,} is whole; resume it with:\n  {resume}',
                  flush=True)
            sys.exit(128 + number)

    with _on_signals(handler):
        yield asked


@contextlib.contextmanager
def _on_signals(handler):
    """Within the block Ctrl-C, SIGTERM and a lost connection call handler(number, frame)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def git_commit():
    """The commit of the code, and whether files differ from it; None where there is no git, or no repository here."""
    def git(*words):
        return subprocess.check_output(['git', '-C', PROJECT_DIR] + list(words), stderr=subprocess.DEVNULL,
                                       universal_newlines=True).strip()
    try:
        if os.path.realpath(git('rev-parse', '--show-toplevel')) != os.path.realpath(PROJECT_DIR):
            return None  # somebody else's repository, in which the code happens to lie
        commit = git('rev-parse', 'HEAD')
        return f'{commit} with changes' if git('status', '--porcelain', '--untracked-files=no', '--', *CODE) else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _rates(preset):
    """The names of what makes a training diverge where it is too high."""
    return ('lr', 'muon_lr') if preset.muon_lr else ('lr',)


def _rate_flags(preset):
    return ' and '.join(f'--{name}' for name in _rates(preset))


def _resume_command(preset, output_dir, data_dir, *words):
    return command('resnet_train.py', '--resume', preset.timestamp, *words, output_dir=output_dir, data_dir=data_dir)


# ------------------------------------------------------------------------------ command line

@exit_on_input_error
def main(arguments=None):
    flags = vars(_parser(arguments).parse_args(arguments))
    overrides = {name: flags[name] for name in HYPERPARAMETERS if flags[name] is not None}
    if flags['trim'] is not None:
        if overrides or any(flags[name] for name in ('resume', 'seeds', 'preset', 'task', 'ray', 'show', 'init_from')):
            raise InputError('--trim trains nothing: leave out the other flags')
        trim(flags['output_dir'], None if flags['trim'] == ALL else flags['trim'])
        return
    if sum(flags[name] is not None for name in ('resume', 'task', 'ray')) > 1:
        raise InputError('--resume, --task and --ray exclude each other')
    cluster = flags['cluster'] = read_cluster(os.environ.get('TF_CONFIG'))
    if cluster.tasks and flags['ray'] is not None:
        raise InputError('--ray spreads runs and TF_CONFIG one run over machines: leave --ray out, or unset TF_CONFIG')
    if cluster.serves and not flags['show']:
        cluster.serve()
    if cluster.tasks and flags['resume'] is None:
        overrides.setdefault('towers', len(cluster.tasks))
    if flags['resume'] is not None:
        presets = [_to_resume(flags, overrides)]
    else:
        presets = _requested(flags, overrides)
    if flags['show']:
        for preset in presets:
            show(preset)
        return
    if cluster.tasks:
        cluster.start()
    if flags['ray'] is not None:
        _train_by_ray(presets, overrides, flags)
    elif flags['task'] is not None:
        _train_task(presets[0], flags)
    elif flags['seeds'] is None and len(presets) == 1:
        _train_one(presets[0], flags)
    else:
        _train_all(presets, flags)


def _parser(arguments):
    defaults = _preset_for_help(arguments)
    parser = ArgumentParser(description=__doc__, epilog='presets, by number or name:\n' + _list_of_presets())
    parser.add_argument('--preset', nargs='+', metavar='N',
                        help='what to train, see below (default: 0); of several presets what is missing, as of --seeds')
    parser.add_argument('--show', action='store_true', help='print the recipe, length and parameter count, and end')
    parser.add_argument('--resume', nargs='?', const=NEWEST, metavar='TIMESTAMP',
                        help='resume this run where its last save left it; alone: the newest interrupted one. A larger '
                             '--num_epochs or --max_steps extends it')
    parser.add_argument('--seeds', nargs='+', metavar='SEED',
                        help='a run for each of these seeds; a single number says how many: --seeds 3 is --seeds 0 1 '
                             '2. Runs of this recipe that are on record are resumed or, if complete, left as they are')
    parser.add_argument('--ray', nargs='?', const=THIS_MACHINE, metavar='ADDRESS',
                        help='several runs at once, by the Ray cluster at this address; alone: on this machine. Each '
                             'has a GPU a tower or, where there is none, its share of the cores')
    parser.add_argument('--task', nargs='?', const=BY_VARIABLE, metavar='K',
                        help='of the runs that --preset and --seeds name, only run K, from 0; again: resumes it. '
                             f'Alone: the one that ${" or $".join(TASK_VARIABLES)} tells')
    parser.add_argument('--init_from', metavar='TIMESTAMP', help="start from the weights of this run's best checkpoint")
    parser.add_argument('--trim', nargs='?', const=ALL, metavar='TIMESTAMP',
                        help='drop what only resuming needs from this run, or from all that are trained to their '
                             'end and tested, and end')
    group = parser.add_argument_group("hyperparameters, in place of the preset's")
    for name in HYPERPARAMETERS:
        field = FIELDS[name]
        bare = dict(nargs='?', const='true') if isinstance(field, Switch) else {}
        default = '' if getattr(defaults, name) is None else f'; default: {getattr(defaults, name)}'
        group.add_argument('--' + name, metavar=field.type.__name__.upper(),
                           help=f'{field.meaning} ({field.expected}{default})', **bare)
    return parser


def _preset_for_help(arguments):
    """The preset whose defaults --help tells: the one that the arguments name, or else preset 0."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument('--preset', nargs='*', default=[])
    try:
        return make_preset((chooser.parse_known_args(arguments)[0].preset or [0])[0])
    except InputError:
        return make_preset(0)


def _list_of_presets():
    lines = []
    for number, (name, purpose) in NAMES.items():
        preset = make_preset(number)
        lines.append(f'  {number:>2}  {name:8}  {preset.model:9} {preset.num_epochs:>3} epochs  {purpose}')
    return '\n'.join(lines)


def _requested(flags, overrides):
    """The Presets that --preset, --seeds and --task ask for: for each preset, all seeds."""
    numbers = flags['preset'] or [0]
    source = None
    if flags['init_from'] is not None:
        source = load_preset(flags['output_dir'], flags['init_from'])
        overrides['init_from'] = source.timestamp
    if flags['seeds'] is None:
        presets = [make_preset(number, **overrides) for number in numbers]
    elif flags['seed'] is not None:
        raise InputError('--seed and --seeds exclude each other')
    else:
        presets = [make_preset(number, **dict(overrides, seed=seed))
                   for number in numbers for seed in _seeds(flags['seeds'])]
    presets = list({(preset.preset, preset.seed): preset for preset in presets}.values())
    if source and any(preset.seed != source.seed for preset in presets):
        raise InputError(f'run {source.timestamp} was trained on most of the images that another seed validates on: '
                         f'go on from its weights with --seed {source.seed}')
    return presets if flags['task'] is None else [_task(presets, flags['task'])]


def _seeds(words):
    """The seeds that --seeds names: as they are, or by how many they are."""
    return words if len(words) > 1 else range(HOW_MANY_SEEDS.check('--seeds', words[0]))


def _task(presets, word):
    """The one of `presets` that --task names, by its number from 0, or that a scheduler's variable does."""
    if word == BY_VARIABLE:
        words = [os.environ[name] for name in TASK_VARIABLES if name in os.environ]
        if not words:
            raise InputError(f'--task needs a number, as in --task 0, where neither {" nor ".join(TASK_VARIABLES)} is '
                             'set')
        word = words[0]
    number = WHICH_TASK.check('--task', word)
    if number >= len(presets):
        raise InputError(f'there is no run {number}: the command names {counted(len(presets), "run")}, counted from 0')
    return presets[number]


def _to_resume(flags, overrides):
    """The Preset that --resume means, changed as the flags say. Raises InputError where it cannot be resumed so."""
    if flags['seeds'] or flags['init_from'] or len(flags['preset'] or []) > 1:
        raise InputError('--seeds, --init_from and several presets start runs, --resume resumes one: leave them out')
    preset = _stopped_run(flags['output_dir'], flags['resume'])
    changes = {name: checked(name, value) for name, value in overrides.items()}
    for number in flags['preset'] or []:
        changes['preset'] = make_preset(number).preset
    changes = {name: value for name, value in changes.items() if value not in (AUTO, getattr(preset, name))}
    rates = {name for name in changes if name in _rates(preset) and preset.status == 'diverged'}
    for name in changes:
        if name not in rates | {'num_epochs', 'max_steps'}:
            raise InputError(f'run {preset.timestamp} was started with {name} {getattr(preset, name)}, and is resumed '
                             f'with it; leave out --{name}')
    if preset.status == 'diverged' and not rates:
        raise InputError(f'run {preset.timestamp} diverged, and would again: resume it with a lower '
                         f'{_rate_flags(preset)}')
    _extend(preset, {name: changes[name] for name in set(changes) - rates})
    _lower(preset, {name: changes[name] for name in rates})
    return preset


def _stopped_run(output_dir, timestamp):
    """The run with this timestamp, or the newest interrupted one. Raises InputError where it is at work or lost."""
    if timestamp == NEWEST:
        interrupted = [preset for preset in load_presets(output_dir) if preset.status == 'interrupted']
        if not interrupted:
            raise InputError(f'there is no interrupted run in {output_dir}; --resume TIMESTAMP names another to extend')
        return interrupted[-1]
    preset = load_preset(output_dir, timestamp)
    if preset.status == 'training':
        raise InputError(f'run {preset.timestamp} is in use by another process, in training')
    if preset.status == 'diverged' and not preset.steps:
        raise InputError(f'run {preset.timestamp} cannot be resumed: it diverged before its first checkpoint; train it '
                         f'anew with a lower {_rate_flags(preset)}')
    if preset.status != 'interrupted' and not preset.steps:  # as in records of 2020
        raise InputError(f'run {preset.timestamp} cannot be resumed: its record does not say how many steps it was '
                         f'trained; start anew from its weights with {_onward(preset)}')
    return preset


def _onward(preset):
    """The flags of a new run that starts from the weights of this one."""
    return f'--init_from {preset.timestamp} --seed {preset.seed}'


def _extend(preset, changes):
    """Gives a run a new num_epochs or max_steps. Raises InputError where it would not train on by that."""
    length = preset.length()
    at_its_end = preset.status not in ('interrupted', 'diverged')
    if preset.schedule != 'step' and ('num_epochs' in changes or at_its_end and not preset.max_steps):
        raise InputError(f'run {preset.timestamp} cannot be extended: its learning rate falls to 0 at the end of its '
                         f'{preset.num_epochs} epochs; start anew from its weights with {_onward(preset)}')
    if 'num_epochs' in changes:
        changes.setdefault('max_steps', None)
    preset.update(changes)
    if changes and preset.length() <= length:
        raise InputError(f'run {preset.timestamp} cannot be resumed so: {preset.length():,} steps are no more than the '
                         f'{length:,} that it has')
    if at_its_end and not changes:
        raise InputError(f'run {preset.timestamp} cannot be resumed: it is at its end; a larger --num_epochs or '
                         '--max_steps extends it, and --max_steps 0 lifts a --max_steps')


def _lower(preset, rates):
    """Gives a diverged run lower rates, and records those that it had."""
    for name, value in sorted(rates.items()):
        before = getattr(preset, name)
        if not 0 < value < before:  # at muon_lr 0 SGD would train the kernels
            raise InputError(f'run {preset.timestamp} diverged with {name} {before}: --{name} must be lower, and '
                             'above 0')
        history = f'{name} {before:g} to step {preset.steps}'
        preset.update({name: value, 'rate_history': '; '.join(filter(None, [preset.rate_history, history]))})


def _train_one(preset, flags):
    """Trains a Preset, or resumes it where it has a timestamp. Exits with status 130 where Ctrl-C stopped it."""
    train(preset, flags['data_dir'], flags['output_dir'], preset.timestamp is not None, flags['cluster'])
    if preset.status == 'interrupted':
        sys.exit(130)


def show(preset):
    """Prints what would be trained, with all hyperparameters."""
    import resnet
    with resnet.tf.Graph().as_default():
        parameters = resnet.ResNet(preset, training=False).count_parameters()
    print(describe_training(preset, parameters, TRAINING_IMAGES))
    for name in HYPERPARAMETERS:
        print(f'    {name:22} {getattr(preset, name)}')


# ------------------------------------------------------------------------------ many runs

def _train_all(presets, flags):
    """Trains or resumes what is missing of `presets`, one after the other. Names in the end what failed."""
    failures = []
    for k, preset in enumerate(presets):
        label = _label(preset, presets)
        run = _on_record(preset, load_presets(flags['output_dir']))
        if _left_alone(run, label, failures):
            continue
        try:
            _train_one(run or preset, flags)
        except InputError as error:
            warn(error)
            failures.append(f'{label}: {error}')
        except SystemExit:
            rest = '; '.join(_label(preset, presets) for preset in presets[k + 1:])
            print(f'The same command resumes it and then trains {rest}.' if rest else 'So does the same command.')
            raise
    if failures:
        raise InputError('; '.join(failures))


def _label(preset, presets):
    """What tells a run from the others of its command."""
    several = len({other.preset for other in presets}) > 1
    return f'preset {preset.name}, seed {preset.seed}' if several else f'seed {preset.seed}'


def _on_record(preset, runs):
    """The newest of `runs` with the recipe of `preset` that is computed like it, seed included, or None."""
    matching = [run for run in runs if recipe(run) == recipe(preset) and all(
        getattr(preset, name) in (AUTO, getattr(run, name)) for name in HOW_COMPUTED)]
    return matching[-1] if matching else None


def _left_alone(run, label, failures):
    """Whether a run is on record (it may be None) and not to be resumed, which is said. A diverged one is a failure."""
    if run is None or run.status in ('interrupted', 'training'):  # whoever trains it may be about to lose it
        return False
    print(f'{label.capitalize()}: run {run.timestamp} is on record, {state(run)}; --preset {run.name} --seed '
          f'{run.seed}, with the other hyperparameters as here, trains another')
    if run.status == 'diverged':
        failures.append(f'{label} diverged')
    return True


def _train_task(preset, flags):
    """Trains the run of one task of a scheduler, or resumes it; one that is complete is left alone."""
    failures = []
    run = _freed(preset, flags['output_dir'])
    if not _left_alone(run, _label(preset, [preset]), failures):
        _train_one(run or preset, flags)
    if failures:
        raise InputError(failures[0])


def _freed(preset, output_dir):
    """The run of `preset` that is on record, or None; not before the lock of a lost node, on which it ran, has ended.

    Raises InputError where the run is still in training after LOCK_OUTLIVES seconds.
    """
    begin, said = time.monotonic(), False
    while True:
        run = _on_record(preset, load_presets(output_dir))
        if run is None or run.status != 'training':
            return run
        if time.monotonic() - begin > LOCK_OUTLIVES:
            raise InputError(f'run {run.timestamp} is in training by another process; when that has ended, start again')
        if not said:
            said = True
            warn(f'run {run.timestamp} is in training by another process: waiting for {LOCK_OUTLIVES} seconds at most')
        time.sleep(1)


# ------------------------------------------------------------------------------ many runs by Ray

def _train_by_ray(presets, overrides, flags):
    """Trains or resumes what is missing of `presets` by Ray, side by side. Names in the end what failed."""
    flags = dict(flags, **{name: os.path.abspath(flags[name]) for name in ('output_dir', 'data_dir')})
    output_dir = flags['output_dir']
    check_output_dir(output_dir)
    failures, missing = [], {}
    runs = load_presets(output_dir)
    for preset in presets:
        label = _label(preset, presets)
        if not _left_alone(_on_record(preset, runs), label, failures):
            missing[label] = preset
    if missing:
        with _ray(flags['ray']) as ray:
            nodes = _nodes(ray)
            _check_nodes(ray, nodes, output_dir, flags['data_dir'])
            towers = max(preset.towers for preset in presets)
            share = _share(nodes, len(presets), towers)  # of all, so that the same command gives each the same again
            print(f'{counted(len(missing), "run")} by Ray on {counted(len(nodes), "node")}, {_in_words(share)} each; '
                  f'what they print is in {os.path.join(output_dir, "runs")}', flush=True)
            task = ray.remote(_run_task).options(max_retries=RETRIES, **share)
            tasks = {task.remote(_flags_of(preset, overrides, flags), share.get('num_cpus')): label
                     for label, preset in missing.items()}
            _follow(ray, tasks, missing, output_dir, failures)
    if failures:
        raise InputError('; '.join(failures))


@contextlib.contextmanager
def _ray(address):
    """Ray, connected to the cluster at `address`, or started for this block on this machine."""
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    options = dict(log_to_driver=False, logging_level=logging.ERROR)
    if address == THIS_MACHINE:  # on 2.7 for this machine alone; on today's, for who knows a password of this run
        os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32))
        os.environ['RAY_worker_niceness'] = '0'  # as without Ray
        options.update(num_cpus=len(_own_cores()), include_dashboard=False, object_store_memory=10**8,  # bytes
                       _node_ip_address='127.0.0.1')
    else:
        os.environ.setdefault('RAY_NUM_REDIS_GET_RETRIES', '1')  # of 40 seconds each, until a cluster counts as gone
    try:
        import ray
    except ImportError as error:
        raise InputError(f'--ray needs Ray, which is not installed here ({error}): pip install ray')
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:  # OSError: also a temporary folder too deep for its sockets
        problem = ' '.join(str(error).split()) or 'it does not answer'
        raise InputError(f'there is no Ray cluster to work with at {address} ({problem})')
    try:
        yield ray
    finally:
        ray.shutdown()


def _nodes(ray):
    """The nodes of the cluster that can train: those with GPUs or, where there are none, those with cores."""
    nodes = [node for node in ray.nodes() if node['Alive']]
    able = [node for node in nodes if _gpus(node)] or [node for node in nodes if _cores(node)]
    if not able:
        raise InputError('the Ray cluster has neither GPUs nor cores')
    return able


def _gpus(node):
    return int(node['Resources'].get('GPU', 0))


def _cores(node):
    return int(node['Resources'].get('CPU', 0))


def _own_cores():
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else set(range(os.cpu_count()))


def _share(nodes, runs, towers=1):
    """What each of so many runs gets, as Ray names it.

    A GPU a tower, where there are any. Otherwise as many cores as let all runs work at once; one, where there are more
    runs than cores: separate runs use cores better than the threads of one run do. Raises InputError where no node has
    the GPUs.
    """
    if _gpus(nodes[0]):
        if towers > max(map(_gpus, nodes)):
            raise InputError(f'{towers} towers need as many GPUs on one node, and no node has them: lower --towers')
        return dict(num_gpus=towers, num_cpus=0)
    for cores in range(max(map(_cores, nodes)), 1, -1):
        if sum(_cores(node) // cores for node in nodes) >= runs:
            return dict(num_cpus=cores)
    return dict(num_cpus=1)


def _in_words(share):
    return counted(share['num_gpus'], 'GPU') if 'num_gpus' in share else counted(share['num_cpus'], 'core')


def _flags_of(preset, overrides, flags):
    """The command line that trains, or resumes, this one run."""
    words = ['--preset', str(preset.preset), '--task', '0', '--quiet']
    words += ['--output_dir', flags['output_dir'], '--data_dir', flags['data_dir']]
    return words + [f'--{name}={value}' for name, value in dict(overrides, seed=preset.seed).items()]


def _check_nodes(ray, nodes, output_dir, data_dir):
    """Raises InputError that names the nodes on which a run would fail, before hours are spent."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    token = secrets.token_hex(16)
    path = os.path.join(output_dir, 'INFOS', UNFINISHED + token)
    write_atomically(path, token.encode())
    problems = []
    try:
        tasks = [ray.remote(_problem_on_node).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node['NodeID'], soft=False)).remote(
                path, token, data_dir) for node in nodes]
        with Progress(total=len(nodes), desc='checking folders and data', unit='nodes') as progress:
            for node, task in zip(nodes, tasks):
                try:
                    problem = ray.get(task)
                except ray.exceptions.RayError as error:
                    problem = f'does not answer ({type(error).__name__})'
                if problem:
                    problems.append(f'node {node["NodeManagerHostname"]} ({node["NodeManagerAddress"]}) {problem}')
                progress.update()
    finally:
        os.unlink(path)
    if problems:
        raise InputError('; '.join(problems))


def _problem_on_node(path, token, data_dir):
    """A Ray task: why a run would fail on this node, or ''. It stands on nothing of ours, which the node may lack."""
    try:
        with open(path) as file:
            shared = file.read() == token
    except OSError:
        shared = False
    if not shared:
        folder = os.path.dirname(os.path.dirname(path))
        return f'does not see the output folder {folder}: name one that all nodes share, with --output_dir'
    if not os.path.exists(os.path.join(PROJECT_DIR, 'resnet_train.py')):
        return f'does not have the scripts in {PROJECT_DIR}: put them where all nodes see them'
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import data_helpers; '
            'data_helpers.load(sys.argv[2], data_helpers.TRAIN_FILES)')
    loading = subprocess.run([sys.executable, '-c', code, PROJECT_DIR, data_dir], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return f'cannot load the data: {_last_line(loading.stderr)}' if loading.returncode else ''


def _last_line(text):
    """What a process said last, without who says it."""
    lines = text.strip().splitlines() or ['it said nothing']
    return re.sub(r'^(resnet_train\.py: error|data_helpers\.InputError): ', '', lines[-1])


def _run_task(words, cores):
    """A Ray task: a run in a process of its own, on so many cores (0: on all). Returns its status, stdout and stderr.

    Where Ray cancels the task, the process is asked to end as by `kill`: validated, saved and recorded.
    """
    with _cores_of_its_own(cores):
        process = subprocess.Popen([sys.executable, os.path.join(PROJECT_DIR, 'resnet_train.py')] + words,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   universal_newlines=True)
        while True:
            try:
                out, err = process.communicate(timeout=1)
                return process.returncode, out, err
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:  # by which Ray cancels
                process.terminate()


@contextlib.contextmanager
def _cores_of_its_own(number):
    """Within the block what this thread starts keeps to so many cores, which no other task on this machine has.

    Ray counts cores, and does not say which. Without this the threads of each run would be as many as all cores, and so
    would its results differ from those of the run trained alone. macOS and Windows cannot: there a run uses all.
    """
    if not number or not hasattr(os, 'sched_setaffinity'):
        yield
        return
    cores, chosen = sorted(_own_cores()), []
    with contextlib.ExitStack() as stack:
        for core in cores:
            with contextlib.suppress(InputError):  # another task has it
                if len(chosen) < number:
                    path = os.path.join(tempfile.gettempdir(), f'lastresnet_core_{core}{LOCK}')
                    stack.enter_context(file_lock(path))
                    chosen.append(core)
        others = [core for core in cores if core not in chosen]  # two clusters on one machine share cores
        os.sched_setaffinity(0, chosen + others[:number - len(chosen)])
        try:
            yield
        finally:
            os.sched_setaffinity(0, cores)


def _follow(ray, tasks, presets, output_dir, failures):
    """Says what comes of the runs, a line each, until all `tasks` ({Ray's reference: label}) have ended.

    Adds to `failures` what failed. On Ctrl-C all runs end cleanly, and the script with status 130.
    """
    asked, cancelled = [], False
    steps = sum(preset.length() for preset in presets.values())
    with _on_signals(lambda number, frame: asked.append(number)), Progress(
            total=steps, desc='training', unit='steps', initial=_steps(presets, output_dir)) as progress:
        looked = time.monotonic()
        while tasks:
            ended, _ = ray.wait(list(tasks), timeout=1)
            for task in ended:
                label = tasks.pop(task)
                failures += _report(ray, task, label, presets[label], output_dir)
            if asked and not cancelled:
                cancelled = True
                Progress.row('Stopping: every run validates and saves. Ctrl-C again breaks them off.')
                for task in tasks:
                    ray.cancel(task)
            if asked[1:] and asked[-1] == signal.SIGINT:
                Progress.row('Broken off. What was saved is whole.')
                break
            if time.monotonic() - looked > LOOK_EVERY:
                looked = time.monotonic()
                progress.update(_steps(presets, output_dir) - progress.n)
    if asked:
        print('The same command goes on.')
        sys.exit(130)


def _steps(presets, output_dir):
    """How many steps of the runs are saved."""
    runs = load_presets(output_dir, refused=lambda error: None)
    return sum(run.steps or 0 for run in (_on_record(preset, runs) for preset in presets.values()) if run)


def _report(ray, task, label, preset, output_dir):
    """Prints what came of a run, in a line. Returns a list: of how it failed, or empty."""
    try:
        status, out, err = ray.get(task)
    except ray.exceptions.TaskCancelledError:  # before it began
        return []
    except ray.exceptions.RayError as error:
        status, out, err = None, '', f'Ray could not run it: {type(error).__name__}'
    run = _on_record(preset, load_presets(output_dir, refused=lambda error: None))
    if run is None or status not in (0, 130):
        problem = f'{label}: {_last_line(err)}' if status != -signal.SIGTERM else f'{label}: stopped before it began'
        warn(problem)
        return [problem]
    resumed = re.search(r'^Resuming run \d+ (at step [\d,]+)', out, re.M)
    words = f'{run.status}, resumed {resumed.group(1)}' if resumed else run.status
    Progress.row(f'{label.capitalize()}: run {run.timestamp} is {words}: best validation accuracy '
                 f'{run.val_accuracy:.4f} at step {run.early_stopping_epoch:,}; {run.training_time:.1f} minutes')
    return [] if status == 0 else [f'{label} was interrupted']


if __name__ == '__main__':
    main()
