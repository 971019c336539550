"""Counting collectives in a program's text."""

from famjax.parallel import hlo

# As XLA writes it, shortened: a loop of 18 turns in one of 4, an asynchronous gather whose start
# and end are computations of their own, a reduce-scatter as TPUs have it.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[4,8]) -> bf16[32,8] {
  ROOT %g.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}

%end (p: bf16[4,8]) -> bf16[32,8] {
  ROOT %g.2 = bf16[32,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%all-reduce-scatter.clone (p: f32[32,8]) -> f32[4,8] {
  %r = f32[32,8]{1,0} all-reduce(%p), channel_id=9, to_apply=%add
}

%until_layers (p: (s32[], f32[2])) -> pred[] {
  %c = s32[]{:T(128)} constant(18)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%layer (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %f = bf16[32,8] fusion(%x), kind=kCustom, calls=%start
  %g = bf16[32,8] fusion(%f), kind=kCustom, calls=%end, backend_config={"estimated_cycles":"100"}
  %s = f32[4,8] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone
}

%until_parts (p: (s32[], f32[2])) -> pred[] {
  %c = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%part (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %w = (s32[], f32[2]) while(%t), condition=%until_layers, body=%layer, metadata={op_name="x"}
  %both = (f32[3]{0}, s32[5]{0}) all-reduce(%a, %b), channel_id=11, to_apply=%add
}

%never (p: f32[]) -> f32[] {
  %r = f32[8]{0} all-reduce(%p), channel_id=12, to_apply=%add
}

%fused (p: f32[]) -> f32[] {
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (s32[], f32[2]) while(%t), condition=%until_parts, body=%part
  %a = ((bf16[4]{0}, f32[2]{0}), (bf16[64]{0}, f32[32]{0})) all-gather-start(%p, %q), channel_id=13
  %s = f32[16]{0} all-reduce-start(%p), channel_id=14, to_apply=%add
  %m = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=15
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
}
"""


def test_collectives_count_as_often_as_their_loops_turn():
  found = {(c.kind, c.loops): (c.count, c.bytes, c.times, c.total_bytes) for c in hlo.collectives(TEXT)}
  assert found == {
      ("all-gather", (4, 18)): (1, 512, 72, 512 * 72),
      ("reduce-scatter", (4, 18)): (1, 1024, 72, 1024 * 72),
      ("all-reduce", (4,)): (1, 32, 4, 128),
      ("all-gather", ()): (1, 256, 1, 256),
      ("all-reduce", ()): (1, 64, 1, 64),
      ("collective-permute", ()): (1, 32, 1, 32),
  }


def test_cycles_count_as_often_as_their_loops_turn():
  assert hlo.estimated_cycles(TEXT) == {(): 7, (4, 18): 4 * 18 * 100}
  assert not hlo.estimated_cycles(TEXT.replace("estimated_cycles", "other"))


def test_kernels_are_counted_by_loops_and_what_is_fused_is_none():
  """A loop's turns are taken from beside it, where they stand there."""
  found = {one.loops: (one.count, one.bytes) for one in hlo.kernels(TEXT)}
  layer = 512 + 512 + 128
  assert found[4, 18] == (3, layer) and found[4,] == (1, 32) and found[()][0] == 4
  assert hlo.kernels(TEXT.replace("body=%layer", "true_computation=%layer")) == [
      hlo.Kernels((), *found[()]), hlo.Kernels((4,), 1, 32)
  ]  # fmt: skip
  known = TEXT.replace('metadata={op_name="x"}', 'backend_config={"known_trip_count":{"n":"5"}}')
  placed = known.replace("%s = f32[4,8] fusion(%g)", "%in_dynamic-update-slice = f32[4,8] fusion(%g)")
  found = {one.loops: (one.count, one.bytes) for one in hlo.kernels(placed)}
  assert found[4, 5] == (3, layer - 128) and (4, 18) not in found


def test_a_program_of_one_device_has_none():
  import jax  # pylint: disable=import-outside-toplevel

  text = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)).lower(
      jax.numpy.ones((4, 4))
  ).compile().as_text()  # fmt: skip
  assert hlo.collectives(text) == []


def test_bytes_through_main_memory_leave_out_what_stays_in_fast_memory():
  """A fetch ahead counts once; what reads its result from there, only what it brings elsewhere."""
  text = """HloModule one

ENTRY %main (x: bf16[8,128], y: f32[4]) -> f32[4] {
  %x = bf16[8,128]{1,0:T(8,128)} parameter(0)
  %y = f32[4]{0:T(128)} parameter(1)
  %copy-start = (bf16[8,128]{1,0:T(8,128)S(1)}, bf16[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = f32[4]{0:T(128)S(1)} fusion(%copy-done, %y), kind=kLoop, calls=%other
  ROOT %copy = f32[4]{0:T(128)} copy(%fusion), metadata={op_name="%x"}
}
"""
  assert hlo.moved_bytes(text) == 8 * 128 * 2 + 4 * 4 + 4 * 4
