// The kernels, compiled once per instruction set: a source file defines TOKENLOOM_ISA and includes this.

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "dots.h"
#include "kernels.h"

// Sums must stay in registers, which takes loops over them that are unrolled whole.
#define TOKENLOOM_UNROLL _Pragma("GCC unroll 8")

namespace tokenloom {
namespace TOKENLOOM_ISA {
namespace {

constexpr int TILE = 4;        // activation rows that share the unpacking of a weight
constexpr int FEW_PIECES = 4;  // ... of long runs of weights, where memory is what limits
constexpr int ROW_BLOCK = 64;  // activation rows that stay in the L2 cache while weights pass by
constexpr int PREFETCH = 2048;  // bytes of weights, asked for before the first rows meet them
constexpr int PIECES = 16;     // pieces per thread, so that nobody waits long for the last

int pieces_of(int count, int threads, int least, int most) {
    const int wanted = std::max(1, count / least);
    return std::min(wanted, threads * most);
}
int begin_of(int piece, int pieces, int count) {
    return static_cast<int>(static_cast<int64_t>(count) * piece / pieces);
}

// -- activations ----------------------------------------------------------------------------------------------

void quantize_row(const float* x, float factor, const float* norm, int columns, int8_t* q, float* scales,
                  float* sums_out) {
    for (int b = 0; b < columns / BLOCK; ++b) {
        f32x8 v[4], most = splat(0.0f);
        for (int i = 0; i < 4; ++i) {
            v[i] = load(x + b * BLOCK + 8 * i);
            if (norm) v[i] = v[i] * splat(factor) * load(norm + b * BLOCK + 8 * i);
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

void quantize(Work& work, const float* x, ptrdiff_t stride, const float* norm, float eps,
              const Activations& to) {
    work.each(to.rows, [&](int t) {
        const float* row = x + t * stride;
        const float factor = norm ? inverse_rms(row, to.columns, eps) : 1.0f;
        const size_t block = static_cast<size_t>(t) * to.blocks();
        quantize_row(row, factor, norm, to.columns, to.q + static_cast<size_t>(t) * to.columns,
                     to.scale + block, to.sum + block);
    });
}

// -- linear ---------------------------------------------------------------------------------------------------

template <Format F, int M>
inline void dots(const uint8_t* w, const int8_t* a, ptrdiff_t stride, i32x8* out) {
    if constexpr (F == Format::Q8_0) {
        dots_q8<M>(w, a, stride, out);
    } else {
        dots_q4<M>(w, a, stride, out);
    }
}

inline void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// Eight weight rows times M activation rows; the order of summation does not depend on M, so a row's result
// is the same in any batch.
template <Format F, int M>
inline void tile(const uint8_t* w, int blocks, const Activations& x, int row, bool ahead, f32x8* out) {
    const ptrdiff_t stride = x.columns;
    const int8_t* a = x.q + row * stride;
    const float* scale = x.scale + static_cast<size_t>(row) * blocks;
    const float* sum = x.sum + static_cast<size_t>(row) * blocks;
    f32x8 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = splat(0.0f);
    for (int b = 0; b < blocks; ++b) {
        if (ahead) prefetch(w + PREFETCH, block_bytes(F));
        i32x8 products[M];
        dots<F, M>(w, a + b * BLOCK, stride, products);
        const auto* halves = reinterpret_cast<const uint16_t*>(w + quant_bytes(F));
        const f32x8 d = load_half(halves);
        for (int m = 0; m < M; ++m) {
            f32x8 value = to_float(products[m]) * splat(scale[m * blocks + b]);
            if constexpr (F == Format::Q4_0) value -= splat(8.0f * sum[m * blocks + b]);
            acc[m] += d * value;
        }
        if constexpr (F == Format::Q4_1) {
            const f32x8 offset = load_half(halves + GROUP);
            for (int m = 0; m < M; ++m) acc[m] += offset * splat(sum[m * blocks + b]);
        }
        w += block_bytes(F);
    }
    for (int m = 0; m < M; ++m) out[m] = acc[m];
}

template <Format F>
inline void tiles(const uint8_t* w, int blocks, const Activations& x, int row, int rows, f32x8* out) {
    int m = 0;
    for (; m + TILE <= rows; m += TILE) tile<F, TILE>(w, blocks, x, row + m, m == 0, out + m);
    switch (rows - m) {
        case 3: tile<F, 3>(w, blocks, x, row + m, m == 0, out + m); break;
        case 2: tile<F, 2>(w, blocks, x, row + m, m == 0, out + m); break;
        case 1: tile<F, 1>(w, blocks, x, row + m, m == 0, out + m); break;
        default: break;
    }
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
void linear_of(Work& work, const Weight& w, const Activations& x, Then then, float* out, ptrdiff_t stride) {
    const int blocks = w.blocks();
    const int groups = then == Then::SiluMul ? w.groups() / 2 : w.groups();
    const int row_blocks = (x.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    // Few rows: pieces of at least 16 KiB of weights. Many rows: more than that per piece anyway.
    const int least = std::max(1, 16384 / (blocks * block_bytes(F)));
    const bool few = x.rows <= TILE;
    const int pieces = few ? pieces_of(groups, work.threads(), least, FEW_PIECES)
                            : pieces_of(groups, work.threads(), 1, PIECES);
    work.each(pieces * row_blocks, [&](int piece) {
        const int first = piece / pieces * ROW_BLOCK, rows = std::min(ROW_BLOCK, x.rows - first);
        const int p = piece % pieces;
        f32x8 y[ROW_BLOCK], up[ROW_BLOCK];
        for (int g = begin_of(p, pieces, groups); g < begin_of(p + 1, pieces, groups); ++g) {
            tiles<F>(w.group(g), blocks, x, first, rows, y);
            const f32x8 bias = bias_of(w, g);
            float* to = out + static_cast<ptrdiff_t>(first) * stride + g * GROUP;
            if (then == Then::SiluMul) {
                tiles<F>(w.group(g + groups), blocks, x, first, rows, up);
                const f32x8 up_bias = bias_of(w, g + groups);
                for (int t = 0; t < rows; ++t) store(to + t * stride, silu(y[t] + bias) * (up[t] + up_bias));
                continue;
            }
            const int count = w.rows - g * GROUP;
            for (int t = 0; t < rows; ++t) put(to + t * stride, y[t] + bias, count, then == Then::Add);
        }
    });
}

void linear(Work& work, const Weight& w, const Activations& x, Then then, float* out, ptrdiff_t stride) {
    switch (w.format) {
        case Format::Q8_0: linear_of<Format::Q8_0>(work, w, x, then, out, stride); break;
        case Format::Q4_0: linear_of<Format::Q4_0>(work, w, x, then, out, stride); break;
        case Format::Q4_1: linear_of<Format::Q4_1>(work, w, x, then, out, stride); break;
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

// -- row by row -----------------------------------------------------------------------------------------------

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

void silu_mul(Work& work, const float* gate_up, ptrdiff_t stride, int rows, int width, float* out) {
    work.each(rows, [&](int t) {
        const float* gate = gate_up + t * stride;
        const float* up = gate + width;
        float* to = out + static_cast<ptrdiff_t>(t) * width;
        int i = 0;
        for (; i + 8 <= width; i += 8) store(to + i, silu(load(gate + i)) * load(up + i));
        for (; i < width; ++i) to[i] = silu(splat(gate[i]))[0] * up[i];
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

// -- attention ------------------------------------------------------------------------------------------------

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

// -- the largest logits -----------------------------------------------------------------------------------------

// Floats in the order of unsigned integers; NaN above all, as torch has it.
inline uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

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

void top_row(const float* x, int width, int k, float* values, int64_t* ids) {
    constexpr int SHIFT = 20, BUCKETS = 1 << (32 - SHIFT);  // sign, exponent and three bits of the mantissa
    uint32_t counts[BUCKETS] = {};
    for (int i = 0; i < width; ++i) ++counts[ordered(x[i]) >> SHIFT];
    int bucket = BUCKETS - 1;
    for (uint32_t found = counts[bucket]; found < static_cast<uint32_t>(k); found += counts[bucket]) --bucket;
    // All of this bucket and above: not many more than k.
    thread_local std::vector<std::pair<uint32_t, int>> candidates;
    candidates.clear();
    const uint32_t least = static_cast<uint32_t>(bucket) << SHIFT;
    for (int i = 0; i < width; ++i) {
        const uint32_t key = ordered(x[i]);
        if (key >= least) candidates.emplace_back(key, i);
    }
    const auto larger = [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    };
    if (static_cast<int>(candidates.size()) > k) {
        std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), larger);
    }
    std::sort(candidates.begin(), candidates.begin() + k, larger);
    for (int i = 0; i < k; ++i) {
        ids[i] = candidates[i].second;
        values[i] = x[candidates[i].second];
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

void sum_words(Work& work, const uint64_t* data, size_t count, uint64_t* out) {
    // Bytes of a tensor may begin anywhere.
    typedef uint64_t u64x4 __attribute__((vector_size(32), aligned(1), may_alias));
    constexpr int CHUNKS = 256;
    work.each(CHUNKS, [&](int piece) {
        const size_t begin = count * piece / CHUNKS, end = count * (piece + 1) / CHUNKS;
        u64x4 total[4] = {};
        size_t i = begin;
        for (; i + 16 <= end; i += 16) {
            for (int j = 0; j < 4; ++j) total[j] += *reinterpret_cast<const u64x4*>(data + i + 4 * j);
        }
        uint64_t rest = 0;
        for (; i < end; ++i) {
            uint64_t word;
            memcpy(&word, data + i, 8);
            rest += word;
        }
        for (int j = 0; j < 4; ++j) rest += total[j][0] + total[j][1] + total[j][2] + total[j][3];
        out[piece] = rest;
    });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    TOKENLOOM_ISA_NAME, quantize,    linear,   unpack,    rms_norm,
    silu_mul,           rope_append, attention, top, sum_words,
};

}  // namespace TOKENLOOM_ISA
}  // namespace tokenloom
