"""`famjax compile`: the TPU compiler is real here, the TPU is not."""

import json

import pytest

from famjax import cli

RUN = [
    "--gin_file=gin/runs/excerpts.gin", "--gin.ModelConfig.vocab_size=512", "--gin.MESH_TENSOR=2",
    "--gin.ModelConfig.num_layers=3", "--gin.ModelConfig.remat=full", "--gin.LENGTH=256",
]  # fmt: skip


def compile_(*arguments):
  return cli.main(["compile", *RUN, *arguments])


@pytest.mark.slow
def test_a_training_step_fits_and_gathers_once_a_layer(tmp_path, capsys):
  assert compile_("--topology=v5e:2x4", f"--out={tmp_path}") == 0
  found = json.loads((tmp_path / "report.json").read_text())
  assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
  assert found["device"] == "TPU v5 lite" and found["memory_bytes"] == 16 << 30
  parts = found["bytes_per_chip"]
  assert 0 < parts["argument"] < parts["used"] == (
      parts["argument"] + parts["temp"] + parts["output"] - parts["alias"]
  )
  gathers = [one["loops"] for one in found["collectives"] if one["kind"] == "all-gather"]
  assert [3] in gathers, "weights are gathered in the loop over layers"
  blocks = 256 // 128
  assert [3, blocks] not in gathers, "and not in the one over blocks"
  flops = found["flops_per_chip"]
  # The backward pass makes each layer's forward one again: 4 products in place of 3, less the loss's.
  assert 1.1 < flops["products of the program"] / flops["formula"] < 1.6
  assert found["estimated_cycles_per_chip"] > 0
  shown = capsys.readouterr().out
  for said in ("temporaries", "16.00 GiB", "cycles", "8 x TPU v5 lite", "in loops of 3"):
    assert said in shown


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_reading_and_writing_compile(tmp_path, step):
  assert compile_("--topology=v5e:2x4", f"--step={step}", f"--out={tmp_path}") == 0
  found = json.loads((tmp_path / "report.json").read_text())
  assert found["fits"] and found["step"] == step
  assert found["bytes_per_chip"]["alias"] > 0, "the state is written where it stands"


@pytest.mark.slow
def test_what_does_not_fit_names_its_largest_buffers(tmp_path, capsys):
  """Logits of all tokens at once are too much for a chip."""
  status = compile_(
      "--topology=v5e:2x4", f"--out={tmp_path}", "--gin.BATCH_SIZE=256", "--gin.LENGTH=8192",
      "--gin.ModelConfig.vocab_size=256000", "--gin.TrainConfig.loss_chunk=1000000",
  )  # fmt: skip
  assert status == 1
  found = json.loads((tmp_path / "report.json").read_text())
  assert not found["fits"] and "Ran out of memory on HBM" in found["why"]
  logits = 256 // 4 * 8192 * 256000 // 2 * 4 / 2**30  # of a chip, float32
  assert found["largest_buffers"][0]["size"] == f"{logits:.2f}GiB"
  shown = capsys.readouterr().out
  assert f"{logits:.2f}GiB" in shown and "DOES NOT FIT" in shown


@pytest.mark.slow
def test_a_chip_with_less_memory_than_the_compiler_thinks(monkeypatch):
  """What the analysis of a program adds up to has to be there, whatever the compiler has packed."""
  from famjax import compilation, configuration  # pylint: disable=import-outside-toplevel
  from famjax.parallel import topology  # pylint: disable=import-outside-toplevel

  monkeypatch.setattr(topology, "hbm_bytes", lambda device: 1 << 20)
  bindings = [a.removeprefix("--gin.") for a in RUN if a.startswith("--gin.")]
  bindings += ["ModelConfig.num_layers=1", "LENGTH=128"]
  run = compilation.Run(**configuration.run_from_gin(["gin/runs/excerpts.gin"], bindings))
  found = compilation.compiled(run, "train", topology.devices_of("v5e:2x4"))
  assert not found["fits"] and "are more than the chip's 0.00 GiB" in found["why"]
  found |= {"topology": "v5e:2x4", "slices": 1, "step": "train"}
  assert "DOES NOT FIT" in compilation.table(found) and "temporaries" in compilation.table(found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v99:2x2"], "--topology=v99:2x2: the TPU compiler does not know it"),
        (["--topology=v5e:2x4", "--slices=0"], "--slices=0: use at least 1"),
        (["--topology=v5e:2x4", "--gin.MESH_FSDP=3"], "does not come out on 8 devices"),
        (["--topology=v5e:2x4", "--gin.BATCH_SIZE=6"], "6 rows cannot be dealt out evenly"),
        (["--topology=v5e:2x4", "--gin.LENGTH=500"], "500 tokens, is not a multiple of block_size 128"),
        (["--topology=v5e:2x4", "--gin.NOTHING=3"], "no gin file of this run uses the name 'NOTHING'"),
        (["--topology=v5e:2x4", "--gin.AxisRules.mlp=model"], "there is no mesh axis 'model'"),
        (["--topology=v5e:2x4", "--gin.AxisRules.wide=data"], "doesn't have a parameter named 'wide'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, message, capsys):
  assert compile_(*arguments) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("famjax: error:") and message in line
