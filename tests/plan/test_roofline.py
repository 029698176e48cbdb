"""Topologies and the roofline of counted work."""

import pytest

from cait_jax import UserError
from cait_jax.plan.hlo import Collective
from cait_jax.plan.roofline import CHIPS, parse_topology, roofline, sent_bytes


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
