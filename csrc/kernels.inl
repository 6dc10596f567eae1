// The kernels, compiled once per instruction set: a source file defines TOKENLOOM_ISA and includes this.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "amx.h"
#include "dots.h"
#include "kernels.h"

// Sums must stay in registers, which takes loops over them that are unrolled whole.
#define TOKENLOOM_UNROLL _Pragma("GCC unroll 8")

namespace tokenloom {
namespace TOKENLOOM_ISA {
namespace {

constexpr int TILE = WIDE == 16 ? 10 : 4;  // activation rows that share the unpacking of a weight
constexpr int FEW_ROWS = 16;
#if defined(__AMX_INT8__)
constexpr int STRIP = 4;  // groups of weight rows that are computed together
constexpr int ROW_BLOCK = 128;  // activation rows that stay in the L2 cache while weights pass by
#else
constexpr int STRIP = 2;
constexpr int ROW_BLOCK = 64;
#endif
constexpr int PREFETCH = 2048;  // bytes of weights ahead, asked for while others are unpacked
constexpr int PIECES = 16;      // pieces per thread, so that nobody waits long for the last
constexpr int FEW_PIECES = 4;   // with so few rows memory is what limits, and long runs of weights read faster

int pieces_of(int count, int threads, int least, int most) {
    const int wanted = std::max(1, count / least);
    return std::min(wanted, threads * most);
}

int begin_of(int piece, int pieces, int count) {
    return static_cast<int>(static_cast<int64_t>(count) * piece / pieces);
}

#include "low_rank.inl"
#include "linear.inl"
#include "linear_backward.inl"
#include "rows.inl"
#include "attention.inl"
#include "key_scores.inl"
#include "attention_backward.inl"
#if defined(__AMX_BF16__)
#include "float_tiles.inl"
#else
constexpr void (*float_products)(Work&, const FloatProducts&) = nullptr;
#endif

void sum_words(Work& work, const uint64_t* data, size_t count, uint64_t* out) {
    // Bytes of a tensor may begin anywhere.
    typedef uint64_t u64x4 __attribute__((vector_size(32), aligned(1), may_alias));
    constexpr int CHUNKS = 256;
    work.each(CHUNKS, [&](int piece) {
        const size_t begin = count * piece / CHUNKS, end = count * (piece + 1) / CHUNKS;
        u64x4 total[4] = {};
        size_t i = begin;
        for (; i + 16 <= end; i += 16) {
            for (int j = 0; j < 4; ++j) total[j] += *reinterpret_cast<const u64x4*>(data + i + 4 * j);
        }
        uint64_t rest = 0;
        for (; i < end; ++i) {
            uint64_t word;
            memcpy(&word, data + i, 8);
            rest += word;
        }
        for (int j = 0; j < 4; ++j) rest += total[j][0] + total[j][1] + total[j][2] + total[j][3];
        out[piece] = rest;
    });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    TOKENLOOM_ISA_NAME, quantize,          linear,      unpack,    unpack_group, rms_norm,     silu_mul,
    rms_norm_backward,  silu_mul_backward, rope_append, attention, key_scores,   choose_pages, few_products,
    float_products,     attention_backward, top,        largest,   sum_words,    linear_backward,
};

}  // namespace TOKENLOOM_ISA
}  // namespace tokenloom
