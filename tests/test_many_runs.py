"""Several presets and seeds: one after the other, as a scheduler's tasks, and by Ray on one node and on two."""
import contextlib
import glob
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import kubernetes_validate
import numpy as np
import pytest
import yaml

# Ray's cluster listens to the network: nobody else may use it. It reads this when it is imported.
os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=secrets.token_hex(32))
from ray.cluster_utils import Cluster

import resnet_train
import sample
import torture
from data_helpers import InputError
from presets_and_results import COLUMNS, load_presets, make_preset
from sample import PROJECT_DIR, SAMPLE_DIR, TINY, run_script

SCRIPTS = ('data_helpers.py', 'resnet.py', 'presets_and_results.py', 'resnet_train.py', 'for_report/__init__.py',
           'for_report/uncertainty.py')
SHORT = ('--batch_size', 10, '--num_epochs', 100000, '--evaluate_every', 40, '--checkpoint_every', 1,
         '--data_augmentation', 'true')
STORE = dict(object_store_memory=10 ** 8)  # bytes


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    """A copy of the scripts, for which the sample is CIFAR-10: they run as a user runs them, on Ray's nodes too."""
    folder = tmp_path_factory.mktemp('project')
    (folder / 'for_report').mkdir()
    for name in SCRIPTS:
        shutil.copy(os.path.join(PROJECT_DIR, name), str(folder / name))
    with open(str(folder / 'data_helpers.py'), 'a') as file:
        file.write(f'\nSHA256 = {sample.digests()!r}\nPROGRESS_EVERY = 10 ** 6\n')
    return str(folder)


def start(project, *flags, **variables):
    """Starts a training by the scripts in `project`, with these environment variables."""
    words = [sys.executable, os.path.join(project, 'resnet_train.py')] + [str(flag) for flag in flags]
    return subprocess.Popen(words + ['--data_dir', SAMPLE_DIR], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True, env=dict(os.environ, **variables))


@contextlib.contextmanager
def on_one_core(number=0):
    """What is started within the block runs on one core, as each run by Ray does here: for the same bits."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[number % len(cores)]])
    yield
    os.sched_setaffinity(0, cores)


FOUR_SEEDS = ('--preset', 0, *SHORT, '--max_steps', 100, '--seeds', 4, '--output_dir')


@pytest.fixture(scope='module')
def one_after_the_other(project, tmp_path_factory):
    """The output folder of four undisturbed runs, each on one core."""
    output_dir = tmp_path_factory.mktemp('one_after_the_other')
    with on_one_core():
        _, err = start(project, *FOUR_SEEDS, output_dir).communicate()
    assert err == ''
    return output_dir


def wait_for(condition, process):
    """Waits until condition() of the runs that `process` trains."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def at_work(output_dir):
    """The seeds of the runs that are in training and have saved a step."""
    return {run.seed for run in load_presets(str(output_dir)) if run.status == 'training' and run.steps}


def seeds_on(node):
    """The seeds of the runs that a node of Ray trains: a raylet's workers have them as processes."""
    raylet = str(node.all_processes['raylet'][0].process.pid)
    lines = subprocess.check_output(['ps', '-ewwo', 'pid,ppid,args'], universal_newlines=True).splitlines()
    processes = {line.split()[0]: line.split()[1:] for line in lines}
    return {int(word.split('=')[1]) for parent, *words in processes.values() for word in words
            if word.startswith('--seed=') and processes.get(parent, [None])[0] == raylet}


def by_recipe(output_dir):
    """{(preset, seed): run} of a folder, in which each is there once."""
    runs = {(run.preset, run.seed): run for run in load_presets(str(output_dir))}
    assert len(glob.glob(str(output_dir / 'runs' / '*'))) == len(runs)
    return runs


def check_same(output_dir, alone):
    """That both folders hold the same runs, complete: records, checkpoints and curves to the last bit."""
    found, expected = by_recipe(output_dir), by_recipe(alone)
    assert found.keys() == expected.keys()
    for key, run in found.items():
        other = expected[key]
        differing = {name for name in COLUMNS if getattr(run, name) != getattr(other, name)}
        assert differing <= {'timestamp', 'training_time', 'images_per_second'} and run.status == 'complete'
        folders = run.run_dir(str(output_dir)), other.run_dir(str(alone))
        ours, theirs = map(torture.checkpoints, folders)
        assert ours.keys() == theirs.keys() and run.steps in ours
        assert all(np.array_equal(value, theirs[step][name]) for step in ours for name, value in ours[step].items())
        assert torture.curves(folders[0]) == torture.curves(folders[1])


# ------------------------------------------------------------------------------ one after the other

def test_presets_and_seeds_are_multiplied_in_order(tmp_path):
    flags = ('--preset', 'study3', 0, *TINY[2:], '--max_steps', 2, '--seeds', 3, 1, '--output_dir', tmp_path)
    status, out, err = run_script('resnet_train.py', *flags)
    assert status == 0 and err == '', err
    assert [(run.preset, run.seed, run.status) for run in load_presets(str(tmp_path))] == [
        (3, 3, 'complete'), (3, 1, 'complete'), (0, 3, 'complete'), (0, 1, 'complete')]
    status, out, err = run_script('resnet_train.py', *flags, '--ray', tensorflow=False)  # there is nothing left to do
    assert status == 0 and err == '' and out.count('is on record, trained') == 4
    assert out.startswith('Preset study3, seed 3: run ')
    flags = ('--preset', 3, 0, *TINY[2:], '--max_steps', 2, '--seed', 1, '--output_dir', tmp_path)
    status, out, err = run_script('resnet_train.py', *flags, tensorflow=False)  # without --seeds a run each
    assert status == 0 and out.count('is on record, trained') == 2


# ------------------------------------------------------------------------------ a scheduler's tasks

@pytest.mark.parametrize('flags, variables, message', [
    (['--seeds', '8', '--task', '8'], {}, 'there is no run 8: the command names 8 runs, counted from 0'),
    (['--task', '1'], {}, 'there is no run 1: the command names 1 run, counted from 0'),
    (['--task', '-1'], {}, '--task must be a whole number from 0'),
    (['--task'], {}, 'where neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set'),
    (['--preset', '0', '3', '--task'], {'SLURM_ARRAY_TASK_ID': '2'}, 'there is no run 2: the command names 2 runs'),
    (['--task'], {'JOB_COMPLETION_INDEX': 'x'}, "--task must be a whole number from 0 to 1000000, not 'x'"),
    (['--task', '0', '--ray'], {}, '--resume, --task and --ray exclude each other'),
    (['--resume', '--ray'], {}, '--resume, --task and --ray exclude each other'),
    (['--trim', '--ray'], {}, '--trim trains nothing: leave out the other flags')])
def test_tasks_that_are_refused(flags, variables, message, tmp_path):
    status, _, err = run_script('resnet_train.py', *flags, '--output_dir', tmp_path, tensorflow=False, **variables)
    assert status == 2 and message in err and len(err.splitlines()) == 1, err


def test_tasks_count_seeds_within_presets():
    presets = [make_preset(number, seed=seed) for number in (0, 6) for seed in range(3)]
    chosen = [resnet_train._task(presets, str(number)) for number in range(6)]
    assert [(preset.preset, preset.seed) for preset in chosen] == [(0, 0), (0, 1), (0, 2), (6, 0), (6, 1), (6, 2)]


@pytest.mark.long
def test_tasks_at_once_two_of_them_killed(project, one_after_the_other, tmp_path):
    def begin(number):
        variable = resnet_train.TASK_VARIABLES[number % 2]
        with on_one_core(number):
            return start(project, *FOUR_SEEDS, tmp_path, '--task', **{variable: str(number)})

    tasks = {number: begin(number) for number in range(4)}
    for victim in (1, 2):
        wait_for(lambda: victim in at_work(tmp_path), tasks[victim])
        tasks[victim].kill()
        tasks.pop(victim).communicate()
    tasks.update({number: begin(number) for number in (1, 2)})
    outcomes = {number: task.communicate() + (task.returncode,) for number, task in tasks.items()}
    assert all(status == 0 and err == '' for _, err, status in outcomes.values()), outcomes
    assert {number for number in outcomes if 'Resuming run' in outcomes[number][0]} == {1, 2}
    check_same(tmp_path, one_after_the_other)

    status, out, err = run_script('resnet_train.py', *FOUR_SEEDS, tmp_path, '--task', 3, tensorflow=False)
    assert status == 0 and err == '' and out.startswith('Seed 3: run ') and 'is on record, trained' in out


def test_a_task_waits_for_the_lock_of_a_lost_node(tmp_path, monkeypatch, capsys):
    run = make_preset(0, timestamp=7, status='training', steps=1)
    run.save(str(tmp_path))
    states = iter(['training', 'training', 'interrupted'])
    monkeypatch.setattr(resnet_train.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(resnet_train, 'load_presets',
                        lambda output_dir: [make_preset(0, timestamp=7, status=next(states))])
    assert resnet_train._freed(make_preset(0), str(tmp_path)).status == 'interrupted'
    assert capsys.readouterr().err.count('run 7 is in training by another process: waiting for 120 seconds') == 1
    monkeypatch.setattr(resnet_train, 'LOCK_OUTLIVES', -1)
    monkeypatch.setattr(resnet_train, 'load_presets', lambda output_dir: [run])
    with pytest.raises(InputError, match='run 7 is in training by another process'):
        resnet_train._freed(make_preset(0), str(tmp_path))


def test_a_task_whose_run_diverged_fails(tmp_path):
    make_preset(0, timestamp=7, status='diverged').save(str(tmp_path))
    status, out, err = run_script('resnet_train.py', '--task', 0, '--output_dir', tmp_path, tensorflow=False)
    assert status == 2 and 'is on record, diverged' in out and err.endswith('error: seed 0 diverged\n')


def in_readme(first):
    """The indented block of README.md that starts with this line."""
    with open(os.path.join(PROJECT_DIR, 'README.md'), encoding='utf-8') as file:
        lines = file.read().splitlines()
    begin = lines.index('    ' + first)
    end = next(number for number in range(begin, len(lines)) if lines[number][:4].strip())
    return textwrap.dedent('\n'.join(lines[begin:end])).strip()


def named_by(words):
    """How many runs a command line names."""
    flags = vars(resnet_train._parser(words).parse_args(words))
    assert flags['task'] == resnet_train.BY_VARIABLE
    return len(resnet_train._requested(dict(flags, task=None), {}))


def test_the_manifest_of_the_readme_fits_the_published_schema():
    job = yaml.safe_load(in_readme('apiVersion: batch/v1'))
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    spec = job['spec']
    words = spec['template']['spec']['containers'][0]['command']
    assert job['kind'] == 'Job' and spec['completionMode'] == 'Indexed' and words[:2] == ['python', 'resnet_train.py']
    assert spec['completions'] == named_by(words[2:])
    spec['completion'] = spec.pop('completions')
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_the_array_job_of_the_readme_has_a_task_for_each_run():
    lines = in_readme('#!/bin/bash').splitlines()
    words = shlex.split(lines[-1])
    assert len(lines) == 8 and all(line.startswith('#SBATCH --') for line in lines[1:-1])
    assert f'#SBATCH --array=0-{named_by(words[words.index("resnet_train.py") + 1:]) - 1}' in lines


# ------------------------------------------------------------------------------ Ray

@pytest.mark.parametrize('cores, gpus, runs, share', [
    ([2], 0, 2, dict(num_cpus=1)), ([2], 0, 1, dict(num_cpus=2)), ([2], 0, 30, dict(num_cpus=1)),
    ([16], 0, 3, dict(num_cpus=5)), ([2, 2], 0, 3, dict(num_cpus=1)), ([3, 3], 0, 3, dict(num_cpus=1)),
    ([16, 16, 2], 0, 8, dict(num_cpus=4)), ([2, 2], 0, 1, dict(num_cpus=2)),
    ([8, 8], 1, 4, dict(num_gpus=1, num_cpus=0))])
def test_a_share_of_the_cores_or_a_gpu(cores, gpus, runs, share):
    nodes = [{'Resources': {'CPU': float(number), 'GPU': float(gpus)}} for number in cores]
    assert resnet_train._share(nodes, runs) == share
    for node in nodes:
        node['Resources']['GPU'] *= 3
    assert resnet_train._share(nodes, runs, towers=3).get('num_gpus', 0) == 3 * share.get('num_gpus', 0)
    if gpus:
        with pytest.raises(InputError, match='4 towers need as many GPUs on one node'):
            resnet_train._share(nodes, runs, towers=4)


def test_tasks_on_one_machine_get_cores_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))  # whatever else this machine computes
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    cores = os.sched_getaffinity(0)
    code = 'import os, resnet_train\nwith resnet_train._cores_of_its_own(1): print(*os.sched_getaffinity(0))'
    with resnet_train._cores_of_its_own(1):
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # for the other one to choose from
        theirs = subprocess.check_output([sys.executable, '-c', code], cwd=PROJECT_DIR, universal_newlines=True)
    assert len(mine) == 1 and os.sched_getaffinity(0) == cores
    assert len(cores) == 1 or {int(theirs)} != mine


def test_without_ray_one_sentence_says_so(tmp_path):
    status, _, err = run_script('resnet_train.py', '--ray', '--output_dir', tmp_path, tensorflow=False,
                                prepare='sys.modules["ray"] = None; ')
    assert status == 2 and '--ray needs Ray, which is not installed here' in err and 'pip install ray' in err
    assert len(err.splitlines()) == 1


def test_what_keeps_a_node_from_training(tmp_path, monkeypatch):
    path, token = tmp_path / 'INFOS' / 'token', 'abc'
    assert resnet_train._problem_on_node(str(path), token, SAMPLE_DIR).startswith(
        f'does not see the output folder {tmp_path}: name one')
    path.parent.mkdir()
    path.write_text('of another folder')
    assert 'does not see the output folder' in resnet_train._problem_on_node(str(path), token, SAMPLE_DIR)
    path.write_text(token)
    nowhere = os.path.join(__file__, 'data')
    assert resnet_train._problem_on_node(str(path), token, nowhere).startswith(
        f'cannot load the data: CIFAR-10 is not in {nowhere} and cannot be written there')
    monkeypatch.setattr(resnet_train, 'PROJECT_DIR', str(tmp_path))
    assert 'does not have the scripts' in resnet_train._problem_on_node(str(path), token, SAMPLE_DIR)


class FakeRay:
    """Runs tasks at once; the node called blind sees no files."""
    exceptions = resnet_train  # of which none is raised

    def remote(self, task):
        self.task = task
        return self

    def options(self, scheduling_strategy, **resources):
        self.blind = scheduling_strategy.node_id == 56 * 'b'
        return type('Task', (), dict(remote=staticmethod(
            lambda path, *rest, task=self.task, blind=self.blind: task('gone' if blind else path, *rest))))

    def get(self, result):
        return result


def test_nodes_that_do_not_see_the_folder_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(resnet_train, '_problem_on_node', lambda path, token, data_dir: (
        '' if os.path.exists(path) and open(path).read() == token else 'does not see it'))
    nodes = [dict(NodeID=56 * name[0], NodeManagerHostname=name, NodeManagerAddress='10.0.0.1')
             for name in ('blind', 'clear')]
    with pytest.raises(InputError) as error:
        resnet_train._check_nodes(FakeRay(), nodes, str(tmp_path), SAMPLE_DIR)
    assert str(error.value) == 'node blind (10.0.0.1) does not see it'
    resnet_train._check_nodes(FakeRay(), nodes[1:], str(tmp_path), SAMPLE_DIR)
    assert os.listdir(str(tmp_path / 'INFOS')) == []


def test_a_failure_does_not_end_the_others(project, trained, tmp_path):
    """Deeper networks cannot start from the weights of a ResNet8, a ResNet8 can."""
    output_dir = str(tmp_path / 'copied')
    shutil.copytree(trained[0], output_dir)
    source, = load_presets(output_dir)
    process = start(project, '--preset', 3, 4, 0, *SHORT, '--max_steps', 3, '--seed', source.seed, '--init_from',
                    source.timestamp, '--output_dir', output_dir, '--ray')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    errors = err.splitlines()
    assert len(errors) == 3, err
    for name, model in (('study3', 'ResNet20'), ('study4', 'ResNet56')):
        assert f'preset {name}, seed 5: the weights of run {source.timestamp}' in errors[-1]
        assert f'do not fit a {model}' in errors[-1]
    assert [line for line in out.splitlines() if 'is complete' in line and line.startswith('Preset first, seed ')]
    cores = resnet_train._share([{'Resources': {'CPU': len(os.sched_getaffinity(0))}}], 3)['num_cpus']
    run, = [run for run in load_presets(output_dir) if run.init_from]
    assert (run.preset, run.status, run.steps) == (0, 'complete', 3)
    assert run.device.endswith(f', {resnet_train.counted(cores, "core")}')


@pytest.mark.long
def test_ctrl_c_ends_all_and_the_same_command_goes_on(project, tmp_path):
    seeds, before = list(range(min(2, len(os.sched_getaffinity(0))))), {}

    def steps():
        return {run.timestamp: run.steps for run in load_presets(str(tmp_path)) if run.steps}

    for _ in range(2):
        named = seeds + seeds[:1]  # one number alone would say how many
        process = start(project, '--preset', 0, *SHORT, '--seeds', *named, '--output_dir', tmp_path, '--ray')
        wait_for(lambda: at_work(tmp_path) == set(seeds) and all(
            count > before.get(timestamp, 0) for timestamp, count in steps().items()), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 130 and err == '' and 'Stopping: every run validates and saves' in out, err
        runs = load_presets(str(tmp_path))
        assert [run.status for run in runs] == ['interrupted'] * len(seeds)
        assert out.count('is interrupted: best validation accuracy') == (0 if before else len(seeds))
        assert all(f'is interrupted, resumed at step {count:,}: best' in out for count in before.values())
        assert not before or before.keys() == steps().keys()
        before = steps()


@pytest.mark.long
def test_runs_on_two_nodes_one_of_them_killed(project, one_after_the_other, tmp_path):
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False, **STORE))
    try:
        victim = cluster.add_node(num_cpus=1, node_ip_address='127.0.0.2', **STORE)
        cluster.add_node(num_cpus=0, **STORE)  # it has the machine's own address, where the script looks for its node
        process = start(project, *FOUR_SEEDS, tmp_path, '--ray', cluster.address)
        wait_for(lambda: at_work(tmp_path) & seeds_on(victim), process)
        cluster.remove_node(victim, allow_graceful=False)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    finally:
        cluster.shutdown()
    assert '4 runs by Ray on 2 nodes, 1 core each' in out
    assert out.count('is complete: best') == 3 and out.count('is complete, resumed at step') == 1, out
    check_same(tmp_path, one_after_the_other)


def test_a_cluster_that_is_not_there(project, tmp_path):
    process = start(project, '--ray', 'nonsense', '--output_dir', tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and 'there is no Ray cluster to work with at nonsense' in err
