"""What the network is: configuration, state, attention, memory, layers, decoder.

This room imports jax and flax only: no files, no logging, no gin, no TensorFlow.
"""
