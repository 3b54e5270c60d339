// Bytes of a page: docs/layout.md in C++. ott-backend/src/layout.rs derives the same numbers.
// Plain C++17, so that it can be read by a host compiler too.
#pragma once
#include <cstddef>

#if defined(__CUDACC__)
#define OTT_BOTH __host__ __device__
#else
#define OTT_BOTH
#endif

namespace ott {

// Channels of a value group.
constexpr int V_GROUP = 128;
// Tokens of a chunk of the residual window.
constexpr int CHUNK = 32;
// A place of `slots` without a traced token.
constexpr int NO_SLOT = 255;
// `extra` of a chain on which tracing has stopped.
constexpr int STOPPED = 255;

OTT_BOTH constexpr std::size_t align16(std::size_t n) { return (n + 15) / 16 * 16; }

// Bytes of `n` codes.
OTT_BOTH constexpr int packed_len(int n, int bits) { return n * bits / 8; }

// Offsets, in bytes, of the sections of one kv head's part of a page.
struct PageLayout {
    std::size_t k_codes, k_scale, k_min, v_codes, v_scale, v_min, trace, k_high, k_boosted, head_bytes;

    // group: tokens of a page; outliers: members of the pool in this layer (0 where it does not trace); boosted: key
    // channels with one more bit.
    OTT_BOTH constexpr PageLayout(std::size_t group, std::size_t k_dim, std::size_t v_dim, std::size_t k_bits,
                                  std::size_t v_bits, std::size_t outliers, std::size_t boosted)
        : k_codes(0),
          k_scale(align16(k_dim * group * k_bits / 8)),
          k_min(align16(k_scale + 2 * k_dim)),
          v_codes(align16(k_min + 2 * k_dim)),
          v_scale(align16(v_codes + group * v_dim * v_bits / 8)),
          v_min(align16(v_scale + 2 * group * ((v_dim + V_GROUP - 1) / V_GROUP))),
          trace(align16(v_min + 2 * group * ((v_dim + V_GROUP - 1) / V_GROUP))),
          k_high(align16(trace + (outliers == 0 ? 0 : 5 * outliers + 1))),
          k_boosted(align16(k_high + boosted * group / 8)),
          head_bytes(align16(k_boosted + 2 * boosted)) {}
};

static_assert(PageLayout(128, 64, 64, 2, 2, 3, 0).head_bytes == 4880, "head_dim 64 without third bits");
static_assert(PageLayout(128, 64, 64, 2, 2, 3, 12).head_bytes == 5104, "head_dim 64, defaults");
static_assert(PageLayout(128, 128, 128, 2, 2, 3, 0).head_bytes == 9232, "head_dim 128 without third bits");
static_assert(PageLayout(128, 128, 128, 2, 2, 3, 24).head_bytes == 9664, "head_dim 128, defaults");

}  // namespace ott
