// Activations in 8 bits, and products with packed weights. Part of kernels.inl.

// -- activations ----------------------------------------------------------------------------------------------

void quantize_row(const float* x, float factor, const float* norm, int columns, float* normed, int8_t* q,
                  float* scales, float* sums_out) {
    constexpr int V = BLOCK / WIDE;
    for (int b = 0; b < columns / BLOCK; ++b) {
        f32xw v[V];
        i32xw most{};
        for (int i = 0; i < V; ++i) {
            const int at = b * BLOCK + i * WIDE;
            v[i] = load_wide(x + at);
            if (norm) v[i] = v[i] * factor * load_wide(norm + at);
            if (normed) store_wide(normed + at, v[i]);
            const i32xw size = reinterpret_cast<i32xw>(v[i]) & 0x7fffffff;
            most = most > size ? most : size;
        }
        const float amax = largest(most);
        const float scale = amax / 127.0f;
        const float inverse = amax > 1e-30f && amax < __builtin_inff() ? 127.0f / amax : 0.0f;
        i32xw total{};
        for (int i = 0; i < V; ++i) {
            const i32xw n = round_to_int(inverse > 0.0f ? v[i] * inverse : f32xw{});
            total += n;
            const i8xw bytes = __builtin_convertvector(n, i8xw);
            memcpy(q + b * BLOCK + i * WIDE, &bytes, sizeof bytes);
        }
        // A row that is not finite stays so: its scale is NaN or infinite, and times 0 that is NaN.
        scales[b] = scale;
        sums_out[b] = scale * static_cast<float>(sum(total));
    }
}

float inverse_rms(const float* x, int width, float eps) {
    f32x8 a = splat(0.0f), b = splat(0.0f);
    int i = 0;
    for (; i + 16 <= width; i += 16) {
        const f32x8 u = load(x + i), v = load(x + i + 8);
        a += u * u;
        b += v * v;
    }
    float squares = sum(a + b);
    for (; i < width; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
}

void quantize(Work& work, const float* x, ptrdiff_t stride, const float* norm, float eps, float* normed,
              const Activations& to) {
    // Rows that follow one another have scales in the same line of memory, which two threads had better not both write.
    const int pieces = pieces_of(to.rows, work.threads(), 1, FEW_PIECES);
    work.each(pieces, [&](int piece) {
        for (int t = begin_of(piece, pieces, to.rows); t < begin_of(piece + 1, pieces, to.rows); ++t) {
            const float* row = x + t * stride;
            const float factor = norm ? inverse_rms(row, to.columns, eps) : 1.0f;
            const size_t block = static_cast<size_t>(t) * to.blocks();
            const size_t first = static_cast<size_t>(t) * to.columns;
            quantize_row(row, factor, norm, to.columns, normed ? normed + first : nullptr, to.q + first,
                         to.scale + block, to.sum + block);
        }
    });
}

// -- linear ---------------------------------------------------------------------------------------------------

TOKENLOOM_INLINE void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// Blocks of one group of weight rows, a lane for each row.
struct OneGroup {
    typedef f32x8 Floats;
    typedef i32x8 Ints;
    const uint8_t* w;

    template <Format F, int M>
    [[gnu::always_inline]] void dots(const int8_t* a, ptrdiff_t stride, Ints* out) const {
        if constexpr (F == Format::Q8_0) {
            dots_q8<M>(w, a, stride, out);
        } else {
            dots_q4<M>(w, a, stride, out);
        }
    }
    Floats halves(int byte) const { return load_half(reinterpret_cast<const uint16_t*>(w + byte)); }
    [[gnu::always_inline]] void fetch(int ahead, int bytes) const { prefetch(w + ahead, bytes); }
    void next(int bytes) { w += bytes; }
};

#if defined(__AVX512VNNI__)

// Blocks of two groups: the first in the lower lanes, the second in the upper ones.
struct TwoGroups {
    typedef f32xw Floats;
    typedef i32xw Ints;
    const uint8_t *w0, *w1;

    template <Format F, int M>
    [[gnu::always_inline]] void dots(const int8_t* a, ptrdiff_t stride, Ints* out) const {
        if constexpr (F == Format::Q8_0) {
            dots_q8<M>(w0, w1, a, stride, out);
        } else {
            dots_q4<M>(w0, w1, a, stride, out);
        }
    }
    Floats halves(int byte) const {
        return load_halves(reinterpret_cast<const uint16_t*>(w0 + byte), reinterpret_cast<const uint16_t*>(w1 + byte));
    }
    [[gnu::always_inline]] void fetch(int ahead, int bytes) const {
        prefetch(w0 + ahead, bytes);
        prefetch(w1 + ahead, bytes);
    }
    void next(int bytes) {
        w0 += bytes;
        w1 += bytes;
    }
};

#endif

// Adds a block's products to a sum, but for the weights' offsets.
template <Format F, class Floats, class Ints>
inline void add_block(Floats& acc, Ints products, Floats d, float scale, float sum) {
    Floats value = __builtin_convertvector(products, Floats) * scale;
    if constexpr (F == Format::Q4_0) value -= 8.0f * sum;
    acc += d * value;
}

// Weight rows of one group or two times M activation rows. `ahead`: so many bytes from each group on are the weights
// that follow, which are asked for meanwhile; 0: nothing is. The order of summation does not depend on M, nor on the
// number of groups, so a row's result is the same in any batch.
template <Format F, int M, class Groups>
TOKENLOOM_INLINE void tile(Groups weights, int blocks, const Activations& x, int row, int ahead,
                           typename Groups::Floats* out) {
    typedef typename Groups::Floats Floats;
    const ptrdiff_t stride = x.columns;
    const int8_t* a = x.q + row * stride;
    const float* scale = x.scale + static_cast<size_t>(row) * blocks;
    const float* sum = x.sum + static_cast<size_t>(row) * blocks;
    Floats acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Floats{};
    for (int b = 0; b < blocks; ++b) {
        if (ahead) weights.fetch(ahead, block_bytes(F));
        typename Groups::Ints products[M];
        weights.template dots<F, M>(a + b * BLOCK, stride, products);
        const Floats d = weights.halves(quant_bytes(F));
        for (int m = 0; m < M; ++m) add_block<F>(acc[m], products[m], d, scale[m * blocks + b], sum[m * blocks + b]);
        if constexpr (F == Format::Q4_1) {
            const Floats offset = weights.halves(quant_bytes(F) + 2 * GROUP);
            for (int m = 0; m < M; ++m) acc[m] += offset * sum[m * blocks + b];
        }
        weights.next(block_bytes(F));
    }
    for (int m = 0; m < M; ++m) out[m] = acc[m];
}

// What a strip of weight rows gives for one row of activations.
typedef float StripRow[STRIP * GROUP];

// One or two rows of activations leave memory as the limit, and one long run of weights reads faster than two by turns
// (on Zen 4 by a third and a fifth).
constexpr int ONE_BY_ONE = 2;

// Two groups of weight rows (the second may be null) times M activation rows, to columns `column ..` of `out`.
template <Format F, int M>
inline void tile(const uint8_t* w0, const uint8_t* w1, int blocks, const Activations& x, int row, int ahead,
                 StripRow* out, int column) {
#if defined(__AVX512VNNI__)
    if (M > ONE_BY_ONE && w1) {
        f32xw both[M];
        tile<F, M>(TwoGroups{w0, w1}, blocks, x, row, ahead, both);
        for (int m = 0; m < M; ++m) store_wide(out[m] + column, both[m]);
        return;
    }
#endif
    f32x8 one[M];
    tile<F, M>(OneGroup{w0}, blocks, x, row, ahead, one);
    for (int m = 0; m < M; ++m) store(out[m] + column, one[m]);
    if (w1) {
        tile<F, M>(OneGroup{w1}, blocks, x, row, ahead, one);
        for (int m = 0; m < M; ++m) store(out[m] + column + GROUP, one[m]);
    }
}

// The same for the rows that are left when tiles of M + 1 no longer fit.
template <Format F, int M>
inline void rest(const uint8_t* w0, const uint8_t* w1, int blocks, const Activations& x, int row, int rows, int ahead,
                 StripRow* out, int column) {
    if (rows == M) {
        tile<F, M>(w0, w1, blocks, x, row, ahead, out, column);
    } else if constexpr (M > 1) {
        rest<F, M - 1>(w0, w1, blocks, x, row, rows, ahead, out, column);
    }
}

template <Format F>
inline void tiles(const uint8_t* w0, const uint8_t* w1, int blocks, const Activations& x, int row, int rows,
                  int ahead, StripRow* out, int column) {
    int m = 0;
    for (; m + TILE <= rows; m += TILE) {
        tile<F, TILE>(w0, w1, blocks, x, row + m, m == 0 ? ahead : 0, out + m, column);
    }
    if (m < rows) rest<F, TILE - 1>(w0, w1, blocks, x, row + m, rows - m, m == 0 ? ahead : 0, out + m, column);
}

#if defined(__AMX_INT8__)
#include "amx.inl"
#else
constexpr bool in_tiles(int) { return false; }
#endif

// A strip of weight rows times `rows` rows of activations. Groups may be null.
template <Format F>
void strip_of(const uint8_t* const* groups, int blocks, const Activations& x, int first, int rows, int ahead,
              StripRow* out) {
#if defined(__AMX_INT8__)
    if (in_tiles(x.rows)) return tiles_of_rows<F>(groups, blocks, x, first, rows, out);
#endif
    for (int i = 0; i < STRIP; i += 2) {
        if (groups[i]) tiles<F>(groups[i], groups[i + 1], blocks, x, first, rows, ahead, out, i * GROUP);
    }
}

// As many biases as F has lanes, from row `first` on.
template <class F>
inline F bias_of(const Weight& w, int first) {
    constexpr int LANES = sizeof(F) / sizeof(float);
    float padded[LANES] = {};
    if (w.bias) memcpy(padded, w.bias + first, sizeof(float) * std::min(LANES, w.rows - first));
    F bias;
    memcpy(&bias, padded, sizeof bias);
    return bias;
}

template <class F>
inline F silu(F x) {
    return x / (all<F>(1.0f) + exp(-x));
}

// Results of as many columns as F has lanes, from `column` on, go to `out`, or the first `count` of them.
template <class F>
void put(const StripRow* y, int column, F bias, int rows, float* out, ptrdiff_t stride, int count, bool add) {
    constexpr int LANES = sizeof(F) / sizeof(float);
    for (int t = 0; t < rows; ++t, out += stride) {
        const F v = load_as<F>(y[t] + column) + bias;
        if (count >= LANES) {
            store_as(out, add ? load_as<F>(out) + v : v);
            continue;
        }
        for (int i = 0; i < count; ++i) out[i] = add ? out[i] + v[i] : v[i];
    }
}

template <class F>
void put_gated(const StripRow* y, int gate, int up, F bias, F up_bias, int rows, float* out, ptrdiff_t stride) {
    for (int t = 0; t < rows; ++t, out += stride) {
        store_as(out, silu<F>(load_as<F>(y[t] + gate) + bias) * (load_as<F>(y[t] + up) + up_bias));
    }
}

template <Format F>
void linear_of(Work& work, const Weight& w, const Activations& x, Then then, float* out, ptrdiff_t stride,
               LowRankPass* bypasses) {
    const bool gated = then == Then::SiluMul, few = x.rows <= FEW_ROWS, tiled = in_tiles(x.rows);
    const int blocks = w.blocks(), groups = gated ? w.groups() / 2 : w.groups();
    // Groups of weights that are computed together: neighbours, for SiluMul of either half of the columns.
    const int together = tiled ? STRIP : 2, step = gated ? together / 2 : together;
    const int strips = (groups + step - 1) / step, row_blocks = (x.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    // Few rows: pieces of at least 16 KiB of weights. Many rows: more than that per piece anyway.
    const int least = few ? std::max(1, 16384 / (together * blocks * block_bytes(F))) : 1;
    const int pieces = pieces_of(strips, work.threads(), least, few ? FEW_PIECES : PIECES);
    const int before = bypasses ? middle_pieces(*bypasses) : 0;
    work.each(before + pieces * row_blocks, [&](int piece) {
        if (piece < before) return middle(*bypasses, piece);
        piece -= before;
        const int first = begin_of(piece / pieces, row_blocks, x.rows);
        const int rows = begin_of(piece / pieces + 1, row_blocks, x.rows) - first, p = piece % pieces;
        const Tiles configured(tiled, BLOCK);
        StripRow y[ROW_BLOCK];
        for (int strip = begin_of(p, pieces, strips); strip < begin_of(p + 1, pieces, strips); ++strip) {
            int ids[STRIP];
            const uint8_t* weights[STRIP] = {};
            for (int i = 0; i < together; ++i) {
                const int g = strip * step + i % step;
                ids[i] = i < step ? g : g + groups;
                if (g < groups) weights[i] = w.group(ids[i]);
            }
            strip_of<F>(weights, blocks, x, first, rows, step * blocks * block_bytes(F), y);
            if (before) wait_for(bypasses->ready, before);
            for (int i = 0; before && i < together; ++i) {
                if (weights[i]) add_low_rank(*bypasses, ids[i] * GROUP, first, rows, y, i * GROUP);
            }
            float* to = out + static_cast<ptrdiff_t>(first) * stride + strip * step * GROUP;
            const auto put_group = [&](auto lanes, int i) {
                typedef decltype(lanes) Lanes;
                const int column = i * GROUP, row = ids[i] * GROUP;
                const Lanes bias = bias_of<Lanes>(w, row);
                if (gated) {
                    const int up = (step + i) * GROUP;
                    put_gated(y, column, up, bias, bias_of<Lanes>(w, ids[step + i] * GROUP), rows, to + column, stride);
                } else {
                    put(y, column, bias, rows, to + column, stride, w.rows - row, then == Then::Add);
                }
            };
            constexpr int WIDTH = WIDE / GROUP;  // groups of a wide vector
            int i = 0;
            for (; i + WIDTH <= step && weights[i + WIDTH - 1]; i += WIDTH) put_group(f32xw{}, i);
            for (; i < step && weights[i]; ++i) put_group(f32x8{}, i);
        }
    });
}

void linear(Work& work, const Weight& w, const Activations& x, Then then, float* out, ptrdiff_t stride,
            LowRankPass* bypasses) {
    switch (w.format) {
        case Format::Q8_0: linear_of<Format::Q8_0>(work, w, x, then, out, stride, bypasses); break;
        case Format::Q4_0: linear_of<Format::Q4_0>(work, w, x, then, out, stride, bypasses); break;
        case Format::Q4_1: linear_of<Format::Q4_1>(work, w, x, then, out, stride, bypasses); break;
    }
}

// `f(row, column, numbers)` for each eight columns of a block's eight rows.
template <class Function>
inline void unpack_block(Format format, const uint8_t* block, Function&& f) {
    const bool eight_bits = format == Format::Q8_0, offset = format == Format::Q4_1;
    const auto* halves = reinterpret_cast<const uint16_t*>(block + quant_bytes(format));
    const f32x8 d = load_half(halves), m = offset ? load_half(halves + GROUP) : splat(0.0f);
    const i32x8 zero = splat_int(eight_bits || offset ? 0 : 8);
    for (int eight = 0; eight < 4; ++eight) {
        // A lane of a vector holds four columns of its row in its bytes, of Q4 low nibbles or high ones.
        f32x8 columns[8];
        for (int half = 0; half < 2; ++half) {
            i32x8 quants;
            memcpy(&quants, block + 32 * (eight_bits ? 2 * eight + half : 2 * (eight % 2) + half), sizeof quants);
            for (int byte = 0; byte < 4; ++byte) {
                const i32x8 q = eight_bits ? (quants << (24 - 8 * byte)) >> 24
                                           : (quants >> (8 * byte + 4 * (eight / 2))) & 15;
                columns[4 * half + byte] = d * to_float(q - zero) + m;
            }
        }
        transpose(columns);
        for (int r = 0; r < GROUP; ++r) f(r, 8 * eight, columns[r]);
    }
}

void unpack_group(const Weight& w, int g, float* out, ptrdiff_t stride) {
    const uint8_t* block = w.group(g);
    for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.format)) {
        unpack_block(w.format, block, [&](int r, int column, f32x8 numbers) {
            store(out + r * stride + b * BLOCK + column, numbers);
        });
    }
}

void unpack(const Weight& w, int row, float* out) {
    const int lane = row % GROUP;
    const uint8_t* block = w.group(row / GROUP);
    for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.format)) {
        const auto* halves = reinterpret_cast<const uint16_t*>(block + quant_bytes(w.format));
        const float d = load_half(halves)[lane];
        float* to = out + b * BLOCK;
        if (w.format == Format::Q8_0) {
            for (int k = 0; k < BLOCK; ++k) {
                to[k] = d * static_cast<int8_t>(block[k / 4 * 32 + lane * 4 + k % 4]);
            }
            continue;
        }
        const bool offset = w.format == Format::Q4_1;
        const float m = offset ? load_half(halves + GROUP)[lane] : 0.0f;
        const int zero = offset ? 0 : 8;
        for (int k = 0; k < 16; ++k) {
            const int both = block[k / 4 * 32 + lane * 4 + k % 4];
            to[k] = d * static_cast<float>((both & 15) - zero) + m;
            to[k + 16] = d * static_cast<float>((both >> 4) - zero) + m;
        }
    }
}
