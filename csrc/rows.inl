// What is done row by row: norms, SiLU, rotation, storing keys and values, the largest logits. Part of kernels.inl.

void norm_row(const float* x, const float* weight, float eps, int width, float* out) {
    const float factor = inverse_rms(x, width, eps);
    int i = 0;
    for (; i + 8 <= width; i += 8) store(out + i, load(x + i) * splat(factor) * load(weight + i));
    for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

void rms_norm(Work& work, const float* x, ptrdiff_t x_stride, const float* weight, float eps, int rows,
              int width, float* out, ptrdiff_t out_stride) {
    work.each(rows, [&](int t) { norm_row(x + t * x_stride, weight, eps, width, out + t * out_stride); });
}

void silu_mul(Work& work, const float* gate_up, ptrdiff_t stride, int rows, int width, float* out,
              ptrdiff_t out_stride) {
    work.each(rows, [&](int t) {
        const float* gate = gate_up + t * stride;
        const float* up = gate + width;
        float* to = out + t * out_stride;
        int i = 0;
        for (; i + 8 <= width; i += 8) store(to + i, silu(load(gate + i)) * load(up + i));
        for (; i < width; ++i) to[i] = silu(splat(gate[i]))[0] * up[i];
    });
}

void rms_norm_backward(Work& work, float* dx, ptrdiff_t dx_stride, const float* dy, ptrdiff_t dy_stride,
                       const float* x, ptrdiff_t x_stride, const float* weight, float eps, int rows, int width) {
    work.each(rows, [&](int t) {
        const float *g = dy + t * dy_stride, *from = x + t * x_stride;
        float* to = dx + t * dx_stride;
        const float factor = inverse_rms(from, width, eps);
        f32xw sums_of{};
        int i = 0;
        for (; i + WIDE <= width; i += WIDE) {
            sums_of += load_wide(g + i) * load_wide(weight + i) * load_wide(from + i);
        }
        const int whole = i;
        float along = 0.0f;
        for (int j = 0; j < WIDE; ++j) along += sums_of[j];
        for (; i < width; ++i) along += g[i] * weight[i] * from[i];
        along *= factor * factor * factor / static_cast<float>(width);
        for (i = 0; i < whole; i += WIDE) {
            const f32xw v = load_wide(g + i) * load_wide(weight + i) * factor - load_wide(from + i) * along;
            store_wide(to + i, load_wide(to + i) + v);
        }
        for (; i < width; ++i) to[i] += g[i] * weight[i] * factor - from[i] * along;
    });
}

// d silu / d gate = sigmoid + silu * (1 - sigmoid), where silu = gate * sigmoid.
template <class F>
inline void silu_mul_gradient(F dy, F gate, F up, F& d_gate, F& d_up) {
    const F sigmoid = all<F>(1.0f) / (all<F>(1.0f) + exp(-gate)), silu = gate * sigmoid;
    d_gate = (sigmoid + silu * (1.0f - sigmoid)) * up * dy;
    d_up = dy * silu;
}

void silu_mul_backward(Work& work, const float* dy, ptrdiff_t dy_stride, const float* gate_up, ptrdiff_t stride,
                       int rows, int width, float* out) {
    work.each(rows, [&](int t) {
        const float *g = dy + t * dy_stride, *gate = gate_up + t * stride, *up = gate + width;
        float* to = out + static_cast<ptrdiff_t>(t) * 2 * width;
        int i = 0;
        for (; i + WIDE <= width; i += WIDE) {
            f32xw d_gate, d_up;
            silu_mul_gradient(load_wide(g + i), load_wide(gate + i), load_wide(up + i), d_gate, d_up);
            store_wide(to + i, d_gate);
            store_wide(to + width + i, d_up);
        }
        for (; i < width; ++i) {
            f32x8 d_gate, d_up;
            silu_mul_gradient(splat(g[i]), splat(gate[i]), splat(up[i]), d_gate, d_up);
            to[i] = d_gate[0];
            to[width + i] = d_up[0];
        }
    });
}

void rotate(float* x, int head_dim, const float* cos, const float* sin) {
    const int half = head_dim / 2;
    int i = 0;
    for (; i + 8 <= half; i += 8) {
        const f32x8 low = load(x + i), high = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, low * c - high * s);
        store(x + half + i, high * c + low * s);
    }
    for (; i < half; ++i) {
        const float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[i] + low * sin[i];
    }
}

// One head's numbers to a slot: as they are, or to 8 bits.
void store_head(const float* x, int head_dim, size_t index, void* data, float* scales) {
    if (!scales) {
        memcpy(static_cast<float*>(data) + index * head_dim, x, sizeof(float) * head_dim);
        return;
    }
    float amax = 0.0f;
    for (int i = 0; i < head_dim; ++i) {
        const float a = std::fabs(x[i]);
        if (a > amax || a != a) amax = a;
    }
    const float inverse = amax > 1e-30f && amax < __builtin_inff() ? 127.0f / amax : 0.0f;
    auto* to = static_cast<int8_t*>(data) + index * head_dim;
    for (int i = 0; i < head_dim; ++i) {
        to[i] = inverse > 0.0f ? static_cast<int8_t>(std::lrintf(x[i] * inverse)) : 0;
    }
    scales[index] = amax / 127.0f;
}

void rope_append(Work& work, float* qkv, int rows, const AttentionShape& s, const float* q_norm,
                 const float* k_norm, float eps, const float* cos, const float* sin, const int64_t* slots,
                 const KVLayer& kv) {
    const int half = s.head_dim / 2;
    work.each(rows, [&](int t) {
        float* row = qkv + t * s.q_stride;
        for (int h = 0; h < s.heads + s.kv_heads; ++h) {
            float* x = row + h * s.head_dim;
            const float* norm = h < s.heads ? q_norm : k_norm;
            if (norm) norm_row(x, norm, eps, s.head_dim, x);
            rotate(x, s.head_dim, cos + t * half, sin + t * half);
        }
        const float* k = row + s.heads * s.head_dim;
        const float* v = k + s.kv_heads * s.head_dim;
        for (int h = 0; h < s.kv_heads; ++h) {
            const size_t index = static_cast<size_t>(slots[t]) * s.kv_heads + h;
            store_head(k + h * s.head_dim, s.head_dim, index, kv.keys, kv.key_scales);
            store_head(v + h * s.head_dim, s.head_dim, index, kv.values, kv.value_scales);
        }
    });
}

// -- the largest numbers of a row -------------------------------------------------------------------------------

float log_sum_exp(const float* x, int width) {
    f32x8 top = splat(-__builtin_inff());
    int i = 0;
    for (; i + 8 <= width; i += 8) top = max_or_nan(top, load(x + i));
    float most = max_or_nan(top);
    for (int j = i; j < width; ++j) most = x[j] > most || x[j] != x[j] ? x[j] : most;
    if (!(most - most == 0.0f)) return most;  // infinite or NaN
    f32x8 sums_v = splat(0.0f);
    for (int j = 0; j < i; j += 8) sums_v += exp(load(x + j) - splat(most));
    float total = sum(sums_v);
    for (; i < width; ++i) total += exp(splat(x[i] - most))[0];
    return most + std::log(total);
}

// Floats in the order of signed integers, which vectors compare; NaN above all. -0 is 0.
inline i32xw ordered_wide(f32xw v) {
    v = v + f32xw{};
    const i32xw bits = reinterpret_cast<i32xw>(v);
    return v == v ? bits ^ ((bits >> 31) & 0x7fffffff) : i32xw{} + INT32_MAX;
}

// What k of these numbers reach is found bit by bit: 32 times counting is less than sorting, and no branch depends on
// the numbers. `count` is a multiple of WIDE.
inline int32_t reached_by(const int32_t* keys, int count, int k) {
    uint32_t threshold = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const uint32_t higher = threshold | 1u << bit;
        const int32_t bound = static_cast<int32_t>(higher ^ 0x80000000u);
        i32xw reach{};
        for (int i = 0; i < count; i += WIDE) reach -= load_wide(keys + i) >= bound;
        const int found = sum(reach);
        if (found >= k) threshold = higher;
        if (found == k) break;
    }
    return static_cast<int32_t>(threshold ^ 0x80000000u);
}

// The k largest numbers of a row.
struct Largest {
    std::vector<int32_t> keys, tops, places;

    void find(const float* x, int width, int k) {
        constexpr int EACH = 16;  // vectors, the largest of whose lanes are looked at first
        const int padded = (width + WIDE - 1) / WIDE * WIDE, vectors = padded / WIDE;
        keys.resize(padded);
        tops.assign((vectors + EACH - 1) / EACH * WIDE, INT32_MIN);
        for (int v = 0; v < vectors; ++v) {
            f32xw numbers{};
            const int here = std::min(WIDE, width - v * WIDE);
            memcpy(&numbers, x + v * WIDE, sizeof(float) * here);
            i32xw key = ordered_wide(numbers);
            for (int i = here; i < WIDE; ++i) key[i] = INT32_MIN;
            memcpy(keys.data() + v * WIDE, &key, sizeof key);
            int32_t* top = tops.data() + v / EACH * WIDE;
            const i32xw before = load_wide(top), larger = key > before ? key : before;
            memcpy(top, &larger, sizeof larger);
        }
        places.clear();
        const int most = static_cast<int>(tops.size());
        if (2 * k > most) return;
        // k lanes reach this, hence k numbers do: all others can be left out.
        const int32_t least = reached_by(tops.data(), most, k);
        int kept = 0;
        for (int v = 0; v < vectors; ++v) {
            if (sum(load_wide(keys.data() + v * WIDE) >= least) == 0) continue;
            for (int i = v * WIDE; i < (v + 1) * WIDE; ++i) {
                if (keys[i] < least || i >= width) continue;
                places.push_back(i);
                keys[kept++] = keys[i];
            }
        }
        keys.resize((kept + WIDE - 1) / WIDE * WIDE);
        std::fill(keys.begin() + kept, keys.end(), INT32_MIN);
    }

    // `f(key, i)` for the k largest, in ascending order of i; of equal ones the first count.
    template <class F>
    void each(int k, F&& f) {
        const int count = static_cast<int>(keys.size());
        const int32_t least = reached_by(keys.data(), count, k);
        i32xw above{};
        for (int i = 0; i < count; i += WIDE) above -= load_wide(keys.data() + i) > least;
        for (int i = 0, equal = k - sum(above); k > 0; ++i) {
            if (keys[i] < least || (keys[i] == least && equal-- <= 0)) continue;
            f(keys[i], places.empty() ? i : places[i]);
            --k;
        }
    }
};

void top_row(const float* x, int width, int k, float* values, int64_t* ids) {
    thread_local Largest largest;
    thread_local std::vector<std::pair<int32_t, int>> found;
    largest.find(x, width, k);
    found.clear();
    largest.each(k, [&](int32_t key, int i) { found.emplace_back(key, i); });
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    for (int i = 0; i < k; ++i) {
        ids[i] = found[i].second;
        values[i] = x[found[i].second];
    }
}

void top(Work& work, const float* x, ptrdiff_t stride, int rows, int width, int k, float* values, int64_t* ids,
         float* norms) {
    work.each(rows, [&](int t) {
        const size_t at = static_cast<size_t>(t) * k;
        top_row(x + t * stride, width, k, values + at, ids + at);
        norms[t] = log_sum_exp(x + t * stride, width);
    });
}

// Where the largest are, in ascending order.
void largest_of_row(const float* x, int width, int k, int64_t* ids) {
    thread_local Largest largest;
    largest.find(x, width, k);
    largest.each(k, [&](int32_t, int i) { *ids++ = i; });
}

void largest(Work& work, const float* x, ptrdiff_t stride, int rows, int width, int k, int64_t* ids) {
    work.each(rows, [&](int t) { largest_of_row(x + t * stride, width, k, ids + static_cast<size_t>(t) * k); });
}
