// Activations in 8 bits, and products with packed weights. Part of kernels.inl.

// -- activations ----------------------------------------------------------------------------------------------

void quantize_row(const float* x, float factor, const float* norm, int columns, float* normed, int8_t* q,
                  float* scales, float* sums_out) {
    for (int b = 0; b < columns / BLOCK; ++b) {
        f32x8 v[4], most = splat(0.0f);
        for (int i = 0; i < 4; ++i) {
            v[i] = load(x + b * BLOCK + 8 * i);
            if (norm) v[i] = v[i] * splat(factor) * load(norm + b * BLOCK + 8 * i);
            if (normed) store(normed + b * BLOCK + 8 * i, v[i]);
            most = max_or_nan(most, abs(v[i]));
        }
        const float amax = max_or_nan(most);
        const float scale = amax / 127.0f;
        const float inverse = amax > 1e-30f && amax < __builtin_inff() ? 127.0f / amax : 0.0f;
        int32_t sum_q[8];
        i32x8 total = splat_int(0);
        for (int i = 0; i < 4; ++i) {
            const i32x8 n = round_to_int(inverse > 0.0f ? v[i] * splat(inverse) : splat(0.0f));
            total += n;
            for (int j = 0; j < 8; ++j) q[b * BLOCK + 8 * i + j] = static_cast<int8_t>(n[j]);
        }
        memcpy(sum_q, &total, 32);
        int32_t s = 0;
        for (int j = 0; j < 8; ++j) s += sum_q[j];
        // A row that is not finite stays so: its scale is NaN or infinite, and times 0 that is NaN.
        scales[b] = scale;
        sums_out[b] = scale * static_cast<float>(s);
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
    work.each(to.rows, [&](int t) {
        const float* row = x + t * stride;
        const float factor = norm ? inverse_rms(row, to.columns, eps) : 1.0f;
        const size_t block = static_cast<size_t>(t) * to.blocks();
        const size_t first = static_cast<size_t>(t) * to.columns;
        quantize_row(row, factor, norm, to.columns, normed ? normed + first : nullptr, to.q + first,
                     to.scale + block, to.sum + block);
    });
}

// -- linear ---------------------------------------------------------------------------------------------------

inline void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// Blocks of one group of weight rows, a lane for each row.
struct OneGroup {
    typedef f32x8 Floats;
    typedef i32x8 Ints;
    const uint8_t* w;

    template <Format F, int M>
    void dots(const int8_t* a, ptrdiff_t stride, Ints* out) const {
        if constexpr (F == Format::Q8_0) {
            dots_q8<M>(w, a, stride, out);
        } else {
            dots_q4<M>(w, a, stride, out);
        }
    }
    Floats halves(int byte) const { return load_half(reinterpret_cast<const uint16_t*>(w + byte)); }
    void fetch(int bytes) const { prefetch(w + PREFETCH, bytes); }
    void next(int bytes) { w += bytes; }
};

#if defined(__AVX512VNNI__)

// Blocks of two groups: the first in the lower lanes, the second in the upper ones.
struct TwoGroups {
    typedef f32xw Floats;
    typedef i32xw Ints;
    const uint8_t *w0, *w1;

    template <Format F, int M>
    void dots(const int8_t* a, ptrdiff_t stride, Ints* out) const {
        if constexpr (F == Format::Q8_0) {
            dots_q8<M>(w0, w1, a, stride, out);
        } else {
            dots_q4<M>(w0, w1, a, stride, out);
        }
    }
    Floats halves(int byte) const {
        return load_halves(reinterpret_cast<const uint16_t*>(w0 + byte), reinterpret_cast<const uint16_t*>(w1 + byte));
    }
    void fetch(int bytes) const {
        prefetch(w0 + PREFETCH, bytes);
        prefetch(w1 + PREFETCH, bytes);
    }
    void next(int bytes) {
        w0 += bytes;
        w1 += bytes;
    }
};

#endif

// Weight rows of one group or two times M activation rows; the order of summation does not depend on M, nor on the
// number of groups, so a row's result is the same in any batch.
template <Format F, int M, class Groups>
inline void tile(Groups weights, int blocks, const Activations& x, int row, bool ahead,
                 typename Groups::Floats* out) {
    typedef typename Groups::Floats Floats;
    const ptrdiff_t stride = x.columns;
    const int8_t* a = x.q + row * stride;
    const float* scale = x.scale + static_cast<size_t>(row) * blocks;
    const float* sum = x.sum + static_cast<size_t>(row) * blocks;
    Floats acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Floats{};
    for (int b = 0; b < blocks; ++b) {
        if (ahead) weights.fetch(block_bytes(F));
        typename Groups::Ints products[M];
        weights.template dots<F, M>(a + b * BLOCK, stride, products);
        const Floats d = weights.halves(quant_bytes(F));
        for (int m = 0; m < M; ++m) {
            Floats value = __builtin_convertvector(products[m], Floats) * scale[m * blocks + b];
            if constexpr (F == Format::Q4_0) value -= 8.0f * sum[m * blocks + b];
            acc[m] += d * value;
        }
        if constexpr (F == Format::Q4_1) {
            const Floats offset = weights.halves(quant_bytes(F) + 2 * GROUP);
            for (int m = 0; m < M; ++m) acc[m] += offset * sum[m * blocks + b];
        }
        weights.next(block_bytes(F));
    }
    for (int m = 0; m < M; ++m) out[m] = acc[m];
}

// Two groups of weight rows (the second may be null) times M activation rows.
template <Format F, int M>
inline void tile(const uint8_t* w0, const uint8_t* w1, int blocks, const Activations& x, int row, bool ahead,
                 f32x8* out0, f32x8* out1) {
#if defined(__AVX512VNNI__)
    if (w1) {
        f32xw both[M];
        tile<F, M>(TwoGroups{w0, w1}, blocks, x, row, ahead, both);
        for (int m = 0; m < M; ++m) {
            memcpy(&out0[m], &both[m], sizeof(f32x8));
            memcpy(&out1[m], reinterpret_cast<const char*>(&both[m]) + sizeof(f32x8), sizeof(f32x8));
        }
        return;
    }
#endif
    tile<F, M>(OneGroup{w0}, blocks, x, row, ahead, out0);
    if (w1) tile<F, M>(OneGroup{w1}, blocks, x, row, ahead, out1);
}

// The same for the rows that are left when tiles of M + 1 no longer fit.
template <Format F, int M>
inline void rest(const uint8_t* w0, const uint8_t* w1, int blocks, const Activations& x, int row, int rows, bool ahead,
                 f32x8* out0, f32x8* out1) {
    if (rows == M) {
        tile<F, M>(w0, w1, blocks, x, row, ahead, out0, out1);
    } else if constexpr (M > 1) {
        rest<F, M - 1>(w0, w1, blocks, x, row, rows, ahead, out0, out1);
    }
}

template <Format F>
inline void tiles(const uint8_t* w0, const uint8_t* w1, int blocks, const Activations& x, int row, int rows,
                  f32x8* out0, f32x8* out1) {
    int m = 0;
    for (; m + TILE <= rows; m += TILE) {
        tile<F, TILE>(w0, w1, blocks, x, row + m, m == 0, out0 + m, out1 + m);
    }
    if (m < rows) rest<F, TILE - 1>(w0, w1, blocks, x, row + m, rows - m, m == 0, out0 + m, out1 + m);
}

inline f32x8 bias_of(const Weight& w, int g) {
    if (!w.bias) return splat(0.0f);
    float padded[GROUP] = {};
    memcpy(padded, w.bias + g * GROUP, sizeof(float) * std::min(GROUP, w.rows - g * GROUP));
    return load(padded);
}

inline void put(float* out, f32x8 v, int count, bool add) {
    if (count >= GROUP) {
        store(out, add ? load(out) + v : v);
        return;
    }
    for (int i = 0; i < count; ++i) out[i] = add ? out[i] + v[i] : v[i];
}

inline f32x8 silu(f32x8 x) { return x / (splat(1.0f) + exp(-x)); }

template <Format F>
void linear_of(Work& work, const Weight& w, const Activations& x, Then then, float* out, ptrdiff_t stride,
               LowRankPass* bypasses) {
    const int blocks = w.blocks();
    const int groups = then == Then::SiluMul ? w.groups() / 2 : w.groups();
    const int row_blocks = (x.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    // Few rows: pieces of at least 16 KiB of weights. Many rows: more than that per piece anyway.
    const int least = std::max(1, 16384 / (blocks * block_bytes(F)));
    const bool few = x.rows <= FEW_ROWS;
    const int pieces = few ? pieces_of(groups, work.threads(), least, FEW_PIECES)
                            : pieces_of(groups, work.threads(), 1, PIECES);
    const int before = bypasses ? middle_pieces(*bypasses) : 0;
    work.each(before + pieces * row_blocks, [&](int piece) {
        if (piece < before) return middle(*bypasses, piece);
        piece -= before;
        const int first = piece / pieces * ROW_BLOCK, rows = std::min(ROW_BLOCK, x.rows - first);
        const int p = piece % pieces;
        // One half of the columns beside the other for SiluMul, else neighbours.
        const bool gated = then == Then::SiluMul;
        f32x8 y[2][ROW_BLOCK];
        const int end = begin_of(p + 1, pieces, groups), step = gated ? 1 : 2;
        for (int g = begin_of(p, pieces, groups); g < end; g += step) {
            const int second = gated ? g + groups : g + 1;
            const bool two = gated || second < end;
            tiles<F>(w.group(g), two ? w.group(second) : nullptr, blocks, x, first, rows, y[0], y[1]);
            if (before) {
                wait_for(bypasses->ready, before);
                add_low_rank(*bypasses, g * GROUP, first, rows, y[0]);
                if (two) add_low_rank(*bypasses, second * GROUP, first, rows, y[1]);
            }
            float* to = out + static_cast<ptrdiff_t>(first) * stride + g * GROUP;
            const f32x8 bias[] = {bias_of(w, g), two ? bias_of(w, second) : splat(0.0f)};
            if (gated) {
                for (int t = 0; t < rows; ++t) {
                    store(to + t * stride, silu(y[0][t] + bias[0]) * (y[1][t] + bias[1]));
                }
                continue;
            }
            for (int i = 0; i < (two ? 2 : 1); ++i) {
                const int count = w.rows - (g + i) * GROUP;
                for (int t = 0; t < rows; ++t) {
                    put(to + t * stride + i * GROUP, y[i][t] + bias[i], count, then == Then::Add);
                }
            }
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

void unpack_group(const Weight& w, int g, float* out, ptrdiff_t stride) {
    const uint8_t* block = w.group(g);
    const bool eight_bits = w.format == Format::Q8_0, offset = w.format == Format::Q4_1;
    for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.format)) {
        const auto* halves = reinterpret_cast<const uint16_t*>(block + quant_bytes(w.format));
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
            for (int r = 0; r < GROUP; ++r) store(out + r * stride + b * BLOCK + 8 * eight, columns[r]);
        }
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
