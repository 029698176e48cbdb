"""Topologies, the roofline of counted work, and the search for the largest batch."""

import pytest

from cait_jax import UserError
from cait_jax.plan.chips import CHIPS, parse_topology
from cait_jax.plan.collectives import Collective
from cait_jax.plan.compiled import needed_bytes
from cait_jax.plan.largest import largest_batch
from cait_jax.plan.roofline import roofline, sent_bytes


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


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("capacity", [500.0, 10_000.0])
@pytest.mark.parametrize("start", [8, 64, 1024])
def test_the_largest_batch_is_found(start, capacity, multiple):
    tried = []

    def memory_of(batch):
        tried.append(batch)
        return 100.0 + 3.0 * batch

    found = largest_batch(memory_of, capacity, start, multiple=multiple)
    assert found.batch == int((capacity - 100) / 3) // multiple * multiple
    assert found.memory == 100.0 + 3.0 * found.batch <= capacity
    assert (found.fixed, found.by_image) == pytest.approx((100, 3))
    assert len(tried) <= 3


def test_a_compiler_that_saves_near_the_limit_is_asked_again():
    """Memory that grows faster above 100 images than below."""

    def memory_of(batch):
        return 2.0 * batch if batch <= 100 else 200 + 5.0 * (batch - 100)

    found = largest_batch(memory_of, 300.0, 16)
    assert memory_of(found.batch) <= 300 < memory_of(found.batch + 3)


def test_an_image_takes_what_it_takes_far_from_the_limit():
    """XS24 on v5e, in MB: refused at 339 images and, needing more, at 336."""

    def memory_of(batch):
        return {339: 17_480.0, 335: 17_530.0, 336: 17_530.0, 328: 15_480.0}.get(
            batch, 47.88 * batch + 678
        )

    found = largest_batch(memory_of, 16_910.0, 32)
    assert 326 <= found.batch < 335
    assert 40 < found.by_image < 60


def test_nothing_fits():
    assert largest_batch(lambda batch: 1000.0 + batch, 500.0, 8).batch == 0


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "memory required for HLO temporaries (22.19G) exceeds available HBM (15.75G)",
            22.19 * 2**30,
        ),
        ("Used 512.5M of 128M hbm", 512.5 * 2**20),
        ("no numbers", 0),
    ],
)
def test_a_refusal_names_what_is_needed(message, size):
    assert needed_bytes(message) == round(size)
