"""The paper's runs on TPU slices, said by the TPU compiler: do they fit, and what do chips send?

    python benchmarks/tpu_compile.py
    python benchmarks/tpu_compile.py --only="1B FAM"

It needs the extra `tpu` (WORKSPACE.md, "Setting up"), and no TPU. Every case is one `famjax compile`,
a few minutes on two cores; what is there already is not compiled again. Nothing is measured. Writes
a directory for each case, `report.json` and `table.md` to runs/tpu_compile.
"""

import argparse
import json
import pathlib
import subprocess
import sys

RUN = ["--gin_file=gin/runs/finetune_flan.gin", "--gin.ModelConfig.vocab_size=256000"]
BSWA = "--gin_file=gin/memory/bswa.gin"
SLICES = {  # chips of the paper's runs
    "1B": ("v5e:4x8", "v5p:4x4x2"), "8B": ("v5e:8x8", "v5p:4x4x4"), "24B": ("v5e:8x16", "v5p:4x4x8"),
}  # fmt: skip


def cases() -> dict[str, list[str]]:
  """Arguments of `famjax compile` by the name of the case."""
  found = {}
  for size, (small, large) in SLICES.items():
    files = [f"--gin_file=gin/{room}/flan_{size.lower()}.gin" for room in ("models", "slices")]
    found[f"{size} FAM, v5e"] = [f"--topology={small}", *RUN, *files]
    found[f"{size} BSWA, v5e"] = [f"--topology={small}", *RUN, *files, BSWA]
    found[f"{size} FAM, v5p"] = [f"--topology={large}", *RUN, *files]
    if size == "1B":
      whole = ["--gin.LORA_RANK=0", "--gin.ModelConfig.param_dtype=float32"]
      found["1B FAM, all parameters, v5e"] = [f"--topology={small}", *RUN, *files, *whole]
    if size == "24B":
      mesh = ["--gin.MESH_DATA=-1", "--gin.MESH_FSDP=1", "--gin.MESH_TENSOR=8"]
      for step in ("prefill", "decode"):
        here = ["--topology=v5e:4x4", f"--step={step}", "--gin.BATCH_SIZE=16"]
        found[f"24B FAM, {step}, v5e"] = [*here, *RUN, *files, *mesh]
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/tpu_compile")
  parser.add_argument("--only", default="", help="cases whose name begins so")
  arguments = parser.parse_args()
  found = {}
  for name, settings in cases().items():
    place = arguments.out / name.lower().replace(",", "").replace(" ", "-")
    if name.startswith(arguments.only) and not (place / "report.json").exists():
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
          "in all, GiB", "of", "weights gathered, per layer and pass", "sent, GiB", "compiled in, s"]  # fmt: skip
  lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
  for name, case in found.items():
    mesh = " x ".join(str(size) for size in case["mesh"].values())
    row = [name, case["topology"], mesh, str(case["accumulate"])]
    memory = f"{case['memory_bytes'] / 2**30:.0f}"
    if not case["fits"]:
      lines.append([*row, "", "", "does not fit", memory, "", "", ""])
      continue
    parts = case["bytes_per_chip"]
    gib = lambda key: f"{parts[key] / 2**30:.2f}"  # pylint: disable=cell-var-from-loop
    sent = sum(one["total_bytes"] for one in case["collectives"]) / 2**30
    lines.append([
        *row, gib("argument"), gib("temp"), gib("used"), memory, _gathers(case), f"{sent:.1f}",
        f"{case['seconds_to_compile']:.0f}",
    ])  # fmt: skip
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _gathers(case: dict) -> str:
  """All-gathers in the loops over layers, forward and backward, and in loops inside these."""
  layers = case["model"]["num_layers"]
  outer, inner = 0, 0
  for one in case["collectives"]:
    if one["kind"] == "all-gather" and layers in one["loops"]:
      if one["loops"][-1] == layers:
        outer += one["count"]
      else:
        inner += one["count"]
  return f"{outer} (in loops over blocks: {inner})"


if __name__ == "__main__":
  main()
