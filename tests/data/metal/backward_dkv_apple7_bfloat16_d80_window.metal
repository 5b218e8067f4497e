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

// bfloat16 is the upper half of a float. GPUs before Apple9 emulate it, slower than this.
static inline float widen(const ushort bits) {
    return as_type<float>(uint(bits) << 16);
}

// To the nearest, ties to even; a NaN stays one.
static inline ushort narrow(const float x) {
    const uint bits = as_type<uint>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return ushort((bits >> 16) | 0x40u);
    }
    return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[31]);
    const int p1 = int(sizes[32]);
    const int p2 = int(sizes[33]);
    return q + p0 >= k && abs(q + p1 - k) < p2;
}

[[max_total_threads_per_threadgroup(128)]]
kernel void tilefold_backward_dkv(
    device const ushort* q [[buffer(0)]],
    device const ushort* k [[buffer(1)]],
    device const ushort* v [[buffer(2)]],
    device const ushort* dO [[buffer(3)]],
    device const float* lse [[buffer(4)]],
    device const float* delta [[buffer(5)]],
    device ushort* dk [[buffer(6)]],
    device ushort* dv [[buffer(7)]],
    device float* dk_spill [[buffer(8)]],
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
    threadgroup float stage[1728];
    threadgroup bool oddities[4];

    const int h_kv = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);

    // The row of this lane. Lanes past the end read the last one and write nothing.
    const int key = block * 32 + simdgroup * 8 + fragment_row;
    const bool inside = key < len_k;
    const int key_inside = min(key, len_k - 1);
    device const ushort* k_row = k + b * k_b + h_kv * k_h + long(key_inside) * k_n;
    device const ushort* v_row = v + b * v_b + h_kv * v_h + long(key_inside) * v_n;
    device ushort* dk_row = dk + b * dk_b + h_kv * dk_h + long(key_inside) * dk_n;
    device ushort* dv_row = dv + b * dv_b + h_kv * dv_h + long(key_inside) * dv_n;
    device float* dk_spill_row = dk_spill + ((long(b) * (heads_q / group) + h_kv) * len_k + key_inside) * 80;

    const float factor = scale;
    simdgroup_matrix<float, 8, 8> dv_sum[10];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 10; ++i) {
        dv_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    bool fresh = true;
    for (int h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        device const ushort* q_head = q + b * q_b + h * q_h;
        device const ushort* do_head = dO + b * do_b + h * do_h;
        const long rows = (long(b) * heads_q + h) * len_q;
        const long visited = b * row_b + h * row_h + block;
        for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
            const int first = int(runs[3 * run]);
            const int last = int(runs[3 * run + 1]);
            const bool masked = runs[3 * run + 2] != 0;
            for (int start = first; start < last; start += 48) {
                const bool edge = masked || start + 48 > last;
                device const ushort* q_tile = q_head + long(start) * q_n;
                device const ushort* do_tile = do_head + long(start) * do_n;
                // s = k q^T
                simdgroup_matrix<float, 8, 8> s[6];
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < 6; ++i) {
                    s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
                }
                for (ushort d0 = 0; d0 < 64; d0 += 32) {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 1536; i += 128) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const float x = start + r < last ? widen(q_tile[r * q_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        simdgroup_matrix<float, 8, 8> a;
                        a.thread_elements()[0] = widen(k_row[d0 + d + fragment_column]);
                        a.thread_elements()[1] = widen(k_row[d0 + d + fragment_column + 1]);
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 36 + fragment_row + j * 36 + d];
                            x.thread_elements()[1] = stage[fragment_column * 36 + fragment_row + (j + 1) * 36 + d];
                            simdgroup_multiply_accumulate(s[j / 8], a, x, s[j / 8]);
                        }
                    }
                }
                {
                    const ushort d0 = 64;
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 768; i += 128) {
                        const ushort r = i / 16;
                        const ushort d = i % 16;
                        const float x = start + r < last ? widen(q_tile[r * q_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 16; d += 8) {
                        simdgroup_matrix<float, 8, 8> a;
                        a.thread_elements()[0] = widen(k_row[d0 + d + fragment_column]);
                        a.thread_elements()[1] = widen(k_row[d0 + d + fragment_column + 1]);
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 36 + fragment_row + j * 36 + d];
                            x.thread_elements()[1] = stage[fragment_column * 36 + fragment_row + (j + 1) * 36 + d];
                            simdgroup_multiply_accumulate(s[j / 8], a, x, s[j / 8]);
                        }
                    }
                }
                // p = exp(s - lse)
                if (edge) {
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 48; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const float x = s[j / 8].thread_elements()[e];
                            const long row = rows + min(start + j + fragment_column + e, last - 1);
                            const float base = isinf(lse[row]) ? 0.0f : lse[row];
                            const int query = start + j + fragment_column + e;
                            const bool seen = query < last && (!masked || visible(b, h, query, key_inside, sizes));
                            s[j / 8].thread_elements()[e] = seen ? fast::exp2(fma(x, factor, -base) * M_LOG2E_F) : -0.0f;
                        }
                    }
                } else {
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 48; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const float x = s[j / 8].thread_elements()[e];
                            const long row = rows + min(start + j + fragment_column + e, last - 1);
                            const float base = isinf(lse[row]) ? 0.0f : lse[row];
                            s[j / 8].thread_elements()[e] = fast::exp2(fma(x, factor, -base) * M_LOG2E_F);
                        }
                    }
                }
                // dv = dv + s do
                #pragma clang loop unroll(full)
                for (ushort d0 = 0; d0 < 64; d0 += 32) {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 1536; i += 128) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const float x = start + r < last ? widen(do_tile[r * do_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                        odd |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                    }
                    odd = simd_any(odd);
                    if (lane == 0) {
                        oddities[simdgroup] = odd;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool wild = false;
                    #pragma clang loop unroll(full)
                    for (ushort i = 0; i < 4; ++i) {
                        wild |= oddities[i] && edge;
                    }
                    if (wild) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(s[j / 8].thread_elements()[1]) : float(s[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const int query = start + j + c;
                                if (query < last && (!masked || visible(b, h, query, key_inside, sizes))) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 32; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            dv_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 36 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 32; d += 8) {
                                simdgroup_matrix<float, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_row * 36 + fragment_column + j * 36 + d];
                                x.thread_elements()[1] = stage[fragment_row * 36 + fragment_column + j * 36 + d + 1];
                                simdgroup_multiply_accumulate(dv_sum[(d0 + d) / 8], s[j / 8], x, dv_sum[(d0 + d) / 8]);
                            }
                        }
                    }
                }
                {
                    const ushort d0 = 64;
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 768; i += 128) {
                        const ushort r = i / 16;
                        const ushort d = i % 16;
                        const float x = start + r < last ? widen(do_tile[r * do_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                        odd |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                    }
                    odd = simd_any(odd);
                    if (lane == 0) {
                        oddities[simdgroup] = odd;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool wild = false;
                    #pragma clang loop unroll(full)
                    for (ushort i = 0; i < 4; ++i) {
                        wild |= oddities[i] && edge;
                    }
                    if (wild) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(s[j / 8].thread_elements()[1]) : float(s[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const int query = start + j + c;
                                if (query < last && (!masked || visible(b, h, query, key_inside, sizes))) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 16; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            dv_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 36 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 16; d += 8) {
                                simdgroup_matrix<float, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_row * 36 + fragment_column + j * 36 + d];
                                x.thread_elements()[1] = stage[fragment_row * 36 + fragment_column + j * 36 + d + 1];
                                simdgroup_multiply_accumulate(dv_sum[(d0 + d) / 8], s[j / 8], x, dv_sum[(d0 + d) / 8]);
                            }
                        }
                    }
                }
                // dp = v do^T
                simdgroup_matrix<float, 8, 8> dp[6];
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < 6; ++i) {
                    dp[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
                }
                for (ushort d0 = 0; d0 < 64; d0 += 32) {
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 1536; i += 128) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const float x = start + r < last ? widen(do_tile[r * do_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        simdgroup_matrix<float, 8, 8> a;
                        a.thread_elements()[0] = widen(v_row[d0 + d + fragment_column]);
                        a.thread_elements()[1] = widen(v_row[d0 + d + fragment_column + 1]);
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 36 + fragment_row + j * 36 + d];
                            x.thread_elements()[1] = stage[fragment_column * 36 + fragment_row + (j + 1) * 36 + d];
                            simdgroup_multiply_accumulate(dp[j / 8], a, x, dp[j / 8]);
                        }
                    }
                }
                {
                    const ushort d0 = 64;
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    for (ushort i = thread_index; i < 768; i += 128) {
                        const ushort r = i / 16;
                        const ushort d = i % 16;
                        const float x = start + r < last ? widen(do_tile[r * do_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 16; d += 8) {
                        simdgroup_matrix<float, 8, 8> a;
                        a.thread_elements()[0] = widen(v_row[d0 + d + fragment_column]);
                        a.thread_elements()[1] = widen(v_row[d0 + d + fragment_column + 1]);
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_column * 36 + fragment_row + j * 36 + d];
                            x.thread_elements()[1] = stage[fragment_column * 36 + fragment_row + (j + 1) * 36 + d];
                            simdgroup_multiply_accumulate(dp[j / 8], a, x, dp[j / 8]);
                        }
                    }
                }
                // ds = p (dp - delta)
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 48; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = dp[j / 8].thread_elements()[e];
                        const long row = rows + min(start + j + fragment_column + e, last - 1);
                        const float row_delta = delta[row];
                        const float weight = s[j / 8].thread_elements()[e];
                        dp[j / 8].thread_elements()[e] = weight * (x - row_delta);
                    }
                }
                if (edge) {
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 48; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const float x = dp[j / 8].thread_elements()[e];
                            const bool hidden = as_type<uint>(s[j / 8].thread_elements()[e]) == 0x80000000u;
                            dp[j / 8].thread_elements()[e] = hidden ? 0.0f : x;
                        }
                    }
                }
                // dk = dk + dp q
                for (ushort d0 = 0; d0 < 64; d0 += 32) {
                    simdgroup_matrix<float, 8, 8> spill[4];
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const ushort column = d0 + d + fragment_column + e;
                            spill[d / 8].thread_elements()[e] = !fresh && inside ? dk_spill_row[column] : 0.0f;
                        }
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 1536; i += 128) {
                        const ushort r = i / 32;
                        const ushort d = i % 32;
                        const float x = start + r < last ? widen(q_tile[r * q_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                        odd |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                    }
                    odd = simd_any(odd);
                    if (lane == 0) {
                        oddities[simdgroup] = odd;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool wild = false;
                    #pragma clang loop unroll(full)
                    for (ushort i = 0; i < 4; ++i) {
                        wild |= oddities[i] && edge;
                    }
                    if (wild) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(dp[j / 8].thread_elements()[1]) : float(dp[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const int query = start + j + c;
                                if (query < last && (!masked || visible(b, h, query, key_inside, sizes))) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 32; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            spill[d / 8].thread_elements()[e] += weight * float(stage[(j + c) * 36 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 32; d += 8) {
                                simdgroup_matrix<float, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_row * 36 + fragment_column + j * 36 + d];
                                x.thread_elements()[1] = stage[fragment_row * 36 + fragment_column + j * 36 + d + 1];
                                simdgroup_multiply_accumulate(spill[d / 8], dp[j / 8], x, spill[d / 8]);
                            }
                        }
                    }
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 32; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const ushort column = d0 + d + fragment_column + e;
                            if (inside) {
                                dk_spill_row[column] = spill[d / 8].thread_elements()[e];
                            }
                        }
                    }
                }
                {
                    const ushort d0 = 64;
                    simdgroup_matrix<float, 8, 8> spill[2];
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 16; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const ushort column = d0 + d + fragment_column + e;
                            spill[d / 8].thread_elements()[e] = !fresh && inside ? dk_spill_row[column] : 0.0f;
                        }
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool odd = false;
                    for (ushort i = thread_index; i < 768; i += 128) {
                        const ushort r = i / 16;
                        const ushort d = i % 16;
                        const float x = start + r < last ? widen(q_tile[r * q_n + d0 + d]) : float(0);
                        stage[r * 36 + d] = x;
                        odd |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                    }
                    odd = simd_any(odd);
                    if (lane == 0) {
                        oddities[simdgroup] = odd;
                    }
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    bool wild = false;
                    #pragma clang loop unroll(full)
                    for (ushort i = 0; i < 4; ++i) {
                        wild |= oddities[i] && edge;
                    }
                    if (wild) {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            for (ushort c = 0; c < 8; ++c) {
                                const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                                const float held = c % 2 ? float(dp[j / 8].thread_elements()[1]) : float(dp[j / 8].thread_elements()[0]);
                                const float weight = simd_shuffle(held, holder);
                                const int query = start + j + c;
                                if (query < last && (!masked || visible(b, h, query, key_inside, sizes))) {
                                    #pragma clang loop unroll(full)
                                    for (ushort d = 0; d < 16; d += 8) {
                                        #pragma clang loop unroll(full)
                                        for (ushort e = 0; e < 2; ++e) {
                                            spill[d / 8].thread_elements()[e] += weight * float(stage[(j + c) * 36 + d + fragment_column + e]);
                                        }
                                    }
                                }
                            }
                        }
                    } else {
                        #pragma clang loop unroll(full)
                        for (ushort j = 0; j < 48; j += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort d = 0; d < 16; d += 8) {
                                simdgroup_matrix<float, 8, 8> x;
                                x.thread_elements()[0] = stage[fragment_row * 36 + fragment_column + j * 36 + d];
                                x.thread_elements()[1] = stage[fragment_row * 36 + fragment_column + j * 36 + d + 1];
                                simdgroup_multiply_accumulate(spill[d / 8], dp[j / 8], x, spill[d / 8]);
                            }
                        }
                    }
                    #pragma clang loop unroll(full)
                    for (ushort d = 0; d < 16; d += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort e = 0; e < 2; ++e) {
                            const ushort column = d0 + d + fragment_column + e;
                            if (inside) {
                                dk_spill_row[column] = spill[d / 8].thread_elements()[e];
                            }
                        }
                    }
                }
                fresh = false;
            }
        }
    }

    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 80; d += 8) {
            #pragma clang loop unroll(full)
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                dv_row[column] = narrow(dv_sum[d / 8].thread_elements()[e] * 1.0f);
            }
        }
    }
    if (inside) {
        for (ushort d = 0; d < 80; d += 8) {
            for (ushort e = 0; e < 2; ++e) {
                const ushort column = d + fragment_column + e;
                dk_row[column] = narrow((fresh ? 0.0f : dk_spill_row[column]) * scale);
            }
        }
    }
}
