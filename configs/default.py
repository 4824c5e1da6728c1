"""Every field that there is, with its meaning. The other configs start here and set only what
differs; a flag overrides any of them: --config.optimizer.peak_lr=3e-4

An `every` of 0 switches the thing off.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of parameters, order of the data and dropout
    c.steps = 1000  # optimizer steps
    c.batch_size = 32  # sequences an optimizer step, over all devices
    c.seq_len = 256  # tokens a sequence
    c.microbatches = 1  # parts of a batch, one after the other, gradients accumulated
    c.compute_dtype = 'float32'  # of matmuls and residual stream: 'float32' | 'bfloat16'
    c.check_vma = True  # let shard_map check replication; the attention kernels need it off
    c.compiler_options = ''  # of the train step, 'name=value ...', over those of train_step.py

    c.model = m = ConfigDict()
    m.vocab_size = 4096  # at least the tokenizer's, and divisible by tp
    m.d_model = 256
    m.n_layers = 4
    m.block = ('dense',)  # layers of a block, 'dense' | 'moe'; blocks are stacked and scanned
    m.first_dense = 0  # dense layers before the first block
    m.d_ff = 768  # hidden size of a dense layer's SwiGLU
    m.n_experts = 8  # moe: routed experts
    m.experts_per_token = 2
    m.n_shared_experts = 1  # moe: experts that every token meets; 0 for none
    m.d_expert = 256  # moe: hidden size of an expert's SwiGLU
    m.expert_kernel = 'auto'  # 'blocks' (CPU) | 'ragged_dot' (TPU) | 'pallas' (GPU) | 'auto': the
    # platform's, on GPU with check_vma off, else blocks
    m.router = 'sigmoid'  # 'sigmoid' (DeepSeek-V3) | 'softmax'
    m.normalize_weights = True  # the chosen experts' scores are made to add up to 1
    m.routed_scale = 1.0  # times the routed experts' output
    m.n_expert_groups = 1  # a token's experts come from its best n_top_groups of these
    m.n_top_groups = 1
    m.bias_rate = 1e-3  # a step's move of the biases that balance the experts; 0 for none
    m.balance_loss = 0.0  # weight of the balance loss of each sequence
    m.router_z_loss = 0.0  # weight of the router's logsumexp squared
    m.capacity_factor = 0.0  # choices an expert takes of a sequence, over an even spread; 0: all
    m.buffer_factor = 0.0  # rows sent to an ep peer, over an even spread; 0: exact, room for all
    m.attention = 'mla'  # 'mla' | 'gqa'
    m.n_heads = 4
    m.n_kv_heads = 4  # gqa: n_heads is multi-head, 1 is multi-query attention
    m.head_dim = 64  # gqa
    m.qk_norm = False  # gqa: RMSNorm of queries and keys
    m.q_rank = 0  # mla: query latent; 0 leaves the query whole
    m.kv_rank = 64  # mla: key/value latent
    m.nope_dim = 32  # mla: head size of the part without position
    m.rope_dim = 32  # mla: head size of the rotary part
    m.v_dim = 64  # mla: head size of the value
    m.rope_base = 10000.0
    m.rope_scaling = 'none'  # 'none' | 'linear' | 'yarn'
    m.rope_factor = 1.0  # context length over the original one
    m.rope_original_len = 256  # yarn: the context length that was trained first
    m.attention_kernel = 'auto'  # 'blockwise' | 'splash' (TPU) | 'cudnn' (GPU) | 'auto': the
    # platform's with check_vma off, and for cuDNN bfloat16 and heads up to 128; else blockwise
    m.attention_block = 256  # scores exist for a block of queries x keys at a time
    m.document_end = -1  # token that ends a document, for data.isolate_documents; -1: none
    m.tie_embeddings = True  # head and embedding share one matrix
    m.norm_eps = 1e-6
    m.dropout = 0.0  # of embedding, attention and feed-forward outputs
    m.z_loss = 0.0  # weight of logsumexp squared in the loss
    m.loss_chunk = 1024  # tokens whose logits exist at a time, on a device
    m.remat = 'none'  # what backward recomputes: 'none' | 'dots' (not the matmuls) | 'full'
    m.remat_keep = ()  # 'full': but not these, 'attention' | 'qkv' | 'residual' | 'hidden'
    m.remat_offload = ()  # 'full': nor these, which wait in host memory (TPU, GPU)

    c.mesh = ConfigDict({'pp': 1, 'dp': 1, 'fsdp': 1, 'ep': 1, 'tp': 1})

    # weights whole for one 'layer' at a time, gathered for each pass of a microbatch (forward,
    # backward, and with stages the forward again) | for the whole 'step'
    c.fsdp_gather = 'layer'
    c.pipeline = ConfigDict()
    c.pipeline.schedule = '1f1b'  # 'gpipe' | '1f1b' | 'interleaved' | 'zero_bubble'; for pp > 1
    c.pipeline.chunks = 1  # interleaved: parts of a stage, each a stage of its own on the ring

    c.data = d = ConfigDict()
    d.path = ''  # folder that data.py wrote; 'stdlib' prepares the Python standard library
    d.sources = ()  # several instead: ((name, path, weight), ...); weights are shares of the rows
    d.isolate_documents = False  # attention stays inside a document, where positions start anew
    d.tokenizer = 'vocab/stdlib-4096.tiktoken'  # for 'stdlib'; a folder brings its own

    c.optimizer = o = ConfigDict()
    o.name = 'adamw'  # optimizer.OPTIMIZERS
    o.schedule = 'cosine'  # 'cosine' | 'wsd'
    o.peak_lr = 1e-3
    o.final_lr = 1e-4
    o.warmup_steps = 100
    o.decay_steps = 200  # wsd: the last steps, over which the rate falls
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # of matrices
    o.clip_norm = 1.0  # of the gradient of the whole model; 0 never clips

    c.eval = ConfigDict({'every': 200, 'batches': 0})  # batches 0: all of the validation split

    c.log = g = ConfigDict()
    g.every = 10  # steps
    g.writers = ()  # besides metrics.jsonl: 'tensorboard' | 'wandb'
    g.wandb_project = 'jaxformer'
    g.plot = False  # draw WORKDIR/metrics.png when the run ends
    g.loads_every = 100  # steps; each expert's share of the choices, for moe
    g.sample_every = 0  # steps; continuations of the prompts, to the terminal and metrics.jsonl
    g.prompts = ('def ',)
    g.sample_tokens = 64  # a continuation, at most
    g.sample_temperature = 0.0  # 0 takes the likeliest token

    c.checkpoint = k = ConfigDict()
    k.every = 200  # steps; also at the last step, and on SIGTERM and SIGINT
    k.keep = 2  # the newest ones; 0 keeps all
    k.keep_every = 0  # steps whose multiples are kept for ever; 0: none

    c.guard = u = ConfigDict()
    u.nonfinite = True  # skip a step whose gradient norm is not finite
    u.spike_factor = 10.0  # and one whose norm is so many times the geometric mean; 0: none
    u.history = 100  # steps of that mean; before there are as many, no norm is too large
    u.max_skips = 20  # in a row, after which the run stops; 0: never
    u.step_seconds = 900.0  # without a finished step, after which the process ends; 0: never
    u.pause_seconds = 7200.0  # so for a start, compilation, evaluation, samples or a save
    u.heartbeat_seconds = 100  # missed by one of several processes, after which the others end

    c.chip = 'cpu'  # that plan.py plans for: 'cpu' | 'v4' | 'v5e' | 'v5p' | 'v6e' | 'h100' | ...
    c.compilation_cache = ''  # a folder or URL that keeps compiled programs for the next start
    c.peak_flops = 0.0  # of one device, for MFU; 0 looks the device up, or measures a CPU
    return c.lock()
