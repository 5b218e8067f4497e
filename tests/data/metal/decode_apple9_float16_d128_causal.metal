// Attention of few queries: what one split of the keys adds to o and lse.
//
// rows: the queries of all heads that read a key head, 8 at a time
// for each tile of keys of this split:
//     s = q k^T scale, masked            outer product
//     m' = max(m, rowmax s)
//     p = exp(s - m')
//     l = l exp(m - m') + rowsum p
//     o = o exp(m - m') + p v            accumulate
// leave o, m and l of the split
#include <metal_stdlib>
using namespace metal;

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[19]);
    return q + p0 >= k;
}

[[max_total_threads_per_threadgroup(64)]]
kernel void tilefold_decode(
    device const half* q [[buffer(0)]],
    device const half* k [[buffer(1)]],
    device const half* v [[buffer(2)]],
    device float* part_o [[buffer(3)]],
    device float* part_m [[buffer(4)]],
    device float* part_l [[buffer(5)]],
    device const long* order [[buffer(6)]],
    device const long* run_rows [[buffer(7)]],
    device const long* runs [[buffer(8)]],
    constant long* sizes [[buffer(9)]],
    constant float& scale [[buffer(10)]],
    uint3 place [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]]) {
    const int len_q = int(sizes[0]);
    const int heads_q = int(sizes[2]);
    const int group = int(sizes[3]);
    const long row_b = sizes[4];
    const long row_h = sizes[5];
    const int splits = int(sizes[6]);
    const long q_b = sizes[7];
    const long q_h = sizes[8];
    const int q_n = int(sizes[9]);
    const long k_b = sizes[11];
    const long k_h = sizes[12];
    const int k_n = int(sizes[13]);
    const long v_b = sizes[15];
    const long v_h = sizes[16];
    const int v_n = int(sizes[17]);
    // This lane's place in a fragment of 8x8: one row, two columns.
    const ushort fragment_row = (lane / 2) % 4 + 4 * (lane / 16);
    const ushort fragment_column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
    threadgroup half stage[1280];
    threadgroup bool oddities[1];

    const int h_kv = int(place.y);
    const int b = int(place.z);
    const int item = int(order[place.x]);
    const int block = item % splits;

    // The row of this lane: a query of one of the heads that read this key head.
    // Lanes past the last row read that one and write nothing.
    const int packed = item / splits * 8 + fragment_row;
    const bool inside = packed < group * len_q;
    const int packed_inside = min(packed, group * len_q - 1);
    const int h = h_kv * group + packed_inside / len_q;
    const int query_inside = packed_inside % len_q;
    device const half* q_row = q + b * q_b + h * q_h + long(query_inside) * q_n;
    device const half* k_head = k + b * k_b + h_kv * k_h;
    device const half* v_head = v + b * v_b + h_kv * v_h;
    const long part = ((long(b) * heads_q + h) * splits + block) * len_q + query_inside;
    device float* o_spill_row = part_o + part * 128;

    simdgroup_matrix<half, 8, 8> q_held[16];
    #pragma clang loop unroll(full)
    for (ushort d = 0; d < 128; d += 8) {
        q_held[d / 8].thread_elements()[0] = q_row[d + fragment_column];
        q_held[d / 8].thread_elements()[1] = q_row[d + fragment_column + 1];
    }
    simdgroup_matrix<float, 8, 8> o_sum[16];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 16; ++i) {
        o_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    const float factor = fabs(scale) * M_LOG2E_F;
    float m = -FLT_MAX;
    float l = 0.0f;
    ushort any = 0;
    const long visited = b * row_b + h_kv * row_h + block;
    for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
        const int first = int(runs[3 * run]);
        const int last = int(runs[3 * run + 1]);
        const bool masked = runs[3 * run + 2] != 0;
        for (int start = first; start < last; start += 32) {
            const bool edge = masked || start + 32 > last;
            device const half* k_tile = k_head + long(start) * k_n;
            device const half* v_tile = v_head + long(start) * v_n;
            // s = q k^T
            simdgroup_matrix<float, 8, 8> s[4];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 4; ++i) {
                s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 128; d0 += 32) {
                if (!edge) {
                    device const half* lane_of_k = k_tile + fragment_column * k_n + fragment_row;
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 32; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = lane_of_k[j * k_n + d0 + d];
                            x.thread_elements()[1] = lane_of_k[(j + 1) * k_n + d0 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 1024; i += 32) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const half x = start + r < last ? k_tile[r * k_n + d0 + d] : half(0);
                        stage[r * 40 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 32; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 40 + fragment_row + j * 40 + d];
                            x.thread_elements()[1] = stage[fragment_column * 40 + fragment_row + (j + 1) * 40 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                }
            }
            // m' = max(m, rowmax s)
            float m_new = m;
            if (edge) {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        const int key = start + j + fragment_column + e;
                        const bool seen = key < last && (!masked || visible(b, h, query_inside, key, sizes));
                        any |= seen;
                        s[j / 8].thread_elements()[e] = seen ? x : -FLT_MAX;
                    }
                }
            } else {
                any = 1;
            }
            #pragma clang loop unroll(full)
            for (ushort j = 0; j < 32; j += 8) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    const float x = s[j / 8].thread_elements()[e];
                    m_new = max(m_new, x);
                }
            }
            m_new = max(m_new, simd_shuffle_xor(m_new, 1));
            m_new = max(m_new, simd_shuffle_xor(m_new, 8));
            // p = exp(s - m'), l = l correction + rowsum p
            const float correction = fast::exp2((m - m_new) * factor);
            m = m_new;
            l *= correction;
            simdgroup_matrix<half, 8, 8> p[4];
            if (edge) {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        const float weight = x == -FLT_MAX ? 0.0f : fast::exp2((x - m) * factor);
                        p[j / 8].thread_elements()[e] = half(weight);
                        l += weight;
                    }
                }
            } else {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        const float weight = fast::exp2((x - m) * factor);
                        p[j / 8].thread_elements()[e] = half(weight);
                        l += weight;
                    }
                }
            }
            // o = o correction + p v
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 16; ++i) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    o_sum[i].thread_elements()[e] *= correction;
                }
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 128; d0 += 32) {
                if (!edge) {
                    device const half* lane_of_v = v_tile + fragment_row * v_n + fragment_column;
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 32; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 32; d += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = lane_of_v[j * v_n + d0 + d];
                            x.thread_elements()[1] = lane_of_v[j * v_n + d0 + d + 1];
                            simdgroup_multiply_accumulate(o_sum[(d0 + d) / 8], p[j / 8], x, o_sum[(d0 + d) / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 1024; i += 32) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const half x = start + r < last ? v_tile[r * v_n + d0 + d] : half(0);
                        stage[r * 40 + d] = x;
                        odd |= (as_type<uint>(float(x)) & 0x7f800000u) == 0x7f800000u;
                    }
                    odd = simd_any(odd);
                    if (lane == 0) {
                        oddities[simdgroup] = odd;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool wild = false;
                    #pragma clang loop unroll(full)
                    for (ushort i = 0; i < 1; ++i) {
                        wild |= oddities[i] && edge;
                    }
                    if (wild) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 32; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(p[j / 8].thread_elements()[1]) : float(p[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const int key = start + j + c;
                                if (key < last && (!masked || visible(b, h, query_inside, key, sizes))) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 32; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            o_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 40 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 32; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 32; d += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_row * 40 + fragment_column + j * 40 + d];
                                x.thread_elements()[1] = stage[fragment_row * 40 + fragment_column + j * 40 + d + 1];
                                simdgroup_multiply_accumulate(o_sum[(d0 + d) / 8], p[j / 8], x, o_sum[(d0 + d) / 8]);
                            }
                        }
                    }
                }
            }
        }
    }

    l = l + simd_shuffle_xor(l, 1);
    l = l + simd_shuffle_xor(l, 8);
    any = any | simd_shuffle_xor(any, 1);
    any = any | simd_shuffle_xor(any, 8);
    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 128; d += 8) {
            #pragma clang loop unroll(full)
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                o_spill_row[column] = o_sum[d / 8].thread_elements()[e];
            }
        }
    }
    if (inside && fragment_column == 0) {
        part_m[part] = m;
        // No sum is negative: a row that saw no key says so, and leaves no o to read.
        part_l[part] = any ? l : -1.0f;
    }
}
