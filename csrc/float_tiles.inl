// Products of float32 matrices in AMX tiles, which multiply 16-bit floats alone. Part of kernels.inl.
//
// A number is taken as the sum of two floats of eight bits of mantissa each, which together miss at most 2^-17 of it.
// A product of sums is a sum of products, of which three are computed and the smallest is left out: at most 2^-16 of
// the product. What is summed up is float32.
//
// Both factors lie packed: 32 rows (columns) and 32 of what is summed over are two tiles of either part, one after
// another, so that what a product reads is one run of memory.

#include <immintrin.h>

constexpr int PARTS = 2;
constexpr int PAIR = 2 * TILE_ROWS;  // rows of a product, and columns
constexpr int STEP = 32;             // summed over at once
constexpr int HALF = TILE_ROWS * STEP, PART = 2 * HALF;  // 16-bit numbers of a tile, of two
constexpr int DEPTH = FLOAT_DEPTH;   // a pair of packed columns is 36 KB, and stays in the L1 cache
constexpr int PANEL = 64;            // columns that are packed at once
constexpr int PANEL_ROWS = 512;      // rows that meet a packed panel

inline __m512i upper_halves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000)); }

// The upper halves of `first` and `second` are the parts of x.
struct Split {
    __m512i first, second;

    explicit Split(__m512 x) {
        // Rounded, not cut off: so the second part need not say a bit that the first could.
        const __m512i half = _mm512_set1_epi32(0x8000);
        first = _mm512_add_epi32(_mm512_castps_si512(x), half);
        const __m512 left = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(first, upper_halves())));
        second = _mm512_add_epi32(_mm512_castps_si512(left), half);
    }
};

// Up to 16 numbers; those beyond `count` are 0.
inline __m512 load_some(const float* from, int count) {
    const __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
    return _mm512_maskz_loadu_ps(mask, from);
}

// Rows [count <= 32, depth] of a left factor: tiles [step, part, 2, 16, 32].
void pack_rows(const float* x, ptrdiff_t stride, int count, int depth, uint16_t* to) {
    alignas(64) static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i upper = _mm512_load_si512(odd);
    for (int row = 0; row < PAIR; ++row) {
        const float* from = x + std::min(row, count - 1) * stride;
        uint16_t* at = to + row * STEP;
        for (int k = 0; k < depth; k += STEP, at += PARTS * PART) {
            const int left = row < count ? depth - k : 0;
            const Split a(load_some(from + k, left)), b(load_some(from + k + 16, left - 16));
            _mm512_store_si512(at, _mm512_permutex2var_epi16(a.first, upper, b.first));
            _mm512_store_si512(at + PART, _mm512_permutex2var_epi16(a.second, upper, b.second));
        }
    }
}

// One row of a right factor's tile: two numbers of each of 16 columns, side by side.
inline __m512i side_by_side(__m512i even, __m512i odd) {
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_and_si512(odd, upper_halves()));
}

// Columns [depth, count <= PANEL] of a right factor: tiles [pair, step, part, 2, 16, 32].
void pack_columns(const float* w, ptrdiff_t stride, int count, int depth, uint16_t* to) {
    const int steps = (depth + STEP - 1) / STEP;
    for (int k = 0; k < steps * STEP; k += 2) {
        const float *from = w + std::min(k, depth - 1) * stride, *below = w + std::min(k + 1, depth - 1) * stride;
        for (int c = 0; c < (count + PAIR - 1) / PAIR * PAIR; c += 16) {
            const Split even(load_some(from + c, k < depth ? count - c : 0));
            const Split odd(load_some(below + c, k + 1 < depth ? count - c : 0));
            uint16_t* at = to + (c / PAIR * steps + k / STEP) * PARTS * PART + c / 16 % 2 * HALF + k % STEP * 16;
            _mm512_store_si512(at, side_by_side(even.first, odd.first));
            _mm512_store_si512(at + PART, side_by_side(even.second, odd.second));
        }
    }
}

// Tiles 0 to 3 += what tiles 4 and 5 (rows) and 6 and 7 (columns) hold.
inline void multiply_tiles() {
    tile_float_dots<0, 4, 6>();
    tile_float_dots<1, 4, 7>();
    tile_float_dots<2, 5, 6>();
    tile_float_dots<3, 5, 7>();
}

// y [32, 32] = (or +=) rows times columns.
void multiply_pair(const uint16_t* a, const uint16_t* b, int steps, float* y, ptrdiff_t stride, bool add) {
    const ptrdiff_t bytes = stride * static_cast<ptrdiff_t>(sizeof(float));
    float* below = y + TILE_ROWS * stride;
    if (add) {
        tile_load<0>(y, bytes);
        tile_load<1>(y + TILE_INTS, bytes);
        tile_load<2>(below, bytes);
        tile_load<3>(below + TILE_INTS, bytes);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int step = 0; step < steps; ++step, a += PARTS * PART, b += PARTS * PART) {
        tile_load<4>(a, 64);
        tile_load<5>(a + HALF, 64);
        tile_load<6>(b + PART, 64);
        tile_load<7>(b + PART + HALF, 64);
        multiply_tiles();
        tile_load<6>(b, 64);
        tile_load<7>(b + HALF, 64);
        multiply_tiles();
        tile_load<4>(a + PART, 64);
        tile_load<5>(a + PART + HALF, 64);
        multiply_tiles();
    }
    tile_store<0>(y, bytes);
    tile_store<1>(y + TILE_INTS, bytes);
    tile_store<2>(below, bytes);
    tile_store<3>(below + TILE_INTS, bytes);
}

// The same where y has only so many rows and columns.
void multiply_corner(const uint16_t* a, const uint16_t* b, int steps, float* y, ptrdiff_t stride, bool add, int rows,
                     int columns) {
    alignas(64) float whole[PAIR * PAIR] = {};
    for (int r = 0; add && r < rows; ++r) std::copy_n(y + r * stride, columns, whole + r * PAIR);
    multiply_pair(a, b, steps, whole, PAIR, add);
    for (int r = 0; r < rows; ++r) std::copy_n(whole + r * PAIR, columns, y + r * stride);
}

void float_products(Work& work, const FloatProducts& p) {
    const int pairs = (p.rows + PAIR - 1) / PAIR, panels = (p.n + PANEL - 1) / PANEL;
    const int blocks = (p.rows + PANEL_ROWS - 1) / PANEL_ROWS;
    for (int begin = 0; begin < p.k; begin += DEPTH) {
        const int depth = std::min(DEPTH, p.k - begin), steps = (depth + STEP - 1) / STEP;
        const ptrdiff_t packed_pair = static_cast<ptrdiff_t>(steps) * PARTS * PART;
        work.each(pairs, [&](int pair) {
            const float* from = p.x + pair * PAIR * p.x_stride + begin;
            pack_rows(from, p.x_stride, std::min(PAIR, p.rows - pair * PAIR), depth, p.packed + pair * packed_pair);
        });
        work.each(blocks * panels, [&](int piece) {
            alignas(64) uint16_t columns[PANEL / PAIR * (DEPTH / STEP) * PARTS * PART];
            const int first = piece / blocks * PANEL, count = std::min(PANEL, p.n - first), block = piece % blocks;
            pack_columns(p.w + begin * p.w_stride + first, p.w_stride, count, depth, columns);
            const Tiles configured(true, 2 * STEP);
            for (int c = 0; c < count; c += PAIR) {
                for (int pair = begin_of(block, blocks, pairs); pair < begin_of(block + 1, blocks, pairs); ++pair) {
                    const uint16_t *a = p.packed + pair * packed_pair, *b = columns + c / PAIR * packed_pair;
                    float* y = p.y + pair * PAIR * p.y_stride + first + c;
                    const int rows = std::min(PAIR, p.rows - pair * PAIR), here = std::min(PAIR, count - c);
                    const bool add = p.add || begin > 0;
                    if (rows == PAIR && here == PAIR) {
                        multiply_pair(a, b, steps, y, p.y_stride, add);
                    } else {
                        multiply_corner(a, b, steps, y, p.y_stride, add, rows, here);
                    }
                }
            }
        });
    }
}
