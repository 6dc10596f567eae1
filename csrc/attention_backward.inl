// The gradient of attention. Part of kernels.inl.
//
// Weights are computed again from the scores and their log-sum-exp, block of keys by block of keys, so that no
// matrix of rows times keys ever lies in memory. A task owns the gradients of its keys; what it gives to the queries
// goes to a place of its own, and these are added up in a fixed order at the end.

// What is the same for all tasks that meet a tile of queries: [D, MOST_QUERIES] each of q / sqrt(D) and of the
// result's gradient, and per query its log-sum-exp and the sum of gradient times result.
template <int D>
void prepare_tile(const AttentionShape& s, const AttentionGradients& g, const AttentionGradients::Tile& tile,
                  int kv_head, float* to) {
    const int group = s.heads / s.kv_heads, queries = tile.rows * group;
    const float factor = 1.0f / std::sqrt(static_cast<float>(D));
    float *query = to, *d_out = to + D * MOST_QUERIES, *lse = d_out + D * MOST_QUERIES, *shift = lse + MOST_QUERIES;
    std::fill_n(to, prepared_floats(D), 0.0f);
    for (int i = 0; i < MOST_QUERIES; ++i) {
        if (i >= queries) {
            lse[i] = __builtin_inff();  // weights of lanes that are no query are 0
            continue;
        }
        const ptrdiff_t row = g.spans[tile.span].start + tile.row + i / group;
        const int head = kv_head * group + i % group;
        const float *q = g.q + row * g.q_stride + head * D, *o = g.out + row * g.out_stride + head * D;
        const float* d = g.d_out + row * g.d_out_stride + head * D;
        f32x8 total{};
        for (int j = 0; j < D; j += 8) total += load(d + j) * load(o + j);
        lse[i] = g.lse[row * s.heads + head];
        shift[i] = sum(total);
        for (int j = 0; j < D; ++j) {
            query[j * MOST_QUERIES + i] = q[j] * factor;
            d_out[j * MOST_QUERIES + i] = d[j];
        }
    }
}

// to[j] += the sum over queries of weights[j] * rows[query], for ROWS_AT_ONCE keys j and N vectors F of D.
template <int D, class F, int N>
inline void give_tile(const float* const* rows, int queries, const float* weights, float* to) {
    constexpr int LANES = sizeof(F) / 4;
    typedef float unaligned __attribute__((vector_size(sizeof(F)), aligned(4), may_alias));
    F sums_of[ROWS_AT_ONCE][N];
    TOKENLOOM_UNROLL
    for (int k = 0; k < ROWS_AT_ONCE; ++k) {
        for (int n = 0; n < N; ++n) sums_of[k][n] = *reinterpret_cast<unaligned*>(to + k * D + n * LANES);
    }
    for (int i = 0; i < queries; ++i) {
        F value[N];
        for (int n = 0; n < N; ++n) value[n] = *reinterpret_cast<const unaligned*>(rows[i] + n * LANES);
        TOKENLOOM_UNROLL
        for (int k = 0; k < ROWS_AT_ONCE; ++k) {
            const F weight = all<F>(weights[k * MOST_QUERIES + i]);
            for (int n = 0; n < N; ++n) sums_of[k][n] += weight * value[n];
        }
    }
    TOKENLOOM_UNROLL
    for (int k = 0; k < ROWS_AT_ONCE; ++k) {
        for (int n = 0; n < N; ++n) *reinterpret_cast<unaligned*>(to + k * D + n * LANES) = sums_of[k][n];
    }
}

template <int D>
void give(const float* const* rows, int queries, const float* weights, int padded, float* to) {
    each_part<D>([&](auto lanes, auto vectors, int part) {
        const float* parts[MOST_QUERIES];
        for (int i = 0; i < queries; ++i) parts[i] = rows[i] + part;
        for (int j = 0; j < padded; j += ROWS_AT_ONCE) {
            give_tile<D, decltype(lanes), decltype(vectors)::value>(parts, queries, weights + j * MOST_QUERIES,
                                                                    to + j * D + part);
        }
    });
}

// Scores become weights, gradients of weights those of scores.
inline void weigh_backward(float* scores, float* d_weights, const float* lse, const float* shift, int queries,
                           int count, int padded, const int32_t* low, const int32_t* high) {
    for (int lane = 0; lane < queries; lane += WIDE) {
        const f32xw base = load_wide(lse + lane), taken = load_wide(shift + lane);
        const i32xw from = load_wide(low + lane), to = load_wide(high + lane);
        for (int j = 0; j < padded; ++j) {
            float *s = scores + j * MOST_QUERIES + lane, *d = d_weights + j * MOST_QUERIES + lane;
            const i32xw reads = (j >= from) & (j < to) & (j < count);
            const f32xw weight = select(reads, exp_below(load_wide(s) - base), f32xw{});
            store_wide(s, weight);
            // Not read at all is 0 even where a number of another row is not finite.
            store_wide(d, select(reads, weight * (load_wide(d) - taken), f32xw{}));
        }
    }
}

template <int D>
void attend_backward(const AttentionShape& s, const AttentionGradients& g, const AttentionGradients::Task& task,
                     const KVLayer& kv) {
    const Span& span = g.spans[task.span];
    const int group = s.heads / s.kv_heads, tiles = static_cast<int>(g.tiles.size());
    const float factor = 1.0f / std::sqrt(static_cast<float>(D));
    alignas(64) float scores[KEY_BLOCK * MOST_QUERIES], d_weights[KEY_BLOCK * MOST_QUERIES];
    alignas(64) float d_keys[KEY_BLOCK * D], d_values[KEY_BLOCK * D];
    alignas(64) int32_t low[MOST_QUERIES], high[MOST_QUERIES];
    float ones[MOST_QUERIES];
    std::fill_n(ones, MOST_QUERIES, 1.0f);
    const size_t tile_floats = static_cast<size_t>(MOST_QUERIES) * D;
    const size_t place = static_cast<size_t>(task.partial) * s.kv_heads + task.kv_head;
    float* d_queries = g.partials + place * tiles * tile_floats;
    std::fill_n(d_queries + task.first_tile * tile_floats, task.num_tiles * tile_floats, 0.0f);
    size_t index[KEY_BLOCK];
    const float *keys[KEY_BLOCK], *values[KEY_BLOCK];
    for (int begin = task.key_begin; begin < task.key_end; begin += KEY_BLOCK) {
        const int count = std::min(KEY_BLOCK, task.key_end - begin), padded = (count + 7) / 8 * 8;
        locate(s, span, begin, count, task.kv_head, index);
        for (int j = 0; j < padded; ++j) {
            const size_t at = index[std::min(j, count - 1)] * D;
            keys[j] = static_cast<const float*>(kv.keys) + at;
            values[j] = static_cast<const float*>(kv.values) + at;
        }
        std::fill_n(d_keys, padded * D, 0.0f);
        std::fill_n(d_values, padded * D, 0.0f);
        for (int t = task.first_tile; t < task.first_tile + task.num_tiles; ++t) {
            const auto& tile = g.tiles[t];
            const int first = span.kv_len - span.length + tile.row;  // token of the tile's first row
            if (first + tile.rows <= begin || (s.window > 0 && first + 1 - s.window >= begin + count)) continue;
            const int queries = tile.rows * group;
            // Keys behind the tile's last row are read by nobody.
            const int reached = std::min(count, first + tile.rows - begin), reached_padded = (reached + 7) / 8 * 8;
            const float *q[MOST_QUERIES], *d_out[MOST_QUERIES];
            for (int i = 0; i < MOST_QUERIES; ++i) {
                if (i >= queries) {
                    low[i] = high[i] = 0;
                    continue;
                }
                const ptrdiff_t row = span.start + tile.row + i / group;
                const int head = task.kv_head * group + i % group, last = first + i / group;
                q[i] = g.q + row * g.q_stride + head * D;
                d_out[i] = g.d_out + row * g.d_out_stride + head * D;
                low[i] = s.window > 0 ? last + 1 - s.window - begin : 0;
                high[i] = last + 1 - begin;
            }
            const float* query = g.prepared + (static_cast<size_t>(task.kv_head) * tiles + t) * prepared_floats(D);
            const float *d_query = query + D * MOST_QUERIES, *lse = d_query + D * MOST_QUERIES;
            score_many<D>(keys, reached_padded, query, queries, scores);
            score_many<D>(values, reached_padded, d_query, queries, d_weights);
            weigh_backward(scores, d_weights, lse, lse + MOST_QUERIES, queries, reached, reached_padded, low, high);
            give<D>(d_out, queries, scores, reached_padded, d_values);
            give<D>(q, queries, d_weights, reached_padded, d_keys);
            add_many<D>(keys, reached, d_weights, ones, d_queries + t * tile_floats, queries);
        }
        const ptrdiff_t to = task.kv_head * g.head_stride + (g.first_tokens[task.span] + begin) * D;
        for (int i = 0; i < count * D; i += 8) {
            store(g.dk + to + i, load(g.dk + to + i) + load(d_keys + i) * splat(factor));
            store(g.dv + to + i, load(g.dv + to + i) + load(d_values + i));
        }
    }
}

void attention_backward(Work& work, const AttentionShape& s, const AttentionGradients& g, const KVLayer& kv) {
    const int tiles = static_cast<int>(g.tiles.size()), group = s.heads / s.kv_heads, width = s.head_dim;
    const float factor = 1.0f / std::sqrt(static_cast<float>(width));
    const size_t tile_floats = static_cast<size_t>(MOST_QUERIES) * width;
    work.each(tiles * s.kv_heads, [&](int i) {
        with_head_dim(width, [&](auto d) {
            constexpr int D = decltype(d)::value;
            prepare_tile<D>(s, g, g.tiles[i % tiles], i / tiles, g.prepared + i * prepared_floats(D));
        });
    });
    work.each(static_cast<int>(g.tasks.size()), [&](int i) {
        with_head_dim(width, [&](auto d) { attend_backward<decltype(d)::value>(s, g, g.tasks[i], kv); });
    });
    work.each(tiles * s.kv_heads, [&](int piece) {
        const auto& tile = g.tiles[piece % tiles];
        const int kv_head = piece / tiles;
        for (int i = 0; i < tile.rows * group; ++i) {
            const ptrdiff_t row = g.spans[tile.span].start + tile.row + i / group;
            float* to = g.dq + row * g.dq_stride + (kv_head * group + i % group) * width;
            const float* from = g.partials + piece * tile_floats + i * width;
            const size_t apart = static_cast<size_t>(s.kv_heads) * tiles * tile_floats;
            for (int j = 0; j < width; j += 8) {
                f32x8 total{};
                for (int p = 0; p < g.num_partials; ++p) total += load(from + p * apart + j);
                store(to + j, total * splat(factor));
            }
        }
    });
}
