// Attention, forward, on tensor operations: o = softmax(scale q k^T) v and lse.
//
// for each tile of keys that the mask lets the block of queries see:
//     s = q k^T scale, masked            matmul2d, then through threadgroup memory
//     m' = max(m, rowmax s)
//     p = exp(s - m')
//     l = l exp(m - m') + rowsum p
//     o = o exp(m - m') + p v            matmul2d, p from threadgroup memory
// o = o / l
// lse = m + log l                        0 and -inf where no key is seen
#include <metal_stdlib>
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;

#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

static inline bool visible(const int b, const int h, const int q, const int k,
                           constant long* sizes) {
    const int p0 = int(sizes[23]);
    return q + p0 >= k;
}

[[max_total_threads_per_threadgroup(128)]]
kernel void tilefold_forward(
    device const half* q [[buffer(0)]],
    device const half* k [[buffer(1)]],
    device const half* v [[buffer(2)]],
    device half* o [[buffer(3)]],
    device float* lse [[buffer(4)]],
    device const long* order [[buffer(5)]],
    device const long* run_rows [[buffer(6)]],
    device const long* runs [[buffer(7)]],
    constant long* sizes [[buffer(8)]],
    constant float& scale [[buffer(9)]],
    uint3 place [[threadgroup_position_in_grid]],
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

    threadgroup float scores[4224];
    threadgroup half weights[4096];
    threadgroup float factors[64];

    const int h = int(place.y);
    const int b = int(place.z);
    const int block = int(order[place.x]);
    // The rows of this simdgroup. One without any is done: only simdgroups wait below.
    const int first_query = block * 64 + simdgroup * 16;
    const int rows = min(16, len_q - first_query);
    if (rows <= 0) {
        return;
    }
    // In the softmax this lane folds every other column of one row.
    const ushort lane_row = lane / 2;
    const ushort side = lane % 2;
    const ushort tile_row = simdgroup * 16 + lane_row;
    const bool inside = lane_row < rows;
    const int query = min(first_query + lane_row, len_q - 1);

    device const half* q_row = q + b * q_b + h * q_h + long(first_query) * q_n;
    device half* o_row = o + b * o_b + h * o_h + long(first_query) * o_n;
    device const half* k_head = k + b * k_b + (h / group) * k_h;
    device const half* v_head = v + b * v_b + (h / group) * v_h;

    constexpr auto qk_descriptor = matmul2d_descriptor(
        16, 64, static_cast<int>(dynamic_extent), false, true, false,
        matmul2d_descriptor::mode::multiply_accumulate);
    matmul2d<qk_descriptor, execution_simdgroups<1>> qk;
    constexpr auto pv_descriptor = matmul2d_descriptor(
        16, 64, static_cast<int>(dynamic_extent), false, false, false,
        matmul2d_descriptor::mode::multiply_accumulate);
    matmul2d<pv_descriptor, execution_simdgroups<1>> pv;
    // Tensors take no pointer to const, but the operands are only read.
    tensor<device half, dextents<int, 2>, tensor_inline> queries(
        const_cast<device half*>(q_row), dextents<int, 2>(80, rows), array<int, 2>{1, int(q_n)});
    // Views of a tile of p and of v, for their types: the tensors of o are made for them.
    tensor weights_tile(
        weights + simdgroup * 1024, dextents<int, 2>(64, 16), array<int, 2>{1, 64});
    tensor<device half, dextents<int, 2>, tensor_inline> values_tile(
        const_cast<device half*>(v_head), dextents<int, 2>(64, 64), array<int, 2>{1, int(v_n)});
    const float factor = fabs(scale) * M_LOG2E_F;
    const int width_0 = 64;
    auto o_0 = pv.get_destination_cooperative_tensor<
        decltype(weights_tile), decltype(values_tile), float>();
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < o_0.get_capacity(); ++i) {
        if (o_0.is_valid_element(i)) {
            o_0[i] = 0;
        }
    }
    const int width_1 = 16;
    auto o_1 = pv.get_destination_cooperative_tensor<
        decltype(weights_tile), decltype(values_tile), float>();
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < o_1.get_capacity(); ++i) {
        if (o_1.is_valid_element(i)) {
            o_1[i] = 0;
        }
    }
    float m = -FLT_MAX;
    float l = 0.0f;
    ushort any = 0;
    const long visited = b * row_b + h * row_h + block;
    for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run) {
        const int first = int(runs[3 * run]);
        const int last = int(runs[3 * run + 1]);
        const bool masked = runs[3 * run + 2] != 0;
        for (int start = first; start < last; start += 64) {
            const bool edge = masked || start + 64 > last;
            const int keys = min(64, last - start);
            // s = q k^T
            device const half* k_rows = k_head + long(start) * k_n;
            tensor<device half, dextents<int, 2>, tensor_inline> k_tile(
                const_cast<device half*>(k_rows), dextents<int, 2>(80, keys), array<int, 2>{1, int(k_n)});
            auto s = qk.get_destination_cooperative_tensor<
                decltype(queries), decltype(k_tile), float>();
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < s.get_capacity(); ++i) {
                if (s.is_valid_element(i)) {
                    s[i] = 0;
                }
            }
            qk.run(queries, k_tile, s);
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < s.get_capacity(); ++i) {
                if (s.is_valid_element(i)) {
                    const auto index = s.get_multidimensional_index(i);
                    const int column = index[0], row = index[1];
                    scores[(simdgroup * 16 + row) * 66 + column] = s[i];
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            // m' = max(m, rowmax s)
            float m_new = m;
            for (ushort j = side; j < 64; j += 2) {
                const int key = start + j;
                const bool seen = inside && (!edge || (key < last && (!masked || visible(b, h, query, key, sizes))));
                any |= seen;
                const float x = seen ? scores[tile_row * 66 + j] : -FLT_MAX;
                scores[tile_row * 66 + j] = x;
                m_new = max(m_new, x);
            }
            m_new = max(m_new, simd_shuffle_xor(m_new, 1));
            // p = exp(s - m'), l = l correction + rowsum p
            const float correction = fast::exp2((m - m_new) * factor);
            m = m_new;
            l *= correction;
            if (edge) {
                for (ushort j = side; j < 64; j += 2) {
                    const float x = scores[tile_row * 66 + j];
                    const float weight = x == -FLT_MAX ? 0.0f : fast::exp2((x - m) * factor);
                    weights[tile_row * 64 + j] = half(weight);
                    l += weight;
                }
            } else {
                for (ushort j = side; j < 64; j += 2) {
                    const float weight = fast::exp2((scores[tile_row * 66 + j] - m) * factor);
                    weights[tile_row * 64 + j] = half(weight);
                    l += weight;
                }
            }
            if (side == 0) {
                factors[tile_row] = correction;
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            // o = o correction + p v
            tensor p(
                weights + simdgroup * 1024, dextents<int, 2>(keys, 16), array<int, 2>{1, 64});
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < o_0.get_capacity(); ++i) {
                if (o_0.is_valid_element(i)) {
                    const auto index = o_0.get_multidimensional_index(i);
                    const int column = index[0], row = index[1];
                    o_0[i] *= factors[simdgroup * 16 + row];
                }
            }
            device const half* v_rows_0 = v_head + long(start) * v_n;
            tensor<device half, dextents<int, 2>, tensor_inline> v_tile_0(
                const_cast<device half*>(v_rows_0), dextents<int, 2>(width_0, keys), array<int, 2>{1, int(v_n)});
            bool wild_0 = false;
            if (masked) {
                for (int j = lane; j < keys * width_0; j += 32) {
                    const float x = float(v_rows_0[j / width_0 * v_n + j % width_0]);
                    wild_0 |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                }
                wild_0 = simd_any(wild_0);
            }
            if (wild_0) {
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < o_0.get_capacity(); ++i) {
                    if (o_0.is_valid_element(i)) {
                        const auto index = o_0.get_multidimensional_index(i);
                        const int column = index[0], row = index[1];
                        for (int j = 0; row < rows && column < width_0 && j < keys; ++j) {
                            const int key = start + j;
                            if (key < last && (!masked || visible(b, h, first_query + row, key, sizes))) {
                                o_0[i] += float(weights[(simdgroup * 16 + row) * 64 + j]) * float(v_rows_0[j * v_n + column]);
                            }
                        }
                    }
                }
            } else {
                pv.run(p, v_tile_0, o_0);
            }
            #pragma clang loop unroll(full)
            for (ushort i = 0; i < o_1.get_capacity(); ++i) {
                if (o_1.is_valid_element(i)) {
                    const auto index = o_1.get_multidimensional_index(i);
                    const int column = index[0], row = index[1];
                    o_1[i] *= factors[simdgroup * 16 + row];
                }
            }
            device const half* v_rows_1 = v_head + long(start) * v_n + 64;
            tensor<device half, dextents<int, 2>, tensor_inline> v_tile_1(
                const_cast<device half*>(v_rows_1), dextents<int, 2>(width_1, keys), array<int, 2>{1, int(v_n)});
            bool wild_1 = false;
            if (masked) {
                for (int j = lane; j < keys * width_1; j += 32) {
                    const float x = float(v_rows_1[j / width_1 * v_n + j % width_1]);
                    wild_1 |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;
                }
                wild_1 = simd_any(wild_1);
            }
            if (wild_1) {
                #pragma clang loop unroll(full)
                for (ushort i = 0; i < o_1.get_capacity(); ++i) {
                    if (o_1.is_valid_element(i)) {
                        const auto index = o_1.get_multidimensional_index(i);
                        const int column = index[0], row = index[1];
                        for (int j = 0; row < rows && column < width_1 && j < keys; ++j) {
                            const int key = start + j;
                            if (key < last && (!masked || visible(b, h, first_query + row, key, sizes))) {
                                o_1[i] += float(weights[(simdgroup * 16 + row) * 64 + j]) * float(v_rows_1[j * v_n + column]);
                            }
                        }
                    }
                }
            } else {
                pv.run(p, v_tile_1, o_1);
            }
        }
    }
    l += simd_shuffle_xor(l, 1);
    any |= simd_shuffle_xor(any, 1);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (side == 0) {
        factors[tile_row] = any ? 1.0f / l : 0.0f;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < o_0.get_capacity(); ++i) {
        if (o_0.is_valid_element(i)) {
            const auto index = o_0.get_multidimensional_index(i);
            const int column = index[0], row = index[1];
            if (row < rows && column < width_0) {
                o_row[row * o_n + column] = half(o_0[i] * factors[simdgroup * 16 + row]);
            }
        }
    }
    #pragma clang loop unroll(full)
    for (ushort i = 0; i < o_1.get_capacity(); ++i) {
        if (o_1.is_valid_element(i)) {
            const auto index = o_1.get_multidimensional_index(i);
            const int column = index[0], row = index[1];
            if (row < rows && column < width_1) {
                o_row[row * o_n + 64 + column] = half(o_1[i] * factors[simdgroup * 16 + row]);
            }
        }
    }
    if (inside && side == 0) {
        const long at = (long(b) * heads_q + h) * len_q + query;
        const float sum = l > 0.0f ? fma(m, fabs(scale), log(l)) : l / l;
        lse[at] = any ? sum : -INFINITY;
    }
}
