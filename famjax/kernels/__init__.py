"""Pallas kernels, each equal to a plain function of `famjax.model`; arrays in, arrays out."""
