"""What a model can do and how fast: tasks, answers, grades, scores, and how parallel texts are.

`tasks.py` (problems and their prompts), `backends.py` (an engine in this process, or a server), `samples.py` (which
answers a run asks for, and the finished ones on the disk), `scores.py` (what they come to), `compare.py` (two runs,
problem by problem), `report.py` and `plots.py`, `run.py` (the whole command). `parallelism.py` measures the texts of
any output or data set. Grades themselves: `megatron_multiverse/grading.py`.
"""
