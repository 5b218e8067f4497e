// Attention, backward: the gradient of an array that the score reads.
//
// for each unit of the threadgroup, a block of queries of a head:
//     for each tile of keys that the mask lets the block of queries see:
//         s = q k^T scale                    outer product
//         dp = do v^T                        outer product
//         ds = exp(modified(s) - lse) (dp - delta)
//         for each entry of the array that the score reads:
//             its gradient = its gradient + ds (change of the score with it)
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

struct Modified {
    float score;
    float slope_0;
    int at_0_0;
    int at_0_1;
    int at_0_2;
};

static inline Modified modified(const float s, const int b, const int h, const int q, const int k,
                                constant long* sizes, device const half* t0) {
    const float p1 = as_type<float>(uint(sizes[24]));
    const float p2 = as_type<float>(uint(sizes[25]));
    const int p3 = int(sizes[26]);
    const int p4 = int(sizes[27]);
    const float p5 = as_type<float>(uint(sizes[28]));
    const int p6 = int(sizes[29]);
    const float real0 = float(t0[h * sizes[30] + p3 * sizes[31] + k * sizes[32]]);
    const float real1 = exp(float(h + p4) * p5) * float(abs(k - q - p6));
    return {precise::tanh(s * p1) * p2 + real0 - real1, 1.0f, h, 0, k};
}

// -inf hides a pair. By its bits: fast mathematics take no number for infinite.
static inline bool hides(const float score) {
    return as_type<uint>(score) == 0xff800000u;
}

[[max_total_threads_per_threadgroup(64)]]
kernel void tilefold_backward_inputs(
    device const half* q [[buffer(0)]],
    device const half* k [[buffer(1)]],
    device const half* v [[buffer(2)]],
    device const half* dO [[buffer(3)]],
    device const float* lse [[buffer(4)]],
    device const float* delta [[buffer(5)]],
    device float* input_parts [[buffer(6)]],
    device const half* t0 [[buffer(7)]],
    device const long* order [[buffer(8)]],
    device const long* run_rows [[buffer(9)]],
    device const long* runs [[buffer(10)]],
    constant long* sizes [[buffer(11)]],
    constant float& scale [[buffer(12)]],
    uint3 place [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
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
    const long do_b = sizes[19];
    const long do_h = sizes[20];
    const int do_n = int(sizes[21]);
    const long part_0 = sizes[33];
    const long part_1 = sizes[34];
    const long part_2 = sizes[35];
    const long shared = sizes[36];
    const long part_size = sizes[37];
    const long block_rows = sizes[38];
    // This lane's place in a fragment of 8x8: one row, two columns.
    const ushort fragment_row = (lane / 2) % 4 + 4 * (lane / 16);
    const ushort fragment_column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
    threadgroup half stage[1280];

    const int own = int(place.x) % splits;
    const long first_unit = long(place.x) / splits * shared;
    device float* part = input_parts + own * part_size;
    for (long turn = own; turn < shared; turn += splits) {
        const long unit = order[first_unit + turn];
        const int block = int(unit % block_rows);
        const int h = int(unit / block_rows % heads_q);
        const int b = int(unit / block_rows / heads_q);

        // The row of this lane. Lanes past the end read the last one and write nothing.
        const int query = block * 8 + fragment_row;
        const bool inside = query < len_q;
        const int query_inside = min(query, len_q - 1);
        device const half* q_row = q + b * q_b + h * q_h + long(query_inside) * q_n;
        device const half* do_row = dO + b * do_b + h * do_h + long(query_inside) * do_n;
        device const half* k_head = k + b * k_b + (h / group) * k_h;
        device const half* v_head = v + b * v_b + (h / group) * v_h;
        const long row = (long(b) * heads_q + h) * len_q + query_inside;
        const float base = isinf(lse[row]) ? 0.0f : lse[row];
        const float row_delta = delta[row];

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
        const long visited = b * row_b + h * row_h + block;
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
                for (ushort d0 = 0; d0 < 64; d0 += 32) {
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
                // dp = do v^T
                simdgroup_matrix<float, 8, 8> dp[4];
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < 4; ++i) {
                    dp[i] = make_filled_simdgroup_matrix<float, 8, 8>(float(0));
                }
                #pragma clang loop unroll(full)
                for (ushort d0 = 0; d0 < 64; d0 += 32) {
                    if (!edge) {
                        device const half* lane_of_v = v_tile + fragment_column * v_n + fragment_row;
                        #pragma clang loop unroll(full)
                        for (ushort d = 0; d < 32; d += 8) {
                            #pragma clang loop unroll(full)
                            for (ushort j = 0; j < 32; j += 8) {
                                simdgroup_matrix<half, 8, 8> x;
                                x.thread_elements()[0] = lane_of_v[j * v_n + d0 + d];
                                x.thread_elements()[1] = lane_of_v[(j + 1) * v_n + d0 + d];
                                simdgroup_multiply_accumulate(dp[j / 8], do_held[(d0 + d) / 8], x, dp[j / 8]);
                            }
                        }
                    } else {
                        threadgroup_barrier(mem_flags::mem_threadgroup);
                        for (ushort i = thread_index; i < 1024; i += 32) {
                            const ushort r = i / 32;
                            const ushort d = i % 32;
                            const half x = start + r < last ? v_tile[r * v_n + d0 + d] : half(0);
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
                                simdgroup_multiply_accumulate(dp[j / 8], do_held[(d0 + d) / 8], x, dp[j / 8]);
                            }
                        }
                    }
                }
                // ds = p (dp - delta), times the change of the score with each entry
                float given_0[8];
                long place_0[8];
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const float x = dp[j / 8].thread_elements()[e];
                        const int key = start + j + fragment_column + e;
                        const int key_inside = min(key, last - 1);
                        const Modified changed = modified(s[j / 8].thread_elements()[e] * scale, b, h, query_inside, key_inside, sizes, t0);
                        const float score = changed.score;
                        const bool seen = key < last && (!masked || visible(b, h, query_inside, key, sizes)) && !hides(score);
                        const float weight = fast::exp2((score - base) * M_LOG2E_F);
                        const float ds = weight * (x - row_delta);
                        const bool counts = inside && seen;
                        given_0[j / 4 + e] = counts ? ds * changed.slope_0 : 0.0f;
                        place_0[j / 4 + e] = changed.at_0_0 * part_0 + changed.at_0_1 * part_1 + changed.at_0_2 * part_2;
                    }
                }
                #pragma clang loop unroll(full)
                for (ushort j = 0; j < 32; j += 8) {
                    #pragma clang loop unroll(full)
                    for (ushort e = 0; e < 2; ++e) {
                        const int key = start + j + fragment_column + e;
                        float total = given_0[j / 4 + e];
                        total += simd_shuffle_xor(total, 2);
                        total += simd_shuffle_xor(total, 4);
                        total += simd_shuffle_xor(total, 16);
                        if (fragment_row == 0 && key < last) { part[place_0[j / 4 + e]] += total; }
                    }
                }
                simdgroup_barrier(mem_flags::mem_device);
            }
        }
        // Lanes may read what others wrote in the unit before.
        simdgroup_barrier(mem_flags::mem_device);
    }
}
