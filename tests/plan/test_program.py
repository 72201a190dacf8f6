"""What is read from a compiled program's text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from onerec_jax.errors import InputError
from onerec_jax.plan.chips import CHIPS, parse_topology
from onerec_jax.plan.collectives import Collective
from onerec_jax.plan.plan import seconds_of
from onerec_jax.plan.program import array_bytes, read
from onerec_jax.plan.traffic import traffic

# as a TPU compiler in a hurry writes it: no known_trip_count, all-reduce and slice in one fusion, arrays kept on the chip
TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%sliced (stack: f32[4,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
}

%body (state: (s32[], f32[4,8,128])) -> (s32[], f32[4,8,128]) {
  %state = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%state), index=0
  %all = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %slice = f32[8,128]{1,0:T(8,128)S(1)} fusion(%all, %step), kind=kLoop, calls=%sliced
  %out = f32[8,128]{1,0:T(8,128)} copy(%slice)
  %first = s32[]{:T(128)} constant(1)
  %more = s32[]{:T(128)} add(%step, %first)
  ROOT %next = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}) tuple(%more, %all)
}

%condition (state: (s32[], f32[4,8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}) parameter(0)
  %step.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(4)
  ROOT %less = pred[]{:T(512)} compare(%step.1, %bound), direction=LT
}

ENTRY %main (given: (s32[], f32[4,8,128])) -> (s32[], f32[4,8,128]) {
  %given = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[4,8,128]{2,1,0:T(8,128)}) while(%given), condition=%condition, body=%body
}
"""


def test_a_loop_runs_as_often_as_its_condition_says():
    runs = {instruction.name: times for _, instruction, times in read(TEXT).executed()}
    assert (runs["loop"], runs["slice"], runs["one"], runs["out"]) == (1, 4, 4, 4)
    assert "sum" not in runs, "what reductions apply to single numbers is not run by itself"


def test_traffic_is_the_slice_of_a_stack_and_what_is_written_to_main_memory():
    slice_bytes = 8 * 128 * 4
    index, counter = 4, 12  # of the slice; read twice and written
    assert traffic(read(TEXT)) == 4 * (slice_bytes + index) + 4 * slice_bytes + 4 * counter  # fusion reads, copy writes


def test_a_loop_whose_end_is_not_counted_to_counts_once():
    jumping = TEXT.replace("add(%step, %first)", "multiply(%step, %first)")
    assert {times for _, instruction, times in read(jumping).executed() if instruction.name == "out"} == {1}


def test_seconds_of_a_collective_are_the_rings_of_the_torus():
    link = CHIPS["v5p"].ici_bandwidth

    def seconds(kind: str, devices: int, topology: str = "v5p:8x8x16") -> float:
        return seconds_of(Collective(kind, ("data",), devices, 1000, 3), topology) * link

    assert seconds("all-gather", 4) == seconds("reduce-scatter", 4) == pytest.approx(3000 * 3 / 4)
    assert seconds("all-reduce", 4) == pytest.approx(2 * 3000 * 3 / 4)
    assert seconds("all-to-all", 16) == pytest.approx(3000 * 16 / 4)
    assert seconds("all-to-all", 1024) == pytest.approx(3000 * (16 + 8 + 8) / 4), "one axis after the other"
    assert seconds("all-to-all", 64) == pytest.approx(3000 * (16 + 4) / 4)
    assert seconds("collective-permute", 2) == pytest.approx(2 * 3000)


@pytest.mark.parametrize("name", ["v5p:4x4", "v9:2x2", "v5e:2x0", "v5e", "v5e:2x2x2"])
def test_a_slice_that_does_not_exist_is_refused(name: str):
    with pytest.raises(InputError, match="topology"):
        parse_topology(name)


def test_bytes_of_a_shape_with_and_without_what_stays_on_the_chip():
    shape = "(bf16[3,4]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, pred[5]{0})"
    assert array_bytes(shape) == [24, 4, 5]
    assert array_bytes(shape, main_memory=True) == [4, 5]


def test_traffic_of_a_real_program_is_what_it_must_read_and_write():
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    program = read(jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile().as_text())
    assert traffic(program) == 2 * 256 * 512 * 4
