// Stands in for Apple's header of the same name where only the kinds of memory are checked.
#pragma once
#include "../metal_tensor"

namespace mpp {
namespace tensor_ops {

struct matmul2d_descriptor {
    enum class mode { multiply, multiply_accumulate };
    int m, n, k;
    bool transpose_left, transpose_right, relaxed_precision;
    mode matmul_mode;
    constexpr matmul2d_descriptor(int m, int n, int k = static_cast<int>(metal::dynamic_extent),
                                  bool transpose_left = false, bool transpose_right = false,
                                  bool relaxed_precision = false,
                                  mode matmul_mode = mode::multiply)
        : m(m), n(n), k(k), transpose_left(transpose_left), transpose_right(transpose_right),
          relaxed_precision(relaxed_precision), matmul_mode(matmul_mode) {}
};

template <matmul2d_descriptor descriptor, class Scope>
struct matmul2d {
    template <class Left, class Right, class T>
    metal::cooperative_tensor<T> get_destination_cooperative_tensor() const;
    template <class Left, class Right, class Result>
    void run(Left& left, Right& right, Result& result) const;
};

}  // namespace tensor_ops
}  // namespace mpp
