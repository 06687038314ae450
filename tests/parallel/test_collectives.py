"""What devices send each other is read from the compiled program: kinds, bytes, groups, and how often."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip2_jax.parallel import collectives, hlo
from blip2_jax.parallel import mesh as meshes

ROWS = PartitionSpec(("data", "fsdp"))


def found(function, shape, mesh="data=2,fsdp=2,tensor=2", spec=ROWS, out=ROWS, slices=1):
    """The exchanges of `function` of one device's rows, in no particular order."""
    mesh = meshes.make_mesh(mesh, jax.devices()[:8])
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False))
    program = hlo.parse(mapped.lower(x).compile().as_text())
    return collectives.collectives(program, 8, slices)


def test_an_all_gather():
    (gather,) = found(lambda x: jax.lax.all_gather(x, ("data", "fsdp"), tiled=True), (64, 16), out=PartitionSpec())
    assert (gather.kind, gather.count, gather.bytes, gather.sent) == ("all-gather", 1, 64 * 16 * 4, 3 / 4 * 64 * 16 * 4)
    assert gather.group == (0, 2, 4, 6)
    assert [str(array) for array in gather.arrays] == ["f32[64,16]"]
    assert "all_gather" in gather.origin


def test_an_all_reduce_in_a_loop_counts_every_round():
    def function(x):
        return jax.lax.scan(lambda x, _: (jax.lax.pmax(jnp.sin(x), ("data", "tensor")), None), x, None, length=7)[0]

    (reduce,) = found(function, (64, 16))
    assert (reduce.kind, reduce.count, reduce.bytes, reduce.sent) == ("all-reduce", 7, 1024, 2 * 3 / 4 * 1024)
    assert reduce.group == (0, 1, 4, 5)


def test_a_reduce_scatter():
    (scatter,) = found(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), (64, 16), spec=PartitionSpec("data"))
    assert (scatter.kind, scatter.bytes, scatter.sent) == ("reduce-scatter", 32 * 16 * 4, 32 * 16 * 4 / 2)
    assert scatter.group == (0, 2)


def test_an_all_to_all():
    (exchange,) = found(lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True), (64, 16))
    assert (exchange.kind, exchange.bytes, exchange.sent) == ("all-to-all", 1024, 512)
    assert exchange.group == (0, 1)


def test_a_ring_in_a_loop():
    def function(x):
        pass_on = lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.fori_loop(0, 3, lambda _, x: pass_on(jnp.sin(x)), x)

    (ring,) = found(function, (64, 16), mesh="data=4,fsdp=2")
    assert (ring.kind, ring.count, ring.bytes, ring.sent) == ("collective-permute", 3, 512, 512)
    assert ring.group == (0, 2)


def test_the_compiler_s_own_exchanges_are_seen():
    mesh = meshes.make_mesh("data=2,fsdp=4", jax.devices()[:8])
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=place(("data", "fsdp")))
    w = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=place("fsdp", None))
    step = jax.jit(lambda x, w: x @ w, out_shardings=place(("data", "fsdp")))
    (gather,) = collectives.collectives(hlo.parse(step.lower(x, w).compile().as_text()), 8)
    assert (gather.kind, gather.bytes, gather.group) == ("all-gather", 128 * 256 * 4, (0, 1, 2, 3))


@pytest.mark.parametrize(("axis", "between"), [("data", True), ("fsdp", False), ("tensor", False)])
def test_exchanges_between_slices(axis, between):
    """With two slices the data axis, which varies slowest, is what spans them."""
    (reduce,) = found(lambda x: jax.lax.psum(x, axis), (64, 16), slices=2)
    assert reduce.between_slices == between


def test_biggest_first():
    def function(x):
        small, large = jax.lax.psum(x[:1], "data"), jax.lax.all_gather(x, "fsdp", tiled=True)
        return large + small

    sent = [item.sent * item.count for item in found(function, (64, 16), out=PartitionSpec("data"))]
    assert len(sent) == 2
    assert sent == sorted(sent, reverse=True)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}, x", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4], device_ids=(0,2,1,3) {'a':(2)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ('source_target_pairs={}, metadata={op_name="a"}', []),
        ('source_target_pairs={{0,3}}, metadata={op_name="a"}', [[0, 3]]),
    ],
)
def test_every_way_of_writing_groups(text, groups):
    assert collectives.replica_groups(f", channel_id=1, {text}", 4) == groups


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="no replica groups"):
        collectives.replica_groups("replica_groups=torus[2]", 4)


# What XLA for TPUs makes of exchanges, as it was printed for v5e.
ASYNC = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[512,256], y: bf16[8,4]) -> f32[512,256] {
  %x = f32[512,256]{1,0:T(8,128)} parameter(0)
  %y = bf16[8,4]{1,0} parameter(1)
  %permute = (f32[512,256]{1,0:T(8,128)S(1)}, f32[512,256]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), PAIRS
  %permute-done = f32[512,256]{1,0:T(8,128)S(1)} collective-permute-done(%permute)
  %gather = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%y), replica_groups=[1,2]<=[2], dimensions={0}
  %gather-done = bf16[16,4]{1,0} all-gather-done(%gather)
  %both = (f32[512,256]{1,0}, bf16[8,4]{1,0}) all-reduce(%permute-done, %y), replica_groups={{0,1}}, to_apply=%add
  %token = token[] after-all()
  %send = (f32[512,256]{1,0}, u32[], token[]) send(%x, %token), channel_id=4, is_host_transfer=true, TRANSFER
  ROOT %result = f32[512,256]{1,0} get-tuple-element(%both), index=0
}
""".replace("PAIRS", "channel_id=1, source_target_pairs={{0,1},{1,0}}").replace(
    "TRANSFER",
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_host_transfer_rendezvous="all-reduce_0"}',
)


def test_what_tpus_do():
    exchanges = collectives.collectives(hlo.parse(ASYNC), 2, 2)
    large, small = 512 * 256 * 4, 8 * 4 * 2
    assert {(item.kind, item.bytes, item.sent, item.between_slices) for item in exchanges} == {
        ("collective-permute", large, large, True),
        ("all-gather", 2 * small, small, True),
        ("all-reduce", large + small, large + small, True),
        ("all-reduce", large, large, True),
    }
    assert [str(array) for item in exchanges if item.kind == "all-gather" for array in item.arrays] == ["bf16[16,4]"]


def test_an_exchange_beside_several_fusions_counts_once():
    """XLA for TPUs has it go on while other things are computed, and writes it into each of these."""
    links = "".join(
        f"""
%fused.{name} (x: f32[4,8]) -> f32[8,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %gather.{name} = f32[8,8]{{1,0}} all-gather(%x), channel_id={channel}, replica_groups={{{{0,1}}}}, CHAIN
}}
""".replace("CHAIN", f'frontend_attributes={{chain_id="{chain}"}}' if chain else "dimensions={0}")
        for name, channel, chain in (("a", 5, "0"), ("b", 5, "0"), ("c", 6, "1"), ("d", 1, ""), ("e", 1, ""))
    )
    calls = "\n".join(f"  %{name} = f32[8,8]{{1,0}} fusion(%x), kind=kCustom, calls=%fused.{name}" for name in "abcde")
    program = hlo.parse(
        f"{links}\nENTRY %main (x: f32[4,8]) -> f32[4,8] {{\n  ROOT %x = f32[4,8] parameter(0)\n{calls}\n}}"
    )
    assert len(collectives.collectives(program, 2)) == 4
