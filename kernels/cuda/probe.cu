// What the compiler made of the structs that the host hands over and of a page's offsets, for a test to compare.
#include "attend.cuh"

// Every field in the order of its struct, then the sections of the layer's pages. One thread.
extern "C" __global__ void ott_probe(ott::Layer l, const ott::Row* row, ott::Fresh fresh, const ott::Item* item,
                                     ott::Query query, ott::Prompt prompt, uint64_t* out) {
    auto address = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
    for (const void* p : {static_cast<const void*>(l.pages), static_cast<const void*>(l.staging),
                          static_cast<const void*>(l.samples), static_cast<const void*>(l.traced),
                          static_cast<const void*>(l.places), static_cast<const void*>(l.faults)})
        *out++ = address(p);
    for (uint32_t x : {l.kv_heads, l.k_dim, l.v_dim, l.group, l.k_bits, l.v_bits, l.outliers, l.extra, l.clip,
                       l.boosted, l.rotate, l.weigh, l.num_heads, l.number, row->past, row->fresh, row->sealed_before, row->sealed,
                       row->table})
        *out++ = x;
    for (uint32_t x : row->chunk_before) *out++ = x;
    for (uint32_t x : row->chunk) *out++ = x;
    *out++ = address(fresh.data);
    for (int64_t x : {fresh.row, fresh.head, fresh.token}) *out++ = static_cast<uint64_t>(x);
    for (uint32_t x : {item->row, item->window, item->from, item->to}) *out++ = x;
    for (uint32_t x : item->first) *out++ = x;
    *out++ = address(query.q);
    for (int64_t x : {query.row, query.head}) *out++ = static_cast<uint64_t>(x);
    for (const void* p : {static_cast<const void*>(query.out), static_cast<const void*>(query.sums),
                          static_cast<const void*>(query.arrived)})
        *out++ = address(p);
    *out++ = query.num_heads;
    *out++ = __float_as_uint(query.scale);
    *out++ = __float_as_uint(query.softcap);
    for (const ott::Fresh& x : {prompt.q, prompt.k, prompt.v}) {
        *out++ = address(x.data);
        for (int64_t stride : {x.row, x.head, x.token}) *out++ = static_cast<uint64_t>(stride);
    }
    for (const void* p : {static_cast<const void*>(prompt.out), static_cast<const void*>(prompt.sums)}) *out++ = address(p);
    for (uint32_t x : {prompt.tokens, prompt.splits, __float_as_uint(prompt.scale), __float_as_uint(prompt.softcap)})
        *out++ = x;
    for (int x : {ott::PARTIAL, ott::TILE_QUERIES, ott::CLEAR_QUERIES}) *out++ = x;
    const ott::PageLayout layout = ott::page_layout(l);
    for (size_t x : {layout.k_codes, layout.k_scale, layout.k_min, layout.v_codes, layout.v_scale, layout.v_min,
                     layout.trace, layout.k_high, layout.k_boosted, layout.head_bytes})
        *out++ = x;
}
