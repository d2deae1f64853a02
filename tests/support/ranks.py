"""Processes joined in one process group, for tests of what several ranks do together.

    with World(2) as world:
        world.run(function, 3)  # [function(3) on rank 0, function(3) on rank 1]

A function is one of a file's own, found there by its name, so that a test module need not be importable. Nobody waits
for ever: the group has a timeout, and so has the wait for its ranks.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

# A server that has imported them forks the ranks, so that they start at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["adacache_triton", "diffusers.models.transformers.transformer_wan", "pytest"])


START = 120  # seconds; beside other work, processes start slowly


class RankError(Exception):
    """What became of a rank that returned nothing: its exception as text, that it died or did not answer."""


class World:
    """`size` ranks, each a process, of one group.

    Args:
        size: how many.
        backend: "gloo", or "nccl" with a GPU for each rank.
        timeout: seconds after which a collective, and the wait for a function, are given up.
    """

    def __init__(self, size: int, backend: str = "gloo", timeout: float = 30):
        self.size, self.backend, self.timeout = size, backend, timeout
        self._ranks: list[tuple] = []

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")  # where the ranks meet
        for rank in range(self.size):
            here, there = _CONTEXT.Pipe()
            arguments = (there, rank, self.size, self.backend, store, self.timeout)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        for _, connection in self._ranks:
            if connection.poll(START):  # else whoever is missing does not answer later, either
                connection.recv_bytes()

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        if self._ranks:
            self._folder.cleanup()
        self._ranks = []

    def outcomes(self, function: Callable, *args) -> list:
        """What function(*args) returns on each rank, a `RankError` for a rank where it does not return."""
        if not self._ranks:
            self._start()
        task = pickle.dumps((inspect.unwrap(function).__code__.co_filename, function.__name__, args))
        deadline, outcomes = time.monotonic() + 2 * self.timeout, []
        for _, connection in self._ranks:
            connection.send_bytes(task)
        for process, connection in self._ranks:
            try:
                if connection.poll(max(0, deadline - time.monotonic())):
                    returned, value = pickle.loads(connection.recv_bytes())
                    outcomes.append(value if returned else RankError(value))
                else:
                    outcomes.append(RankError("no answer in time"))
            except (EOFError, ConnectionError):
                process.join()
                outcomes.append(RankError(f"died with exit code {process.exitcode}"))
        if any(isinstance(outcome, RankError) for outcome in outcomes):
            self.close()  # the others may still wait in a collective; the next call starts anew
        return outcomes

    def run(self, function: Callable, *args) -> list:
        """What function(*args) returns on each rank; raises `RankError` where one does not return."""
        outcomes = self.outcomes(function, *args)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, RankError):
                raise RankError(f"rank {rank}: {outcome}")
        return outcomes


def _serve(connection, rank: int, size: int, backend: str, path: str, timeout: float) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(path, size)
    store.set_timeout(timedelta(seconds=START))
    store.set(f"rank {rank}", "is here")
    store.wait([f"rank {other}" for other in range(size)])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    connection.send_bytes(b"ready")
    while True:
        try:
            path, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)  # without a farewell to ranks that may be gone
        try:
            answer = True, getattr(_module(path), name)(*args)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


def _module(path: str):
    """The module of a file, imported once."""
    name = f"_ranks_{os.path.splitext(os.path.basename(path))[0]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
