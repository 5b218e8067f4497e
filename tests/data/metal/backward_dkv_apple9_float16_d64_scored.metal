// Attention, backward over keys: dk and dv.
//
// for each query head that reads the key head, and each tile of queries that see the block of keys:
//     s = k q^T scale, masked            outer product (everything is transposed)
//     p = exp(s - lse)
//     dv = dv + p do                     accumulate
//     dp = v do^T                        outer product
//     ds = p (dp - delta)
//     dk = dk + ds q                     accumulate
// dk = dk scale
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
kernel void tilefold_backward_dkv(
    device const half* q [[buffer(0)]],
    device const half* k [[buffer(1)]],
    device const half* v [[buffer(2)]],
    device const half* dO [[buffer(3)]],
    device const float* lse [[buffer(4)]],
    device const float* delta [[buffer(5)]],
    device half* dk [[buffer(6)]],
    device half* dv [[buffer(7)]],
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
    const int len_k = int(sizes[1]);
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
    const long do_b = sizes[19];
    const long do_h = sizes[20];
    const int do_n = int(sizes[21]);
    const long dk_b = sizes[23];
    const long dk_h = sizes[24];
    const int dk_n = int(sizes[25]);
    const long dv_b = sizes[27];
    const long dv_h = sizes[28];
    const int dv_n = int(sizes[29]);
    // This lane's place in a fragment of 8x8: one row, two columns.
    const ushort fragment_row = (lane / 2) % 4 + 4 * (lane / 16);
    const ushort fragment_column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
    threadgroup half stage[768];
    threadgroup bool oddities[2];

    const int h_kv = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);

    // The row of this lane. Lanes past the end read the last one and write nothing.
    const int key = block * 16 + simdgroup * 8 + fragment_row;
    const bool inside = key < len_k;
    const int key_inside = min(key, len_k - 1);
    device const half* k_row = k + b * k_b + h_kv * k_h + long(key_inside) * k_n;
    device const half* v_row = v + b * v_b + h_kv * v_h + long(key_inside) * v_n;
    device half* dk_row = dk + b * dk_b + h_kv * dk_h + long(key_inside) * dk_n;
    device half* dv_row = dv + b * dv_b + h_kv * dv_h + long(key_inside) * dv_n;

    simdgroup_matrix<half, 8, 8> v_held[8];
    #pragma clang loop unroll(full)
    for (ushort d = 0; d < 64; d += 8) {
        v_held[d / 8].thread_elements()[0] = v_row[d + fragment_column];
        v_held[d / 8].thread_elements()[1] = v_row[d + fragment_column + 1];
    }
    simdgroup_matrix<float, 8, 8> dv_sum[8];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 8; ++i) {
        dv_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    simdgroup_matrix<float, 8, 8> dk_sum[8];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 8; ++i) {
        dk_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        device const half* q_head = q + b * q_b + h * q_h;
        device const half* do_head = dO + b * do_b + h * do_h;
        const long rows = (long(b) * heads_q + h) * len_q;
        const long visited = b * row_b + h * row_h + block;
        for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
            const int first = int(runs[3 * run]);
            const int last = int(runs[3 * run + 1]);
            const bool masked = runs[3 * run + 2] != 0;
            for (int start = first; start < last; start += 32) {
                bool edge = masked || start + 32 > last;
                device const half* q_tile = q_head + long(start) * q_n;
                device const half* do_tile = do_head + long(start) * do_n;
                // s = k q^T
                simdgroup_matrix<float, 8, 8> s[4];
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < 4; ++i) {
                    s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
                }
                for (ushort d0 = 0; d0 < 64; d0 += 16) {
                    if (!edge) {
                        device const half* lane_of_q = q_tile + fragment_column * q_n + fragment_row;
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 16; d += 8) {
                            simdgroup_matrix<half, 8, 8> a;
                            a.thread_elements()[0] = k_row[d0 + d + fragment_column];
                            a.thread_elements()[1] = k_row[d0 + d + fragment_column + 1];
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = lane_of_q[j * q_n + d0 + d];
                                x.thread_elements()[1] = lane_of_q[(j + 1) * q_n + d0 + d];
                                simdgroup_multiply_accumulate(s[j / 8], a, x, s[j / 8]);
                            }
                        }
                    } else {
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        for (ushort i = thread_index; i < 512; i += 64) {
                            const ushort r = i / 16;
                            const ushort d = i % 16;
                            const half x = start + r < last ? q_tile[r * q_n + d0 + d] : half(0);
                            stage[r * 24 + d] = x;
                        }
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 16; d += 8) {
                            simdgroup_matrix<half, 8, 8> a;
                            a.thread_elements()[0] = k_row[d0 + d + fragment_column];
                            a.thread_elements()[1] = k_row[d0 + d + fragment_column + 1];
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_column * 24 + fragment_row + j * 24 + d];
                                x.thread_elements()[1] = stage[fragment_column * 24 + fragment_row + (j + 1) * 24 + d];
                                simdgroup_multiply_accumulate(s[j / 8], a, x, s[j / 8]);
                            }
                        }
                    }
                }
                // dp = v do^T
                simdgroup_matrix<float, 8, 8> dp[4];
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < 4; ++i) {
                    dp[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
                }
                #pragma clang loop unroll(full)
                for (ushort d0 = 0; d0 < 64; d0 += 16) {
                    if (!edge) {
                        device const half* lane_of_do = do_tile + fragment_column * do_n + fragment_row;
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 16; d += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = lane_of_do[j * do_n + d0 + d];
                                x.thread_elements()[1] = lane_of_do[(j + 1) * do_n + d0 + d];
                                simdgroup_multiply_accumulate(dp[j / 8], v_held[(d0 + d) / 8], x, dp[j / 8]);
                            }
                        }
                    } else {
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        for (ushort i = thread_index; i < 512; i += 64) {
                            const ushort r = i / 16;
                            const ushort d = i % 16;
                            const half x = start + r < last ? do_tile[r * do_n + d0 + d] : half(0);
                            stage[r * 24 + d] = x;
                        }
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 16; d += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_column * 24 + fragment_row + j * 24 + d];
                                x.thread_elements()[1] = stage[fragment_column * 24 + fragment_row + (j + 1) * 24 + d];
                                simdgroup_multiply_accumulate(dp[j / 8], v_held[(d0 + d) / 8], x, dp[j / 8]);
                            }
                        }
                    }
                }
                // A score may hide pairs of any tile.
                edge = true;
                // p = exp(modified(s) - lse), ds = p (dp - delta), changed by the modification
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = dp[j / 8].thread_elements()[e];
                        const long row = rows + min(start + j + fragment_column + e, last - 1);
                        const float base = isinf(lse[row]) ? 0.0f : lse[row];
                        const float row_delta = delta[row];
                        const int query = start + j + fragment_column + e;
                        const int query_inside = min(query, last - 1);
                        const Modified changed = modified(s[j / 8].thread_elements()[e] * scale, b, h, query_inside, key_inside, sizes, t0);
                        const float score = changed.score;
                        const bool seen = query < last && (!masked || visible(b, h, query, key_inside, sizes)) && !hides(score);
                        const float weight = fast::exp2((score - base) * M_LOG2E_F);
                        s[j / 8].thread_elements()[e] = seen ? weight : -0.0f;
                        dp[j / 8].thread_elements()[e] = seen ? weight * (x - row_delta) * changed.slope : 0.0f;
                    }
                }
                simdgroup_matrix<half, 8, 8> p[4];
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = s[j / 8].thread_elements()[e];
                        p[j / 8].thread_elements()[e] = half(x);
                    }
                }
                // dv = dv + p do
                #pragma clang loop unroll(full)
                for (ushort d0 = 0; d0 < 64; d0 += 16) {
                    if (!edge) {
                        device const half* lane_of_do = do_tile + fragment_row * do_n + fragment_column;
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 32; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 16; d += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = lane_of_do[j * do_n + d0 + d];
                                x.thread_elements()[1] = lane_of_do[j * do_n + d0 + d + 1];
                                simdgroup_multiply_accumulate(dv_sum[(d0 + d) / 8], p[j / 8], x, dv_sum[(d0 + d) / 8]);
                            }
                        }
                    } else {
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        bool odd = false;
                        for (ushort i = thread_index; i < 512; i += 64) {
                            const ushort r = i / 16;
                            const ushort d = i % 16;
                            const half x = start + r < last ? do_tile[r * do_n + d0 + d] : half(0);
                            stage[r * 24 + d] = x;
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
                            for (ushort j = 0; j < 32; j += 8) {
                                for (ushort c = 0; c < 8; ++c) {
                                    const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                    const float held = c % 2 ? float(p[j / 8].thread_elements()[1]) : float(p[j / 8].thread_elements()[0]);
                                    const float weight = simd_shuffle(held, holder);
                                    const float scored = c % 2 ? float(s[j / 8].thread_elements()[1]) : float(s[j / 8].thread_elements()[0]);
                                    const float score = simd_shuffle(scored, holder);
                                    if (!(as_type<uint>(score) == 0x80000000u)) {
                                        #pragma clang loop unroll(full)
                                        for (ushort d = 0; d < 16; d += 8) {
                                            #pragma clang loop unroll(full)
                                            for (ushort e = 0; e < 2; ++e) {
                                                dv_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 24 + d + fragment_column + e]);
                                            }
                                        }
                                    }
                                }
                            }
                        } else {
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                #pragma clang loop unroll(full)
                                for (ushort d = 0; d < 16; d += 8) {
                                    simdgroup_matrix<half, 8, 8> x;
                                    x.thread_elements()[0] = stage[fragment_row * 24 + fragment_column + j * 24 + d];
                                    x.thread_elements()[1] = stage[fragment_row * 24 + fragment_column + j * 24 + d + 1];
                                    simdgroup_multiply_accumulate(dv_sum[(d0 + d) / 8], p[j / 8], x, dv_sum[(d0 + d) / 8]);
                                }
                            }
                        }
                    }
                }
                // dk = dk + dp q
                #pragma clang loop unroll(full)
                for (ushort d0 = 0; d0 < 64; d0 += 16) {
                    if (!edge) {
                        device const half* lane_of_q = q_tile + fragment_row * q_n + fragment_column;
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 32; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 16; d += 8) {
                                simdgroup_matrix<float, 8, 8> x;
                                x.thread_elements()[0] = float(lane_of_q[j * q_n + d0 + d]);
                                x.thread_elements()[1] = float(lane_of_q[j * q_n + d0 + d + 1]);
                                simdgroup_multiply_accumulate(dk_sum[(d0 + d) / 8], dp[j / 8], x, dk_sum[(d0 + d) / 8]);
                            }
                        }
                    } else {
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        bool odd = false;
                        for (ushort i = thread_index; i < 512; i += 64) {
                            const ushort r = i / 16;
                            const ushort d = i % 16;
                            const half x = start + r < last ? q_tile[r * q_n + d0 + d] : half(0);
                            stage[r * 24 + d] = x;
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
                            for (ushort j = 0; j < 32; j += 8) {
                                for (ushort c = 0; c < 8; ++c) {
                                    const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                    const float held = c % 2 ? float(dp[j / 8].thread_elements()[1]) : float(dp[j / 8].thread_elements()[0]);
                                    const float weight = simd_shuffle(held, holder);
                                    const float scored = c % 2 ? float(s[j / 8].thread_elements()[1]) : float(s[j / 8].thread_elements()[0]);
                                    const float score = simd_shuffle(scored, holder);
                                    if (!(as_type<uint>(score) == 0x80000000u)) {
                                        #pragma clang loop unroll(full)
                                        for (ushort d = 0; d < 16; d += 8) {
                                            #pragma clang loop unroll(full)
                                            for (ushort e = 0; e < 2; ++e) {
                                                dk_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 24 + d + fragment_column + e]);
                                            }
                                        }
                                    }
                                }
                            }
                        } else {
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                #pragma clang loop unroll(full)
                                for (ushort d = 0; d < 16; d += 8) {
                                    simdgroup_matrix<float, 8, 8> x;
                                    x.thread_elements()[0] = float(stage[fragment_row * 24 + fragment_column + j * 24 + d]);
                                    x.thread_elements()[1] = float(stage[fragment_row * 24 + fragment_column + j * 24 + d + 1]);
                                    simdgroup_multiply_accumulate(dk_sum[(d0 + d) / 8], dp[j / 8], x, dk_sum[(d0 + d) / 8]);
                                }
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
                dv_row[column] = half(dv_sum[d / 8].thread_elements()[e] * 1.0f);
            }
        }
    }
    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 64; d += 8) {
            #pragma clang loop unroll(full)
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                dk_row[column] = half(dk_sum[d / 8].thread_elements()[e] * scale);
            }
        }
    }
}
