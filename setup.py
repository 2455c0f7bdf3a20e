"""Installation of colossal_bcd: `pip install -e '.[colossalai]'`; the algorithms alone need no extra."""

from pathlib import Path

from setuptools import find_packages, setup

COLOSSALAI = ["colossalai>=0.5.0,<0.6", "transformers>=4.51,<5"]
TRAINER = ["accelerate>=0.26", "peft>=0.13", "transformers>=4.51"]
LOW_BIT = ["bitsandbytes>=0.50"]
EXAMPLES = ["click>=8.1", "matplotlib>=3.8", "rich>=13", "tokenizers>=0.21"]

setup(
    name="colossal_bcd",
    version="0.1.0",
    description="Memory-efficient optimizers for tensor-parallel, ZeRO, data- and pipeline-parallel training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["colossal_bcd", "colossal_bcd.*"]),
    package_data={"colossal_bcd": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["safetensors>=0.4", "torch>=2.5", "tqdm>=4.60"],
    extras_require={
        "colossalai": COLOSSALAI,
        "trainer": TRAINER,
        "low-bit": LOW_BIT,
        "docs": ["mkdocs>=1.6"],
        "examples": [*COLOSSALAI, *EXAMPLES],
        "test": [
            *COLOSSALAI,
            *TRAINER,
            *LOW_BIT,
            *EXAMPLES,
            "badam>=1.4",
            "came_pytorch>=0.1.3",
            "galore_torch>=1.0",
            "hypothesis>=6.100",
            "lion-pytorch>=0.2",
            "mypy>=1.14",
            "pytest-xdist>=3.6",
            "pytest>=8",
            "pytorch_optimizer>=3.3",
            "ruff>=0.9",
            "schedulefree>=1.4",
        ],
    },
)
