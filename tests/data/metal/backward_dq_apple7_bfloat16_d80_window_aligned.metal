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
kernel void tilefold_backward_dq(
    device const ushort* q [[buffer(0)]],
    device const ushort* k [[buffer(1)]],
    device const ushort* v [[buffer(2)]],
    device const ushort* o [[buffer(3)]],
    device const ushort* dO [[buffer(4)]],
    device const float* lse [[buffer(5)]],
    device float* delta [[buffer(6)]],
    device ushort* dq [[buffer(7)]],
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
    threadgroup float stage[2304];
    threadgroup bool oddities[4];

    const int h = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);

    // The row of this lane. Lanes past the end read the last one and write nothing.
    const int query = block * 32 + simdgroup * 8 + fragment_row;
    const bool inside = query < len_q;
    const int query_inside = min(query, len_q - 1);
    device const ushort* q_row = q + b * q_b + h * q_h + long(query_inside) * q_n;
    device const ushort* o_row = o + b * o_b + h * o_h + long(query_inside) * o_n;
    device const ushort* do_row = dO + b * do_b + h * do_h + long(query_inside) * do_n;
    device ushort* dq_row = dq + b * dq_b + h * dq_h + long(query_inside) * dq_n;
    device const ushort* k_head = k + b * k_b + (h / group) * k_h;
    device const ushort* v_head = v + b * v_b + (h / group) * v_h;
    const long row = (long(b) * heads_q + h) * len_q + query_inside;

    // delta = rowsum(do o)
    float row_delta = 0.0f;
    for (ushort d = 0; d < 80; d += 8) {
        #pragma clang loop unroll(full)
        for (ushort e = 0; e < 2; ++e) {
            const ushort column = d + fragment_column + e;
            row_delta += widen(do_row[column]) * widen(o_row[column]);
        }
    }
    row_delta = row_delta + simd_shuffle_xor(row_delta, 1);
    row_delta = row_delta + simd_shuffle_xor(row_delta, 8);
    if (inside && fragment_column == 0) {
        delta[row] = row_delta;
    }

    const float factor = scale;
    const float base = isinf(lse[row]) ? 0.0f : lse[row];

    simdgroup_matrix<float, 8, 8> dq_sum[10];
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < 10; ++i) {
        dq_sum[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
    }
    const long visited = b * row_b + h * row_h + block;
    for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
        const int first = int(runs[3 * run]);
        const int last = int(runs[3 * run + 1]);
        const bool masked = runs[3 * run + 2] != 0;
        for (int start = first; start < last; start += 64) {
            const bool edge = masked || start + 64 > last;
            device const ushort* k_tile = k_head + long(start) * k_n;
            device const ushort* v_tile = v_head + long(start) * v_n;
            // s = q k^T
            simdgroup_matrix<float, 8, 8> s[8];
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < 8; ++i) {
                s[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
            }
            for (ushort d0 = 0; d0 < 64; d0 += 32) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                for (ushort i = thread_index; i < 512; i += 128) {
                    const ushort r = i / 8;
                    const ushort d = 4 * (i % 8);
                    const ushort4 several = start + r < last ? *(device const ushort4*)(k_tile + r * k_n + d0 + d) : ushort4(ushort(0));
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 4; ++e) {
                        const float x = widen(several[e]);
                        stage[r * 36 + d + e] = x;
                    }
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                #pragma clang loop unroll(full)
                for (ushort d = 0; d < 32; d += 8) {
                    simdgroup_matrix<float, 8, 8> a;
                    const ushort2 q_pair = *(device const ushort2*)(q_row + d0 + d + fragment_column);
                    a.thread_elements()[0] = widen(q_pair[0]);
                    a.thread_elements()[1] = widen(q_pair[1]);
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
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
                for (ushort i = thread_index; i < 256; i += 128) {
                    const ushort r = i / 4;
                    const ushort d = 4 * (i % 4);
                    const ushort4 several = start + r < last ? *(device const ushort4*)(k_tile + r * k_n + d0 + d) : ushort4(ushort(0));
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 4; ++e) {
                        const float x = widen(several[e]);
                        stage[r * 36 + d + e] = x;
                    }
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                #pragma clang loop unroll(full)
                for (ushort d = 0; d < 16; d += 8) {
                    simdgroup_matrix<float, 8, 8> a;
                    const ushort2 q_pair = *(device const ushort2*)(q_row + d0 + d + fragment_column);
                    a.thread_elements()[0] = widen(q_pair[0]);
                    a.thread_elements()[1] = widen(q_pair[1]);
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
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
            for (ushort d0 = 0; d0 < 64; d0 += 32) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                for (ushort i = thread_index; i < 512; i += 128) {
                    const ushort r = i / 8;
                    const ushort d = 4 * (i % 8);
                    const ushort4 several = start + r < last ? *(device const ushort4*)(v_tile + r * v_n + d0 + d) : ushort4(ushort(0));
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 4; ++e) {
                        const float x = widen(several[e]);
                        stage[r * 36 + d + e] = x;
                    }
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                #pragma clang loop unroll(full)
                for (ushort d = 0; d < 32; d += 8) {
                    simdgroup_matrix<float, 8, 8> a;
                    const ushort2 do_pair = *(device const ushort2*)(do_row + d0 + d + fragment_column);
                    a.thread_elements()[0] = widen(do_pair[0]);
                    a.thread_elements()[1] = widen(do_pair[1]);
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
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
                for (ushort i = thread_index; i < 256; i += 128) {
                    const ushort r = i / 4;
                    const ushort d = 4 * (i % 4);
                    const ushort4 several = start + r < last ? *(device const ushort4*)(v_tile + r * v_n + d0 + d) : ushort4(ushort(0));
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 4; ++e) {
                        const float x = widen(several[e]);
                        stage[r * 36 + d + e] = x;
                    }
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                #pragma clang loop unroll(full)
                for (ushort d = 0; d < 16; d += 8) {
                    simdgroup_matrix<float, 8, 8> a;
                    const ushort2 do_pair = *(device const ushort2*)(do_row + d0 + d + fragment_column);
                    a.thread_elements()[0] = widen(do_pair[0]);
                    a.thread_elements()[1] = widen(do_pair[1]);
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
                        simdgroup_matrix<float, 8, 8> x;
                        x.thread_elements()[0] = stage[fragment_column * 36 + fragment_row + j * 36 + d];
                        x.thread_elements()[1] = stage[fragment_column * 36 + fragment_row + (j + 1) * 36 + d];
                        simdgroup_multiply_accumulate(dp[j / 8], a, x, dp[j / 8]);
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
            // dq = dq + dp k
            #pragma clang loop unroll(full)
            for (ushort d0 = 0; d0 < 64; d0 += 32) {
                threadgroup_barrier(mem_flags::mem_threadgroup);
                bool odd = false;
                for (ushort i = thread_index; i < 512; i += 128) {
                    const ushort r = i / 8;
                    const ushort d = 4 * (i % 8);
                    const ushort4 several = start + r < last ? *(device const ushort4*)(k_tile + r * k_n + d0 + d) : ushort4(ushort(0));
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 4; ++e) {
                        const float x = widen(several[e]);
                        stage[r * 36 + d + e] = x;
                        odd |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                    }
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
                    for (ushort j = 0; j < 64; j += 8) {
                        for (ushort c = 0; c < 8; ++c) {
                            const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                            const float held = c % 2 ? float(dp[j / 8].thread_elements()[1]) : float(dp[j / 8].thread_elements()[0]);
                            const float weight = simd_shuffle(held, holder);
                            const int key = start + j + c;
                            if (key < last && (!masked || visible(b, h, query_inside, key, sizes))) {
                                #pragma clang loop unroll(full)
                                for (ushort d = 0; d < 32; d += 8) {
                                    #pragma clang loop unroll(full)
                                    for (ushort e = 0; e < 2; ++e) {
                                        dq_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 36 + d + fragment_column + e]);
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
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_row * 36 + fragment_column + j * 36 + d];
                            x.thread_elements()[1] = stage[fragment_row * 36 + fragment_column + j * 36 + d + 1];
                            simdgroup_multiply_accumulate(dq_sum[(d0 + d) / 8], dp[j / 8], x, dq_sum[(d0 + d) / 8]);
                        }
                    }
                }
            }
            {
                const ushort d0 = 64;
                threadgroup_barrier(mem_flags::mem_threadgroup);
                bool odd = false;
                for (ushort i = thread_index; i < 256; i += 128) {
                    const ushort r = i / 4;
                    const ushort d = 4 * (i % 4);
                    const ushort4 several = start + r < last ? *(device const ushort4*)(k_tile + r * k_n + d0 + d) : ushort4(ushort(0));
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 4; ++e) {
                        const float x = widen(several[e]);
                        stage[r * 36 + d + e] = x;
                        odd |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                    }
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
                    for (ushort j = 0; j < 64; j += 8) {
                        for (ushort c = 0; c < 8; ++c) {
                            const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);
                            const float held = c % 2 ? float(dp[j / 8].thread_elements()[1]) : float(dp[j / 8].thread_elements()[0]);
                            const float weight = simd_shuffle(held, holder);
                            const int key = start + j + c;
                            if (key < last && (!masked || visible(b, h, query_inside, key, sizes))) {
                                #pragma clang loop unroll(full)
                                for (ushort d = 0; d < 16; d += 8) {
                                    #pragma clang loop unroll(full)
                                    for (ushort e = 0; e < 2; ++e) {
                                        dq_sum[(d0 + d) / 8].thread_elements()[e] += weight * float(stage[(j + c) * 36 + d + fragment_column + e]);
                                    }
                                }
                            }
                        }
                    }
                } else {
                    #pragma clang loop unroll(full)
                    for (ushort j = 0; j < 64; j += 8) {
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 16; d += 8) {
                            simdgroup_matrix<float, 8, 8> x;
                            x.thread_elements()[0] = stage[fragment_row * 36 + fragment_column + j * 36 + d];
                            x.thread_elements()[1] = stage[fragment_row * 36 + fragment_column + j * 36 + d + 1];
                            simdgroup_multiply_accumulate(dq_sum[(d0 + d) / 8], dp[j / 8], x, dq_sum[(d0 + d) / 8]);
                        }
                    }
                }
            }
        }
    }

    if (inside) {
        #pragma clang loop unroll(full)
        for (ushort d = 0; d < 80; d += 8) {
            const ushort column = d + fragment_column;
            *(device ushort2*)(dq_row + column) = ushort2(narrow(dq_sum[d / 8].thread_elements()[0] * scale), narrow(dq_sum[d / 8].thread_elements()[1] * scale));
        }
    }
}
