import contextlib
import functools
import gc
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import data_helpers
from data_helpers import InputError
import numpy_resnet
from presets_and_results import load_preset, make_preset
import resnet
from resnet import LossScale, ResNet, device_name, evaluate, evaluate_both_views, make_session, tf
import sample

RESNET8_DIR = os.path.join(sample.TESTS_DIR, 'resnet8')  # a run on the whole data set, test accuracy 0.7013


@pytest.fixture
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


@contextlib.contextmanager
def initialized(preset):
    """A new network of a preset and a session, with the initial weights."""
    with tf.Graph().as_default():
        net = ResNet(preset)
        with make_session(preset) as session:
            session.run(tf.global_variables_initializer())
            yield net, session


@contextlib.contextmanager
def restored_resnet8():
    """The inference form of the committed run, a session, and the path of its checkpoint."""
    preset = load_preset(RESNET8_DIR)
    checkpoint = preset.checkpoint_path(RESNET8_DIR, preset.early_stopping_epoch)
    with tf.Graph().as_default():
        net = ResNet(preset, training=False)
        with make_session(preset) as session:
            tf.train.Saver().restore(session, checkpoint)
            yield net, session, checkpoint


def random_batch(size):
    """Images float32 [size, 32, 32, 3] and labels float32 [size, 10], one-hot."""
    random = np.random.RandomState(0)
    return random.uniform(-1, 1, (size, 32, 32, 3)), np.eye(10)[random.randint(0, 10, size)]


def ops(graph, kind, training=False):
    """Ops of a kind in one of the two forms, in the order of construction."""
    return [op for op in graph.get_operations() if op.type == kind and op.name.startswith('training/') == training
            and '/gradients/' not in op.name]


# ------------------------------------------------------------------------------ the answers X1 to X10

@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('n', [1, 3])
def test_answers_x1_to_x10(graph, n, training):
    net = ResNet(make_preset(3, num_residual_units=n))
    convolutions = ops(graph, 'Conv2D', training)
    kernels = [op.inputs[1].shape.as_list() for op in convolutions]
    strides = [list(op.get_attr('strides')) for op in convolutions]
    assert len(convolutions) == 1 + 6 * n
    assert all(kernel[:2] == [3, 3] for kernel in kernels)                # X3, X7, X9
    assert all(op.get_attr('padding') == b'SAME' for op in convolutions)
    assert kernels[0][2] == net.X.get_shape().as_list()[-1] == 3          # X4
    assert kernels[0][3] == 16                                            # X5
    assert strides[0] == [1, 1, 1, 1]                                     # X6
    first, second = strides[1::2], strides[2::2]
    assert all(stride == [1, 1, 1, 1] for stride in first)                # X8
    assert [k for k, stride in enumerate(second) if stride == [1, 2, 2, 1]] == [n, 2 * n]  # X10
    assert all(stride == [1, 1, 1, 1] for k, stride in enumerate(second) if k not in (n, 2 * n))
    widths = [kernel[3] for kernel in kernels[1:]]
    assert widths == [16] * (2 * n) + [32] * (2 * n) + [64] * (2 * n)     # X1 = 16, X2 = 32
    assert not [op for op in graph.get_operations() if op.type == 'BiasAdd' and '/conv' in op.name]


def test_variables_by_name(graph):
    ResNet(make_preset(3, num_residual_units=2))
    names = {'init/init_conv/DW', 'logit/DW', 'logit/biases', 'global_step'}
    for group in (1, 2, 3):
        for i in (0, 1):
            unit = f'unit_{group}_{i}/'
            first = 'common_activation' if unit == 'unit_1_0/' else 'residual_activation'
            names |= {unit + 'sub1/conv1/DW', unit + 'sub2/conv2/DW'}
            names |= {unit + bn + part for bn in (first + '/init_bn/', 'sub2/bn2/')
                      for part in ('beta', 'gamma', 'moving_mean', 'moving_variance')}
    names |= {'unit_last/final_bn/' + part for part in ('beta', 'gamma', 'moving_mean', 'moving_variance')}
    built = {variable.op.name for variable in tf.global_variables()}
    assert {name for name in built if not name.endswith('/Momentum')} == names
    assert {name[:-9] for name in built - names} == {variable.op.name for variable in tf.trainable_variables()}


def test_tensors_by_name(graph):
    net = ResNet(make_preset(1, num_classes=17))
    for name, tensor, shape, dtype in (('X:0', net.X, [None, 32, 32, 3], tf.float32),
                                       ('Y:0', net.Y, [None, 17], tf.float32),
                                       ('logit/predictions:0', net.predictions, [None], tf.int64),
                                       ('accuracy/accuracy:0', net.accuracy, [], tf.float32)):
        assert graph.get_tensor_by_name(name) is tensor
        assert tensor.shape.as_list() == shape and tensor.dtype == dtype


@pytest.mark.parametrize('n, classes', [(1, 10), (3, 10), (5, 100), (18, 10)])
def test_parameter_count(graph, n, classes):
    net = ResNet(make_preset(3, num_residual_units=n, num_classes=classes), training=False)
    kernels = 9 * (3 * 16 + 2 * n * 16 * 16 + 16 * 32 + (2 * n - 1) * 32 * 32 + 32 * 64 + (2 * n - 1) * 64 * 64)
    # Each unit normalizes what comes in and what its first convolution gives.
    normalization = 2 * (16 * 2 * n + (16 + 32 * (2 * n - 1)) + (32 + 64 * (2 * n - 1)) + 64)
    assert net.count_parameters() == kernels + normalization + 64 * classes + classes
    # Those inside the units are folded into the convolutions before them, the others with oneDNN into depthwise ones.
    unfolded = ops(graph, 'FusedBatchNormV3') + ops(graph, 'DepthwiseConv2dNative')
    assert len(unfolded) == 3 * n + 1 and len(ops(graph, 'LeakyRelu')) == 6 * n + 1


def test_gradients_do_not_depend_on_whose_kernels_compute_them(monkeypatch):
    x, y = random_batch(8)
    gradients = {}
    for kernels in ('Eigen', 'oneDNN'):
        monkeypatch.setattr(resnet, 'KERNELS', kernels)
        with initialized(make_preset(3, num_residual_units=2)) as (net, session):
            gradients[kernels] = session.run(tf.gradients(net.training_loss, tf.trainable_variables()),
                                             {net.X: x, net.Y: y})
            for kind in ('Conv2DBackpropInput', 'Conv2DBackpropFilter'):
                natively = len([op for op in session.graph.get_operations() if op.type == kind])
                assert natively == 2 * (2 if kernels == 'Eigen' else 13)  # train_step's too; the strided alone, or all
    for eigen, onednn in zip(gradients['Eigen'], gradients['oneDNN']):
        assert np.abs(eigen - onednn).max() <= 1e-4 * np.abs(eigen).max()


def test_initial_weights():
    with initialized(make_preset(3)) as (_, session):
        values = {variable.op.name: session.run(variable) for variable in tf.global_variables()}
    for name, value in values.items():
        if name.endswith('/DW') and name != 'logit/DW':
            assert abs(value.std() / np.sqrt(2 / (9 * value.shape[3])) - 1) < 0.15 and abs(value.mean()) < 0.02, name
    limit = np.sqrt(3 / 64)
    assert 0.9 * limit < np.abs(values['logit/DW']).max() <= limit and not values['logit/biases'].any()
    # The same seed gives the same weights on both stacks.
    np.testing.assert_allclose(values['init/init_conv/DW'][0, 0, 0, :4],
                               [-0.09519253, 0.1398346, 0.00270666, 0.08607603], atol=1e-6)


def test_seeds_differ():
    def kernel(seed):
        with initialized(make_preset(0, seed=seed)) as (_, session):
            return session.run('unit_1_0/sub1/conv1/DW:0')
    assert np.array_equal(kernel(1), kernel(1)) and not np.allclose(kernel(1), kernel(2))


# ------------------------------------------------------------------------------ against NumPy

def test_logits_of_a_checkpoint_against_numpy(cifar10):
    images, _ = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x = data_helpers.scale(images[:20])
    with restored_resnet8() as (net, session, checkpoint):
        logits = session.run(net.logits, {net.X: x})
    reader = tf.train.NewCheckpointReader(checkpoint)
    variables = {name: reader.get_tensor(name).astype(np.float64) for name in reader.get_variable_to_shape_map()}
    expected = numpy_resnet.logits(x.astype(np.float64), variables, 1, net.preset.relu_leakiness)
    # All others were used.
    assert all(name == 'global_step' or name.endswith('/Momentum') for name in variables)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # The figures in this file were computed by TensorFlow 1.15.0, and hold for both stacks.
    np.testing.assert_allclose(logits, np.load(os.path.join(RESNET8_DIR, 'logits.npy')), atol=1e-4)


def test_predictions_do_not_depend_on_the_batch(cifar10, monkeypatch):
    monkeypatch.setattr(resnet, 'EVALUATION_BATCH', 7)  # the last one holds 2
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x, y = data_helpers.scale(images), data_helpers.one_hot(labels, 10)
    with restored_resnet8() as (net, session, _):
        whole_loss = session.run(net.loss, {net.X: x, net.Y: y})
        loss, predictions = evaluate(net, session, images, labels)
        in_batches = [np.concatenate([session.run(net.predictions, {net.X: x[i:i + size]})
                                      for i in range(0, 100, size)]) for size in (1, 7, 100)]
    assert len(predictions) == 100 and abs(loss - whole_loss) < 1e-5
    assert all(np.array_equal(predictions, batch) for batch in in_batches) and (predictions == labels).mean() > 0.6


class SmallMemory:
    """A session that has no memory for more than `most` images."""

    def __init__(self, session, most):
        self.session, self.most, self.sizes = session, most, []

    def run(self, fetches, feed):
        size = max(map(len, feed.values()))
        self.sizes.append(size)
        if size > self.most:
            raise tf.errors.ResourceExhaustedError(None, None, f'OOM of {size} images\n\t [[{{{{node x}}}}]]')
        return self.session.run(fetches, feed)


def test_evaluation_goes_on_with_smaller_batches_where_the_memory_runs_out(cifar10):
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    with restored_resnet8() as (net, session, _):
        expected_loss, expected = evaluate(net, session, images, labels)
        for most in (99, 30, 1):
            small = SmallMemory(session, most)
            loss, predictions = evaluate(net, small, images, labels)
            assert np.array_equal(predictions, expected) and abs(loss - expected_loss) < 1e-5
            assert max(small.sizes) == 100 and sum(size for size in small.sizes if size <= most) >= 100
        with pytest.raises(InputError, match=r'too small for validating.*one image.*\(OOM of 1 images\)'):
            evaluate(net, SmallMemory(session, 0), images, labels, 'validating')


def test_evaluation_goes_on_where_the_memory_runs_out_in_the_middle(cifar10, monkeypatch):
    monkeypatch.setattr(resnet, 'EVALUATION_BATCH', 16)
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    with restored_resnet8() as (net, session, _):
        expected = evaluate(net, session, images, labels)
        small = SmallMemory(session, 16)

        def shrinking(*arguments, run=small.run):
            small.most = 16 if len(small.sizes) < 4 else 5  # others have taken it meanwhile
            return run(*arguments)
        monkeypatch.setattr(small, 'run', shrinking)
        loss, predictions = evaluate(net, small, images, labels)
    assert np.array_equal(predictions, expected[1]) and abs(loss - expected[0]) < 1e-5
    assert 16 in small.sizes and small.sizes[-1] <= 4


def test_both_views_against_numpy(cifar10, monkeypatch):
    monkeypatch.setattr(resnet, 'EVALUATION_BATCH', 7)
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    with restored_resnet8() as (net, session, checkpoint):
        predictions, probabilities = evaluate_both_views(net, session, images)
        alone = evaluate_both_views(net, session, images[40:50], batch=1)
    reader = tf.train.NewCheckpointReader(checkpoint)
    variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    given, mirrored = [numpy_resnet.probabilities(view, variables, 1, net.preset.relu_leakiness)
                       for view in (images, np.flip(images, 2))]
    mean = (given + mirrored) / 2
    assert np.array_equal(predictions, given.argmax(1)) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, mean, atol=1e-5)
    np.testing.assert_allclose(alone[1], mean[40:50], atol=1e-5)
    assert np.array_equal(alone[0], predictions[40:50])
    hits = [(view.argmax(1) == labels).sum() for view in (given, mirrored, mean)]
    assert len(set(hits)) == 3  # or the sample could not tell them apart


def test_both_views_where_the_memory_runs_out_between_them(cifar10, monkeypatch):
    images, _ = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    with restored_resnet8() as (net, session, _):
        expected = evaluate_both_views(net, session, images)
        small = SmallMemory(session, 100)

        def shrinking(*arguments, run=small.run):
            small.most = 100 if not small.sizes else 30
            return run(*arguments)
        monkeypatch.setattr(small, 'run', shrinking)
        predictions, probabilities = evaluate_both_views(net, small, images)
    assert np.array_equal(predictions, expected[0])
    np.testing.assert_allclose(probabilities, expected[1], atol=1e-6)
    assert small.sizes[:2] == [100, 100]
    # 7 images are left over in the parts of 31, which are too large: they may be done in vain, with their mirrors.
    assert sum(size for size in small.sizes if size <= 30) in (200, 214)


@pytest.mark.parametrize('slope, options', [
    (0.2, {}), (0.0, dict(momentum=0.7, nesterov=True, label_smoothing=0.3)),
    (0.2, dict(num_classes=17, label_smoothing=0.3))])
def test_loss_accuracy_and_one_step_against_numpy(slope, options, graph, cifar10):
    preset = make_preset(0, l2_reg_lambda=0.01, relu_leakiness=slope, **options)
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x, y = data_helpers.scale(images), data_helpers.one_hot(labels, preset.num_classes)
    net = ResNet(preset)
    feed = {net.X: x, net.Y: y, net.learning_rate: 0.0}
    with make_session(preset) as session:
        session.run(tf.global_variables_initializer())
        variables = {variable.op.name: session.run(variable).astype(np.float64) for variable in tf.global_variables()}
        kernels = [value for name, value in variables.items() if name.endswith('/DW')]
        logits = numpy_resnet.logits(x.astype(np.float64), dict(variables), 1, slope)
        stable = logits - logits.max(1, keepdims=True)
        cross_entropy = (np.log(np.exp(stable).sum(1)) - stable[np.arange(100), labels]).mean()
        loss, accuracy = session.run([net.loss, net.accuracy], feed)
        assert abs(loss - (cross_entropy + 0.01 * sum((kernel ** 2).sum() / 2 for kernel in kernels))) < 1e-4
        assert abs(accuracy - (logits.argmax(1) == labels).mean()) < 1e-6

        # At learning rate 0 a step changes nothing but the step and the statistics: 0.9 old + 0.1 of the batch.
        stem = numpy_resnet.convolution(x.astype(np.float64), variables['init/init_conv/DW'], 1)
        session.run(net.train_step, feed)
        mean, variance, step, kernel = session.run([
            'unit_1_0/common_activation/init_bn/moving_mean:0', 'unit_1_0/common_activation/init_bn/moving_variance:0',
            net.global_step, 'init/init_conv/DW:0'])
        np.testing.assert_allclose(mean, 0.1 * stem.mean((0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(variance, 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-4)
        assert step == 1 and np.array_equal(kernel, variables['init/init_conv/DW'].astype(np.float32))

        # Momentum SGD on the biases, whose gradient is that of the mean cross entropy alone: with the smoothed labels.
        smooth = 0.7 * y + 0.3 / preset.num_classes if options else y

        def probabilities():
            shifted = session.run(graph.get_tensor_by_name('training/logit/xw_plus_b:0'), feed).astype(np.float64)
            shifted = np.exp(shifted - shifted.max(1, keepdims=True))
            return shifted / shifted.sum(1, keepdims=True)
        feed[net.learning_rate] = 0.05
        slot = session.run('logit/biases/Momentum:0').astype(np.float64)
        biases = session.run('logit/biases:0').astype(np.float64)
        for _ in range(2):
            gradient = (probabilities() - smooth).mean(0)
            slot = preset.momentum * slot + gradient
            biases = biases - 0.05 * (gradient + preset.momentum * slot if preset.nesterov else slot)
            session.run(net.train_step, feed)
        np.testing.assert_allclose(session.run('logit/biases:0'), biases, atol=1e-5)


def newton_schulz_by_svd(x):
    """[..., n] as a matrix of n columns after five rounds of the iteration, which moves its singular values alone."""
    u, singular, v = np.linalg.svd(x.reshape(-1, x.shape[-1]), False)
    singular /= np.sqrt((singular ** 2).sum())
    for _ in range(5):
        singular = 3.4445 * singular - 4.775 * singular ** 3 + 2.0315 * singular ** 5
    return (u * singular).dot(v).reshape(x.shape)


@pytest.mark.parametrize('nesterov', [False, True])
def test_muon_against_numpy(nesterov, graph, cifar10):
    preset = make_preset(0, batch_size=50, l2_reg_lambda=0.01, momentum=0.8, nesterov=nesterov, lr=0.2, muon_lr=0.03)
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    net = ResNet(preset)
    kernels = [variable for variable in tf.trainable_variables() if len(variable.shape) == 4]
    rest = [variable for variable in tf.trainable_variables() if len(variable.shape) != 4]
    logits = graph.get_tensor_by_name('training/logit/xw_plus_b:0')
    cross_entropy = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(labels=net.Y, logits=logits))
    gradients = tf.gradients(cross_entropy, kernels)  # what moves a kernel knows of the cross entropy alone
    gradients += tf.gradients(net.training_loss, rest)
    feed = {net.X: data_helpers.scale(images), net.Y: data_helpers.one_hot(labels, 10), net.learning_rate: 0.1}
    with make_session(preset) as session:
        session.run(tf.global_variables_initializer())
        values, slots = session.run(kernels + rest), [np.zeros(variable.shape) for variable in kernels + rest]
        for _ in range(3):
            for k, gradient in enumerate(session.run(gradients, feed)):
                slots[k] = 0.8 * slots[k] + gradient
                direction = gradient + 0.8 * slots[k] if nesterov else slots[k]
                if k < len(kernels):
                    # Half the highest rate: half of 0.03; and L2 as momentum 0.8 would have it, 5 times the rate.
                    values[k] = values[k] * (1 - 0.1 * 0.01 * 5) - 0.015 * newton_schulz_by_svd(direction)
                else:
                    values[k] = values[k] - 0.1 * direction
            loss_before = session.run(net.training_loss, feed)
            _, loss = session.run([net.train_step, net.training_loss], feed)
            assert abs(loss - loss_before) < 1e-5
            for value, variable in zip(values, session.run(kernels + rest)):
                np.testing.assert_allclose(value, variable, atol=2e-4)
            values = session.run(kernels + rest)
        assert len(kernels) == 7 and len(rest) == 16 and session.run(net.global_step) == 3


def ancestors(op):
    """The ops that are done before this one."""
    found, pending = set(), [op]
    while pending:
        op = pending.pop()
        before = {tensor.op for tensor in op.inputs} | set(op.control_inputs)
        pending += before - found
        found |= before
    return found


@pytest.mark.parametrize('dtype', [None, tf.bfloat16, tf.float16])
@pytest.mark.parametrize('muon_lr', [0.0, 0.03])
def test_no_kernel_moves_before_the_loss_has_read_it(muon_lr, dtype, graph, monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: dtype)
    ResNet(make_preset(3, num_residual_units=1, muon_lr=muon_lr, mixed_precision=dtype is not None))
    reading = set(ops(graph, 'L2Loss', training=True))
    trainable = {variable.op for variable in tf.trainable_variables()}
    moves = [op for op in graph.get_operations() if op.type in ('ApplyMomentum', 'AssignSub')]
    moved = {variable for move in moves for variable in trainable & ancestors(move)}
    assert len(reading) == 8 and len(moves) >= len(trainable) and moved == trainable
    for move in moves:
        assert reading <= ancestors(move), move.name


def test_orthogonal_keeps_the_singular_vectors_and_evens_out_the_values(graph):
    x = np.random.RandomState(0).randn(16, 144)
    with make_session(make_preset(0)) as session:
        y = session.run(resnet._orthogonal(tf.constant(x, tf.float32)))
    (u, _, v), singular = np.linalg.svd(x, False), np.linalg.svd(y, compute_uv=False)
    assert 0.65 < singular.min() and singular.max() < 1.25
    rotated = u.T.dot(y).dot(v.T)
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-4


def test_refreshed_statistics_are_the_average_of_the_batches(graph, cifar10):
    preset = make_preset(0)
    images, _ = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x = data_helpers.scale(images)
    net = ResNet(preset)
    with make_session(preset) as session:
        session.run(tf.global_variables_initializer())
        kernel = session.run('init/init_conv/DW:0')
        stems = [numpy_resnet.convolution(part.astype(np.float64), kernel, 1) for part in (x[:30], x[30:60], x[60:90])]
        for _ in range(2):  # what the statistics were before counts for nothing
            net.refresh_statistics(session, [x[:30], x[30:60], x[60:90]])
            mean, variance, after = session.run([
                'unit_1_0/common_activation/init_bn/moving_mean:0',
                'unit_1_0/common_activation/init_bn/moving_variance:0', 'init/init_conv/DW:0'])
            np.testing.assert_allclose(mean, np.mean([stem.mean((0, 1, 2)) for stem in stems], 0), atol=1e-5)
            np.testing.assert_allclose(variance, np.mean([stem.var((0, 1, 2)) for stem in stems], 0), rtol=1e-3)
            assert np.array_equal(kernel, after)
        # With one batch, both forms are one network.
        net.refresh_statistics(session, [x])
        training = graph.get_tensor_by_name('training/logit/xw_plus_b:0')
        inferred, trained = session.run([net.logits, training], {net.X: x})
        np.testing.assert_allclose(inferred, trained, atol=5e-3)


# ------------------------------------------------------------------------------ 16 bits

def test_mixed_precision_steps_like_single_precision(monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: tf.float16)  # which every stack's processor can, if slowly
    x, y = random_batch(16)
    moves, logits = [], []
    for mixed in (False, True):
        with initialized(make_preset(3, num_residual_units=1, mixed_precision=mixed)) as (net, session):
            convolutions = {training: {op.outputs[0].dtype for op in ops(session.graph, 'Conv2D', training)}
                            for training in (False, True)}
            assert convolutions == {False: {tf.float32}, True: {tf.float16 if mixed else tf.float32}}
            assert all(variable.dtype.base_dtype in (tf.float32, tf.int64, tf.int32)
                       for variable in tf.global_variables())
            logits.append(session.run(net.logits, {net.X: x}))
            before = session.run(tf.trainable_variables())
            session.run(net.train_step, {net.X: x, net.Y: y, net.learning_rate: 0.01})
            after = session.run(tf.trainable_variables())
            moves.append(np.concatenate([(b - a).ravel() for a, b in zip(before, after)]))
    assert np.array_equal(*logits)
    assert 0 < np.linalg.norm(moves[0] - moves[1]) < 0.1 * np.linalg.norm(moves[0])


@pytest.mark.parametrize('dtype', [None, tf.bfloat16])
def test_only_float16_has_a_loss_scale(dtype, monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: dtype)
    x, y = random_batch(2)
    with initialized(make_preset(3, num_residual_units=1, mixed_precision=dtype is not None)) as (net, session):
        assert not [variable.op.name for variable in tf.global_variables() if 'scale' in variable.op.name]
        if dtype is None:
            _, skipped = session.run([net.train_step, net.skipped],
                                     {net.X: np.nan * x, net.Y: y, net.learning_rate: 0.01})
            assert not skipped and session.run([net.finite, net.global_step]) == [False, 1]


def test_the_loss_scale_brings_small_gradients_into_float16(graph):
    variable = tf.get_variable('v', initializer=1.0)
    in_float16 = tf.cast(tf.cast(variable, tf.float16), tf.float32)
    optimizer, scale = tf.train.GradientDescentOptimizer(1.0), LossScale()
    with_scale, without = [gradients[0][0] for gradients in (
        scale.compute_gradients(optimizer, 1e-6 * in_float16), optimizer.compute_gradients(1e-6 * in_float16))]
    with make_session(make_preset(0)) as session:
        session.run(tf.global_variables_initializer())
        with_scale, without = session.run([with_scale, without])
    assert abs(with_scale / 1e-6 - 1) < 1e-3 < 1e-2 < abs(without / 1e-6 - 1)


def all_values(session):
    """What a checkpoint holds: {name: value}."""
    return session.run({variable.op.name: variable for variable in tf.global_variables()})


def in_float16(monkeypatch, **options):
    """A tiny preset that trains in float16, with a loss scale that is doubled after 3 good steps."""
    monkeypatch.setattr(resnet, 'half_precision', lambda: tf.float16)
    monkeypatch.setattr(LossScale, 'GOOD_STEPS', 3)
    return make_preset(3, num_residual_units=1, mixed_precision=True, **options)


@pytest.mark.parametrize('options', [{}, dict(muon_lr=0.03, nesterov=True)])
def test_a_step_that_overflows_moves_nothing_but_the_scale(options, monkeypatch):
    x, y = random_batch(2)
    with initialized(in_float16(monkeypatch, **options)) as (net, session):
        feed = {net.X: x, net.Y: y, net.learning_rate: 0.001}
        values = all_values(session)
        assert values['loss_scale/scale'] == 128
        history, good_steps = [], 0
        for step in range(1, 31):
            if step == 5:
                scale = next(variable for variable in tf.global_variables() if variable.op.name == 'loss_scale/scale')
                scale.load(2.0 ** 24, session)
                values['loss_scale/scale'] = 2.0 ** 24
            _, loss, skipped = session.run([net.train_step, net.training_loss, net.skipped], feed)
            before, values = values, all_values(session)
            moved = {name for name in values if not np.array_equal(values[name], before[name])}
            assert np.isfinite(loss) and values['global_step'] == step and session.run(net.finite)
            if skipped:
                assert moved <= {'loss_scale/scale', 'loss_scale/good_steps', 'global_step'}
            else:
                assert moved >= set(values) - {'loss_scale/scale', 'loss_scale/good_steps', 'logit/DW/Momentum'}
            good_steps = 0 if skipped else good_steps + 1
            factor = 0.5 if skipped else 2 if good_steps == 3 else 1
            good_steps %= 3
            assert values['loss_scale/scale'] == before['loss_scale/scale'] * factor
            assert values['loss_scale/good_steps'] == good_steps
            history.append(skipped)
    assert history[:5] == [False] * 4 + [True] and 5 < sum(history) < 25 and not all(history[-4:])


def test_what_is_not_finite_skips_the_step_and_is_a_divergence_at_a_scale_of_1(monkeypatch):
    x, y = random_batch(4)
    with initialized(in_float16(monkeypatch)) as (net, session):
        good = {net.X: x, net.Y: y, net.learning_rate: 0.001}
        bad = dict(good)
        bad[net.X] = x * np.where(np.arange(4) == 2, np.inf, 1)[:, None, None, None]
        session.run(net.train_step, good)
        before = all_values(session)
        for scale in (64, 32, 16, 8, 4, 2, 1):
            loss, skipped, _ = session.run([net.training_loss, net.skipped, net.train_step], bad)
            assert not np.isfinite(loss) and skipped and session.run('loss_scale/scale:0') == scale
        after = all_values(session)
        assert {name for name in after if not np.array_equal(after[name], before[name])} == {
            'loss_scale/scale', 'loss_scale/good_steps', 'global_step'}
        assert not session.run([net.skipped, net.train_step], good)[0] and session.run(net.finite)
        loss, skipped, _ = session.run([net.training_loss, net.skipped, net.train_step], bad)
        assert not np.isfinite(loss) and not skipped and not session.run(net.finite)
        assert session.run('loss_scale/scale:0') == 1


def test_a_training_in_float16_goes_on_exactly_from_its_checkpoint(monkeypatch, tmp_path):
    preset, (x, y) = in_float16(monkeypatch), random_batch(3)
    monkeypatch.setattr(LossScale, 'FIRST', 2.0 ** 24)

    def train(net, session, steps):
        for step in steps:
            session.run(net.train_step, {net.X: x[step % 3:], net.Y: y[step % 3:], net.learning_rate: 0.001})

    with initialized(preset) as (net, session):
        steps = 0
        while session.run('loss_scale/good_steps:0') != 2:  # at a scale that has been halved, amid good steps
            train(net, session, [steps])
            steps += 1
        assert session.run('loss_scale/scale:0') < 2 ** 24
        path = tf.train.Saver().save(session, str(tmp_path / 'model'))
        train(net, session, range(steps, steps + 10))
        expected = all_values(session)
    with initialized(preset) as (net, session):
        tf.train.Saver().restore(session, path)
        train(net, session, range(steps, steps + 10))
        resumed = all_values(session)
    for name, value in expected.items():
        assert np.array_equal(value, resumed[name]), name


# ------------------------------------------------------------------------------ start and hardware

def start(code='import resnet', tensorflow=None, folder=None, **options):
    """Runs code in a process of its own, where TensorFlow is a package with this content, written to `folder`.

    Returns the exit status, stdout and stderr.
    """
    path = [sample.PROJECT_DIR]
    if tensorflow is not None:
        (folder / 'tensorflow').mkdir()
        (folder / 'tensorflow' / '__init__.py').write_text(tensorflow)
        path.insert(0, str(folder))
    process = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300,
                             universal_newlines=True, env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)), **options)
    return process.returncode, process.stdout, process.stderr


def test_what_tensorflow_says_is_shown_where_it_ends_the_process(tmp_path):
    status, _, err = start(tensorflow='import os; os.write(2, b"no AVX instructions\\n"); os.abort()', folder=tmp_path)
    assert status < 0
    assert err == 'TensorFlow did not start; it needs a processor with AVX. What it wrote:\nno AVX instructions\n'


def test_a_library_that_is_missing_is_named(tmp_path):
    tensorflow = (
        'import os\n'
        'os.write(2, b"could not load libcudart\\n")\n'
        'try:\n'
        '    raise ImportError("libstuff.so.7: cannot open shared object file")\n'
        'except ImportError as error:\n'
        '    raise ImportError("Traceback\\nFailed to load the native TensorFlow runtime.\\nSee a page for help.")\n')
    status, _, err = start(tensorflow=tensorflow, folder=tmp_path)
    assert status == 1 and err.startswith('What TensorFlow wrote:\ncould not load libcudart\n')
    assert err.splitlines()[-1] == (
        'data_helpers.InputError: TensorFlow cannot be imported (ImportError: libstuff.so.7: cannot open shared object '
        'file); versions that fit together come with: pip install -r requirements.txt')


def test_a_package_that_does_not_fit_is_not_taken_for_the_processor(tmp_path):
    tensorflow = 'raise TypeError("Descriptors cannot be created directly.")'
    status, _, err = start(tensorflow=tensorflow, folder=tmp_path)
    assert status == 1 and 'AVX' not in err and err.startswith('Traceback')
    assert 'TensorFlow cannot be imported (TypeError: Descriptors cannot be created directly.)' in err.splitlines()[-1]


def test_ctrl_c_during_the_start_is_no_failure_of_tensorflow(tmp_path):
    status, _, err = start(tensorflow='print("words"); raise KeyboardInterrupt', folder=tmp_path)
    assert status != 0 and err.splitlines()[-1] == 'KeyboardInterrupt' and 'did not start' not in err


@pytest.mark.parametrize('version, words', [
    ((3, 7, 9), 'TensorFlow is missing: pip install -r requirements.txt'),
    ((3, 13, 0), 'TensorFlow is missing: pip install -r requirements.txt'),
    ((3, 9, 1), 'TensorFlow is missing, and Python 3.9 has none in range: pip install -r requirements.txt with '
                'Python 3.7, or 3.10 to 3.13'),
    ((3, 14, 0), 'TensorFlow is missing, and Python 3.14 has none in range: pip install -r requirements.txt with '
                 'Python 3.7, or 3.10 to 3.13')])
def test_a_missing_tensorflow_is_one_line(version, words, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'tensorflow', None)
        patch.setattr(sys, 'version_info', version)
        with pytest.raises(InputError) as caught:
            resnet._check_installed()
    assert str(caught.value) == words


LEFTOVERS = """
import resnet, os, sys
try:
    os.waitpid(-1, os.WNOHANG)
    print('a process is left')
except ChildProcessError:
    print(resnet.tf.__version__)
"""


def test_tensorflow_starts_without_a_word():
    assert start(LEFTOVERS) == (0, tf.__version__ + '\n', '')


def test_the_garbage_collector_does_not_go_through_what_the_import_made():
    assert gc.isenabled() and gc.get_freeze_count() > 100000


def test_keras_comes_only_where_it_is_asked_for(tmp_path):
    code = ('import resnet, resnet_train, sys\n'
            'from presets_and_results import make_preset\n'
            'preset = make_preset(0, timestamp=1)\n'
            f'resnet_train.Curves(preset, {str(tmp_path)!r}).open(resnet.tf.Graph())\n'
            'print({"keras", "matplotlib"} & set(sys.modules))\n'
            'import tensorflow\n'
            'print(tensorflow.keras.layers.Dense.__name__)')
    status, out, err = start(code)
    assert (status, out) == (0, 'set()\nDense\n'), err


def test_tensorflow_starts_without_stderr_and_temporary_folder():
    code = 'import sys, tempfile; tempfile.tempdir = "/nowhere"; assert sys.stderr is None' + LEFTOVERS
    assert start(code, preexec_fn=functools.partial(os.close, 2)) == (0, tf.__version__ + '\n', '')


def test_tensorflow_starts_where_no_process_can_be_started():
    code = 'import subprocess\ndef refused(*words, **options): raise OSError\nsubprocess.Popen = refused\n' + LEFTOVERS
    assert start(code)[:2] == (0, tf.__version__ + '\n')


DETERMINISM = """
import json, os, sys
import numpy as np
import tensorflow.compat.v1 as tf
tf.config.experimental.list_physical_devices = lambda kind: {gpus}
import resnet
from presets_and_results import make_preset
with tf.Graph().as_default():
    net, clock = resnet.ResNet(make_preset(3, num_residual_units=1)), tf.timestamp()
    with resnet.make_session(net.preset) as session:
        session.run(tf.global_variables_initializer())
        loss, _ = session.run([net.training_loss, net.train_step], {{
            net.X: np.ones((2, 32, 32, 3)), net.Y: np.eye(10)[:2], net.learning_rate: 0.1}})
        try:
            session.run(clock)
            refused = ''
        except tf.errors.FailedPreconditionError as error:
            refused = resnet.reason(error)
names = 'TF_DETERMINISTIC_OPS', 'TF_CUDNN_DETERMINISTIC'
print(json.dumps([resnet.KERNELS, float(loss), refused, [os.environ.get(name) for name in names]]))
"""


@pytest.mark.parametrize('gpu', [False, True])
def test_gpus_alone_are_made_deterministic(gpu, monkeypatch):
    for name in ('TF_DETERMINISTIC_OPS', 'TF_CUDNN_DETERMINISTIC'):
        monkeypatch.delenv(name, raising=False)
    status, out, err = start(DETERMINISM.format(gpus=['GPU'] if gpu else []))
    assert status == 0, err
    kernels, loss, refused, environment = json.loads(out)
    assert (kernels == 'GPU') == gpu and np.isfinite(loss)
    if tf.__version__.startswith('1.'):
        assert environment == (['1', '1'] if gpu else [None, None])
    else:  # a clock is what a deterministic TensorFlow refuses
        assert refused == ('Timestamp cannot be called when determinism is enabled' if gpu else '')


@pytest.mark.parametrize('kernels, capabilities, flags, dtype', [
    ('oneDNN', (), 'fpu avx512_bf16 sse', tf.bfloat16), ('oneDNN', (), 'fpu amx_bf16', tf.bfloat16),
    ('oneDNN', (), 'fpu avx512f avx512_bf16x', None), ('Eigen', (), 'fpu avx512_bf16', None),
    ('GPU', ('7.5',), '', tf.float16), ('GPU', ('9.0', '10.0'), '', tf.float16), ('GPU', ('8.0', '6.1'), '', None),
    ('GPU', (), 'fpu avx512_bf16', None)])
def test_half_precision_where_it_is_fast(kernels, capabilities, flags, dtype, monkeypatch):
    from tensorflow.python.client import device_lib

    class Device:
        def __init__(self, capability):
            self.physical_device_desc = f'device: 0, name: Tesla, compute capability: {capability}'

    monkeypatch.setattr(resnet, 'KERNELS', kernels)
    monkeypatch.setattr(resnet, '_cpuinfo', lambda: f'flags : {flags}\n')
    monkeypatch.setattr(device_lib, 'list_local_devices', lambda config: list(map(Device, capabilities)))
    assert resnet.half_precision() == dtype


class Devices:
    """A session that has GPUs."""

    def __init__(self, gpus, tasks=('/job:localhost/replica:0/task:0',)):
        self.gpus, self.tasks = gpus, tasks

    def list_devices(self):
        class Device:
            def __init__(self, task, kind):
                self.name, self.device_type = f'{task}/device:{kind}:0', kind
        return [Device(task, kind) for task in self.tasks for kind in ['CPU'] + ['GPU'] * self.gpus]


def test_device_name(monkeypatch):
    monkeypatch.setattr(resnet, '_cpuinfo', lambda: 'processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t: fpu\n')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3}, raising=False)
    assert device_name(Devices(0)) == 'CPU: Intel(R) Xeon(R), 1 core'
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 3})
    assert device_name(Devices(0)) == 'CPU: Intel(R) Xeon(R), 2 cores'
    monkeypatch.setattr(subprocess, 'check_output', lambda *words, **options: 'Tesla T4\nTesla T4\n')
    assert device_name(Devices(2)) == '2 x Tesla T4'
    cluster = [f'/job:{task}' for task in ('worker/replica:0/task:0', 'worker/replica:0/task:1',
                                           'chief/replica:0/task:0')]
    assert device_name(Devices(1, cluster)) == '3 tasks, the chief on 1 x Tesla T4'

    def missing(*words, **options):
        raise OSError
    monkeypatch.setattr(subprocess, 'check_output', missing)
    assert device_name(Devices(1)) == '1 x GPU'


def test_the_reason_of_an_error_is_a_line():
    text = '2 root error(s) found.\n  (0) Resource exhausted: OOM when allocating\n\t [[{{node x}}]]\nHint: none'
    assert resnet.reason(ValueError(text)) == '(0) Resource exhausted: OOM when allocating'
    assert resnet.reason(ValueError('\n')) == 'ValueError'
