"""Topologies, the roofline, and bytes to and from memory: as XLA counts, and loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from cait_jax import UserError
from cait_jax.plan.hlo import Collective, read_program
from cait_jax.plan.roofline import (
    CHIPS,
    memory_traffic,
    parse_topology,
    roofline,
    sent_bytes,
    transfers,
)


@pytest.mark.parametrize(
    ("text", "chips", "written"),
    [
        ("v5e:4x8", 32, "v5e:4x8"),
        ("v5p:4x4x8", 128, "v5p:4x4x8"),
        ("v6e:16x16", 256, "v6e:16x16"),
        ("h100:8", 8, "h100:1x8"),
        ("a100:4x8", 32, "a100:4x8"),
    ],
)
def test_topologies_are_read(text, chips, written):
    topology = parse_topology(text)
    assert topology.chips == chips
    assert str(topology) == written


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v4:2x2x2", "names no known chip"),
        ("v5e", "write it like v5e:4x8"),
        ("v5e:4x4x4", "write it like v5e:4x8"),
        ("v5p:4x8", "write it like v5p:4x4x4"),
        ("h100:0", "write it like h100:8"),
        ("v5e:4xx8", "has no shape of v5e"),
    ],
)
def test_what_is_no_topology_gets_a_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_topology(text)


def test_links_of_open_sides_count_half_and_machines_share_a_network():
    link = CHIPS["v5e"].link
    assert parse_topology("v5e:16x16").rate() == link
    assert parse_topology("v5e:4x8").rate() == link / 2
    assert parse_topology("v5e:8x16").rate() == link * 3 / 4
    h100 = CHIPS["h100"]
    assert parse_topology("h100:8").rate() == h100.link
    assert parse_topology("h100:4x8").rate() == 8 * h100.network
    assert parse_topology("h100:4x8").rate(span=25, group=4) == h100.network
    assert parse_topology("h100:4x8").rate(span=8) == h100.link


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 7 / 8 * 1000),
        ("all-gather", 7 / 8 * 1000),
        ("reduce-scatter", 7 * 1000),
        ("collective-permute", 1000),
    ],
)
def test_rings_send_the_least_that_is_possible(kind, sent):
    assert sent_bytes(Collective(kind, (), 1000, 1, 8), chips=64) == sent
    assert sent_bytes(Collective(kind, (), 1000, 1), chips=8) == sent


def test_the_longest_bounds_a_step():
    topology = parse_topology("v5e:16x16")
    chip = topology.chip
    exchanged = [Collective("collective-permute", (), int(chip.link / 4), 2)]
    bounds = roofline(
        topology, operations=chip.operations, traffic=chip.bandwidth * 2, exchanged=exchanged
    )
    assert (bounds.compute, bounds.memory, bounds.exchange) == pytest.approx((1, 2, 0.5))
    assert bounds.seconds == 2
    assert bounds.bound == "memory"


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def traffic(program):
    return memory_traffic(read_program(program.as_text()))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, y: x + y * 2, [(64, 32), (64, 32)]),
        (lambda x, y: x @ y, [(64, 32), (32, 16)]),
        (lambda x, y: jnp.tanh(x @ y).sum(), [(64, 32), (32, 16)]),
        (lambda x: jax.nn.softmax(x), [(16, 64)]),
        (lambda x: x[3:5] + 1, [(16, 64)]),
    ],
    ids=["sum", "product", "sum of product", "softmax", "slice"],
)
def test_straight_programs_count_as_xla_counts(function, shapes):
    program = compiled(function, *shapes)
    assert traffic(program) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.05)


def test_a_loop_counts_every_turn_and_reads_of_a_stack_what_it_takes():
    def scanned(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x, stack)[0]

    side = 64
    counts = {
        depth: traffic(compiled(scanned, (side, side), (depth, side, side))) for depth in (4, 8, 16)
    }
    turn = (counts[16] - counts[8]) / 8
    assert turn == (counts[8] - counts[4]) / 4
    square = side * side * 4
    # The layer is copied out of the stack, multiplied, and its product made the next input.
    assert 4 * square <= turn <= 9 * square


def test_what_is_put_into_a_stack_counts_with_its_own_size():
    def collected(x):
        return jax.lax.scan(lambda x, _: (x * 2, x), x, None, length=100)[1]

    side = 64
    moved = traffic(compiled(collected, (side, side)))
    assert moved < 12 * 100 * side * side * 4


TPU = """
HloModule m

%fused (a: f32[24,8,128], i: s32[]) -> f32[24,8,128] {
  %a = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %new = f32[1,8,128]{2,1,0:T(8,128)S(1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  ROOT %dus = f32[24,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%a, %new, %i, %i, %i)
}

ENTRY %main (p: f32[24,8,128]) -> f32[24,8,128] {
  %p = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(2)} parameter(1)
  %fetch = (f32[1,8,128]{2,1,0:T(8,128)S(1)}, f32[24,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %there = f32[1,8,128]{2,1,0:T(8,128)S(1)} copy-done(%fetch)
  ROOT %put = f32[24,8,128]{2,1,0:T(8,128)} fusion(%p, %there, %i), kind=kLoop, calls=%fused
}
"""


def test_what_stays_on_the_chip_is_no_traffic():
    """Fetched once from memory; put into the stack, in place."""
    moved = {each.instruction.name: each.bytes for each in transfers(read_program(TPU))}
    block = 8 * 128 * 4
    assert moved == {"fetch": block, "put": block}
