// The gradient of a linear's input, dx = dy w, through packed weights. Part of kernels.inl.
//
// A thread unpacks what it multiplies by itself and right before: numbers that another core has just written come
// slowly. Every number of dx is the sum of its products in the order of w's rows, whatever rows are computed beside it
// and by how many threads.

constexpr int DX_ROWS = WIDE == 16 ? 8 : 4;  // so many rows times three vectors are sums that fit the registers
constexpr int DX_VECTORS = 3;
constexpr int DX_COLUMNS = DX_VECTORS * WIDE;
constexpr int UNIT = 96;           // columns: whole blocks of w, and whole DX_COLUMNS
constexpr int MOST_COLUMNS = 288;  // of a piece of work
constexpr int SUMMED = 128;        // rows of w at a time: DX_COLUMNS of them stay in the L1 cache
constexpr int ROWS_AT_HAND = 128;  // rows of dy that meet what is unpacked
static_assert(UNIT % BLOCK == 0 && UNIT % DX_COLUMNS == 0 && MOST_COLUMNS % UNIT == 0 && SUMMED % GROUP == 0);

// dx [DX_ROWS, DX_COLUMNS] += dy [depth, DX_ROWS] times w [depth, DX_COLUMNS]; or = where `from_zero`.
inline void multiply_unpacked(const float* dy, const float* w, int depth, float* dx, ptrdiff_t stride, bool from_zero) {
    f32xw sums_of[DX_ROWS][DX_VECTORS];
    TOKENLOOM_UNROLL
    for (int r = 0; r < DX_ROWS; ++r) {
        for (int n = 0; n < DX_VECTORS; ++n) {
            sums_of[r][n] = from_zero ? f32xw{} : load_wide(dx + r * stride + n * WIDE);
        }
    }
    for (int k = 0; k < depth; ++k, dy += DX_ROWS, w += DX_COLUMNS) {
        f32xw part[DX_VECTORS];
        TOKENLOOM_UNROLL
        for (int n = 0; n < DX_VECTORS; ++n) part[n] = load_wide(w + n * WIDE);
        TOKENLOOM_UNROLL
        for (int r = 0; r < DX_ROWS; ++r) {
            const f32xw factor = all<f32xw>(dy[r]);
            for (int n = 0; n < DX_VECTORS; ++n) sums_of[r][n] += factor * part[n];
        }
    }
    TOKENLOOM_UNROLL
    for (int r = 0; r < DX_ROWS; ++r) {
        for (int n = 0; n < DX_VECTORS; ++n) store_wide(dx + r * stride + n * WIDE, sums_of[r][n]);
    }
}

// Columns `begin .. begin + count` of `depth` rows of w from row `first` on, as [DX_COLUMNS wide, depth, DX_COLUMNS].
// Of the last DX_COLUMNS some may be missing: what stands there is multiplied along, and nobody reads what it gives.
void unpack_columns(const Weight& w, int first, int depth, int begin, int count, float* to) {
    for (int row = 0; row < depth; row += GROUP) {
        const uint8_t* block = w.group((first + row) / GROUP) + begin / BLOCK * block_bytes(w.format);
        for (int column = 0; column < count; column += BLOCK, block += block_bytes(w.format)) {
            unpack_block(w.format, block, [&](int r, int eight, f32x8 numbers) {
                const int c = column + eight;
                store(to + (c / DX_COLUMNS * depth + row + r) * DX_COLUMNS + c % DX_COLUMNS, numbers);
            });
        }
    }
}

// Rows [count <= ROWS_AT_HAND, depth] of dy as [DX_ROWS high, depth, DX_ROWS]; rows that are missing are 0.
void pack_gradients(const float* dy, ptrdiff_t stride, int count, int depth, float* to) {
    alignas(32) static const float nothing[SUMMED] = {};
    for (int first = 0; first < count; first += 8, to += 8 * depth) {
        const float* rows[8];
        for (int r = 0; r < 8; ++r) rows[r] = first + r < count ? dy + (first + r) * stride : nothing;
        int k = 0;
        for (; k + 8 <= depth; k += 8) {
            f32x8 eight[8];
            TOKENLOOM_UNROLL
            for (int r = 0; r < 8; ++r) eight[r] = load(rows[r] + k);
            transpose(eight);
            for (int j = 0; j < 8; ++j) {
                for (int r = 0; r < 8; r += DX_ROWS) {
                    memcpy(to + r * depth + (k + j) * DX_ROWS, reinterpret_cast<float*>(&eight[j]) + r,
                           sizeof(float) * DX_ROWS);
                }
            }
        }
        for (; k < depth; ++k) {
            for (int r = 0; r < 8; ++r) to[(r / DX_ROWS * depth + k) * DX_ROWS + r % DX_ROWS] = rows[r][k];
        }
    }
}

// Into how many panels units of columns are cut so that threads have equally much to do; of equal ones the fewest,
// since dy is packed for each.
int panels_of(int units, int row_blocks, int threads) {
    int best = units, least = units * row_blocks;
    for (int panels = units; panels * (MOST_COLUMNS / UNIT) >= units; --panels) {
        const int turns = (panels * row_blocks + threads - 1) / threads, most = (units + panels - 1) / panels;
        if (turns * most <= least) {
            least = turns * most;
            best = panels;
        }
    }
    return best;
}

void linear_backward(Work& work, const Weight& w, const float* dy, ptrdiff_t dy_stride, int rows, float* dx,
                     ptrdiff_t dx_stride, bool add) {
    const int units = (w.columns + UNIT - 1) / UNIT, row_blocks = (rows + ROWS_AT_HAND - 1) / ROWS_AT_HAND;
    const int panels = panels_of(units, row_blocks, work.threads());
    work.each(panels * row_blocks, [&](int piece) {
        alignas(64) float unpacked[SUMMED * MOST_COLUMNS], gradients[SUMMED * ROWS_AT_HAND];
        const int panel = piece / row_blocks, begin = begin_of(panel, panels, units) * UNIT;
        const int count = std::min(w.columns, begin_of(panel + 1, panels, units) * UNIT) - begin;
        const int first = piece % row_blocks * ROWS_AT_HAND, here = std::min(ROWS_AT_HAND, rows - first);
        for (int summed = 0; summed < w.rows; summed += SUMMED) {
            const int depth = std::min(SUMMED, w.rows - summed), padded = (depth + GROUP - 1) / GROUP * GROUP;
            unpack_columns(w, summed, padded, begin, count, unpacked);
            pack_gradients(dy + first * dy_stride + summed, dy_stride, here, depth, gradients);
            const bool from_zero = summed == 0 && !add;
            for (int column = 0; column < count; column += DX_COLUMNS) {
                for (int row = 0; row < here; row += DX_ROWS) {
                    const float *g = gradients + row * depth, *numbers = unpacked + column * padded;
                    float* to = dx + (first + row) * dx_stride + begin + column;
                    const int some = std::min(DX_ROWS, here - row), wide = std::min(DX_COLUMNS, count - column);
                    if (some == DX_ROWS && wide == DX_COLUMNS) {
                        multiply_unpacked(g, numbers, depth, to, dx_stride, from_zero);
                        continue;
                    }
                    alignas(64) float whole[DX_ROWS * DX_COLUMNS] = {};
                    for (int r = 0; !from_zero && r < some; ++r) {
                        std::copy_n(to + r * dx_stride, wide, whole + r * DX_COLUMNS);
                    }
                    multiply_unpacked(g, numbers, depth, whole, DX_COLUMNS, from_zero);
                    for (int r = 0; r < some; ++r) std::copy_n(whole + r * DX_COLUMNS, wide, to + r * dx_stride);
                }
            }
        }
    });
}
