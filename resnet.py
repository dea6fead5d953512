"""Pre-activation ResNet for 32x32 images, built as a TensorFlow 1.x graph on either stack.

He et al. 2015 (arXiv:1512.03385, section 4.2: depth 6n + 2, 16/32/64 filters, identity shortcuts)
with the pre-activation units of He et al. 2016 (arXiv:1603.05027). Departures, all of the 2020
original: leaky ReLU, plain at slope 0; the stride of a group's first unit sits on its second convolution;
shortcuts are average-pooled; the L2 loss covers the kernels alone.

    with tf.Graph().as_default():
        net = ResNet(make_preset(4))      # placeholders X, Y; logit/predictions; accuracy/accuracy
"""
import contextlib
import math
import os
import re
import sys
import warnings
import zlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')   # TensorFlow's own noise, fatal errors apart
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')  # off by default where there is only AVX2: twice the time


@contextlib.contextmanager
def _silence():
    """Nothing on stderr: TensorFlow 2.20 and 2.21 write there on import and in the first run, at any log level."""
    if sys.stderr is None:  # closed by who started this
        yield
        return
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # 1.15 on NumPy 1.17 to 1.19: FutureWarnings about dtypes
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _silence():
    import tensorflow.compat.v1 as tf
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()


def _kernels():
    """Whose kernels do the convolutions here: 'GPU', 'oneDNN', 'MKL' (its forerunner), or 'Eigen', TensorFlow's own."""
    if tf.config.experimental.list_physical_devices('GPU'):
        return 'GPU'
    if tf.__version__.startswith('1.'):
        from tensorflow.python.pywrap_tensorflow import IsMklEnabled
        return 'MKL' if IsMklEnabled() else 'Eigen'
    return 'oneDNN' if os.environ['TF_ENABLE_ONEDNN_OPTS'] == '1' else 'Eigen'


with _silence():
    KERNELS = _kernels()
if KERNELS == 'GPU':  # the same seed, the same result, which processors give anyway; read when kernels are chosen
    os.environ.setdefault('TF_DETERMINISTIC_OPS', '1')    # by TensorFlow 2
    os.environ.setdefault('TF_CUDNN_DETERMINISTIC', '1')  # by 1.15
with _silence(), tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={'GPU': 0})) as _session:
    _session.run(tf.constant(0))  # the first run, without touching a GPU
FILTERS = (16, 16, 32, 64)  # first convolution, then the three groups
KERNEL = 3                  # height and width of every convolution
BN_EPSILON = 0.001
BN_MOMENTUM = 0.9
LOSS_SCALE = 128            # keeps small gradients out of float16's last bits under mixed precision


def half_precision():
    """The type of 16 bits that this machine computes in faster than in 32, or None: for `mixed_precision`."""
    if KERNELS == 'GPU':
        from tensorflow.python.client import device_lib
        config = tf.ConfigProto()
        config.gpu_options.allow_growth = True
        capabilities = re.findall(r'compute capability: (\d+)', ' '.join(
            device.physical_device_desc for device in device_lib.list_local_devices(config)))
        return tf.float16 if capabilities and min(map(int, capabilities)) >= 7 else None  # 7: tensor cores
    try:
        with open('/proc/cpuinfo') as file:
            fast = KERNELS == 'oneDNN' and re.search(r' (avx512_bf16|amx_bf16)\b', file.read())
    except OSError:
        fast = False
    return tf.bfloat16 if fast else None


class ResNet:
    """The network of a preset: an inference form and, for training, a second form on the same variables.

    X            float32 [N, 32, 32, 3] in [-1, 1], placeholder
    Y            float32 [N, num_classes], one-hot, placeholder
    logits       float32 [N, num_classes]
    probabilities  float32 [N, num_classes], softmax of the logits
    predictions  int64 [N], the likeliest class
    loss         float32 [], mean cross entropy + l2_reg_lambda * L2 loss of every kernel
    accuracy     float32 [], 0 to 1

    These normalize with the moving statistics, so an image's prediction does not depend on its
    neighbours in the batch. With `training`, the same quantities under the batch's own statistics,
    and what changes the variables:

    training_X       X or, where the preset trains at low resolution first, float32 [N, S, S, 3], placeholder
    training_loss, training_accuracy  float32 []; the loss by smoothed labels
    learning_rate    float32 [], placeholder
    global_step      int64 [], variable: training steps done
    train_step       one step of SGD with (Nesterov) momentum, or of Muon; it also moves the statistics
    finite           bool [], no variable holds an infinity or what is no number
    refresh_statistics(session, batches)
    """

    def __init__(self, preset, training=True):
        self.preset = preset
        self.X = tf.placeholder(tf.float32, [None, 32, 32, 3], name='X')
        self.Y = tf.placeholder(tf.float32, [None, preset.num_classes], name='Y')
        self._moves = []  # assignments to the moving statistics
        self.logits = self._network(self.X, training=False)
        with tf.name_scope('logit/'):
            self.predictions = tf.argmax(self.logits, 1, name='predictions')
            self.probabilities = tf.nn.softmax(self.logits, name='probabilities')
        self.loss, self.accuracy = self._loss_and_accuracy(self.logits)
        if training:
            self._build_training()

    def _build_training(self):
        self.global_step = tf.train.get_or_create_global_step()
        with tf.name_scope('training'):
            self.training_X = self.X
            if self.preset.low_resolution_epochs:
                self.training_X = tf.placeholder(tf.float32, [None, None, None, 3], name='X')
            self.learning_rate = tf.placeholder(tf.float32, [], name='learning_rate')
            self._statistics_momentum = tf.placeholder_with_default(BN_MOMENTUM, [], name='statistics_momentum')
            logits = self._network(self.training_X, training=True)
            self.training_loss, self.training_accuracy = self._loss_and_accuracy(logits, self.preset.label_smoothing)
            self._move_statistics = tf.group(*self._moves)
            if self.preset.muon_lr:
                optimizer = Muon(self.preset, self.learning_rate)
            else:
                optimizer = tf.train.MomentumOptimizer(self.learning_rate, self.preset.momentum,
                                                       use_nesterov=self.preset.nesterov)
            if self.preset.mixed_precision:
                gradients = [(gradient / LOSS_SCALE, variable) for gradient, variable in
                             optimizer.compute_gradients(self.training_loss * LOSS_SCALE)]
            else:
                gradients = optimizer.compute_gradients(self.training_loss)
            with tf.control_dependencies(self._moves):
                self.train_step = optimizer.apply_gradients(gradients, self.global_step)
            self.finite = tf.reduce_all([tf.reduce_all(tf.is_finite(variable)) for variable in tf.global_variables()
                                         if variable.dtype.base_dtype == tf.float32])

    def refresh_statistics(self, session, batches):
        """Sets the moving statistics to their plain average over `batches` of images, at the weights as they are.

        Moving averages lag behind weights that still change fast: on the 2020 study's preset 2 they
        cost 4.6 points of test accuracy. Do this before the network is judged or saved.
        """
        for k, images in enumerate(batches):
            session.run(self._move_statistics, {self.training_X: images, self._statistics_momentum: k / (k + 1)})

    def count_parameters(self):
        """Trainable numbers: kernels, gammas, betas and the last layer's biases."""
        return sum(variable.shape.num_elements() for variable in tf.trainable_variables())

    # -------------------------------------------------------------------------- the table

    def _network(self, x, training):
        """X [N, 32, 32, 3] to logits [N, num_classes]."""
        if training and self.preset.mixed_precision:
            x = tf.cast(x, half_precision())
        with tf.variable_scope('init', reuse=training):
            x = _convolution(x, self._kernel('init_conv', x, FILTERS[0]))          # [N, 32, 32, 16]
        for group in (1, 2, 3):
            for i in range(self.preset.num_residual_units):
                stride = 2 if group > 1 and i == 0 else 1                          # [N, 16, 16, 32] from unit_2_0,
                with tf.variable_scope('unit_{}_{}'.format(group, i), reuse=training):  # [N, 8, 8, 64] from unit_3_0
                    x = self._unit(x, FILTERS[group], stride, training, activate_before_split=group == 1 and i == 0)
        with tf.variable_scope('unit_last', reuse=training):
            x = self._activation(x, 'final_bn', training)
        x = tf.reduce_mean(tf.cast(x, tf.float32), [1, 2])                         # [N, 64]
        with tf.variable_scope('logit', reuse=training):
            return self._fully_connected(x, self.preset.num_classes)               # [N, num_classes]

    def _unit(self, x, filters, stride, training, activate_before_split):
        """Two convolutions, each after its activation, plus the shortcut; the second one strides."""
        if activate_before_split:
            with tf.variable_scope('common_activation'):
                shortcut = x = self._activation(x, 'init_bn', training)
        else:
            shortcut = x
            with tf.variable_scope('residual_activation'):
                x = self._activation(x, 'init_bn', training)
        with tf.variable_scope('sub1'):
            kernel = self._kernel('conv1', x, filters)
        with tf.variable_scope('sub2'):
            if training:
                x = self._activation(_convolution(x, kernel), 'bn2', training)
            else:
                # The moving statistics only scale and shift, which the convolution does at no cost.
                with tf.variable_scope('bn2'):
                    scale, shift = _scale_and_shift(*self._statistics(filters))
                x = tf.nn.bias_add(_convolution(x, kernel * scale), shift)
                x = _leaky_relu(x, self.preset.relu_leakiness, training)
            x = _convolution(x, self._kernel('conv2', x, filters), stride)
        return x + _match(shortcut, filters, stride)

    # -------------------------------------------------------------------------- layers

    def _activation(self, x, name, training):
        """Batch normalization, then leaky ReLU; shape unchanged."""
        with tf.variable_scope(name):
            beta, gamma, mean, variance = self._statistics(x.shape[-1].value)
            if not training and KERNELS == 'oneDNN':  # fuses a convolution with what follows it, but not this
                scale, shift = _scale_and_shift(beta, gamma, mean, variance)
                scale = tf.reshape(scale, [1, 1, -1, 1])
                x = tf.nn.depthwise_conv2d_native(x, scale, strides=[1, 1, 1, 1], padding='SAME')
                x = tf.nn.bias_add(x, shift)
            elif not training:
                x = tf.nn.fused_batch_norm(x, gamma, beta, mean, variance, BN_EPSILON, is_training=False)[0]
            else:
                x, *batch = tf.nn.fused_batch_norm(x, gamma, beta, epsilon=BN_EPSILON, is_training=True)
                for moving, now in zip((mean, variance), batch):
                    momentum = self._statistics_momentum  # at 0 what was before leaves no trace, not even by rounding
                    self._moves.append(tf.assign(moving, moving * momentum + now * (1 - momentum)))
        return _leaky_relu(x, self.preset.relu_leakiness, training)

    def _statistics(self, channels):
        """A batch normalization's beta, gamma, moving mean and moving variance: variables float32 [channels]."""
        zeros, ones = tf.zeros_initializer(), tf.ones_initializer()
        return [tf.get_variable(name, [channels], initializer=initializer, trainable=trainable)
                for name, initializer, trainable in (('beta', zeros, True), ('gamma', ones, True),
                                                     ('moving_mean', zeros, False), ('moving_variance', ones, False))]

    def _kernel(self, name, x, filters):
        """The variable of a convolution of x: float32 [3, 3, channels of x, filters]."""
        with tf.variable_scope(name) as scope:
            deviation = math.sqrt(2 / (KERNEL * KERNEL * filters))
            return tf.get_variable('DW', [KERNEL, KERNEL, x.get_shape().as_list()[-1], filters],
                                   initializer=tf.random_normal_initializer(stddev=deviation, seed=self._seed(scope)))

    def _fully_connected(self, x, width):
        """Kernel uniform in +-sqrt(3 / inputs), which keeps the variance: uniform unit scaling, factor 1."""
        inputs = x.get_shape().as_list()[-1]
        limit = math.sqrt(3 / inputs)
        kernel = tf.get_variable('DW', [inputs, width], initializer=tf.random_uniform_initializer(
            -limit, limit, seed=self._seed(tf.get_variable_scope())))
        return tf.nn.xw_plus_b(x, kernel, tf.get_variable('biases', [width], initializer=tf.zeros_initializer()))

    def _seed(self, scope):
        """A kernel's seed depends on the run's seed and its name, not on what else is in the graph."""
        return zlib.crc32('{} {}'.format(self.preset.seed, scope.name).encode()) & 0x7fffffff

    # -------------------------------------------------------------------------- judgement

    def _loss_and_accuracy(self, logits, smoothing=0.0):
        with tf.name_scope('loss'):
            labels = self.Y * (1 - smoothing) + smoothing / self.preset.num_classes
            cross_entropy = tf.nn.softmax_cross_entropy_with_logits_v2(labels=labels, logits=logits)
            kernels = [variable for variable in tf.trainable_variables() if variable.op.name.endswith('/DW')]
            if self.preset.muon_lr:  # it decays those of the convolutions itself
                kernels = [tf.stop_gradient(kernel) if len(kernel.shape) == 4 else kernel for kernel in kernels]
            l2 = tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
            loss = tf.add(tf.reduce_mean(cross_entropy), self.preset.l2_reg_lambda * l2, name='loss')
        with tf.name_scope('accuracy'):
            hits = tf.equal(tf.argmax(logits, 1), tf.argmax(self.Y, 1))
            return loss, tf.reduce_mean(tf.cast(hits, tf.float32), name='accuracy')


class Muon(tf.train.MomentumOptimizer):
    """SGD with (Nesterov) momentum whose steps are made orthogonal where a convolution's kernel steps (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon).

    A kernel's step, as a matrix [KERNEL * KERNEL * inputs, filters], is replaced by the nearest matrix whose singular
    values are all about 1, so that rare directions are learned as fast as common ones. Its rate is muon_lr,
    in the course of the learning rate.

    The gradient must not hold the kernel's L2 loss, whose size would be lost. In its place the kernel shrinks as
    it does under SGD in the long run, where momentum multiplies the rate: by lr * l2_reg_lambda / (1 - momentum),
    which must be well below 1.
    """

    def __init__(self, preset, learning_rate):
        """From a preset's muon_lr, lr, momentum, nesterov, l2_reg_lambda; learning_rate is a float32 [] tensor."""
        super().__init__(learning_rate, preset.momentum, use_nesterov=preset.nesterov)
        self.preset, self.learning_rate = preset, learning_rate

    def _apply_dense(self, gradient, kernel):
        if len(kernel.shape) != 4:
            return super()._apply_dense(gradient, kernel)
        preset, slot = self.preset, self.get_slot(kernel, 'momentum')
        step = moved = tf.assign(slot, preset.momentum * slot + gradient)
        if preset.nesterov:
            step = gradient + preset.momentum * moved
        step = tf.transpose(_orthogonal(tf.transpose(tf.reshape(step, [-1, kernel.shape[-1].value]))))
        rate = self.learning_rate * preset.muon_lr / preset.lr
        decay = self.learning_rate * preset.l2_reg_lambda / (1 - preset.momentum)
        return tf.assign_sub(kernel, rate * tf.reshape(step, kernel.shape) + decay * kernel).op


def _orthogonal(x):
    """float32 [m, n], m <= n, with the same singular vectors, and singular values of 0.7 to 1.2 (small ones less).

    Five rounds of Newton and Schulz's iteration, with the coefficients of Jordan et al.: products alone.
    """
    x /= tf.norm(x) + 1e-7
    for _ in range(5):
        square = tf.matmul(x, x, transpose_b=True)
        x = 3.4445 * x + tf.matmul(2.0315 * tf.matmul(square, square) - 4.775 * square, x)
    return x


def _match(shortcut, filters, stride):
    """The shortcut in the shape of a unit's output: 2x2 average pooling, zero channels on both sides."""
    missing = filters - shortcut.shape[-1].value
    if stride > 1:
        shortcut = tf.nn.avg_pool(shortcut, [1, stride, stride, 1], [1, stride, stride, 1], 'VALID')
    if missing:
        shortcut = tf.pad(shortcut, [[0, 0], [0, 0], [0, 0], [missing // 2, missing - missing // 2]])
    return shortcut


def _scale_and_shift(beta, gamma, mean, variance):
    """Batch normalization at fixed statistics, as a factor and a summand."""
    scale = gamma * tf.rsqrt(variance + BN_EPSILON)
    return scale, beta - mean * scale


def _convolution(x, kernel, stride=1):
    """3x3, SAME, no bias."""
    kernel = tf.cast(kernel, x.dtype)
    if KERNELS == 'Eigen' and stride == 1:
        return _with_gradients_by_convolution(x, tf.identity(kernel))
    return tf.nn.conv2d(x, kernel, strides=[1, stride, stride, 1], padding='SAME')


@tf.custom_gradient
def _with_gradients_by_convolution(x, kernel):
    """3x3, SAME, stride 1. Eigen's own code for its gradients takes up to four times (by x) and twice (by the kernel)
    as long as the same done as convolutions."""
    def gradient(dy):
        turned = tf.transpose(tf.reverse(kernel, [0, 1]), [0, 1, 3, 2])
        by_x = tf.nn.conv2d(dy, turned, strides=1, padding='SAME')
        # Of x with dy: images and channels change places, and dy is the kernel.
        padded = tf.pad(tf.transpose(x, [3, 1, 2, 0]), [[0, 0], [KERNEL // 2] * 2, [KERNEL // 2] * 2, [0, 0]])
        by_kernel = tf.nn.conv2d(padded, tf.transpose(dy, [1, 2, 0, 3]), strides=1, padding='VALID')
        return by_x, tf.reshape(tf.transpose(by_kernel, [1, 2, 0, 3]), kernel.shape)
    return tf.nn.conv2d(x, kernel, strides=1, padding='SAME'), gradient


def _leaky_relu(x, slope, training):
    if not slope:
        return tf.nn.relu(x)
    if not training:
        return tf.nn.leaky_relu(x, slope)

    @tf.custom_gradient
    def trained(x):
        """Its gradient looks at the output, which has the input's sign: the input need not be kept."""
        y = tf.nn.leaky_relu(x, slope)
        return y, lambda dy: tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=slope)
    return trained(x)
