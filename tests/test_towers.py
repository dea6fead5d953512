"""A batch shared by several devices: on this machine, and by a chief and a worker over the loopback interface."""
import contextlib
import json
import os
import random
import signal
import socket
import time

import numpy as np
import pytest

import resnet
import resnet_train
import sample
import torture
from data_helpers import InputError
from presets_and_results import load_preset, make_preset
from resnet import ResNet, make_session, tf
from resnet_train import Cluster, Task, read_cluster, train

BATCH = 50
STEPS = ('--preset', 0, '--batch_size', BATCH, '--max_steps', 50, '--num_epochs', 9, '--evaluate_every', 10,
         '--checkpoint_every', 7, '--data_augmentation', 'true')
IMPATIENT = ('import resnet, resnet_train; resnet.ANSWER_PATIENCE, resnet_train.LOOK_EVERY = 5, 1; '
             'resnet_train.main()')


@contextlib.contextmanager
def initialized(**options):
    """A network of preset 3, with one residual unit a group, and a session with its initial weights."""
    preset = make_preset(3, num_residual_units=1, **options)
    with tf.Graph().as_default():
        net = ResNet(preset)
        with make_session(preset) as session:
            session.run(tf.global_variables_initializer())
            yield net, session


def batch(size, side=32):
    """Images float32 [size, side, side, 3] and labels float32 [size, 10], as mixup has them."""
    draw = np.random.RandomState(0)
    return draw.uniform(-1, 1, (size, side, side, 3)), draw.dirichlet(np.ones(10), size)


def values(session):
    return session.run({variable.op.name: variable for variable in tf.global_variables()})


# ------------------------------------------------------------------------------ the graph

def test_one_tower_has_no_devices_and_cuts_no_batch():
    with tf.Graph().as_default() as graph:
        net = ResNet(make_preset(3))
        names = [op.name for op in graph.get_operations()]
        assert not any(op.device for op in graph.get_operations()) and not any('tower' in name for name in names)
        assert net.training_X is net.X and net._refresh is net._move_statistics
        assert 'StridedSlice' not in {op.type for op in net.X.consumers() + net.Y.consumers()}


def test_what_is_judged_lies_on_one_device():
    with tf.Graph().as_default() as graph:
        ResNet(make_preset(3, towers=3), training=False)
        assert not any(op.device for op in graph.get_operations())


@pytest.mark.parametrize('options', [{}, dict(muon_lr=0.02), dict(mixed_precision=True)])
def test_weights_and_gradients_travel_once(options, monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: tf.float16)
    devices = ['/job:chief/task:0', '/job:worker/task:0', '/job:worker/task:1']
    with tf.Graph().as_default() as graph, tf.device(devices[0]):
        net = ResNet(make_preset(3, num_residual_units=1, towers=3, **options), devices=devices)
        variables = [variable.shape.num_elements() for variable in tf.trainable_variables()]
        every = tf.global_variables()
        statistics = [variable.shape.num_elements() for variable in every if '/moving_' in variable.op.name]
        assert all(variable.device == devices[0] for variable in every)

        def place(op):
            return op.device.partition('/device:')[0]
        travels = {(place(tensor.op), place(op), tensor) for op in graph.get_operations() for tensor in op.inputs
                   if place(tensor.op) != place(op)}
    assert place(net.training_loss.op) == devices[0] and len(variables) == 23
    for worker in devices[1:]:
        to = [tensor for source, target, tensor in travels if (source, target) == (devices[0], worker)]
        back = [tensor for source, target, tensor in travels if (source, target) == (worker, devices[0])]
        assert {tensor.dtype.base_dtype for tensor in to + back} == {tf.float32}
        sizes = [sorted(tensor.shape.num_elements() or 0 for tensor in tensors) for tensors in (to, back)]
        scale = [1] if options.get('mixed_precision') else []
        assert sizes[0] == sorted(variables + [0, 0, 1] + scale)              # images, labels, how many there are
        assert sizes[1] == sorted(variables + statistics + [1, 1])           # loss and hits
    assert {target for _, target, _ in travels} == set(devices)               # none goes from worker to worker


# ------------------------------------------------------------------------------ a step

def test_a_step_is_that_of_the_parts_one_after_the_other():
    options = dict(label_smoothing=0.2, nesterov=True, l2_reg_lambda=0.01)
    x, y = batch(50)
    parts = [slice(0, 16), slice(16, 33), slice(33, 50)]
    with initialized(**options) as (net, session):
        variables = tf.trainable_variables()
        gradients = tf.gradients(net.training_loss, variables)
        before, loss, accuracy, mean_gradients, statistics = values(session), 0, 0, 0, []
        for part in parts:
            feed, share = {net.X: x[part], net.Y: y[part]}, len(x[part]) / 50
            results = session.run([net.training_loss, net.training_accuracy] + gradients, feed)
            loss, accuracy = loss + share * results[0], accuracy + share * results[1]
            mean_gradients = mean_gradients + share * np.concatenate([result.ravel() for result in results[2:]])
            net.refresh_statistics(session, [x[part]])
            statistics.append({name: value for name, value in values(session).items() if '/moving_' in name})
    with initialized(towers=3, **options) as (net, session):
        feed = {net.X: x, net.Y: y, net.learning_rate: 0.1}
        _, own_loss, own_accuracy = session.run([net.train_step, net.training_loss, net.training_accuracy], feed)
        after = values(session)
    assert abs(own_loss - loss) < 1e-5 and abs(own_accuracy - accuracy) < 1e-6
    moved = np.concatenate([(before[variable.op.name] - after[variable.op.name]).ravel() for variable in variables])
    np.testing.assert_allclose(moved / (0.1 * 1.9), mean_gradients, atol=2e-5)  # Nesterov's first step: 1 + 0.9
    assert len(statistics[0]) == 14
    for name in statistics[0]:
        mean = np.mean([part[name] for part in statistics], 0)
        np.testing.assert_allclose(after[name], 0.9 * before[name] + 0.1 * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('options, half', [
    ({}, None), (dict(muon_lr=0.03, nesterov=True), None), (dict(low_resolution_epochs=1), None),
    (dict(mixed_precision=True), tf.bfloat16), (dict(mixed_precision=True, muon_lr=0.03), tf.float16)])
def test_towers_that_get_the_same_images_step_as_one_does(options, half, monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: half)
    x, y = batch(8, 24 if 'low_resolution_epochs' in options else 32)
    ends = []
    for towers in (1, 2):  # halves round nothing
        with initialized(towers=towers, **options) as (net, session):
            before, feed = values(session), {net.learning_rate: 0.01}
            feed.update({net.training_X: np.tile(x, (towers, 1, 1, 1)), net.Y: np.tile(y, (towers, 1))})
            assert not session.run([net.skipped, net.train_step], feed)[0]
            ends.append(values(session))
    tolerance = 0.03 if half == tf.float16 else 1e-3  # of small gradients float16 keeps few bits
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        moved = np.abs(ends[0][name] - before[name]).max()
        assert np.abs(ends[0][name] - ends[1][name]).max() <= tolerance * moved + 1e-6, name


def test_what_overflows_in_one_tower_skips_the_step_of_all(monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: tf.float16)
    x, y = batch(8)
    with initialized(towers=2, mixed_precision=True) as (net, session):
        feed = {net.X: x, net.Y: y, net.learning_rate: 0.01}
        assert not session.run([net.skipped, net.train_step], feed)[0]
        before, (feed[net.X], _) = values(session), batch(8)
        feed[net.X][7] = np.inf
        assert session.run([net.skipped, net.train_step], feed)[0] and session.run(net.finite)
        after = values(session)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {'loss_scale/scale', 'loss_scale/good_steps', 'global_step'}


def test_statistics_are_refreshed_on_one_device_as_without_towers():
    x, _ = batch(30)
    found = []
    for towers in (1, 2):
        with initialized(towers=towers) as (net, session):
            net.refresh_statistics(session, [x[:20], x[20:]])
            found.append({name: value for name, value in values(session).items() if 'Momentum' not in name})
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]['unit_last/final_bn/moving_mean'].any()


# ------------------------------------------------------------------------------ what is refused

def test_a_batch_that_is_too_small_for_the_towers_is_refused(cifar10, tmp_path):
    train(make_preset(0, batch_size=67, max_steps=5, towers=2), cifar10, str(tmp_path))  # the last ones of 2 images
    assert load_preset(str(tmp_path)).steps == 5
    with pytest.raises(InputError, match='3 towers cannot share the last batch of an epoch, which has 2 images;'):
        train(make_preset(0, batch_size=67, towers=3), cifar10, str(tmp_path))
    with pytest.raises(InputError, match='4 towers cannot share the last batch of an epoch, which has 3 images'):
        resnet_train._check_parts(make_preset(0, batch_size=3, towers=4), 270)


def test_more_towers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(resnet, 'KERNELS', 'GPU')
    for gpus, towers in ((1, 2), (2, 3)):
        monkeypatch.setattr(resnet, 'count_gpus', lambda: gpus)
        with pytest.raises(InputError, match=f'{towers} towers need as many GPUs, and TensorFlow sees {gpus}'):
            resnet_train._check_hardware(make_preset(0, towers=towers), resnet, Cluster())
        resnet_train._check_hardware(make_preset(0, towers=gpus), resnet, Cluster())
    assert resnet.tower_devices(2) == ['/gpu:0', '/gpu:1']
    monkeypatch.setattr(resnet, 'KERNELS', 'Eigen')
    assert resnet.tower_devices(2) == ['/cpu:0', '/cpu:1']


def described(jobs, job='worker', index=0):
    return json.dumps(dict(cluster=jobs, task=dict(type=job, index=index)))


def test_clusters():
    two = dict(worker=['b:1', '[::1]:2'])
    for chief in ({}, dict(chief=['a:65535'])):
        first = ('chief', 0, 'a:65535') if chief else ('worker', 0, 'b:1')
        cluster = read_cluster(described(dict(two, **chief), index='1'))
        assert cluster.serves and cluster.own == ('worker', 1, '[::1]:2') and cluster.chief == first
        assert cluster.devices == ['/job:chief/task:0'] * len(chief) + ['/job:worker/task:0', '/job:worker/task:1']
        assert not read_cluster(described(dict(two, **chief), *first[:2])).serves
    for alone in (None, '', '{}', described(dict(worker=['a:1'])), described(dict(chief=['a:1']), 'chief')):
        cluster = read_cluster(alone)
        assert not cluster.serves and not cluster.tasks and cluster.devices is None and cluster.target == ''
    many = read_cluster(described(dict(worker=[f'w:{port}' for port in range(1, 13)]), index=11))
    assert [task.index for task in many.tasks] == list(range(12))


@pytest.mark.parametrize('text, words', [
    ('{', 'TF_CONFIG must read like {"cluster":'), ('[1]', 'it does not'), ('3', 'it does not'),
    ('{"cluster": {}}', "KeyError: 'task'"), ('{"task": {"type": "worker", "index": 0}}', "KeyError: 'cluster'"),
    (described([]), 'this is worker 0, which is not in its cluster'),
    (described(dict(worker=3)), 'it does not'), (described(dict(worker=['a:1', 3])), 'names the address 3; it must'),
    (described(dict(worker=['a:1', 'b'])), "names the address 'b'; it must be host:port"),
    (described(dict(worker=['a:1', 'b:70000'])), "names the address 'b:70000'; it must be host:port"),
    (described(dict(worker='a:1')), "names the address 'a'"),
    (described(dict(worker=['a:1', 'a:1'])), 'no address twice'),
    (described(dict(chief=['a:1', 'b:1'])), 'one chief at most'),
    (described(dict(worker=['a:1', 'b:1']), index=2), 'this is worker 2, which is not in its cluster'),
    (described(dict(worker=['a:1', 'b:1']), index=-1), 'this is worker -1, which'),
    (described(dict(worker=['a:1', 'b:1']), index='x'), 'it does not'),
    (described(dict(worker=['a:1'], ps=['b:1'])), 'the job ps; the chief has the variables: leave'),
    (described(dict(worker=['a:1', 'b:1']), 'evaluator'), 'the job evaluator; the chief validates, and resnet_eval.py'),
    (described(dict(worker=['a:1'], extra=['b:1'])), 'the job extra; there are only a chief and workers')])
def test_a_bad_tf_config_is_one_sentence(text, words):
    with pytest.raises(InputError) as caught:
        read_cluster(text)
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_bad_tf_config_is_refused_before_tensorflow_starts(tmp_path):
    status, out, err = sample.run_script('resnet_train.py', '--output_dir', tmp_path, tensorflow=False, TF_CONFIG='{')
    assert (status, out, err.count('\n')) == (2, '', 1) and err.startswith('resnet_train.py: error: TF_CONFIG must')


def test_a_chief_refuses_a_wrong_flag_before_it_waits_for_workers(tmp_path):
    config = described(dict(chief=['a:1'], worker=['b:1']), 'chief')
    for flags, message in ((['--lr', 'abc'], 'lr must be a number'), (['--resume', 7], 'there are no runs in')):
        status, _, err = sample.run_script('resnet_train.py', *flags, '--output_dir', tmp_path, tensorflow=False,
                                           TF_CONFIG=config)
        assert status == 2 and message in err and err.count('\n') == 1


def test_ray_and_a_cluster_of_ours_exclude_each_other(tmp_path):
    config = described(dict(worker=['a:1', 'b:1']), index=1)
    status, _, err = sample.run_script('resnet_train.py', '--ray', '--output_dir', tmp_path, tensorflow=False,
                                       TF_CONFIG=config)
    assert status == 2 and 'leave --ray out, or unset TF_CONFIG' in err and err.count('\n') == 1


def test_as_many_towers_as_tasks(cifar10, tmp_path):
    tasks = [Task('chief', 0, 'a:1'), Task('worker', 0, 'b:1')]
    for towers in (1, 3):
        with pytest.raises(InputError, match=f'towers {towers}, and TF_CONFIG names 2 tasks'):
            train(make_preset(0, towers=towers), cifar10, str(tmp_path), cluster=Cluster(tasks, tasks[0]))


def test_a_port_that_is_taken_is_one_sentence(capfd):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen(1)
        address = f'127.0.0.1:{taken.getsockname()[1]}'
        with pytest.raises(InputError, match=f'cannot listen on the port of {address}, which another program may have'):
            resnet.start_server(dict(chief=[address], worker=['127.0.0.1:1']), 'chief', 0)
    assert capfd.readouterr() == ('', '')


# ------------------------------------------------------------------------------ several processes

def cluster(output_dir, *flags, only=('chief', 'worker')):
    """A chief and a worker that are started with these flags, or one of them."""
    with socket.socket() as first, socket.socket() as second:
        addresses = []
        for free in (first, second):
            free.bind(('127.0.0.1', 0))
            addresses.append(f'127.0.0.1:{free.getsockname()[1]}')
    jobs = dict(chief=addresses[:1], worker=addresses[1:])
    return [sample.run_script('resnet_train.py', *flags, '--output_dir', output_dir, call=IMPATIENT, popen=True,
                              TF_CONFIG=described(jobs, job)) for job in only]


def await_line(process, beginning):
    """Waits until it prints a line with this beginning."""
    for line in iter(process.stdout.readline, ''):
        if line.startswith(beginning):
            return
    raise AssertionError(process.communicate())


def ended(process):
    """Its status and what it wrote to stderr, when it has ended by itself."""
    try:
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    return process.returncode, err


@pytest.fixture(scope='module')
def on_one_machine(tmp_path_factory):
    output_dir = str(tmp_path_factory.mktemp('on_one_machine'))
    status, out, err = sample.run_script('resnet_train.py', *STEPS, '--towers', 2, '--output_dir', output_dir)
    assert (status, err) == (0, '') and ', 2 towers, seed 0' in out
    return output_dir


def assert_same(one, other):
    """Checkpoints, curves and results of the only runs in two folders are equal, wherever their towers were."""
    runs = [load_preset(output_dir) for output_dir in (one, other)]
    found = [torture.checkpoints(run.run_dir(output_dir)) for run, output_dir in zip(runs, (one, other))]
    assert found[0].keys() == found[1].keys() and 50 in found[0]
    for step, tensors in found[0].items():
        assert tensors.keys() == found[1][step].keys()
        assert all(np.array_equal(tensor, found[1][step][name]) for name, tensor in tensors.items())
    curves = [torture.curves(run.run_dir(output_dir)) for run, output_dir in zip(runs, (one, other))]
    assert curves[0] == curves[1]
    for name in ('towers', 'steps', 'status', 'val_accuracy', 'early_stopping_epoch'):
        assert getattr(runs[0], name) == getattr(runs[1], name)


def test_a_chief_and_a_worker_end_where_two_towers_on_one_machine_do(on_one_machine, tmp_path):
    chief, worker = cluster(str(tmp_path), *STEPS)
    assert ended(chief) == ended(worker) == (0, '')
    run = load_preset(str(tmp_path))
    assert run.towers == 2 and run.device.startswith('2 tasks, the chief on ')
    assert_same(on_one_machine, str(tmp_path))


def test_what_nobody_listens_at_is_not_reached():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    for host in ('127.0.0.1', 'a..b'):  # the other cannot even be a host's name
        assert resnet.reach(f'{host}:{port}', '/job:chief/task:0') is None


def test_a_worker_does_not_listen_before_it_has_reached_the_chief(tmp_path):
    worker, = cluster(str(tmp_path), *STEPS, only=['worker'])
    line = worker.stdout.readline()
    worker.kill()
    worker.communicate()
    assert line.startswith('Waiting for chief 0 (127.0.0.1:')  # where it listens it says so before


@pytest.mark.long
def test_whoever_is_killed_the_resumed_run_ends_as_the_undisturbed(on_one_machine, tmp_path):
    output_dir, draw = str(tmp_path), random.Random(0)
    for death, flags in ((signal.SIGKILL, STEPS), (signal.SIGINT, ('--resume',))):
        chief, worker = cluster(output_dir, *flags)
        await_line(chief, 'validation')
        time.sleep(draw.uniform(0, 0.3))
        worker.send_signal(death)
        assert ended(worker) == (-death, '')
        status, err = ended(chief)
        run = load_preset(output_dir)
        assert (status, run.status) == (2, 'interrupted') and 10 <= run.steps < 50 and err.count('\n') == 1
        assert err.startswith('resnet_train.py: error: worker 0 (127.0.0.1:') and 'does not answer any more' in err
        assert f'What was saved of step {run.steps} is whole; start all processes again with: ' in err
        assert f'resnet_train.py --resume {run.timestamp} --output_dir ' in err

    chief, worker = cluster(output_dir, '--resume')
    await_line(worker, 'At work')  # before that it would wait for another chief
    await_line(chief, '  writes')
    chief.kill()
    assert ended(worker) == (0, '')
    chief.communicate()
    with open(os.path.join(load_preset(output_dir).run_dir(output_dir), 'console.log')) as file:
        assert file.read().count('does not answer any more') == 2
    status, _, err = sample.run_script('resnet_train.py', '--resume', '--output_dir', output_dir)  # on one machine
    assert (status, err) == (0, '')
    assert_same(on_one_machine, output_dir)


def test_ctrl_c_at_the_chief_ends_all_cleanly(tmp_path):
    chief, worker = cluster(str(tmp_path), *(STEPS[:4] + ('--num_epochs', 9999) + STEPS[8:]))
    await_line(chief, 'validation')
    chief.send_signal(signal.SIGINT)
    assert ended(chief) == (130, '') and ended(worker) == (0, '')
    assert load_preset(str(tmp_path)).status == 'interrupted'
