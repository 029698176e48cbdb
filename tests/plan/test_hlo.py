"""A compiled program's text: arrays and their padding, loops and how often they run, and what is exchanged."""

import jax
import jax.numpy as jnp
import pytest

from cait_jax.plan.hlo import Collective, arrays_in, collectives, read_program, totals

TWO_LOOPS = """
HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = bf16[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] LIMIT
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, backend_config={TRIPS}
  %ar-start = (f32[4]{0}, f32[2,3]{1,0}) all-reduce-start(%p, %q), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %ag-start = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
  ROOT %done = f32[4]{0} all-reduce-done(%ar-start)
}
"""
EXCHANGED = [
    Collective("all-gather", ("bf16[8,4]",), 64, 24, 4),
    Collective("all-reduce", ("f32[2,3]", "f32[4]"), 40, 1, 2),
    Collective("all-gather", ("f32[8]",), 32, 1, 4),
]


def program(limit="parameter(0)", trips=""):
    return read_program(TWO_LOOPS.replace("LIMIT", limit).replace("TRIPS", trips))


@pytest.mark.parametrize(
    "told",
    [{"trips": '"known_trip_count":{"n":"24"}'}, {"limit": "constant(24)"}],
    ids=["by the compiler", "by the condition"],
)
def test_loops_multiply_and_asynchronous_pairs_count_once(told):
    exchanged = collectives(program(**told))
    assert exchanged == EXCHANGED
    assert totals(exchanged) == {"all-gather": (25, 24 * 64 + 32), "all-reduce": (1, 40)}


def test_a_loop_of_unknown_length_that_exchanges_is_refused():
    with pytest.raises(ValueError, match="body does all-gather in a loop of unknown length"):
        collectives(program())


SPREAD = """
HloModule m

%piece.1 (a: bf16[2,4]) -> bf16[8,4] {
  ROOT %ag.1 = bf16[8,4]{1,0} all-gather(%a), channel_id=7, frontend_attributes={chain_id="1"}
}

%piece.2 (a: bf16[2,4]) -> bf16[8,4] {
  ROOT %ag.2 = bf16[8,4]{1,0} all-gather(%a), channel_id=7, frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.3 (a: bf16[8,4]) -> bf16[2,4] {
  %ar = bf16[8,4]{1,0} all-reduce(%a), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %part = bf16[2,4]{1,0} dynamic-slice(%ar, %i, %z), dynamic_slice_sizes={2,4}
}

ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  %x = bf16[8,4]{1,0} fusion(%p), kind=kCustom, calls=%piece.1
  %y = bf16[8,4]{1,0} fusion(%p), kind=kCustom, calls=%piece.2
  ROOT %z = bf16[2,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_tpus_spread_a_gather_over_what_they_compute_meanwhile():
    assert collectives(read_program(SPREAD)) == [
        Collective("all-gather", ("bf16[8,4]",), 64, 1),
        Collective("reduce-scatter", ("bf16[2,4]",), 16, 1, 4),
    ]


@pytest.mark.parametrize(
    ("text", "padded", "on_chip"),
    [
        ("f32[3,5]{1,0}", 60, False),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4, False),
        ("f32[3,5]{0,1:T(8,128)}", 8 * 128 * 4, False),
        ("bf16[24,32,196,288]{2,3,1,0:T(8,128)(2,1)}", 24 * 32 * 288 * 256 * 2, False),
        ("bf16[24,32,196,288]{3,2,1,0:T(8,128)(2,1)S(1)}", 24 * 32 * 200 * 384 * 2, True),
        ("u32[1]{0:T(128)S(1)}", 512, True),
        ("pred[]", 1, False),
    ],
)
def test_tpus_pad_to_tiles(text, padded, on_chip):
    (array,) = arrays_in(text)
    assert array.padded_bytes == padded
    assert array.on_chip == on_chip
    assert str(array) == text.partition("{")[0]


def test_a_program_of_jax_is_read_whole():
    def layer(x, w):
        return jnp.tanh(x @ w), ()

    compiled = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(
        jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
    )
    found = read_program(compiled.compile().as_text())
    opcodes = [line.opcode for line, _, _ in found.running()]
    assert opcodes.count("while") == 1
    (body,) = (
        name for name, times in found.times.items() if times == 5 and "while" in str(opcodes)
        and any(line.opcode == "tuple" and line.root for line in found.computations[name].values())
    )  # fmt: skip
    assert body != found.entry
    assert found.times[found.entry] == 1
