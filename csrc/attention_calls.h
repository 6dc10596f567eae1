// Attention and its gradient as Python calls them. Included by module.cpp alone.
#pragma once

#include <limits>

#include "views.h"

namespace tokenloom {
namespace {

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

// Runs a plan in one team, after what `first` does in it. The GIL is not held.
template <class F>
void attend(const float* q, const AttentionShape& shape, const std::vector<Span>& spans,
            const std::vector<SharedKeys>& shared, const KVLayer& cache, float* out, float* lse, int threads,
            F&& first) {
    const AttentionPlan plan = plan_attention(spans, shape, shared);
    auto& partials = scratch().partials;
    const size_t needed = static_cast<size_t>(plan.partial_rows) * (shape.head_dim + 2);
    if (partials.size() < needed) partials.resize(needed);
    float* memory = partials.data();  // of the calling thread: the team's have scratch of their own
    run_team(threads, [&](Team& team) {
        Work work(team, threads);
        first(work);
        isa().attention(work, q, shape, spans.data(), plan, memory, cache, out, lse);
    });
}

const auto NOTHING = [](Work&) {};

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
    attend(q.data(), shape, spans, together, cache, out.data(), lse ? lse->data() : nullptr, threads, NOTHING);
}

size_t keys_read(Table table, Vector<int32_t> blocks, int block_size, int window, int heads, int kv_heads,
                 const SharedArgs& shared) {
    if (kv_heads < 1 || heads % kv_heads || heads / kv_heads > 64) bad("heads: not a multiple of kv_heads");
    const auto any = static_cast<size_t>(std::numeric_limits<int>::max());
    const auto spans = spans_of(table, blocks, std::numeric_limits<int>::max(), block_size, any);
    const AttentionShape shape{heads, kv_heads, 8, block_size, window, 0, 0};
    return keys_of(plan_attention(spans, shape, shared_of(shared, spans)), spans);
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
    attend(q.data(), shape, spans, {}, kv.layers[0], out.data(), nullptr, threads, NOTHING);
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
    const Pages pages{static_cast<const float*>(bounds.data()), slots.data(), first, kv.heads, kv.head_dim,
                      page, length, total, count, by_group};
    const int lists = by_group ? kv.heads : shape.heads, each = pages.tokens();
    nb::gil_scoped_release release;
    thread_local std::vector<int64_t> cells;
    cells.resize(static_cast<size_t>(lists) * each);
    shape.kv_heads = lists;
    std::vector<Span> spans;
    for (int i = 0; i < lists; ++i) {
        spans.push_back({0, 1, each, nullptr, cells.data() + static_cast<size_t>(i) * each, i});
    }
    float* best = scratch().rows(static_cast<size_t>(shape.heads) * total);
    int64_t* chosen = cells.data();
    attend(q.data(), shape, spans, {}, kv.layers[0], out.data(), nullptr, threads,
           [&](Work& work) { isa().choose_pages(work, q.data(), pages, shape.heads, best, chosen); });
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

}  // namespace
}  // namespace tokenloom
