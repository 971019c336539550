"""What famjax raises when a run cannot go on. The command line turns each into one line."""


class UserError(ValueError):
  """Bad input: one line that names the thing and the way out.

  The command line prints it as `famjax: error: ...` and ends with exit status 2.
  """


class TerminatedError(RuntimeError):
  """SIGTERM ended the work; the line says what was kept.

  The command line prints it as `famjax: error: ...` and ends with exit status 143.
  """


class DivergedError(RuntimeError):
  """A loss or a gradient is no longer finite; the line names the step.

  The command line prints it as `famjax: error: ...` and ends with exit status 1.
  """


def one_line(error: BaseException, most: int = 200) -> str:
  """Returns the message of an exception as one line of at most `most` characters."""
  return " ".join(str(error).split())[:most]
