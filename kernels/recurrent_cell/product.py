"""A small matrix product for compiled loops: a few rows times a weight matrix, at every step of a recurrence.

A BLAS call per step costs more than the product itself, and a loop that LLVM vectorises by itself keeps its sums in
memory (four to six times slower in float32). So the inner loop is given to LLVM as vectors: a tile of 4 rows (or 1) by
COLUMN_BYTES of columns stays in registers while the depth runs. The weights are packed tile by tile beforehand.

Every address and load names the type it is about, so that pointers may carry one (llvmlite 0.44) or none. Where a
version of llvmlite does not take the vectors, the import warns and the products are plain loops.

Numba's cache watches the file of the calling loop only: after a change here, delete `__pycache__` in this folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite
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


class Matrix(NamedTuple):
    """A C-contiguous matrix in LLVM: the address of its first number, and its number of columns."""

    data: Any
    width: Any


def emit_tile(
    builder: ir.IRBuilder, bits: int, rows: int, *, out: Matrix, v: Matrix, packed: Any, depth: Any, first: Any,
    tile: Any,
) -> None:  # fmt: skip
    """Append out[first : first + rows, columns of the tile] = v[first : first + rows] @ packed[tile] to a block.

    bits: 32 or 64, of the numbers. packed: the address of its first number; depth, first, tile: 64-bit integers.
    """
    number = ir.FloatType() if bits == 32 else ir.DoubleType()
    lanes = VECTOR_BYTES // (bits // 8)
    vector, index = ir.VectorType(number, lanes), ir.IntType(64)
    name = f"llvm.fma.v{lanes}f{bits}"
    fma = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(vector, [vector] * 3), name)

    def at(place: Any, count: Any) -> Any:
        """The address `count` numbers further."""
        return builder.gep(place, [count], source_etype=number)

    def as_vector(place: Any) -> Any:
        return builder.bitcast(place, vector.as_pointer())

    def row(matrix: Matrix, r: int) -> Any:
        return at(matrix.data, builder.mul(builder.add(first, index(r)), matrix.width))

    columns = index(lanes * VECTORS)
    weights = at(packed, builder.mul(builder.mul(tile, depth), columns))
    inputs = [row(v, r) for r in range(rows)]
    start, loop, end = builder.block, builder.append_basic_block("depth"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(index)
    sums = [[builder.phi(vector) for _ in range(VECTORS)] for _ in range(rows)]
    weights_k = at(weights, builder.mul(k, columns))
    u = [builder.load(as_vector(at(weights_k, index(q * lanes))), align=4, typ=vector) for q in range(VECTORS)]
    zero, nothing = ir.Constant(vector, [0.0] * lanes), ir.Constant(vector, ir.Undefined)
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    more = []
    for r in range(rows):
        factor = builder.load(at(inputs[r], k), typ=number)
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
        to = at(row(out, r), builder.mul(tile, columns))
        for q in range(VECTORS):
            builder.store(more[r][q], as_vector(at(to, index(q * lanes))), align=4)


def tile_module(bits: int, rows: int, pointer: Any) -> ir.Module:
    """An LLVM module with one function, `tile(out, width, v, depth, packed, first, tile)`, around `emit_tile`; pointer:
    the type of its three addresses."""
    module, index = ir.Module(), ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [pointer, index, pointer, index, pointer, index, index])
    function = ir.Function(module, kind, "tile")
    out, width, v, depth, packed, first, tile = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    emit_tile(
        builder,
        bits,
        rows,
        out=Matrix(out, width),
        v=Matrix(v, depth),
        packed=packed,
        depth=depth,
        first=first,
        tile=tile,
    )
    builder.ret_void()
    return module


def _tile(rows: int) -> Callable[..., Any]:
    """A Numba intrinsic around `emit_tile`: of arrays out, v and packed, and integers first and tile."""

    def generate(context: BaseContext, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        out, v, packed = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:3], arguments[:3], strict=True)
        )

        def columns(array: Any) -> Any:
            return builder.extract_value(array.shape, 1)

        emit_tile(
            builder, signature.args[0].dtype.bitwidth, rows, out=Matrix(out.data, columns(out)),
            v=Matrix(v.data, columns(v)), packed=packed.data, depth=columns(packed), first=arguments[3],
            tile=arguments[4],
        )  # fmt: skip
        return context.get_dummy_value()

    @intrinsic
    def tile_of_rows(typing: Any, out: Any, v: Any, packed: Any, first: Any, tile: Any) -> Any:
        return types.void(out, v, packed, types.int64, types.int64), generate

    return tile_of_rows


_four_rows, _one_row = _tile(ROWS), _tile(1)


@njit(nogil=True, cache=True, error_model="numpy", inline="never")
def multiply_tiles(v: Any, packed: Any, out: Any) -> None:
    rows = v.shape[0]
    whole = rows - rows % ROWS
    for tile in range(packed.shape[0]):
        for first in range(0, whole, ROWS):
            _four_rows(out, v, packed, first, tile)
        for first in range(whole, rows):
            _one_row(out, v, packed, first, tile)


@njit(nogil=True, cache=True, error_model="numpy", inline="never", fastmath={"contract"})
def multiply_plain(v: Any, packed: Any, out: Any) -> None:
    columns = packed.shape[2]
    for tile in range(packed.shape[0]):
        for r in range(v.shape[0]):
            sums = out[r, tile * columns : (tile + 1) * columns]
            sums[:] = 0
            for k in range(packed.shape[1]):
                factor, weights = v[r, k], packed[tile, k]
                for c in range(columns):
                    sums[c] += factor * weights[c]


def obstacle() -> str:
    """Why this version of llvmlite does not take the vectors, empty where it does."""
    try:
        for bits, number in ((32, ir.FloatType()), (64, ir.DoubleType())):
            binding.parse_assembly(str(tile_module(bits, ROWS, number.as_pointer()))).verify()
    except Exception as error:  # noqa: BLE001  (llvmlite has no exception type of its own for it)
        return f"{type(error).__name__}: {error}"
    return ""


def chosen() -> Callable[..., None]:
    """`multiply_tiles`, or with a warning `multiply_plain` where llvmlite does not take the vectors."""
    if reason := obstacle():
        warnings.warn(
            f"recurrent_cell: llvmlite {llvmlite.__version__} does not take vector code ({reason}); products are plain "
            "loops, several times slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return multiply_plain
    return multiply_tiles


multiply = chosen()
"""out = v @ matrix, where packed = pack(matrix). v: (R, K), out: (R, N filled up to whole tiles), C-contiguous."""
