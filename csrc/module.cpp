// Python's view of the kernels. Tensors come in as they are (no copies); the GIL is released while they run.

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

#include "layers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenloom {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using HeadsOut = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Cache = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const Kernels* chosen() {
    static const Kernels* kernels = nullptr;
    if (!kernels) {
        int count;
        kernels = available_kernels(&count)[0];
    }
    return kernels;
}
const Kernels* override_kernels = nullptr;
const Kernels& isa() { return override_kernels ? *override_kernels : *chosen(); }

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument(what); }

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

std::vector<Span> spans_of(const nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& table,
                           const Vector<int32_t>& blocks, int rows, int block_size, size_t num_slots) {
    std::vector<Span> spans;
    if (table.shape(1) != 4) bad("spans: [S, 4] expected");
    if (block_size < 1) bad("block_size: at least 1 expected");
    spans.reserve(table.shape(0));
    for (size_t i = 0; i < table.shape(0); ++i) {
        const int32_t* s = table.data() + 4 * i;  // start, length, kv_len, first block
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
    }
    return spans;
}

void check_slots(const Vector<int64_t>& slots, size_t rows, size_t num_slots) {
    if (slots.shape(0) != rows) bad("slots: one per row expected");
    for (size_t i = 0; i < rows; ++i) {
        if (slots.data()[i] < 0 || static_cast<size_t>(slots.data()[i]) >= num_slots) {
            bad("slots: slot " + std::to_string(slots.data()[i]) + " is outside of the cache");
        }
    }
}

using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
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

    void forward(Out x, int begin, int end, const KV& kv, Rows cos, Rows sin, Vector<int64_t> slots, Table table,
                 Vector<int32_t> blocks, int block_size, const std::vector<BypassArgs>& bypasses,
                 const std::vector<TapArgs>& taps, int threads) const {
        const int rows = static_cast<int>(x.shape(0));
        const int half = shape_.head_dim / 2;
        if (begin < 0 || end > static_cast<int>(layers_.size()) || kv.layers.size() != layers_.size() ||
            kv.heads != shape_.kv_heads || kv.head_dim != shape_.head_dim) {
            bad("layers: out of range, or a cache of another model");
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
        LayerRows batch{x.data(),     rows,       cos.data(),       sin.data(),
                        slots.data(), block_size, std::move(spans), {},         {}};
        std::vector<std::vector<const LowRank*>> loras;
        loras.reserve(bypasses.size());
        for (const auto& [first, last, refs] : bypasses) {
            if (first < 0 || last <= first || last > rows) bad("bypasses: rows outside of the batch");
            if (refs.size() != SITES * layers_.size()) bad("bypasses: one for each layer and site expected");
            loras.push_back(loras_of(refs));
            batch.bypasses.push_back({first, last, loras.back().data()});
        }
        for (const auto& [place, first, units] : taps) batch.taps.push_back(tap_of(kv, rows, place, first, units));
        nb::gil_scoped_release release;
        run_layers(isa(), threads, shape_, layers_, kv.layers, begin, end, batch);
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
        const int widths[] = {shape_.width, shape_.q_width(), shape_.width, 2 * shape_.ff};
        const int unit = shape_.kv_heads * shape_.head_dim;
        if (!kv.one_piece) bad("taps: a float32 cache, keys and values in one piece, expected");
        if (place < 0 || place > 3) bad("taps: place: not one of 0 to 3");
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

void linear(const WeightRef& w, Rows x, Out y, bool add, int threads) {
    check_rows(x, "x");
    check_rows(y, "y");
    const int rows = static_cast<int>(x.shape(0));
    if (static_cast<int>(x.shape(1)) != w.weight.columns) bad("x: wrong width");
    if (y.shape(0) != x.shape(0) || static_cast<int>(y.shape(1)) != w.weight.rows) bad("y: wrong shape");
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const Activations activations = scratch().activations(rows, w.weight.columns);
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().quantize(work, x.data(), x.stride(0), nullptr, 0.0f, nullptr, activations);
        isa().linear(work, w.weight, activations, add ? Then::Add : Then::Store, y.data(), y.stride(0),
                     nullptr);
    });
}

void unpack(const WeightRef& w, Vector<int64_t> rows, Out out, int threads) {
    check_rows(out, "out");
    if (out.shape(0) != rows.shape(0) || static_cast<int>(out.shape(1)) != w.weight.columns) {
        bad("out: wrong shape");
    }
    for (size_t i = 0; i < rows.shape(0); ++i) {
        if (rows.data()[i] < 0 || rows.data()[i] >= w.weight.rows) bad("rows: out of range");
    }
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        work.each(static_cast<int>(rows.shape(0)), [&](int i) {
            isa().unpack(w.weight, static_cast<int>(rows.data()[i]), out.data() + i * out.stride(0));
        });
    });
}

void unpack_rows(const WeightRef& w, int first, Out out, int threads) {
    check_rows(out, "out");
    const int rows = static_cast<int>(out.shape(0)), end = first + rows;
    if (static_cast<int>(out.shape(1)) != w.weight.columns) bad("out: wrong shape");
    if (first < 0 || rows > w.weight.rows - first) bad("first: rows out of range");
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const int begin = first / GROUP;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        work.each((end - 1) / GROUP + 1 - begin, [&](int piece) {
            const int from = (begin + piece) * GROUP;
            const auto row = [&](int r) { return out.data() + (r - first) * out.stride(0); };
            if (from >= first && from + GROUP <= end) {
                isa().unpack_group(w.weight, begin + piece, row(from), out.stride(0));
                return;
            }
            for (int r = std::max(from, first); r < std::min(from + GROUP, end); ++r) isa().unpack(w.weight, r, row(r));
        });
    });
}

void rms_norm(Rows x, Vector<float> weight, float eps, Out out, int threads) {
    check_rows(x, "x");
    check_rows(out, "out");
    if (x.shape(1) != weight.shape(0) || out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1)) {
        bad("rms_norm: shapes differ");
    }
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().rms_norm(work, x.data(), x.stride(0), weight.data(), eps, static_cast<int>(x.shape(0)),
                       static_cast<int>(x.shape(1)), out.data(), out.stride(0));
    });
}

void silu_mul(Rows gate_up, Out out, int threads) {
    check_rows(gate_up, "gate_up");
    check_rows(out, "out");
    if (gate_up.shape(1) != 2 * out.shape(1) || gate_up.shape(0) != out.shape(0)) bad("silu_mul: wrong shape");
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().silu_mul(work, gate_up.data(), gate_up.stride(0), static_cast<int>(out.shape(0)),
                       static_cast<int>(out.shape(1)), out.data(), out.stride(0));
    });
}

void rms_norm_backward(Out dx, Rows dy, Rows x, Vector<float> weight, float eps, int threads) {
    check_rows(dx, "dx");
    check_rows(dy, "dy");
    check_rows(x, "x");
    for (int i = 0; i < 2; ++i) {
        if (dx.shape(i) != x.shape(i) || dy.shape(i) != x.shape(i)) bad("rms_norm_backward: shapes differ");
    }
    if (x.shape(1) != weight.shape(0)) bad("rms_norm_backward: shapes differ");
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().rms_norm_backward(work, dx.data(), dx.stride(0), dy.data(), dy.stride(0), x.data(), x.stride(0),
                                weight.data(), eps, static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)));
    });
}

void silu_mul_backward(Rows dy, Rows gate_up, Out out, int threads) {
    check_rows(dy, "dy");
    check_rows(gate_up, "gate_up");
    const auto rows = dy.shape(0), width = dy.shape(1);
    if (gate_up.shape(0) != rows || gate_up.shape(1) != 2 * width || out.shape(0) != rows ||
        out.shape(1) != 2 * width || out.stride(0) != static_cast<int64_t>(2 * width)) {
        bad("silu_mul_backward: wrong shape");
    }
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().silu_mul_backward(work, dy.data(), dy.stride(0), gate_up.data(), gate_up.stride(0),
                                static_cast<int>(rows), static_cast<int>(width), out.data());
    });
}

using Lse = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

AttentionShape shape_of(const Heads& q, const KV& kv, int block_size, int window, ptrdiff_t out_stride) {
    const int heads = static_cast<int>(q.shape(1)), head_dim = static_cast<int>(q.shape(2));
    if (!head_dim_supported(head_dim) || kv.head_dim != head_dim) bad("head_dim: not supported");
    if (heads % kv.heads || heads / kv.heads > 64) bad("heads: not a multiple of kv_heads");
    return {heads, kv.heads, head_dim, block_size, window, q.stride(0), out_stride};
}

// Rows like q's, heads of a row one after another.
template <class A>
void check_heads(const A& a, const Heads& q, const char* name) {
    for (size_t i = 0; i < 3; ++i) {
        if (a.shape(i) != q.shape(i)) bad(std::string(name) + ": wrong shape");
    }
    if (a.stride(1) != static_cast<int64_t>(a.shape(2)) || a.stride(2) != 1) {
        bad(std::string(name) + ": heads of a row must be contiguous");
    }
}

void check_lse(const Lse& lse, const Heads& q) {
    if (lse.shape(0) != q.shape(0) || lse.shape(1) != q.shape(1)) bad("lse: wrong shape");
}

void attention(Heads q, const KV& kv, int layer, Table table, Vector<int32_t> blocks, int block_size, int window,
               HeadsOut out, std::optional<Lse> lse, int threads) {
    const AttentionShape shape = shape_of(q, kv, block_size, window, out.stride(0));
    check_heads(q, q, "q");
    check_heads(out, q, "out");
    if (lse) check_lse(*lse, q);
    const KVLayer& cache = kv.layer(layer);
    const auto spans = spans_of(table, blocks, static_cast<int>(q.shape(0)), block_size, kv.num_slots);
    nb::gil_scoped_release release;
    const AttentionPlan plan = plan_attention(spans, shape);
    auto& partials = scratch().partials;
    const size_t needed = static_cast<size_t>(plan.partial_rows) * (shape.head_dim + 2);
    if (partials.size() < needed) partials.resize(needed);
    float *memory = partials.data(), *norms = lse ? lse->data() : nullptr;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().attention(work, q.data(), shape, spans.data(), plan.tasks.data(),
                        static_cast<int>(plan.tasks.size()), memory, cache, out.data(), norms);
    });
}

using Gradient = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;  // [Hk, tokens, D]

void attention_backward(HeadsOut dq, Gradient dk, Gradient dv, Heads d_out, Heads q, Heads out, Lse lse, const KV& kv,
                        int layer, Table table, Vector<int32_t> blocks, Vector<int32_t> firsts, int block_size,
                        int window, int threads) {
    const AttentionShape shape = shape_of(q, kv, block_size, window, out.stride(0));
    check_heads(q, q, "q");
    check_heads(out, q, "out");
    check_heads(d_out, q, "d_out");
    check_heads(dq, q, "dq");
    check_lse(lse, q);
    const KVLayer& cache = kv.layer(layer);
    if (cache.quantized()) bad("cache: float32 expected");
    for (const auto* d : {&dk, &dv}) {
        if (static_cast<int>(d->shape(0)) != shape.kv_heads || static_cast<int>(d->shape(2)) != shape.head_dim ||
            d->shape(1) != dk.shape(1) || d->stride(0) != dk.stride(0) || d->stride(1) != shape.head_dim ||
            d->stride(2) != 1) {
            bad("dk, dv: [kv_heads, tokens, head_dim] expected, tokens of a head contiguous");
        }
    }
    auto spans = spans_of(table, blocks, static_cast<int>(q.shape(0)), block_size, kv.num_slots);
    if (firsts.shape(0) != spans.size()) bad("firsts: one per span expected");
    for (size_t i = 0; i < spans.size(); ++i) {
        if (firsts.data()[i] < 0 || firsts.data()[i] > static_cast<int64_t>(dk.shape(1)) - spans[i].kv_len) {
            bad("firsts: tokens outside of dk and dv");
        }
    }
    AttentionGradients g{};
    g.q = q.data();
    g.out = out.data();
    g.d_out = d_out.data();
    g.lse = lse.data();
    g.q_stride = q.stride(0);
    g.out_stride = out.stride(0);
    g.d_out_stride = d_out.stride(0);
    g.dq = dq.data();
    g.dk = dk.data();
    g.dv = dv.data();
    g.dq_stride = dq.stride(0);
    g.head_stride = dk.stride(0);
    g.first_tokens = firsts.data();
    g.spans = std::move(spans);
    nb::gil_scoped_release release;
    const auto [prepared, partials] = plan_gradients(g, shape);
    g.prepared = scratch().rows(prepared + partials);
    g.partials = g.prepared + prepared;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().attention_backward(work, shape, g, cache);
    });
}

void top(Rows x, nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> values,
         nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> ids,
         nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> norms, int threads) {
    check_rows(x, "x");
    const int rows = static_cast<int>(x.shape(0)), k = static_cast<int>(values.shape(1));
    if (k < 1 || values.shape(1) > x.shape(1)) bad("values: as many columns as wanted, at most x's, expected");
    if (static_cast<int>(values.shape(0)) != rows || static_cast<int>(ids.shape(0)) != rows ||
        ids.shape(1) != values.shape(1) || static_cast<int>(norms.shape(0)) != rows) {
        bad("values, ids, norms: wrong shape");
    }
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().top(work, x.data(), x.stride(0), rows, static_cast<int>(x.shape(1)), k, values.data(), ids.data(),
                  norms.data());
    });
}

uint64_t read_all(Bytes data, int threads) {
    std::vector<uint64_t> parts(256, 0);
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().sum(work, reinterpret_cast<const uint64_t*>(data.data()), data.nbytes() / 8, parts.data());
    });
    uint64_t total = 0;
    for (uint64_t part : parts) total += part;
    return total;
}

std::vector<std::string> isas() {
    int count;
    const auto* found = available_kernels(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(found[i]->name);
    return names;
}

void use_isa(const std::string& name) {
    int count;
    const auto* found = available_kernels(&count);
    for (int i = 0; i < count; ++i) {
        if (found[i]->name == name) {
            override_kernels = found[i];
            return;
        }
    }
    bad("no instruction set " + name + " on this machine");
}

}  // namespace
}  // namespace tokenloom

NB_MODULE(_native, m) {
    using namespace tokenloom;
    // What is written to, or kept, must be the caller's own memory: never a converted copy.
    m.doc() = "CPU kernels on packed batches; see tokenloom.kernels.cpu.";
    nb::class_<WeightRef>(m, "Weight")
        .def(nb::init<int, int, int, Bytes, std::optional<Vector<float>>>(), "format"_a, "rows"_a, "columns"_a,
             "data"_a.noconvert(), "bias"_a.none() = nb::none());
    nb::class_<LowRankRef>(m, "LowRank")
        .def(nb::init<LowRankRef::Matrix, const std::vector<std::tuple<LowRankRef::Matrix, int, double>>&>(),
             "a"_a.noconvert(), "parts"_a.noconvert());
    nb::class_<Layers>(m, "Layers")
        .def(nb::init<int, int, int, int, int, float>(), "width"_a, "ff"_a, "heads"_a, "kv_heads"_a,
             "head_dim"_a, "eps"_a)
        .def("add", &Layers::add, "input_norm"_a, "qkv"_a, "q_norm"_a.none(), "k_norm"_a.none(), "o"_a,
             "post_norm"_a, "gate_up"_a, "down"_a, "window"_a)
        .def("forward", &Layers::forward, "x"_a.noconvert(), "begin"_a, "end"_a, "kv"_a, "cos"_a, "sin"_a,
             "slots"_a, "spans"_a, "blocks"_a, "block_size"_a, "bypasses"_a, "taps"_a, "threads"_a);
    nb::class_<KV>(m, "KV")
        .def(nb::init<std::vector<Cache>, std::vector<Cache>, std::vector<Scales>, std::vector<Scales>>(),
             "keys"_a.noconvert(), "values"_a.noconvert(), "key_scales"_a.noconvert(),
             "value_scales"_a.noconvert());
    m.def("linear", &linear, "weight"_a, "x"_a, "y"_a.noconvert(), "add"_a, "threads"_a);
    m.def("unpack", &unpack, "weight"_a, "rows"_a, "out"_a.noconvert(), "threads"_a);
    m.def("unpack_rows", &unpack_rows, "weight"_a, "first"_a, "out"_a.noconvert(), "threads"_a);
    m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a.noconvert(), "threads"_a);
    m.def("silu_mul", &silu_mul, "gate_up"_a, "out"_a.noconvert(), "threads"_a);
    m.def("rms_norm_backward", &rms_norm_backward, "dx"_a.noconvert(), "dy"_a, "x"_a, "weight"_a, "eps"_a,
          "threads"_a, "Adds to dx.");
    m.def("silu_mul_backward", &silu_mul_backward, "dy"_a, "gate_up"_a, "out"_a.noconvert(), "threads"_a);
    m.def("attention", &attention, "q"_a, "kv"_a, "layer"_a, "spans"_a, "blocks"_a, "block_size"_a, "window"_a,
          "out"_a.noconvert(), "lse"_a.noconvert().none(), "threads"_a);
    m.def("attention_backward", &attention_backward, "dq"_a.noconvert(), "dk"_a.noconvert(), "dv"_a.noconvert(),
          "d_out"_a, "q"_a, "out"_a, "lse"_a, "kv"_a, "layer"_a, "spans"_a, "blocks"_a, "firsts"_a, "block_size"_a,
          "window"_a, "threads"_a, "Writes dq, adds to dk and dv.");
    m.def("top", &top, "x"_a, "values"_a.noconvert(), "ids"_a.noconvert(), "norms"_a.noconvert(), "threads"_a);
    m.def("read_all", &read_all, "data"_a, "threads"_a, "Reads every byte once: the memory's speed.");
    m.def("isas", &isas, "Instruction sets of this build that this machine runs, best first.");
    m.def("use_isa", &use_isa, "name"_a, "Compute with this one from now on.");
    m.def("pool", &pool_name, "Whose threads are used.");
}
