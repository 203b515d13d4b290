"""OpenVINO GenAI as a peer of `engine_speed`: continuous batching over an exported model, one round a line of stdin.

Runs in an environment of its own (`pip install openvino-genai`); it imports nothing of ours. The model is exported there with
`optimum-cli export openvino --model DIR --task text-generation-with-past --weight-format int8 OUT`. Invariant: a round's times are those
of the library's own steps: the first token of every sequence ends the prefill.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def build(directory: str, threads: int, step_tokens: int) -> Any:
    """The pipeline, with its own defaults for precision and KV cache."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = step_tokens
    scheduler.enable_prefix_caching = False
    return openvino_genai.ContinuousBatchingPipeline(
        directory, scheduler_config=scheduler, device="CPU", properties={"INFERENCE_NUM_THREADS": threads}
    )


def run(pipeline: Any, prompts: list[list[int]], generate: int) -> tuple[float, float, int]:
    """(seconds to the last first token, seconds from there to the end, tokens in these) of one round, greedy and past every end token."""
    import numpy as np
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.min_new_tokens, config.ignore_eos, config.do_sample = generate, generate, True, False
    handles = []
    for index, prompt in enumerate(prompts):
        handles.append(pipeline.add_request(index, openvino.Tensor(np.array([prompt], np.int64)), config))
    began = time.perf_counter()
    first, before, waiting, counts = 0.0, 0, set(range(len(handles))), [0] * len(handles)
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for index, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    counts[index] += len(output.generated_ids)
                waiting.discard(index)
        if not waiting and not first:
            first, before = time.perf_counter(), sum(counts)
    if set(counts) != {generate}:
        raise RuntimeError(f"the peer generated {sorted(set(counts))} tokens instead of {generate}")
    return first - began, time.perf_counter() - first, sum(counts) - before


def main() -> None:
    """Serve rounds: {"prompts": …, "generate": …} in, {"prefill_s": …, "decode_s": …, "decoded": …} out; the first line says how long
    loading took.
    """
    began = time.perf_counter()
    pipeline = build(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    import openvino_genai

    print(json.dumps({"loaded_s": time.perf_counter() - began, "version": openvino_genai.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prefill_s, decode_s, decoded = run(pipeline, asked["prompts"], asked["generate"])
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "decoded": decoded}), flush=True)


if __name__ == "__main__":
    main()
