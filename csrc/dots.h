// Integer dot products of one packed block with M rows of 8-bit activations, per instruction set.
//
// dots_q4 / dots_q8: `w` points to a block's quants, `a` to the block's 32 activations in the first row, the
// other rows lie `stride` bytes apart; out[m], lane r, is the sum over the 32 columns of q_w[r] * q_a[m].
// Activations are in -127..127. load_half: eight float16.
#pragma once

#include <cstddef>

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tokenloom {

static inline int32_t four_bytes(const int8_t* p) {
    int32_t value;
    memcpy(&value, p, 4);
    return value;
}

#if defined(__AVX2__)

static inline f32x8 load_half(const uint16_t* p) {
    return reinterpret_cast<f32x8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define TOKENLOOM_DPBUSD _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define TOKENLOOM_DPBUSD _mm256_dpbusd_avx_epi32
#endif

// Keeps the compiler from turning a chain of additions into a tree, whose leaves would not fit the registers
// (measured: half the speed).
static inline void in_register(__m256i& v) {
#if defined(__AVX512VL__)
    asm("" : "+v"(v));  // any of 32
#else
    asm("" : "+x"(v));
#endif
}

template <int M>
TOKENLOOM_INLINE void dots_q4(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm256_setzero_si256();
    for (int v = 0; v < 4; ++v) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * v));
        const __m256i low = _mm256_and_si256(both, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        for (int m = 0; m < M; ++m) {
            const __m256i x = _mm256_set1_epi32(four_bytes(a + m * stride + 4 * v));
            const __m256i y = _mm256_set1_epi32(four_bytes(a + m * stride + 4 * v + 16));
#if defined(TOKENLOOM_DPBUSD)
            acc[m] = TOKENLOOM_DPBUSD(acc[m], low, x);
            acc[m] = TOKENLOOM_DPBUSD(acc[m], high, y);
#else
            // 16 bits hold the sum of all eight: 8 * 2 * 15 * 127 = 30480.
            acc[m] = _mm256_add_epi16(acc[m], _mm256_maddubs_epi16(low, x));
            acc[m] = _mm256_add_epi16(acc[m], _mm256_maddubs_epi16(high, y));
#endif
            in_register(acc[m]);
        }
    }
    for (int m = 0; m < M; ++m) {
#if !defined(TOKENLOOM_DPBUSD)
        acc[m] = _mm256_madd_epi16(acc[m], _mm256_set1_epi16(1));
#endif
        out[m] = reinterpret_cast<i32x8>(acc[m]);
    }
}

template <int M>
TOKENLOOM_INLINE void dots_q8(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    __m256i acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm256_setzero_si256();
    for (int v = 0; v < 8; ++v) {
        const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * v));
        const __m256i size = _mm256_abs_epi8(weights);
        for (int m = 0; m < M; ++m) {
            // One factor must be unsigned: |w| * (a with w's sign).
            const __m256i x =
                _mm256_sign_epi8(_mm256_set1_epi32(four_bytes(a + m * stride + 4 * v)), weights);
#if defined(TOKENLOOM_DPBUSD)
            acc[m] = TOKENLOOM_DPBUSD(acc[m], size, x);
#else
            // 2 * 128 * 127 = 32512 fits 16 bits once, not twice.
            const __m256i pairs = _mm256_maddubs_epi16(size, x);
            acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
            in_register(acc[m]);
        }
    }
    for (int m = 0; m < M; ++m) out[m] = reinterpret_cast<i32x8>(acc[m]);
}

#if defined(__AVX512VNNI__)

// The same for two blocks at once, the first in the lower lanes, the second in the upper ones.

static inline __m512i both_loaded(const uint8_t* w0, const uint8_t* w1) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w0));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w1)), 1);
}

static inline f32xw load_halves(const uint16_t* p0, const uint16_t* p1) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p0));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p1));
    return reinterpret_cast<f32xw>(_mm512_cvtph_ps(_mm256_set_m128i(high, low)));
}

template <int M>
TOKENLOOM_INLINE void dots_q4(const uint8_t* w0, const uint8_t* w1, const int8_t* a, ptrdiff_t stride, i32xw* out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_si512();
    for (int v = 0; v < 4; ++v) {
        const __m512i both = both_loaded(w0 + 32 * v, w1 + 32 * v);
        const __m512i low = _mm512_and_si512(both, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        for (int m = 0; m < M; ++m) {
            const int8_t* row = a + m * stride + 4 * v;
            acc[m] = _mm512_dpbusd_epi32(acc[m], low, _mm512_set1_epi32(four_bytes(row)));
            acc[m] = _mm512_dpbusd_epi32(acc[m], high, _mm512_set1_epi32(four_bytes(row + 16)));
        }
    }
    for (int m = 0; m < M; ++m) out[m] = reinterpret_cast<i32xw>(acc[m]);
}

template <int M>
TOKENLOOM_INLINE void dots_q8(const uint8_t* w0, const uint8_t* w1, const int8_t* a, ptrdiff_t stride, i32xw* out) {
    __m512i acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_si512();
    for (int v = 0; v < 8; ++v) {
        const __m512i weights = both_loaded(w0 + 32 * v, w1 + 32 * v), size = _mm512_abs_epi8(weights);
        const __mmask64 negative = _mm512_movepi8_mask(weights);
        for (int m = 0; m < M; ++m) {
            const __m512i x = _mm512_set1_epi32(four_bytes(a + m * stride + 4 * v));
            const __m512i signed_x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
            acc[m] = _mm512_dpbusd_epi32(acc[m], size, signed_x);
        }
    }
    for (int m = 0; m < M; ++m) out[m] = reinterpret_cast<i32xw>(acc[m]);
}

#endif

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)

static inline f32x8 load_half(const uint16_t* p) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
    f32x8 out;
    const float32x4_t low = vcvt_f32_f16(vget_low_f16(h)), high = vcvt_f32_f16(vget_high_f16(h));
    memcpy(&out, &low, 16);
    memcpy(reinterpret_cast<char*>(&out) + 16, &high, 16);
    return out;
}

static inline i32x8 joined(int32x4_t low, int32x4_t high) {
    i32x8 out;
    memcpy(&out, &low, 16);
    memcpy(reinterpret_cast<char*>(&out) + 16, &high, 16);
    return out;
}

template <int M>
TOKENLOOM_INLINE void dots_q4(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    int32x4_t acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = vdupq_n_s32(0);
    for (int v = 0; v < 4; ++v) {
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t both = vld1q_u8(w + 32 * v + 16 * half);
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
            for (int m = 0; m < M; ++m) {
                const int8_t* row = a + m * stride + 4 * v;
                acc[m][half] =
                    vdotq_s32(acc[m][half], low, vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(row))));
                acc[m][half] =
                    vdotq_s32(acc[m][half], high, vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(row + 16))));
            }
        }
    }
    for (int m = 0; m < M; ++m) out[m] = joined(acc[m][0], acc[m][1]);
}

template <int M>
TOKENLOOM_INLINE void dots_q8(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    int32x4_t acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = vdupq_n_s32(0);
    for (int v = 0; v < 8; ++v) {
        for (int half = 0; half < 2; ++half) {
            const int8x16_t weights = vreinterpretq_s8_u8(vld1q_u8(w + 32 * v + 16 * half));
            for (int m = 0; m < M; ++m) {
                const int32_t x = four_bytes(a + m * stride + 4 * v);
                acc[m][half] = vdotq_s32(acc[m][half], weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
            }
        }
    }
    for (int m = 0; m < M; ++m) out[m] = joined(acc[m][0], acc[m][1]);
}

#else  // any machine

static inline f32x8 load_half(const uint16_t* p) {
    f32x8 out;
    for (int i = 0; i < 8; ++i) {
        uint16_t half;
        memcpy(&half, p + i, 2);  // weights may begin at any byte
        const uint32_t h = half, sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
        uint32_t bits;
        float value;
        if (exponent == 0) {
            value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
            memcpy(&bits, &value, 4);
            bits |= sign;
        } else {
            bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
        }
        memcpy(&value, &bits, 4);
        out[i] = value;
    }
    return out;
}

template <int M>
TOKENLOOM_INLINE void dots_q4(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    for (int m = 0; m < M; ++m) {
        int32_t acc[8] = {};
        const int8_t* row = a + m * stride;
        for (int v = 0; v < 4; ++v) {
            for (int j = 0; j < 32; ++j) {
                const int both = w[32 * v + j];
                acc[j / 4] += (both & 15) * row[4 * v + j % 4] + (both >> 4) * row[16 + 4 * v + j % 4];
            }
        }
        memcpy(&out[m], acc, 32);
    }
}

template <int M>
TOKENLOOM_INLINE void dots_q8(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    for (int m = 0; m < M; ++m) {
        int32_t acc[8] = {};
        const int8_t* row = a + m * stride;
        for (int v = 0; v < 8; ++v) {
            for (int j = 0; j < 32; ++j) {
                acc[j / 4] += static_cast<int8_t>(w[32 * v + j]) * row[4 * v + j % 4];
            }
        }
        memcpy(&out[m], acc, 32);
    }
}

#endif

}  // namespace tokenloom
