# SPDX-License-Identifier: MIT
"""How the processes that torchrun starts come to know one another, and which GPUs are whose; ranks.py has what they then do.

    with joined():                        # in every one of them, before anything is loaded

torchrun, or whatever sets its variables, gives each its number and a store that all can reach. Under --max-restarts that store
outlives the processes that are replaced (torch 2.13), so that each start gives it a name of its own.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)  # NCCL's own 10 are less than a rollout may take
common: dist.Store | None = None  # what all processes of this start read and write, while torchrun lives


class Lost(ConnectionError):
    """Another process of the run is gone, or has not answered for TIMEOUT."""


def launched() -> bool:
    """Whether torchrun, or whatever sets its variables, started this process as one of several."""
    return dist.is_available() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started know one another, and each sees its own GPUs alone; one process alone is."""
    if not launched() or dist.is_initialized():
        yield
        return
    local, siblings = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    gpus = own_gpus(visible_gpus(), local, siblings)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    global common
    with watching():
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        common = fresh(store, rank, size)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=common, rank=rank, world_size=size,
                                timeout=TIMEOUT)
    yield
    leave_together()  # not after an error: the others may be gone


def leave_together() -> None:
    """The end of what all processes do together: each waits here for the others, and Python's lock is free meanwhile.

    gloo's threads need it to let go of what they sent, and outlive their process group, which cached meshes hold on to. One that
    asks for it while Python shuts down takes the process with it (SIGABRT), after all its work.
    """
    size = dist.get_world_size()
    with contextlib.suppress(dist.DistError):  # another that fails now doesn't undo what this one has done
        came = common.add("came", 1)
        if came % size == 0:
            common.set(f"all {came // size}", "")
        common.wait([f"all {-(-came // size)}"], timedelta(minutes=1))
    dist.destroy_process_group()


def fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The store under a name of this start's own, which rank 0 gives.

    torchrun's store outlives the processes that --max-restarts replaces (torch 2.13), and with it their addresses: about every
    other restart would meet the dead. So rank 0 answers all who knock until those who live have said that they heard it, and
    an earlier start's knocks are answered in vain.
    """
    me, waiting, until = uuid.uuid4().hex, set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    if rank:
        store.set(f"knock {rank}", me)
        name = store.get(f"answer {me}").decode()
        store.set(f"heard {name} {rank}", "")
        return dist.PrefixStore(name, store)
    while waiting:
        for other in waiting:
            if store.check([f"knock {other}"]):
                store.set(f"answer {store.get(f'knock {other}').decode()}", me)
        waiting = {other for other in waiting if not store.check([f"heard {me} {other}"])}
        time.sleep(0.01)
        if time.monotonic() > until:
            raise Lost(f"rank {min(waiting)} has not come within {TIMEOUT.total_seconds() / 60:.0f} minutes")
    return dist.PrefixStore(me, store)


def visible_gpus() -> list[str]:
    """Their names in CUDA_VISIBLE_DEVICES. CUDA is not started by this: it would never look there again."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")][:count] if named is not None else [str(i) for i in range(count)]


def own_gpus(visible: list[str], local: int, siblings: int) -> list[str]:
    """Those of process `local` of a machine's: as many for each, so that "cuda:0" and "cuda:1" mean its own."""
    each_has = len(visible) // siblings
    if visible and not each_has:
        raise ValueError(f"{siblings} processes on {len(visible)} GPUs: at most one a GPU, --nproc-per-node {len(visible)}")
    return visible[local * each_has:(local + 1) * each_has]


def watched(work: Callable, *args: Any) -> Any:
    """work(*args), in which a lost connection is Lost wherever it shows: a forward pass of sharded weights has no watching."""
    with watching(sure=False):
        return work(*args)


@contextlib.contextmanager
def watching(sure: bool = True) -> Iterator[None]:
    """Inside, what torch raises about its connections is Lost. sure: nothing else is done inside."""
    try:
        yield
    except RuntimeError as error:
        if not (sure or isinstance(error, dist.DistError) or re.search(r"\bgloo\b|NCCL|Connection (closed|reset)", str(error))):
            raise
        what = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).partition(". ")[0]  # without a place in torch's source
        raise Lost(f"another process of this run has ended or does not answer ({what}); go on with --resume") from error
