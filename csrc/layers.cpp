#include "layers.h"

#include <algorithm>
#include <utility>

namespace tokenloom {
namespace {

constexpr int MOST_QUERIES = 64;  // of one task: as in kernels.inl
// Few rows: their keys are split, so that all threads have work. The pieces do not depend on the number of
// threads, hence neither does the result.
constexpr int SPLIT_ROWS = 8;
constexpr int SPLIT_KEYS = 256;

}  // namespace

AttentionPlan plan_attention(const std::vector<Span>& spans, const AttentionShape& s) {
    AttentionPlan plan;
    const int group = s.heads / s.kv_heads;
    const int tile = std::max(1, MOST_QUERIES / group);
    for (int i = 0; i < static_cast<int>(spans.size()); ++i) {
        const Span& span = spans[i];
        for (int row = 0; row < span.length; row += tile) {
            const int rows = std::min(tile, span.length - row);
            const int first = span.kv_len - span.length + row;  // token of the tile's first row
            const int begin = s.window > 0 ? std::max(0, first + 1 - s.window) : 0, end = first + rows;
            const int split = span.length <= SPLIT_ROWS ? SPLIT_KEYS : end - begin;
            const int pieces = (end - begin + split - 1) / split;
            for (int head = 0; head < s.kv_heads; ++head) {
                for (int p = 0; p < pieces; ++p) {
                    const int from = begin + p * split;
                    AttentionTask task{i, row, rows, head, from, std::min(from + split, end), -1, 0};
                    if (pieces > 1) {
                        task.partial = plan.partial_rows;
                        task.num_partials = p == 0 ? pieces : 0;
                        plan.partial_rows += rows * group;
                    }
                    plan.tasks.push_back(task);
                }
            }
        }
    }
    // Long ones first: the last to finish should be short.
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const auto& a, const auto& b) {
        return a.rows * (a.key_end - a.key_begin) > b.rows * (b.key_end - b.key_begin);
    });
    return plan;
}

Activations Scratch::activations(int rows, int columns) {
    const size_t blocks = static_cast<size_t>(rows) * (columns / BLOCK);
    if (quants.size() < blocks * BLOCK) quants.resize(blocks * BLOCK);
    if (scales.size() < 2 * blocks) scales.resize(2 * blocks);
    return {rows, columns, quants.data(), scales.data(), scales.data() + blocks};
}

float* Scratch::rows(size_t count) {
    if (floats.size() < count) floats.resize(count);
    return floats.data();
}

Scratch& scratch() {
    thread_local Scratch own;
    return own;
}

void run_layers(const Kernels& kernels, int threads, const Shape& shape, const std::vector<Layer>& layers,
                const std::vector<KVLayer>& kv, int begin, int end, float* x, int rows, const float* cos,
                const float* sin, const int64_t* slots, const std::vector<Span>& spans, int block_size) {
    Scratch& own = scratch();
    const int widest = std::max<int>({shape.width, shape.ff, shape.q_width()});
    const Activations largest = own.activations(rows, widest);
    const size_t qkv_floats = static_cast<size_t>(rows) * shape.qkv_width();
    const size_t inner = static_cast<size_t>(rows) * std::max(shape.ff, shape.q_width());
    float* qkv = own.rows(qkv_floats + inner);
    float* hidden = qkv + qkv_floats;  // what attention, and later the MLP's activation, puts out

    AttentionShape attention{shape.heads, shape.kv_heads, shape.head_dim, block_size, 0, shape.qkv_width(),
                             shape.q_width()};
    // Layers differ in their window only; models have at most two.
    std::vector<std::pair<int, AttentionPlan>> plans;
    size_t partial_floats_needed = 0;
    for (int i = begin; i < end; ++i) {
        const int window = layers[i].window;
        if (std::any_of(plans.begin(), plans.end(), [&](const auto& p) { return p.first == window; })) continue;
        attention.window = window;
        plans.emplace_back(window, plan_attention(spans, attention));
        const size_t needed = static_cast<size_t>(plans.back().second.partial_rows) * (shape.head_dim + 2);
        partial_floats_needed = std::max(partial_floats_needed, needed);
    }
    if (own.partials.size() < partial_floats_needed) own.partials.resize(partial_floats_needed);
    float* partials = own.partials.data();

    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        auto as = [&](int columns) {
            Activations part = largest;
            part.columns = columns;
            return part;
        };
        for (int i = begin; i < end; ++i) {
            const Layer& layer = layers[i];
            AttentionShape own_attention = attention;
            own_attention.window = layer.window;
            const AttentionPlan* plan = nullptr;
            for (const auto& [window, found] : plans) {
                if (window == layer.window) plan = &found;
            }
            const Activations normed = as(shape.width);
            kernels.quantize(work, x, shape.width, layer.input_norm, shape.eps, normed);
            kernels.linear(work, layer.qkv, normed, Then::Store, qkv, shape.qkv_width());
            kernels.rope_append(work, qkv, rows, own_attention, layer.q_norm, layer.k_norm, shape.eps, cos, sin,
                                slots, kv[i]);
            kernels.attention(work, qkv, own_attention, spans.data(), plan->tasks.data(),
                              static_cast<int>(plan->tasks.size()), partials, kv[i], hidden);
            const Activations attended = as(shape.q_width());
            kernels.quantize(work, hidden, shape.q_width(), nullptr, 0.0f, attended);
            kernels.linear(work, layer.o, attended, Then::Add, x, shape.width);
            kernels.quantize(work, x, shape.width, layer.post_norm, shape.eps, normed);
            kernels.linear(work, layer.gate_up, normed, Then::SiluMul, hidden, shape.ff);
            const Activations activated = as(shape.ff);
            kernels.quantize(work, hidden, shape.ff, nullptr, 0.0f, activated);
            kernels.linear(work, layer.down, activated, Then::Add, x, shape.width);
        }
    });
}

}  // namespace tokenloom
