"""The launchers, run with fakes of the clouds' commands."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / 'scripts').glob('*.sh'))
TIMEOUT = 30

# A host is a home folder. `gcloud` logs its arguments, and copies or runs the command there.
GCLOUD = """
echo "$@" >>"$LOG"
worker= command=
for argument in "$@"; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
  esac
done
[[ $worker == all ]] && workers='0 1' || workers=$worker
pids=() failed=0
for i in $workers; do
  if [[ $4 == scp ]]; then cp "$5" "$HOSTS/${6%:}-$i/"
  else (cd "$HOSTS/$5-$i" && HOME=$PWD exec bash -c "$command") & pids+=($!); fi
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
"""
# The hosts' Python: makes environments, and "trains" until SIGTERM.
PYTHON = """
if [[ $1 == -m ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip"; exit; fi
[[ $0 != */pip ]] || exec true
printf '%s|' "training in $PWD" "$A" "$@"
trap 'echo; echo saved; exit 0' TERM
for i in {1..300}; do sleep 0.1; done
"""


def command(folder: pathlib.Path, name: str, script: str) -> None:
    (folder / name).write_text(f'#!/usr/bin/env bash\n{script}')
    (folder / name).chmod(0o755)


def run(environment: dict, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )


def wait_for(condition) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def environment(tmp_path) -> dict:
    (tmp_path / 'bin').mkdir()
    path = f'{tmp_path}/bin:{os.environ["PATH"]}'
    return {'PATH': path, 'LOG': f'{tmp_path}/log', 'HOSTS': f'{tmp_path}', 'HOME': f'{tmp_path}'}


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(['bash', '-n', script], check=True)
    assert os.access(script, os.X_OK)


def test_a_run_on_two_slices_of_two_hosts(environment, tmp_path):
    command(tmp_path / 'bin', 'gcloud', GCLOUD)
    command(tmp_path / 'bin', 'python3', PYTHON)
    command(tmp_path / 'bin', 'sleep', 'exec /bin/sleep 0.1')  # also those of a second
    environment |= {'TPU_NAME': 'a b', 'ZONE': 'z', 'PROJECT': 'p', 'REMOTE_ENV': 'A=1'}
    hosts = [tmp_path / f'{name}-{i}' for name in 'ab' for i in (0, 1)]
    for host in hosts:
        host.mkdir()
    script = 'scripts/tpu.sh'
    started = run(
        environment, script, 'start', '--config=x.py', "--config.data.sources=(('a', 1),)"
    )
    assert started.returncode == 0, started.stderr
    logs = [host / 'jaxformer/run.log' for host in hosts]
    try:
        wait_for(lambda: all(log.exists() and log.read_text().endswith('|') for log in logs))
        for host, log in zip(hosts, logs, strict=True):
            said = f'training in {host}/jaxformer|1|train.py|--coordinator=auto|'
            assert log.read_text() == f"{said}--config=x.py|--config.data.sources=(('a', 1),)|"
            copied = (host / 'jaxformer/train_step.py').read_text()
            assert copied == (ROOT / 'train_step.py').read_text()
        again = run(environment, script, 'start')
        assert again.returncode == 1
        assert 'a run is under way on a b' in again.stderr
        assert run(environment, script, 'status').stdout.count(': running') == 4
    finally:
        stopped = run(environment, script, 'stop')
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count('saved') == 4
    assert run(environment, script, 'status').stdout.count(': ended') == 4
    follow = subprocess.Popen(
        ['timeout', f'{TIMEOUT}', script, 'logs', '1'], env=environment, cwd=ROOT,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    written = logs[1].read_bytes()
    assert follow.stdout.read(len(written)) == written
    follow.terminate()  # it would follow the log for ever
    assert follow.stdout.read() == b''
    follow.wait()
    calls = pathlib.Path(environment['LOG']).read_text()
    assert 'compute tpus tpu-vm ssh b --zone=z --project=p --worker=all --command=' in calls
    assert 'compute tpus tpu-vm ssh a --zone=z --project=p --worker=1 --command=tail' in calls


# Fakes of what the job calls. `srun` is one process, which ends with the codes of a file in turn.
SRUN = """
echo "srun $@" >>"$LOG"
code=$(head -n 1 "$HOSTS/codes"); sed -i 1d "$HOSTS/codes"
[[ $code != wait ]] || { echo $$ >"$HOSTS/task"; trap 'exit 0' TERM; while :; do sleep 0.1; done; }
[[ $code != KILL ]] || kill -KILL $$
exit "$code"
"""
SCANCEL = 'echo "scancel $@" >>"$LOG"; kill -TERM "$(cat "$HOSTS/task")"'


@pytest.fixture
def slurm(environment, tmp_path):
    command(tmp_path / 'bin', 'srun', SRUN)
    command(tmp_path / 'bin', 'scancel', SCANCEL)
    command(tmp_path / 'bin', 'scontrol', 'echo "scontrol $@" >>"$LOG"')
    command(tmp_path / 'bin', 'sbatch', 'echo "sbatch $@" >>"$LOG"; echo "7;cluster"')
    return environment | {'SLURM_JOB_ID': '7', 'RESTART_SECONDS': '0', 'RESTARTS': '3'}


def test_slurm_submits_and_stops(slurm, tmp_path):
    options, flags = ['--nodes=2', '--time=1'], ['--config=x.py', '--workdir=a b']
    started = run(slurm, 'scripts/slurm.sh', 'start', *options, '--', *flags)
    assert started.returncode == 0, started.stderr
    assert 'scripts/slurm.sh stop 7 ends it' in started.stdout
    assert run(slurm, 'scripts/slurm.sh', 'start', *options).returncode == 2
    (tmp_path / 'task').write_text('0')
    command(tmp_path / 'bin', 'scancel', 'echo "scancel $@" >>"$LOG"')
    run(slurm, 'scripts/slurm.sh', 'stop', '7')
    assert pathlib.Path(slurm['LOG']).read_text().splitlines() == [
        'sbatch --parsable --nodes=2 --time=1 scripts/slurm_job.sh --config=x.py --workdir=a b',
        'scancel --signal=TERM 7',
    ]


@pytest.mark.parametrize(
    ('codes', 'tries', 'ends'),
    [
        ('0', 1, 0),
        ('1 0', 1, 1),
        ('75 KILL 0', 3, 0),
        ('134 0', 2, 0),  # jax aborts a process that has lost another one
        ('143 0', 2, 0),  # srun ends the other tasks when one has ended with 75
        ('75 75 75 75 0', 4, 75),
    ],
)
def test_a_job_goes_on_after_a_lost_process(codes, tries, ends, slurm, tmp_path):
    (tmp_path / 'codes').write_text(codes.replace(' ', '\n') + '\n')
    job = run(slurm, 'scripts/slurm_job.sh', '--config=x.py')
    assert job.returncode == ends
    called = ['srun --kill-on-bad-exit=1 python train.py --config=x.py'] * tries
    assert pathlib.Path(slurm['LOG']).read_text().splitlines() == called


@pytest.mark.parametrize('name', ['TERM', 'INT', 'HUP', 'USR1', 'USR2', 'XCPU'])
def test_restarts_end_by_a_signal_which_the_command_gets(name, environment, tmp_path):
    script = 'trap "echo saved; exit 0" TERM; echo begun; for i in {1..300}; do sleep 0.1; done'
    command(tmp_path / 'bin', 'train', script)
    with open(tmp_path / 'output', 'w') as f:
        again = subprocess.Popen(['scripts/again.sh', 'train'], env=environment, cwd=ROOT, stdout=f)
    wait_for(lambda: (tmp_path / 'output').read_text() == 'begun\n')
    again.send_signal(getattr(signal, f'SIG{name}'))
    assert again.wait(TIMEOUT) == 0
    assert (tmp_path / 'output').read_text() == 'begun\nsaved\n'


def test_a_signal_before_the_command_is_known_reaches_it(environment, tmp_path):
    script = (ROOT / 'scripts/again.sh').read_text()
    assert script.count('  child=$!\n') == 1
    slow = tmp_path / 'again.sh'
    slow.write_text(script.replace('  child=$!\n', '  sleep 0.3\n  child=$!\n'))
    train = 'trap "exit 0" TERM; kill -TERM "$PPID"; for i in {1..50}; do sleep 0.1; done; exit 9'
    command(tmp_path / 'bin', 'train', train)
    assert run(environment, 'bash', str(slow), 'train').returncode == 0


@pytest.mark.parametrize('code', [130, 143])
def test_a_command_that_was_to_end_is_not_repeated(code, environment):
    """It was before it heard signals."""
    assert run(environment, 'scripts/again.sh', 'bash', '-c', f'exit {code}').returncode == code


def test_a_job_whose_time_is_over_saves_and_queues_again(slurm, tmp_path):
    (tmp_path / 'codes').write_text('wait\n')
    job = subprocess.Popen(['scripts/slurm_job.sh', '--config=x.py'], env=slurm, cwd=ROOT)
    wait_for(lambda: (tmp_path / 'task').exists() and (tmp_path / 'task').read_text())
    job.send_signal(signal.SIGTERM)
    assert job.wait(TIMEOUT) == 0
    calls = pathlib.Path(slurm['LOG']).read_text().splitlines()
    assert calls[1:] == ['scancel --signal=TERM 7', 'scontrol requeue 7']
