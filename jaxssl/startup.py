"""What a process does before it uses jax: join the others, and keep compiled programs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from jaxssl.config import Config
from jaxssl.contracts import UserError


def prepare_jax(config: Config) -> None:
    """Joins the other processes, and keeps compiled programs for the next start."""
    if config.distributed not in ("auto", "on", "off"):
        raise UserError(f"Unknown distributed={config.distributed!r}. There are: auto, on, off.")
    if config.distributed == "on" or (config.distributed == "auto" and has_peers(os.environ)):
        join_peers()
    keep_compiled(config)


def keep_compiled(config: Config) -> None:
    """Keeps compiled programs on disk for the next start, where the config says."""
    cache = config.compilation_cache
    if cache == "auto":
        home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        cache = os.path.expanduser(os.path.join(home, "jaxssl", "compilation"))
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", cache)


def has_peers(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes of a run.

    It does by JAX_COORDINATOR_ADDRESS (as `launch/local.sh` sets it), in a Slurm step of several
    tasks, under Open MPI's mpirun, and on a TPU pod of GKE. A TPU VM is silent about it:
    `launch/tpu_vm.sh` sets `config.distributed` to "on".
    """
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def join_peers() -> None:
    """Starts jax.distributed by what the environment says.

    Raises:
      UserError: the environment does not say enough, or the other processes did not come.
    """
    # TPU pods, Slurm and Open MPI 4 say all of this themselves; elsewhere these variables do.
    count, rank = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if rank is None else int(rank),
            # An error in one process ends all of them only after this; jax's default is 5 minutes.
            shutdown_timeout_seconds=30,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes of this run cannot join: {error} Start them by launch/local.sh, "
            "launch/slurm.sh or launch/tpu_vm.sh; or set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID in each; or use --config.distributed=off."
        ) from error
