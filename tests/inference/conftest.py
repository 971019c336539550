"""What tests of inference share."""

from tests.inference.tiny import few_shapes  # pylint: disable=unused-import
