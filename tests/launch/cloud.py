"""A cloud in a folder for the tests of launch/tpu_train.sh."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HERE = pathlib.Path(__file__).resolve().parent
SCRIPT = ROOT / "launch" / "tpu_train.sh"
RUN = "--gin.RUN_DIR=gs://bucket/run"


class Cloud:
  """A folder that a fake gcloud takes for the cloud, and the script in front of it.

  With `small`, the script is a copy in a tree that holds nothing else, which is synced faster.
  """

  def __init__(self, place: pathlib.Path, small=False):
    self.script, self.poll = SCRIPT, 0.1
    if small:
      shutil.copytree(ROOT / "launch", place / "tree" / "launch")
      self.script, self.poll = place / "tree" / "launch" / "tpu_train.sh", 0.03
    self.place, self.logs = place / "cloud", place / "logs"
    self.place.mkdir()
    self.processes = []
    tools = place / "tools"
    tools.mkdir()
    for name in ("gcloud", "famjax"):
      (tools / name).symlink_to(HERE / f"{name}.sh")
    self.environment = {
        name: value for name, value in os.environ.items()
        if name not in ("TPU_NAME", "TPU_TYPE", "ZONE", "PROJECT")
    } | {
        "CLOUD": str(self.place), "PATH": f"{tools}:{os.environ['PATH']}", "FAMJAX_GRACE": "5",
    }  # fmt: skip

  def command(self, verb, *options, run=(RUN,)):
    common = ["--name=t", "--zone=z", "--type=v5litepod-32", "--wait=0.1"]
    common += [f"--poll={self.poll}", f"--logs={self.logs}"]
    return [str(self.script), verb, *common, *options, *(["--", *run] if run else [])]

  def __call__(self, verb, *options, run=(RUN,), **variables):
    return subprocess.run(
        self.command(verb, *options, run=run), capture_output=True, text=True, timeout=200,
        check=False, env=self.environment | variables,
    )  # fmt: skip

  def write(self, name, text):
    (self.place / name).write_text(text)

  @property
  def calls(self):
    file = self.place / "calls"
    return file.read_text().splitlines() if file.exists() else []

  def count(self, what):
    return sum(what in call for call in self.calls)

  @property
  def runs(self):
    """Machine and arguments of every run that was started."""
    file = self.place / "runs"
    lines = file.read_bytes().split(b"\0\n\0")[:-1] if file.exists() else []
    return [[part.decode() for part in line.split(b"\0")] for line in lines]

  def start(self, verb, *options, run=(RUN,), **variables):
    """Starts the script in a session of its own, with its output in the file `out`."""
    # Tests that nohup or a shell in the background has started ignore these signals.
    plain = ["env", "--default-signal=HUP,INT,TERM"]
    with (self.place / "out").open("ab") as out:
      process = subprocess.Popen(
          [*plain, *self.command(verb, *options, run=run)], stdout=out, stderr=out,
          start_new_session=True, env=self.environment | variables,
      )  # fmt: skip
    self.processes.append(process)
    return process

  def until(self, condition, seconds=30):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < end, self.read("out")
      time.sleep(0.05)

  def read(self, name):
    file = self.place / name
    return file.read_text() if file.exists() else ""

  def close(self):
    """Ends what a test has left behind: launchers, and runs on machines."""
    for process in self.processes:
      if process.poll() is None:
        process.kill()
        process.wait()
    for file in self.place.glob("machines/*/famjax/run.pid"):
      try:
        os.killpg(int(file.read_text().split()[0]), signal.SIGKILL)
      except (OSError, IndexError):
        pass
