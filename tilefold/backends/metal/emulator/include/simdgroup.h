// Operations of simdgroups: barriers, shuffles, reductions and the 8x8 matrices.
#pragma once
#include "functions.h"

namespace metal {

enum class mem_flags : uint {
    mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4
};
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
    tilefold_barrier(emulator::Scope::threadgroup, "threadgroup_barrier", line,
                     flags != mem_flags::mem_none);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
    tilefold_barrier(emulator::Scope::simdgroup, "simdgroup_barrier", line,
                     flags != mem_flags::mem_none);
}

template <class T> struct shuffled { static constexpr bool allowed = true; };
template <> struct shuffled<bfloat> { static constexpr bool allowed = false; };
template <int n> struct shuffled<vec<bfloat, n>> { static constexpr bool allowed = false; };

#define TILEFOLD_SHUFFLE(name, source)                                                  \
    template <class T> inline T name(T value, ushort n, int line = __builtin_LINE()) {  \
        static_assert(shuffled<T>::allowed, "bfloat cannot be shuffled");               \
        const uint lane = tilefold_lane();                                              \
        tilefold_shuffle(#name, line, &value, sizeof(T), source);                       \
        return value;                                                                   \
    }
TILEFOLD_SHUFFLE(simd_shuffle, n)
TILEFOLD_SHUFFLE(simd_shuffle_xor, lane ^ n)
TILEFOLD_SHUFFLE(simd_shuffle_up, lane >= n ? lane - n : lane)
TILEFOLD_SHUFFLE(simd_shuffle_down, lane + n < 32 ? lane + n : lane)
TILEFOLD_SHUFFLE(simd_shuffle_rotate_up, (lane + 32 - n % 32) % 32)
TILEFOLD_SHUFFLE(simd_shuffle_rotate_down, (lane + n) % 32)
TILEFOLD_SHUFFLE(simd_broadcast, (void(lane), n))
#undef TILEFOLD_SHUFFLE
template <class T> inline T simd_broadcast_first(T value, int line = __builtin_LINE()) {
    tilefold_shuffle("simd_broadcast_first", line, &value, sizeof(T), 0);
    return value;
}

#define TILEFOLD_REDUCTION(name, step)                                            \
    template <class T> inline T name(T value, int line = __builtin_LINE()) {      \
        static_assert(shuffled<T>::allowed, "bfloat cannot be reduced");          \
        T all[32];                                                                \
        const int count = tilefold_gather(#name, line, &value, sizeof(T), all);   \
        T total = all[0];                                                         \
        for (int i = 1; i < count; ++i) total = step;                             \
        return total;                                                             \
    }
TILEFOLD_REDUCTION(simd_sum, total + all[i])
TILEFOLD_REDUCTION(simd_product, total * all[i])
TILEFOLD_REDUCTION(simd_max, max(total, all[i]))
TILEFOLD_REDUCTION(simd_min, min(total, all[i]))
TILEFOLD_REDUCTION(simd_and, total & all[i])
TILEFOLD_REDUCTION(simd_or, total | all[i])
#undef TILEFOLD_REDUCTION
inline bool simd_any(bool value, int line = __builtin_LINE()) {
    bool all[32], any = false;
    const int count = tilefold_gather("simd_any", line, &value, sizeof value, all);
    for (int i = 0; i < count; ++i) any = any || all[i];
    return any;
}
inline bool simd_all(bool value, int line = __builtin_LINE()) {
    bool all[32], every = true;
    const int count = tilefold_gather("simd_all", line, &value, sizeof value, all);
    for (int i = 0; i < count; ++i) every = every && all[i];
    return every;
}

template <class T> struct matrix_type;
template <> struct matrix_type<half> {
    static constexpr emulator::Type type = emulator::Type::of_half;
};
template <> struct matrix_type<float> {
    static constexpr emulator::Type type = emulator::Type::of_float;
};
template <> struct matrix_type<bfloat> {
    static constexpr emulator::Type type = emulator::Type::of_bfloat;
};

// A lane's place in an 8x8 fragment; it holds this element and its right neighbour. Not written in
// Apple's specification, but the same on all GPUs from M1 to M4.
inline uint fragment_row(uint lane) { return (lane / 2) % 4 + 4 * (lane / 16); }
inline uint fragment_column(uint lane) { return 2 * (lane % 2) + 4 * ((lane / 8) % 2); }

template <class T, int columns = 8, int rows = columns>
struct simdgroup_matrix {
    static_assert(columns == 8 && rows == 8, "simdgroup matrices are 8x8");
    static constexpr emulator::Type type = matrix_type<T>::type;
    vec<T, 2> held;
    simdgroup_matrix() = default;
    explicit inline simdgroup_matrix(T diagonal) {
        const uint lane = tilefold_lane(), row = fragment_row(lane), column = fragment_column(lane);
        held.x = row == column ? diagonal : T(0.0f);
        held.y = row == column + 1 ? diagonal : T(0.0f);
    }
    inline vec<T, 2>& thread_elements() {
        tilefold_count(emulator::elements);
        return held;
    }
    inline const vec<T, 2>& thread_elements() const {
        tilefold_count(emulator::elements);
        return held;
    }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int columns, int rows>
inline simdgroup_matrix<T, columns, rows> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, columns, rows> filled;
    filled.held = vec<T, 2>(value);
    return filled;
}

// Where this lane's elements lie: the origin is (column, row) in memory, also of a transposed read.
template <class T>
inline T* fragment_place(T* source, ulong stride, ulong2 origin, bool transposed, uint e) {
    const uint lane = tilefold_lane();
    const ulong row = fragment_row(lane), column = fragment_column(lane) + e;
    return source + (origin.y + (transposed ? column : row)) * stride + origin.x +
           (transposed ? row : column);
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const T* source, ulong stride = 8,
                           ulong2 origin = ulong2(0), bool transposed = false,
                           int line = __builtin_LINE()) {
    tilefold_agree("simdgroup_load", line, source + origin.y * stride + origin.x,
                   2 * stride + transposed);
    d.held.x = *fragment_place(source, stride, origin, transposed, 0);
    d.held.y = *fragment_place(source, stride, origin, transposed, 1);
}

template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> a, T* target, ulong stride = 8,
                            ulong2 origin = ulong2(0), bool transposed = false,
                            int line = __builtin_LINE()) {
    tilefold_agree("simdgroup_store", line, target + origin.y * stride + origin.x,
                   2 * stride + transposed);
    *fragment_place(target, stride, origin, transposed, 0) = a.held.x;
    *fragment_place(target, stride, origin, transposed, 1) = a.held.y;
}

template <class T, class S>
inline void simdgroup_multiply(simdgroup_matrix<S, 8, 8>& d, simdgroup_matrix<T, 8, 8>& a,
                               simdgroup_matrix<T, 8, 8>& b, int line = __builtin_LINE()) {
    static_assert(is_same_v<S, T> || is_same_v<S, float>, "sums are of the factors' type or float");
    tilefold_multiply("simdgroup_multiply", line, a.type, d.type, &d, &a, &b, nullptr);
}

template <class T, class S>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<S, 8, 8>& d,
                                          simdgroup_matrix<T, 8, 8>& a,
                                          simdgroup_matrix<T, 8, 8>& b,
                                          simdgroup_matrix<S, 8, 8>& c,
                                          int line = __builtin_LINE()) {
    static_assert(is_same_v<S, T> || is_same_v<S, float>, "sums are of the factors' type or float");
    tilefold_multiply("simdgroup_multiply_accumulate", line, a.type, d.type, &d, &a, &b, &c);
}

}  // namespace metal
