// Attention of few queries: o and lse from the parts of all splits.
//
// for each query, one simdgroup, its lanes along the head dimension:
//     M = max of m                       over the splits that saw a key
//     L = sum of exp(m - M) l            in ascending order
//     o = sum of exp(m - M) o / L
//     lse = M + log L                    0 and -inf where no key is seen
#include <metal_stdlib>
using namespace metal;

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

[[max_total_threads_per_threadgroup(64)]]
kernel void tilefold_merge(
    device const float* part_o [[buffer(0)]],
    device const float* part_m [[buffer(1)]],
    device const float* part_l [[buffer(2)]],
    device half* o [[buffer(3)]],
    device float* lse [[buffer(4)]],
    constant long* sizes [[buffer(5)]],
    constant float& scale [[buffer(6)]],
    uint3 place [[threadgroup_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) {
    const int len_q = int(sizes[0]);
    const int heads_q = int(sizes[2]);
    const int splits = int(sizes[6]);
    const long o_b = sizes[7];
    const long o_h = sizes[8];
    const int o_n = int(sizes[9]);

    const int query = int(place.x);
    const int h = int(place.y);
    const int b = int(place.z);
    device half* o_row = o + b * o_b + h * o_h + long(query) * o_n;
    const long row = long(b) * heads_q + h;
    // The parts of one query lie a step of len_q apart.
    const long first = row * splits * len_q + query;
    const long end = first + long(splits) * len_q;

    const float factor = fabs(scale) * M_LOG2E_F;
    float m = -FLT_MAX;
    bool any = false;
    for (long i = first + long(lane) * len_q; i < end; i += long(32) * len_q) {
        const bool seen = !(part_l[i] < 0.0f);
        any |= seen;
        m = seen ? max(m, part_m[i]) : m;
    }
    any = simd_any(any);
    m = simd_max(m);
    float l = 0.0f;
    for (long i = first; i < end; i += len_q) {
        l += part_l[i] < 0.0f ? 0.0f : part_l[i] * fast::exp2((part_m[i] - m) * factor);
    }
    const float inverse = any ? 1.0f / l : 0.0f;

    for (ushort d = lane; d < 128; d += 32) {
        float sum = 0.0f;
        for (long i = first; i < end; i += len_q) {
            sum += part_l[i] < 0.0f ? 0.0f : fast::exp2((part_m[i] - m) * factor) * part_o[i * 128 + d];
        }
        o_row[d] = half(sum * inverse);
    }
    if (lane == 0) {
        const float sum = l > 0.0f ? fma(m, fabs(scale), log(l)) : l / l;
        lse[row * len_q + query] = any ? sum : -INFINITY;
    }
}
