"""The peers of benchmark.py: the same network in other programs, and what they train on and evaluate.

A program is a function of a preset, of random images and labels, and of a folder in which `ours` has left its weights.
It returns {measurement: action}: a training step; an evaluation, which returns the mean cross entropy of the first
EVALUATED images; a matrix product.
"""
import concurrent.futures
import os
import subprocess
import sys

import numpy as np

import data_helpers
from data_helpers import PROJECT_DIR, InputError

EVALUATED = 2000      # images, of an evaluation
COMPILED_BATCH = 125  # images, of an evaluation by PyTorch and JAX: their fastest
EXPORTED_BATCH = 20   # images, of an evaluation by ONNX Runtime and OpenVINO: their fastest
MATRIX = 2048         # rows and columns of the matrices of a product
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
WEIGHTS = 'weights.npz'  # in the folder: what ours starts from
TRAINED = 'network'      # in the folder: ours after its first step, exported


# ------------------------------------------------------------------------------ two that are not the same

def numpy(preset, images, labels, folder):
    """A matrix product alone."""
    if preset.mixed_precision:
        raise InputError('its matrix product is of 32 bits')
    matrix = np.random.RandomState(0).rand(MATRIX, MATRIX).astype(np.float32)
    return dict(product=lambda: matrix.dot(matrix))


def study(preset, images, labels, folder):
    """Training as in the 2020 study: layers of single operations, images augmented one by one, lists of float64 fed."""
    import resnet
    from resnet import tf

    class StudyResNet(resnet.ResNet):
        def _activation(self, x, name, training):
            with tf.variable_scope(name):
                beta, gamma, *moving = self._statistics(x.shape[-1].value)
            batch = tf.nn.moments(x, [0, 1, 2])
            if training:
                self._batch_statistics += zip(moving, batch)
            x = tf.nn.batch_normalization(x, *batch, offset=beta, scale=gamma, variance_epsilon=resnet.BN_EPSILON)
            return tf.where(tf.less(x, 0.0), self.preset.relu_leakiness * x, x)

    resnet.KERNELS = None  # plain convolutions, whatever the machine
    preset.update(dict(mixed_precision=False))
    net = StudyResNet(preset)
    session = tf.Session(config=tf.ConfigProto(allow_soft_placement=True))
    session.run(tf.global_variables_initializer())
    scaled = images[:10000] / 127.5 - 1  # float64, as the study kept all of them
    random = np.random.RandomState(0)

    def augmented(image):
        image = np.pad(image[:, ::random.choice((1, -1))], ((4, 4), (4, 4), (0, 0)), mode='constant')
        row, column = random.randint(0, 9, 2)
        return image[row:row + 32, column:column + 32]

    def train():
        chosen = random.randint(0, len(scaled), preset.batch_size)
        x = [augmented(scaled[k]) if preset.data_augmentation else scaled[k] for k in chosen]
        y = [np.eye(preset.num_classes)[labels[k]] for k in chosen]
        session.run([net.train_step, net.training_loss, net.training_accuracy],
                    {net.X: x, net.Y: y, net.learning_rate: preset.lr})

    return dict(training=train)


# ------------------------------------------------------------------------------ what the others share

def units(preset):
    """Channels into and out of each residual unit. Where they grow it halves height and width."""
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        yield inputs, outputs
        yield from [(outputs, outputs)] * (preset.num_residual_units - 1)


def network(preset, x, convolution, activation, match, head):
    """Logits, by the layers of a library; each of them takes its weights from the next of starting_weights."""
    x = convolution(x, stride=1)
    for k, (inputs, outputs) in enumerate(units(preset)):
        y = activation(x)
        shortcut = y if k == 0 else x
        y = convolution(activation(convolution(y, stride=1)), stride=outputs // inputs)
        x = y + (match(shortcut, (outputs - inputs) // 2) if outputs > inputs else shortcut)
    return head(activation(x))


def training_gflop(preset):
    """Of a training step, an image: three times the forward products, for there are two gradients of each."""
    products, area = 32 ** 2 * 9 * 3 * 16 + 64 * preset.num_classes, 32 ** 2
    for inputs, outputs in units(preset):
        products += area * 9 * inputs * outputs
        area //= (outputs // inputs) ** 2  # the stride sits on the second convolution
        products += area * 9 * outputs * outputs
    return 3 * 2 * products / 1e9


def starting_weights(folder):
    """What ours started from, layer by layer: {kind of variable: list of float32 arrays}."""
    with np.load(os.path.join(folder, WEIGHTS)) as variables:
        return {kind: [variables[name] for name in variables.files if name.endswith('/' + kind)]
                for kind in ('DW', 'biases', 'gamma', 'beta', 'moving_mean', 'moving_variance')}


def full_batches(images, labels, preset):
    """The scripts' input, without an epoch's last batch, which is smaller and would be compiled anew."""
    batches = data_helpers.training_batches(images, labels, preset)
    return data_helpers.in_background((x, y) for x, y in batches if len(y) == preset.batch_size)


def parts(images, labels, size):
    """Batches of an evaluation: uint8 and int64."""
    return ((images[k:k + size], labels[k:k + size]) for k in range(0, EVALUATED, size))


def scaled_parts(images, labels, preset):
    """The same for PyTorch and JAX: float32, as they are trained on."""
    for x, y in parts(images, labels, COMPILED_BATCH):
        yield data_helpers.scale(x), data_helpers.one_hot(y, preset.num_classes)


# ------------------------------------------------------------------------------ training and evaluation

def torch_logits(preset, weights, x, training):
    """The network in PyTorch, of weights whose kernels have its layout; training moves the statistics."""
    from torch.nn import functional
    kernels = iter(weights['DW'])
    normalizations = zip(*[weights[kind] for kind in ('moving_mean', 'moving_variance', 'gamma', 'beta')])

    def convolution(x, stride):
        return functional.conv2d(x, next(kernels), stride=stride, padding=1)

    def activation(x):
        x = functional.batch_norm(x, *next(normalizations), training, momentum=0.1, eps=0.001)
        return functional.leaky_relu(x, preset.relu_leakiness)

    def match(x, missing):
        return functional.pad(functional.avg_pool2d(x, 2), (0, 0, 0, 0, missing, missing))

    def head(x):
        return functional.linear(x.mean((2, 3)), next(kernels), weights['biases'][0])

    return network(preset, x, convolution, activation, match, head)


def torch_kernel(kernel):
    """A kernel of TensorFlow's layout in PyTorch's; those of convolutions turned by 180 degrees, and channels last.

    Where the stride is 2, TensorFlow's SAME pads below and on the right, PyTorch's padding above and on the left. With
    images and kernels turned that is the same, and it costs nothing.
    """
    import torch
    kernel = kernel.movedim((-1, -2), (0, 1))
    return kernel.flip(2, 3).contiguous(memory_format=torch.channels_last) if kernel.ndim == 4 else kernel.contiguous()


def torch(preset, images, labels, folder):
    """PyTorch: forward and backward compiled, channels last, in autocast where the preset trains in 16 bits."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(CORES)
    weights = {kind: [torch.from_numpy(array) for array in arrays] for kind, arrays in starting_weights(folder).items()}
    weights['DW'] = [torch_kernel(kernel) for kernel in weights['DW']]
    others = weights['biases'] + weights['gamma'] + weights['beta']
    for parameter in weights['DW'] + others:
        parameter.requires_grad_()
    optimizer = torch.optim.SGD([dict(params=weights['DW'], weight_decay=preset.l2_reg_lambda), dict(params=others)],
                                lr=preset.lr, momentum=preset.momentum, fused=True)
    batches = full_batches(images, labels, preset)
    matrix = torch.rand(MATRIX, MATRIX).to(torch.bfloat16 if preset.mixed_precision else torch.float32)

    @torch.compile(dynamic=False)
    def loss_and_accuracy(x, y, training):
        with torch.autocast('cpu', torch.bfloat16, enabled=preset.mixed_precision):
            x = x.flip(1, 2).permute(0, 3, 1, 2)  # turned as the kernels are; channels last
            logits = torch_logits(preset, weights, x, training).float()
        return functional.cross_entropy(logits, y), (logits.argmax(1) == y.argmax(1)).float().mean()

    def train():
        x, y = next(batches)
        loss, accuracy = loss_and_accuracy(torch.from_numpy(x), torch.from_numpy(y), training=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item(), accuracy.item()

    def test():
        with torch.no_grad():
            return np.mean([loss_and_accuracy(torch.from_numpy(x), torch.from_numpy(y), training=False)[0].item()
                            for x, y in scaled_parts(images, labels, preset)])

    return dict(training=train, evaluation=test, product=lambda: matrix @ matrix)


def jax_logits(preset, weights, statistics, x, training):
    """The network in JAX: logits, and the means and variances that it normalized with."""
    from jax import lax, nn, numpy as jnp
    kernels, used = iter(weights['DW']), []
    normalizations = zip(weights['gamma'], weights['beta'], statistics)

    def convolution(x, stride):
        return lax.conv_general_dilated(x, next(kernels).astype(x.dtype), (stride, stride), 'SAME',
                                        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    def activation(x):
        gamma, beta, (mean, variance) = next(normalizations)
        if training:
            mean, variance = x.mean((0, 1, 2), jnp.float32), x.var((0, 1, 2), jnp.float32)
        used.append((mean, variance))
        scale = gamma * lax.rsqrt(variance + 0.001)
        return nn.leaky_relu(x * scale + (beta - mean * scale), preset.relu_leakiness).astype(x.dtype)

    def match(x, missing):
        n, height, width, channels = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing, missing)))

    def head(x):
        return x.mean((1, 2), jnp.float32) @ next(kernels) + weights['biases'][0]

    return network(preset, x, convolution, activation, match, head), used


def jax(preset, images, labels, folder):
    """JAX: a step, its optimizer included, compiled as a whole, with its state donated."""
    import jax
    from jax import nn, numpy as jnp

    kind = jnp.bfloat16 if preset.mixed_precision else jnp.float32
    weights = jax.tree.map(jnp.array, starting_weights(folder))
    statistics = list(zip(weights.pop('moving_mean'), weights.pop('moving_variance')))
    state = weights, jax.tree.map(jnp.zeros_like, weights), statistics
    batches = full_batches(images, labels, preset)
    matrix = jnp.array(np.random.RandomState(0).rand(MATRIX, MATRIX), kind)
    product = jax.jit(jnp.matmul)

    def losses(weights, statistics, x, y, training):
        logits, statistics = jax_logits(preset, weights, statistics, x.astype(kind), training)
        cross_entropy = -(nn.log_softmax(logits) * y).sum(1).mean()
        accuracy = (logits.argmax(1) == y.argmax(1)).mean()
        l2 = sum((kernel ** 2).sum() for kernel in weights['DW']) / 2
        return cross_entropy + preset.l2_reg_lambda * l2, (cross_entropy, accuracy, statistics)

    def step(state, x, y):
        weights, momenta, statistics = state
        gradients, (loss, accuracy, used) = jax.grad(losses, has_aux=True)(weights, statistics, x, y, training=True)
        momenta = jax.tree.map(lambda momentum, gradient: preset.momentum * momentum + gradient, momenta, gradients)
        weights = jax.tree.map(lambda weight, momentum: weight - preset.lr * momentum, weights, momenta)
        statistics = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, statistics, used)
        return (weights, momenta, statistics), loss, accuracy

    compiled_step = jax.jit(step, donate_argnums=0)
    compiled_test = jax.jit(lambda weights, statistics, x, y: losses(weights, statistics, x, y, training=False)[1][:2])

    def train():
        nonlocal state
        state, loss, accuracy = compiled_step(state, *next(batches))
        float(loss), float(accuracy)

    def test():
        weights, _, statistics = state
        return np.mean([float(compiled_test(weights, statistics, x, y)[0])
                        for x, y in scaled_parts(images, labels, preset)])

    return dict(training=train, evaluation=test, product=lambda: product(matrix, matrix).block_until_ready())


# ------------------------------------------------------------------------------ evaluation

def exported(folder):
    """The path of the network in ONNX, as ours saved it after its first step."""
    network = os.path.join(folder, TRAINED)
    if not os.path.exists(network):
        export = [sys.executable, os.path.join(PROJECT_DIR, 'resnet_eval.py'), '--timestamp', '--output_dir', folder,
                  '--export', network, '--format', 'onnx']
        done = subprocess.run(export, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode:
            raise InputError(done.stderr.strip().splitlines()[-1])
    return os.path.join(network, 'model.onnx')


def cross_entropy(probabilities, labels):
    return -np.log(probabilities[np.arange(len(labels)), labels] + 1e-9).mean()


def onnxruntime(preset, images, labels, folder):
    """A batch a core, which is faster than a batch on all cores."""
    from onnxruntime import InferenceSession, SessionOptions
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(exported(folder), options, providers=['CPUExecutionProvider'])
    pool = concurrent.futures.ThreadPoolExecutor(CORES)

    def loss(batch):
        probabilities, _ = session.run(['probabilities', 'classes'], {'images': batch[0]})
        return cross_entropy(probabilities, batch[1])

    return dict(evaluation=lambda: np.mean(list(pool.map(loss, parts(images, labels, EXPORTED_BATCH)))))


def openvino(preset, images, labels, folder):
    """As many batches at once as it chooses, and with --mixed_precision as many bits."""
    import openvino
    properties = {'INFERENCE_NUM_THREADS': CORES, 'PERFORMANCE_HINT': 'THROUGHPUT'}
    if not preset.mixed_precision:
        properties['INFERENCE_PRECISION_HINT'] = 'f32'
    core = openvino.Core()
    model = core.read_model(exported(folder))
    model.reshape([EXPORTED_BATCH, 32, 32, 3])
    queue = openvino.AsyncInferQueue(core.compile_model(model, 'CPU', properties))
    losses = []
    queue.set_callback(lambda request, y: losses.append(cross_entropy(request.get_tensor('probabilities').data, y)))

    def test():
        losses.clear()
        for x, y in parts(images, labels, EXPORTED_BATCH):
            queue.start_async({'images': x}, y)
        queue.wait_all()
        return np.mean(losses)

    return dict(evaluation=test)
