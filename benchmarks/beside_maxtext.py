"""A training step beside MaxText's, both compiled for TPUs that need not be there.

    pip install 'maxtext[tpu]==0.2.5'            # Python 3.12 or later; no GPU packages
    python benchmarks/beside_maxtext.py          # a quarter of an hour on 2 cores
    python benchmarks/beside_maxtext.py --programs=tpu_v4_best@v4:2x4x4 --peer=''  # ours alone

Run it in the environment that MaxText is installed in, which has all that the project takes: so the
same jax and the same libtpu compile both, each program in a process of its own. Sizes are the same;
what a peer leaves to choose is as in its arguments below, the best of those that were tried. Of the
first program MaxText's layers come in another order, 40 dense ones before 8 of experts.

Both texts are read by planning/compiled.py. `compute` are the compiler's cycles, with attention
kernels at the same part of the peak (`attention` of it); kernels that have no estimate count
nothing (`unpriced`: of experts, in both). `network` is all that a device sends, `waited` what no
work hides, and `step` compute and what is waited for. `GB` are arguments, results and temporary
arrays. `ratio` is a step over MaxText's: below 1 is good for ours. The figures serve to compare two
programs that were compiled alike, not as times of a step.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import common
from absl import flags

from config import ConfigError
from machine.chips import CHIPS
from machine.config_flag import load_config
from parallel import make_mesh
from planning.compiled import compile_step, read_cost
from planning.prices import Cost
from planning.topology import topology_devices
from runtime.config_checks import validate

FLAGS = flags.FLAGS
MAXTEXT = 'maxtext[tpu]==0.2.5'

# Without the last option its gathers become collective matmuls of 16 steps, four times as slow.
OPTIONS = (
    '--xla_enable_async_all_gather=true --xla_enable_async_collective_permute=true '
    '--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000'
)


def splash_blocks(size: int) -> str:
    """Returns the arguments for attention by blocks of this size, backward in one kernel."""
    names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv_compute')
    sizes = [f'sa_block_{name}={size}' for name in names]
    return ' '.join((*sizes, f'sa_block_kv_dkv={2 * size}', 'sa_use_fused_bwd_kernel=true'))


# By ours: MaxText's arguments for the same sizes.
PROGRAMS = {
    'tpu_v4_best@v4:2x4x4': (
        'compile_topology=v4-64 base_emb_dim=768 base_num_query_heads=12 base_num_kv_heads=12 '
        'base_mlp_dim=1536 base_num_decoder_layers=48 head_dim=64 vocab_size=100352 '
        'max_target_length=1024 per_device_batch_size=8 ici_fsdp_parallelism=32 attention=flash '
        'logits_via_embedding=true attention_type=mla q_lora_rank=128 kv_lora_rank=128 '
        'qk_nope_head_dim=64 qk_rope_head_dim=64 v_head_dim=64 opt_type=adamw adam_b2=0.95 '
        'dtype=bfloat16 weight_dtype=float32 decoder_block=deepseek first_num_dense_layers=40 '
        'num_experts=16 num_experts_per_tok=2 shared_experts=2 base_moe_mlp_dim=2048 '
        'routed_score_func=sigmoid routed_bias=true norm_topk_prob=true remat_policy=full '
        f'num_vocab_tiling=4 {splash_blocks(512)}'
    ),
    'llama3_8b@v5p:4x4x4': (
        'model_name=llama3.1-8b compile_topology=v5p-128 ici_fsdp_parallelism=64 '
        'per_device_batch_size=8 max_target_length=8192 remat_policy=full num_vocab_tiling=8 '
        f'{splash_blocks(1024)}'
    ),
}


def define_flags() -> None:
    flags.DEFINE_list('programs', list(PROGRAMS), 'CONFIG@TOPOLOGY of ours to compile.')
    flags.DEFINE_string('peer', 'maxtext', "What to compare with: 'maxtext', or '' for nothing.")
    flags.DEFINE_string('child', '', 'For the processes that it starts: a program of PROGRAMS.')
    flags.DEFINE_string('out', '', 'For those: the file to write.')


def measure() -> list[common.Figures]:
    """Returns a row for each program and project."""
    unknown = sorted(set(FLAGS.programs) - set(PROGRAMS))
    if unknown or FLAGS.peer not in ('', 'maxtext'):
        raise ConfigError(
            f'--programs={",".join(FLAGS.programs)} --peer={FLAGS.peer}: programs are '
            f"{', '.join(PROGRAMS)}, and the peer 'maxtext' or ''"
        )
    if FLAGS.child:
        compile_maxtext(FLAGS.child, FLAGS.out)
        return [{'program': FLAGS.child, 'by': 'maxtext'}]
    if FLAGS.peer:
        check_peer()
    rows = []
    for program in FLAGS.programs:
        ours = compile_ours(program)
        rows.append(ours)
        if FLAGS.peer:
            peer = read_maxtext(program)
            ours['ratio'] = ours['step_ms'] / peer['step_ms']
            rows.append(peer | {'ratio': 1.0})
    return rows


def check_peer() -> None:
    """Raises ConfigError unless MaxText can be imported."""
    if importlib.util.find_spec('maxtext') is None:
        raise ConfigError(
            f"maxtext cannot be imported: pip install '{MAXTEXT}', which takes Python 3.12 or "
            f"later, or give --peer='' for the project's own step alone"
        )


def row(program: str, by: str, seconds: float, memory: float, cost: Cost) -> common.Figures:
    """Returns the figures of a program that a compiler took so many seconds for."""
    network, chip = cost.total(), program.partition('@')[2].partition(':')[0]
    return {
        'program': program,
        'by': by,
        'step_ms': 1e3 * (cost.seconds + network.exposed),
        'compute_ms': 1e3 * cost.seconds,
        'attention_ms': 1e3 * cost.kernel_seconds,
        'network_ms': 1e3 * network.seconds,
        'waited_ms': 1e3 * network.exposed,
        'unpriced': int(cost.unpriced),
        'GB': memory / 1e9,
        'chip_GB': CHIPS[chip].memory / 1e9,
        'compile_s': seconds,
    }


def compile_ours(program: str) -> common.Figures:
    """Compiles the project's step."""
    name, _, topology = program.partition('@')
    _, config = load_config(name)
    validate(config, len(topology_devices(topology)))
    chip = CHIPS[topology.partition(':')[0]]
    found = compile_step(config, topology, chip)
    if found.cost is None:
        raise ConfigError(f'the compiler does not print the program of {program}: {found.why}')
    return row(program, 'ours', found.seconds, found.peak, found.cost)


def compile_maxtext(program: str, out: str) -> None:
    """Compiles MaxText's step, and writes its text and memory to a file, as JSON."""
    from maxtext.trainers.pre_train import train_compile

    def save(compiled, name: str) -> None:
        m = compiled.memory_analysis()
        new = m.output_size_in_bytes - m.alias_size_in_bytes
        memory = m.argument_size_in_bytes + m.temp_size_in_bytes + new
        pathlib.Path(name).write_text(json.dumps({'text': compiled.as_text(), 'memory': memory}))

    train_compile.save_compiled = save
    base = pathlib.Path(train_compile.__file__).parents[2] / 'configs' / 'base.yml'
    with contextlib.redirect_stdout(sys.stderr):
        train_compile.main([
            'train_compile', str(base), 'run_name=x', f'base_output_directory={out}.d',
            'enable_checkpointing=false', 'jax_cache_dir=', 'compile_topology_num_slices=1',
            f'compile_xla_flags={OPTIONS}', f'compiled_trainstep_file={out}',
            *PROGRAMS[program].split(),
        ])  # fmt: skip


def read_maxtext(program: str) -> common.Figures:
    """Compiles MaxText's step in a process of its own, and reads its text."""
    name, _, topology = program.partition('@')
    environment = {
        'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, 'program.json')
        line = [sys.executable, os.path.abspath(__file__), f'--child={program}', f'--out={out}']
        start = time.perf_counter()
        done = subprocess.run(
            line, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode or not os.path.exists(out):
            raise ConfigError(
                f'MaxText did not compile {program}; its last words are\n{done.stderr[-2000:]}'
            )
        found = json.loads(pathlib.Path(out).read_text())
    mesh = make_mesh(load_config(name)[1].mesh, topology_devices(topology))
    cost = read_cost(found['text'], mesh, CHIPS[topology.partition(':')[0]])
    return row(program, 'maxtext', seconds, found['memory'], cost)


if __name__ == '__main__':
    define_flags()
    common.run(measure)
