#!/usr/bin/env bash
# Several processes of one run on this machine: bash launch/local.sh N -- COMMAND...
#   DEVICES=8 bash launch/local.sh 2 -- mlm-jax train --config quickstart --workdir runs/two
# DEVICES: CPU devices over all processes; without it each process has its share of the GPUs (of
# those in CUDA_VISIBLE_DEVICES, where that is set), or one CPU device where there are none.
# Ctrl-C, SIGTERM and the end of the terminal (as SIGTERM) reach every process. The exit status is
# that of the first process that failed, else 75 where some stopped on request. Processes that
# outlive a failed one by 1 s are asked to end, by 10 s killed.
set -uo pipefail
if [ $((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1])) -lt 501 ]; then
  echo "local.sh: bash 5.1 or newer is needed; this is $BASH_VERSION" >&2
  exit 2
fi
set -m  # processes are groups of their own: Ctrl-C comes here, and is passed on once
n=${1:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]] || [ "${2:-}" != -- ] || [ $# -lt 3 ]; then
  echo "usage: [DEVICES=D] bash launch/local.sh N -- COMMAND..." >&2
  exit 2
fi
shift 2
if ! [[ ${DEVICES:-$n} =~ ^[1-9][0-9]*$ ]] || [ $((${DEVICES:-$n} % n)) -ne 0 ]; then
  echo "local.sh: DEVICES=$DEVICES cannot be shared by $n processes; try DEVICES=$((n * 2))" >&2
  exit 2
fi
if ! command -v -- "$1" >/dev/null; then
  echo "local.sh: $1: command not found" >&2
  exit 127
fi
free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
export MLM_JAX_COORDINATOR=127.0.0.1:$("${PYTHON:-python3}" -c "$free") MLM_JAX_PROCESSES=$n
gpus=0
if [ -z "${DEVICES:-}" ] && [ "${JAX_PLATFORMS:-cuda}" != cpu ]; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
  if [ "$gpus" -gt 0 ] && [ "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  fi
fi
if [ $((gpus % n)) -ne 0 ]; then
  fit=$(for ((i = 1; i <= gpus; i++)); do [ $((gpus % i)) -eq 0 ] && echo -n " $i"; done)
  echo "local.sh: $gpus GPUs cannot be shared by $n processes; try one of$fit processes," \
    "other CUDA_VISIBLE_DEVICES, or DEVICES=$n for CPU devices" >&2
  exit 2
fi
if [ "$gpus" -eq 0 ]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$((${DEVICES:-$n} / n))
fi

exec 3>&2 2>/dev/null  # or bash itself tells of each job that ends by a signal
pids=()
for ((i = 0; i < n; i++)); do
  share=$((gpus / n))
  if [ $share -gt 0 ]; then
    export JAX_LOCAL_DEVICE_IDS=$(seq -s , $((i * share)) $((i * share + share - 1)))
  fi
  MLM_JAX_PROCESS=$i "$@" 2>&3 3>&- &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM HUP
trap 'kill -INT "${pids[@]}"' INT

first=0
while [ ${#pids[@]} -gt 0 ]; do
  wait -n -p ended "${pids[@]}"; status=$?
  if [ -z "${ended:-}" ]; then  # a signal was passed on, or bash 5.2 has missed one of two that ended
    for pid in "${pids[@]}"; do kill -0 "$pid" || ended=$pid; done
    [ "${ended:-}" ] || continue
    wait "$ended"; status=$?
  fi
  for i in "${!pids[@]}"; do [ "${pids[i]}" = "$ended" ] && unset "pids[i]"; done
  if [ $status -ne 0 ] && { [ $first -eq 0 ] || [ $first -eq 75 ]; }; then
    first=$status
    if [ $status -ne 75 ] && [ ${#pids[@]} -gt 0 ]; then
      (sleep 1; kill -TERM "${pids[@]}"; sleep 9; kill -KILL "${pids[@]}") 3>&- &
      last_resort=$!
    fi
  fi
done
[ "${last_resort:-}" ] && kill -- "-$last_resort"
exit $first
