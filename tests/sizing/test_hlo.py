"""What a program sends, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from bond_jax.devices import sharding
from bond_jax.sizing import hlo

D = 64  # features; every device of eight has 8 of them


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(8, 1)


def sent(f, mesh, *args, loops=1):
  """Kind -> (times, bytes) of f, called with (shape, axes) each."""
  structs = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, axes))
    for shape, axes in args
  ]
  text = jax.jit(f).lower(*structs).compile().as_text()
  return hlo.totals(hlo.collectives(text, loops))


def by_hand(f, mesh, specs, out):
  return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out)


def test_each_kind_and_what_a_device_receives(mesh):
  part, size = P('data'), 4 * D * D
  x = ((D, D), part)
  gather = lambda x: jax.lax.all_gather(x, 'data', tiled=True)
  found = sent(
    jax.shard_map(
      gather, mesh=mesh, in_specs=part, out_specs=P(), check_vma=False
    ), mesh, x,
  )  # fmt: skip
  assert found == {'all-gather': (1, size * 7 / 8)}
  reduce = lambda x: jax.lax.psum(x, 'data')
  found = sent(by_hand(reduce, mesh, part, P()), mesh, x)
  assert found == {'all-reduce': (1, 2 * size / 8 * 7 / 8)}
  scatter = lambda x: jax.lax.psum_scatter(x, 'data', tiled=True)
  found = sent(by_hand(scatter, mesh, part, part), mesh, x)
  assert found == {'reduce-scatter': (1, size / 8 / 8 * 7)}
  ring = [(i, (i + 1) % 8) for i in range(8)]
  turn = lambda x: jax.lax.ppermute(x, 'data', ring)
  found = sent(by_hand(turn, mesh, part, part), mesh, x)
  assert found == {'collective-permute': (1, size / 8)}


def test_loops_count_as_often_as_they_run(mesh):
  reduce = by_hand(lambda x: jax.lax.psum(x, 'data'), mesh, P('data'), P())

  def nested(x):
    def inner(c, _):
      return reduce(c + x).sum() + 0 * c, None

    outer = lambda c, _: (jax.lax.scan(inner, c, length=3)[0], None)
    return jax.lax.scan(outer, x, length=5)[0]

  def until(x):
    """Ends when something that it computes says so."""
    go_on = lambda c: (c[0] < 100) & (c[1].sum() > 0)
    step = lambda c: (c[0] + 1, c[1] * 0.5 + 0 * reduce(c[1]).sum())
    return jax.lax.while_loop(go_on, step, (0, x))[1]

  x = ((D, D), P('data'))
  one = sent(reduce, mesh, x)['all-reduce']
  times, size = sent(nested, mesh, x)['all-reduce']
  assert times >= 15 and size == pytest.approx(15 * one[1], rel=0.01)
  for loops in (1, 7):
    found = sent(until, mesh, x, loops=loops)['all-reduce']
    assert found[1] == pytest.approx(loops * one[1], rel=0.05)


GATHER = (
  'bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=3,'
  " replica_groups=mesh['data'=8,'model'=2] {'data'}, dimensions={1}"
)
START = (
  '(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%y),'
  ' channel_id=9, source_target_pairs={{0,1}}'
)
LOOP = (
  '(s32[]{:T(128)}, f32[8,128]{1,0}) while(%init), condition=%cond, body=%body'
)
TPU = """
%cond (p: (s32[], f32[8,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28)
  %get = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %compare.2 = pred[]{:T(512)} compare(%get, %constant.1), direction=LT
}

%part.1 (q: bf16[8,16]) -> bf16[8,128] {
  ROOT %all-gather.7 = GATHER
}

%part.2 (q: bf16[8,16]) -> bf16[8,128] {
  ROOT %all-gather.8 = GATHER
}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %a = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%part.1
  %b = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%part.2
  ROOT %t = (s32[], f32[8,128]) tuple(%i, %b)
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %while.1 = LOOP
  %permute = START
  ROOT %z = f32[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""
for line in ('GATHER', 'START', 'LOOP'):
  TPU = TPU.replace(line, globals()[line])


def test_the_text_of_a_tpu_program():
  """Trip counts in conditions, one collective in parts, starts with inputs."""
  found = hlo.totals(hlo.collectives(TPU))
  assert found == {
    'all-gather': (28, 28 * 8 * 128 * 2 * 7 / 8),
    'collective-permute': (1, 16),
  }
