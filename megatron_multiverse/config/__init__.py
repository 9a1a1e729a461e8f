"""Configuration: frozen dataclasses that check themselves (`model.py`, `layers.py`, `train.py`), read strictly."""

from megatron_multiverse.config.choices import DType, TokenizerType
from megatron_multiverse.config.layers import LayerConfig
from megatron_multiverse.config.model import ModelConfig, RopeScaling, pad_vocab_size
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
    "LayerConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "TokenizerType",
    "TrainConfig",
    "check_sequence_length",
    "pad_vocab_size",
]
