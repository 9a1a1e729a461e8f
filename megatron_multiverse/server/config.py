"""Options of the server. Imports no torch."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_multiverse.config import EngineConfig, EngineDType, TokenizerType
from megatron_multiverse.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """How large requests may be, and how long things may take.

    Raises:
        ConfigError: a limit that nothing could pass; the message names the field.
    """

    max_body_bytes: int = 8 * 2**20
    """Bytes of a request body."""
    max_queued: int = 256
    """Answers that wait or run at once; a request that would exceed it gets 429. Each prompt and each of `n` counts."""
    max_prompts: int = 128
    """Prompts in one request."""
    max_n: int = 16
    """Answers to one prompt."""
    max_stop: int = 16
    """Stop texts in one request."""
    max_stop_characters: int = 256
    """Characters of each."""
    max_logprobs: int = 20
    """Alternatives for each token."""
    request_timeout: float = 3600.0
    """Seconds after which an answer ends with finish_reason "abort"."""
    body_timeout: float = 30.0
    """Seconds within which a request body must have arrived."""
    idle_stream_timeout: float = 60.0
    """Seconds a reader of a stream may take nothing before its answer is cancelled."""
    drain_timeout: float = 60.0
    """Seconds that running answers get to finish after SIGTERM."""
    weights_timeout: float = 300.0
    """Seconds that a trainer gets to meet the engine, and to send the weights of one request. No step is taken then."""
    engine_timeout: float = 120.0
    """Seconds without a sign of life from the engine after which the server is not ready. A long step is no fault."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"limits.{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of tools/run_text_generation_server.py.

    Raises:
        ConfigError: options that cannot work together.
    """

    load: Path
    """Checkpoint in any format: Hugging Face, megatron-core, or a model folder of the trainer."""
    tokenizer_type: TokenizerType = "HuggingFaceTokenizer"
    """Megatron's name of the kind of tokenizer."""
    tokenizer_model: str | None = None
    """Tokenizer folder, file or hub name; by default the model folder."""
    host: str = "127.0.0.1"
    """Address to listen at. Anything but a loopback address needs keys (--api-key-file)."""
    port: int = 5000
    """Port to listen at; 0 takes a free one, which the log names."""
    served_model_name: str | None = None
    """Name of the model in answers and in /v1/models; by default the name of its folder."""
    api_key_file: Path | None = None
    """File with one key a line. Clients send `Authorization: Bearer KEY`; a request without one of the keys gets 401.
    A single key can also come in the environment variable MULTIVERSE_API_KEY, never on the command line, which every
    user of the machine can read."""
    chat_template: Path | None = None
    """Jinja file that turns messages into a prompt; by default the tokenizer's own, else one that fits its vocabulary.
    Requests with tools need one that shows them. Templates run in a sandbox."""
    sampling_defaults: Literal["openai", "model"] = "openai"
    """How answers are drawn where a request does not say: openai draws from the model's own distribution (temperature
    1), model as its generation_config.json says. /generate and /api never take the latter."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """How large requests may be, and how long things may take."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Sizes and limits of the engine."""
    dtype: EngineDType = "auto"
    """Type of weights and cache; auto takes bf16 on a GPU and float32 on a CPU."""
    weights_root: Path | None = None
    """Folder within which /update_weights_from_disk may name checkpoints; unset, it names none."""
    weights_interface: str | None = None
    """Network interface over which trainers may send weights (/init_weights_update_group): lo for those on this
    machine; unset, none may."""
    tensor_model_parallel_size: int = 1
    """Processes, on as many GPUs, that each hold a part of every layer; the server starts them itself."""
    pipeline_model_parallel_size: int = 1
    """Stages that each hold some of the layers; there are as many processes as both sizes multiplied."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is a GPU."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug also names the fields of requests that are not known and therefore ignored."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port {self.port} is none: choose 1 to 65535, or 0 for a free one")
        interfaces = [name for _, name in socket.if_nameindex()]
        if self.weights_interface is not None and self.weights_interface not in interfaces:
            raise ConfigError(f"--weights-interface {self.weights_interface}: this machine has {', '.join(interfaces)}")
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def num_ranks(self) -> int:
        """Processes of the engine."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def model_name(self) -> str:
        """What the model is called in answers."""
        return self.served_model_name or self.load.resolve().name
