"""The network in NumPy, float64, from the design's table and a dictionary of variables by name.

It shares nothing with resnet.py but the names, and takes each variable out of the dictionary as
it is used: what is left at the end, the network does not have.
"""
import numpy as np


def convolution(x, kernel, stride):
    """3x3, SAME: where the stride is 2 and the side even, TensorFlow pads below and right only."""
    n, side, _, _ = x.shape
    before = 1 if stride == 1 else 0
    padded = np.zeros((n, side + 2, side + 2, x.shape[3]))
    padded[:, before:before + side, before:before + side] = x
    out = side // stride
    y = np.zeros((n, out, out, kernel.shape[3]))
    for i in range(3):
        for j in range(3):
            y += padded[:, i:i + side:stride, j:j + side:stride][:, :out, :out] @ kernel[i, j]
    return y


def activation(x, variables, name, leakiness):
    gamma, beta, mean, variance = (variables.pop(f'{name}/{part}')
                                   for part in ('gamma', 'beta', 'moving_mean', 'moving_variance'))
    x = (x - mean) / np.sqrt(variance + 0.001) * gamma + beta
    return np.where(x > 0, x, leakiness * x)


def logits(x, variables, num_residual_units, leakiness):
    """float [N, 32, 32, 3] in [-1, 1] to float64 [N, classes]; empties `variables` of what it uses."""
    x = convolution(x, variables.pop('init/init_conv/DW'), 1)
    for group, filters in ((1, 16), (2, 32), (3, 64)):
        for i in range(num_residual_units):
            unit = f'unit_{group}_{i}/'
            shortcut = x
            if unit == 'unit_1_0/':
                shortcut = y = activation(x, variables, unit + 'common_activation/init_bn', leakiness)
            else:
                y = activation(x, variables, unit + 'residual_activation/init_bn', leakiness)
            stride = 2 if group > 1 and i == 0 else 1
            y = convolution(y, variables.pop(unit + 'sub1/conv1/DW'), 1)
            y = activation(y, variables, unit + 'sub2/bn2', leakiness)
            y = convolution(y, variables.pop(unit + 'sub2/conv2/DW'), stride)
            if stride == 2:
                n, side, _, channels = shortcut.shape
                shortcut = shortcut.reshape(n, side // 2, 2, side // 2, 2, channels).mean((2, 4))
                zeros = np.zeros(shortcut.shape[:3] + ((filters - channels) // 2,))
                shortcut = np.concatenate([zeros, shortcut, zeros], 3)
            x = y + shortcut
    x = activation(x, variables, 'unit_last/final_bn', leakiness).mean((1, 2))
    return x @ variables.pop('logit/DW') + variables.pop('logit/biases')


def probabilities(images, variables, num_residual_units, leakiness):
    """uint8 [N, 32, 32, 3] to float64 [N, classes]; `variables` stay."""
    x = logits(images / 127.5 - 1, dict(variables), num_residual_units, leakiness)
    odds = np.exp(x - x.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)
