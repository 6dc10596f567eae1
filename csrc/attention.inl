// Attention over a paged cache. Part of kernels.inl.
//
// What a row gets depends on its sequence alone, to the bit: not on the rows beside it, nor on the pieces in which
// a prompt comes. So few queries and many, which are computed in different ways, add up in the same order, and that
// order is one of the keys' places: blocks of KEY_BLOCK, whose weights are sums of eight that are summed up last, make
// pieces of PIECE_KEYS, and these are folded together one after another.

static_assert(PIECE_KEYS % KEY_BLOCK == 0);
constexpr int FEW_QUERIES = WIDE / 2;
constexpr int ROWS_AT_ONCE = WIDE == 16 ? 8 : 4;  // sums of so many rows times two vectors fit the registers

// Where in the cache the keys of a span lie, counted in heads.
void locate(const AttentionShape& s, const Span& span, int begin, int count, int kv_head, size_t* index) {
    if (span.cells) {
        std::copy_n(span.cells + begin, count, index);
        return;
    }
    const int32_t* block = span.blocks + begin / s.block_size;
    int offset = begin % s.block_size;
    for (int i = 0; i < count; ++block, offset = 0) {
        const int run = std::min(count - i, s.block_size - offset);
        size_t at = (static_cast<size_t>(*block) * s.block_size + offset) * s.kv_heads + kv_head;
        for (int j = 0; j < run; ++j, at += s.kv_heads) index[i++] = at;
    }
    const int own = span.kv_len - span.tail_length;
    for (int i = std::max(0, own - begin); span.tail && i < count; ++i) {
        index[i] = static_cast<size_t>(span.tail[begin + i - own]) * s.kv_heads + kv_head;
    }
}

// Asks for keys and values that are needed soon: one head's rows lie apart, so the processor does not foresee them.
template <int D>
inline void fetch(const size_t* index, int count, const KVLayer& kv) {
    const int bytes = D * (kv.quantized() ? 1 : 4);
    const char *keys = static_cast<const char*>(kv.keys), *values = static_cast<const char*>(kv.values);
    for (int i = 0; i < count; ++i) {
        for (int line = 0; line < bytes; line += 64) {
            __builtin_prefetch(keys + index[i] * bytes + line, 0, 2);
            __builtin_prefetch(values + index[i] * bytes + line, 0, 2);
        }
    }
}

// Pointers to keys or values; those in 8 bits are widened into `wide` first.
template <int D>
void gather(const size_t* index, int count, const void* data, const float* scales, const float** rows,
            float* wide) {
    if (!scales) {
        for (int i = 0; i < count; ++i) rows[i] = static_cast<const float*>(data) + index[i] * D;
        return;
    }
    for (int i = 0; i < count; ++i) {
        const auto* q = static_cast<const int8_t*>(data) + index[i] * D;
        const float scale = scales[index[i]];
        for (int d = 0; d < D; ++d) wide[i * D + d] = scale * static_cast<float>(q[d]);
        rows[i] = wide + i * D;
    }
}

// acc = acc * decay + the sum of p[j] * rows[j], in parts that fit the registers.
template <int D>
inline void add_values(const float* const* rows, const float* p, int low, int high, float decay, float* acc) {
    constexpr int PART = D % 64 == 0 ? 64 : D % 32 == 0 ? 32 : D % 16 == 0 ? 16 : 8, V = PART / 8;
    for (int part = 0; part < D; part += PART) {
        f32x8 sums[V];
        TOKENLOOM_UNROLL
        for (int v = 0; v < V; ++v) sums[v] = rounded(load(acc + part + 8 * v) * splat(decay));
        for (int j = low; j < high; ++j) {
            const f32x8 weight = splat(p[j]);
            const float* row = rows[j] + part;
            TOKENLOOM_UNROLL
            for (int v = 0; v < V; ++v) sums[v] += weight * load(row + 8 * v);
        }
        TOKENLOOM_UNROLL
        for (int v = 0; v < V; ++v) store(acc + part + 8 * v, sums[v]);
    }
}

// What a task holds while keys and values pass by: of each query the sum of weighted values, the largest score so
// far and the sum of the weights, in this piece and in those before it.
template <int D>
struct Attending {
    alignas(64) float query[MOST_QUERIES * D];  // times 1 / sqrt(D); [queries, D], or [D, MOST_QUERIES] for many
    alignas(64) float acc[MOST_QUERIES * D];
    alignas(64) float folded[MOST_QUERIES * D], folded_most[MOST_QUERIES], folded_total[MOST_QUERIES];
    alignas(64) float scores[MOST_QUERIES * KEY_BLOCK];
    alignas(64) float wide[KEY_BLOCK * D];
    alignas(64) float most[MOST_QUERIES], total[MOST_QUERIES], decay[MOST_QUERIES];
    alignas(64) int32_t low[MOST_QUERIES], high[MOST_QUERIES];  // which keys at hand a query reads
    const float* rows[KEY_BLOCK];
};

// Few queries: each key meets each query lane by lane.
template <int D>
void score_few(Attending<D>& a, int queries, int first) {
    for (int i = 0; i < queries; ++i) {
        const float* x = a.query + i * D;
        // Or the compiler copies all eight keys to the stack, since they are the same for each query.
        asm("" ::: "memory");
        f32x8 products[8];
        TOKENLOOM_UNROLL
        for (int k = 0; k < 8; ++k) products[k] = splat(0.0f);
        for (int d = 0; d < D; d += 8) {
            const f32x8 part = load(x + d);
            TOKENLOOM_UNROLL
            for (int k = 0; k < 8; ++k) products[k] += part * load(a.rows[first + k] + d);
        }
        store(a.scores + i * KEY_BLOCK + first, sums(products));
    }
}

template <int D>
void add_few(Attending<D>& a, int queries, int padded) {
    for (int i = 0; i < queries; ++i) {
        const int low = a.low[i], high = a.high[i];
        if (low >= high) continue;
        float* p = a.scores + i * KEY_BLOCK;
        for (int j = 0; j < low; ++j) p[j] = -__builtin_inff();
        for (int j = high; j < padded; ++j) p[j] = -__builtin_inff();
        f32x8 top = load(p);
        for (int j = 8; j < padded; j += 8) top = max_or_nan(top, load(p + j));
        const float now = max_or_nan(top);
        const float next = now > a.most[i] || now != now ? now : a.most[i];
        f32x8 weights = splat(0.0f);
        for (int j = 0; j < padded; j += 8) {
            const f32x8 e = exp_below(load(p + j) - splat(next));
            weights += e;
            store(p + j, e);
        }
        const float decay = a.most[i] == next ? 1.0f : exp_below(splat(a.most[i] - next))[0];
        a.total[i] = a.total[i] * decay + sum(weights);
        a.most[i] = next;
        add_values<D>(a.rows, p, low, high, decay, a.acc + i * D);
    }
}

// Many queries: one lane each, so that sums over D and over keys are sums of whole vectors. `query` is
// [D, MOST_QUERIES] here and `scores` [keys, MOST_QUERIES].
//
// A score is eight sums, of every eighth product, which are added up as a tree: as `score_few` has it.
template <int D, int N>
inline void score_tile(const float* const* rows, const float* query, float* scores, int lane) {
    f32xw eighths[8][ROWS_AT_ONCE][N];
#pragma GCC unroll 1  // unrolled it takes twice the time to compile, and no less to run
    for (int eighth = 0; eighth < 8; ++eighth) {
        f32xw sums_of[ROWS_AT_ONCE][N];
        TOKENLOOM_UNROLL
        for (int k = 0; k < ROWS_AT_ONCE; ++k) {
            for (int n = 0; n < N; ++n) sums_of[k][n] = f32xw{};
        }
        TOKENLOOM_UNROLL
        for (int d = eighth; d < D; d += 8) {
            const float* x = query + d * MOST_QUERIES + lane;
            f32xw part[N];
            for (int n = 0; n < N; ++n) part[n] = load_wide(x + n * WIDE);
            TOKENLOOM_UNROLL
            for (int k = 0; k < ROWS_AT_ONCE; ++k) {
                const f32xw key = all<f32xw>(rows[k][d]);
                for (int n = 0; n < N; ++n) sums_of[k][n] += key * part[n];
            }
        }
        TOKENLOOM_UNROLL
        for (int k = 0; k < ROWS_AT_ONCE; ++k) {
            for (int n = 0; n < N; ++n) eighths[eighth][k][n] = sums_of[k][n];
        }
    }
    for (int k = 0; k < ROWS_AT_ONCE; ++k) {
        for (int n = 0; n < N; ++n) {
            const auto pair = [&](int i) { return eighths[i][k][n] + eighths[i + 1][k][n]; };
            const f32xw sum_of = (pair(0) + pair(2)) + (pair(4) + pair(6));
            store_wide(scores + k * MOST_QUERIES + lane + n * WIDE, sum_of);
        }
    }
}

// Rows are keys, or any other vectors that each query meets; `count` is rounded up to a multiple of 8.
template <int D>
void score_many(const float* const* rows, int count, const float* query, int queries, float* scores) {
    for (int j = 0; j < count; j += ROWS_AT_ONCE, scores += ROWS_AT_ONCE * MOST_QUERIES) {
        int lane = 0;
        for (; lane + WIDE < queries; lane += 2 * WIDE) score_tile<D, 2>(rows + j, query, scores, lane);
        if (lane < queries) score_tile<D, 1>(rows + j, query, scores, lane);
    }
}

// Scores become weights, less what later keys may still take off: see `decay`.
template <int D>
void weigh_many(Attending<D>& a, int queries, int count, bool masked) {
    for (int lane = 0; lane < queries; lane += WIDE) {
        float* p = a.scores + lane;
        const i32xw low = load_wide(a.low + lane), high = load_wide(a.high + lane);
        const f32xw before = load_wide(a.most + lane), none = all<f32xw>(-__builtin_inff());
        f32xw top = before;
        for (int j = 0; j < count; ++j) {
            f32xw s = load_wide(p + j * MOST_QUERIES);
            if (masked) {
                s = select((j >= low) & (j < high), s, none);
                store_wide(p + j * MOST_QUERIES, s);
            }
            top = max_or_nan(top, s);
        }
        const f32xw base = select(top == none, f32xw{}, top);  // no key yet: all weights are 0
        f32xw sums_of[8] = {};
        const auto weigh = [&](int j, f32xw& weights) {
            const f32xw e = exp_below(load_wide(p + j * MOST_QUERIES) - base);
            weights += e;
            store_wide(p + j * MOST_QUERIES, e);
        };
        int j = 0;
        for (; j + 8 <= count; j += 8) {
            TOKENLOOM_UNROLL
            for (int k = 0; k < 8; ++k) weigh(j + k, sums_of[k]);
        }
        for (int k = 0; j + k < count; ++k) weigh(j + k, sums_of[k]);
        for (int k = 0; k < 4; ++k) sums_of[k] += sums_of[k + 4];
        const f32xw weights = (sums_of[0] + sums_of[1]) + (sums_of[2] + sums_of[3]);
        const f32xw decay = select(before == top, all<f32xw>(1.0f), exp_below(before - base));
        store_wide(a.decay + lane, decay);
        store_wide(a.total + lane, load_wide(a.total + lane) * decay + weights);
        store_wide(a.most + lane, top);
    }
}

// acc = acc * decay + weights * values for ROWS_AT_ONCE queries and N vectors F of D.
template <int D, class F, int N>
inline void add_tile(const float* const* rows, int count, const float* weights, const float* decay, float* acc,
                     int query, int part) {
    constexpr int LANES = sizeof(F) / 4;
    typedef float unaligned __attribute__((vector_size(sizeof(F)), aligned(4), may_alias));
    F sums_of[ROWS_AT_ONCE][N];
    float* to = acc + query * D + part;
    TOKENLOOM_UNROLL
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
        for (int n = 0; n < N; ++n) {
            sums_of[i][n] = rounded<F>(*reinterpret_cast<unaligned*>(to + i * D + n * LANES) * decay[query + i]);
        }
    }
    for (int j = 0; j < count; ++j) {
        const float* p = weights + j * MOST_QUERIES + query;
        F value[N];
        for (int n = 0; n < N; ++n) value[n] = *reinterpret_cast<const unaligned*>(rows[j] + part + n * LANES);
        TOKENLOOM_UNROLL
        for (int i = 0; i < ROWS_AT_ONCE; ++i) {
            const F weight = all<F>(p[i]);
            for (int n = 0; n < N; ++n) sums_of[i][n] += weight * value[n];
        }
    }
    TOKENLOOM_UNROLL
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
        for (int n = 0; n < N; ++n) *reinterpret_cast<unaligned*>(to + i * D + n * LANES) = sums_of[i][n];
    }
}

// `f(lanes, vectors, part)` for all parts of D that fit the registers.
template <int D, class Function>
inline void each_part(Function&& f) {
    if constexpr (D % (2 * WIDE) == 0) {
        for (int part = 0; part < D; part += 2 * WIDE) f(f32xw{}, std::integral_constant<int, 2>(), part);
    } else if constexpr (D % 16 == 0) {
        for (int part = 0; part < D; part += 16) f(f32x8{}, std::integral_constant<int, 2>(), part);
    } else {
        for (int part = 0; part < D; part += 8) f(f32x8{}, std::integral_constant<int, 1>(), part);
    }
}

template <int D>
void add_many(const float* const* rows, int count, const float* weights, const float* decay, float* acc, int queries) {
    for (int query = 0; query < queries; query += ROWS_AT_ONCE) {
        each_part<D>([&](auto lanes, auto vectors, int part) {
            add_tile<D, decltype(lanes), decltype(vectors)::value>(rows, count, weights, decay, acc, query, part);
        });
    }
}

template <int D>
void begin_piece(Attending<D>& a, int queries) {
    for (int i = 0; i < queries; ++i) {
        for (int d = 0; d < D; d += 8) store(a.acc + i * D + d, splat(0.0f));
        a.most[i] = -__builtin_inff();
        a.total[i] = 0.0f;
    }
}

// Adds a piece's sums to those of the pieces before it; the first one is taken as it is.
template <int D>
inline void fold(const float* piece, float piece_most, float piece_total, bool first, float* acc, float& most,
                 float& total) {
    if (first) {
        memcpy(acc, piece, sizeof(float) * D);
        most = piece_most;
        total = piece_total;
        return;
    }
    if (piece_total == 0.0f) return;  // none of its keys is read
    const float top = max_or_nan(f32x8{most, piece_most, most, most, most, most, most, most});
    const auto decay = [top](float m) { return m == top ? 1.0f : exp_below(splat(m - top))[0]; };
    const float before = decay(most), now = decay(piece_most);
    for (int d = 0; d < D; d += 8) {
        store(acc + d, rounded(load(acc + d) * splat(before)) + load(piece + d) * splat(now));
    }
    total = rounded(splat(total * before))[0] + piece_total * now;
    most = top;
}

template <int D>
void fold(Attending<D>& a, int queries, bool more) {
    for (int i = 0; i < queries; ++i) {
        fold<D>(a.acc + i * D, a.most[i], a.total[i], !more, a.folded + i * D, a.folded_most[i], a.folded_total[i]);
    }
}

// Sums become a row's result; lse may be null.
template <int D>
inline void finish(const float* acc, float most, float total, float* out, float* lse) {
    const f32x8 inverse = splat(1.0f / total);
    for (int d = 0; d < D; d += 8) store(out + d, load(acc + d) * inverse);
    if (lse) *lse = most + std::log(total);
}

// The row of the batch that a task's query i is of.
inline int row_of(const Span& span, const AttentionTask& task, int row) {
    return task.shared ? task.shared[row].row : span.start + task.row + row;
}

template <int D>
void attend(const float* q, const AttentionShape& s, const Span* spans, const AttentionTask& task,
            float* partials, const KVLayer& kv, float* out, float* lse) {
    constexpr int V = D / 8;
    const Span& span = spans[task.span];
    const int group = s.heads / s.kv_heads, queries = task.rows * group;
    const bool many = queries > FEW_QUERIES;
    const float factor = 1.0f / std::sqrt(static_cast<float>(D));
    Attending<D> a;
    for (int i = 0; i < queries; ++i) {
        const int row = row_of(span, task, i / group), head = task.kv_head * group + i % group;
        const float* from = q + row * s.q_stride + head * D;
        if (many) {
            for (int d = 0; d < D; ++d) a.query[d * MOST_QUERIES + i] = from[d] * factor;
        } else {
            for (int v = 0; v < V; ++v) store(a.query + i * D + 8 * v, load(from + 8 * v) * splat(factor));
        }
    }
    const int lanes = (queries + WIDE - 1) / WIDE * WIDE;  // computed along: nobody reads what they give
    for (int i = queries; many && i < lanes; ++i) {
        for (int d = 0; d < D; ++d) a.query[d * MOST_QUERIES + i] = 0.0f;
    }
    for (int i = 0; i < lanes; ++i) a.low[i] = a.high[i] = 0;
    begin_piece(a, lanes);
    size_t index[2][KEY_BLOCK];
    int turn = 0;
    bool folding = false;
    locate(s, span, task.key_begin, std::min(KEY_BLOCK, task.key_end - task.key_begin), task.kv_head, index[0]);
    for (int begin = task.key_begin; begin < task.key_end; begin += KEY_BLOCK) {
        const int count = std::min(KEY_BLOCK, task.key_end - begin), padded = (count + 7) / 8 * 8;
        const size_t* here = index[turn];
        const size_t* ahead = index[turn ^= 1];
        const int next = std::min(KEY_BLOCK, task.key_end - begin - KEY_BLOCK);
        if (begin % PIECE_KEYS == 0 && begin > task.key_begin) {
            fold(a, queries, folding);
            folding = true;
            begin_piece(a, lanes);
        }
        if (next > 0) locate(s, span, begin + KEY_BLOCK, next, task.kv_head, index[turn]);
        gather<D>(here, count, kv.keys, kv.key_scales, a.rows, a.wide);
        for (int j = count; j < padded; ++j) a.rows[j] = a.rows[count - 1];
        for (int j = 0; j < padded; j += 8) {
            if (j < next) fetch<D>(ahead + j, std::min(8, next - j), kv);
            if (many) {
                score_many<D>(a.rows + j, 8, a.query, queries, a.scores + j * MOST_QUERIES);
            } else {
                score_few<D>(a, queries, j);
            }
        }
        gather<D>(here, count, kv.values, kv.value_scales, a.rows, a.wide);
        bool masked = false;
        for (int i = 0; i < queries; ++i) {
            // Row r of the span is token kv_len - length + r: it reads up to itself; all that is shared.
            const int last = task.shared ? task.key_end : span.kv_len - span.length + task.row + i / group;
            a.low[i] = s.window > 0 ? std::max(0, last + 1 - s.window - begin) : 0;
            a.high[i] = std::min(count, last + 1 - begin);
            masked |= a.low[i] > 0 || a.high[i] < count;
        }
        if (many) {
            weigh_many<D>(a, queries, count, masked);
            add_many<D>(a.rows, count, a.scores, a.decay, a.acc, queries);
        } else {
            add_few<D>(a, queries, padded);
        }
    }
    if (folding) fold(a, queries, true);
    const float* sums_of = folding ? a.folded : a.acc;
    const float *most = folding ? a.folded_most : a.most, *total = folding ? a.folded_total : a.total;
    for (int i = 0; i < queries; ++i) {
        if (task.partial >= 0) {
            const int place = task.shared ? task.shared[i / group].partial + i % group : task.partial + i;
            float* to = partials + static_cast<size_t>(place) * (D + 2);
            memcpy(to, sums_of + i * D, sizeof(float) * D);
            to[D] = most[i];
            to[D + 1] = total[i];
            continue;
        }
        const int row = span.start + task.row + i / group, head = task.kv_head * group + i % group;
        finish<D>(sums_of + i * D, most[i], total[i], out + row * s.out_stride + head * D,
                  lse ? lse + static_cast<size_t>(row) * s.heads + head : nullptr);
    }
}

// The results of tasks that share rows, one after another in `partials`, become one.
template <int D>
void merge(const AttentionShape& s, const Span* spans, const AttentionTask& task, const float* partials,
           float* out, float* lse) {
    const int group = s.heads / s.kv_heads, queries = task.rows * group;
    for (int i = 0; i < queries; ++i) {
        float acc[D], most = 0.0f, total = 0.0f;
        for (int p = 0; p < task.num_partials; ++p) {
            const float* from = partials + (static_cast<size_t>(task.first_partial) + p * queries + i) * (D + 2);
            fold<D>(from, from[D], from[D + 1], p == 0, acc, most, total);
        }
        const int row = spans[task.span].start + task.row + i / group, head = task.kv_head * group + i % group;
        finish<D>(acc, most, total, out + row * s.out_stride + head * D,
                  lse ? lse + static_cast<size_t>(row) * s.heads + head : nullptr);
    }
}

// `f` with the head's width as a constant.
template <class Function>
inline void with_head_dim(int head_dim, Function&& f) {
    switch (head_dim) {
        case 8: f(std::integral_constant<int, 8>()); break;
        case 16: f(std::integral_constant<int, 16>()); break;
        case 32: f(std::integral_constant<int, 32>()); break;
        case 64: f(std::integral_constant<int, 64>()); break;
        case 80: f(std::integral_constant<int, 80>()); break;
        case 96: f(std::integral_constant<int, 96>()); break;
        case 128: f(std::integral_constant<int, 128>()); break;
        default: break;
    }
}

void attention(Work& work, const float* q, const AttentionShape& s, const Span* spans,
               const AttentionTask* tasks, int num_tasks, float* partials, const KVLayer& kv, float* out, float* lse) {
    work.each(num_tasks, [&](int i) {
        with_head_dim(s.head_dim, [&](auto d) {
            attend<decltype(d)::value>(q, s, spans, tasks[i], partials, kv, out, lse);
        });
    });
    bool merging = false;
    for (int i = 0; i < num_tasks; ++i) merging |= tasks[i].num_partials > 0;
    if (!merging) return;
    work.each(num_tasks, [&](int i) {
        if (tasks[i].num_partials == 0) return;
        with_head_dim(s.head_dim, [&](auto d) { merge<decltype(d)::value>(s, spans, tasks[i], partials, out, lse); });
    });
}
