"""Configuration: frozen dataclasses that check themselves, read strictly.

`model.py` is the shape of a model, `layers.py` how it is computed, `parallel.py` over which ranks, `deepspeed.py` what
they share by ZeRO, `train.py` a run, `rl.py` one that learns from its own answers; `engine.py` is an inference engine,
`sampling.py` what one request asks.
"""

from megatron_multiverse.config.choices import DType, EngineDType, TokenizerType
from megatron_multiverse.config.deepspeed import DeepSpeedConfig
from megatron_multiverse.config.engine import EngineConfig
from megatron_multiverse.config.layers import LayerConfig
from megatron_multiverse.config.model import ModelConfig, RopeScaling, pad_vocab_size
from megatron_multiverse.config.parallel import ParallelConfig
from megatron_multiverse.config.rl import PolicyConfig, RewardConfig, RLConfig, RolloutConfig, TaskConfig
from megatron_multiverse.config.sampling import SamplingParams
from megatron_multiverse.config.train import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
    check_sequence_length,
)

__all__ = [
    "CheckpointConfig",
    "DType",
    "DataConfig",
    "DeepSpeedConfig",
    "EngineConfig",
    "EngineDType",
    "LayerConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RLConfig",
    "RewardConfig",
    "RolloutConfig",
    "RopeScaling",
    "SamplingParams",
    "TaskConfig",
    "TokenizerType",
    "TrainConfig",
    "check_sequence_length",
    "pad_vocab_size",
]
