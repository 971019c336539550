"""What every test shares: JAX on the CPU, and hypothesis profiles without deadlines.

Compiling takes seconds the first time a shape is seen, so that a deadline per example would measure
the compiler. The profile `ci` (HYPOTHESIS_PROFILE=ci) draws the same examples on every run; the
default one looks for new ones.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis  # pylint: disable=wrong-import-position

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items):
  """Fast tests first; those marked `slow` after them, in their own order."""
  items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
