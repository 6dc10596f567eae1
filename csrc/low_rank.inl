// What LoRAs add beside a projection, many adapters in one batch. Part of kernels.inl.
//
// Both products are pieces of the projection's own step: first those of z = scale * x A^T, then those of the
// projection, each of which adds z B^T to its numbers before they leave the registers. A row's result does not
// depend on the rows beside it: sums run in the same order in tiles of any size.

constexpr int LORA_ROWS = 32;  // rows of a piece of z
constexpr int LORA_RANKS = 8;  // its columns

inline int pieces_for(int count, int size) { return (count + size - 1) / size; }

inline int middle_pieces(const LowRankRows& run) {
    return pieces_for(run.end - run.begin, LORA_ROWS) * pieces_for(run.lora->ranks, LORA_RANKS);
}

inline int middle_pieces(const LowRankPass& pass) {
    int pieces = 0;
    for (const auto& run : pass.runs) pieces += middle_pieces(run);
    return pieces;
}

inline float dot(const float* a, const float* b, int count) {
    float total = 0.0f;
    for (int i = 0; i < count; ++i) total += a[i] * b[i];
    return total;
}

// M rows of x times J rows of A.
template <int M, int J>
inline void middle_tile(const float* x, ptrdiff_t stride, const float* a, int width, const float* scale, float* z,
                          ptrdiff_t z_stride) {
    f32xw acc[M][J] = {};
    int k = 0;
    for (; k + WIDE <= width; k += WIDE) {
        f32xw rows_of_a[J];
        TOKENLOOM_UNROLL
        for (int j = 0; j < J; ++j) rows_of_a[j] = load_wide(a + static_cast<ptrdiff_t>(j) * width + k);
        TOKENLOOM_UNROLL
        for (int m = 0; m < M; ++m) {
            const f32xw v = load_wide(x + m * stride + k);
            TOKENLOOM_UNROLL
            for (int j = 0; j < J; ++j) acc[m][j] += v * rows_of_a[j];
        }
    }
    for (int m = 0; m < M; ++m) {
        f32x8 lanes[8] = {};
        for (int j = 0; j < J; ++j) lanes[j] = folded(acc[m][j]);
        const f32x8 totals = sums(lanes);
        for (int j = 0; j < J; ++j) {
            const float rest = dot(x + m * stride + k, a + static_cast<ptrdiff_t>(j) * width + k, width - k);
            z[m * z_stride + j] = scale[j] * (totals[j] + rest);
        }
    }
}

void middle(LowRankPass& pass, int piece) {
    constexpr int M = WIDE == 16 ? 4 : 2, J = 4;  // the sums of a tile stay in registers
    const LowRankRows* run = pass.runs.data();
    for (; piece >= middle_pieces(*run); ++run) piece -= middle_pieces(*run);
    const LowRank& lora = *run->lora;
    const int across = pieces_for(lora.ranks, LORA_RANKS);
    const int row = run->begin + piece / across * LORA_ROWS, end = std::min(row + LORA_ROWS, run->end);
    const int rank = piece % across * LORA_RANKS, last = std::min(rank + LORA_RANKS, lora.ranks);
    const auto tile = [&](auto rows, auto ranks, int t, int j) {
        middle_tile<decltype(rows)::value, decltype(ranks)::value>(
            pass.x + t * pass.stride, pass.stride, lora.a + static_cast<ptrdiff_t>(j) * lora.width, lora.width,
            lora.scale.data() + j, pass.z + t * pass.z_stride + j, pass.z_stride);
    };
    const auto several = [&](auto ranks, int j) {
        int t = row;
        for (; t + M <= end; t += M) tile(std::integral_constant<int, M>(), ranks, t, j);
        for (; t < end; ++t) tile(std::integral_constant<int, 1>(), ranks, t, j);
    };
    int j = rank;
    for (; j + J <= last; j += J) several(std::integral_constant<int, J>(), j);
    for (; j < last; ++j) several(std::integral_constant<int, 1>(), j);
    pass.ready.fetch_add(1, std::memory_order_release);
}

// Adds to columns `column ..` of y[t] what row `first + t` has for eight outputs from `out` on.
void add_low_rank(const LowRankPass& pass, int out, int first, int rows, float (*y)[STRIP * GROUP], int column) {
    for (const auto& run : pass.runs) {
        const int begin = std::max(first, run.begin), end = std::min(first + rows, run.end);
        if (begin >= end) continue;
        for (const auto& part : run.lora->parts) {
            if (out < part.first_out || out >= part.first_out + part.outs) continue;
            const float* b = part.b + static_cast<ptrdiff_t>(out - part.first_out) * part.ranks;
            for (int r = 0; r < part.ranks; r += 8) {
                const int ranks = std::min(8, part.ranks - r);
                f32x8 columns[8] = {};  // of B
                for (int i = 0; i < 8; ++i) {
                    if (ranks == 8) {
                        columns[i] = load(b + i * part.ranks + r);
                    } else {
                        memcpy(&columns[i], b + i * part.ranks + r, sizeof(float) * ranks);
                    }
                }
                transpose(columns);
                for (int t = begin; t < end; ++t) {
                    const float* z = pass.z + t * pass.z_stride + part.first_rank + r;
                    f32x8 total{};
                    if (ranks == 8) {
                        TOKENLOOM_UNROLL
                        for (int j = 0; j < 8; ++j) total += columns[j] * z[j];
                    } else {
                        for (int j = 0; j < ranks; ++j) total += columns[j] * z[j];
                    }
                    float* to = y[t - first] + column;
                    store(to, load(to) + total);
                }
            }
        }
    }
}
