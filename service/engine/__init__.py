"""Floor 3: one worker process: plans in, sampled tokens out; and the parent side that keeps it alive."""
