// The kernels of one instruction set behind plain function pointers. All run inside a team: every thread calls
// them with the same arguments.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats.h"
#include "team.h"

namespace tokenloom {

// What a linear does with its results y [T, N].
enum class Then : int {
    Store,     // out[t, n] = y + bias
    Add,       // out[t, n] += y + bias
    SiluMul,   // out[t, n] = silu(y[t, n]) * y[t, n + N / 2]; out is [T, N / 2]
};

// Where the keys and values of one layer lie: float32, or int8 with a scale per token and head.
struct KVLayer {
    void* keys = nullptr;
    void* values = nullptr;
    float* key_scales = nullptr;  // [num_slots, Hk]; null: float32
    float* value_scales = nullptr;
    bool quantized() const { return key_scales != nullptr; }
};

// Rows `start .. start + length` of the batch are the last of `kv_len` tokens in `blocks`; or they read through kv
// head `head` alone, and its keys and values lie at `cells`, counted in heads from where the cache begins.
struct Span {
    int start, length, kv_len;
    const int32_t* blocks;
    const int64_t* cells = nullptr;
    int head = -1;
    const int32_t* tail = nullptr;  // the slots of the last `tail_length` tokens, where blocks do not say them
    int tail_length = 0;
};

// Rows of keys, [Hk, width] each, float32 or int8 with a scale for each head, and which of them are meant.
struct KeyRows {
    const void* data;
    const float* scales;  // null: float32
    int heads, width;     // width: a multiple of 8
    const int64_t* slots;
};
constexpr int MOST_WIDTH = 256;

// A sequence's tokens in pages of `page`, the last of which may be open, and bounds [total - 1, Hk, 2 width] of the
// others' keys: the largest numbers of a page, then the least.
struct Pages {
    const float* bounds;
    const int64_t* slots;  // [length]
    int64_t first;         // the layer's first cell
    int kv_heads, width, page, length, total, count;
    bool by_group;  // heads of a group read the same pages, else each its own
    int tokens() const { return count * page - (total * page - length); }  // that a head reads
};

// One attention: who reads what. `window` 0: everything before.
struct AttentionShape {
    int heads, kv_heads, head_dim, block_size, window;
    ptrdiff_t q_stride, out_stride;  // in floats, between rows
};

constexpr int KEY_BLOCK = 64;  // 16 KiB each of keys and values of 64 numbers
constexpr int PIECE_KEYS = 256;  // a row's results of so many keys each are folded together in order

// A row of the batch, of one span, that reads keys which it shares with others, and where what it gets of them waits to
// be merged; -1: it is the result.
struct SharedRow {
    int span, row, partial;
};

// A piece of attention: rows of one span, one kv head, some keys, from a multiple of KEY_BLOCK on. Or rows of several
// spans, all of which read all of these keys: then `shared` says where in the plan's list they begin, and `span` is one
// of them. What waits to be merged is of keys between two multiples of PIECE_KEYS.
struct AttentionTask {
    int span, row, rows, kv_head, key_begin, key_end;
    int partial;  // where its result waits to be merged, in units of `partial_floats`; -1: it is the result
    int shared = -1;
    bool alone = false;  // shared rows then read on by themselves, to the end of the piece
};

// Where that ends for a row.
inline int end_alone(const AttentionTask& task, const SharedRow& row, const Span& span) {
    return std::min(span.kv_len - span.length + 1 + row.row - span.start, task.key_begin + PIECE_KEYS);
}

// Results of tasks, one after another from `first` on, that become one.
struct AttentionMerge {
    int span, row, rows, kv_head, first, count;
};

// What attention of a batch is cut into.
struct AttentionPlan {
    std::vector<AttentionTask> tasks;
    std::vector<SharedRow> shared;
    std::vector<AttentionMerge> merges;
    int partial_rows = 0;
};

// The gradient of attention's q, keys and values by that of its result. All rows are [heads, head_dim].
struct AttentionGradients {
    // What of the span's rows and keys one piece of work covers.
    struct Tile {
        int span, row, rows;
    };
    struct Task {
        int span, kv_head, key_begin, key_end, first_tile, num_tiles, partial;
    };
    const float *q, *out, *d_out, *lse;
    ptrdiff_t q_stride, out_stride, d_out_stride;  // lse: heads
    float *dq, *dk, *dv;                           // dq is written; dk, dv are added to
    ptrdiff_t dq_stride, head_stride;              // dk, dv: [Hk, tokens, D], heads so far apart
    const int* first_tokens;                       // where in dk and dv a span's token 0 is
    std::vector<Span> spans;
    std::vector<Tile> tiles;
    std::vector<Task> tasks;
    int num_partials;  // results for dq to be added up
    float* prepared;   // [Hk, tiles, prepared_floats]
    float* partials;   // [num_partials, Hk, tiles, MOST_QUERIES, D]
};
constexpr int MOST_QUERIES = 64;  // query heads times rows of one task
inline size_t prepared_floats(int head_dim) { return static_cast<size_t>(MOST_QUERIES) * (2 * head_dim + 2); }

// A LoRA beside one projection: for each part, y[:, first_out ..] += (x A^T)[:, first_rank ..] B^T.
struct LowRank {
    struct Part {
        const float* b;  // [outs, ranks]; first_out and outs are multiples of GROUP
        int first_rank, ranks, first_out, outs;
    };
    const float* a = nullptr;  // [ranks, width]
    int ranks = 0, width = 0;
    std::vector<float> scale;  // of each column of x A^T
    std::vector<Part> parts;
};

// y [rows, n] = (or +=) x [rows, k] w [k, n], each product within 2^-15 of itself.
struct FloatProducts {
    const float *x, *w;
    float* y;
    int rows, n, k;
    ptrdiff_t x_stride, w_stride, y_stride;
    bool add;
    uint16_t* packed;  // room for `packed_numbers(rows)`, from a multiple of 64 bytes on
};
constexpr int FLOAT_DEPTH = 288;  // columns of x that are packed at once, as two numbers each
inline size_t packed_numbers(int rows) { return static_cast<size_t>(rows + 31) / 32 * 32 * 2 * FLOAT_DEPTH; }

// Rows of a batch that go through it.
struct LowRankRows {
    int begin, end;
    const LowRank* lora;
};

// The LoRAs of one projection in one batch, each beside its own rows.
struct LowRankPass {
    std::vector<LowRankRows> runs;
    const float* x = nullptr;  // what the projection reads, not quantised
    ptrdiff_t stride = 0;
    float* z = nullptr;  // [T, z_stride], for x A^T
    ptrdiff_t z_stride = 0;
    std::atomic<int> ready{0};  // pieces of z that are done
};

struct Kernels {
    const char* name;
    // x [T, K] -> activations. norm: multiply by 1 / rms and by it first; null: as they are. normed: where what
    // is quantised goes as it is, [T, K] without gaps; null: nowhere.
    void (*quantize)(Work& work, const float* x, ptrdiff_t stride, const float* norm, float eps, float* normed,
                     const Activations& to);
    // bypasses: what is added to y before all else; null: nothing.
    void (*linear)(Work& work, const Weight& w, const Activations& x, Then then, float* out, ptrdiff_t stride,
                   LowRankPass* bypasses);
    void (*unpack)(const Weight& w, int row, float* out);  // one row of a weight, float32 [K]
    void (*unpack_group)(const Weight& w, int g, float* out, ptrdiff_t stride);  // its rows 8 g .. 8 g + 8
    void (*rms_norm)(Work& work, const float* x, ptrdiff_t x_stride, const float* weight, float eps, int rows,
                     int width, float* out, ptrdiff_t out_stride);
    void (*silu_mul)(Work& work, const float* gate_up, ptrdiff_t stride, int rows, int width, float* out,
                     ptrdiff_t out_stride);
    void (*rms_norm_backward)(Work& work, float* dx, ptrdiff_t dx_stride, const float* dy, ptrdiff_t dy_stride,
                              const float* x, ptrdiff_t x_stride, const float* weight, float eps, int rows,
                              int width);  // adds to dx
    void (*silu_mul_backward)(Work& work, const float* dy, ptrdiff_t dy_stride, const float* gate_up,
                              ptrdiff_t stride, int rows, int width, float* out);
    // qkv [T, (Hq + 2 Hk) D]: normalises (where given) and rotates q and k in place, stores k and v.
    void (*rope_append)(Work& work, float* qkv, int rows, const AttentionShape& shape, const float* q_norm,
                        const float* k_norm, float eps, const float* cos, const float* sin,
                        const int64_t* slots, const KVLayer& kv);
    void (*attention)(Work& work, const float* q, const AttentionShape& shape, const Span* spans,
                      const AttentionPlan& plan, float* partials, const KVLayer& kv, float* out,
                      float* lse);  // lse [T, Hq]: log of the sum of e^score; null: not wanted
    // out [heads, count]: q [heads, width] times the keys at keys.slots [count].
    void (*key_scores)(Work& work, const float* q, const KeyRows& keys, int heads, int count, float* out);
    // cells [Hk or Hq, pages.tokens()]; best: room for [heads, total - 1].
    void (*choose_pages)(Work& work, const float* q, const Pages& pages, int heads, float* best, int64_t* cells);
    void (*few_products)(Work& work, const float* x, int rows, const float* weights, int n, int k, float* y);
    void (*float_products)(Work& work, const FloatProducts& products);  // null: none
    void (*attention_backward)(Work& work, const AttentionShape& shape, const AttentionGradients& gradients,
                               const KVLayer& kv);
    // The k largest of each row in descending order (of equal ones the first), and log(sum(exp(row))).
    void (*top)(Work& work, const float* x, ptrdiff_t stride, int rows, int width, int k, float* values,
                int64_t* ids, float* norms);
    // Where the k largest of each row are, in ascending order; of equal ones the first count.
    void (*largest)(Work& work, const float* x, ptrdiff_t stride, int rows, int width, int k, int64_t* ids);
    void (*sum)(Work& work, const uint64_t* data, size_t count, uint64_t* out);  // one figure per thread
    // dx [rows, K] = (or +=) dy [rows, N] w.
    void (*linear_backward)(Work& work, const Weight& w, const float* dy, ptrdiff_t dy_stride, int rows, float* dx,
                            ptrdiff_t dx_stride, bool add);
};

// Numbers of one partial result of attention: rows of (out [D], maximum, sum).
inline size_t partial_floats(const AttentionShape& s, int rows) {
    return static_cast<size_t>(rows) * (s.heads / s.kv_heads) * (s.head_dim + 2);
}

bool head_dim_supported(int head_dim);

// The instruction sets that this build has and this machine runs, best first; the last is plain C++.
const Kernels* const* available_kernels(int* count);

}  // namespace tokenloom
