import os

import numpy as np
import pytest

import data_helpers
import numpy_resnet
import sample
from presets_and_results import load_preset, make_preset
import resnet
from resnet import ResNet, tf
from resnet_eval import best_checkpoint, restored
import resnet_train
from resnet_train import evaluate, make_session


@pytest.fixture
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def run_resnet8():
    """The run committed in tests/resnet8: a ResNet-8 trained on the whole data set (test accuracy 0.7013)."""
    preset = load_preset(os.path.join(sample.TESTS_DIR, 'resnet8'))
    return preset, best_checkpoint(preset, os.path.join(sample.TESTS_DIR, 'resnet8'))


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
            unit = 'unit_{}_{}/'.format(group, i)
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
    random = np.random.RandomState(0)
    x, y = random.uniform(-1, 1, (8, 32, 32, 3)), np.eye(10)[random.randint(0, 10, 8)]
    gradients = {}
    for kernels in ('Eigen', 'oneDNN'):
        monkeypatch.setattr(resnet, 'KERNELS', kernels)
        with tf.Graph().as_default() as graph:
            net = ResNet(make_preset(3, num_residual_units=2))
            with make_session(net.preset) as session:
                session.run(tf.global_variables_initializer())
                gradients[kernels] = session.run(tf.gradients(net.training_loss, tf.trainable_variables()),
                                                 {net.X: x, net.Y: y})
            for kind in ('Conv2DBackpropInput', 'Conv2DBackpropFilter'):
                natively = len([op for op in graph.get_operations() if op.type == kind])
                assert natively == 2 * (2 if kernels == 'Eigen' else 13)  # train_step's too; the strided alone, or all
    for one, other in zip(*gradients.values()):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


def test_mixed_precision_steps_like_single_precision(monkeypatch):
    monkeypatch.setattr(resnet, 'half_precision', lambda: tf.float16)  # which every stack's processor can, if slowly
    random = np.random.RandomState(0)
    x, y = random.uniform(-1, 1, (16, 32, 32, 3)), np.eye(10)[random.randint(0, 10, 16)]
    moves, logits = [], []
    for mixed in (False, True):
        with tf.Graph().as_default() as graph:
            net = ResNet(make_preset(3, num_residual_units=1, mixed_precision=mixed))
            convolutions = {training: {op.outputs[0].dtype for op in ops(graph, 'Conv2D', training)}
                            for training in (False, True)}
            assert convolutions == {False: {tf.float32}, True: {tf.float16 if mixed else tf.float32}}
            assert all(variable.dtype.base_dtype in (tf.float32, tf.int64) for variable in tf.global_variables())
            with make_session(net.preset) as session:
                session.run(tf.global_variables_initializer())
                logits.append(session.run(net.logits, {net.X: x}))
                before = session.run(tf.trainable_variables())
                session.run(net.train_step, {net.X: x, net.Y: y, net.learning_rate: 0.01})
                after = session.run(tf.trainable_variables())
                moves.append(np.concatenate([(b - a).ravel() for a, b in zip(before, after)]))
    assert np.array_equal(*logits)
    assert 0 < np.linalg.norm(moves[0] - moves[1]) < 0.1 * np.linalg.norm(moves[0])


def test_initial_weights(graph):
    ResNet(make_preset(3))
    with make_session(make_preset(3)) as session:
        session.run(tf.global_variables_initializer())
        values = {variable.op.name: session.run(variable) for variable in tf.global_variables()}
    for name, value in values.items():
        if name.endswith('/DW') and name != 'logit/DW':
            assert abs(value.std() / np.sqrt(2 / (9 * value.shape[3])) - 1) < 0.15 and abs(value.mean()) < 0.02, name
    limit = np.sqrt(3 / 64)
    assert 0.9 * limit < np.abs(values['logit/DW']).max() <= limit and not values['logit/biases'].any()
    # The same seed gives the same weights on both stacks.
    np.testing.assert_allclose(values['init/init_conv/DW'][0, 0, 0, :4],
                               [-0.09519253, 0.1398346, 0.00270666, 0.08607603], atol=1e-6)


def test_seeds_differ(graph):
    def kernel(seed):
        with tf.Graph().as_default():
            ResNet(make_preset(0, seed=seed), training=False)
            with make_session(make_preset(0)) as session:
                session.run(tf.global_variables_initializer())
                return session.run('unit_1_0/sub1/conv1/DW:0')
    assert np.array_equal(kernel(1), kernel(1)) and not np.allclose(kernel(1), kernel(2))


# ------------------------------------------------------------------------------ against NumPy

def test_logits_of_a_checkpoint_against_numpy(cifar10):
    preset, checkpoint = run_resnet8()
    images, _ = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x = data_helpers.scale(images[:20])
    logits = restored(preset, checkpoint, lambda net, session: session.run(net.logits, {net.X: x}))

    reader = tf.train.NewCheckpointReader(checkpoint)
    variables = {name: reader.get_tensor(name).astype(np.float64) for name in reader.get_variable_to_shape_map()}
    expected = numpy_resnet.logits(x.astype(np.float64), variables, 1, preset.relu_leakiness)
    assert all(name == 'global_step' or name.endswith('/Momentum') for name in variables)  # all others were used
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # The figures in this file were computed by TensorFlow 1.15.0, and hold for both stacks.
    np.testing.assert_allclose(logits, np.load(os.path.join(sample.TESTS_DIR, 'resnet8', 'logits.npy')), atol=1e-4)


def test_predictions_do_not_depend_on_the_batch(cifar10, monkeypatch):
    monkeypatch.setattr(resnet_train, 'EVALUATION_BATCH', 7)  # the last holds 2, several are judged at once
    preset, checkpoint = run_resnet8()
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x, y = data_helpers.scale(images), data_helpers.one_hot(labels, 10)

    def use(net, session):
        return (session.run(net.loss, {net.X: x, net.Y: y}), evaluate(net, session, images, labels),
                [np.concatenate([session.run(net.predictions, {net.X: x[i:i + size]}) for i in range(0, 100, size)])
                 for size in (1, 7, 100)])
    whole_loss, (loss, predictions), others = restored(preset, checkpoint, use)
    assert len(predictions) == 100 and abs(loss - whole_loss) < 1e-5
    assert all(np.array_equal(predictions, other) for other in others) and (predictions == labels).mean() > 0.6


@pytest.mark.parametrize('slope, options', [(0.2, {}), (0.0, dict(momentum=0.7, nesterov=True, label_smoothing=0.3))])
def test_loss_accuracy_and_one_step_against_numpy(slope, options, graph, cifar10):
    preset = make_preset(0, l2_reg_lambda=0.01, relu_leakiness=slope, **options)
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    x, y = data_helpers.scale(images), data_helpers.one_hot(labels, 10)
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
        smooth = 0.7 * y + 0.03 if options else y
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


def test_muon_against_numpy(graph, cifar10):
    preset = make_preset(0, batch_size=50, l2_reg_lambda=0.01, momentum=0.8, nesterov=True, lr=0.2, muon_lr=0.03)
    images, labels = data_helpers.load(cifar10, data_helpers.TEST_FILES)
    net = ResNet(preset)
    variables = tf.trainable_variables()
    kernels = [variable for variable in variables if len(variable.shape) == 4]
    logits = graph.get_tensor_by_name('training/logit/xw_plus_b:0')
    gradients = tf.gradients(tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(
        labels=net.Y, logits=logits)), kernels)  # what moves a kernel knows of the cross entropy alone
    feed = {net.X: data_helpers.scale(images), net.Y: data_helpers.one_hot(labels, 10), net.learning_rate: 0.1}
    with make_session(preset) as session:
        session.run(tf.global_variables_initializer())
        values, slots = session.run(kernels), [np.zeros(kernel.shape) for kernel in kernels]
        for _ in range(3):
            for k, gradient in enumerate(session.run(gradients, feed)):
                slots[k] = 0.8 * slots[k] + gradient
                u, singular, v = np.linalg.svd((gradient + 0.8 * slots[k]).reshape(-1, gradient.shape[-1]), False)
                singular /= np.sqrt((singular ** 2).sum())
                for _ in range(5):
                    singular = 3.4445 * singular - 4.775 * singular ** 3 + 2.0315 * singular ** 5
                step = (u * singular).dot(v).reshape(gradient.shape)
                # Half the highest rate: half of 0.03; and L2 as momentum 0.8 would have it, 5 times the rate.
                values[k] = values[k] * (1 - 0.1 * 0.01 * 5) - 0.015 * step
            session.run(net.train_step, feed)
            for value, now in zip(values, session.run(kernels)):
                np.testing.assert_allclose(value, now, atol=2e-4)
            values = session.run(kernels)
        assert len(kernels) == 7 and session.run(net.global_step) == 3


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
