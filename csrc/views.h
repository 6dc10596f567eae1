// Python's tensors as the kernels take them: what is checked once, kept, and pointed to.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "layers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenloom {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using HeadsOut = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Cache = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// What computes: the best that this machine runs, until `use_isa` names another.
inline const Kernels*& chosen() {
    static const Kernels* kernels = [] {
        int count;
        return available_kernels(&count)[0];
    }();
    return kernels;
}
inline const Kernels& isa() { return *chosen(); }

[[noreturn]] inline void bad(const std::string& what) { throw std::invalid_argument(what); }

// Rows may be strided, the numbers of a row may not.
template <class A>
void check_rows(const A& a, const char* name) {
    const size_t last = a.ndim() - 1;
    if (a.shape(last) > 1 && a.stride(last) != 1) bad(std::string(name) + ": the last dimension is strided");
}

// Keeps the tensors that a kernel's weight points to.
struct WeightRef {
    Weight weight;
    Bytes data;
    std::optional<Vector<float>> bias;

    WeightRef(int format, int rows, int columns, Bytes data_, std::optional<Vector<float>> bias_)
        : data(std::move(data_)), bias(std::move(bias_)) {
        if (format < 0 || format > 2) bad("format: not one of Q8_0, Q4_0, Q4_1");
        if (rows < 1) bad("rows: at least one expected");
        if (columns < 1 || columns % BLOCK) bad("columns: not a multiple of 32");
        weight = {static_cast<Format>(format), rows, columns, data.data(), bias ? bias->data() : nullptr};
        const size_t expected =
            static_cast<size_t>(weight.groups()) * weight.blocks() * block_bytes(weight.format);
        if (data.nbytes() != expected) {
            bad("data: " + std::to_string(data.nbytes()) + " bytes, expected " + std::to_string(expected));
        }
        if (bias && static_cast<int>(bias->shape(0)) != rows) bad("bias: one number per row expected");
    }
};

// A LoRA and the tensors that it points to. Parts share a's rows in order: (b [outs, ranks], first column of the
// projection's output, scale).
struct LowRankRef {
    using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
    LowRank lora;
    Matrix a;
    std::vector<Matrix> bs;

    LowRankRef(Matrix a_, const std::vector<std::tuple<Matrix, int, double>>& parts) : a(std::move(a_)) {
        lora.a = a.data();
        lora.width = static_cast<int>(a.shape(1));
        for (const auto& [b, first_out, scale] : parts) {
            const int outs = static_cast<int>(b.shape(0)), ranks = static_cast<int>(b.shape(1));
            if (first_out < 0 || first_out % GROUP || outs % GROUP) bad("parts: columns: not a multiple of 8");
            lora.parts.push_back({b.data(), lora.ranks, ranks, first_out, outs});
            lora.scale.insert(lora.scale.end(), ranks, static_cast<float>(scale));
            lora.ranks += ranks;
            bs.push_back(b);
        }
        if (lora.ranks < 1 || lora.ranks != static_cast<int>(a.shape(0))) bad("a: one row for each rank expected");
    }
};

// The keys and values of all layers, float32 or int8 with a scale per token and head.
struct KV {
    std::vector<KVLayer> layers;
    std::vector<Cache> keys, values;
    std::vector<Scales> scales;
    size_t num_slots = 0;
    int heads = 0, head_dim = 0;
    bool one_piece = true;  // float32, and each layer's values follow its keys
    bool one_tensor = true;  // each layer's values follow its keys, and the next layer follows them

    KV(std::vector<Cache> keys_, std::vector<Cache> values_, std::vector<Scales> key_scales,
       std::vector<Scales> value_scales)
        : keys(std::move(keys_)), values(std::move(values_)) {
        const bool quantized = !key_scales.empty();
        if (keys.empty() || values.size() != keys.size() || key_scales.size() != value_scales.size() ||
            (quantized && key_scales.size() != keys.size())) {
            bad("cache: as many keys, values and scales as layers expected");
        }
        num_slots = keys[0].shape(0);
        heads = static_cast<int>(keys[0].shape(1));
        head_dim = static_cast<int>(keys[0].shape(2));
        const auto wanted = quantized ? nb::dtype<int8_t>() : nb::dtype<float>();
        for (size_t i = 0; i < keys.size(); ++i) {
            for (const Cache* part : {&keys[i], &values[i]}) {
                if (part->dtype() != wanted) bad("cache: float32, or int8 with scales, expected");
                if (part->shape(0) != num_slots || static_cast<int>(part->shape(1)) != heads ||
                    static_cast<int>(part->shape(2)) != head_dim) {
                    bad("cache: layers differ in shape");
                }
            }
            layers.push_back({keys[i].data(), values[i].data(), nullptr, nullptr});
            const size_t bytes = keys[i].nbytes();
            const auto at = [&](const Cache& part) { return static_cast<const char*>(part.data()); };
            one_tensor = one_tensor && at(keys[i]) == at(keys[0]) + 2 * i * bytes && at(values[i]) == at(keys[i]) + bytes;
            const auto* behind = static_cast<float*>(keys[i].data()) + num_slots * heads * head_dim;
            one_piece = one_piece && !quantized && values[i].data() == behind;
            if (!quantized) continue;
            for (const Scales* part : {&key_scales[i], &value_scales[i]}) {
                if (part->shape(0) != num_slots || static_cast<int>(part->shape(1)) != heads) {
                    bad("cache: scales differ in shape");
                }
                scales.push_back(*part);
            }
            layers.back().key_scales = key_scales[i].data();
            layers.back().value_scales = value_scales[i].data();
        }
    }

    const KVLayer& layer(int i) const {
        if (i < 0 || i >= static_cast<int>(layers.size())) bad("layer: out of range");
        return layers[i];
    }
};

inline std::vector<Span> spans_of(const nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& table,
                           const Vector<int32_t>& blocks, int rows, int block_size, size_t num_slots) {
    std::vector<Span> spans;
    const auto columns = table.shape(1);
    if (columns != 4 && columns != 6) bad("spans: [S, 4], or with tails [S, 6], expected");
    if (block_size < 1) bad("block_size: at least 1 expected");
    spans.reserve(table.shape(0));
    for (size_t i = 0; i < table.shape(0); ++i) {
        const int32_t* s = table.data() + columns * i;  // start, length, kv_len, first block; tail's length, first slot
        const int needed = s[2] / block_size + (s[2] % block_size > 0);
        if (s[0] < 0 || s[1] < 1 || s[0] > rows - s[1] || s[2] < s[1] || s[3] < 0 ||
            static_cast<size_t>(s[3]) + needed > blocks.shape(0)) {
            bad("spans: row " + std::to_string(i) + " is outside of the batch or its blocks");
        }
        for (int b = 0; b < needed; ++b) {
            const int32_t block = blocks.data()[s[3] + b];
            if (block < 0 || (static_cast<size_t>(block) + 1) * block_size > num_slots) {
                bad("blocks: block " + std::to_string(block) + " is outside of the cache");
            }
        }
        spans.push_back({s[0], s[1], s[2], blocks.data() + s[3]});
        if (columns == 4 || s[4] == 0) continue;
        if (s[1] != 1 || s[4] < 0 || s[4] > s[2] || s[5] < 0 ||
            static_cast<size_t>(s[5]) + s[4] > blocks.shape(0)) {
            bad("spans: row " + std::to_string(i) + " has a tail that is none");
        }
        for (int t = 0; t < s[4]; ++t) {
            const int32_t slot = blocks.data()[s[5] + t];
            if (slot < 0 || static_cast<size_t>(slot) >= num_slots) {
                bad("spans: slot " + std::to_string(slot) + " is outside of the cache");
            }
        }
        spans.back().tail = blocks.data() + s[5];
        spans.back().tail_length = s[4];
    }
    return spans;
}

using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// Rows (first key, end, number of spans that share them), and these spans, one row's after another.
using SharedArgs = std::optional<std::tuple<Table, Vector<int32_t>>>;

inline std::vector<SharedKeys> shared_of(const SharedArgs& args, const std::vector<Span>& spans) {
    std::vector<SharedKeys> shared;
    if (!args) return shared;
    const auto& [table, members] = *args;
    if (table.shape(1) != 3) bad("shared: [R, 3] expected");
    std::vector<int> known(spans.size());  // how far a span's keys are shared
    size_t at = 0;
    for (size_t i = 0; i < table.shape(0); ++i) {
        const int32_t* r = table.data() + 3 * i;
        if (r[0] < 0 || r[1] <= r[0] || r[2] < 1 || at + r[2] > members.shape(0)) bad("shared: a row is out of range");
        SharedKeys keys{r[0], r[1], {}};
        for (const size_t end = at + r[2]; at < end; ++at) {
            const int32_t m = members.data()[at];
            if (m < 0 || static_cast<size_t>(m) >= spans.size()) bad("shared: no such span");
            const Span& span = spans[m];
            if (known[m] != r[0] || r[1] > span.kv_len - std::max(span.length, span.tail_length)) {
                bad("shared: keys of a span that its rows do not all read, or a gap before them");
            }
            known[m] = r[1];
            keys.spans.push_back(m);
        }
        shared.push_back(std::move(keys));
    }
    return shared;
}

inline void check_slots(const Vector<int64_t>& slots, size_t rows, size_t num_slots) {
    if (slots.shape(0) != rows) bad("slots: one per row expected");
    for (size_t i = 0; i < rows; ++i) {
        if (slots.data()[i] < 0 || static_cast<size_t>(slots.data()[i]) >= num_slots) {
            bad("slots: slot " + std::to_string(slots.data()[i]) + " is outside of the cache");
        }
    }
}

using Units = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BypassArgs = std::tuple<int, int, std::vector<const LowRankRef*>>;  // first row, end, by layer and site
using TapArgs = std::tuple<int, int, Units>;                              // place, first row, units of each row

// The layers of one decoder; see layers.h.
class Layers {
  public:
    Layers(int width, int ff, int heads, int kv_heads, int head_dim, float eps)
        : shape_{width, ff, heads, kv_heads, head_dim, eps} {
        if (kv_heads < 1 || heads % kv_heads || heads / kv_heads > 64) bad("heads: not a multiple of kv_heads");
        if (!head_dim_supported(head_dim)) bad("head_dim: not supported");
    }

    void add(Vector<float> input_norm, const WeightRef& qkv, std::optional<Vector<float>> q_norm,
             std::optional<Vector<float>> k_norm, const WeightRef& o, Vector<float> post_norm,
             const WeightRef& gate_up, const WeightRef& down, int window) {
        auto fits = [](const WeightRef& w, int rows, int columns, const char* name) {
            if (w.weight.rows != rows || w.weight.columns != columns) bad(std::string(name) + ": wrong shape");
        };
        fits(qkv, shape_.qkv_width(), shape_.width, "qkv");
        fits(o, shape_.width, shape_.q_width(), "o");
        fits(gate_up, 2 * shape_.ff, shape_.width, "gate_up");
        fits(down, shape_.width, shape_.ff, "down");
        if (shape_.ff % GROUP) bad("ff: not a multiple of 8");
        if (static_cast<int>(input_norm.shape(0)) != shape_.width ||
            static_cast<int>(post_norm.shape(0)) != shape_.width) {
            bad("norm: wrong shape");
        }
        for (const auto* norm : {&q_norm, &k_norm}) {
            if (*norm && static_cast<int>((*norm)->shape(0)) != shape_.head_dim) bad("q_norm, k_norm: wrong shape");
        }
        layers_.push_back({input_norm.data(), qkv.weight, q_norm ? q_norm->data() : nullptr,
                           k_norm ? k_norm->data() : nullptr, o.weight, post_norm.data(), gate_up.weight,
                           down.weight, window});
        norms_.push_back(std::move(input_norm));
        norms_.push_back(std::move(post_norm));
        if (q_norm) norms_.push_back(std::move(*q_norm));
        if (k_norm) norms_.push_back(std::move(*k_norm));
        weights_.insert(weights_.end(), {qkv, o, gate_up, down});
    }

    // Where `attend` is given it is called for each layer, once that layer's queries, keys and values lie in qkv, and
    // returns what attention gives, [T, q_width].
    void forward(Out x, const KV& kv, Rows cos, Rows sin, Vector<int64_t> slots, Table table, Vector<int32_t> blocks,
                 int block_size, const std::vector<BypassArgs>& bypasses, const std::vector<TapArgs>& taps,
                 std::optional<Out> qkv, std::optional<nb::callable> attend, int threads,
                 const SharedArgs& shared) const {
        const int rows = static_cast<int>(x.shape(0));
        const int half = shape_.head_dim / 2;
        if (kv.layers.size() != layers_.size() || kv.heads != shape_.kv_heads || kv.head_dim != shape_.head_dim) {
            bad("kv: a cache of another model");
        }
        if (static_cast<int>(x.shape(1)) != shape_.width || x.stride(0) != shape_.width) bad("x: wrong shape");
        if (static_cast<int>(cos.shape(0)) != rows || static_cast<int>(cos.shape(1)) != half ||
            cos.stride(0) != half || sin.shape(0) != cos.shape(0) || sin.shape(1) != cos.shape(1) ||
            sin.stride(0) != half) {
            bad("cos, sin: wrong shape");
        }
        if (rows == 0) return;
        check_rows(x, "x");
        check_rows(cos, "cos");
        check_rows(sin, "sin");
        check_slots(slots, rows, kv.num_slots);
        auto spans = spans_of(table, blocks, rows, block_size, kv.num_slots);
        LayerRows batch{x.data(), rows, cos.data(), sin.data(), slots.data(), block_size, std::move(spans), {}, {}, {}};
        batch.shared = shared_of(shared, batch.spans);
        if (attend) {
            if (!qkv || static_cast<int>(qkv->shape(0)) != rows ||
                static_cast<int>(qkv->shape(1)) != shape_.qkv_width() || qkv->stride(0) != shape_.qkv_width()) {
                bad("qkv: wrong shape");
            }
            check_rows(*qkv, "qkv");
            batch.qkv = qkv->data();
        }
        std::vector<std::vector<const LowRank*>> loras;
        loras.reserve(bypasses.size());
        for (const auto& [first, last, refs] : bypasses) {
            if (first < 0 || last <= first || last > rows) bad("bypasses: rows outside of the batch");
            if (refs.size() != SITES * layers_.size()) bad("bypasses: one for each layer and site expected");
            loras.push_back(loras_of(refs));
            batch.bypasses.push_back({first, last, loras.back().data()});
        }
        for (const auto& [place, first, units] : taps) batch.taps.push_back(tap_of(kv, rows, place, first, units));
        const auto run = [&](int begin, int end) {
            nb::gil_scoped_release release;
            run_layers(isa(), threads, shape_, layers_, kv.layers, begin, end, batch);
        };
        const int halves = 2 * static_cast<int>(layers_.size());
        if (!attend) return run(0, halves);
        run(0, 1);
        for (int half = 1; half < halves; half += 2) {
            const auto attended = nb::cast<Rows>((*attend)(half / 2));
            if (static_cast<int>(attended.shape(0)) != rows || static_cast<int>(attended.shape(1)) != shape_.q_width() ||
                attended.stride(0) != shape_.q_width()) {
                bad("attend: what it returns has the wrong shape");
            }
            check_rows(attended, "attend");
            batch.attended = attended.data();
            run(half, std::min(half + 2, halves));
        }
    }

  private:
    std::vector<const LowRank*> loras_of(const std::vector<const LowRankRef*>& refs) const {
        std::vector<const LowRank*> loras;
        for (size_t i = 0; i < refs.size(); ++i) {
            loras.push_back(refs[i] ? &refs[i]->lora : nullptr);
            if (!refs[i]) continue;
            const int site = static_cast<int>(i % SITES);
            if (loras[i]->width != shape_.width_in(site)) bad("bypasses: a: wrong width");
            for (const auto& part : loras[i]->parts) {
                if (part.first_out > shape_.width_out(site) - part.outs) bad("bypasses: b: wrong shape");
            }
        }
        return loras;
    }

    Tap tap_of(const KV& kv, int rows, int place, int first, const Units& units) const {
        const int width = shape_.width, attended = shape_.q_width();
        const int widths[] = {width, attended, width, 2 * shape_.ff, attended, shape_.heads};
        const int unit = shape_.kv_heads * shape_.head_dim;
        if (!kv.one_piece) bad("taps: a float32 cache, keys and values in one piece, expected");
        if (place < 0 || place >= static_cast<int>(Place::PLACES)) bad("taps: place: not one of 0 to 5");
        if (first < 0 || units.shape(0) > static_cast<size_t>(rows - std::min(first, rows))) {
            bad("taps: rows outside of the batch");
        }
        if (static_cast<int>(units.shape(1)) != (widths[place] + unit - 1) / unit) bad("taps: units: wrong shape");
        for (size_t i = 0; i < units.size(); ++i) {
            if (units.data()[i] < 0 || static_cast<size_t>(units.data()[i]) >= 2 * kv.num_slots) {
                bad("taps: unit " + std::to_string(units.data()[i]) + " is outside of the cache");
            }
        }
        const int last = first + static_cast<int>(units.shape(0));
        return {static_cast<Place>(place), first, last, static_cast<int>(units.shape(1)), units.data()};
    }

    Shape shape_;
    std::vector<Layer> layers_;
    std::vector<Vector<float>> norms_;  // what the pointers of layers_ point to
    std::vector<WeightRef> weights_;
};

}  // namespace tokenloom
