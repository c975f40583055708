"""Files that start runs: configurations of accelerate launch, and the Slurm script against stand-ins for Slurm."""
import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / 'recipes' / 'slurm.sh'

# srun: every task of every node at once, the highest exit code at the end.
SRUN = '''#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >> "$LOG"; shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % (SLURM_NTASKS / SLURM_NNODES))) "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do wait "$task"; c=$?; ((c > code)) && code=$c; done
exit $code
'''
SCONTROL = '''#!/bin/bash
if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> "$LOG"; fi
'''
PYTHON = '''#!/bin/bash
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> "$LOG"
exit $([[ $RANK == 1 ]] && echo "$CODE" || echo $((CODE == 75 ? 75 : 0)))
'''


@pytest.mark.parametrize('name, processes, machines', [('1gpu', 1, 1), ('8gpu', 8, 1), ('4x8gpu', 32, 4)])
def test_accelerate_takes_the_configuration(name, processes, machines):
    parser = launch_command_parser()
    words = ['--config_file', str(ROOT / 'recipes' / 'accelerate' / f'{name}.yaml')]
    if machines > 1:
        words += ['--machine_rank', '2', '--main_process_ip', '10.0.0.1']
    args, _, _ = _validate_launch_command(parser.parse_args([*words, 'train_imagenet.py', '--mix', 'alignmix']))
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, 'no')
    assert bool(args.multi_gpu) == (processes > 1) and not args.use_cpu
    assert args.training_script_args == ['--mix', 'alignmix']
    if machines > 1:
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (2, '10.0.0.1', 29500)


@pytest.fixture
def submit(tmp_path):
    """Callable: run the script as two nodes of two tasks whose second task ends with a code; its code and the log."""
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL), ('python', PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(code: int, *words: str, **variables: str) -> tuple[int, list[str]]:
        log = tmp_path / 'log'
        log.write_text('')
        env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHON=str(tmp_path / 'python'), LOG=str(log),
                   CODE=str(code), SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NAME='job', SLURM_JOB_ID='40123',
                   SLURM_JOB_NODELIST='node[1-2]', SLURM_NTASKS='4', SLURM_NNODES='2', **variables)
        done = subprocess.run(['bash', str(SLURM), *words], env=env, timeout=30, capture_output=True)
        return done.returncode, log.read_text().splitlines()
    return run


def test_the_slurm_script_is_bash():
    subprocess.run(['bash', '-n', str(SLURM)], check=True)


def test_slurm_tasks_become_ranks(submit):
    code, log = submit(0, '-c', 'a recipe.yaml', '--lr', '0.1')
    tasks = sorted(line for line in log if line[0].isdigit())
    assert code == 0 and not any('requeue' in line for line in log)
    assert tasks == [
        f'{rank}/4 {rank % 2}/2 node1:20123 train_imagenet.py --experiment job-40123 --resume auto -c a recipe.yaml '
        '--lr 0.1' for rank in range(4)]


def test_a_stopped_job_is_requeued_under_its_name(submit):
    code, log = submit(75, EXPERIMENT='mine')
    assert code == 75 and 'scontrol requeue 40123' in log
    assert sum('--experiment mine --resume auto' in line for line in log) == 4


def test_a_failed_job_is_not_requeued(submit):
    code, log = submit(1)
    assert code == 1 and not any('requeue' in line for line in log)
