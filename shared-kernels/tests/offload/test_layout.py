"""Every byte of a unit has one place, and comes back as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_kernels.offload import ParamRef, Unit, UnitBuffer, layout_unit
from torch import nn


def unit_of(shapes):
    params = []
    for k, (shape, dtype, trainable) in enumerate(shapes):
        value = torch.randn(shape).to(dtype)
        params.append(ParamRef(f"p{k}", nn.Parameter(value, requires_grad=trainable)))
    return Unit(0, "unit", None, tuple(params))


SHAPES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(SHAPES)
def test_values_survive_and_do_not_overlap(shapes):
    unit = unit_of(shapes)
    layout = layout_unit(unit, dict.fromkeys((torch.bfloat16, torch.float16), "bf16x2")
                         | {torch.float32: "fp32"})  # fmt: skip
    flat = torch.full((layout.nbytes,), 0xAB, dtype=torch.uint8)
    layout.write(flat, {p.name: p.parameter for p in unit.params})
    buffer = UnitBuffer(layout, flat)
    for run, streams in zip(layout.runs, buffer.runs, strict=True):
        assert run.numel % 4096 == 0
        decoded = run.views(run.codec.decode(streams.main, streams.lo))
        for param, value in zip(run.params, decoded, strict=True):
            assert torch.equal(value, param.parameter.float())
    for param, view in zip(layout.frozen, buffer.frozen, strict=True):
        assert torch.equal(view, param.parameter)
        if view.numel():
            assert view.data_ptr() % 256 == flat.data_ptr() % 256


def test_size_is_that_of_the_weights():
    unit = unit_of([((1000, 1000), torch.bfloat16, True), ((1000,), torch.bfloat16, True)])
    assert layout_unit(unit, "bf16").nbytes <= 1.01 * 2 * 1_001_000 + 2 * 4096


@pytest.mark.parametrize("codec", ["fp32", "bf16", "bf16x2"])
def test_parts_split_the_buffer(codec):
    unit = unit_of([((5000,), torch.bfloat16, True), ((3,), torch.int8, False)])
    layout = layout_unit(unit, codec)
    buffer = UnitBuffer(layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    assert buffer.part("main").numel() == layout.main_nbytes
    assert buffer.part("lo").numel() == layout.lo_nbytes == (16384 if codec == "bf16x2" else 0)
