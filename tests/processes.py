"""Cases that several processes run together over gloo, all in one launch of them.

A process that raises ends all of them, so that none waits for it; the cases behind are not run.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, module: str, size: int, folder: str, seconds: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    timeout = timedelta(seconds=seconds)  # as long as another process may be busy alone
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    torch.manual_seed(0)
    for name, run in importlib.import_module(module).CASES[size].items():
        try:
            run()
        except BaseException:
            text = f"process {rank}:\n{traceback.format_exc()}"
            Path(folder, f"{rank}.error").write_text(f"{name}\n{text}")
            raise
        if rank == 0:
            with open(f"{folder}/done", "a") as done:
                done.write(f"{name}\n")
    dist.barrier()
    dist.destroy_process_group()


def run_cases(module: str, size: int, folder: Path, seconds: int) -> dict[str, str]:
    """The error of each case of `module`.CASES[size], a function by its name; "" where it passed.

    The processes are forked from one that has imported the module and has run nothing.
    """
    # torch_rwkv6 comes first, as in most programs; torch._dynamo is imported by fake tensors.
    mp.set_forkserver_preload(["torch_rwkv6", module, "torch._dynamo"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        processes = mp.start_processes(
            _work, (module, size, str(folder), seconds), size, join=False, start_method="forkserver"
        )
    late = ""
    try:
        for _ in range(seconds):
            if processes.join(1):
                break
        else:
            late = f"the processes take more than {seconds} seconds"
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        late = f"one of them ended: {error}"
    finally:
        for process in processes.processes:
            process.kill()
    names = list(sys.modules[module].CASES[size])
    done = folder / "done"
    passed = done.read_text().splitlines() if done.exists() else []
    errors = {name: "" if name in passed else f"not run, as {late}" for name in names}
    raised = sorted(folder.glob("*.error"), key=lambda file: file.stat().st_mtime_ns)
    for file in reversed(raised):  # the first one last: others may have raised because of it
        name, text = file.read_text().split("\n", 1)
        errors[name] = text
    return errors
