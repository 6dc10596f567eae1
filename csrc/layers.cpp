#include "layers.h"

#include <algorithm>
#include <utility>

namespace tokenloom {
namespace {

// Few rows: their keys are split, so that all threads have work. The pieces do not depend on the number of
// threads, hence neither does the result.
constexpr int SPLIT_ROWS = 8;
constexpr int GRADIENT_TASKS = 12;  // per span, if it has the keys for it
constexpr int GRADIENT_KEYS = 64;
// Floats between the rows of a buffer whose width is a power of two times something: without them many rows'
// lines would fall into the same few sets of a cache.
constexpr int APART = 16;

}  // namespace

namespace {

size_t keys_of(const AttentionTask& task, const AttentionPlan& plan, const std::vector<Span>& spans) {
    size_t keys = task.key_end - task.key_begin;
    for (int i = 0; task.alone && i < task.rows; ++i) {
        const SharedRow& row = plan.shared[task.shared + i];
        keys += end_alone(task, row, spans[row.span]) - task.key_end;
    }
    return keys;
}

// What a span shares with others: so many whole pieces, before its own keys begin.
struct SharedPart {
    int pieces = 0, own_begin = 0;
    bool joined = false;  // the first piece of its own keys is the task of a `Joint`
    std::vector<int> places;  // where its results begin, for each tile of its rows and kv head; -1: there is but one
};

// Keys that a piece begins with, in whole blocks, which the rows of some spans share before they read on alone.
struct Joint {
    int begin, end;
    std::vector<int> spans;
    int saved() const { return (static_cast<int>(spans.size()) - 1) * (end - begin); }
};

int pieces_of(const SharedKeys& keys) { return (keys.end - keys.begin) / PIECE_KEYS; }

// Shared keys as far as they are whole pieces: a row's sums must not depend on what it shares.
std::vector<SharedKeys> whole_pieces(const std::vector<SharedKeys>& shared, std::vector<SharedPart>& parts) {
    std::vector<SharedKeys> whole;
    for (const SharedKeys& keys : shared) {
        const int begin = keys.begin / PIECE_KEYS * PIECE_KEYS, end = keys.end / PIECE_KEYS * PIECE_KEYS;
        if (begin == end) continue;
        whole.push_back({begin, end, keys.spans});
        for (int i : keys.spans) {
            parts[i].pieces += pieces_of(whole.back());
            parts[i].own_begin = std::max(parts[i].own_begin, end);
        }
    }
    return whole;
}

// What is shared of the pieces behind those, the most first; no span is in two.
std::vector<Joint> joints_of(const std::vector<SharedKeys>& shared, const std::vector<Span>& spans,
                             std::vector<SharedPart>& parts) {
    std::vector<Joint> found, joints;
    for (const SharedKeys& keys : shared) {
        Joint joint{keys.end / PIECE_KEYS * PIECE_KEYS, keys.end / KEY_BLOCK * KEY_BLOCK, {}};
        if (joint.begin == joint.end) continue;
        for (int i : keys.spans) {
            if (spans[i].length <= SPLIT_ROWS && parts[i].own_begin == joint.begin) joint.spans.push_back(i);
        }
        if (joint.spans.size() > 1) found.push_back(std::move(joint));
    }
    while (!found.empty()) {
        const auto best = std::max_element(found.begin(), found.end(),
                                           [](const auto& a, const auto& b) { return a.saved() < b.saved(); });
        if (best->spans.size() < 2) break;
        for (int i : best->spans) parts[i].joined = true;
        joints.push_back(std::move(*best));
        found.erase(best);
        for (Joint& joint : found) {
            const auto taken = [&](int i) { return parts[i].joined; };
            joint.spans.erase(std::remove_if(joint.spans.begin(), joint.spans.end(), taken), joint.spans.end());
        }
    }
    return joints;
}

// Adds tasks for rows that share keys, as many rows each as fit.
class SharedTasks {
  public:
    SharedTasks(AttentionPlan& plan, int most_rows, const AttentionTask& like)
        : plan_(plan), most_rows_(most_rows), task_(like) {}
    void add(const SharedRow& row) {
        if (task_.rows == 0) task_.shared = static_cast<int>(plan_.shared.size());
        plan_.shared.push_back(row);
        if (++task_.rows == most_rows_) close();
    }
    void close() {
        if (task_.rows > 0) plan_.tasks.push_back(task_);
        task_.rows = 0;
    }

  private:
    AttentionPlan& plan_;
    const int most_rows_;
    AttentionTask task_;
};

// One task reads shared keys for as many rows as fit it.
void plan_shared(AttentionPlan& plan, const std::vector<Span>& spans, const AttentionShape& s,
                 const std::vector<SharedKeys>& whole, const std::vector<Joint>& joints,
                 const std::vector<SharedPart>& parts) {
    const int group = s.heads / s.kv_heads, tile = std::max(1, MOST_QUERIES / group);
    std::vector<int> done(spans.size());  // pieces of each span
    // Rows of span i whose keys are piece p's. Results lie by tile of rows, kv head and piece, then by row.
    const auto add = [&](SharedTasks& tasks, int i, int p, int head) {
        for (int r = 0; r < spans[i].length; ++r) {
            const int rows = std::min(tile, spans[i].length - r / tile * tile);
            const int place = parts[i].places[r / tile * s.kv_heads + head];
            tasks.add({i, spans[i].start + r, place < 0 ? -1 : place + (p * rows + r % tile) * group});
        }
    };
    for (const SharedKeys& keys : whole) {
        const int pieces = pieces_of(keys);
        for (int head = 0; head < s.kv_heads; ++head) {
            for (int p = 0; p < pieces; ++p) {
                const int from = keys.begin + p * PIECE_KEYS;
                SharedTasks tasks(plan, tile, {keys.spans[0], 0, 0, head, from, from + PIECE_KEYS, -1});
                for (int i : keys.spans) add(tasks, i, done[i] + p, head);
                tasks.close();
            }
        }
        for (int i : keys.spans) done[i] += pieces;
    }
    for (const Joint& joint : joints) {
        for (int head = 0; head < s.kv_heads; ++head) {
            SharedTasks tasks(plan, tile, {joint.spans[0], 0, 0, head, joint.begin, joint.end, -1, -1, true});
            for (int i : joint.spans) add(tasks, i, parts[i].pieces, head);
            tasks.close();
        }
    }
}

}  // namespace

size_t keys_of(const AttentionPlan& plan, const std::vector<Span>& spans) {
    size_t keys = 0;
    for (const AttentionTask& task : plan.tasks) keys += keys_of(task, plan, spans);
    return keys;
}

AttentionPlan plan_attention(const std::vector<Span>& spans, const AttentionShape& s,
                             const std::vector<SharedKeys>& shared) {
    AttentionPlan plan;
    const int group = s.heads / s.kv_heads;
    const int tile = std::max(1, MOST_QUERIES / group);
    const bool sharing = !shared.empty() && s.window == 0;
    std::vector<SharedPart> parts(spans.size());
    std::vector<SharedKeys> whole;
    std::vector<Joint> joints;
    if (sharing) {
        whole = whole_pieces(shared, parts);
        joints = joints_of(shared, spans, parts);
    }
    for (int i = 0; i < static_cast<int>(spans.size()); ++i) {
        const Span& span = spans[i];
        SharedPart& part = parts[i];
        for (int row = 0; row < span.length; row += tile) {
            const int rows = std::min(tile, span.length - row);
            const int first = span.kv_len - span.length + row;  // token of the tile's first row
            const int in_window = std::max(0, first + 1 - s.window) / KEY_BLOCK * KEY_BLOCK;
            const int begin = s.window > 0 ? in_window : part.own_begin, end = first + rows;
            const bool split = span.length <= SPLIT_ROWS || part.pieces > 0;
            const int from = begin / PIECE_KEYS, pieces = split ? (end - 1) / PIECE_KEYS + 1 - from : 1;
            const int results = part.pieces + pieces;
            const int heads = span.cells ? span.head + 1 : s.kv_heads;
            for (int head = span.cells ? span.head : 0; head < heads; ++head) {
                const int place = results > 1 ? plan.partial_rows : -1;
                if (sharing) part.places.push_back(place);
                for (int p = part.joined ? 1 : 0; p < pieces; ++p) {
                    AttentionTask task{i, row, rows, head, begin, end, -1};
                    if (split) {
                        task.key_begin = std::max(begin, (from + p) * PIECE_KEYS);
                        task.key_end = std::min(end, (from + p + 1) * PIECE_KEYS);
                    }
                    if (results > 1) task.partial = place + (part.pieces + p) * rows * group;
                    plan.tasks.push_back(task);
                }
                if (results == 1) continue;
                plan.merges.push_back({i, row, rows, head, place, results});
                plan.partial_rows += results * rows * group;
            }
        }
    }
    plan_shared(plan, spans, s, whole, joints, parts);
    // Long ones first: the last to finish should be short.
    const auto length = [&](const AttentionTask& task) {
        return (task.rows - 1) * static_cast<size_t>(task.key_end - task.key_begin) + keys_of(task, plan, spans);
    };
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [&](const auto& a, const auto& b) { return length(a) > length(b); });
    return plan;
}

std::pair<size_t, size_t> plan_gradients(AttentionGradients& g, const AttentionShape& s) {
    const int step = std::max(1, MOST_QUERIES / (s.heads / s.kv_heads));
    // As many tasks whatever the number of threads, hence the same sums.
    g.num_partials = (GRADIENT_TASKS + s.kv_heads - 1) / s.kv_heads;
    for (int i = 0; i < static_cast<int>(g.spans.size()); ++i) {
        const Span& span = g.spans[i];
        const int first_tile = static_cast<int>(g.tiles.size());
        for (int row = 0; row < span.length; row += step) {
            g.tiles.push_back({i, row, std::min(step, span.length - row)});
        }
        const int num_tiles = static_cast<int>(g.tiles.size()) - first_tile;
        const int begin = s.window > 0 ? std::max(0, span.kv_len - span.length + 1 - s.window) : 0;
        const int blocks = (span.kv_len - begin + GRADIENT_KEYS - 1) / GRADIENT_KEYS;
        for (int part = 0; part < g.num_partials; ++part) {
            const auto at = [&](int p) {
                return std::min(begin + blocks * p / g.num_partials * GRADIENT_KEYS, span.kv_len);
            };
            // A task without keys is one too: it writes zeros.
            for (int head = 0; head < s.kv_heads; ++head) {
                g.tasks.push_back({i, head, at(part), at(part + 1), first_tile, num_tiles, part});
            }
        }
    }
    // Early keys are read by the most rows.
    std::stable_sort(g.tasks.begin(), g.tasks.end(),
                     [](const auto& a, const auto& b) { return a.partial < b.partial; });
    const size_t tiles = g.tiles.size() * s.kv_heads;
    return {tiles * prepared_floats(s.head_dim), tiles * g.num_partials * MOST_QUERIES * s.head_dim};
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

uint16_t* Scratch::packed(size_t count) {
    constexpr size_t LINE = 64 / sizeof(uint16_t);
    if (halves.size() < count + LINE) halves.resize(count + LINE);
    const size_t beyond = reinterpret_cast<uintptr_t>(halves.data()) / sizeof(uint16_t) % LINE;
    return halves.data() + (LINE - beyond) % LINE;
}

Scratch& scratch() {
    thread_local Scratch own;
    return own;
}

namespace {

// Copies the tapped rows of `from` to the units of the cache that are theirs.
void keep(Work& work, const std::vector<Tap>& taps, Place place, const float* from, ptrdiff_t stride, int width,
          int unit, const KVLayer& kv) {
    for (const Tap& tap : taps) {
        if (tap.place != place) continue;
        work.each(tap.end - tap.begin, [&](int r) {
            const float* row = from + (tap.begin + r) * stride;
            for (int u = 0; u < tap.per_row; ++u) {
                float* to = static_cast<float*>(kv.keys) + tap.units[static_cast<size_t>(r) * tap.per_row + u] * unit;
                std::copy_n(row + u * unit, std::min(unit, width - u * unit), to);
            }
        });
    }
}

}  // namespace

void run_layers(const Kernels& kernels, int threads, const Shape& shape, const std::vector<Layer>& layers,
                const std::vector<KVLayer>& kv, int begin, int end, const LayerRows& batch) {
    const int rows = batch.rows;
    float* x = batch.x;
    // Who goes through what, by layer and site.
    std::vector<LowRankPass> passes(batch.bypasses.empty() ? 0 : SITES * layers.size());
    int ranks = 0;
    for (const Bypass& bypass : batch.bypasses) {
        for (size_t i = 0; i < passes.size(); ++i) {
            const LowRank* lora = bypass.loras[i];
            if (!lora) continue;
            passes[i].runs.push_back({bypass.begin, bypass.end, lora});
            ranks = std::max(ranks, lora->ranks);
        }
    }
    const auto keeps = [&](Place place) {
        return std::any_of(batch.taps.begin(), batch.taps.end(), [&](const Tap& t) { return t.place == place; });
    };
    const bool keeps_gate_up = keeps(Place::GateUp), keeps_log_sums = keeps(Place::LogSums);

    Scratch& own = scratch();
    const int widest = std::max<int>({shape.width, shape.ff, shape.q_width()});
    const Activations largest = own.activations(rows, widest);
    const auto floats = [&](int width) { return static_cast<size_t>(rows) * width; };
    const int ff_stride = shape.ff + APART, gate_up_stride = 2 * shape.ff + APART;
    const size_t inner = floats(std::max(ff_stride, shape.q_width()));
    const size_t bypassed = floats(ranks > 0 ? shape.width : 0);
    const size_t projected = batch.qkv ? 0 : floats(shape.qkv_width());
    float* buffer = own.rows(projected + inner + bypassed + floats(ranks) +
                             floats(keeps_gate_up ? gate_up_stride : 0) + floats(keeps_log_sums ? shape.heads : 0));
    float* qkv = batch.qkv ? batch.qkv : buffer;
    float* hidden = buffer + projected;  // what attention, and later the MLP's activation, puts out
    float* normed = hidden + inner;      // what bypasses of qkv and gate_up read
    float* z = normed + bypassed;                     // their middle
    float* gate_up = z + floats(ranks);               // where it is wanted before SiLU
    float* log_sums = keeps_log_sums ? gate_up + floats(keeps_gate_up ? gate_up_stride : 0) : nullptr;

    for (size_t i = 0; i < passes.size(); ++i) {
        const int site = static_cast<int>(i % SITES);
        const bool reads_norm = site == QKV || site == GATE_UP;
        passes[i].x = reads_norm ? normed : hidden;
        passes[i].stride = reads_norm ? shape.width : site == O ? shape.q_width() : ff_stride;
        if (site == O && static_cast<int>(i / SITES) * 2 + 1 == begin) passes[i].x = batch.attended;
        passes[i].z = z;
        passes[i].z_stride = ranks;
    }

    AttentionShape attention{shape.heads,       shape.kv_heads,    shape.head_dim, batch.block_size, 0,
                             shape.qkv_width(), shape.q_width()};
    // Layers differ in their window only; models have at most two.
    std::vector<std::pair<int, AttentionPlan>> plans;
    size_t partial_floats_needed = 0;
    for (int i = begin / 2; 2 * i + 1 < end; ++i) {
        const int window = layers[i].window;
        if (std::any_of(plans.begin(), plans.end(), [&](const auto& p) { return p.first == window; })) continue;
        attention.window = window;
        plans.emplace_back(window, plan_attention(batch.spans, attention, batch.shared));
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
        const int unit = shape.kv_heads * shape.head_dim;
        for (int half = begin; half < end; ++half) {
            const int i = half / 2;
            const Layer& layer = layers[i];
            AttentionShape own_attention = attention;
            own_attention.window = layer.window;
            const AttentionPlan* plan = nullptr;
            for (const auto& [window, found] : plans) {
                if (window == layer.window) plan = &found;
            }
            // A projection, the norm before it, and its bypasses.
            const auto project = [&](int site, const Weight& weight, const float* from, ptrdiff_t from_stride,
                                     const float* norm, Then then, float* out, ptrdiff_t stride) {
                LowRankPass* pass = passes.empty() ? nullptr : &passes[SITES * i + site];
                if (pass && pass->runs.empty()) pass = nullptr;
                const Activations quants = as(shape.width_in(site));
                kernels.quantize(work, from, from_stride, norm, shape.eps, norm && pass ? normed : nullptr, quants);
                kernels.linear(work, weight, quants, then, out, stride, pass);
            };
            const auto tap = [&](Place place, const float* from, ptrdiff_t stride, int width) {
                if (!batch.taps.empty()) keep(work, batch.taps, place, from, stride, width, unit, kv[i]);
            };
            if (half % 2 == 0) {
                tap(Place::Input, x, shape.width, shape.width);
                project(QKV, layer.qkv, x, shape.width, layer.input_norm, Then::Store, qkv, shape.qkv_width());
                kernels.rope_append(work, qkv, rows, own_attention, layer.q_norm, layer.k_norm, shape.eps, batch.cos,
                                    batch.sin, batch.slots, kv[i]);
                tap(Place::Query, qkv, shape.qkv_width(), shape.q_width());
                continue;
            }
            const float* attended = hidden;
            if (half == begin) {
                attended = batch.attended;
            } else {
                kernels.attention(work, qkv, own_attention, batch.spans.data(), *plan, partials, kv[i], hidden,
                                  log_sums);
                tap(Place::Attended, hidden, shape.q_width(), shape.q_width());
                if (keeps_log_sums) tap(Place::LogSums, log_sums, shape.heads, shape.heads);
            }
            project(O, layer.o, attended, shape.q_width(), nullptr, Then::Add, x, shape.width);
            tap(Place::Residual, x, shape.width, shape.width);
            if (keeps_gate_up) {
                project(GATE_UP, layer.gate_up, x, shape.width, layer.post_norm, Then::Store, gate_up, gate_up_stride);
                tap(Place::GateUp, gate_up, gate_up_stride, 2 * shape.ff);
                kernels.silu_mul(work, gate_up, gate_up_stride, rows, shape.ff, hidden, ff_stride);
            } else {
                project(GATE_UP, layer.gate_up, x, shape.width, layer.post_norm, Then::SiluMul, hidden, ff_stride);
            }
            project(DOWN, layer.down, hidden, ff_stride, nullptr, Then::Add, x, shape.width);
        }
    });
}

}  // namespace tokenloom
