"""What compiled kernels need and Python cannot say: machine instructions and one system call.

Each is a few lines of LLVM; numba inlines them. Usable inside kernels only.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

DIFFERENCE_LANES = 64
"""Elements that `difference_mask` compares at a time."""

SUM_LANES = 8
"""Columns that `add_scaled_lanes` adds at a time."""

read_at = types.ExternalFunction(
    "pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64)
)
"""``pread(2)``: read into the memory at an array's ``.ctypes``; -1 where it fails."""


@intrinsic
def float32_from_bits(typingctx: Any, bits: Any) -> Any:
    """Take a uint32 for the float32 of that pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_from_float32(typingctx: Any, value: Any) -> Any:
    """Take a float32 for its pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def bits_from_float64(typingctx: Any, value: Any) -> Any:
    """Take a float64 for its pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


@intrinsic
def float64_from_bits(typingctx: Any, bits: Any) -> Any:
    """Take a uint64 for the float64 of that pattern."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), codegen


@intrinsic
def trailing_zeros(typingctx: Any, word: Any) -> Any:
    """Count the zero bits below the lowest set bit of a uint64 that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Have the memory of ``array[at]`` brought into the cache, without waiting for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        instruction = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [place.type, number, number, number]),
            "llvm.prefetch.p0i8",
        )
        to_read, all_levels, data_cache = number(0), number(3), number(1)
        builder.call(instruction, [place, to_read, all_levels, data_cache])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def difference_mask(typingctx: Any, a: Any, a_at: Any, b: Any, b_at: Any) -> Any:
    """Compare 64 elements of two arrays of one dtype, from ``a[a_at]`` and ``b[b_at]`` on.

    Returns a uint64 whose bit i is set where element i differs. One vector comparison for as many
    elements as a register holds, where a loop over elements would be a branch for each.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = signature.args[0].dtype.bitwidth
        lanes = ir.VectorType(ir.IntType(bits), DIFFERENCE_LANES)

        def loaded(array_type: Any, array: Any, at: Any) -> Any:
            data = context.make_array(array_type)(context, builder, array).data
            place = builder.bitcast(builder.gep(data, [at]), lanes.as_pointer())
            return builder.load(place, align=bits // 8)

        differs = builder.icmp_unsigned(
            "!=",
            loaded(signature.args[0], args[0], args[1]),
            loaded(signature.args[2], args[2], args[3]),
        )
        return builder.bitcast(differs, ir.IntType(DIFFERENCE_LANES))

    return types.uint64(a, types.int64, b, types.int64), codegen


@intrinsic
def load_word(typingctx: Any, raw: Any, at: Any) -> Any:
    """Load 8 bytes of a uint8 array from ``raw[at]`` on, at any alignment, as a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.gep(data, [args[1]])
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(raw, types.int64), codegen


@intrinsic
def crc32c_word_sse42(typingctx: Any, crc: Any, word: Any) -> Any:
    """Add 8 bytes to a CRC-32C register; x86 with SSE 4.2 only."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(64)
        instruction = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(wide, [wide, wide]),
            "llvm.x86.sse42.crc32.64.64",
        )
        return builder.call(instruction, args)

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def add_scaled_lanes(
    typingctx: Any, out: Any, row: Any, scale: Any, weights: Any, weights_row: Any, column: Any
) -> Any:
    """Add ``scale * weights[weights_row]`` to ``out[row]``, 8 columns from `column` on.

    Both arrays are matrices of float32 or float64, C-ordered, one row after the other. The sum is
    taken in float64, as a loop over the columns would take it: to the same bits.
    """
    if any(array.layout != "C" or array.ndim != 2 for array in (out, weights)):
        return None
    double = ir.VectorType(ir.DoubleType(), SUM_LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def place_of(array_type: Any, array: Any, row: Any) -> tuple[Any, int]:
            matrix = context.make_array(array_type)(context, builder, array)
            width = builder.extract_value(matrix.shape, 1)
            place = builder.gep(matrix.data, [builder.add(builder.mul(row, width), args[5])])
            lanes = ir.VectorType(place.type.pointee, SUM_LANES)
            return builder.bitcast(place, lanes.as_pointer()), array_type.dtype.bitwidth // 8

        def loaded(place: Any, itemsize: int) -> Any:
            lanes = builder.load(place, align=itemsize)
            return lanes if lanes.type == double else builder.fpext(lanes, double)

        to, to_itemsize = place_of(signature.args[0], args[0], args[1])
        added = loaded(*place_of(signature.args[3], args[3], args[4]))
        first = builder.insert_element(
            ir.Constant(double, ir.Undefined), args[2], ir.Constant(ir.IntType(32), 0)
        )
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), SUM_LANES), [0] * SUM_LANES)
        scales = builder.shuffle_vector(first, first, everywhere)
        total = builder.fadd(loaded(to, to_itemsize), builder.fmul(scales, added))
        if total.type != to.type.pointee:
            total = builder.fptrunc(total, to.type.pointee)
        builder.store(total, to, align=to_itemsize)
        return context.get_dummy_value()

    arguments = (out, types.int64, types.float64, weights, types.int64, types.int64)
    return types.void(*arguments), codegen
