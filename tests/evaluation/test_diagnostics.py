"""`famjax look` leaves a table and a picture."""

import json

from famjax import cli
from tests.inference import tiny


def test_the_command_leaves_a_picture(tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config())
  command = ["look", str(tmp_path / "run"), "--text=A text of some blocks."]
  command += [f"--out={tmp_path / 'look'}"]
  assert cli.main(command) == 0
  assert "distance" in capsys.readouterr().out
  assert len(json.loads((tmp_path / "look" / "fam.json").read_text())["layers"]) == 2
  assert (tmp_path / "look" / "fam.png").stat().st_size > 10_000
  tiny.save(tmp_path / "plain", tiny.config("bswa"))
  assert cli.main(["look", str(tmp_path / "plain"), "--text=abcdefgh"]) == 2
  assert "'bswa', which has no FAM to look at" in capsys.readouterr().err
