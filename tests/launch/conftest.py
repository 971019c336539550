"""The fixture of the tests of launch/tpu_train.sh."""

import pytest

from tests.launch.cloud import Cloud


@pytest.fixture
def cloud(tmp_path, request):
  """A cloud without slices, and the script in front of it."""
  made = Cloud(tmp_path, small=getattr(request.module, "SMALL_TREE", False))
  yield made
  made.close()
