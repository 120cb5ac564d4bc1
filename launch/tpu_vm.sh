#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one host or a pod, through preemptions; the same command goes on.
#
#   NAME=mkd ZONE=europe-west4-b TYPE=v5litepod-8 BUCKET=my-bucket launch/tpu_vm.sh \
#       --config=configs/mkd_cityscapes.py:1_8,r101 --workdir=bucket/mkd \
#       --config.data.root=bucket/cityscapes
#
# Prerequisites: gcloud, logged in, with a project that has TPU quota in ZONE; a Cloud Storage
#   bucket with hierarchical namespace, as checkpoints rely on directories being renamed at once.
#   It is mounted as the folder `bucket` of every worker's home, which relative paths start from.
# Cost: that of the TPU, per chip and hour, from its creation until it is deleted; a v5litepod-8 is
#   of the order of ten dollars an hour, about half of that as spot. It is deleted when the run is
#   done (KEEP=1 keeps it) but not after an error: the last line then says how to delete it.
# SPOT=0 asks for a TPU that is not preempted; RUNTIME picks the software version of the VM.
set -euo pipefail

: "${NAME:?set NAME, of the TPU}" "${ZONE:?set ZONE, such as europe-west4-b}"
: "${TYPE:?set TYPE, such as v5litepod-8}" "${BUCKET:?set BUCKET, that holds data and workdir}"
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
poll=${POLL_SECONDS:-30}
spot=()
if ((${SPOT:-1})); then spot=(--spot); fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
delete() { queued delete --force --quiet; }
state() { queued describe --format='value(state.state)' 2>/dev/null || echo ABSENT; }
on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

wait_until_active() {
  while :; do
    case $(state) in
      ACTIVE) return ;;
      ABSENT)
        queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$runtime" \
          ${spot[@]+"${spot[@]}"}
        ;;
      SUSPENDED | FAILED) delete ;; # preempted, or never granted
    esac
    sleep "$poll"
  done
}

install() {
  local archive
  archive=$(mktemp -d)/jaxssl.tar.gz
  tar -C "$root" -czf "$archive" jaxssl configs pyproject.toml README.md LICENSE
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:" --zone="$ZONE" --worker=all
  on_all_workers "set -e
    tar -xzf jaxssl.tar.gz
    python3 -m pip install --quiet --user uv
    test -d env || python3 -m uv venv --quiet --python=3.12 env
    python3 -m uv pip install --quiet --python=env/bin/python '.[tpu]'
    mkdir -p bucket
    mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket"
  rm -r "${archive%/*}"
}

# A connection that broke may have left a process behind, and only one can have the TPU.
run() {
  on_all_workers "pkill -f '^env/bin/python -m'
    while pgrep -f '^env/bin/python -m' >/dev/null; do sleep 1; done
    env/bin/python -m jaxssl.main --config.distributed=on $(printf '%q ' "$@")"
}

while :; do
  wait_until_active
  set +e
  (
    set -e
    install
    run "$@"
  )
  code=$?
  set -e
  if ((code == 0)); then break; fi
  sleep "$poll" # what preempts a TPU takes a while to say so
  if [[ $(state) == ACTIVE ]]; then
    echo "The run ended with code $code; the same command goes on. The TPU still costs. Delete it:" \
      "gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force" >&2
    exit "$code"
  fi
done
if ((!${KEEP:-0})); then delete; fi
