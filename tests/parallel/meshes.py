"""Trains the toy model on meshes of eight host devices, in a process of its own; prints JSON.

    python -m tests.parallel.meshes     # with XLA_FLAGS=--xla_force_host_platform_device_count=8

A process has as many host devices as it starts with, so that the tests cannot do it themselves.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import tempfile

import jax

from famjax import compilation
from famjax.parallel import mesh as mesh_module
from famjax.parallel.mesh import MeshConfig
from famjax.parallel.placement import AxisRules
from famjax.training.loop import train
from tests.training import toy

MODEL = dataclasses.replace(toy.MODEL, num_heads=8, num_kv_heads=2, head_dim=4)
STEPS = 5
SETTINGS = {  # model, optimizer, training; and the meshes it is tried on
    "LoRA, accumulation, RSP": (
        dataclasses.replace(MODEL, lora_rank=2, remat="full", feedback_order="with_tokens"),
        dataclasses.replace(toy.OPTIMIZER, learning_rate=0.05),
        dict(accumulate=2, rsp_probability=0.8, random_offset=True),
        ("one device", "tensor", "mixed"),
    ),
    "all parameters, Adafactor, rows followed": (
        MODEL, dataclasses.replace(toy.OPTIMIZER, name="adafactor"),
        dict(follow_rows=True, look_every=STEPS),
        ("one device", "mixed", "moved", "kernel", "kernel of a GPU"),
    ),
    "a memory of another kind, rows followed": (
        dataclasses.replace(
            MODEL,
            memory=dataclasses.replace(MODEL.memory, kind="infini", memory_segments=1),
            feedback_unroll=2,
        ),
        toy.OPTIMIZER, dict(follow_rows=True), ("one device", "mixed"),
    ),
}  # fmt: skip
MESHES = {
    "one device": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8),
    "mixed": (2, 2, 2), "moved": (2, 2, 2), "kernel": (2, 2, 2),
    "kernel of a GPU": (2, 2, 2),
}  # fmt: skip


def losses(setting: str, mesh: str, run_dir: str, steps: int = STEPS) -> list[float]:
  """Loss and gradient norm of every step of a run, which goes on with what is in its directory.

  Where it looks at its FAM, two measures of it stand at the end.
  """
  model, optimizer, options, _ = SETTINGS[setting]
  kernel = {"kernel": "interpret", "kernel of a GPU": "interpret_gpu"}.get(mesh, "none")
  model = dataclasses.replace(model, attention_kernel=kernel)
  mesh = MESHES[mesh]
  config = dataclasses.replace(toy.TRAIN, train_steps=steps, log_every=1, **options)
  devices = jax.devices()[: mesh[0] * mesh[1] * mesh[2]]
  with contextlib.redirect_stdout(io.StringIO()), _only(devices):
    train(run_dir, model, toy.ToyReader(batch_size=16), optimizer, config, mesh=MeshConfig(*mesh))
  lines = (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()
  shown = {"train": ("loss", "grad_norm"), "fam": ("write", "energy")}
  return [[step[name] for name in shown[step["split"]]] for step in map(json.loads, lines)]


@contextlib.contextmanager
def _only(devices):
  """Meshes are made of these devices."""
  all_of_them = jax.devices
  mesh_module.jax.devices = lambda *_: devices
  try:
    yield
  finally:
    mesh_module.jax.devices = all_of_them


def collectives(setting: str, mesh: str) -> list[str]:
  """Kinds of them that a training step on a mesh has."""
  model, optimizer, options, _ = SETTINGS[setting]
  run = compilation.Run(
      model, optimizer, dataclasses.replace(toy.TRAIN, **options), MeshConfig(*MESHES[mesh]),
      AxisRules(), batch_size=16, length=12,
  )  # fmt: skip
  found = compilation.compiled(run, "train", jax.devices())
  return sorted({one["kind"] for one in found["collectives"]})


def main() -> None:
  found = {
      "devices": jax.device_count(),
      "collectives": collectives("all parameters, Adafactor, rows followed", "data"),
  }
  with tempfile.TemporaryDirectory() as directory:
    for setting, (*_, meshes) in SETTINGS.items():
      for mesh in meshes:
        run_dir = f"{directory}/{setting}/{mesh}"
        if mesh == "moved":
          losses(setting, "fsdp", run_dir, steps=2)
        found[f"{setting}: {mesh}"] = losses(setting, mesh, run_dir)
  json.dump(found, sys.stdout)


if __name__ == "__main__":
  main()
