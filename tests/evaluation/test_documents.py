"""Documents of a directory: what is counted, and where it goes on."""

import json
import math

import numpy as np
import pytest

from famjax import cli
from famjax.errors import UserError
from famjax.evaluation import documents
from famjax.evaluation.by_position import by_position
from famjax.evaluation.documents import DocumentEval
from famjax.evaluation.record import Record
from tests.inference import tiny

EDGES = (0, 8, 40, 200)


@pytest.fixture(name="corpus")
def _corpus(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for name, size in (("a.txt", 300), ("b.txt", 20), ("c.txt", 90), ("d.thy", 50)):
    (folder / name).write_text("Es war einmal ein Koenig. " * (size // 26) + "Ende")
  return folder


def test_the_table_is_what_by_position_says_of_all(corpus, tmp_path):
  model = tiny.model("fam")
  what = DocumentEval(str(corpus), edges=EDGES, batch_size=2)
  found = what.run(model, Record(tmp_path / "out", {}))
  texts = [np.array(model.vocabulary.encode((corpus / f"{n}.txt").read_text())) for n in "abc"]
  bins = by_position(model, texts, EDGES)
  for row, bin in zip(found.results["bins"], bins):
    assert row["tokens"] == bin.tokens and row["accuracy"] == pytest.approx(bin.accuracy)
    assert row["perplexity"] == pytest.approx(math.exp(bin.nats))
  tokens = [bin.tokens for bin in bins]
  nats = np.average([bin.nats for bin in bins], weights=tokens)
  assert found.table[-1][:2] == ["all", f"{sum(tokens):,}"]
  assert float(found.table[-1][3]) == pytest.approx(math.exp(nats), abs=1e-3)
  assert found.table[0] == ["place, tokens", "tokens", "accuracy", "perplexity"]
  assert (tmp_path / "out" / "report.png").stat().st_size > 5_000


def test_it_goes_on_and_reads_what_is_new(corpus, tmp_path, monkeypatch):
  model, out = tiny.model("bswa"), tmp_path / "out"
  what = DocumentEval(str(corpus), edges=EDGES, batch_size=1)
  whole = what.run(model, Record(tmp_path / "whole", {}))
  read = []

  def count(model, texts, *rest):
    if len(read) == 2:
      raise KeyboardInterrupt
    read.append(len(texts))
    return by_position(model, texts, *rest)

  monkeypatch.setattr(documents, "by_position", count)
  with pytest.raises(KeyboardInterrupt):
    what.run(model, Record(out, {}))
  read.clear()
  assert what.run(model, Record(out, {})) == whole and read == [1]
  assert what.run(model, Record(out, {})) == whole and read == [1]
  read.clear()  # other places are other results
  other = DocumentEval(str(corpus), edges=(0, 40), documents=1)
  assert len(other.run(model, Record(out, {})).results["documents"]) == 1 and read == [1]


def test_documents_that_end_early(corpus, tmp_path):
  what = DocumentEval(str(corpus), patterns="*.thy", edges=(0, 10, 4096, 8192))
  found = what.run(tiny.model("bswa"), Record(tmp_path / "out", {}))
  assert [row[0] for row in found.table[1:]] == ["0 to 10", "10 to 4,096", "all"]


def test_the_command(corpus, tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config())
  command = ["eval", f"--checkpoint={tmp_path / 'run'}", f"--gin.CORPUS={corpus}"]
  assert cli.main([*command, "--gin_file=gin/eval/isabelle.gin", "--gin.EDGES=(0, 16, 32)"]) == 0
  assert "| 16 to 32" in capsys.readouterr().out
  report = json.loads((tmp_path / "run" / "eval" / "isabelle" / "report.json").read_text())
  assert report["asked"]["patterns"] == ["*.thy"]
  assert [name[-5:] for name in report["documents"]] == ["d.thy"]
  assert cli.main([*command[:2], "--gin_file=gin/eval/pg19.gin", "--gin.CORPUS=/nowhere"]) == 2
  assert "/nowhere: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(edges=(5, 2)), dict(edges=(3,)), dict(documents=0)])
def test_what_makes_no_sense(change):
  with pytest.raises(UserError, match="DocumentEval"):
    DocumentEval(**change).validate()
