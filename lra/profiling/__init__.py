"""Work, time and memory of an encoder: FLOPs, timing, memory, the profiler, what fits."""
