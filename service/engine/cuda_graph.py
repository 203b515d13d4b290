"""CUDA graphs, in which decode steps are recorded: on a stream of their own, all in one memory pool.

It knows nothing of what is recorded. Invariant: one graph runs at a time, so what one gives is read before the next is replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from service.engine.decode_graphs import Replay


class CudaRecorder:
    """Records on the current device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> Replay:
        """See decode_graphs.Recorder. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
