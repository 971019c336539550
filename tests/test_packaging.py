"""Tests of what a user meets before any model runs: installed files, scripts, cost of an import."""

import ast
import base64
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [
    *sorted(f"launch/{path.name}" for path in ROOT.glob("launch/*.sh")),
    "tests/run.sh",
    ".ci/run",
]
# A room imports only itself and what stands before it.
ROOMS = ["kernels", "model", "parallel", "data", "convert", "training", "inference", "evaluation", "bench"]


def run(*command, **kwargs):
  return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)


@pytest.mark.parametrize("name", ["seqio", "tensorflow-datasets"])
def test_released_files_win_over_nightly_ones(name):
  """`t5` brings nightly distributions that own the same files; every file is the released one's."""
  wrong = []
  for path in importlib.metadata.files(name):
    if path.hash is None or path.suffix != ".py":
      continue
    content = path.locate().read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.new(path.hash.mode, content).digest())
    if digest.rstrip(b"=").decode() != path.hash.value:
      wrong.append(str(path))
  assert not wrong, f"overwritten by another distribution: {wrong[:5]}; see launch/environment.sh"


@pytest.mark.parametrize("code", ["famjax", "famjax.Decoder, famjax.MemoryConfig", "import famjax.evaluation"])
def test_import_needs_no_tensorflow(code):
  heavy = {
      "tensorflow", "seqio", "t5", "gin", "clu", "matplotlib", "torch", "transformers", "peft",
      "lm_eval",
  }  # fmt: skip
  code = f"import famjax, sys; {code}; print([name for name in {heavy} if name in sys.modules])"
  result = run(sys.executable, "-c", code, cwd=ROOT)
  assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_rooms_above(room):
  allowed = set(ROOMS[: ROOMS.index(room) + 1]) | {"console", "errors", "formats", "locks", "trust"}
  for path in sorted((ROOT / "famjax" / room).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      for name in names:
        parts = name.split(".")
        if parts[0] == "famjax":
          assert parts[1] in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_console_script():
  result = run(os.path.join(sysconfig.get_path("scripts"), "famjax"), "--help")
  assert result.returncode == 0, result.stderr
  assert "train" in result.stdout


def test_version():
  import famjax  # pylint: disable=import-outside-toplevel

  assert importlib.metadata.version("famjax") == famjax.__version__


def test_wheel_carries_gin_files(tmp_path):
  """A wheel has them inside the package: `famjax/gin/runs/...`."""
  result = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path), cwd=ROOT)
  assert result.returncode == 0, result.stderr
  checkout = {str(path.relative_to(ROOT)) for path in (ROOT / "gin").rglob("*.gin")}
  built = {str(path.relative_to(tmp_path / "famjax")) for path in tmp_path.rglob("*.gin")}
  assert built == checkout and "gin/runs/quickstart.gin" in built


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
  assert run("bash", "-n", script, cwd=ROOT).returncode == 0
  if script != "launch/environment.sh":  # sourced, the others are run
    assert os.access(ROOT / script, os.X_OK)
    assert "set -euo pipefail" in (ROOT / script).read_text()
  if shutil.which("shellcheck"):
    result = run("shellcheck", "-x", script, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_readme_names_the_commands():
  readme = (ROOT / "README.md").read_text()
  assert "./launch/quickstart.sh" in readme and "./tests/run.sh" in readme
  assert "./tests/run.sh" in (ROOT / ".ci/run").read_text()


@pytest.fixture(name="environment")
def _environment(tmp_path):
  """Calls famjax_environment with an interpreter that only writes down its venv and pip calls."""
  calls = tmp_path / "calls"
  calls.touch()
  fake = tmp_path / "python3"
  fake.write_text(f"""#!/usr/bin/env bash
set -eu
case "$1 $2" in
  "-m venv")
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
    touch "$4/pyvenv.cfg" ;;
  "-m pip") [ -z "${{BREAK:-}}" ] ;;
  *) exec '{sys.executable}' "$@" ;;
esac
echo "$*" >>'{calls}'
""")
  fake.chmod(0o755)

  def call(extras, **variables):
    """Returns the process, and the calls of venv and pip that it made."""
    calls.write_text("")
    variables = {"PYTHON": str(fake), "VENV": str(tmp_path / "my env"), **variables}
    make = f"source launch/environment.sh; famjax_environment {extras}; command -v python"
    process = run("bash", "-euo", "pipefail", "-c", make, cwd=ROOT, env=os.environ | variables)
    return process, calls.read_text().splitlines()

  return call


def test_environment_is_made_once(environment, tmp_path):
  process, calls = environment("base")
  assert process.returncode == 0, process.stderr
  assert process.stdout.splitlines()[-1] == str(tmp_path / "my env/bin/python")
  venv, install, settle = calls
  assert venv.startswith("-m venv") and install.endswith("--editable .")
  assert "--force-reinstall --no-deps seqio==" in settle and "tensorflow-datasets==" in settle
  assert environment("base")[1] == []
  assert environment("test")[1][0].endswith("--editable .[test]")
  assert environment("base")[1] == [] and environment("test")[1] == []
  assert environment("hf")[1][0].endswith("--editable .[test,hf]")


def test_stopped_installation_is_taken_up_again(environment):
  process, _ = environment("test", BREAK="yes")
  assert process.returncode == 2
  assert process.stderr.startswith("famjax: error: the installation stopped")
  assert [call.split(" ")[1] for call in environment("test")[1]] == ["pip", "pip"]


@pytest.mark.parametrize(
    "version, line",
    [("3.13.0 /usr", "is Python 3.13.0, famjax needs 3.11 or 3.12"), ("", "does not run")],
)
def test_other_pythons_are_refused(environment, tmp_path, version, line):
  old = tmp_path / "old"
  old.write_text(f"#!/bin/sh\necho '{version}'\n")
  old.chmod(0o755)
  process, calls = environment("base", PYTHON=str(old))
  assert (process.returncode, calls) == (2, [])
  assert line in process.stderr and process.stderr.count("\n") == 1
  assert not (tmp_path / "my env").exists()


def test_foreign_folder_is_left_alone(environment, tmp_path):
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis/chapter").touch()
  process, calls = environment("base", VENV=str(tmp_path / "thesis"))
  assert (process.returncode, calls) == (2, [])
  assert "thesis is not a Python environment" in process.stderr
  assert (tmp_path / "thesis/chapter").exists()
