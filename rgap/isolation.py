"""Settings of the caller's program that a computation here neither follows nor changes.

The systems solved are small: where BLAS divides them among threads, waiting for each other takes longer than the work.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

CPU = torch.device("cpu")

accelerator: ContextVar[torch.device | None] = ContextVar("accelerator", default=None)
"""Where large dense systems are factored; None for the CPU's own LAPACK."""


@contextmanager
def dense_systems_on(device: torch.device | None) -> Iterator[None]:
    """Large dense systems are factored on that device meanwhile, in float64."""
    before = accelerator.set(device)
    try:
        yield
    finally:
        accelerator.reset(before)


class _SingleThread:
    """Counts the computations that run with one thread each; the first keeps the setting, the last resets it.

    torch's setting belongs to a thread, that of the other BLAS libraries to the process.
    """

    def __init__(self):
        self.lock, self.running, self.threads, self.blas = threading.Lock(), 0, 1, None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        own = torch.get_num_threads()
        with self.lock:
            if self.running == 0:
                self.threads, self.blas = own, _blas_libraries().limit(limits=1, user_api="blas")
            self.running += 1
            before = own if own > 1 else self.threads  # a thread begun meanwhile starts with one
            torch.set_num_threads(1)
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1
                torch.set_num_threads(before)
                if self.running == 0:
                    self.blas.restore_original_limits()


@functools.cache
def _blas_libraries() -> ThreadpoolController:
    """The libraries for linear algebra that this process has loaded; finding them takes milliseconds."""
    return ThreadpoolController()


_single_thread = _SingleThread()


@contextmanager
def isolated(one_thread: bool = True) -> Iterator[None]:
    """As a decorator: results do not depend on inference mode, autocast or the default device, which stay as they were.

    With `one_thread` linear algebra has one thread meanwhile.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device() != CPU:
            stack.enter_context(CPU)
        if one_thread:
            stack.enter_context(_single_thread())
        yield


def for_autograd(value: Tensor) -> Tensor:
    """The tensor, detached; a copy where it was made in inference mode, since autograd cannot keep such a tensor."""
    return value.clone().detach() if value.is_inference() else value.detach()
