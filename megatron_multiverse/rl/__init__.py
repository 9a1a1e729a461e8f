"""Reinforcement learning on parallel rollouts: the engine writes groups of answers, the trainer learns from them.

`trainer.py` is the loop; read it first. A step goes through `prompts.py` (what is asked), `rollout.py` (groups of
answers), `rewards.py` and `advantages.py` (what they are worth), `trees.py` (their tokens in rows) and `loss.py`. Both
sides have the same tokens, positions and visibility, from `structure/`, so nothing is tokenised again and the trainer's
log-probabilities are the engine's.
"""
