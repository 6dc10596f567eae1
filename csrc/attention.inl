// Attention over a paged cache. Part of kernels.inl.
//
// What a row gets depends on its sequence alone, to the bit: not on the rows beside it, nor on the pieces in which
// a prompt comes. So few queries and many, which are computed in different ways, add up in the same order, and that
// order is one of the keys' places: blocks of KEY_BLOCK, whose weights are sums of eight that are summed up last, make
// pieces of PIECE_KEYS, and these are folded together one after another.

static_assert(PIECE_KEYS % KEY_BLOCK == 0);
constexpr int FEW_QUERIES = WIDE == 16 ? 12 : 4;
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
TOKENLOOM_INLINE void fetch(const size_t* index, int count, const KVLayer& kv) {
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

// `f(lanes, vectors, part)` for all parts of D, of MOST vectors each where that divides it.
template <int D, int MOST = 2, class Function>
inline void each_part(Function&& f) {
    if constexpr (D % (MOST * WIDE) == 0) {
        for (int part = 0; part < D; part += MOST * WIDE) f(f32xw{}, std::integral_constant<int, MOST>(), part);
    } else if constexpr (D % 16 == 0) {
        for (int part = 0; part < D; part += 16) f(f32x8{}, std::integral_constant<int, 2>(), part);
    } else {
        for (int part = 0; part < D; part += 8) f(f32x8{}, std::integral_constant<int, 1>(), part);
    }
}

// What a task holds while keys and values pass by: of each query the sum of weighted values, the largest score so
// far and the sum of the weights, in this piece and in those before it.
template <int D>
struct Attending {
    alignas(64) float query[MOST_QUERIES * D];  // [queries, D], times 1 / sqrt(D)
    alignas(64) float columns[D * MOST_QUERIES];  // the same as columns, for many
    alignas(64) float acc[MOST_QUERIES * D];
    alignas(64) float folded[MOST_QUERIES * D], folded_most[MOST_QUERIES], folded_total[MOST_QUERIES];
    alignas(64) float scores[MOST_QUERIES * KEY_BLOCK];
    alignas(64) float wide[KEY_BLOCK * D];
    alignas(64) float most[MOST_QUERIES], total[MOST_QUERIES], decay[MOST_QUERIES];
    alignas(64) int32_t low[MOST_QUERIES], high[MOST_QUERIES];  // which keys at hand a query reads
    const float* rows[KEY_BLOCK];
};

// Which queries of a task meet keys.
struct Queries {
    int begin, end;
    bool many;
};

// Few queries: each key meets each query lane by lane. Sums of so many queries fit the registers.
constexpr int FEW_AT_ONCE = WIDE == 16 ? 4 : 1;

template <int D, int Q>
inline void score_few(const float* const* rows, const float* query, float* scores) {
    constexpr int V = 8 / LOADED;  // vectors of eight keys' products
    f32xw products[Q][V];
    TOKENLOOM_UNROLL
    for (int q = 0; q < Q; ++q) {
        for (int v = 0; v < V; ++v) products[q][v] = f32xw{};
    }
    // Or the compiler copies all eight keys to the stack, since they are the same for each query.
    asm("" ::: "memory");
    for (int d = 0; d < D; d += 8) {
        f32xw keys[V];
        TOKENLOOM_UNROLL
        for (int v = 0; v < V; ++v) keys[v] = load_apart(rows[v] + d, rows[v + 8 - V] + d);
        TOKENLOOM_UNROLL
        for (int q = 0; q < Q; ++q) {
            const f32xw part = load_apart(query + q * D + d, query + q * D + d);
            TOKENLOOM_UNROLL
            for (int v = 0; v < V; ++v) products[q][v] += part * keys[v];
        }
    }
    TOKENLOOM_UNROLL
    for (int q = 0; q < Q; ++q) store(scores + q * KEY_BLOCK, sums_of_halves(products[q]));
}

// acc = acc * decay + the sum of p[j] * rows[j] for Q queries and N vectors F of D, from `part` on.
template <int D, int Q, class F, int N>
inline void add_few(const float* const* rows, int part, const float* p, int low, int high, const float* decay,
                    float* acc) {
    constexpr int LANES = sizeof(F) / 4;
    F sums_of[Q][N];
    TOKENLOOM_UNROLL
    for (int q = 0; q < Q; ++q) {
        for (int n = 0; n < N; ++n) sums_of[q][n] = rounded<F>(load_as<F>(acc + q * D + n * LANES) * decay[q]);
    }
    for (int j = low; j < high; ++j) {
        F value[N];
        TOKENLOOM_UNROLL
        for (int n = 0; n < N; ++n) value[n] = load_as<F>(rows[j] + part + n * LANES);
        TOKENLOOM_UNROLL
        for (int q = 0; q < Q; ++q) {
            const F weight = all<F>(p[q * KEY_BLOCK + j]);
            for (int n = 0; n < N; ++n) sums_of[q][n] += weight * value[n];
        }
    }
    TOKENLOOM_UNROLL
    for (int q = 0; q < Q; ++q) {
        for (int n = 0; n < N; ++n) store_as<F>(acc + q * D + n * LANES, sums_of[q][n]);
    }
}

// `f(queries, first)` for queries `begin .. end`, as many at a time as fit the registers.
template <class Function>
inline void few_at_once(int begin, int end, Function&& f) {
    for (; begin + FEW_AT_ONCE <= end; begin += FEW_AT_ONCE) f(std::integral_constant<int, FEW_AT_ONCE>(), begin);
    if constexpr (FEW_AT_ONCE > 1) {
        switch (end - begin) {
            case 1: f(std::integral_constant<int, 1>(), begin); break;
            case 2: f(std::integral_constant<int, 2>(), begin); break;
            case 3: f(std::integral_constant<int, 3>(), begin); break;
        }
    }
}

template <int D>
void score_few(Attending<D>& a, Queries who, int first) {
    few_at_once(who.begin, who.end, [&](auto count, int i) {
        score_few<D, decltype(count)::value>(a.rows + first, a.query + i * D, a.scores + i * KEY_BLOCK + first);
    });
}

// Scores of the keys that a query reads become weights.
template <int D>
void weigh_few(Attending<D>& a, int i, int padded) {
    const int low = a.low[i], high = a.high[i];
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
    a.decay[i] = a.most[i] == next ? 1.0f : exp_below(splat(a.most[i] - next))[0];
    a.total[i] = a.total[i] * a.decay[i] + sum(weights);
    a.most[i] = next;
}

// `group` queries after one another read the same keys.
template <int D>
void add_few(Attending<D>& a, Queries who, int group, int padded) {
    for (int first = who.begin; first < who.end; first += group) {
        const int low = a.low[first], high = a.high[first];
        if (low >= high) continue;
        for (int i = first; i < first + group; ++i) weigh_few(a, i, padded);
        few_at_once(first, first + group, [&](auto count, int i) {
            constexpr int Q = decltype(count)::value;
            each_part<D, WIDE == 16 ? 4 : 8>([&](auto lanes, auto vectors, int part) {
                add_few<D, Q, decltype(lanes), decltype(vectors)::value>(
                    a.rows, part, a.scores + i * KEY_BLOCK, low, high, a.decay + i, a.acc + i * D + part);
            });
        });
    }
}

// Many queries: one lane each, so that sums over D and over keys are sums of whole vectors. They are `columns` here,
// and `scores` is [keys, MOST_QUERIES].
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

template <int D>
void add_many(const float* const* rows, int count, const float* weights, const float* decay, float* acc, int queries) {
    for (int query = 0; query < queries; query += ROWS_AT_ONCE) {
        each_part<D>([&](auto lanes, auto vectors, int part) {
            add_tile<D, decltype(lanes), decltype(vectors)::value>(rows, count, weights, decay, acc, query, part);
        });
    }
}

template <int D>
void begin_piece(Attending<D>& a, Queries who) {
    for (int i = who.begin; i < who.end; ++i) {
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

// Keys `from .. to` of a span, from a multiple of KEY_BLOCK on, meet queries. `last(i)`: query i reads no key beyond
// this one. Returns whether there were several pieces, which have been folded.
template <int D, class Last>
bool meet(Attending<D>& a, const AttentionShape& s, const Span& span, int kv_head, const KVLayer& kv, int from, int to,
          Queries who, Last&& last) {
    const int group = s.heads / s.kv_heads;
    size_t index[2][KEY_BLOCK];
    int turn = 0;
    bool folding = false;
    locate(s, span, from, std::min(KEY_BLOCK, to - from), kv_head, index[0]);
    for (int begin = from; begin < to; begin += KEY_BLOCK) {
        const int count = std::min(KEY_BLOCK, to - begin), padded = (count + 7) / 8 * 8;
        const size_t* here = index[turn];
        const size_t* ahead = index[turn ^= 1];
        const int next = std::min(KEY_BLOCK, to - begin - KEY_BLOCK);
        if (begin % PIECE_KEYS == 0 && begin > from) {
            fold(a, who.end, folding);
            folding = true;
            begin_piece(a, who);
        }
        if (next > 0) locate(s, span, begin + KEY_BLOCK, next, kv_head, index[turn]);
        gather<D>(here, count, kv.keys, kv.key_scales, a.rows, a.wide);
        for (int j = count; j < padded; ++j) a.rows[j] = a.rows[count - 1];
        for (int j = 0; j < padded; j += 8) {
            if (j < next) fetch<D>(ahead + j, std::min(8, next - j), kv);
            if (who.many) {
                score_many<D>(a.rows + j, 8, a.columns, who.end, a.scores + j * MOST_QUERIES);
            } else {
                score_few(a, who, j);
            }
        }
        gather<D>(here, count, kv.values, kv.value_scales, a.rows, a.wide);
        bool masked = false;
        for (int i = who.begin; i < who.end; ++i) {
            a.low[i] = s.window > 0 ? std::max(0, last(i) + 1 - s.window - begin) : 0;
            a.high[i] = std::min(count, last(i) + 1 - begin);
            masked |= a.low[i] > 0 || a.high[i] < count;
        }
        if (who.many) {
            weigh_many<D>(a, who.end, count, masked);
            add_many<D>(a.rows, count, a.scores, a.decay, a.acc, who.end);
        } else {
            add_few(a, who, group, padded);
        }
    }
    if (folding) fold(a, who.end, true);
    return folding;
}

template <int D>
void attend(const float* q, const AttentionShape& s, const Span* spans, const AttentionTask& task,
            const SharedRow* shared, float* partials, const KVLayer& kv, float* out, float* lse) {
    const Span& span = spans[task.span];
    const int group = s.heads / s.kv_heads, queries = task.rows * group;
    const bool many = queries > FEW_QUERIES;
    const float factor = 1.0f / std::sqrt(static_cast<float>(D));
    // The row of the batch that query i is of.
    const auto row_of = [&](int i) { return shared ? shared[i / group].row : span.start + task.row + i / group; };
    Attending<D> a;
    for (int i = 0; i < queries; ++i) {
        const float* from = q + row_of(i) * s.q_stride + (task.kv_head * group + i % group) * D;
        for (int d = 0; d < D; d += 8) store(a.query + i * D + d, load(from + d) * splat(factor));
        for (int d = 0; many && d < D; ++d) a.columns[d * MOST_QUERIES + i] = a.query[i * D + d];
    }
    const int lanes = (queries + WIDE - 1) / WIDE * WIDE;  // computed along: nobody reads what they give
    for (int i = queries; many && i < lanes; ++i) {
        for (int d = 0; d < D; ++d) a.columns[d * MOST_QUERIES + i] = 0.0f;
    }
    for (int i = 0; i < lanes; ++i) a.low[i] = a.high[i] = 0;
    begin_piece(a, {0, lanes, many});
    const auto last = [&](int i) {
        // Row r of the span is token kv_len - length + r: it reads up to itself; all that is shared.
        return shared ? task.key_end : span.kv_len - span.length + task.row + i / group;
    };
    const bool folded = meet(a, s, span, task.kv_head, kv, task.key_begin, task.key_end, {0, queries, many}, last);
    for (int r = 0; task.alone && r < task.rows; ++r) {
        const Span& own = spans[shared[r].span];
        const int end = end_alone(task, shared[r], own);
        const Queries who{r * group, (r + 1) * group, false};
        meet(a, s, own, task.kv_head, kv, task.key_end, end, who, [&](int) { return end; });
    }
    const float* sums_of = folded ? a.folded : a.acc;
    const float *most = folded ? a.folded_most : a.most, *total = folded ? a.folded_total : a.total;
    for (int i = 0; i < queries; ++i) {
        const int place = shared ? shared[i / group].partial + i % group : task.partial + i;
        if ((shared ? shared[i / group].partial : task.partial) >= 0) {
            float* to = partials + static_cast<size_t>(place) * (D + 2);
            memcpy(to, sums_of + i * D, sizeof(float) * D);
            to[D] = most[i];
            to[D + 1] = total[i];
            continue;
        }
        const int row = row_of(i), head = task.kv_head * group + i % group;
        finish<D>(sums_of + i * D, most[i], total[i], out + row * s.out_stride + head * D,
                  lse ? lse + static_cast<size_t>(row) * s.heads + head : nullptr);
    }
}

// The results of tasks that share rows, one after another in `partials`, become one.
template <int D>
void merge(const AttentionShape& s, const Span* spans, const AttentionMerge& merge, const float* partials, float* out,
           float* lse) {
    const int group = s.heads / s.kv_heads, queries = merge.rows * group;
    for (int i = 0; i < queries; ++i) {
        float acc[D], most = 0.0f, total = 0.0f;
        for (int p = 0; p < merge.count; ++p) {
            const float* from = partials + (static_cast<size_t>(merge.first) + p * queries + i) * (D + 2);
            fold<D>(from, from[D], from[D + 1], p == 0, acc, most, total);
        }
        const int row = spans[merge.span].start + merge.row + i / group, head = merge.kv_head * group + i % group;
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

void attention(Work& work, const float* q, const AttentionShape& s, const Span* spans, const AttentionPlan& plan,
               float* partials, const KVLayer& kv, float* out, float* lse) {
    work.each(static_cast<int>(plan.tasks.size()), [&](int i) {
        const AttentionTask& task = plan.tasks[i];
        const SharedRow* shared = task.shared < 0 ? nullptr : plan.shared.data() + task.shared;
        with_head_dim(s.head_dim, [&](auto d) {
            attend<decltype(d)::value>(q, s, spans, task, shared, partials, kv, out, lse);
        });
    });
    work.each(static_cast<int>(plan.merges.size()), [&](int i) {
        with_head_dim(s.head_dim, [&](auto d) {
            merge<decltype(d)::value>(s, spans, plan.merges[i], partials, out, lse);
        });
    });
}
