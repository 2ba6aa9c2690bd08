"""Sixteen float32 lanes as a value in numba code.

numba leaves vectorising to LLVM, which gives up on short inner loops over pointers that might
overlap. These intrinsics say it outright: a `Lanes` value is an LLVM ``<16 x float>``, one AVX-512
register, two of AVX2, four of NEON. Addresses are plain int64; nothing is checked.

    total = splat(0.0)
    for i in range(0, width, LANES):
        total = fma(load_float32(x + 4 * i), load_float32(w + 4 * i), total)
    result = reduce_add(total)

numba's disk cache knows a kernel by the file it is written in: after a change here, touch
``compiled.py``.
"""

# ruff: noqa: D103, ANN
# numba calls `codegen` with a fixed signature, and infers every type in compiled code.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

LANES = 16

_F32 = ir.FloatType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_VF32 = ir.VectorType(_F32, LANES)
_VI16 = ir.VectorType(_I16, LANES)
_VI32 = ir.VectorType(_I32, LANES)


class Lanes(types.Type):
    """The numba type of sixteen float32 lanes."""

    def __init__(self):
        super().__init__(name="Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _VF32)


def _load(builder, address, vector, align):
    value = builder.load(builder.inttoptr(address, vector.as_pointer()))
    value.align = align
    return value


def _store(builder, value, address, align):
    store = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    store.align = align


def _constant(vector, value):
    return ir.Constant(vector, [value] * LANES)


def _call(builder, name, *args):
    """An LLVM intrinsic whose result and arguments are all ``<16 x float>``."""
    kind = ir.FunctionType(_VF32, [_VF32] * len(args))
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args)


@intrinsic
def load_float32(typing, address):
    def codegen(context, builder, signature, args):
        return _load(builder, args[0], _VF32, 4)

    return lanes(types.int64), codegen


@intrinsic
def load_bfloat16(typing, address):
    def codegen(context, builder, signature, args):
        bits = builder.zext(_load(builder, args[0], _VI16, 2), _VI32)
        return builder.bitcast(builder.shl(bits, _constant(_VI32, 16)), _VF32)

    return lanes(types.int64), codegen


@intrinsic
def store_float32(typing, address, value):
    def codegen(context, builder, signature, args):
        _store(builder, args[1], args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64, lanes), codegen


def _round_to_bfloat16(builder, value):
    """Round to nearest even; the upper halves as ``<16 x i16>``. NaN stays NaN for our inputs."""
    bits = builder.bitcast(value, _VI32)
    odd = builder.and_(builder.lshr(bits, _constant(_VI32, 16)), _constant(_VI32, 1))
    rounded = builder.add(builder.add(bits, _constant(_VI32, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _constant(_VI32, 16)), _VI16)


@intrinsic
def store_bfloat16(typing, address, value):
    def codegen(context, builder, signature, args):
        _store(builder, _round_to_bfloat16(builder, args[1]), args[0], 2)
        return context.get_dummy_value()

    return types.void(types.int64, lanes), codegen


@intrinsic
def round_bfloat16(typing, value):
    """The lanes as they would read back after a bfloat16 store."""

    def codegen(context, builder, signature, args):
        bits = builder.zext(_round_to_bfloat16(builder, args[0]), _VI32)
        return builder.bitcast(builder.shl(bits, _constant(_VI32, 16)), _VF32)

    return lanes(lanes), codegen


@intrinsic
def splat(typing, value):
    def codegen(context, builder, signature, args):
        undef = ir.Constant(_VF32, ir.Undefined)
        one = builder.insert_element(undef, args[0], ir.Constant(_I32, 0))
        return builder.shuffle_vector(one, undef, ir.Constant(_VI32, [0] * LANES))

    return lanes(types.float32), codegen


@intrinsic
def fma(typing, a, b, c):
    """A b + c with one rounding."""

    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.fma.v16f32", *args)

    return lanes(lanes, lanes, lanes), codegen


def _binary(operation):
    @intrinsic
    def function(typing, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, operation)(*args)

        return lanes(lanes, lanes), codegen

    return function


add = _binary("fadd")
multiply = _binary("fmul")
divide = _binary("fdiv")


@intrinsic
def maximum(typing, a, b):
    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.maxnum.v16f32", *args)

    return lanes(lanes, lanes), codegen


@intrinsic
def negative_absolute(typing, a):
    """-|a|."""

    def codegen(context, builder, signature, args):
        bits = builder.or_(builder.bitcast(args[0], _VI32), _constant(_VI32, 0x80000000))
        return builder.bitcast(bits, _VF32)

    return lanes(lanes), codegen


@intrinsic
def where_negative(typing, a, then, otherwise):
    """`then` in the lanes where a < 0, else `otherwise`."""

    def codegen(context, builder, signature, args):
        below = builder.fcmp_ordered("<", args[0], _constant(_VF32, 0.0))
        return builder.select(below, args[1], args[2])

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def _floor(typing, a):
    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.floor.v16f32", *args)

    return lanes(lanes), codegen


@intrinsic
def _power_of_two(typing, a):
    """2**a for whole a from -126 to 127: a into the exponent bits."""

    def codegen(context, builder, signature, args):
        whole = builder.add(builder.fptosi(args[0], _VI32), _constant(_VI32, 127))
        return builder.bitcast(builder.shl(whole, _constant(_VI32, 23)), _VF32)

    return lanes(lanes), codegen


def _reduction(name):
    @intrinsic
    def function(typing, a):
        def codegen(context, builder, signature, args):
            value = args[0]
            width = LANES
            while width > 1:
                width //= 2
                kind = ir.VectorType(_I32, width)
                undef = ir.Constant(value.type, ir.Undefined)
                low = builder.shuffle_vector(value, undef, ir.Constant(kind, list(range(width))))
                high = builder.shuffle_vector(
                    value, undef, ir.Constant(kind, list(range(width, 2 * width)))
                )
                if name == "add":
                    value = builder.fadd(low, high)
                else:
                    value = builder.select(builder.fcmp_ordered(">", low, high), low, high)
            return builder.extract_element(value, ir.Constant(_I32, 0))

        return types.float32(lanes), codegen

    return function


reduce_add = _reduction("add")
reduce_max = _reduction("max")


@njit(inline="always")
def exp(x):
    """e**x for x <= 0, to about 2 ulp; 0 far below.

    Cephes' expf: x = n ln2 + r, a polynomial in r, then n into the exponent bits.
    """
    x = maximum(x, splat(np.float32(-87.0)))
    half = splat(np.float32(0.5))
    n = _floor(fma(x, splat(np.float32(1.44269504088896341)), half))
    r = fma(n, splat(np.float32(-0.693359375)), x)
    r = fma(n, splat(np.float32(2.12194440e-4)), r)
    p = splat(np.float32(1.9875691500e-4))
    p = fma(p, r, splat(np.float32(1.3981999507e-3)))
    p = fma(p, r, splat(np.float32(8.3334519073e-3)))
    p = fma(p, r, splat(np.float32(4.1665795894e-2)))
    p = fma(p, r, splat(np.float32(1.6666665459e-1)))
    p = fma(p, r, half)
    p = add(fma(p, multiply(r, r), r), splat(np.float32(1.0)))
    return multiply(p, _power_of_two(n))


@njit(inline="always")
def sigmoid(x):
    one = splat(np.float32(1.0))
    e = exp(negative_absolute(x))
    return divide(where_negative(x, e, one), add(one, e))


@njit(inline="always")
def tanh(x):
    """1 - 2 / (1 + e^2x), by the sign of x so that it never overflows."""
    one = splat(np.float32(1.0))
    e = exp(multiply(splat(np.float32(2.0)), negative_absolute(x)))
    size = divide(fma(splat(np.float32(-1.0)), e, one), add(one, e))
    return where_negative(x, multiply(splat(np.float32(-1.0)), size), size)
