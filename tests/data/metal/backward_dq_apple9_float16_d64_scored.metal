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
    return q + p0 >= k;
}

struct Modified {
    float score;
    float slope;
};

static inline Modified modified(const float s, const int b, const int h, const int q, const int k,
                                constant long* sizes, device const half* t0) {
    const float p1 = as_type<float>(uint(sizes[32]));
    const float p2 = as_type<float>(uint(sizes[33]));
    const int p3 = int(sizes[34]);
    const int p4 = int(sizes[35]);
    const float p5 = as_type<float>(uint(sizes[36]));
    const int p6 = int(sizes[37]);
    const float p7 = as_type<float>(uint(sizes[38]));
    const float p8 = as_type<float>(uint(sizes[39]));
    const float real0 = precise::tanh(s * p1);
    const float real1 = float(t0[h * sizes[40] + p3 * sizes[41] + k * sizes[42]]);
    const float real2 = exp(float(h + p4) * p5) * float(abs(k - q - p6));
    return {real0 * p2 + real1 - real2, p7 * (1.0f - real0 * real0) * p8};
}

// -inf hides a pair. By its bits: fast mathematics take no number for infinite.
static inline bool hides(const float score) {
    return as_type<uint>(score) == 0xff800000u;
}

[[max_total_threads_per_threadgroup(64)]]
kernel void tilefold_backward_dq(
    device const half* q [[buffer(0)]],
    device const half* k [[buffer(1)]],
    device const half* v [[buffer(2)]],
    device const half* o [[buffer(3)]],
    device const half* dO [[buffer(4)]],
    device const float* lse [[buffer(5)]],
    device float* delta [[buffer(6)]],
    device half* dq [[buffer(7)]],
    device const half* t0 [[buffer(8)]],
    device const long* order [[buffer(9)]],
    device const long* run_rows [[buffer(10)]],
    device const long* runs [[buffer(11)]],
    constant long* sizes [[buffer(12)]],
    constant float& scale [[buffer(13)]],
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
    threadgroup half stage[1024];
    threadgroup bool oddities[2];

    const int h = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);

    // The row of this lane. Lanes past the end read the last one and write nothing.
    const int query = block * 16 + simdgroup * 8 + fragment_row;
    const bool inside = query < len_q;
    const int query_inside = min(query, len_q - 1);
    device const half* q_row = q + b * q_b + h * q_h + long(query_inside) * q_n;
    device const half* o_row = o + b * o_b + h * o_h + long(query_inside) * o_n;
    device const half* do_row = dO + b * do_b + h * do_h + long(query_inside) * do_n;
    device half* dq_row = dq + b * dq_b + h * dq_h + long(query_inside) * dq_n;
    device const half* k_head = k + b * k_b + (h / group) * k_h;
    device const half* v_head = v + b * v_b + (h / group) * v_h;
    const long row = (long(b) * heads_q + h) * len_q + query_inside;

    // delta = rowsum(do o)
    float row_delta = 0.0f;
    for (ushort d = 0; d < 64; d += 8) {
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

    const float base = isinf(lse[row]) ? 0.0f : lse[row];

    simdgroup_matrix<half, 8, 8> q_held[8];
    #pragma clang loop unroll(full)
    for (ushort d = 0; d < 64; d += 8) {
        q_held[d / 8].thread_elements()[0] = q_row[d + fragment_column];
        q_held[d / 8].thread_elements()[1] = q_row[d + fragment_column + 1];
    }
    simdgroup_matrix<half, 8, 8> do_held[8];
    #pragma clang loop unroll(full)
    for (ushort d = 0; d < 64; d += 8) {
        do_held[d / 8].thread_elements()[0] = do_row[d + fragment_column];
        do_held[d / 8].thread_elements()[1] = do_row[d + fragment_column + 1];
    }
    simdgroup_matrix<float, 8, 8> dq_sum[8];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 8; ++i) {
        dq_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    const long visited = b * row_b + h * row_h + block;
    for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
        const int first = int(runs[3 * run]);
        const int last = int(runs[3 * run + 1]);
        const bool masked = runs[3 * run + 2] != 0;
        for (int start = first; start < last; start += 64) {
            bool edge = masked || start + 64 > last;
            device const half* k_tile = k_head + long(start) * k_n;
            device const half* v_tile = v_head + long(start) * v_n;
            // s = q k^T
            simdgroup_matrix<float, 8, 8> s[8];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 8; ++i) {
                s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 64; d0 += 8) {
                if (!edge) {
                    device const half* lane_of_k = k_tile + fragment_column * k_n + fragment_row;
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 8; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = lane_of_k[j * k_n + d0 + d];
                            x.thread_elements()[1] = lane_of_k[(j + 1) * k_n + d0 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 512; i += 64) {
                        const ushort r = i / 8;
                        const ushort d = i % 8;
                        const half x = start + r < last ? k_tile[r * k_n + d0 + d] : half(0);
                        stage[r * 16 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 8; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 16 + fragment_row + j * 16 + d];
                            x.thread_elements()[1] = stage[fragment_column * 16 + fragment_row + (j + 1) * 16 + d];
                            simdgroup_multiply_accumulate(s[j / 8], q_held[(d0 + d) / 8], x, s[j / 8]);
                        }
                    }
                }
            }
            // dp = do v^T
            simdgroup_matrix<float, 8, 8> dp[8];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 8; ++i) {
                dp[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 64; d0 += 8) {
                if (!edge) {
                    device const half* lane_of_v = v_tile + fragment_column * v_n + fragment_row;
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 8; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = lane_of_v[j * v_n + d0 + d];
                            x.thread_elements()[1] = lane_of_v[(j + 1) * v_n + d0 + d];
                            simdgroup_multiply_accumulate(dp[j / 8], do_held[(d0 + d) / 8], x, dp[j / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 512; i += 64) {
                        const ushort r = i / 8;
                        const ushort d = i % 8;
                        const half x = start + r < last ? v_tile[r * v_n + d0 + d] : half(0);
                        stage[r * 16 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 8; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            simdgroup_matrix<half, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 16 + fragment_row + j * 16 + d];
                            x.thread_elements()[1] = stage[fragment_column * 16 + fragment_row + (j + 1) * 16 + d];
                            simdgroup_multiply_accumulate(dp[j / 8], do_held[(d0 + d) / 8], x, dp[j / 8]);
                        }
                    }
                }
            }
            // A score may hide pairs of any tile.
            edge = true;
            // p = exp(modified(s) - lse), ds = p (dp - delta), changed by the modification
            #pragma clang loop unroll(full)
            for (ushort j = 0; j < 64; j += 8) {
                #pragma clang loop unroll(full)
                for (ushort e = 0; e < 2; ++e) {
                    const float x = dp[j / 8].thread_elements()[e];
                    const int key = start + j + fragment_column + e;
                    const int key_inside = min(key, last - 1);
                    const Modified changed = modified(s[j / 8].thread_elements()[e] * scale, b, h, query_inside, key_inside, sizes, t0);
                    const float score = changed.score;
                    const bool seen = key < last && (!masked || visible(b, h, query_inside, key, sizes)) && !hides(score);
                    const float weight = fast::exp2((score - base) * M_LOG2E_F);
                    s[j / 8].thread_elements()[e] = seen ? weight : -0.0f;
                    dp[j / 8].thread_elements()[e] = seen ? weight * (x - row_delta) * changed.slope : 0.0f;
                }
            }
            // dq = dq + dp k
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 64; d0 += 8) {
                if (!edge) {
                    device const half* lane_of_k = k_tile + fragment_row * k_n + fragment_column;
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 8; d += 8) {
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = float(lane_of_k[j * k_n + d0 + d]);
                            x.thread_elements()[1] = float(lane_of_k[j * k_n + d0 + d + 1]);
                            simdgroup_multiply_accumulate(dq_sum[(d0 + d) / 8], dp[j / 8], x, dq_sum[(d0 + d) / 8]);
                        }
                    }
                } else {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 512; i += 64) {
                        const ushort r = i / 8;
                        const ushort d = i % 8;
                        const half x = start + r < last ? k_tile[r * k_n + d0 + d] : half(0);
                        stage[r * 16 + d] = x;
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
                                const float held = c % 2 ? float(dp[j / 8].thread_elements()[1]) : float(dp[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const float scored = c % 2 ? float(s[j / 8].thread_elements()[1]) : float(s[j / 8].thread_elements()[0]);
                                const float score = simd_shuffle(scored, holder);
                                if (!(as_type<uint>(score) == 0x80000000u)) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 8; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            dq_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 16 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 64; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 8; d += 8) {
                                simdgroup_matrix<float, 8, 8> x;
                                x.thread_elements()[0] = float(stage[fragment_row * 16 + fragment_column + j * 16 + d]);
                                x.thread_elements()[1] = float(stage[fragment_row * 16 + fragment_column + j * 16 + d + 1]);
                                simdgroup_multiply_accumulate(dq_sum[(d0 + d) / 8], dp[j / 8], x, dq_sum[(d0 + d) / 8]);
                            }
                        }
                    }
                }
            }
        }
    }

    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 64; d += 8) {
            #pragma clang loop unroll(full)
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                dq_row[column] = half(dq_sum[d / 8].thread_elements()[e] * scale);
            }
        }
    }
}
