#!/bin/bash
# Llama 3.1 8B on one node, in the manner of Megatron-LM's examples
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
CHECKPOINT_PATH=${1:-"checkpoints/llama3_8b"}
TOKENIZER_ARG=${2:-"tokenizers/llama3"}
DATA_ARG="0.7 data/web_text_document 0.3 data/code_text_document"
GPUS_PER_NODE=8
NUM_NODES=${NUM_NODES:-2}
WORLD_SIZE=$((GPUS_PER_NODE * NUM_NODES))

TP_SIZE=2
CP_SIZE=2
NUM_LAYERS=32

DISTRIBUTED_ARGS=(--nproc_per_node $GPUS_PER_NODE --nnodes $NUM_NODES)

MODEL_ARGS=(
    --use-mcore-models
    --num-layers $NUM_LAYERS
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length 8192
    --max-position-embeddings 131072
    --position-embedding-type rope
    --rotary-base 500000
    --rotary-percent 1.0
    --use-rope-scaling
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --swiglu
    --normalization RMSNorm
    --init-method-std 0.0134
    --untie-embeddings-and-output-weights
    --disable-bias-linear
    --attention-backend fused
    --apply-layernorm-1p
)

TRAINING="--micro-batch-size 1 --global-batch-size 128 --train-samples 1953125 \
    --lr-decay-samples 1949218 --lr-warmup-samples 3906 --lr 0.00015 --min-lr 0.00001 \
    --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 \
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 \
    --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1"

if [ -n "$FP8" ]; then
    MODEL_ARGS+=(--no-mmap-bin-files)
fi

torchrun "${DISTRIBUTED_ARGS[@]}" \
    pretrain_gpt.py \
    "${MODEL_ARGS[@]}" $TRAINING \
    --tensor-model-parallel-size ${TP_SIZE} --context-parallel-size ${CP_SIZE} \
    --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce \
    --data-path $DATA_ARG --split '99,1,0' --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model "$TOKENIZER_ARG" --vocab-size 128256 \
    --reset-attention-mask --reset-position-ids \
    --recompute-activations \
    --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 \
    --save "$CHECKPOINT_PATH" --ckpt-format torch_dist 2>&1 | tee log.txt
