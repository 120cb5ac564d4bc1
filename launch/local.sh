#!/usr/bin/env bash
# Trains on one machine; the same command goes on where it stopped.
#
#   launch/local.sh --config=configs/mkd_cityscapes.py:1_8 --workdir=W --config.data.root=DIR
#   PROCESSES=4 launch/local.sh ...
#
# Prerequisites: pip install -e . (with GPUs: '.[cuda]'), and the repository as working directory.
# Cost: your machine's. One process takes all GPUs, or all CPU cores, and is the simplest.
#   PROCESSES=N starts N that share every batch, each with a GPU of its own; try it where a single
#   Python cannot feed them all. Batch sizes must be multiples of the number of devices.
# Ctrl-C and SIGTERM save, then leave with exit code 130 or 143. PYTHON=... picks the interpreter.
set -euo pipefail

python=${PYTHON:-python}
processes=${PROCESSES:-1}

if ((processes == 1)); then
  exec "$python" -m jaxssl.main "$@"
fi

free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
port=$("$python" -c "$free_port")
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes

pids=()
for ((rank = 0; rank < processes; rank++)); do
  JAX_PROCESS_ID=$rank JAX_LOCAL_DEVICE_IDS=$rank "$python" -m jaxssl.main "$@" &
  pids+=("$!")
done
# Processes in the background of a script do not hear Ctrl-C; SIGTERM makes them save.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM

code=0
for pid in "${pids[@]}"; do
  while :; do
    status=0
    wait "$pid" || status=$?
    # A trapped signal ends the wait, but not the process.
    kill -0 "$pid" 2>/dev/null || break
  done
  ((status == 0)) || code=$status
done
exit "$code"
