# SPDX-License-Identifier: MIT
"""Several processes on one run: torchrun --standalone --nproc-per-node 4 train.py ... (docs/scale.md). ppo.py never meets them.

    team = here()                     # ppo.Alone, or the Ranks that this process is one of
    scored = team.gather(work)        # what work() gives in each; an error of one is raised by all
    first(append_line, file, record)  # rank 0 alone does it

Data parallel: all processes hold the same models. Each answers its share of the prompts; what came of it is gathered, so that
each has the whole rollout and computes every mean of it as one process does; each goes through its share of the micro-batches
of an optimiser step, and the gradients are added up. A run is then the same whatever their number, in float32 but for rounding.
torch's DistributedDataParallel is not used: it adds gradients up only after its own forward, which nobody calls here.

Messages, progress and files are rank 0's. A process that is lost (killed, out of memory) is noticed by the others in their next
exchange: at once over gloo, after at most half an hour, or when torchrun ends them, over NCCL.
"""

import contextlib
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo import Alone, NotFinite, PPOConfig, Stats
from training import launch
from training.launch import launched, leave_together, watching

GRACE = 20  # seconds; for a process that leaves without a word, so that another one can have it


class Ranks:
    """The twin of ppo.Alone for the processes of torch.distributed's default group."""

    in_step = False  # whether each forward pass takes all of them (--shard)

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def rows(self, n: int) -> slice:
        """Side by side; the first n % size processes have one more than the others."""
        share, more = divmod(n, self.size)
        start = self.rank * share + min(self.rank, more)
        return slice(start, start + share + (self.rank < more))

    def gather(self, work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list:
        """What work() gives in every process. Where it fails in some, all raise the first one's error, marked as everybody's; in
        step, where the others may be waiting inside of a forward pass, it is raised at once, and they lose a process."""
        mine, failed = attempt(work)
        if failed and self.in_step:
            raise mine
        return self.exchange(mine, failed, group)

    def exchange(self, mine: Any, failed: bool, group: dist.ProcessGroup | None = None) -> list:
        """What all found; the first error among it is raised."""
        found: list = [None] * self.size
        with watching():
            dist.all_gather_object(found, (failed, portable(mine) if failed else mine), group)
        for rank, (bad, result) in enumerate(found):
            if bad:
                error = mine if rank == self.rank else result
                error.everybodys = True
                raise error
        return [result for _, result in found]

    def share(self, items: list) -> list:
        """Every size-th: of micro-batches sorted by length as many long ones as the others have."""
        return items[self.rank::self.size]

    def total(self, stats: Stats, trained: list[Tensor]) -> Stats:
        """Two exchanges: of all gradients with the statistics that are sums, and of those that are maxima."""
        maxima = [name for name in stats if name.endswith("_max")]
        sums = [name for name in stats if name not in maxima]
        gradients = [p.grad for p in trained if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.stack([stats[name] for name in sums]).float()])
        highest = torch.stack([stats[name] for name in maxima]) if maxima else flat[:0]
        with watching():
            dist.all_reduce(flat, dist.ReduceOp.SUM)
            if maxima:
                dist.all_reduce(highest, dist.ReduceOp.MAX)
        *parts, added = flat.split([*(g.numel() for g in gradients), len(sums)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        found = dict(zip([*sums, *maxima], [*added, *highest], strict=True))
        return {name: found[name] for name in stats}


def here() -> Alone | Ranks:
    """Who shares the work with this process."""
    return Ranks() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else Alone()


def first(work: Callable, *args: Any) -> Any:
    """What work(*args) gives in rank 0, which alone does it while the others wait; its error is everybody's."""
    team = here()
    return team.gather(lambda: work(*args) if team.rank == 0 else None)[0]


def first_at_leisure(work: Callable, *args: Any) -> Any:
    """The same of what may take longer than launch.TIMEOUT: an LLM that judges."""
    team = here()
    patient = {} if team.size == 1 else {"group": dist.new_group(timeout=timedelta(days=9), backend="gloo")}
    return team.gather(lambda: work(*args) if team.rank == 0 else None, **patient)[0]


def each(work: Callable[[], Any]) -> Any:
    """What work() gives in this process, where no other's failed."""
    found: list = []
    here().gather(lambda: found.append(work()))
    return found[0]


def agreed(work: Callable[[], Any]) -> Any:
    """each, for work without a forward pass that all processes do at the same time: where it fails in one, it does in all even in
    step."""
    if here().size == 1:
        return work()
    mine, failed = attempt(work)
    here().exchange(mine if failed else None, failed)
    return mine


def attempt(work: Callable[[], Any]) -> tuple[Any, bool]:
    """(what work() gives, False), or (the error that it raises, True)."""
    try:
        return work(), False
    except Exception as error:
        if rank := here().rank:
            error.add_note(f"in rank {rank}:\n{traceback.format_exc()}")
        return error, True


def alike(tensors: Sequence[Tensor]) -> None:
    """Gives all processes rank 0's numbers, in place."""
    if here().size > 1:
        with watching(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)


def require_even(config: PPOConfig) -> None:
    """Raises ValueError where the micro-batches of an optimiser step can't be shared evenly."""
    size, step, micro = here().size, config.step_batch_size, config.micro_batch_size
    if step // micro % size == 0:
        return
    fits = [m for m in range(micro, 0, -1) if step % (m * size) == 0]
    advice = f"--micro-batch-size {fits[0]} gives each {step // fits[0] // size}" if fits else \
        f"--step-batch-size must be a multiple of {size}"
    raise everybodys(ValueError(f"{size} processes can't share an optimiser step of {step} responses, which is "
                                f"{step // micro} micro-batch{'es' * (step // micro > 1)} of {micro}: {advice}"))


def require_equal(what: str, values: dict[str, Any]) -> None:
    """Raises ValueError in all processes for the first value that isn't the same in all of them."""
    for rank, theirs in enumerate(all_values := here().gather(lambda: values)):
        for name, value in all_values[0].items():
            if theirs.get(name) != value:
                raise everybodys(ValueError(f"{what} {name} is {theirs.get(name)!r} in rank {rank} and {value!r} in rank 0: all "
                                            "processes must be started with the same flags, data and models"))


def restarted() -> bool:
    """Whether torchrun --max-restarts has started the run anew. Each node counts its own failures: one is enough."""
    return any(here().gather(lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))


# --------------------------------------------------------------------------------------------------- one voice of many


def speaks() -> bool:
    """Whether this process is the one that prints: rank 0, or as long as they don't know each other, one of each machine."""
    if not launched():
        return True
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("LOCAL_RANK", 0))) == 0


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Inside, the others print nothing: no lines, no bars."""
    if speaks():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit as left:  # argparse's; the others' is the same
            if left.code and not dist.is_initialized():
                time.sleep(GRACE)
            raise


def everybodys(error: Exception) -> Exception:
    """Marks an error that all processes raise."""
    error.everybodys = True
    return error


def is_everybodys(error: Exception) -> bool:
    """NotFinite is found by each in the same numbers."""
    return isinstance(error, NotFinite) or getattr(error, "everybodys", False)


def tells(error: Exception) -> bool:
    """Whether this process is to say what ended it: rank 0 what all know, and of all else whoever comes first. An error of one
    process breaks the others' connections, so that they come later."""
    if launch.common is None or is_everybodys(error):
        return speaks()
    try:
        return launch.common.add("told", 1) == 1
    except RuntimeError:  # torchrun is gone, too
        return True


def leave(error: Exception) -> None:
    """Waits until the one that speaks has said what ended them all: torchrun ends the others as soon as it sees one gone."""
    if launched() and not dist.is_initialized() and not speaks():
        time.sleep(GRACE)
    elif is_everybodys(error) and here().size > 1:
        leave_together()


def portable(error: Exception) -> Exception:
    """The error, or where it can't travel to another process, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
