"""Which part of the work is this process's, and how are the parts joined?

Under torchrun every process runs the same script, and computes its share of the images. Cheap steps run everywhere,
from the same seed; the first process writes and prints. Without torchrun there is one process.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.console import with_place

MAX_WAIT = timedelta(hours=6)  # for another process, which may wait for another run to finish the same features


def with_process_group(main: Callable[[], int]) -> Callable[[], int]:
    """Wraps a script's `main`: under torchrun, it runs in a process group, and only the first process prints,
    apart from errors.

    Other programs set WORLD_SIZE, too; without torchrun it means nothing here.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return main

    def joined() -> int:
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise ValueError(
                    f"each process needs a GPU: use --nproc_per_node={torch.cuda.device_count()}, or hide the GPUs"
                )
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()  # Windows has not
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=MAX_WAIT)
            if is_first():
                code = main()
            else:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                    code = main()
            barrier()  # a process that leaves early would end the connections of the others
        except RuntimeError as error:  # mostly because another process was killed, or the network is down
            raise OSError(f"stopped, probably because another process failed: {with_place(error)}") from error
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # DistributedDataParallel keeps the group's threads alive, and they may abort a process that ends as usual.
        # torchrun takes 1, "some inputs failed", for a crash, and would start again.
        os._exit(0 if code == 1 else code)

    return joined


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # dist.barrier() may need a GPU of its own


def gather(own: object) -> list:
    """Every process's object, in the order of their ranks, on every process."""
    parts = [own] * world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, own)
    return parts


def of_first(own: object) -> object:
    """The first process's object, on every process."""
    found = [own]
    if world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def share(count: int, batch_size: int) -> list[int]:
    """The indices, of 0 to count - 1, that this process works on: whole batches are dealt in turn."""
    process, processes = rank(), world_size()
    return [i for i in range(count) if i // batch_size % processes == process]


def shared_map(work: Callable[[Iterable], Iterator], items: Iterable, batch_size: int) -> Iterator:
    """Yields `work`'s result for each item, in order, on every process. Each one works on its share of the items."""
    if world_size() == 1:
        yield from work(items)  # each result as soon as it is computed
        return
    items = of_first(list(items) if is_first() else None)  # only the first process may read from standard input
    own = share(len(items), batch_size)
    parts = gather(dict(zip(own, work([items[i] for i in own]), strict=True)))
    results = {i: result for part in parts for i, result in part.items()}
    yield from (results[i] for i in range(len(items)))
