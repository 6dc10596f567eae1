// Vectors of eight numbers, or of as many as a register holds ("wide"), in the compiler's own vector extension:
// one source for every machine. What it cannot say well (integer dot products, half floats, rounding) is written
// per instruction set in `dots.h`.
#pragma once

#include <cstdint>
#include <cstring>

// What is called once for each block of numbers, with vectors that should not leave their registers for it; and what
// only asks for memory ahead: the compiler thinks that such a function does nothing, and drops calls that it has not
// inlined by then.
#define TOKENLOOM_INLINE [[gnu::always_inline]] static inline

namespace tokenloom {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));

#if defined(__AVX512F__)
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
typedef float f32xw __attribute__((vector_size(4 * WIDE)));
typedef int32_t i32xw __attribute__((vector_size(4 * WIDE)));
typedef int8_t i8xw __attribute__((vector_size(WIDE)));
typedef float f32xw_unaligned __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t i32xw_unaligned __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

// The integers that comparing two F gives, and F with the same number everywhere.
template <class F>
using ints_of = decltype(F{} < F{});
template <class F>
static inline F all(float x) {
    return x - F{};
}

static inline f32x8 load(const float* p) { return *reinterpret_cast<const f32x8_unaligned*>(p); }
static inline void store(float* p, f32x8 v) { *reinterpret_cast<f32x8_unaligned*>(p) = v; }
static inline f32x8 splat(float x) { return f32x8{x, x, x, x, x, x, x, x}; }
static inline i32x8 splat_int(int32_t x) { return i32x8{x, x, x, x, x, x, x, x}; }
static inline f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }
static inline f32xw load_wide(const float* p) { return *reinterpret_cast<const f32xw_unaligned*>(p); }
static inline i32xw load_wide(const int32_t* p) { return *reinterpret_cast<const i32xw_unaligned*>(p); }
static inline void store_wide(float* p, f32xw v) { *reinterpret_cast<f32xw_unaligned*>(p) = v; }
template <class F>
static inline F load_as(const float* p) {
    F v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class F>
static inline void store_as(float* p, F v) {
    memcpy(p, &v, sizeof v);
}
template <class F>
static inline F select(ints_of<F> mask, F yes, F no) {
    return mask ? yes : no;
}
// The larger of each pair; NaN where either is.
template <class F>
static inline F max_or_nan(F a, F b) {
    return select((a > b) | (a != a), a, b);
}

// v, which the compiler may not take into a sum before it is rounded.
template <class F>
static inline F rounded(F v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#elif defined(__ARM_NEON)
    typedef float part __attribute__((vector_size(16)));
    part parts[sizeof(F) / sizeof(part)];
    memcpy(parts, &v, sizeof v);
    for (part& p : parts) asm("" : "+w"(p));
    memcpy(&v, parts, sizeof v);
#endif
    return v;
}

// To the nearest integer, ties to even, for |v| < 2^22.
template <class F>
static inline ints_of<F> round_to_int(F v) {
    const F magic = all<F>(12582912.0f);
    return reinterpret_cast<ints_of<F>>(v + magic) - reinterpret_cast<ints_of<F>>(magic);
}

static inline f32x8 halves_swapped(f32x8 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3); }
static inline float sum(f32x8 v) {
    v = v + halves_swapped(v);
    return (v[0] + v[1]) + (v[2] + v[3]);
}
static inline float max_or_nan(f32x8 v) {
    v = max_or_nan(v, halves_swapped(v));
    v = max_or_nan(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = max_or_nan(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
    return v[0];
}

// Lane i of the result is the sum of v[i].
static inline f32x8 sums(const f32x8* v) {
    f32x8 t[4], u[2];
    for (int i = 0; i < 4; ++i) {
        const f32x8 a = v[2 * i], b = v[2 * i + 1];
        t[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
        const f32x8 a = t[2 * i], b = t[2 * i + 1];
        u[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    return __builtin_shufflevector(u[0], u[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(u[0], u[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

#if defined(__AVX512F__)

constexpr int LOADED = 2;  // runs of eight numbers in a wide vector

// Eight numbers of either, those of `a` in the lower half.
static inline f32xw load_apart(const float* a, const float* b) {
    return __builtin_shufflevector(load(a), load(b), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Lane i of the result is the sum of the lower half of v[i], lane 4 + i that of the upper half, in the order of `sums`.
TOKENLOOM_INLINE f32x8 sums_of_halves(const f32xw* v) {
    f32xw t[2];
    for (int i = 0; i < 2; ++i) {
        const f32xw a = v[2 * i], b = v[2 * i + 1];
        t[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    const f32xw u = __builtin_shufflevector(t[0], t[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    __builtin_shufflevector(t[0], t[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(u, u, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(u, u, 4, 5, 6, 7, 12, 13, 14, 15);
}

#else

constexpr int LOADED = 1;
static inline f32xw load_apart(const float* a, const float*) { return load(a); }
TOKENLOOM_INLINE f32x8 sums_of_halves(const f32xw* v) { return sums(v); }

#endif

// Element j of v[i] goes to element i of v[j].
static inline void transpose(f32x8* v) {
    f32x8 t[8], u[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            u[i + j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            u[i + j + 2] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// The halves of a wide vector, which never leave the registers; where it is no wider, itself and nothing.
#if defined(__AVX512F__)
template <class V>
static inline auto lower_half(V v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
template <class V>
static inline auto upper_half(V v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
#else
template <class V>
static inline V lower_half(V v) { return v; }
template <class V>
static inline V upper_half(V) { return V{}; }
#endif

// The lower half of a wide vector plus the upper one; the vector itself where it is no wider.
static inline f32x8 folded(f32xw v) { return WIDE == 8 ? lower_half(v) : lower_half(v) + upper_half(v); }

// `f` of all lanes, two at a time: it must not matter in which order.
template <class F>
static inline int32_t over_lanes(i32xw v, F&& f) {
    i32x8 low = lower_half(v);
    if (WIDE > 8) low = f(low, upper_half(v));
    low = f(low, __builtin_shufflevector(low, low, 4, 5, 6, 7, 0, 1, 2, 3));
    low = f(low, __builtin_shufflevector(low, low, 2, 3, 0, 1, 6, 7, 4, 5));
    low = f(low, __builtin_shufflevector(low, low, 1, 0, 3, 2, 5, 4, 7, 6));
    return low[0];
}
static inline int32_t sum(i32xw v) {
    return over_lanes(v, [](i32x8 a, i32x8 b) { return a + b; });
}
// The largest of floats without sign, as their bits have it: NaN above infinity.
static inline float largest(i32xw bits) {
    const int32_t most = over_lanes(bits, [](i32x8 a, i32x8 b) { return a > b ? a : b; });
    float x;
    memcpy(&x, &most, sizeof x);
    return x;
}

// e^x to 2e-7 relative, by reduction to |r| <= ln 2 / 2 and a Taylor polynomial of degree 7. NaN stays NaN;
// above 88.7 infinity, below -87.3 zero.
template <class F>
static inline F exp(F x) {
    const F low = all<F>(-87.3f), high = all<F>(88.7f);
    const ints_of<F> under = x < low, over = x > high;
    x = select(under, low, select(over, high, x));
    const ints_of<F> n = round_to_int(select(x == x, x, F{}) * 1.44269504f);
    const F whole = __builtin_convertvector(n, F);
    const F r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    F p = all<F>(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // n reaches 128 at the upper end, where 2^n alone would overflow: two factors.
    const ints_of<F> half = n >> 1;
    const F scale_a = reinterpret_cast<F>((half + 127) << 23);
    const F scale_b = reinterpret_cast<F>((n - half + 127) << 23);
    const F result = p * scale_a * scale_b;
    return select(over, all<F>(__builtin_inff()), select(under, F{}, result));
}

// The same for x that are not far above 0, as softmax has them, in half the steps: one factor is enough for 2^n, and
// the polynomial of degree 6 is the one with the least largest error (2e-9 relative) for |r| <= ln 2 / 2.
template <class F>
static inline F exp_below(F x) {
    const F low = all<F>(-87.3f), magic = all<F>(12582912.0f);
    const ints_of<F> under = x < low;
    x = select(under, low, x);
    const F shifted = x * 1.44269504f + magic, whole = shifted - magic;
    const F r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    F p = all<F>(0.0013836793f);
    p = p * r + 0.0083748568f;
    p = p * r + 0.0416682288f;
    p = p * r + 0.1666641980f;
    p = p * r + 0.4999999106f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // The last bits of `shifted` are n: moved to the exponent, they leave those of `magic` behind.
    const F scale = reinterpret_cast<F>((reinterpret_cast<ints_of<F>>(shifted) + 127) << 23);
    return select(under, F{}, p * scale);
}

}  // namespace tokenloom
