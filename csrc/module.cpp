// Python's view of the kernels. Tensors come in as they are (no copies); the GIL is released while they run.

#include "attention_calls.h"

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

void linear_backward(const WeightRef& w, Rows dy, Out dx, bool add, int threads) {
    check_rows(dy, "dy");
    check_rows(dx, "dx");
    if (static_cast<int>(dy.shape(1)) != w.weight.rows) bad("dy: wrong width");
    if (dx.shape(0) != dy.shape(0) || static_cast<int>(dx.shape(1)) != w.weight.columns) bad("dx: wrong shape");
    if (dy.shape(0) == 0) return;
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().linear_backward(work, w.weight, dy.data(), dy.stride(0), static_cast<int>(dy.shape(0)), dx.data(),
                              dx.stride(0), add);
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

void float_products(Rows x, Rows w, Matrix y, bool add, int threads) {
    check_rows(x, "x");
    check_rows(w, "w");
    if (!isa().float_products) bad("this instruction set has no tiles");
    FloatProducts p{x.data(), w.data(), y.data(), static_cast<int>(x.shape(0)), static_cast<int>(y.shape(1)),
                    static_cast<int>(x.shape(1)), x.stride(0), w.stride(0), y.stride(0), add, nullptr};
    if (static_cast<int>(w.shape(0)) != p.k || static_cast<int>(w.shape(1)) != p.n) bad("w: wrong shape");
    if (static_cast<int>(y.shape(0)) != p.rows) bad("y: wrong shape");
    if (p.rows == 0 || p.n == 0 || p.k == 0) bad("x, w: empty");
    p.packed = scratch().packed(packed_numbers(p.rows));
    nb::gil_scoped_release release;
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        isa().float_products(work, p);
    });
}

bool has_float_products() { return isa().float_products; }

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
    m.def("linear_backward", &linear_backward, "weight"_a, "dy"_a, "dx"_a.noconvert(), "add"_a, "threads"_a,
          "dx = dy w, or dx += dy w.");
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
    m.def("float_products", &float_products, "x"_a, "w"_a, "y"_a.noconvert(), "add"_a, "threads"_a,
          "y = x w, or y += x w.");
    m.def("has_float_products", &has_float_products, "Whether the instruction set at work has tiles for them.");
    m.def("attention_backward", &attention_backward, "dq"_a.noconvert(), "dk"_a.noconvert(), "dv"_a.noconvert(),
          "d_out"_a, "q"_a, "out"_a, "lse"_a, "kv"_a, "layer"_a, "spans"_a, "blocks"_a, "firsts"_a, "block_size"_a,
          "window"_a, "threads"_a, "Writes dq, adds to dk and dv.");
    m.def("top", &top, "x"_a, "values"_a.noconvert(), "ids"_a.noconvert(), "norms"_a.noconvert(), "threads"_a);
    m.def("largest", &largest, "x"_a, "ids"_a.noconvert(), "threads"_a);
    m.def("read_all", &read_all, "data"_a, "threads"_a, "Reads every byte once: the memory's speed.");
    m.attr("KEY_BLOCK") = KEY_BLOCK;
    m.def("isas", &isas, "Instruction sets of this build that this machine runs, best first.");
    m.def("use_isa", &use_isa, "name"_a, "Compute with this one from now on.");
    m.def("pool", &pool_name, "Whose threads are used.");
}
