"""Products with float32 results: their values and gradients, wherever they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import axes
from famjax.model.products import float32_product
from tests.model import cases

SHAPES = {  # of both factors
    "...D,VD->...V": [(2, 3, 8), (5, 8)],
    "...D,DV->...V": [(2, 3, 8), (8, 5)],
    "BTKgd,BTKmd->BTKgm": [(2, 1, 3, 6, 4), (2, 1, 3, 7, 4)],
    "BTKgm,BTKmd->BTKgd": [(2, 1, 3, 6, 7), (2, 1, 3, 7, 4)],
}  # fmt: skip


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", SHAPES)
def test_a_product_and_its_gradients(equation, dtype, platform):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in SHAPES[equation])
  plain = lambda x, y: jnp.einsum(equation, x, y, precision="highest")
  given = jnp.asarray(rng.standard_normal(plain(x, y).shape), jnp.float32)
  rounded = lambda a: a.astype(dtype).astype(jnp.float32)  # what a factor of this dtype holds
  x = x.astype(dtype)
  want, back = jax.vjp(plain, rounded(x), rounded(y))
  with axes.placed_by(cases.On(platform)):
    found, found_back = jax.vjp(lambda x, y: float32_product(equation, x, y), x, y)
    of_x, of_y = found_back(given)
  assert found.dtype == jnp.float32 and (of_x.dtype, of_y.dtype) == (x.dtype, y.dtype)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  want_x, want_y = back(rounded(given))
  # What goes back to bfloat16 factors is rounded to 8 bits; sums of float32 are in another order.
  most = 2**-7 if dtype == "bfloat16" else 1e-5
  np.testing.assert_allclose(of_x.astype(jnp.float32), want_x, rtol=most, atol=1e-5)
  np.testing.assert_allclose(of_y, want_y, rtol=1e-5, atol=1e-5)
