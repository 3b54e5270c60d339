// Numbers of a page, one at a time, as every kernel reads them that does not multiply with codes: a code times its scale,
// plus its min, in binary32, rounded to the activation dtype.
#pragma once
#include "cache.cuh"

namespace ott {

// The place of the token at slot `t` of a page if it is traced, or NONE.
__device__ inline uint32_t traced_place(const Layer& l, const PageLayout& layout, const uint8_t* page, uint32_t block,
                                        int head, int t) {
    const uint8_t* slots = page + layout.trace + 4 * l.outliers;
    for (uint32_t i = 0; i < l.outliers; ++i)
        if (slots[i] == t) return l.places[(static_cast<size_t>(block) * l.kv_heads + head) * l.outliers + i];
    return NONE;
}

// Channel `c` of the key at slot `t`; `boosted`: its row of high bits, or any number that is none.
template <class E>
__device__ inline E stored_key(const Layer& l, const PageLayout& layout, const uint8_t* page, int t, int c,
                               uint32_t boosted) {
    const int group = l.group;
    const uint8_t* codes = page + layout.k_codes + c * packed_len(group, l.k_bits);
    const float code = static_cast<float>(code_at(codes, group, l.k_bits, t));
    const float scale = half_at(page + layout.k_scale, c);
    float x = __fadd_rn(__fmul_rn(code, scale), half_at(page + layout.k_min, c));
    if (boosted < l.boosted) {
        const uint32_t bit = bit_at(page + layout.k_high + boosted * packed_len(group, 1), group, t);
        x = __fadd_rn(x, __fmul_rn(static_cast<float>(bit), __fmul_rn(static_cast<float>(1 << l.k_bits), scale)));
    }
    return from_float<E>(x);
}

// Channel `c` of the value at slot `t`, in the basis in which it is kept.
template <class E>
__device__ inline E stored_value(const Layer& l, const PageLayout& layout, const uint8_t* page, int t, int c) {
    const int group = l.group, vg = c / V_GROUP, width = min(V_GROUP, static_cast<int>(l.v_dim) - vg * V_GROUP);
    const uint8_t* codes = page + layout.v_codes + t * packed_len(l.v_dim, l.v_bits) + packed_len(vg * V_GROUP, l.v_bits);
    const float code = static_cast<float>(code_at(codes, width, l.v_bits, c - vg * V_GROUP));
    return from_float<E>(__fadd_rn(__fmul_rn(code, half_at(page + layout.v_scale, vg * group + t)),
                                   half_at(page + layout.v_min, vg * group + t)));
}

}  // namespace ott
