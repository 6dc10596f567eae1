// Attention over a paged cache. Part of kernels.inl.

constexpr int KEYS = 64;          // keys at a time: 16 KiB each of keys and values at D = 64
constexpr int MOST_QUERIES = 64;  // query heads times rows of one task

// Where in the cache the keys of a span lie, counted in heads.
void locate(const AttentionShape& s, const Span& span, int begin, int count, int kv_head, size_t* index) {
    const int32_t* block = span.blocks + begin / s.block_size;
    int offset = begin % s.block_size;
    for (int i = 0; i < count; ++block, offset = 0) {
        const int run = std::min(count - i, s.block_size - offset);
        size_t at = (static_cast<size_t>(*block) * s.block_size + offset) * s.kv_heads + kv_head;
        for (int j = 0; j < run; ++j, at += s.kv_heads) index[i++] = at;
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
        for (int v = 0; v < V; ++v) sums[v] = load(acc + part + 8 * v) * splat(decay);
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

template <int D>
void attend(const float* q, const AttentionShape& s, const Span* spans, const AttentionTask& task,
            float* partials, const KVLayer& kv, float* out) {
    constexpr int V = D / 8;
    const Span& span = spans[task.span];
    const int group = s.heads / s.kv_heads, queries = task.rows * group;
    const float factor = 1.0f / std::sqrt(static_cast<float>(D));
    alignas(32) float query[MOST_QUERIES * D], acc[MOST_QUERIES * D], scores[MOST_QUERIES * KEYS];
    alignas(32) float wide[KEYS * D];
    const float* rows[KEYS];
    float most[MOST_QUERIES], total[MOST_QUERIES];
    for (int i = 0; i < queries; ++i) {
        const int row = task.row + i / group, head = task.kv_head * group + i % group;
        const float* from = q + (span.start + row) * s.q_stride + head * D;
        for (int v = 0; v < V; ++v) store(query + i * D + 8 * v, load(from + 8 * v) * splat(factor));
        for (int v = 0; v < V; ++v) store(acc + i * D + 8 * v, splat(0.0f));
        most[i] = -__builtin_inff();
        total[i] = 0.0f;
    }
    size_t index[2][KEYS];
    int turn = 0;
    locate(s, span, task.key_begin, std::min(KEYS, task.key_end - task.key_begin), task.kv_head, index[0]);
    for (int begin = task.key_begin; begin < task.key_end; begin += KEYS) {
        const int count = std::min(KEYS, task.key_end - begin), padded = (count + 7) / 8 * 8;
        const size_t* here = index[turn];
        const size_t* ahead = index[turn ^= 1];
        const int next = std::min(KEYS, task.key_end - begin - KEYS);
        if (next > 0) locate(s, span, begin + KEYS, next, task.kv_head, index[turn]);
        gather<D>(here, count, kv.keys, kv.key_scales, rows, wide);
        for (int j = count; j < padded; ++j) rows[j] = rows[count - 1];
        for (int j = 0; j < padded; j += 8) {
            if (j < next) fetch<D>(ahead + j, std::min(8, next - j), kv);
            for (int i = 0; i < queries; ++i) {
                const float* x = query + i * D;
                // Or the compiler copies all eight keys to the stack, since they are the same for each query.
                asm("" ::: "memory");
                f32x8 products[8];
                TOKENLOOM_UNROLL
                for (int k = 0; k < 8; ++k) products[k] = splat(0.0f);
                for (int d = 0; d < D; d += 8) {
                    const f32x8 part = load(x + d);
                    TOKENLOOM_UNROLL
                    for (int k = 0; k < 8; ++k) products[k] += part * load(rows[j + k] + d);
                }
                store(scores + i * KEYS + j, sums(products));
            }
        }
        gather<D>(here, count, kv.values, kv.value_scales, rows, wide);
        for (int i = 0; i < queries; ++i) {
            // Row r of the span is token kv_len - length + r: it reads up to itself.
            const int last = span.kv_len - span.length + task.row + i / group;
            const int low = s.window > 0 ? std::max(0, last + 1 - s.window - begin) : 0;
            const int high = std::min(count, last + 1 - begin);
            if (low >= high) continue;
            float* p = scores + i * KEYS;
            for (int j = 0; j < low; ++j) p[j] = -__builtin_inff();
            for (int j = high; j < padded; ++j) p[j] = -__builtin_inff();
            f32x8 top = load(p);
            for (int j = 8; j < padded; j += 8) top = max_or_nan(top, load(p + j));
            const float now = max_or_nan(top);
            const float next = now > most[i] || now != now ? now : most[i];
            f32x8 weights = splat(0.0f);
            for (int j = 0; j < padded; j += 8) {
                const f32x8 e = exp(load(p + j) - splat(next));
                weights += e;
                store(p + j, e);
            }
            const float decay = most[i] == next ? 1.0f : exp(splat(most[i] - next))[0];
            total[i] = total[i] * decay + sum(weights);
            most[i] = next;
            add_values<D>(rows, p, low, high, decay, acc + i * D);
        }
    }
    for (int i = 0; i < queries; ++i) {
        if (task.partial >= 0) {
            float* to = partials + (static_cast<size_t>(task.partial) + i) * (D + 2);
            memcpy(to, acc + i * D, sizeof(float) * D);
            to[D] = most[i];
            to[D + 1] = total[i];
            continue;
        }
        const int row = task.row + i / group, head = task.kv_head * group + i % group;
        float* to = out + (span.start + row) * s.out_stride + head * D;
        const f32x8 inverse = splat(1.0f / total[i]);
        for (int v = 0; v < V; ++v) store(to + 8 * v, load(acc + i * D + 8 * v) * inverse);
    }
}

// The results of tasks that share rows, one after another in `partials`, become one.
void merge(const AttentionShape& s, const Span* spans, const AttentionTask& task, const float* partials,
           float* out) {
    const int group = s.heads / s.kv_heads, queries = task.rows * group, width = s.head_dim + 2;
    for (int i = 0; i < queries; ++i) {
        float top = -__builtin_inff();
        for (int p = 0; p < task.num_partials; ++p) {
            const float m = partials[(static_cast<size_t>(task.partial) + p * queries + i) * width + s.head_dim];
            if (m > top || m != m) top = m;
        }
        const int row = task.row + i / group, head = task.kv_head * group + i % group;
        float* to = out + (spans[task.span].start + row) * s.out_stride + head * s.head_dim;
        for (int d = 0; d < s.head_dim; ++d) to[d] = 0.0f;
        float total = 0.0f;
        for (int p = 0; p < task.num_partials; ++p) {
            const float* from = partials + (static_cast<size_t>(task.partial) + p * queries + i) * width;
            if (from[s.head_dim + 1] == 0.0f) continue;
            const float weight = from[s.head_dim] == top ? 1.0f : std::exp(from[s.head_dim] - top);
            total += weight * from[s.head_dim + 1];
            for (int d = 0; d < s.head_dim; ++d) to[d] += weight * from[d];
        }
        for (int d = 0; d < s.head_dim; ++d) to[d] /= total;
    }
}

void attention(Work& work, const float* q, const AttentionShape& s, const Span* spans,
               const AttentionTask* tasks, int num_tasks, float* partials, const KVLayer& kv, float* out) {
    work.each(num_tasks, [&](int i) {
        switch (s.head_dim) {
            case 8: attend<8>(q, s, spans, tasks[i], partials, kv, out); break;
            case 16: attend<16>(q, s, spans, tasks[i], partials, kv, out); break;
            case 32: attend<32>(q, s, spans, tasks[i], partials, kv, out); break;
            case 64: attend<64>(q, s, spans, tasks[i], partials, kv, out); break;
            case 80: attend<80>(q, s, spans, tasks[i], partials, kv, out); break;
            case 96: attend<96>(q, s, spans, tasks[i], partials, kv, out); break;
            case 128: attend<128>(q, s, spans, tasks[i], partials, kv, out); break;
            default: break;
        }
    });
    bool merging = false;
    for (int i = 0; i < num_tasks; ++i) merging |= tasks[i].num_partials > 0;
    if (!merging) return;
    work.each(num_tasks, [&](int i) {
        if (tasks[i].num_partials > 0) merge(s, spans, tasks[i], partials, out);
    });
}
