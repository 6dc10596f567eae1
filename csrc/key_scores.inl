// q . k of queries and chosen keys, without what attention does with them afterwards. Part of kernels.inl.

constexpr int SCORED_KEYS = 128;  // keys of a piece of work
constexpr int LATE = 16;          // so many keys ahead are asked for: their place is known to nobody but the slots

// Eight keys of one kv head meet its queries lane by lane.
inline void score_eight(const float* const* keys, const float* q, int queries, int width, float* out, ptrdiff_t stride,
                        int count) {
    const int whole = width / WIDE * WIDE;
    for (int i = 0; i < queries; ++i) {
        const float* x = q + static_cast<ptrdiff_t>(i) * width;
        // Or the compiler copies all eight keys to the stack, since they are the same for each query.
        asm("" ::: "memory");
        f32xw products[8];
        TOKENLOOM_UNROLL
        for (int k = 0; k < 8; ++k) products[k] = f32xw{};
        for (int d = 0; d < whole; d += WIDE) {
            const f32xw part = load_wide(x + d);
            TOKENLOOM_UNROLL
            for (int k = 0; k < 8; ++k) products[k] += part * load_wide(keys[k] + d);
        }
        f32x8 lanes[8];
        TOKENLOOM_UNROLL
        for (int k = 0; k < 8; ++k) lanes[k] = folded(products[k]);
        if (whole < width) {
            const f32x8 part = load(x + whole);
            TOKENLOOM_UNROLL
            for (int k = 0; k < 8; ++k) lanes[k] += part * load(keys[k] + whole);
        }
        const f32x8 all = sums(lanes);
        if (count == 8) {
            store(out + i * stride, all);
        } else {
            for (int k = 0; k < count; ++k) out[i * stride + k] = all[k];
        }
    }
}

void key_scores(Work& work, const float* q, const KeyRows& keys, int heads, int count, float* out) {
    const int group = heads / keys.heads, width = keys.width;
    work.each((count + SCORED_KEYS - 1) / SCORED_KEYS, [&](int piece) {
        const int end = std::min(count, (piece + 1) * SCORED_KEYS);
        alignas(64) float wide[8 * MOST_WIDTH];
        const float* rows[8];
        for (int begin = piece * SCORED_KEYS; begin < end; begin += 8) {
            const int some = std::min(8, end - begin);
            for (int head = 0; head < keys.heads; ++head) {
                for (int i = 0; i < 8; ++i) {
                    const size_t cell = keys.slots[begin + std::min(i, some - 1)] * keys.heads + head;
                    const size_t ahead = keys.slots[std::min(count - 1, begin + i + LATE)] * keys.heads + head;
                    const int bytes = width * (keys.scales ? 1 : 4);
                    const char* next = static_cast<const char*>(keys.data) + ahead * bytes;
                    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next + line, 0, 3);
                    if (!keys.scales) {
                        rows[i] = static_cast<const float*>(keys.data) + cell * width;
                        continue;
                    }
                    const auto* narrow = static_cast<const int8_t*>(keys.data) + cell * width;
                    const float scale = keys.scales[cell];
                    for (int d = 0; d < width; ++d) wide[i * width + d] = scale * static_cast<float>(narrow[d]);
                    rows[i] = wide + i * width;
                }
                score_eight(rows, q + static_cast<ptrdiff_t>(head) * group * width, group, width,
                            out + static_cast<ptrdiff_t>(head) * group * count + begin, count, some);
            }
        }
    });
}

// y [rows, n] = x [rows, k] times weights [n, k], for so few rows that reading the weights is what takes the time.
void few_products(Work& work, const float* x, int rows, const float* weights, int n, int k, float* y) {
    constexpr int PIECE = 32;  // rows of weights
    work.each((n + PIECE - 1) / PIECE, [&](int piece) {
        const int end = std::min(n, (piece + 1) * PIECE);
        for (int begin = piece * PIECE; begin < end; begin += 8) {
            const int some = std::min(8, end - begin);
            const float* eight[8];
            for (int i = 0; i < 8; ++i) eight[i] = weights + static_cast<ptrdiff_t>(begin + std::min(i, some - 1)) * k;
            score_eight(eight, x, rows, k, y + begin, n, some);
        }
    });
}

// Which pages a row reads, as cells: of each page but the last one the largest q . k that its bounds allow, the best
// `pages.count - 1`, and the last page.
void choose_pages(Work& work, const float* q, const Pages& pages, int heads, float* best, int64_t* cells) {
    const int kv_heads = pages.kv_heads, group = heads / kv_heads, half = pages.width, width = 2 * half;
    const int closed = pages.total - 1, chosen = pages.count - 1;
    const int lists = pages.by_group ? kv_heads : heads;
    constexpr int PIECE = 64;
    work.each((closed + PIECE - 1) / PIECE, [&](int piece) {
        alignas(64) float both[MOST_QUERIES * MOST_WIDTH];
        const int end = std::min(closed, (piece + 1) * PIECE);
        for (int head = 0; head < kv_heads; ++head) {
            // A dimension's larger product is with the largest number where q is positive, else with the least.
            for (int i = 0; i < group; ++i) {
                const float* x = q + static_cast<ptrdiff_t>(head * group + i) * half;
                for (int d = 0; d < half; ++d) {
                    both[i * width + d] = x[d] > 0.0f ? x[d] : 0.0f;
                    both[i * width + half + d] = x[d] > 0.0f ? 0.0f : x[d];
                }
            }
            for (int begin = piece * PIECE; begin < end; begin += 8) {
                const int some = std::min(8, end - begin);
                const float* rows[8];
                for (int i = 0; i < 8; ++i) {
                    const ptrdiff_t page = begin + std::min(i, some - 1);
                    rows[i] = pages.bounds + (page * kv_heads + head) * width;
                }
                score_eight(rows, both, group, width, best + static_cast<ptrdiff_t>(head) * group * closed + begin,
                            closed, some);
            }
        }
    });
    work.each(lists, [&](int list) {
        const int head = pages.by_group ? list : list / group;
        float* row = best + static_cast<ptrdiff_t>(list) * (pages.by_group ? group : 1) * closed;
        for (int i = 1; pages.by_group && i < group; ++i) {
            const float* other = row + static_cast<ptrdiff_t>(i) * closed;
            for (int p = 0; p < closed; ++p) row[p] = other[p] > row[p] || other[p] != other[p] ? other[p] : row[p];
        }
        thread_local std::vector<int64_t> ids;
        ids.resize(pages.count);
        if (chosen > 0) largest_of_row(row, closed, chosen, ids.data());
        ids[chosen] = closed;
        int64_t* to = cells + static_cast<ptrdiff_t>(list) * pages.tokens();
        for (const int64_t page : ids) {
            const int64_t end = std::min<int64_t>((page + 1) * pages.page, pages.length);
            for (int64_t t = page * pages.page; t < end; ++t) *to++ = pages.first + pages.slots[t] * kv_heads + head;
        }
    });
}
