// Products of packed weights with many rows of activations, in AMX tiles. Part of kernels.inl.
//
// A block of two groups of weight rows is a right factor as it is packed, but for its nibbles: 32 columns of 16 rows
// are eight rows of 64 bytes. It is unpacked once and meets all rows at hand. The sums of a block are integers, so
// tiles give them exactly; they are scaled and added up in the same order as in `tile`, hence to the same bits.
//
// While tiles are at work the processor has one port for floats instead of two (measured: half the speed of
// multiplications, from the first tile instruction to about 100 cycles after the last). So tiles multiply a batch of
// blocks, and then vectors scale it.

constexpr int PRODUCT = TILE_ROWS * TILE_INTS;  // integers
constexpr int BATCH = 16;                       // products that wait in the L1 cache to be scaled
constexpr int CHUNK = 12;                       // blocks of weights that stay there, unpacked, while rows pass by

// A block of a strip: two tiles, and the scales of their columns.
struct Unpacked {
    alignas(64) uint8_t quants[2][BLOCK * TILE_INTS];
    f32xw d[2], offset[2];
};

template <Format F>
inline void unpack_tile(const uint8_t* w0, const uint8_t* w1, uint8_t* to) {
    const auto put = [&](int row, __m512i v) { _mm512_store_si512(to + 64 * row, v); };
    if constexpr (F == Format::Q8_0) {
        for (int v = 0; v < 8; ++v) put(v, both_loaded(w0 + 32 * v, w1 + 32 * v));
    } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int v = 0; v < 4; ++v) {
            const __m512i both = both_loaded(w0 + 32 * v, w1 + 32 * v);
            put(v, _mm512_and_si512(both, nibble));
            put(v + 4, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
        }
    }
}

template <Format F>
void unpack_chunk(const uint8_t* const* groups, int begin, int count, Unpacked* to) {
    for (int n = 0; n < 2; ++n) {
        const size_t offset = static_cast<size_t>(begin) * block_bytes(F);
        TwoGroups both{groups[2 * n] + offset, groups[2 * n + 1] + offset};
        for (int b = 0; b < count; ++b, both.next(block_bytes(F))) {
            both.fetch(PREFETCH, block_bytes(F));
            unpack_tile<F>(both.w0, both.w1, to[b].quants[n]);
            to[b].d[n] = both.halves(quant_bytes(F));
            if constexpr (F == Format::Q4_1) to[b].offset[n] = both.halves(quant_bytes(F) + 2 * GROUP);
        }
    }
}

template <int T>
inline void store_product(int32_t* block) {
    tile_store<T>(block + T * PRODUCT, 64);
}

// Tile T, of whose two bits one says which rows and one which columns. Its last product is stored just before, by
// which time it is there.
template <int T>
inline void next_product(int32_t* last) {
    if (last) store_product<T>(last);
    tile_zero<T>();
    tile_dots<T, 4 + T / 2, 6 + T % 2>();
}

// Products of `count` blocks: [count, M, 2] tiles of [16, 16] integers.
template <int M>
inline void multiply(const int8_t* a, ptrdiff_t stride, const Unpacked* w, int count, int32_t* to) {
    int32_t* last = nullptr;
    for (int b = 0; b < count; ++b, a += BLOCK) {
        tile_load<4>(a, stride);
        tile_load<6>(w[b].quants[0], 64);
        tile_load<7>(w[b].quants[1], 64);
        if (M > 1) tile_load<5>(a + TILE_ROWS * stride, stride);
        next_product<0>(last);
        next_product<1>(last);
        if (M > 1) next_product<2>(last);
        if (M > 1) next_product<3>(last);
        last = to + b * 2 * M * PRODUCT;
    }
    store_product<0>(last);
    store_product<1>(last);
    if (M > 1) store_product<2>(last);
    if (M > 1) store_product<3>(last);
}

// Adds `count` blocks' products, scaled, to the sums of M tiles of rows.
template <Format F, int M>
inline void add_scaled(const int32_t* products, const Unpacked* w, const float* scale, const float* sum, int blocks,
                       int count, StripRow* sums_of) {
    constexpr int R = 8;  // rows whose sums stay in registers
    for (int row = 0; row < M * TILE_ROWS; row += R) {
        f32xw acc[R][2];
        TOKENLOOM_UNROLL
        for (int r = 0; r < R; ++r) {
            for (int n = 0; n < 2; ++n) acc[r][n] = load_wide(sums_of[row + r] + n * WIDE);
        }
        const int32_t* from = products + row / TILE_ROWS * 2 * PRODUCT + row % TILE_ROWS * TILE_INTS;
        const float *row_scale = scale + static_cast<ptrdiff_t>(row) * blocks;
        const float *row_sum = sum + static_cast<ptrdiff_t>(row) * blocks;
        for (int b = 0; b < count; ++b, from += 2 * M * PRODUCT) {
            TOKENLOOM_UNROLL
            for (int r = 0; r < R; ++r) {
                const float s = row_scale[r * blocks + b], t = row_sum[r * blocks + b];
                for (int n = 0; n < 2; ++n) {
                    add_block<F>(acc[r][n], load_wide(from + n * PRODUCT + r * TILE_INTS), w[b].d[n], s, t);
                    if constexpr (F == Format::Q4_1) acc[r][n] += w[b].offset[n] * t;
                }
            }
        }
        TOKENLOOM_UNROLL
        for (int r = 0; r < R; ++r) {
            for (int n = 0; n < 2; ++n) store_wide(sums_of[row + r] + n * WIDE, acc[r][n]);
        }
    }
}

constexpr bool in_tiles(int rows) { return rows >= TILE_ROWS; }

// A strip of weight rows times `rows` >= TILE_ROWS rows of activations. Where a group is null nobody reads its results.
template <Format F>
void tiles_of_rows(const uint8_t* const* groups, int blocks, const Activations& x, int first, int rows,
                   StripRow* out) {
    const uint8_t* filled[STRIP];
    for (int i = 0; i < STRIP; ++i) filled[i] = groups[groups[i] ? i : 0];
    Unpacked weights[CHUNK];
    alignas(64) int32_t products[BATCH * PRODUCT];
    // Rows that are left over are the last of a tile that begins earlier and has sums of its own.
    const int left = rows % TILE_ROWS;
    StripRow tail[TILE_ROWS] = {};
    std::fill_n(out[0], rows * STRIP * GROUP, 0.0f);
    const int chunks = (blocks + CHUNK - 1) / CHUNK;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int begin = begin_of(chunk, chunks, blocks), count = begin_of(chunk + 1, chunks, blocks) - begin;
        unpack_chunk<F>(filled, begin, count, weights);
        const auto several = [&](auto ways, int row, StripRow* sums_of) {
            constexpr int M = decltype(ways)::value, AT_ONCE = BATCH / (2 * M);
            const ptrdiff_t at = first + row;
            const int batches = (count + AT_ONCE - 1) / AT_ONCE;
            for (int batch = 0; batch < batches; ++batch) {
                const int from = begin_of(batch, batches, count), n = begin_of(batch + 1, batches, count) - from;
                const int b = begin + from;
                multiply<M>(x.q + at * x.columns + b * BLOCK, x.columns, weights + from, n, products);
                add_scaled<F, M>(products, weights + from, x.scale + at * blocks + b, x.sum + at * blocks + b, blocks, n,
                                 sums_of);
            }
        };
        int row = 0;
        for (; row + 2 * TILE_ROWS <= rows; row += 2 * TILE_ROWS) several(std::integral_constant<int, 2>(), row, out + row);
        if (row + TILE_ROWS <= rows) several(std::integral_constant<int, 1>(), row, out + row);
        if (left) several(std::integral_constant<int, 1>(), rows - TILE_ROWS, tail);
    }
    for (int r = 0; r < left; ++r) memcpy(out[rows - left + r], tail[TILE_ROWS - left + r], sizeof tail[0]);
}
