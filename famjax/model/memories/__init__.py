"""The rivals of a FAM, and its variants that go from block to block; importing registers them."""

from famjax.model.memories import armt, feedback, infini, melodi, rmt, segments

__all__ = ["armt", "feedback", "infini", "melodi", "rmt", "segments"]
