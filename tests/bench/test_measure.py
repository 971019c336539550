"""Cases are timed in turn; what is too slow or too large is left out; what is there is not done again."""

import argparse
import json
import pathlib
import re

import pytest

from famjax import cli, configuration
from famjax.bench import cases, measure
from famjax.bench.measure import Bench
from famjax.errors import UserError
from tests.bench.test_cases import MODEL, N

LENGTHS = (8 * N, 16 * N)
GIN = pathlib.Path(__file__).resolve().parents[2] / "gin" / "bench"


@pytest.fixture(name="called")
def _called(monkeypatch):
  """Cases that take a second for every token of a row, three times that without a FAM."""
  now, called = [0.0], []

  def make(model, optimizer, case):
    del model, optimizer

    def call(_):
      called.append((case.step, case.memory, case.length))
      now[0] += case.length * (3 if case.memory == "bswa" else 1)

    return cases.Ready(lambda: None, call, 2**20 * case.length, 1.5)

  monkeypatch.setattr(cases, "make", make)
  monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(measure, "rates", lambda dtype, size: {"flops": 1e12, "bytes": 1e12})
  return called


def bench(**changes):
  return Bench(MODEL, **dict(
      steps=("decode",), memories=("fam", "bswa"), lengths=LENGTHS, repeats=2, limit_seconds=1e4
  ) | changes)  # fmt: skip


def test_memories_take_turns(called, tmp_path):
  found = measure.measure(bench(), tmp_path)
  turns = [("decode", memory, 8 * N) for memory in ("fam", "bswa")]
  assert called[:6] == turns * 3  # one round to warm up
  first, second = found["cases"][:2]
  assert (first["seconds"], second["seconds"]) == (8 * N, 24 * N) and len(first["laps"]) == 2
  assert first["of_floor"] == pytest.approx(first["floor_seconds"] / (8 * N))
  row = measure.table(found)[1]
  assert row[0] == "decode, 128" and row[3] == "0.333"
  assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_it_goes_on(called, tmp_path, monkeypatch):
  real = cases.make

  def interrupted(model, optimizer, case):
    if case.length == 16 * N:
      raise KeyboardInterrupt
    return real(model, optimizer, case)

  monkeypatch.setattr(cases, "make", interrupted)
  with pytest.raises(KeyboardInterrupt):
    measure.measure(bench(), tmp_path)
  called.clear()
  monkeypatch.setattr(cases, "make", real)
  measure.measure(bench(), tmp_path)
  assert {length for *_, length in called} == {16 * N}
  assert len(json.loads((tmp_path / "report.json").read_text())["cases"]) == 4
  with pytest.raises(UserError, match=r"is of another bench or machine \(repeats\): name another"):
    measure.measure(bench(repeats=3), tmp_path)
  monkeypatch.setattr(measure, "small_pages", lambda: "other")
  with pytest.raises(UserError, match=r"\(small_pages\)"):
    measure.measure(bench(), tmp_path)


def test_what_is_left_out_says_why(called, tmp_path):
  prefill = dict(steps=("prefill",))
  found = measure.measure(bench(limit_seconds=40 * N, **prefill), tmp_path)  # bswa: 24, then 48 N
  assert "left_out" not in found["cases"][2]
  assert re.fullmatch(r"at least 7\d\d s", why := found["cases"][3]["left_out"])
  assert measure.table(found)[2][2:4] == [why, ""]
  found = measure.measure(bench(limit_bytes=10 * N * 2**20), tmp_path / "small")
  assert found["cases"][3]["left_out"] == "needs 0.2 of 0.2 GiB"
  assert (*prefill["steps"], "bswa", 16 * N) not in called


def test_slow_calls_are_fewer(called, tmp_path):
  measure.measure(bench(repeats=5, limit_seconds=25 * N, lengths=LENGTHS[:1]), tmp_path)
  assert [c[1] for c in called].count("bswa") == 3 and [c[1] for c in called].count("fam") == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=("write",)), "Bench.steps is .*choose of train, prefill, decode"),
        (dict(memories=()), "Bench.memories"), (dict(repeats=0), "at least 1"),
        (dict(lengths=(24,)), "no multiple of block_size"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(change, message):
  with pytest.raises(UserError, match=message):
    bench(**change).validate()


@pytest.mark.parametrize("file", sorted(path.name for path in GIN.glob("*.gin")))
def test_every_file_describes_a_bench(file):
  configuration.configure([f"gin/bench/{file}"], [])
  configuration.bench_from_gin().validate()


@pytest.mark.parametrize(
    "pages, tunables, small",
    [
        ("always [madvise] never", "", True),
        ("always [madvise] never", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=0", True),
        ("always [madvise] never", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1", False),
        ("[always] madvise never", "", False),
        ("always madvise [never]", "", False),
        (None, "", False),
    ],
)  # fmt: skip
def test_small_pages_are_told(pages, tunables, small, tmp_path, monkeypatch, capsys):
  file = tmp_path / "enabled"
  if pages:
    file.write_text(pages)
  monkeypatch.setattr(measure, "_PAGES", file)
  found = {"parameters": 1, "rates": dict(flops=1, bytes=1), "cases": []}
  monkeypatch.setattr(measure, "measure", lambda *_: found)
  monkeypatch.setenv("GLIBC_TUNABLES", tunables)
  measure.command(bench(), argparse.Namespace(out=str(tmp_path)))
  assert (":glibc.malloc.hugetlb=1" in capsys.readouterr().err) == small


def test_the_command(tmp_path, capsys):
  sizes = dict(num_layers=1, model_dim=16, num_heads=2, ff_dim=16)
  options = [f"--gin.ModelConfig.{name}={value}" for name, value in sizes.items()]
  options += ["--gin.BLOCK_SIZE=16", "--gin.FAM_LENGTH=2", "--gin.LENGTHS=(32,)", "--gin.REPEATS=1"]
  command = ["bench", "--gin_file=gin/bench/small.gin", *options, f"--out={tmp_path}"]
  assert cli.main(command) == 0
  out = capsys.readouterr().out
  for step in cases.STEPS:
    assert f"| {step}, 32 " in out
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["rates"]["flops"] > 1e9 and report["rates"]["bytes"] > 1e8
  assert all(one["seconds"] > 0 for one in report["cases"]) and len(report["cases"]) == 9
  assert cli.main(["bench"]) == 2
