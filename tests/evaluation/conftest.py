"""What tests of evaluation share."""

from tests.inference.tiny import few_shapes  # pylint: disable=unused-import
