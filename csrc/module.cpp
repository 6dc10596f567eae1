// Python's view of the kernels. Tensors come in as they are (no copies); the GIL is released while they run.

#include <limits>

#include "views.h"

namespace tokenloom {
namespace {

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

using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Lse = Matrix;

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
               HeadsOut out, std::optional<Lse> lse, int threads, const SharedArgs& shared) {
    const AttentionShape shape = shape_of(q, kv, block_size, window, out.stride(0));
    check_heads(q, q, "q");
    check_heads(out, q, "out");
    if (lse) check_lse(*lse, q);
    const KVLayer& cache = kv.layer(layer);
    const auto spans = spans_of(table, blocks, static_cast<int>(q.shape(0)), block_size, kv.num_slots);
    const auto together = shared_of(shared, spans);
    nb::gil_scoped_release release;
    const AttentionPlan plan = plan_attention(spans, shape, together);
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

size_t keys_read(Table table, Vector<int32_t> blocks, int block_size, int window, int heads, int kv_heads,
                 const SharedArgs& shared) {
    if (kv_heads < 1 || heads % kv_heads || heads / kv_heads > 64) bad("heads: not a multiple of kv_heads");
    const auto any = static_cast<size_t>(std::numeric_limits<int>::max());
    const auto spans = spans_of(table, blocks, std::numeric_limits<int>::max(), block_size, any);
    const AttentionShape shape{heads, kv_heads, 8, block_size, window, 0, 0};
    return plan_attention(spans, shape, shared_of(shared, spans)).keys_read();
}

// Each kv head reads what lies at its own cells; the rows are the last of each list, in order. As many lists as kv
// heads, or as query heads.
void attention_at(Heads q, const KV& kv, Vector<int64_t> cells, Vector<int64_t> ends, HeadsOut out, int threads) {
    AttentionShape shape = shape_of(q, kv, 1, 0, out.stride(0));
    check_heads(q, q, "q");
    check_heads(out, q, "out");
    const int rows = static_cast<int>(q.shape(0)), lists = static_cast<int>(ends.shape(0));
    if (lists != shape.kv_heads && lists != shape.heads) bad("ends: one for each kv head, or each head, expected");
    if (!kv.one_tensor) bad("cache: all layers in one tensor expected");
    if (rows == 0) return;
    shape.kv_heads = lists;
    const int64_t layer = static_cast<int64_t>(kv.num_slots) * kv.heads, all = 2 * layer * kv.layers.size();
    std::vector<Span> spans;
    int64_t begin = 0;
    for (int i = 0; i < lists; begin = ends.data()[i++]) {
        const int64_t end = ends.data()[i];
        if (end - begin < rows || end > static_cast<int64_t>(cells.shape(0))) bad("ends: a list has no place for q");
        spans.push_back({0, rows, static_cast<int>(end - begin), nullptr, cells.data() + begin, i});
    }
    for (int64_t i = 0; i < begin; ++i) {
        const int64_t cell = cells.data()[i];
        if (cell < 0 || cell >= all || cell / layer % 2) bad("cells: not a cell of keys: " + std::to_string(cell));
    }
    nb::gil_scoped_release release;
    const AttentionPlan plan = plan_attention(spans, shape);
    auto& partials = scratch().partials;
    const size_t needed = static_cast<size_t>(plan.partial_rows) * (shape.head_dim + 2);
    if (partials.size() < needed) partials.resize(needed);
    float* memory = partials.data();
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().attention(work, q.data(), shape, spans.data(), plan.tasks.data(), static_cast<int>(plan.tasks.size()),
                        memory, kv.layers[0], out.data(), nullptr);
    });
}

// Each query head's products with the keys of its kv head at chosen slots.
void key_scores(Rows q, Cache keys, std::optional<Scales> scales, Vector<int64_t> slots, Matrix out, int threads) {
    check_rows(q, "q");
    const int heads = static_cast<int>(q.shape(0)), width = static_cast<int>(q.shape(1));
    const int kv_heads = static_cast<int>(keys.shape(1)), count = static_cast<int>(slots.shape(0));
    if (static_cast<int>(keys.shape(2)) != width || width % 8 || width > MOST_WIDTH) bad("keys: wrong width");
    if (kv_heads < 1 || heads % kv_heads) bad("q: heads: not a multiple of kv_heads");
    if (q.stride(0) != width) bad("q: rows must be contiguous");
    if (keys.dtype() != (scales ? nb::dtype<int8_t>() : nb::dtype<float>())) {
        bad("keys: float32, or int8 with scales, expected");
    }
    if (scales && (scales->shape(0) != keys.shape(0) || scales->shape(1) != keys.shape(1))) bad("scales: wrong shape");
    if (out.shape(0) != q.shape(0) || out.shape(1) != slots.shape(0)) bad("out: wrong shape");
    for (int i = 0; i < count; ++i) {
        if (slots.data()[i] < 0 || slots.data()[i] >= static_cast<int64_t>(keys.shape(0))) bad("slots: out of range");
    }
    const KeyRows rows{keys.data(), scales ? scales->data() : nullptr, kv_heads, width, slots.data()};
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().key_scores(work, q.data(), rows, heads, count, out.data());
    });
}

// Attention of one row over the pages of its sequence whose bounds promise most.
void attention_over_pages(Heads q, const KV& kv, int layer, Vector<int64_t> slots, Cache bounds, int page, int count,
                          bool by_group, HeadsOut out, int threads) {
    AttentionShape shape = shape_of(q, kv, 1, 0, out.stride(0));
    check_heads(q, q, "q");
    check_heads(out, q, "out");
    kv.layer(layer);
    if (q.shape(0) != 1) bad("q: one row expected");
    if (!kv.one_tensor) bad("cache: all layers in one tensor expected");
    if (page < 1) bad("page: at least one token expected");
    const int length = static_cast<int>(slots.shape(0)), total = (length + page - 1) / page;
    if (count < 1 || count > total) bad("count: from one page to all expected");
    if (bounds.dtype() != nb::dtype<float>() || static_cast<int>(bounds.shape(0)) < total - 1 ||
        static_cast<int>(bounds.shape(1)) != kv.heads || static_cast<int>(bounds.shape(2)) != 2 * kv.head_dim) {
        bad("bounds: float32 [pages, kv_heads, 2 head_dim] expected");
    }
    for (int i = 0; i < length; ++i) {
        if (slots.data()[i] < 0 || slots.data()[i] >= static_cast<int64_t>(kv.num_slots)) bad("slots: out of range");
    }
    const int64_t first = 2 * static_cast<int64_t>(layer) * kv.num_slots * kv.heads;
    const Pages pages{static_cast<const float*>(bounds.data()), slots.data(), first, kv.heads, kv.head_dim, page, length,
                      total, count, by_group};
    const int lists = by_group ? kv.heads : shape.heads, each = pages.tokens();
    nb::gil_scoped_release release;
    thread_local std::vector<int64_t> cells;
    cells.resize(static_cast<size_t>(lists) * each);
    shape.kv_heads = lists;
    std::vector<Span> spans;
    for (int i = 0; i < lists; ++i) spans.push_back({0, 1, each, nullptr, cells.data() + static_cast<size_t>(i) * each, i});
    const AttentionPlan plan = plan_attention(spans, shape);
    auto& partials = scratch().partials;
    const size_t needed = static_cast<size_t>(plan.partial_rows) * (shape.head_dim + 2);
    if (partials.size() < needed) partials.resize(needed);
    float *memory = partials.data(), *best = scratch().rows(static_cast<size_t>(shape.heads) * total);
    int64_t* chosen = cells.data();
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().choose_pages(work, q.data(), pages, shape.heads, best, chosen);
        isa().attention(work, q.data(), shape, spans.data(), plan.tasks.data(), static_cast<int>(plan.tasks.size()),
                        memory, kv.layers[0], out.data(), nullptr);
    });
}

void few_products(nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> x,
                  nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> weights, Matrix y, int threads) {
    const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(weights.shape(0));
    const int k = static_cast<int>(x.shape(1));
    if (static_cast<int>(weights.shape(1)) != k || k % 8) bad("weights: wrong width");
    if (static_cast<int>(y.shape(0)) != rows || static_cast<int>(y.shape(1)) != n) bad("y: wrong shape");
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().few_products(work, x.data(), rows, weights.data(), n, k, y.data());
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

using Ids = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void top(Rows x, Matrix values, Ids ids,
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

void largest(Rows x, Ids ids, int threads) {
    check_rows(x, "x");
    const int rows = static_cast<int>(x.shape(0)), k = static_cast<int>(ids.shape(1));
    if (static_cast<int>(ids.shape(0)) != rows || k > static_cast<int>(x.shape(1))) bad("ids: wrong shape");
    if (k == 0) return;
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().largest(work, x.data(), x.stride(0), rows, static_cast<int>(x.shape(1)), k, ids.data());
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
            chosen() = found[i];
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
        .def("forward", &Layers::forward, "x"_a.noconvert(), "kv"_a, "cos"_a, "sin"_a, "slots"_a, "spans"_a,
             "blocks"_a, "block_size"_a, "bypasses"_a, "taps"_a, "qkv"_a.noconvert().none(), "attend"_a.none(),
             "threads"_a, "shared"_a = nb::none());
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
          "out"_a.noconvert(), "lse"_a.noconvert().none(), "threads"_a, "shared"_a = nb::none());
    m.def("keys_read", &keys_read, "spans"_a, "blocks"_a, "block_size"_a, "window"_a, "heads"_a, "kv_heads"_a,
          "shared"_a = nb::none(), "Keys of one head that `attention` would read, each as often as it is read.");
    m.def("attention_at", &attention_at, "q"_a, "kv"_a, "cells"_a, "ends"_a, "out"_a.noconvert(), "threads"_a);
    m.def("key_scores", &key_scores, "q"_a, "keys"_a.noconvert(), "scales"_a.noconvert().none(), "slots"_a,
          "out"_a.noconvert(), "threads"_a);
    m.def("attention_over_pages", &attention_over_pages, "q"_a, "kv"_a, "layer"_a, "slots"_a, "bounds"_a.noconvert(),
          "page"_a, "count"_a, "by_group"_a, "out"_a.noconvert(), "threads"_a);
    m.def("few_products", &few_products, "x"_a, "weights"_a.noconvert(), "y"_a.noconvert(), "threads"_a);
    m.def("attention_backward", &attention_backward, "dq"_a.noconvert(), "dk"_a.noconvert(), "dv"_a.noconvert(),
          "d_out"_a, "q"_a, "out"_a, "lse"_a, "kv"_a, "layer"_a, "spans"_a, "blocks"_a, "firsts"_a, "block_size"_a,
          "window"_a, "threads"_a, "Writes dq, adds to dk and dv.");
    m.def("top", &top, "x"_a, "values"_a.noconvert(), "ids"_a.noconvert(), "norms"_a.noconvert(), "threads"_a);
    m.def("largest", &largest, "x"_a, "ids"_a.noconvert(), "threads"_a);
    m.def("read_all", &read_all, "data"_a, "threads"_a, "Reads every byte once: the memory's speed.");
    m.def("isas", &isas, "Instruction sets of this build that this machine runs, best first.");
    m.def("use_isa", &use_isa, "name"_a, "Compute with this one from now on.");
    m.def("pool", &pool_name, "Whose threads are used.");
}
