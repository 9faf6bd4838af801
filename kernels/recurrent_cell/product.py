"""A small matrix product for compiled loops: a few rows times a weight matrix, at every step of a recurrence.

A BLAS call per step costs more than the product itself, and a loop that LLVM vectorises by itself keeps its sums in
memory (three times slower). So the inner loop is given to LLVM as vectors: a tile of 4 rows (or 1) by COLUMN_BYTES of
columns stays in registers while the depth runs. The weights are packed tile by tile beforehand.

Numba's cache watches the file of the calling loop only: after a change here, delete `__pycache__` in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core.base import BaseContext
from numba.extending import intrinsic
from torch import Tensor

# 32 registers of 64 bytes with AVX-512; else at least 16, of 32 or 16 bytes
VECTOR_BYTES, VECTORS = (64, 4) if binding.get_host_cpu_features().get("avx512f") else (32, 2)
COLUMN_BYTES = VECTOR_BYTES * VECTORS
ROWS = 4


def pack(matrix: Tensor) -> Tensor:
    """(K, N) -> (tiles, K, columns of a tile), the last tile filled up with zeros."""
    columns = COLUMN_BYTES // matrix.element_size()
    depth, width = matrix.shape
    tiles = -(-width // columns)
    padded = torch.nn.functional.pad(matrix, (0, tiles * columns - width))
    return padded.view(depth, tiles, columns).transpose(0, 1).contiguous()


def _tile(rows: int) -> Callable[..., Any]:
    """A Numba intrinsic: out[first : first + rows, columns of the tile] = v[first : first + rows] @ packed[tile]."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        arrays = [context.make_array(kind)(context, builder, value)
                  for kind, value in zip(signature.args[:3], arguments[:3], strict=True)]  # fmt: skip
        first, tile = arguments[3:]
        number = context.get_value_type(signature.args[0].dtype)
        lanes = VECTOR_BYTES // (signature.args[0].dtype.bitwidth // 8)
        vector, index = ir.VectorType(number, lanes), ir.IntType(64)
        name = f"llvm.fma.v{lanes}f{signature.args[0].dtype.bitwidth}"
        fma = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(vector, [vector] * 3), name
        )

        def address(array: Any, *steps: Any) -> Any:
            """Of element 0 of the array, moved by counts of numbers."""
            place = array.data
            for step in steps:
                place = builder.gep(place, [step])
            return place

        def row(array: Any, r: int) -> Any:
            width = builder.extract_value(array.shape, 1)
            return builder.mul(builder.add(first, index(r)), width)

        out, v, packed = arrays
        depth = builder.extract_value(packed.shape, 1)
        columns = index(lanes * VECTORS)
        weights = address(packed, builder.mul(builder.mul(tile, depth), columns))
        inputs = [address(v, row(v, r)) for r in range(rows)]
        start, loop, end = builder.block, builder.append_basic_block("depth"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        sums = [[builder.phi(vector) for _ in range(VECTORS)] for _ in range(rows)]
        at = builder.gep(weights, [builder.mul(k, columns)])
        u = [
            builder.load(builder.bitcast(builder.gep(at, [index(q * lanes)]), vector.as_pointer()), align=4)
            for q in range(VECTORS)
        ]
        zero, nothing = ir.Constant(vector, [0.0] * lanes), ir.Constant(vector, ir.Undefined)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        more = []
        for r in range(rows):
            factor = builder.load(builder.gep(inputs[r], [k]))
            spread = builder.insert_element(nothing, factor, ir.IntType(32)(0))
            spread = builder.shuffle_vector(spread, nothing, everywhere)
            more.append([builder.call(fma, [spread, u[q], sums[r][q]]) for q in range(VECTORS)])
        following = builder.add(k, index(1))
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, end)
        k.add_incoming(index(0), start)
        k.add_incoming(following, loop)
        for r in range(rows):
            for q in range(VECTORS):
                sums[r][q].add_incoming(zero, start)
                sums[r][q].add_incoming(more[r][q], loop)
        builder.position_at_end(end)
        for r in range(rows):
            to = address(out, row(out, r), builder.mul(tile, columns))
            for q in range(VECTORS):
                place = builder.bitcast(builder.gep(to, [index(q * lanes)]), vector.as_pointer())
                builder.store(more[r][q], place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile_of_rows(typing: Any, out: Any, v: Any, packed: Any, first: Any, tile: Any) -> Any:
        return types.void(out, v, packed, types.int64, types.int64), generate

    return tile_of_rows


_four_rows, _one_row = _tile(ROWS), _tile(1)


@njit(nogil=True, cache=True, error_model="numpy", inline="never")
def multiply(v: Any, packed: Any, out: Any) -> None:
    """out = v @ matrix, where packed = pack(matrix). v: (R, K), out: (R, N filled up to whole tiles), C-contiguous."""
    rows = v.shape[0]
    whole = rows - rows % ROWS
    for tile in range(packed.shape[0]):
        for first in range(0, whole, ROWS):
            _four_rows(out, v, packed, first, tile)
        for first in range(whole, rows):
            _one_row(out, v, packed, first, tile)
