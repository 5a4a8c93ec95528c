"""Flags of Megatron-LM that do not become settings, and why; the others are in `megatron_args`."""

IMPOSSIBLE = {  # each makes a model that there is none of here
    "num-experts": "mixtures of experts are not there",
    "glu-linear-offset": "gates have no offset",
    "activation-func-clamp-value": "activations are not clamped",
    "multi-latent-attention": "multi-latent attention is not there",
    "mtp-num-layers": "heads that predict several tokens are not there",
    "heterogeneous-layers-config-path": "layers are all alike",
    "heterogeneous-layers-config-encoded-json": "layers are all alike",
    "hybrid-layer-pattern": "layers of state-space models are not there",
    "hybrid-override-pattern": "layers of state-space models are not there",
    "is-hybrid-model": "layers of state-space models are not there",
    "experimental-attention-variant": "this attention is not there",
    "linear-attention-freq": "linear attention is not there",
    "attention-output-gate": "attention has no gate",
    "qk-l2-norm": "queries and keys have a learned norm, --qk-layernorm, or none",
    "quick-geglu": "the gates are SiLU, --swiglu, and GELU",
    "rotary-interleaved": "halves of a head rotate, not neighbours",
    "use-mup": "set model.attention_scale, logit_scale and init_std by its rules",
    "enable-hyper-connections": "hyper-connections are not there",
    "decoder-num-layers": "only decoders are converted, no T5",
    "decoder-seq-length": "only decoders are converted, no T5",
    "vocab-extra-ids": "only decoders are converted, no T5",
    "bert-no-binary-head": "only decoders are converted, no BERT",
    "bert-load": "only decoders are converted, no BERT",
    "retro-add-retriever": "retrieval is not there",
}
LAUNCHES = {  # scripts of other models
    "bert": "a BERT", "t5": "a T5", "mamba": "a state-space model", "hybrid": "a hybrid model",
    "vlm": "a model of images", "vision": "a model of images", "ict": "a retriever",
    "retro": "a retriever", "mimo": "a model of several media",
}  # fmt: skip

LOST = {  # what a run without it is another for, and what is there instead
    "fp16": "bfloat16 is used, which needs no loss scale",
    "loss-scale": "bfloat16 needs none",
    "initial-loss-scale": "bfloat16 needs none",
    "min-loss-scale": "bfloat16 needs none",
    "loss-scale-window": "bfloat16 needs none",
    "hysteresis": "bfloat16 needs none",
    "fp8-format": "bfloat16 is used",
    "fp8-recipe": "bfloat16 is used",
    "fp8-hybrid": "bfloat16 is used",
    "fp4-format": "bfloat16 is used",
    "grad-reduce-in-bf16": "gradients are summed in float32",
    "init-method-xavier-uniform": "weights start normal, with model.init_std",
    "embedding-init-method-std": "all weights start with model.init_std",
    "fp32-residual-connection": "the residual stream has model.dtype",
    "apply-residual-connection-post-layernorm": "what a block adds to is not normed",
    "decoupled-min-lr": "every weight's rate ends at the same share of its peak",
    "lr-warmup-init": "warm-up starts from 0",
    "override-opt-param-scheduler": "a resumed run keeps its schedule",
    "override-opt_param-scheduler": "a resumed run keeps its schedule",
    "use-checkpoint-opt_param-scheduler": "a resumed run keeps its schedule",
    "rampup-batch-size": "newer Megatron-LM ignores it; set train.batch_schedule='0:32 1B:64 ...'",
    "decrease-batch-size-if-needed": "train.global_batch_size has to divide",
    "test-data-path": "a run evaluates on validation data only",
    "data-args-path": "set data.path to a file with the blend",
    "per-split-data-args-path": "set data.path and data.valid_path",
    "mock-data": "the built-in corpus is used",
    "sft": "set data.objective='chat' and data.path to a .jsonl",
    "yaml-cfg": "this file is not read; convert flags",
    "exit-interval": "end a run by train.steps",
    "exit-duration-in-mins": "let the cluster send SIGTERM: a run then saves and ends with 75",
    "skip-train": "`mlm-jax evaluate` evaluates",
    "save-retain-interval": "checkpoint.keep newest are kept",
    "non-persistent-save-interval": "checkpoint.every is for all",
    "no-save-optim": "checkpoints hold all of a run",
    "no-save-rng": "checkpoints hold all of a run",
    "no-load-optim": "weights alone: init_from, as with --finetune",
    "no-load-rng": "dropout depends on train.seed and the step alone",
    "ckpt-step": "give its iter_ folder to `convert from-megatron`",
    "iterations-to-skip": "steps are not left out by number",
    "decoder-first-pipeline-num-layers": "stages have equally many layers",
    "decoder-last-pipeline-num-layers": "stages have equally many layers",
    "account-for-embedding-in-pipeline-split": "stages have equally many layers",
    "account-for-loss-in-pipeline-split": "stages have equally many layers",
    "pipeline-model-parallel-layout": "stages have equally many layers",
    "distribute-saved-activations": "set layout.sequence_parallel instead",
    "recompute-modules": "selective keeps matrix products and recomputes the rest",
    "optimizer-cpu-offload": "optimizer state stays on devices; layout.zero=1 or fsdp splits it",
    "main-grads-dtype": "gradients are float32",
    "main-params-dtype": "parameters are float32",
    "exp-avg-sq-dtype": "second moments are float32",
    "head-lr-mult": "set optimizer.head_lr_scale",
    "check-for-spiky-loss": "losses are not compared; non-finite steps are left out",
    "full-validation": "set train.eval_batches",
    "fim-split-sample": "every document may be rearranged",
    "fim-fragment-rate": "every document may be rearranged",
    "fim-no-prefix": "every document may be rearranged",
    "lora-rank": "all weights are trained",
}

NEEDLESS = {
    "XLA chooses kernels and what to fuse": """
        transformer-impl use-mcore-models use-legacy-models attention-backend use-flash-attn
        no-masked-softmax-fusion no-bias-dropout-fusion no-bias-swiglu-fusion
        no-gradient-accumulation-fusion no-persist-layer-norm no-rope-fusion apply-rope-fusion
        cross-entropy-loss-fusion cross-entropy-fusion-impl enable-cuda-graph cuda-graph-impl
        cuda-graph-scope cuda-graph-warmup-steps external-cuda-graph bias-swiglu-fusion
        te-rng-tracker inference-rng-tracker empty-unused-memory-level manual-gc manual-gc-interval
        manual-gc-eval no-mmap-bin-files no-create-attention-mask-in-dataloader
        create-attention-mask-in-dataloader""",
    "XLA plans communication; see train.xla": """
        overlap-grad-reduce overlap-param-gather overlap-param-gather-with-optimizer-step
        no-async-tensor-model-parallel-allreduce async-tensor-model-parallel-allreduce
        ddp-bucket-size ddp-num-buckets ddp-average-in-collective
        ddp-pad-buckets-for-high-nccl-busbw
        distributed-backend distributed-timeout-minutes use-ring-exchange-p2p DDP-impl
        no-overlap-p2p-communication overlap-p2p-communication-warmup-flush tp-comm-overlap
        tp-comm-overlap-cfg disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs
        defer-embedding-wgrad-compute wgrad-deferral-limit delay-wgrad-compute align-grad-reduce
        align-param-gather num-distributed-optimizer-instances nccl-communicator-config-path
        use-tp-pp-dp-mapping use-nccl-ub high-priority-stream-groups nccl-ub lazy-mpu-init
        empty-init local-rank no-align-grad-reduce microbatch-group-size-per-virtual-pipeline-stage
        init-model-with-meta-device fsdp-double-buffer use-sharp outer-dp-sharding-strategy""",
    "it is always so here": """
        attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32 exit-signal-handler
        use-cpu-initialization calculate-per-token-loss no-check-for-nan-in-loss-and-grad
        check-for-nan-in-loss-and-grad deterministic-mode no-query-key-layer-scaling
        exit-on-missing-checkpoint verify-integrity data-parallel-random-init
        no-data-sharding
        ckpt-assume-constant-structure""",
    "it changes numbers of fp16 only": "apply-query-key-layer-scaling",
    "tables have their rows rounded up to 128, whatever the mesh": """
        make-vocab-size-divisible-by padded-vocab-size""",
    "a workdir has its place, and Orbax its format": """
        save ckpt-format dist-ckpt-format use-dist-ckpt async-save auto-detect-ckpt-format
        ckpt-fully-parallel-save ckpt-fully-parallel-load no-ckpt-fully-parallel-save
        dist-ckpt-strictness dist-ckpt-workers ckpt-convert-format ckpt-convert-save async-strategy
        dist-ckpt-optim-fully-reshardable use-persistent-ckpt-worker log-progress""",
    "it is always told; see metrics.jsonl and tensorboard/": """
        tensorboard-dir tensorboard-log-interval tensorboard-queue-size log-throughput
        timing-log-level timing-log-option log-timers-to-tensorboard log-memory-to-tensorboard
        log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard
        log-validation-ppl-to-tensorboard log-world-size-to-tensorboard log-num-zeros-in-grad
        log-batch-size-to-tensorboard no-log-learnig-rate-to-tensorboard log-straggler
        no-log-loss-scale-to-tensorboard log-energy log-memory-interval log-device-memory-used
        logging-level wandb-exp-name wandb-save-dir wandb-entity one-logger-project
        one-logger-run-name enable-one-logger disable-one-logger app-tag-run-name""",
    "profiling and faults have ways of their own here": """
        profile profile-step-start profile-step-end profile-ranks use-pytorch-profiler nvtx-ranges
        record-memory-history memory-snapshot-path rerun-mode enable-ft-package error-injection-rate
        adlr-autoresume adlr-autoresume-interval inprocess-restart calc-ft-timeouts""",
    "loading data takes care of itself": """
        num-workers num-dataset-builder-threads tokenizer-type legacy-tokenizer
        tokenizer-prompt-format tokenizer-hf-include-special-tokens
        tokenizer-hf-use-fast dataloader-fast-cache-load""",
}
WHY_NEEDLESS = {flag: why for why, flags in NEEDLESS.items() for flag in flags.split()}

PREFIXES = {  # of flags that belong to something that is not there
    "moe-": "there are no experts", "expert-": "there are no experts", "fp8-": "bfloat16 is used",
    "fp4-": "bfloat16 is used", "muon-": "Muon has the settings of optimizer.name='muon'",
    "mtp-": "one token is predicted", "mamba-": "there are no state-space layers",
    "rl-": "there is no reinforcement learning", "inference-": "it is for serving alone",
    "bert-": "it is for BERT alone", "retro-": "there is no retrieval",
    "log-": "metrics.jsonl has its own rows",
}  # fmt: skip
