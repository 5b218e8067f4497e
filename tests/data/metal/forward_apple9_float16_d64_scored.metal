// Attention, forward: o = softmax(scale q k^T) v and lse = log rowsum exp(scale q k^T).
//
// for each tile of keys that the mask lets the block of queries see:
//     s = q k^T scale, masked            outer product
//     m' = max(m, rowmax s)
//     p = exp(s - m')
//     l = l exp(m - m') + rowsum p
//     o = o exp(m - m') + p v            accumulate
// o = o / l
// lse = m + log l                        0 and -inf where no key is seen
#include <metal_stdlib>
using namespace metal;

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[23]);
    return q + p0 >= k;
}

static inline float modified(const float s, const int b, const int h, const int q, const int k,
                             constant long* sizes, device const half* t0) {
    const float p1 = as_type<float>(uint(sizes[24]));
    const float p2 = as_type<float>(uint(sizes[25]));
    const int p3 = int(sizes[26]);
    const int p4 = int(sizes[27]);
    const float p5 = as_type<float>(uint(sizes[28]));
    const int p6 = int(sizes[29]);
    const float real0 = float(t0[h * sizes[30] + p3 * sizes[31] + k * sizes[32]]);
    const float real1 = exp(float(h + p4) * p5) * float(abs(k - q - p6));
    return precise::tanh(s * p1) * p2 + real0 - real1;
}

// -inf hides a pair. By its bits: fast mathematics take no number for infinite.
static inline bool hides(const float score) {
    return as_type<uint>(score) == 0xff800000u;
}

[[max_total_threads_per_threadgroup(64)]]
kernel void tilefold_forward(
    device const half* q [[buffer(0)]],
    device const half* k [[buffer(1)]],
    device const half* v [[buffer(2)]],
    device half* o [[buffer(3)]],
    device float* lse [[buffer(4)]],
    device const half* t0 [[buffer(5)]],
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
    const long q_b = sizes[7];
    const long q_h = sizes[8];
    const int q_n = int(sizes[9]);
    const long k_b = sizes[11];
    const long k_h = sizes[12];
    const int k_n = int(sizes[13]);
    const long v_b = sizes[15];
    const long v_h = sizes[16];
    const int v_n = int(sizes[17]);
    const long o_b = sizes[19];
    const long o_h = sizes[20];
    const int o_n = int(sizes[21]);
    // This lane's place in a fragment of 8x8: one row, two columns.
    const ushort fragment_row = (lane / 2) % 4 + 4 * (lane / 16);
    const ushort fragment_column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
    threadgroup half stage[5120];
    threadgroup bool oddities[2];

    const int h = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);

    // The row of this lane. Lanes past the end read the last one and write nothing.
    const int query = block * 16 + simdgroup * 8 + fragment_row;
    const bool inside = query < len_q;
    const int query_inside = min(query, len_q - 1);
    device const half* q_row = q + b * q_b + h * q_h + long(query_inside) * q_n;
    device half* o_row = o + b * o_b + h * o_h + long(query_inside) * o_n;
    device const half* k_head = k + b * k_b + (h / group) * k_h;
    device const half* v_head = v + b * v_b + (h / group) * v_h;
    const long row = (long(b) * heads_q + h) * len_q + query_inside;

    simdgroup_matrix<half, 8, 8> q_held[8];
    #pragma clang loop unroll(full)
    for (ushort d = 0; d < 64; d += 8) {
        q_held[d / 8].thread_elements()[0] = q_row[d + fragment_column];
        q_held[d / 8].thread_elements()[1] = q_row[d + fragment_column + 1];
    }
    simdgroup_matrix<float, 8, 8> o_sum[8];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 8; ++i) {
        o_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    const float factor = M_LOG2E_F;
    float m = -FLT_MAX;
    float l = 0.0f;
    ushort any = 0;
    const long visited = b * row_b + h * row_h + block;
    for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
        const int first = int(runs[3 * run]);
        const int last = int(runs[3 * run + 1]);
        const bool masked = runs[3 * run + 2] != 0;
        for (int start = first; start < last; start += 128) {
            bool edge = masked || start + 128 > last;
            device const half* k_tile = k_head + long(start) * k_n;
            device const half* v_tile = v_head + long(start) * v_n;
            // s = q k^T
            simdgroup_matrix<float, 8, 8> s[16];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 16; ++i) {
                s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 64; d0 += 32) {
                if (!edge) {
                    device const half* lane_of_k = k_tile + fragment_column * k_n + fragment_row;
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 128; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = lane_of_k[j * k_n + d0 + d];
                            x.thread_elements()[1] = lane_of_k[(j + 1) * k_n + d0 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 4096; i += 64) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const half x = start + r < last ? k_tile[r * k_n + d0 + d] : half(0);
                        stage[r * 40 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 128; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 40 + fragment_row + j * 40 + d];
                            x.thread_elements()[1] = stage[fragment_column * 40 + fragment_row + (j + 1) * 40 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                }
            }
            // A score may hide pairs of any tile.
            edge = true;
            // s = modified(s)
            #pragma clang loop unroll(full)
            for (ushort j = 0; j < 128; j += 8) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    const float x = s[j / 8].thread_elements()[e];
                    const int key = min(start + j + fragment_column + e, last - 1);
                    s[j / 8].thread_elements()[e] = modified(x * scale, b, h, query_inside, key, sizes, t0);
                }
            }
            // m' = max(m, rowmax s)
            float m_new = m;
            if (edge) {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 128; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        const int key = start + j + fragment_column + e;
                        const bool seen = key < last && (!masked || visible(b, h, query_inside, key, sizes)) && !hides(x);
                        any |= seen;
                        s[j / 8].thread_elements()[e] = seen ? x : -FLT_MAX;
                    }
                }
            } else {
                any = 1;
            }
            #pragma clang loop unroll(full)
            for (ushort j = 0; j < 128; j += 8) {
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
            simdgroup_matrix<half, 8, 8> p[16];
            if (edge) {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 128; j += 8) {
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
                for (ushort j = 0; j < 128; j += 8) {
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
            for (ushort i = 0; i < 8; ++i) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    o_sum[i].thread_elements()[e] *= correction;
                }
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 64; d0 += 32) {
                if (!edge) {
                    device const half* lane_of_v = v_tile + fragment_row * v_n + fragment_column;
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 128; j += 8) {
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
                    for (ushort i = thread_index; i < 4096; i += 64) {
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
                    for (ushort i = 0; i < 2; ++i) {
                        wild |= oddities[i] && edge;
                    }
                    if (wild) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 128; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(p[j / 8].thread_elements()[1]) : float(p[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const float scored = c % 2 ? float(s[j / 8].thread_elements()[1]) : float(s[j / 8].thread_elements()[0]);
                                const float score = simd_shuffle(scored, holder);
                                if (!(score == -FLT_MAX)) {
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
                        for (ushort j = 0; j < 128; j += 8) {
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
    const float inverse = any ? 1.0f / l : 0.0f;
    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 64; d += 8) {
            #pragma clang loop unroll(full)
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                o_row[column] = half(o_sum[d / 8].thread_elements()[e] * inverse);
            }
        }
    }
    if (inside && fragment_column == 0) {
        const float sum = l > 0.0f ? m + log(l) : l / l;
        lse[row] = any ? sum : -INFINITY;
    }
}
