// How quantised weights lie in memory: GGUF's Q8_0, Q4_0 and Q4_1, repacked.
//
// A weight [N, K] is cut into groups of eight rows and blocks of 32 columns. For each group its K / 32 blocks
// follow one another, so that one pass over a group reads memory in order. A block holds
//
//   Q4: 4 vectors of 32 bytes. Byte j of vector v belongs to row j / 4; its low nibble is the weight of column
//       4 v + j % 4, its high nibble that of column 16 + 4 v + j % 4.
//   Q8: 8 vectors of 32 bytes. Byte j of vector v is the weight of row j / 4 and column 4 v + j % 4.
//   then the scales d of the eight rows as float16, and for Q4_1 their offsets m.
//
// w = d q (Q8_0), d (q - 8) (Q4_0), d q + m (Q4_1). Rows are padded to a multiple of eight with zeros. The
// same layout is written and read in Python by `tokenloom.kernels.packed`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenloom {

enum class Format : int { Q8_0 = 0, Q4_0 = 1, Q4_1 = 2 };

constexpr int GROUP = 8;
constexpr int BLOCK = 32;

constexpr int quant_bytes(Format f) { return f == Format::Q8_0 ? GROUP * BLOCK : GROUP * BLOCK / 2; }
constexpr int block_bytes(Format f) {
    return quant_bytes(f) + (f == Format::Q4_1 ? 2 : 1) * GROUP * static_cast<int>(sizeof(uint16_t));
}

struct Weight {
    Format format = Format::Q8_0;
    int rows = 0, columns = 0;
    const uint8_t* data = nullptr;
    const float* bias = nullptr;

    int blocks() const { return columns / BLOCK; }
    int groups() const { return (rows + GROUP - 1) / GROUP; }
    const uint8_t* group(int g) const {
        return data + static_cast<size_t>(g) * blocks() * block_bytes(format);
    }
};

// Activations of T rows in 8 bits: x = scale * q for each block of 32, and sum = scale * (sum of q).
struct Activations {
    int rows = 0, columns = 0;
    int8_t* q = nullptr;
    float* scale = nullptr;
    float* sum = nullptr;

    int blocks() const { return columns / BLOCK; }
};

}  // namespace tokenloom
