"""The paper's runs on TPU slices, said by the TPU compiler: do they fit, and what do chips send?

    python benchmarks/tpu_compile.py
    python benchmarks/tpu_compile.py --only="1B FAM"

It needs the extra `tpu` (WORKSPACE.md, "Setting up"), and no TPU. Every case is one `famjax compile`,
a minute or two on two cores. Nothing is measured. Writes a directory for each case, `report.json`
and `table.md` to runs/tpu_compile; with --only, other cases are taken as they are there.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from famjax.inference.engine import STEPS

RUN = ["--gin_file=gin/runs/finetune_flan.gin", "--gin.ModelConfig.vocab_size=256000"]
BSWA = "--gin_file=gin/memory/bswa.gin"
SLICES = {  # chips of the paper's runs
    "1B": ("v5e:4x8", "v5p:4x4x2"), "8B": ("v5e:8x8", "v5p:4x4x4"), "24B": ("v5e:8x16", "v5p:4x4x8"),
}  # fmt: skip
READERS = {  # chips that share a layer, and all that read and write 16 rows
    "1B": (1, ("v5e:2x2", "v5p:2x2x1")), "8B": (4, ("v5e:2x2", "v5p:2x2x1")), "24B": (8, ("v5e:4x4",)),
}  # fmt: skip


def cases() -> dict[str, list[str]]:
  """Arguments of `famjax compile` by the name of the case."""
  found = {}
  for size, (small, large) in SLICES.items():
    files = [f"--gin_file=gin/{room}/flan_{size.lower()}.gin" for room in ("models", "slices")]
    found[f"{size} FAM, v5e"] = [f"--topology={small}", *RUN, *files]
    found[f"{size} BSWA, v5e"] = [f"--topology={small}", *RUN, *files, BSWA]
    roomy = [f"--topology={large}", *RUN, *files, "--gin.TrainConfig.accumulate=1"]
    found[f"{size} FAM, v5p"], found[f"{size} BSWA, v5p"] = roomy, [*roomy, BSWA]
    if size == "1B":
      slices = ["--topology=v5e:4x4", "--slices=2", "--gin.MESH_DATA=2", "--gin.MESH_FSDP=16"]
      slices += ["--gin.TrainConfig.accumulate=4"]  # the program of several slices needs more memory
      found["1B FAM, two slices"] = [*slices, *RUN, *files]  # the same number of chips
      whole = ["--gin.LORA_RANK=0", "--gin.ModelConfig.param_dtype=float32"]
      found["1B FAM, all parameters, v5e"] = [f"--topology={small}", *RUN, *files, *whole]
    tensor, places = READERS[size]
    mesh = ["--gin.MESH_DATA=-1", "--gin.MESH_FSDP=1", f"--gin.MESH_TENSOR={tensor}"]
    for step in ("prefill", "decode"):
      for place in places:
        here = [f"--topology={place}", f"--step={step}", "--gin.BATCH_SIZE=16", *RUN, *files, *mesh]
        found[f"{size} FAM, {step}, {place[:3]}"] = here
        found[f"{size} BSWA, {step}, {place[:3]}"] = [*here, BSWA]
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/tpu_compile")
  parser.add_argument("--only", default="", help="cases whose name begins so")
  arguments = parser.parse_args()
  found = {}
  for name, settings in cases().items():
    place = arguments.out / name.lower().replace(",", "").replace(" ", "-")
    if name.startswith(arguments.only):
      print(f"{name}: famjax compile {' '.join(settings)}", flush=True)
      command = [sys.executable, "-m", "famjax.cli", "compile", *settings, f"--out={place}"]
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      print(done.stdout, flush=True)
      if done.returncode not in (0, 1):  # 1: it does not fit
        sys.exit(done.stderr[-2000:])
    if (place / "report.json").exists():
      found[name] = json.loads((place / "report.json").read_text())
  text = table(found)
  (arguments.out / "table.md").write_text(text)
  (arguments.out / "report.json").write_text(json.dumps(found, indent=2) + "\n")
  print(text)


def table(found: dict[str, dict]) -> str:
  """A row for each case."""
  head = ["run", "slice", "data x fsdp x tensor", "microbatches", "arguments", "temporaries",
          "in all, GiB", "of", "FLOPs, formula", "FLOPs, products", "cycles",
          "gathers per layer (in loops over blocks)", "results of collectives, GiB", "compiled in, s"]  # fmt: skip
  lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
  for name, case in found.items():
    mesh = " x ".join(str(size) for size in case["mesh"].values())
    where = f"{case['slices']} x " * (case["slices"] > 1) + case["topology"]
    row = [name, where, mesh, str(case["accumulate"])]
    memory = f"{case['memory_bytes'] / 2**30:.0f}"
    if not case["fits"]:
      lines.append([*row, "", "", "does not fit", memory, *[""] * 6])
      continue
    parts, flops = case["bytes_per_chip"], case["flops_per_chip"]
    gib = lambda key: f"{parts[key] / 2**30:.2f}"  # pylint: disable=cell-var-from-loop
    results = sum(one["total_bytes"] for one in case["collectives"]) / 2**30
    lines.append([
        *row, gib("argument"), gib("temp"), gib("used"), memory, f"{flops['formula']:.3g}",
        f"{flops['products of the program']:.3g}", f"{case['estimated_cycles_per_chip']:.3g}",
        _gathers(case), f"{results:.1f}", f"{case['seconds_to_compile']:.0f}",
    ])  # fmt: skip
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + _ratios(found)


def _ratios(found: dict[str, dict]) -> str:
  """FAM over BSWA, where both are there and fit."""
  rows = [["FAM over BSWA", "temporaries", "in all", "FLOPs, formula", "cycles"], ["---"] + ["---:"] * 4]
  for name, fam in found.items():
    bswa = found.get(name.replace("FAM", "BSWA"))
    if "FAM" not in name or bswa is None or not (fam["fits"] and bswa["fits"]):
      continue
    of = lambda case: (
        case["bytes_per_chip"]["temp"], case["bytes_per_chip"]["used"],
        case["flops_per_chip"]["formula"], _cycles(case),
    )  # fmt: skip
    rows.append([name.replace("FAM, ", ""), *(f"{a / b:.3f}" for a, b in zip(of(fam), of(bswa)))])
  return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cycles(case: dict) -> float:
  """The estimate; of decoding that of a block, at whose end alone the feedback loop turns."""
  if case.get("step") != "decode":
    return case["estimated_cycles_per_chip"]
  calls, layers = case["model"]["memory"]["block_size"] / STEPS, case["model"]["num_layers"]
  once = lambda loops: layers in loops and STEPS not in loops
  parts = case["estimated_cycles_in_loops"]
  return sum(one["cycles"] * (1 if once(one["loops"]) else calls) for one in parts)


def _gathers(case: dict) -> str:
  """All-gathers in the body of the loops over layers, and in loops inside these."""
  layers = case["model"]["num_layers"]
  outer, inner = 0, 0
  for one in case["collectives"]:
    if one["kind"] == "all-gather" and layers in one["loops"]:
      if one["loops"][-1] == layers:
        outer += one["count"]
      else:
        inner += one["count"]
  return f"{outer} ({inner})"


if __name__ == "__main__":
  main()
