// A decoder's layers over one packed batch, in one parallel region.
#pragma once

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

struct Shape {
    int width, ff, heads, kv_heads, head_dim;
    float eps;
    int qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
    int q_width() const { return heads * head_dim; }
};

// What attention of a batch is cut into.
struct AttentionPlan {
    std::vector<AttentionTask> tasks;
    int partial_rows = 0;
};
AttentionPlan plan_attention(const std::vector<Span>& spans, const AttentionShape& shape);

// Memory that calls of one thread use again.
struct Scratch {
    std::vector<float> floats, partials;
    std::vector<int8_t> quants;
    std::vector<float> scales;
    Activations activations(int rows, int columns);
    float* rows(size_t count);
};
Scratch& scratch();

// x [T, width] goes through layers[begin..end) in place. cos, sin [T, head_dim / 2]; slots [T].
void run_layers(const Kernels& kernels, int threads, const Shape& shape, const std::vector<Layer>& layers,
                const std::vector<KVLayer>& kv, int begin, int end, float* x, int rows, const float* cos,
                const float* sin, const int64_t* slots, const std::vector<Span>& spans, int block_size);

}  // namespace tokenloom
