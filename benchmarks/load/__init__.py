"""Load on the engine, simulated: the real scheduler over a clock that a law of step times moves. `python -m
benchmarks.load` runs it."""
