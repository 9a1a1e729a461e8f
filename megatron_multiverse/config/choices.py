"""Values that several configurations choose from."""

from __future__ import annotations

from typing import Literal

DType = Literal["float32", "bf16", "float64"]
"""Number formats to compute in; `dtypes.py` says what torch calls them."""
EngineDType = Literal["auto", "float32", "bf16", "float64"]
"""Number formats of an engine's weights and cache; `dtypes.engine_dtype` says what auto is."""
TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]
"""Megatron's names of the kinds of tokenizer."""
Quantization = Literal["none", "fp8"]
"""Formats of the weights that an engine multiplies by; none: the one they are loaded in."""
FreeText = str
"""What people write to a model, of which any word is one: as an optional flag, `null` is not its absence."""
