// AMX: matrix tiles of 16 rows of 64 bytes, and products of two of them.
//
// A thread configures its tiles before it uses them and releases them soon: the system saves eight kilobytes more
// for a thread that holds any. Which tile holds what is the same everywhere (`Tiles`).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenloom {

#if defined(__AMX_TILE__)

constexpr int TILE_ROWS = 16;
constexpr int TILE_INTS = 16;  // of a row of 64 bytes

// Tiles 0 to 3 hold products [16, 16], 4 and 5 left factors, 6 and 7 right ones.
class Tiles {
  public:
    // Left factors are [16, depth bytes]; right ones [depth / 4, 64 bytes], four bytes of a column side by side.
    Tiles(bool used, int depth) : used_(used) {
        if (!used) return;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? depth : 64);
            config.rows[tile] = static_cast<uint8_t>(tile < 6 ? TILE_ROWS : depth / 4);
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() {
        if (used_) asm volatile("tilerelease");
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    const bool used_;
};

template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Adds the product of signed bytes.
template <int SUM, int LEFT, int RIGHT>
inline void tile_dots() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}
// Adds the product of 16-bit floats, of which a right factor's column has two side by side.
template <int SUM, int LEFT, int RIGHT>
inline void tile_float_dots() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

#else

struct Tiles {
    Tiles(bool, int) {}
};

#endif

}  // namespace tokenloom
