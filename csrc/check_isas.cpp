// Holds each instruction set's kernels against the portable ones, without Python: `make neon` runs this on an
// emulated ARM machine. Says which kernel differs, and fails.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "layers.h"

using namespace tokenloom;

namespace {

std::mt19937 generator(0);
int failures = 0;

std::vector<float> normal(size_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> out(count);
    for (float& x : out) x = distribution(generator);
    return out;
}

std::vector<uint8_t> bytes(size_t count) {
    std::vector<uint8_t> out(count);
    for (uint8_t& x : out) x = static_cast<uint8_t>(generator());
    return out;
}

void check(const char* kernel, int detail, const std::vector<float>& got, const std::vector<float>& wanted,
           float tolerance) {
    float most = 0.0f, size = 0.0f;
    for (size_t i = 0; i < got.size(); ++i) {
        const float difference = std::fabs(got[i] - wanted[i]);
        if (!(difference <= most)) most = difference;  // NaN stays
        size = std::max(size, std::fabs(wanted[i]));
    }
    if (most <= tolerance * size && size > 0.0f) return;
    std::printf("  %s (%d): off by %g of %g\n", kernel, detail, most, size);
    ++failures;
}

struct Quantized {
    std::vector<int8_t> q;
    std::vector<float> scale, sum;
    Activations view;

    Quantized(const Kernels& kernels, Work& work, const std::vector<float>& x, int rows, int columns)
        : q(x.size()), scale(x.size() / BLOCK), sum(x.size() / BLOCK) {
        view = {rows, columns, q.data(), scale.data(), sum.data()};
        kernels.quantize(work, x.data(), columns, nullptr, 0.0f, nullptr, view);
    }
    std::vector<float> numbers() const {
        std::vector<float> out(q.size());
        for (size_t i = 0; i < q.size(); ++i) out[i] = scale[i / BLOCK] * static_cast<float>(q[i]);
        return out;
    }
};

void check_products(const Kernels& kernels, const Kernels& plain, Work& work) {
    constexpr int columns = 160, n = 43, widest = 48;
    for (Format format : {Format::Q8_0, Format::Q4_0, Format::Q4_1}) {
        Weight w{format, widest, columns, nullptr, nullptr};
        auto data = bytes(static_cast<size_t>(w.groups()) * w.blocks() * block_bytes(format) + 1);
        w.data = data.data() + 1;  // at an odd address
        for (int b = 0; b < w.groups() * w.blocks(); ++b) {
            uint8_t* block = data.data() + 1 + static_cast<size_t>(b) * block_bytes(format);
            // Scales of about 1: float16 from 0.5 to 2, of either sign.
            for (int i = quant_bytes(format) + 1; i < block_bytes(format); i += 2) {
                block[i] = static_cast<uint8_t>((block[i] & 0x83) | 0x38);
            }
        }
        for (int row = 0; row < n; ++row) {
            std::vector<float> got(columns), wanted(columns);
            kernels.unpack(w, row, got.data());
            plain.unpack(w, row, wanted.data());
            check("unpack", static_cast<int>(format), got, wanted, 0.0f);
        }
        for (int g = 0; g < w.groups(); ++g) {
            std::vector<float> got(GROUP * columns), wanted(GROUP * columns);
            kernels.unpack_group(w, g, got.data(), columns);
            for (int row = 0; row < GROUP; ++row) plain.unpack(w, GROUP * g + row, wanted.data() + row * columns);
            check("unpack_group", static_cast<int>(format), got, wanted, 0.0f);
        }
        for (int rows : {1, 2, 3, 4, 5, 9, 16, 31, 64, 66, 150}) {
            const auto x = normal(static_cast<size_t>(rows) * columns);
            const Quantized mine(kernels, work, x, rows, columns), its(plain, work, x, rows, columns);
            check("quantize", rows, mine.numbers(), its.numbers(), 0.01f);
            for (Then then : {Then::Store, Then::Add, Then::SiluMul}) {
                w.rows = then == Then::SiluMul ? 48 : n;  // three groups of gates
                std::vector<float> got(static_cast<size_t>(rows) * n, 1.0f), wanted = got;
                kernels.linear(work, w, its.view, then, got.data(), n, nullptr);
                plain.linear(work, w, its.view, then, wanted.data(), n, nullptr);
                check("linear", rows, got, wanted, 1e-5f);
            }
            w.rows = n;
            const auto dy = normal(static_cast<size_t>(rows) * n);
            std::vector<float> got(static_cast<size_t>(rows) * columns, 1.0f), wanted = got;
            kernels.linear_backward(work, w, dy.data(), n, rows, got.data(), columns, rows % 2);
            plain.linear_backward(work, w, dy.data(), n, rows, wanted.data(), columns, rows % 2);
            check("linear_backward", rows, got, wanted, 1e-5f);
        }
    }
}

void check_rows(const Kernels& kernels, const Kernels& plain, Work& work) {
    for (int width : {1, 7, 8, 33, 90}) {
        const auto x = normal(5 * 2 * width), weight = normal(width);
        std::vector<float> got(5 * width), wanted = got;
        kernels.rms_norm(work, x.data(), 2 * width, weight.data(), 1e-5f, 5, width, got.data(), width);
        plain.rms_norm(work, x.data(), 2 * width, weight.data(), 1e-5f, 5, width, wanted.data(), width);
        check("rms_norm", width, got, wanted, 1e-6f);
        kernels.silu_mul(work, x.data(), 2 * width, 5, width, got.data(), width);
        plain.silu_mul(work, x.data(), 2 * width, 5, width, wanted.data(), width);
        check("silu_mul", width, got, wanted, 1e-6f);
    }
}

void check_attention(const Kernels& kernels, const Kernels& plain, Work& work, int head_dim, bool quantized) {
    constexpr int heads = 4, kv_heads = 2, block_size = 16, past = 530, slots = 576;
    const AttentionShape shape{heads, kv_heads, head_dim, block_size, 300, (heads + 2 * kv_heads) * head_dim,
                               heads * head_dim};
    std::vector<int32_t> blocks(slots / block_size);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(blocks.size() - 1 - i);
    const std::vector<Span> spans{{0, 3, past, blocks.data()}, {3, 12, 12, blocks.data() + 34}};
    const AttentionPlan plan = plan_attention(spans, shape);
    const auto qkv = normal(15 * static_cast<size_t>(shape.q_stride)), angle = normal(15 * head_dim);
    const auto norm = normal(head_dim), cache = normal(2 * static_cast<size_t>(slots) * kv_heads * head_dim);
    const auto quants = bytes(cache.size());
    std::vector<float> outs[2], rotated[2];
    for (int side = 0; side < 2; ++side) {
        const Kernels& k = side ? plain : kernels;
        auto floats = cache;
        auto ints = quants;
        std::vector<float> scales(2 * slots * kv_heads, 0.01f), partials(plan.partial_rows * (head_dim + 2));
        KVLayer kv{floats.data(), floats.data() + floats.size() / 2, nullptr, nullptr};
        if (quantized) {
            kv = {ints.data(), ints.data() + ints.size() / 2, scales.data(), scales.data() + slots * kv_heads};
        }
        std::vector<int64_t> to(15);
        for (int t = 0; t < 15; ++t) {
            const int token = t < 3 ? past - 3 + t : t - 3;
            to[t] = (t < 3 ? blocks[token / block_size] : blocks[34]) * block_size + token % block_size;
        }
        rotated[side] = qkv;
        outs[side].resize(15 * static_cast<size_t>(shape.out_stride));
        k.rope_append(work, rotated[side].data(), 15, shape, norm.data(), norm.data(), 1e-5f, angle.data(),
                      angle.data() + 15 * head_dim / 2, to.data(), kv);
        k.attention(work, rotated[side].data(), shape, spans.data(), plan, partials.data(), kv,
                    outs[side].data(), nullptr);
    }
    check("rope_append", head_dim, rotated[0], rotated[1], 1e-5f);
    check("attention", head_dim, outs[0], outs[1], quantized ? 0.01f : 1e-4f);
}

void check_few_products(const Kernels& kernels, const Kernels& plain, Work& work) {
    constexpr int rows = 3, heads = 6, kv_heads = 2, tokens = 300, n = 37;
    for (int width : {8, 24, 64, 256}) {
        const auto x = normal(rows * width), weights = normal(n * width);
        std::vector<float> got(rows * n), wanted = got;
        kernels.few_products(work, x.data(), rows, weights.data(), n, width, got.data());
        plain.few_products(work, x.data(), rows, weights.data(), n, width, wanted.data());
        check("few_products", width, got, wanted, 1e-5f);

        const auto q = normal(heads * width), keys = normal(static_cast<size_t>(tokens) * kv_heads * width);
        const auto quants = bytes(keys.size());
        const std::vector<float> scales(tokens * kv_heads, 0.01f);
        std::vector<int64_t> slots(tokens - 3);
        for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i * 7 % tokens);
        for (bool quantized : {false, true}) {
            KeyRows chosen{keys.data(), nullptr, kv_heads, width, slots.data()};
            if (quantized) chosen = {quants.data(), scales.data(), kv_heads, width, slots.data()};
            std::vector<float> scored(heads * slots.size()), expected = scored;
            kernels.key_scores(work, q.data(), chosen, heads, static_cast<int>(slots.size()), scored.data());
            plain.key_scores(work, q.data(), chosen, heads, static_cast<int>(slots.size()), expected.data());
            check("key_scores", width, scored, expected, 1e-5f);
        }
    }
}

// The gradient, from one forward pass of the portable kernels: rows that read many keys, and rows from the first on.
void check_attention_backward(const Kernels& kernels, const Kernels& plain, Work& work, int head_dim, int window) {
    constexpr int heads = 4, kv_heads = 2, block_size = 16, past = 150, slots = 192, rows = 30;
    const AttentionShape shape{heads, kv_heads, head_dim, block_size, window, heads * head_dim, heads * head_dim};
    std::vector<int32_t> blocks(slots / block_size);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(blocks.size() - 1 - i);
    const std::vector<Span> spans{{0, 9, past, blocks.data()}, {9, 21, 21, blocks.data() + 10}};
    const int tokens = past + 21, first_tokens[] = {0, past};
    const AttentionPlan plan = plan_attention(spans, shape);
    const size_t size = static_cast<size_t>(rows) * heads * head_dim;
    const auto q = normal(size), d_out = normal(size);
    auto cache = normal(2 * static_cast<size_t>(slots) * kv_heads * head_dim);
    const KVLayer kv{cache.data(), cache.data() + cache.size() / 2, nullptr, nullptr};
    std::vector<float> out(size), lse(rows * heads), merged(plan.partial_rows * (head_dim + 2));
    plain.attention(work, q.data(), shape, spans.data(), plan, merged.data(), kv, out.data(),
                    lse.data());
    const size_t keys = static_cast<size_t>(kv_heads) * tokens * head_dim;
    std::vector<float> dq[2], dk[2], dv[2];
    for (int side = 0; side < 2; ++side) {
        dq[side].resize(size);
        dk[side].assign(keys, 0.5f);  // what is there is added to
        dv[side].assign(keys, 0.5f);
        AttentionGradients g{};
        g.q = q.data();
        g.out = out.data();
        g.d_out = d_out.data();
        g.lse = lse.data();
        g.q_stride = g.out_stride = g.d_out_stride = g.dq_stride = heads * head_dim;
        g.dq = dq[side].data();
        g.dk = dk[side].data();
        g.dv = dv[side].data();
        g.head_stride = static_cast<ptrdiff_t>(tokens) * head_dim;
        g.first_tokens = first_tokens;
        g.spans = spans;
        const auto [prepared, partials] = plan_gradients(g, shape);
        std::vector<float> room(prepared + partials);
        g.prepared = room.data();
        g.partials = room.data() + prepared;
        (side ? plain : kernels).attention_backward(work, shape, g, kv);
    }
    check("attention_backward dq", head_dim, dq[0], dq[1], 1e-4f);
    check("attention_backward dk", head_dim, dk[0], dk[1], 1e-4f);
    check("attention_backward dv", head_dim, dv[0], dv[1], 1e-4f);
}

// Pages, the last of them open, of which heads choose the best: each its own, or a group together.
void check_pages(const Kernels& kernels, const Kernels& plain, Work& work, int width) {
    constexpr int heads = 6, kv_heads = 2, page = 8, length = 8 * 150 + 3, total = 151, count = 20;
    const auto q = normal(heads * width);
    auto bounds = normal(static_cast<size_t>(total - 1) * kv_heads * 2 * width);
    for (size_t i = 0; i < bounds.size(); i += 2 * width) {
        for (int d = 0; d < width; ++d) {
            if (bounds[i + d] < bounds[i + width + d]) std::swap(bounds[i + d], bounds[i + width + d]);
        }
    }
    std::vector<int64_t> slots(length);
    for (int i = 0; i < length; ++i) slots[i] = i * 7 % length;
    for (bool by_group : {false, true}) {
        const Pages pages{bounds.data(), slots.data(), 11, kv_heads, width, page, length, total, count, by_group};
        std::vector<float> best[2];
        std::vector<int64_t> cells[2];
        for (int side = 0; side < 2; ++side) {
            best[side].resize(heads * (total - 1));
            cells[side].resize(static_cast<size_t>(by_group ? kv_heads : heads) * pages.tokens());
            (side ? plain : kernels).choose_pages(work, q.data(), pages, heads, best[side].data(), cells[side].data());
        }
        check("choose_pages", width, best[0], best[1], 1e-5f);
        if (cells[0] != cells[1]) check("choose_pages' cells", width, {1.0f}, {2.0f}, 0.0f);
    }
}

// Decodes that have 512 keys in common, as many as few and as many as many queries.
void check_shared(const Kernels& kernels, const Kernels& plain, Work& work, int rows) {
    constexpr int heads = 4, kv_heads = 2, head_dim = 32, block_size = 16, prefix = 512;
    const AttentionShape shape{heads, kv_heads, head_dim, block_size, 0, heads * head_dim, heads * head_dim};
    std::vector<std::vector<int32_t>> blocks(rows);
    std::vector<Span> spans;
    SharedKeys shared{0, prefix, {}};
    for (int i = 0; i < rows; ++i) {
        for (int b = 0; b < prefix / block_size; ++b) blocks[i].push_back(b);
        blocks[i].push_back(prefix / block_size + i);
        spans.push_back({i, 1, prefix + 1 + i % block_size, blocks[i].data()});
        shared.spans.push_back(i);
    }
    const size_t slots = prefix + static_cast<size_t>(rows) * block_size;
    const auto q = normal(static_cast<size_t>(rows) * shape.q_stride);
    auto cache = normal(2 * slots * kv_heads * head_dim);
    const KVLayer kv{cache.data(), cache.data() + cache.size() / 2, nullptr, nullptr};
    const auto run = [&](const Kernels& k, const AttentionPlan& plan) {
        std::vector<float> out(q.size()), partials(static_cast<size_t>(plan.partial_rows) * (head_dim + 2));
        k.attention(work, q.data(), shape, spans.data(), plan, partials.data(), kv, out.data(), nullptr);
        return out;
    };
    check("shared attention", rows, run(kernels, plan_attention(spans, shape, {shared})),
          run(plain, plan_attention(spans, shape)), 1e-4f);
}

void check_top(const Kernels& kernels, const Kernels& plain, Work& work) {
    const auto x = normal(3 * 1000);
    std::vector<int64_t> where(3 * 50), there = where;
    kernels.largest(work, x.data(), 1000, 3, 1000, 50, where.data());
    plain.largest(work, x.data(), 1000, 3, 1000, 50, there.data());
    if (where != there) check("largest", 50, {1.0f}, {2.0f}, 0.0f);
    std::vector<float> got(3 * 20 + 3), wanted = got;
    std::vector<int64_t> ids(3 * 20), expected = ids;
    kernels.top(work, x.data(), 1000, 3, 1000, 20, got.data(), ids.data(), got.data() + 60);
    plain.top(work, x.data(), 1000, 3, 1000, 20, wanted.data(), expected.data(), wanted.data() + 60);
    check("top", 20, got, wanted, 1e-6f);
    if (ids != expected) check("top's ids", 20, {1.0f}, {2.0f}, 0.0f);
}

}  // namespace

int main() {
    int count;
    const auto* found = available_kernels(&count);
    const Kernels& plain = *found[count - 1];
    for (int i = 0; i + 1 < count; ++i) {
        std::printf("%s against %s\n", found[i]->name, plain.name);
        Team team;
        Work work(team, 1);
        check_products(*found[i], plain, work);
        check_rows(*found[i], plain, work);
        for (int head_dim : {8, 16, 32, 64, 80, 96, 128}) {
            for (bool quantized : {false, true}) check_attention(*found[i], plain, work, head_dim, quantized);
            for (int window : {0, 40}) check_attention_backward(*found[i], plain, work, head_dim, window);
        }
        for (int width : {8, 64, 128}) check_pages(*found[i], plain, work, width);
        check_few_products(*found[i], plain, work);
        for (int rows : {2, 40}) check_shared(*found[i], plain, work, rows);
        check_top(*found[i], plain, work);
    }
    if (count == 1) std::printf("only the portable kernels run here\n");
    std::printf("%d differences\n", failures);
    return failures > 0 || count == 1;
}
