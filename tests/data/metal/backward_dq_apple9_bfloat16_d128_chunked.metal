// Attention, backward over queries: dq, and delta for the other kernel.
//
// delta = rowsum(do o)
// for each tile of keys that the mask lets the block of queries see:
//     s = q k^T scale, masked            outer product
//     p = exp(s - lse)
//     dp = do v^T                        outer product
//     ds = p (dp - delta)
//     dq = dq + ds k                     accumulate
// dq = dq scale
#include <metal_stdlib>
using namespace metal;

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[31]);
    const int p1 = int(sizes[32]);
    return q / 64 == k / 64 || q + p0 >= k || k < p1;
}

[[max_total_threads_per_threadgroup(64)]]
kernel void tilefold_backward_dq(
    device const bfloat* q [[buffer(0)]],
    device const bfloat* k [[buffer(1)]],
    device const bfloat* v [[buffer(2)]],
    device const bfloat* o [[buffer(3)]],
    device const bfloat* dO [[buffer(4)]],
    device const float* lse [[buffer(5)]],
    device float* delta [[buffer(6)]],
    device bfloat* dq [[buffer(7)]],
    device const long* order [[buffer(8)]],
    device const long* run_rows [[buffer(9)]],
    device const long* runs [[buffer(10)]],
    constant long* sizes [[buffer(11)]],
    constant float& scale [[buffer(12)]],
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
    const long do_b = sizes[23];
    const long do_h = sizes[24];
    const int do_n = int(sizes[25]);
    const long dq_b = sizes[27];
    const long dq_h = sizes[28];
    const int dq_n = int(sizes[29]);
    // This lane's place in a fragment of 8x8: one row, two columns.
    const ushort fragment_row = (lane / 2) % 4 + 4 * (lane / 16);
    const ushort fragment_column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
    threadgroup bfloat stage[2560];
    threadgroup bool oddities[2];

    const int h = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);

    // The row of this lane. Lanes past the end read the last one and write nothing.
    const int query = block * 16 + simdgroup * 8 + fragment_row;
    const bool inside = query < len_q;
    const int query_inside = min(query, len_q - 1);
    device const bfloat* q_row = q + b * q_b + h * q_h + long(query_inside) * q_n;
    device const bfloat* o_row = o + b * o_b + h * o_h + long(query_inside) * o_n;
    device const bfloat* do_row = dO + b * do_b + h * do_h + long(query_inside) * do_n;
    device bfloat* dq_row = dq + b * dq_b + h * dq_h + long(query_inside) * dq_n;
    device const bfloat* k_head = k + b * k_b + (h / group) * k_h;
    device const bfloat* v_head = v + b * v_b + (h / group) * v_h;
    const long row = (long(b) * heads_q + h) * len_q + query_inside;

    // delta = rowsum(do o)
    float row_delta = 0.0f;
    for (ushort d = 0; d < 128; d += 8) {
        #pragma clang loop unroll(full)
        for (ushort e = 0; e < 2; ++e) {
            const ushort column = d + fragment_column + e;
            row_delta += float(do_row[column]) * float(o_row[column]);
        }
    }
    row_delta = row_delta + simd_shuffle_xor(row_delta, 1);
    row_delta = row_delta + simd_shuffle_xor(row_delta, 8);
    if (inside && fragment_column == 0) {
        delta[row] = row_delta;
    }

    const float factor = scale;
    const float base = isinf(lse[row]) ? 0.0f : lse[row];

    simdgroup_matrix<bfloat, 8, 8> q_held[16];
    #pragma clang loop unroll(full)
    for (ushort d = 0; d < 128; d += 8) {
        q_held[d / 8].thread_elements()[0] = q_row[d + fragment_column];
        q_held[d / 8].thread_elements()[1] = q_row[d + fragment_column + 1];
    }
    simdgroup_matrix<float, 8, 8> dq_sum[16];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 16; ++i) {
        dq_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    const long visited = b * row_b + h * row_h + block;
    for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
        const int first = int(runs[3 * run]);
        const int last = int(runs[3 * run + 1]);
        const bool masked = runs[3 * run + 2] != 0;
        for (int start = first; start < last; start += 64) {
            const bool edge = masked || start + 64 > last;
            device const bfloat* k_tile = k_head + long(start) * k_n;
            device const bfloat* v_tile = v_head + long(start) * v_n;
            // s = q k^T
            simdgroup_matrix<float, 8, 8> s[8];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 8; ++i) {
                s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 128; d0 += 32) {
                if (!edge) {
                    device const bfloat* lane_of_k = k_tile + fragment_column * k_n + fragment_row;
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<bfloat, 8, 8> x;
                            x.thread_elements()[0] = lane_of_k[j * k_n + d0 + d];
                            x.thread_elements()[1] = lane_of_k[(j + 1) * k_n + d0 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 2048; i += 64) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const bfloat x = start + r < last ? k_tile[r * k_n + d0 + d] : bfloat(0);
                        stage[r * 40 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<bfloat, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 40 + fragment_row + j * 40 + d];
                            x.thread_elements()[1] = stage[fragment_column * 40 + fragment_row + (j + 1) * 40 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                }
            }
            // p = exp(s - lse)
            if (edge) {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 64; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        const int key = start + j + fragment_column + e;
                        const bool seen = key < last && (!masked || visible(b, h, query_inside, key, sizes));
                        s[j / 8].thread_elements()[e] = seen ? fast::exp2(fma(x, factor, -base) * M_LOG2E_F) : -0.0f;
                    }
                }
            } else {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 64; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        s[j / 8].thread_elements()[e] = fast::exp2(fma(x, factor, -base) * M_LOG2E_F);
                    }
                }
            }
            // dp = do v^T
            simdgroup_matrix<float, 8, 8> dp[8];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 8; ++i) {
                dp[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            for (ushort d0 = 0; d0 < 128; d0 += 32) {
                if (!edge) {
                    device const bfloat* lane_of_v = v_tile + fragment_column * v_n + fragment_row;
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        simdgroup_matrix<bfloat, 8, 8> a;
                        a.thread_elements()[0] = do_row[d0 + d + fragment_column];
                        a.thread_elements()[1] = do_row[d0 + d + fragment_column + 1];
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<bfloat, 8, 8> x;
                            x.thread_elements()[0] = lane_of_v[j * v_n + d0 + d];
                            x.thread_elements()[1] = lane_of_v[(j + 1) * v_n + d0 + d];
                            simdgroup_multiply_accumulate(dp[j / 8], a, x, dp[j / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 2048; i += 64) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const bfloat x = start + r < last ? v_tile[r * v_n + d0 + d] : bfloat(0);
                        stage[r * 40 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        simdgroup_matrix<bfloat, 8, 8> a;
                        a.thread_elements()[0] = do_row[d0 + d + fragment_column];
                        a.thread_elements()[1] = do_row[d0 + d + fragment_column + 1];
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<bfloat, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 40 + fragment_row + j * 40 + d];
                            x.thread_elements()[1] = stage[fragment_column * 40 + fragment_row + (j + 1) * 40 + d];
                            simdgroup_multiply_accumulate(dp[j / 8], a, x, dp[j / 8]);
                        }
                    }
                }
            }
            // ds = p (dp - delta)
            #pragma clang loop unroll(full)
            for (ushort j = 0; j < 64; j += 8) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    const float x = dp[j / 8].thread_elements()[e];
                    const float weight = s[j / 8].thread_elements()[e];
                    dp[j / 8].thread_elements()[e] = weight * (x - row_delta);
                }
            }
            if (edge) {
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 64; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = dp[j / 8].thread_elements()[e];
                        const bool hidden = as_type<uint>(s[j / 8].thread_elements()[e]) == 0x80000000u;
                        dp[j / 8].thread_elements()[e] = hidden ? 0.0f : x;
                    }
                }
            }
            simdgroup_matrix<bfloat, 8, 8> ds[8];
            #pragma clang loop unroll(full)
            for (ushort j = 0; j < 64; j += 8) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    const float x = dp[j / 8].thread_elements()[e];
                    ds[j / 8].thread_elements()[e] = bfloat(x);
                }
            }
            // dq = dq + ds k
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 128; d0 += 32) {
                if (!edge) {
                    device const bfloat* lane_of_k = k_tile + fragment_row * k_n + fragment_column;
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 32; d += 8) {
                            simdgroup_matrix<bfloat, 8, 8> x;
                            x.thread_elements()[0] = lane_of_k[j * k_n + d0 + d];
                            x.thread_elements()[1] = lane_of_k[j * k_n + d0 + d + 1];
                            simdgroup_multiply_accumulate(dq_sum[(d0 + d) / 8], ds[j / 8], x, dq_sum[(d0 + d) / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 2048; i += 64) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const bfloat x = start + r < last ? k_tile[r * k_n + d0 + d] : bfloat(0);
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
                        for (ushort j = 0; j < 64; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(ds[j / 8].thread_elements()[1]) : float(ds[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const int key = start + j + c;
                                if (key < last && (!masked || visible(b, h, query_inside, key, sizes))) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 32; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            dq_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 40 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 32; d += 8) {
                                simdgroup_matrix<bfloat, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_row * 40 + fragment_column + j * 40 + d];
                                x.thread_elements()[1] = stage[fragment_row * 40 + fragment_column + j * 40 + d + 1];
                                simdgroup_multiply_accumulate(dq_sum[(d0 + d) / 8], ds[j / 8], x, dq_sum[(d0 + d) / 8]);
                            }
                        }
                    }
                }
            }
        }
    }

    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 128; d += 8) {
            #pragma clang loop unroll(full)
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                dq_row[column] = bfloat(dq_sum[d / 8].thread_elements()[e] * scale);
            }
        }
    }
}
