"""The machine that a run is on: its processes, chips, memory and profiler."""
