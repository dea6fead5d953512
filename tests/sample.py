"""The committed sample of CIFAR-10: the first 60 images of each training file, the first 100 test images."""
import hashlib
import os
import subprocess
import sys

TESTS_DIR = os.path.dirname(os.path.abspath(__file__))
PROJECT_DIR = os.path.dirname(TESTS_DIR)
SAMPLE_DIR = os.path.join(TESTS_DIR, 'cifar10_sample')
TINY = ('--preset', 3, '--num_residual_units', 1, '--batch_size', 100, '--max_steps', 6, '--evaluate_every', 2,
        '--checkpoint_every', 3, '--num_checkpoints', 2)  # flags of a training on it


def content(name):
    with open(os.path.join(SAMPLE_DIR, name + '.bin'), 'rb') as file:
        return file.read()


def digests():
    import data_helpers
    return {name: hashlib.sha256(content(name)).hexdigest() for name in data_helpers.SHA256}


def run_script(script, *flags, tensorflow=True, popen=False, prepare='', call='', timeout=300, stdout=subprocess.PIPE,
               stderr=subprocess.PIPE, **environment):
    """Runs a script as a user would, but with the sample's digests in place of the whole data set's.

    With tensorflow=False any import of TensorFlow fails: the script has to answer without it. `prepare` is code
    that runs before the script, `call` code in place of it. timeout is in seconds. However slow the machine, no
    progress is written through a pipe.
    """
    block = '' if tensorflow else 'sys.modules["tensorflow"] = None; '
    path = os.path.join(PROJECT_DIR, script)
    argv = [script] + [str(flag) for flag in flags]
    code = (f'import sys, runpy; sys.path[:0] = [{TESTS_DIR!r}, {PROJECT_DIR!r}]; import sample, data_helpers; '
            f'data_helpers.SHA256 = sample.digests(); data_helpers.PROGRESS_EVERY = 10 ** 6; {block}{prepare}'
            f'sys.argv = {argv!r}; ')
    code += call or f'runpy.run_path({path!r}, run_name="__main__")'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=stdout, stderr=stderr, universal_newlines=True,
                               env=dict(os.environ, CIFAR10_DIR=SAMPLE_DIR, **environment))
    if popen:
        return process
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err
