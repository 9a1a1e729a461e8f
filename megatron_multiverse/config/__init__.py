"""Configuration: frozen dataclasses that check themselves (model, layers, parallel, train, engine), read strictly."""

from megatron_multiverse.config.engine import EngineConfig, SamplingParams
from megatron_multiverse.config.layers import LayerConfig
from megatron_multiverse.config.model import ModelConfig, RopeScaling, pad_vocab_size
from megatron_multiverse.config.parallel import ParallelConfig
from megatron_multiverse.config.train import (
    CheckpointConfig,
    DataConfig,
    DType,
    LogConfig,
    OptimConfig,
    TrainConfig,
    check_sequence_length,
)

__all__ = [
    "CheckpointConfig",
    "DType",
    "DataConfig",
    "EngineConfig",
    "LayerConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScaling",
    "SamplingParams",
    "TrainConfig",
    "check_sequence_length",
    "pad_vocab_size",
]
