// A decoder's layers over one packed batch, in one parallel region.
#pragma once

#include <utility>
#include <vector>

#include "kernels.h"

namespace tokenloom {

struct Layer {
    const float* input_norm;
    Weight qkv;
    const float* q_norm;  // null where the architecture has none
    const float* k_norm;
    Weight o;
    const float* post_norm;
    Weight gate_up, down;
    int window;  // 0: none
};

// A layer's projections, beside which bypasses sit.
enum Site : int { QKV, O, GATE_UP, DOWN, SITES };

struct Shape {
    int width, ff, heads, kv_heads, head_dim;
    float eps;
    int qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
    int q_width() const { return heads * head_dim; }
    int width_in(int site) const { return site == O ? q_width() : site == DOWN ? ff : width; }
    int width_out(int site) const { return site == QKV ? qkv_width() : site == GATE_UP ? 2 * ff : width; }
};

// Keys begin .. end, which lie in the same blocks for all of these spans, and are read by all of their rows.
struct SharedKeys {
    int begin, end;
    std::vector<int> spans;
};

// `shared`: of each span from its first key on, without gaps; read once for all of its spans' rows, unless there is a
// window.
AttentionPlan plan_attention(const std::vector<Span>& spans, const AttentionShape& shape,
                             const std::vector<SharedKeys>& shared = {});

// Keys that the tasks of a plan read, of one head each.
size_t keys_of(const AttentionPlan& plan, const std::vector<Span>& spans);

// Cuts the gradient of attention into tiles and tasks; returns the floats that `prepared` and `partials` need.
std::pair<size_t, size_t> plan_gradients(AttentionGradients& gradients, const AttentionShape& shape);

// Rows that go through an adapter: `loras[SITES * layer + site]`, null where it does nothing.
struct Bypass {
    int begin, end;
    const LowRank* const* loras;
};

// Rows whose activations at one place are kept, in every layer. Row r's numbers go to the units
// `units[per_row * r ..]` of the layer's cache, seen as rows of kv_heads * head_dim numbers: all its keys, and
// behind them all its values. What attention gives (Attended, LogSums) is the caller's to keep where the caller
// computes it.
enum class Place : int { Input, Query, Residual, GateUp, Attended, LogSums, PLACES };
struct Tap {
    Place place;
    int begin, end, per_row;
    const int64_t* units;
};

// One packed batch: x [T, width] goes through layers in place. cos, sin [T, head_dim / 2]; slots [T].
struct LayerRows {
    float* x;
    int rows;
    const float *cos, *sin;
    const int64_t* slots;
    int block_size;
    std::vector<Span> spans;
    std::vector<Bypass> bypasses;
    std::vector<Tap> taps;
    std::vector<SharedKeys> shared;
    float* qkv = nullptr;             // [T, qkv_width], where a call ends before attention or begins behind it
    const float* attended = nullptr;  // [T, q_width], what attention gave, where a call begins behind it
};

// Memory that calls of one thread use again.
struct Scratch {
    std::vector<float> floats, partials;
    std::vector<int8_t> quants;
    std::vector<float> scales;
    Activations activations(int rows, int columns);
    float* rows(size_t count);
    std::vector<uint16_t> halves;
    uint16_t* packed(size_t count);  // from a multiple of 64 bytes on
};
Scratch& scratch();

// The batch goes through the halves of layers begin .. end. Half 2 i ends where queries, keys and values of layer i
// are ready and appended to the cache, half 2 i + 1 begins with attention, unless the call begins there: then the
// caller has computed it.
void run_layers(const Kernels& kernels, int threads, const Shape& shape, const std::vector<Layer>& layers,
                const std::vector<KVLayer>& kv, int begin, int end, const LayerRows& batch);

}  // namespace tokenloom
