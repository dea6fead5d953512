"""Pre-activation ResNet for 32x32 images, built as a TensorFlow 1.x graph on either stack.

He et al. 2015 (arXiv:1512.03385, section 4.2: depth 6n + 2, 16/32/64 filters, identity shortcuts)
with the pre-activation units of He et al. 2016 (arXiv:1603.05027). Departures, all of the 2020
original: leaky ReLU, plain at slope 0; the stride of a group's first unit sits on its second convolution;
shortcuts are average-pooled; the L2 loss covers the kernels alone.

    with tf.Graph().as_default():
        net = ResNet(make_preset(4))      # placeholders X, Y; logit/predictions; accuracy/accuracy
        with make_session(net.preset) as session:
            session.run(tf.global_variables_initializer())
            loss, predictions = evaluate(net, session, images, labels)

`import resnet` starts TensorFlow, see _start_tensorflow, and raises InputError where it cannot.
"""
import concurrent.futures
import contextlib
import functools
import gc
import importlib.util
import math
import os
import platform
import re
import socket
import subprocess
import sys
import warnings
import zlib

import numpy as np

import data_helpers
from data_helpers import InputError

# ------------------------------------------------------------------------------ start

LISTENER = r"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program
said, heading = b'', b'TensorFlow did not start; it needs a processor with AVX. What it wrote:\n'
for line in sys.stdin.buffer:
    if line == b'\1\n':
        heading = b'What TensorFlow wrote:\n'
    if line == b'\0\n' or line == b'\1\n' and not said.strip():
        sys.exit()
    said += line
sys.stderr.buffer.write(heading + (said.strip(b'\1\n') or b'(nothing)') + b'\n')
"""
NOTHING_TO_SHOW, FAILED = b'\n\0\n', b'\n\1\n'  # what the listener hears last, save where TensorFlow ends the process
LISTENER_PATIENCE = 5      # seconds, for the listener to end


def _start_tensorflow():
    """What `import resnet` does to the process, in the order that TensorFlow needs.

    Returns the module tensorflow.compat.v1 and whose kernels do the convolutions, see _kernels.
    Raises InputError where TensorFlow is missing or does not start.
    """
    _check_installed()
    _set_environment()  # read by TensorFlow on import
    with _silenced(), _kept_for_good():
        tf = _import()
        kernels = _kernels(tf)
        if kernels == 'GPU':
            _make_deterministic()  # before a kernel is chosen
        _run_once(tf)
    return tf, kernels


def _check_installed():
    """Raises InputError where there is no TensorFlow."""
    if importlib.util.find_spec('tensorflow'):
        return
    version = sys.version_info[:2]
    if version == (3, 7) or (3, 10) <= version <= (3, 13):
        raise InputError('TensorFlow is missing: pip install -r requirements.txt')
    raise InputError(f'TensorFlow is missing, and Python {version[0]}.{version[1]} has none in range: pip install '
                     '-r requirements.txt with Python 3.7, or 3.10 to 3.13')


def _set_environment():
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')   # only what ends the process
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')  # off by default where there is only AVX2: twice the time
    os.environ.setdefault('GRPC_VERBOSITY', 'NONE')      # a cluster's connections come and go


@contextlib.contextmanager
def _silenced():
    """Keeps the console free of what TensorFlow 2.20 and 2.21 write to stderr as they start, at any log level.

    What they write goes to another process, which prints it where the start fails, and also where TensorFlow ends
    this process, as it does on a processor without AVX.
    """
    listener = _start_listener()
    if listener is None:
        yield
        return
    sys.stderr.flush()
    console = os.dup(2)
    os.dup2(listener.stdin.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # 1.15 on NumPy 1.17 to 1.19: FutureWarnings about dtypes
            yield
        os.write(2, NOTHING_TO_SHOW)
    except KeyboardInterrupt:
        os.write(2, NOTHING_TO_SHOW)
        raise
    except Exception:  # which says why
        os.write(2, FAILED)
        raise
    finally:
        os.dup2(console, 2)
        os.close(console)
        listener.stdin.close()  # where there is something to show, it is shown before this process goes on
        with contextlib.suppress(subprocess.TimeoutExpired):
            listener.wait(LISTENER_PATIENCE)


@contextlib.contextmanager
def _kept_for_good():
    """Takes the half a million objects that TensorFlow's import makes from the garbage collector.

    They live as long as the process: to go through them again and again took a quarter of the time in which a graph
    is built, and a second at exit.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _start_listener():
    """A process that runs LISTENER, or None where there is no stderr or no such process can be had."""
    if sys.stderr is None or not sys.executable:
        return None
    try:
        os.fstat(2)
        return subprocess.Popen([sys.executable, '-I', '-S', '-c', LISTENER],
                                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError:
        return None


def _import():
    """The module tensorflow.compat.v1, in graph mode."""
    try:
        with _keras_left_out():
            import tensorflow.compat.v1 as tf
        tf.logging.set_verbosity(tf.logging.ERROR)
        tf.disable_v2_behavior()
        return tf
    except Exception as error:  # ImportError for a library, TypeError for a protobuf, AttributeError for a NumPy
        # TensorFlow wraps the ImportError of a library into one that shows a traceback and links.
        cause = error.__context__ if isinstance(error.__context__, ImportError) else error
        raise InputError(f'TensorFlow cannot be imported ({type(cause).__name__}: {reason(cause)}); versions that fit '
                         'together come with: pip install -r requirements.txt')


@contextlib.contextmanager
def _keras_left_out():
    """Keeps TensorFlow 2's import from importing Keras, and by it matplotlib: a quarter of its time.

    TensorFlow asks for it last of all, and does without where it gets an ImportError. Who uses tf.keras still gets it.
    """
    name = 'keras.src.optimizers'  # what TensorFlow asks for
    sys.modules.setdefault(name, None)
    try:
        yield
    finally:
        if sys.modules[name] is None:
            del sys.modules[name]


def _kernels(tf):
    """Whose kernels do the convolutions here: 'GPU', 'oneDNN', 'MKL' (its forerunner), or 'Eigen', TensorFlow's own."""
    if tf.config.experimental.list_physical_devices('GPU'):
        return 'GPU'
    if tf.__version__.startswith('1.'):
        from tensorflow.python.pywrap_tensorflow import IsMklEnabled
        return 'MKL' if IsMklEnabled() else 'Eigen'
    return 'oneDNN' if os.environ['TF_ENABLE_ONEDNN_OPTS'] == '1' else 'Eigen'


def _make_deterministic():
    """The same seed, the same result on a GPU too; processors give that anyway."""
    from tensorflow import config  # compat.v1 has no enable_op_determinism
    if hasattr(config.experimental, 'enable_op_determinism'):
        config.experimental.enable_op_determinism()
    else:  # 1.15
        os.environ.setdefault('TF_DETERMINISTIC_OPS', '1')
        os.environ.setdefault('TF_CUDNN_DETERMINISTIC', '1')


def _run_once(tf):
    """The first run of a process, without a GPU: it writes to stderr too."""
    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={'GPU': 0})) as session:
        session.run(tf.constant(0))


def reason(error):
    """What an error of TensorFlow says, in one line: without where in the graph, and without what led to it."""
    text = str(error).split('\n\t [[')[0].strip()
    return text.splitlines()[-1].strip() if text else type(error).__name__


tf, KERNELS = _start_tensorflow()

# ------------------------------------------------------------------------------ hardware

def half_precision():
    """The type of 16 bits that this machine computes in faster than in 32, or None: for `mixed_precision`."""
    if KERNELS == 'GPU':
        from tensorflow.python.client import device_lib
        config = tf.ConfigProto()
        config.gpu_options.allow_growth = True
        descriptions = ' '.join(device.physical_device_desc for device in device_lib.list_local_devices(config))
        capabilities = [int(major) for major in re.findall(r'compute capability: (\d+)', descriptions)]
        return tf.float16 if capabilities and min(capabilities) >= 7 else None  # 7: tensor cores
    fast = KERNELS == 'oneDNN' and re.search(r' (avx512_bf16|amx_bf16)\b', _cpuinfo())
    return tf.bfloat16 if fast else None


def count_gpus():
    """The GPUs that TensorFlow sees on this machine."""
    return len(tf.config.experimental.list_physical_devices('GPU'))


def device_name(session):
    """What computes: '2 x Tesla T4', or 'CPU: ' with the processor's name and the cores that this process may use.

    Of a cluster it names what the chief computes on, and says how many tasks there are.
    """
    devices = session.list_devices()
    tasks = sorted({device.name.partition('/device:')[0] for device in devices})
    name = _machine_name(sum(device.device_type == 'GPU' and device.name.startswith(f'{tasks[0]}/')
                             for device in devices))
    return name if len(tasks) == 1 else f'{len(tasks)} tasks, the chief on {name}'


def _machine_name(gpus):
    if gpus:
        return f'{gpus} x {_gpu_name()}'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    match = re.search(r'model name\s*: (.*)', _cpuinfo())
    processor = match.group(1) if match else platform.processor() or platform.machine()
    return f'CPU: {processor}, 1 core' if cores == 1 else f'CPU: {processor}, {cores} cores'


def _gpu_name():
    """The first GPU's name, or 'GPU' where the driver's tool does not tell."""
    try:
        query = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
        return subprocess.check_output(query, universal_newlines=True).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return 'GPU'


def _cpuinfo():
    """What Linux says of the processor; empty elsewhere."""
    try:
        with open('/proc/cpuinfo') as file:
            return file.read()
    except OSError:
        return ''


# ------------------------------------------------------------------------------ network

FILTERS = (16, 16, 32, 64)  # first convolution, then the three groups
KERNEL = 3                  # height and width of every convolution
BN_EPSILON = 0.001
BN_MOMENTUM = 0.9


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
    training_loss, training_accuracy  float32 []; the loss by smoothed labels, of the variables before the step;
                     a preset's towers compute them by parts of the batch, each normalized by its own statistics
    learning_rate    float32 [], placeholder
    global_step      int64 [], variable: training steps done, the skipped ones too
    train_step       one step of SGD with (Nesterov) momentum, or of Muon; it also moves the statistics
    skipped          bool [], the step's gradients were beyond float16, and nothing moved but the global step and the
                     loss scale: training_loss may then be infinite or not a number, and this is no divergence
    finite           bool [], no variable holds an infinity or what is not a number
    refresh_statistics(session, batches)
    """

    def __init__(self, preset, training=True, devices=None):
        """`devices` are names of devices, one a tower, the first where the variables are; by default this machine's."""
        self.preset = preset
        self.X = tf.placeholder(tf.float32, [None, 32, 32, 3], name='X')
        self.Y = tf.placeholder(tf.float32, [None, preset.num_classes], name='Y')
        self._batch_statistics = []  # (moving statistic, a variable; that of the training batch)
        self.logits = self._network(self.X, training=False)
        with tf.name_scope('logit/'):
            self.predictions = tf.argmax(self.logits, 1, name='predictions')
            self.probabilities = tf.nn.softmax(self.logits, name='probabilities')
        self.loss, self.accuracy = self._loss_and_accuracy(self.logits)
        if training:
            self._build_training(devices or tower_devices(preset.towers))

    def _build_training(self, devices):
        self.global_step = tf.train.get_or_create_global_step()
        with tf.name_scope('training'):
            self.training_X = self.X
            if self.preset.low_resolution_epochs:
                self.training_X = tf.placeholder(tf.float32, [None, None, None, 3], name='X')
            self.learning_rate = tf.placeholder(tf.float32, [], name='learning_rate')
            self._statistics_momentum = tf.placeholder_with_default(BN_MOMENTUM, [], name='statistics_momentum')
            half = half_precision() if self.preset.mixed_precision else None
            self._training_type = half or tf.float32
            if self.preset.towers == 1:
                logits = self._network(self.training_X, training=True)
                self.training_loss, self.training_accuracy = self._loss_and_accuracy(
                    logits, self.preset.label_smoothing)
                self._refreshing_X, self._refresh = self.training_X, self._statistics_moves()
                self._move_statistics = self._refresh
            else:
                self._build_towers(devices)
            optimizer = self._optimizer()
            if self._training_type == tf.float16:
                self.train_step, self.skipped = self._step_within_float16(optimizer)
            else:
                self.train_step, self.skipped = self._step(optimizer), tf.constant(False)
            self.finite = _all_finite(variable for variable in tf.global_variables()
                                      if variable.dtype.base_dtype == tf.float32)

    def refresh_statistics(self, session, batches):
        """Sets the moving statistics to their plain average over `batches` of images, at the weights as they are.

        Moving averages lag behind weights that still change fast: on the 2020 study's preset 2 they
        cost 4.6 points of test accuracy. Do this before the network is evaluated or saved for it.
        """
        for k, images in enumerate(batches):
            session.run(self._refresh, {self._refreshing_X: images, self._statistics_momentum: k / (k + 1)})

    def count_parameters(self):
        """Trainable numbers: kernels, gammas, betas and the last layer's biases."""
        return sum(variable.shape.num_elements() for variable in tf.trainable_variables())

    # -------------------------------------------------------------------------- the table

    def _network(self, x, training):
        """X [N, 32, 32, 3] to logits [N, num_classes]."""
        with tf.variable_scope(tf.get_variable_scope(), reuse=training):
            if training:
                x = tf.cast(x, self._training_type)
            with tf.variable_scope('init'):
                x = _convolution(x, self._kernel('init_conv', x, FILTERS[0]))  # [N, 32, 32, 16]
            x = self._group(1, x, training)                                    # [N, 32, 32, 16]
            x = self._group(2, x, training)                                    # [N, 16, 16, 32]
            x = self._group(3, x, training)                                    # [N, 8, 8, 64]
            with tf.variable_scope('unit_last'):
                x = self._activation(x, 'final_bn', training)
            x = tf.reduce_mean(tf.cast(x, tf.float32), [1, 2])                 # [N, 64]
            with tf.variable_scope('logit'):
                return self._fully_connected(x, self.preset.num_classes)       # [N, num_classes]

    def _group(self, group, x, training):
        """Residual units of the same width; the first one of groups 2 and 3 halves height and width."""
        for i in range(self.preset.num_residual_units):
            first = i == 0
            with tf.variable_scope(f'unit_{group}_{i}'):
                x = self._unit(x, FILTERS[group], stride=2 if first and group > 1 else 1, training=training,
                               activate_before_split=first and group == 1)
        return x

    def _unit(self, x, filters, stride, training, activate_before_split):
        """Two convolutions, each after its activation, plus the shortcut; the second one strides."""
        with tf.variable_scope('common_activation' if activate_before_split else 'residual_activation'):
            activated = self._activation(x, 'init_bn', training)
        shortcut = activated if activate_before_split else x
        with tf.variable_scope('sub1'):
            kernel = self._kernel('conv1', activated, filters)
        with tf.variable_scope('sub2'):
            if training:
                x = self._activation(_convolution(activated, kernel), 'bn2', training)
            else:
                # The moving statistics only scale and shift, which the convolution does at no cost.
                with tf.variable_scope('bn2'):
                    scale, shift = _scale_and_shift(*self._statistics(filters))
                x = tf.nn.bias_add(_convolution(activated, kernel * scale), shift)
                x = _leaky_relu(x, self.preset.relu_leakiness, training)
            x = _convolution(x, self._kernel('conv2', x, filters), stride)
        return x + _match(shortcut, filters, stride)

    # -------------------------------------------------------------------------- layers

    def _activation(self, x, name, training):
        """Batch normalization, then leaky ReLU; shape unchanged."""
        with tf.variable_scope(name):
            beta, gamma, mean, variance = self._statistics(x.shape[-1].value)
            if training:
                x, *batch = tf.nn.fused_batch_norm(x, gamma, beta, epsilon=BN_EPSILON, is_training=True)
                self._batch_statistics += zip((mean, variance), batch)
            elif KERNELS == 'oneDNN':  # fuses a convolution with what follows it, but not fused_batch_norm
                scale, shift = _scale_and_shift(beta, gamma, mean, variance)
                scale = tf.reshape(scale, [1, 1, -1, 1])
                x = tf.nn.depthwise_conv2d_native(x, scale, strides=[1, 1, 1, 1], padding='SAME')
                x = tf.nn.bias_add(x, shift)
            else:
                x = tf.nn.fused_batch_norm(x, gamma, beta, mean, variance, BN_EPSILON, is_training=False)[0]
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
        return zlib.crc32(f'{self.preset.seed} {scope.name}'.encode()) & 0x7fffffff

    # -------------------------------------------------------------------------- towers

    def _build_towers(self, devices):
        """The training form on each of the devices, for as many parts of the batch, and what they give together.

        What travels in a step is, to each tower, its images and the variables, and back its gradients and statistics.
        """
        images = tf.shape(self.training_X)[0]
        self._losses, hits, statistics = [], [], []  # an entry a tower
        for k, device in enumerate(devices):
            with tf.device('/cpu:0'):  # cut before it is sent
                part = slice(images * k // len(devices), images * (k + 1) // len(devices))
                x, labels, total = self.training_X[part], self.Y[part], tf.cast(images, tf.float32)
            self._batch_statistics = []
            with tf.name_scope(f'tower_{k}'), tf.device(device):
                logits = self._network(x, training=True)
                loss = tf.reduce_sum(self._cross_entropy(logits, labels, self.preset.label_smoothing)) / total
                if k == 0:  # once, and where the variables are
                    loss += self.preset.l2_reg_lambda * self._l2()
                    self._refreshing_X, self._refresh = x, self._statistics_moves()
                self._losses.append((device, loss))
                hits.append(tf.reduce_sum(_hits(logits, labels)) / total)
            statistics.append(self._batch_statistics)
        self.training_loss, self.training_accuracy = tf.add_n([loss for _, loss in self._losses]), tf.add_n(hits)
        self._batch_statistics = [(same[0][0], tf.add_n([batch for _, batch in same]) / len(devices))
                                  for same in zip(*statistics)]
        self._move_statistics = self._statistics_moves()

    def _gradients(self, compute):
        """Pairs of a gradient of the training loss and its variable, by compute(loss), which returns such pairs."""
        if self.preset.towers == 1:
            return compute(self.training_loss)
        by_tower = []
        for device, loss in self._losses:
            with tf.device(device):
                by_tower.append(compute(loss))
        return [(tf.add_n([gradient for gradient, _ in same]), same[0][1]) for same in zip(*by_tower)]

    # -------------------------------------------------------------------------- loss and step

    def _loss_and_accuracy(self, logits, smoothing=0.0):
        with tf.name_scope('loss'):
            cross_entropy, l2 = self._cross_entropy(logits, self.Y, smoothing), self._l2()
            loss = tf.add(tf.reduce_mean(cross_entropy), self.preset.l2_reg_lambda * l2, name='loss')
        with tf.name_scope('accuracy'):
            return loss, tf.reduce_mean(_hits(logits, self.Y), name='accuracy')

    def _cross_entropy(self, logits, labels, smoothing):
        """float32 [N], an entry an image."""
        labels = labels * (1 - smoothing) + smoothing / self.preset.num_classes
        return tf.nn.softmax_cross_entropy_with_logits_v2(labels=labels, logits=logits)

    def _l2(self):
        """float32 [], the L2 loss of every kernel."""
        kernels = [variable for variable in tf.trainable_variables() if variable.op.name.endswith('/DW')]
        if self.preset.muon_lr:  # it decays those of the convolutions itself
            kernels = [tf.stop_gradient(kernel) if len(kernel.shape) == 4 else kernel for kernel in kernels]
        return tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])

    def _statistics_moves(self):
        """An op that moves the moving statistics towards those of the training batch."""
        momentum = self._statistics_momentum  # at 0 what was before leaves no trace, not even by rounding
        return tf.group(*[tf.assign(moving, moving * momentum + batch * (1 - momentum))
                          for moving, batch in self._batch_statistics])

    def _optimizer(self):
        preset = self.preset
        if preset.muon_lr:
            return Muon(preset, self.learning_rate)
        return tf.train.MomentumOptimizer(self.learning_rate, preset.momentum, use_nesterov=preset.nesterov)

    def _step(self, optimizer):
        """The op of a training step."""
        gradients = self._gradients(optimizer.compute_gradients)
        # The loss reads kernels for their L2 loss: the step comes after, or it would change what is read.
        with tf.control_dependencies([self._move_statistics, self.training_loss]):
            return optimizer.apply_gradients(gradients, self.global_step)

    def _step_within_float16(self, optimizer):
        """The op of a training step that is skipped where its gradients are beyond float16, and whether it is."""
        scale = LossScale()
        gradients = self._gradients(functools.partial(scale.compute_gradients, optimizer))
        skipped = scale.overflow([self.training_loss] + [gradient for gradient, _ in gradients])

        def move():
            with tf.control_dependencies([self._statistics_moves()]):
                return optimizer.apply_gradients(gradients)

        with tf.control_dependencies([tf.cond(skipped, tf.no_op, move), scale.update(skipped)]):
            return tf.assign_add(self.global_step, 1).op, skipped


def _hits(logits, labels):
    """float32 [N]: 1 where the likeliest class is that of the label."""
    return tf.cast(tf.equal(tf.argmax(logits, 1), tf.argmax(labels, 1)), tf.float32)


def _all_finite(tensors):
    """bool []: among these float32 tensors' numbers is no infinity, and nothing that is not a number."""
    return tf.reduce_all(tf.is_finite(tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)))


class LossScale:
    """Brings gradients into the range of float16 (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

    The loss is multiplied by the scale, and its gradients are divided by it. Where they overflow, the step is to be
    skipped, and the scale is halved; after GOOD_STEPS in a row without that it is doubled. At a scale of 1 no step
    is skipped: what overflows then is the training itself. The scale, a power of two, rounds nothing. It is
    part of a checkpoint, and so is the count of good steps.
    """
    SCOPE = 'loss_scale'
    FIRST = 128.0
    GOOD_STEPS = 2000

    def __init__(self):
        with tf.variable_scope(self.SCOPE):
            self.scale = tf.get_variable('scale', initializer=self.FIRST, trainable=False)
            self.good_steps = tf.get_variable('good_steps', initializer=0, trainable=False)

    def compute_gradients(self, optimizer, loss):
        """As the optimizer's: pairs of a gradient, which may hold what is not finite, and its variable."""
        return [(gradient / self.scale, variable)
                for gradient, variable in optimizer.compute_gradients(loss * self.scale)]

    def overflow(self, tensors):
        """bool []: the step that computed these is to be skipped."""
        return tf.logical_and(tf.logical_not(_all_finite(tensors)), self.scale > 1)

    def update(self, overflow):
        """The op that sets the scale for the next step."""
        good_steps = tf.where(overflow, 0, self.good_steps + 1)
        factor = tf.where(overflow, 0.5, tf.where(tf.equal(good_steps, self.GOOD_STEPS), 2.0, 1.0))
        return tf.group(tf.assign(self.scale, self.scale * factor),
                        tf.assign(self.good_steps, good_steps % self.GOOD_STEPS))


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
        momentum = tf.assign(slot, preset.momentum * slot + gradient)
        direction = gradient + preset.momentum * momentum if preset.nesterov else momentum
        matrix = tf.reshape(direction, [-1, kernel.shape[-1].value])         # [9 * inputs, filters]
        step = tf.transpose(_orthogonal(tf.transpose(matrix)))
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
    return _with_gradient_by_output(x, slope)


def _with_gradient_by_output(x, slope):
    """Leaky ReLU whose gradient looks at the output, which has the input's sign: the input need not be kept."""
    @tf.custom_gradient
    def leaky_relu(x):
        y = tf.nn.leaky_relu(x, slope)
        return y, lambda dy: tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=slope)
    return leaky_relu(x)


# ------------------------------------------------------------------------------ session

EVALUATION_BATCH = 250  # images; more are hardly faster, and cost memory
EVALUATED_AT_ONCE = 2   # batches: one is computed while the other is between two operations, or is prepared
ANSWER_PATIENCE = 10    # seconds, for another process of a cluster to answer


def tower_devices(towers):
    """Names of devices on this machine, one a tower: GPUs or, without one, those of make_session, all of its cores."""
    kind = 'gpu' if KERNELS == 'GPU' else 'cpu'
    return [f'/{kind}:{k}' for k in range(towers)]


def make_session(preset, target='', log_placement=True):
    """The one place where a session is made, on the current default graph; `target` is that of a cluster's server.

    `log_placement` False overrules the preset's log_device_placement, which TensorFlow prints to stdout.
    """
    config = tf.ConfigProto(allow_soft_placement=preset.allow_soft_placement,
                            log_device_placement=preset.log_device_placement and log_placement,
                            device_count={'CPU': preset.towers})
    config.gpu_options.allow_growth = True  # leaves the rest of the GPU's memory to others
    if preset.xla and KERNELS == 'GPU':
        config.graph_options.optimizer_options.global_jit_level = tf.OptimizerOptions.ON_1
    return tf.Session(target, config=config)


def start_server(jobs, job, index):
    """The tf.train.Server of task `index` of `job` in a cluster, {job: [address]}. Raises InputError without its port.

    TensorFlow listens on that port of every interface, whatever the address names.
    """
    config = tf.ConfigProto()
    config.gpu_options.allow_growth = True
    with _silenced():  # gRPC's words about a port that is taken
        try:
            return tf.train.Server(tf.train.ClusterSpec(jobs), job_name=job, task_index=index, config=config)
        except tf.errors.OpError as error:
            problem = reason(error)
    raise InputError(f'TensorFlow cannot listen on the port of {jobs[job][index]}, which another program may have: '
                     f'name another in TF_CONFIG, to every process ({problem})')


def reach(address, device):
    """A session on another process of a cluster, of which it uses nothing, or None where that does not answer.

    Its list_devices raises tf.errors.OpError once the process has ended, hangs, is cut off or was started again.
    """
    host, _, port = address.rpartition(':')
    try:  # gRPC, once refused, waits longer and longer before it connects again, and fails what would use it until then
        socket.create_connection((host.strip('[]'), int(port)), ANSWER_PATIENCE).close()
    except (OSError, UnicodeError):  # UnicodeError: of what can be no host name
        return None
    config = tf.ConfigProto(operation_timeout_in_ms=1000 * ANSWER_PATIENCE, device_filters=[device])
    session = tf.Session(f'grpc://{address}', tf.Graph(), config)
    return session if answers(session) else None


def answers(session):
    """Whether the process that `reach` has reached is still there."""
    try:
        session.list_devices()
        return True
    except tf.errors.OpError:
        return False


def evaluate(net, session, images, labels, desc='testing'):
    """Puts uint8 [N, 32, 32, 3] and int64 [N] through the inference form; `desc` names the work to the progress bar.

    Returns the mean loss, a float, and the predictions, int64 [N]. Where the memory runs out, it goes on with
    smaller batches. Raises InputError where one image is too large.
    """
    def run(part):
        return session.run([net.loss, net.predictions], {
            net.X: data_helpers.scale(images[part]),
            net.Y: data_helpers.one_hot(labels[part], net.preset.num_classes)})

    losses, predictions = zip(*_in_batches(run, len(images), EVALUATION_BATCH, desc))
    summed = sum(loss * len(predicted) for loss, predicted in zip(losses, predictions))
    return float(summed) / len(images), np.concatenate(predictions)


def evaluate_both_views(net, session, images, batch=None, desc='testing'):
    """Puts uint8 [N, 32, 32, 3] through the inference form twice: as they are, and as their mirror images (left-right).

    Returns the predictions for the images as they are, int64 [N], and the mean of the probabilities of each image
    and its mirror image, float32 [N, num_classes]. Batches, progress and errors are as in evaluate.
    """
    def run(part):
        x = data_helpers.scale(images[part])
        predictions, probabilities = session.run([net.predictions, net.probabilities], {net.X: x})
        mirrored = session.run(net.probabilities, {net.X: x[:, :, ::-1]})
        return predictions, (probabilities + mirrored) / 2

    predictions, probabilities = zip(*_in_batches(run, len(images), batch or EVALUATION_BATCH, desc))
    return np.concatenate(predictions), np.concatenate(probabilities)


def _in_batches(run, total, batch, desc):
    """A list of run(slice) of one batch after the other, in smaller batches from where the memory runs out."""
    results, done = [], 0
    with data_helpers.Progress(total=total, desc=desc, unit='images') as progress:
        while done < total:
            parts = [slice(start, min(start + batch, total)) for start in range(done, total, batch)]
            try:
                for part, result in zip(parts, _at_once(run, parts)):
                    results.append(result)
                    done = part.stop
                    progress.update(part.stop - part.start)
            except tf.errors.ResourceExhaustedError as error:
                if batch == 1:
                    raise InputError(f'the memory is too small for {desc}, even one image at a time ({reason(error)})')
                batch //= 2
    return results


def _at_once(run, parts):
    """Yields run(part) of one part after the other; EVALUATED_AT_ONCE of them are at work."""
    with concurrent.futures.ThreadPoolExecutor(EVALUATED_AT_ONCE) as pool:
        yield from pool.map(run, parts)
