#!/usr/bin/env bash
# Trains on a Slurm cluster; the same command, or the job when Slurm starts it again, goes on.
#
#   sbatch launch/slurm.sh --config=configs/mkd_cityscapes.py:1_8 --workdir=W --config.data.root=DIR
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 launch/slurm.sh ...
#
# Prerequisites: jaxssl installed ('.[cuda]') in the environment that sbatch is called from, the
#   repository as working directory, workdir and data on a file system that all nodes see. Add
#   --account and --partition as your cluster wants them.
# Cost: what the options below reserve, one GPU for up to a day, and again each time that the job is
#   requeued until the run is done. Several nodes need one task per GPU; a single node may also do
#   with one task, which then takes all its GPUs.
# Three minutes before the time limit the run saves and the job goes back into the queue; when it
#   is preempted it saves, too, if the cluster leaves it the time. After `scancel` it stays out.
#SBATCH --job-name=jaxssl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# In a step of several tasks the program joins the others by itself. GPUs are not bound to tasks,
# because jax takes the one with the task's local number.
srun --kill-on-bad-exit=1 --gpu-bind=none "${PYTHON:-python}" -m jaxssl.main "$@" &
step=$!
time_is_up=0
# srun hands signals on to its tasks.
trap 'time_is_up=1; kill -TERM "$step" 2>/dev/null || true' USR1
# When the job is preempted or canceled, Slurm signals the tasks itself; wait until they have saved.
trap ':' TERM

while :; do
  code=0
  wait "$step" || code=$?
  # A trapped signal ends the wait, but not the step.
  kill -0 "$step" 2>/dev/null || break
done
if ((time_is_up && code != 0)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
