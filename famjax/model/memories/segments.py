"""Feedback memory segments (TransformerFM): TransformerFAM, appendix C.2, Fig. 8.

    x' = layer(x), its queries seeing [K(x'_{t-M}) .. K(x'_{t-1}), K(x)], values likewise

BSWA whose memory segments are made of what the layer gave for the last M blocks, in place of what
it was given: every key holds what its token has seen, so that the receptive field has no end. No
weights are added. The paper finds it better than BSWA at PassKey and far from FAM (Fig. 9).
"""

import dataclasses

from famjax.model import strategy


@strategy.register("feedback_segments")
@dataclasses.dataclass(frozen=True)
class FeedbackSegments(strategy.Strategy):
  """M segments of a layer's own outputs, at the places of their tokens.

  It has no options: `MemoryConfig.stop_gradient` cuts the gradient.
  """

  def layer(self, own, layer, x, memory, block):
    queries, keys, values = strategy.project(layer, x, block)
    attended = strategy.attend_causally(layer, queries, keys, values, block.past)
    x = layer.close(attended, x)
    return strategy.Output(x, memory, *layer.keys_values(x, block.turn(block.places)))
