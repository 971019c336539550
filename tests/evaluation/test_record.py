"""Every evaluation that a gin file describes is one that the command can run."""

import pathlib

import gin
import pytest

from famjax.configuration import configure

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
UNSET = {"pg19": ["CORPUS=."], "isabelle": ["CORPUS=."], "long_context": ["DATA_DIR=."]}
FILES = sorted((ROOT / "gin" / "eval").glob("*.gin"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_resolves(path):
  configure([str(path)], UNSET.get(path.stem, []))
  evaluation = gin.get_configurable("Measurement")().evaluation
  assert callable(evaluation.run) and isinstance(evaluation.seed, int)
  assert path.read_text(encoding="utf-8").startswith("# ")
