"""Every field of a config, with its default and its meaning.

The other configs start here and set only what differs. A flag overrides any field:
--config.optimizer.peak_lr=3e-4. An `every` of 0 switches the thing off.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # for parameters, order of the data and dropout
    c.steps = 1000  # optimizer steps
    c.batch_size = 32  # sequences per optimizer step, over all devices
    c.seq_len = 256  # tokens per sequence
    c.microbatches = 1  # parts of a batch, whose gradients are accumulated
    # the two in steps, as in ('0:64', '500:256') or --config.schedule.seq_len=0:64,500:256: the
    # value after so many steps. The largest is that of batch_size or seq_len, which () has always
    c.schedule = h = ConfigDict()
    h.batch_size = ()
    h.seq_len = ()  # each divides seq_len
    c.compute_dtype = 'float32'  # for matmuls and residual stream: 'float32' | 'bfloat16'
    c.check_vma = True  # let shard_map check replication; most kernels of TPU and GPU need it off
    c.compiler_options = ''  # for the train step: 'name=value ...', over those of train_step.py

    c.model = m = ConfigDict()
    m.vocab_size = 4096  # at least the tokenizer's, and divisible by tp
    m.d_model = 256
    m.n_layers = 4
    # layers of a block: 'dense' | 'moe', or with an attention of their own, 'mla+moe', that may end
    # in _window and then _nope (no rotary part): 'gqa_window_nope+dense'. Blocks are scanned
    m.block = ('dense',)
    m.first_dense = 0  # dense layers before the first block, with its first layer's attention
    m.d_ff = 768  # hidden size of a dense layer's SwiGLU
    # 'compute': matmuls of the layers' weights in compute_dtype | 'fp8': in 8 bits, with scales of
    # their own (H100, B200, TPU7x); a CPU computes the same, slower
    m.matmul_type = 'compute'
    m.n_experts = 8  # moe: routed experts
    m.experts_per_token = 2
    m.n_shared_experts = 1  # moe: experts that every token meets; 0 for none
    m.d_expert = 256  # moe: hidden size of an expert's SwiGLU
    # 'blocks' (any platform) | 'ragged_dot' (TPU) | 'pallas' (GPU, check_vma off) | 'auto': the
    # platform's if check_vma allows it, else blocks | 'megablox' (TPU, check_vma off)
    m.expert_kernel = 'auto'
    m.router = 'sigmoid'  # 'sigmoid' (DeepSeek-V3) | 'softmax'
    m.normalize_weights = True  # scale the chosen experts' scores so that they add up to 1
    m.routed_scale = 1.0  # factor on the routed experts' output
    m.n_expert_groups = 1  # groups of experts; a token's experts are in its best n_top_groups
    m.n_top_groups = 1
    m.group_score = 'top2'  # a group's: sum of its two best (DeepSeek-V3) | 'max' (DeepSeek-V2)
    m.router_bias = False  # a learned bias of the router's logits (gpt-oss)
    m.expert_bias = False  # learned biases of the routed experts' three matrices (gpt-oss)
    m.shared_gate = False  # the shared experts' output times a sigmoid of x·w (Qwen2-MoE)
    # 0: plain | else gpt-oss's SwiGLU, in all feed-forward: gate and up clipped to it, up + 1
    m.swiglu_limit = 0.0
    m.bias_rate = 1e-3  # step of the biases that balance the experts; 0 for none
    m.balance_loss = 0.0  # weight of the balance loss of each sequence
    m.router_z_loss = 0.0  # weight of the router's logsumexp squared
    m.capacity_factor = 0.0  # choices per expert and sequence, over an even spread; 0: all
    m.buffer_factor = 0.0  # rows per ep peer, over an even spread; 0: exact, room for all
    m.attention = 'mla'  # 'mla' | 'gqa' | linear in T: 'gdn' (Gated DeltaNet), 'kda' (Kimi's)
    m.n_heads = 4
    m.n_kv_heads = 4  # gqa: n_heads is multi-head, 1 is multi-query attention
    m.head_dim = 64  # gqa
    m.qk_norm = False  # gqa: RMSNorm of queries and keys
    m.qk_norm_over = 'head'  # gqa: each head by itself | 'heads': all of them together (OLMo 2)
    m.rotary_dim = 0  # gqa: the last numbers of a head, which rotate; 0: all (GLM-4.5: half)
    m.window = 0  # positions that a query of a _window layer sees, its own included
    m.attention_sinks = False  # a trained score per head, which takes its share (gpt-oss)
    m.attention_gate = False  # heads' outputs times the sigmoid of a projection (Qwen3-Next)
    m.attention_bias = 'none'  # gqa: biases of 'qkv' (Qwen2) | 'qkvo' (gpt-oss)
    m.norms = 'before'  # RMSNorm of each part's input | 'after': of its output (OLMo 2)
    m.q_rank = 0  # mla: size of the query's latent; 0: no latent
    m.kv_rank = 64  # mla: size of the latent of keys and values
    m.nope_dim = 32  # mla: head size of the part without position
    m.rope_dim = 32  # mla: head size of the rotary part
    m.v_dim = 64  # mla: head size of the value
    m.latent_norm_eps = 0.0  # mla: eps of the latents' norms, as 1e-6; 0: norm_eps
    m.delta_heads = 4  # gdn, kda: heads of values, each with a state of key size x value size
    m.delta_key_heads = 0  # gdn, kda: heads of queries and keys; 0: as many (Qwen3-Next: half)
    m.delta_key_dim = 64  # gdn, kda: head size of queries and keys
    m.delta_value_dim = 64  # gdn, kda: head size of values; of kda also the rank of its gates
    m.delta_conv = 4  # gdn, kda: positions that the short convolutions see, each its own included
    m.rope_base = 10000.0
    m.rope_scaling = 'none'  # 'none' | 'linear' | 'llama3' | 'yarn'
    m.rope_factor = 1.0  # context length over the original one
    m.rope_original_len = 256  # llama3 and yarn: the original context length
    m.rope_low_freq_factor = 1.0  # llama3: pairs that turn less often in it: slowed down, whole ...
    m.rope_high_freq_factor = 4.0  # ... those that turn more often: not at all
    m.rope_beta_fast = 32.0  # yarn: pairs that turn more often in that context stay as they are
    m.rope_beta_slow = 1.0  # yarn: those that turn less often are slowed down by the whole factor
    m.rope_mscale = 1.0  # yarn: sharpens the rotary part of heads by 0.1·mscale·ln(factor) + 1 ...
    m.rope_mscale_all_dim = 0.0  # yarn: ... over the same of this, which sharpens whole heads
    m.rope_attention_factor = 0.0  # yarn: factor on cosines and sines; 0: by the two mscales
    m.rope_truncate = True  # yarn: the first and last pair that are blended are rounded outwards
    # 'blockwise' (any platform) | 'splash' (TPU) | 'cudnn' (GPU) | 'auto': the platform's with
    # check_vma off, cuDNN's for bfloat16 and heads up to 128; else blockwise
    # | 'latent' (TPU): makes mla's heads itself, of short sequences
    m.attention_kernel = 'auto'
    # queries, and keys, of the block whose scores exist at a time; positions of linear layers
    m.attention_block = 256
    m.document_end = -1  # token that ends a document, for data.isolate_documents; -1: none
    m.tie_embeddings = True  # head and embedding share one matrix
    m.norm_eps = 1e-6
    m.dropout = 0.0  # of embedding, attention and feed-forward outputs
    m.z_loss = 0.0  # weight of logsumexp squared in the loss
    m.loss_chunk = 1024  # tokens per device whose logits exist at a time
    m.remat = 'none'  # backward recomputes: 'none' | 'dots' (all but the matmuls) | 'full' (all)
    # 'full': kept all the same: 'attention' | 'qkv' | 'residual' | 'hidden' | 'experts': outputs
    m.remat_keep = ()
    m.remat_offload = ()  # 'full': the same, kept in host memory (TPU, GPU)

    # sizes of the axes that parallel.py explains; their product is the number of devices
    c.mesh = ConfigDict({'pp': 1, 'dp': 1, 'fsdp': 1, 'ep': 1, 'cp': 1, 'tp': 1})
    # over cp, keys and values travel 'ring': from device to device | 'gather': to all, at once
    c.cp_style = 'ring'

    # fsdp gathers the weights of one 'layer' at a time, for each pass of a microbatch (forward,
    # backward, and with stages the second forward) | all weights once for the whole 'step'
    c.fsdp_gather = 'layer'
    # gradients are summed over fsdp by 'reduce_scatter' | 'all_to_all', with sums in float32, which
    # TPUs run beside compute
    c.fsdp_reduce = 'reduce_scatter'
    c.pipeline = ConfigDict()
    c.pipeline.schedule = '1f1b'  # 'gpipe' | '1f1b' | 'interleaved' | 'zero_bubble'; for pp > 1
    c.pipeline.chunks = 1  # interleaved: virtual stages per stage
    c.pipeline.clock = 'lock_step'  # zero_bubble is laid out for it; or 'free_running'

    c.data = d = ConfigDict()
    # folder that data.py wrote; 'stdlib' prepares the Python standard library; 'megatron:PREFIX',
    # 'llmc:FILES', 'nanogpt:FILE,dtype=uint16': token files as they lie, with data.tokenizer
    d.path = ''
    d.sources = ()  # or several: ((name, path, weight), ...); rows in the ratio of the weights
    # 'stream': windows of the tokens as they stand | 'best_fit': whole documents, those that fit a
    # window; the rest of it is padding. With isolate_documents
    d.packing = 'stream'
    d.max_documents = 0  # best_fit: the most documents of a window; 0: as many as fit
    d.isolate_documents = False  # attention stays within a document; positions restart in each
    d.tokenizer = 'vocab/stdlib-4096.tiktoken'  # for 'stdlib', token files; a folder has its own

    c.optimizer = o = ConfigDict()
    o.name = 'adamw'  # 'adamw' | 'muon' (for matrices inside layers, and AdamW for the rest)
    o.lr_schedule = 'cosine'  # of the learning rate: 'cosine' | 'wsd' (warmup, stable, decay)
    o.peak_lr = 1e-3
    o.final_lr = 1e-4
    o.warmup_steps = 100
    o.decay_steps = 200  # wsd: the last steps, in which the rate falls; at most all after warmup
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # for matrices only
    o.cautious_decay = False  # decay numbers only where the update moves them to zero as well
    o.clip_norm = 1.0  # largest norm of the whole gradient; 0 never clips
    o.ema = 0.0  # decay of averaged weights, as in 0.999: see eval.averaged; 0: none are kept
    o.muon = u = ConfigDict()  # with name = 'muon'
    u.momentum = 0.95
    u.nesterov = True
    u.split_heads = False  # take each attention head for a matrix, not all of them together
    u.steps = 5  # of Newton-Schulz
    u.coefficients = 'jordan'  # of its steps: 'jordan' | 'polar_express'
    u.scale = 'rms'  # of updates: 'rms' (as large as AdamW's: same rates) | 'spectral'
    u.adamw_lr = 0.0  # peak rate of what AdamW updates, by the same schedule; 0: peak_lr
    u.replicas = 'repeat'  # copies of a shard compute the same | 'split': each a part, then gather
    u.dtype = 'auto'  # of Newton-Schulz: 'float32' | 'bfloat16' | 'auto': float32 on CPU only

    c.eval = e = ConfigDict()
    e.every = 200  # steps
    e.batches = 0  # 0: the whole validation split
    e.tasks = ()  # task files, as ('tasks/python.jsonl',): see docs/tasks.md
    e.tasks_every = 200  # steps
    e.averaged = False  # evaluate, and sample from, the averaged weights that optimizer.ema keeps

    c.log = g = ConfigDict()
    g.every = 10  # steps
    g.writers = ()  # besides metrics.jsonl: 'tensorboard' | 'wandb'
    g.wandb_project = 'jaxformer'
    g.plot = False  # draw WORKDIR/metrics.png when the run ends
    g.loads_every = 100  # steps; moe: each expert's fraction of the choices
    g.sample_every = 0  # steps; completions of the prompts, to the terminal and metrics.jsonl
    g.prompts = ('def ',)
    g.sample_tokens = 64  # at most, per completion
    g.sample_temperature = 0.0  # 0 takes the likeliest token

    c.checkpoint = k = ConfigDict()
    k.every = 200  # steps; also at the last step, and on SIGTERM and SIGINT
    k.keep = 2  # number of newest ones; 0 keeps all
    k.keep_every = 0  # steps; multiples of it are kept for ever; 0: none

    c.guard = u = ConfigDict()
    u.nonfinite = True  # skip a step whose gradient norm is not finite
    u.spike_factor = 10.0  # and one whose norm exceeds this many times the geometric mean; 0: none
    u.history = 100  # steps of that mean; until there are as many, no norm is too large
    u.max_skips = 20  # skipped steps in a row, after which the run stops; 0: never
    u.step_seconds = 900.0  # time without a finished step, after which the process ends; 0: never
    u.pause_seconds = 7200.0  # the same for a start, compilation, evaluation, samples or a save
    u.heartbeat_seconds = 100  # silence of one of several processes, after which the others end

    c.chip = 'cpu'  # for plan.py: 'cpu', or a chip of machine/chips.py: 'v5p' | 'h100' | ...
    c.compilation_cache = ''  # a folder or URL that keeps compiled programs
    c.peak_flops = 0.0  # FLOP/s of one device, for MFU; 0: looked up; a CPU is measured
    return c.lock()
